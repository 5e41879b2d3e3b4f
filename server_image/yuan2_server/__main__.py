"""`python -m yuan2_server worker|api|web`: the programs of a Yuan2Service's pods."""

from __future__ import annotations

import sys

from yuan2_core.exit_codes import EXIT_COMPLETE
from yuan2_core.startup import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm(EXIT_COMPLETE)
    from yuan2_server.program import main  # takes seconds

    sys.exit(main())
