"""What holds for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A limit of 200 ms an example says how busy the machine is; pytest's own time-out finds what hangs.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
