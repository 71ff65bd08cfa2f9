"""What every test shares: in CI a skip is a failure, for a feature CI does not have is a feature nobody tests."""

from __future__ import annotations

import compileall
import os
from collections.abc import Generator
from pathlib import Path

import pytest

import kon_agent


def pytest_configure() -> None:
    """Compile the package once: the workers of every agent under test import it, and may write no bytecode."""
    compileall.compile_dir(Path(kon_agent.__file__).parent, quiet=2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where CI is set."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in CI: {report.longrepr}"
    return report
