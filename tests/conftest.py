"""What holds for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support.skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

# A limit of 200 ms an example says how busy the machine is; pytest's own time-out finds what hangs.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
