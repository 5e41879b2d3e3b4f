"""What the fork server of `tests.support.ranks` imports: all that a rank imports."""

from __future__ import annotations

import yuan2_trainer.export
import yuan2_trainer.fastchat.process
import yuan2_trainer.loading
import yuan2_trainer.loop
import yuan2_trainer.rank

__all__ = ["yuan2_trainer"]
