"""`python -m yuan2_operator`: run the operator until SIGTERM."""

from __future__ import annotations

import sys

from yuan2_core.exit_codes import EXIT_COMPLETE
from yuan2_core.startup import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm(EXIT_COMPLETE)
    from yuan2_operator.program import main  # takes seconds

    sys.exit(main())
