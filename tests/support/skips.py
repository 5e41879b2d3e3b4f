"""With `CI=true` a skipped test fails, unless it is marked `gpu`: what does not run proves nothing."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

_IN_CI = os.environ.get("CI") == "true"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Of a test: `skip`, `skipif`, `importorskip`, an empty parameter set."""
    report = yield
    expected_to_fail = hasattr(report, "wasxfail")
    if _IN_CI and report.skipped and not expected_to_fail and item.get_closest_marker("gpu") is None:
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Of a whole file, which carries no marks yet: `importorskip` at its top."""
    report = yield
    if _IN_CI and report.skipped:
        _fail(report)
    return report


def _fail(report: Any) -> None:
    _, _, reason = report.longrepr
    report.outcome = "failed"
    report.longrepr = f"CI=true, so this is a failure: {reason.removeprefix('Skipped: ')}"
