"""What the fork server of `tests.support.ranks` imports: all that a rank imports."""

from __future__ import annotations

import yuan2_trainer.checkpoint.export
import yuan2_trainer.fastchat.process
import yuan2_trainer.rank
import yuan2_trainer.train.engine
import yuan2_trainer.train.loop

__all__ = ["yuan2_trainer"]
