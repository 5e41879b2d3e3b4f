"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.support.skips import pytest_make_collect_report, pytest_runtest_makereport
from yuan2_local.proxies import around_proxy

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

# The tests talk to what they start on this machine, with clients that honour a proxy of the environment.
os.environ.update(around_proxy(os.environ))

# A limit of 200 ms an example says how busy the machine is; pytest's own time-out finds what hangs.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
