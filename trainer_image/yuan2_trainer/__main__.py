"""`python -m yuan2_trainer`: one pod of a fine-tuning."""

from __future__ import annotations

import sys

from yuan2_core.exit_codes import EXIT_PREEMPTED
from yuan2_core.startup import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm(EXIT_PREEMPTED)
    from yuan2_trainer.program import main  # takes seconds

    sys.exit(main())
