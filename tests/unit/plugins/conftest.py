"""A host to collect from: a copy of fixtures/host_a that a test may change between cycles."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kon_agent.plugins.context import Context

HOST_A = Path(__file__).parents[2] / "fixtures" / "host_a"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Return the root of the copy."""
    return Path(shutil.copytree(HOST_A, tmp_path / "host"))


@pytest.fixture
def context(host: Path) -> Context:
    """Return the context of a collector on that host."""
    return Context(root=str(host))
