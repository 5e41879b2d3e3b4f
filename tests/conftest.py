"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A limit of 200 ms an example says how busy the machine is; pytest's own time-out finds what hangs.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
