"""The real agent and receiver for one test: a network of their own, a folder, certificates; nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kon_agent.receiver import pki as authority
from tests.support.agent import AGENT_ID, Agent
from tests.support.receiver import Receiver

StartAgent = Callable[..., Agent]


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an authority, a server's certificate, and those of two agents."""
    folder = tmp_path_factory.mktemp("pki")
    authority.init(folder, [])
    authority.agent(folder, AGENT_ID)
    authority.agent(folder, "edge-2")
    return folder


@pytest.fixture(scope="session")
def other_pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like `pki`, of another authority."""
    folder = tmp_path_factory.mktemp("other-pki")
    authority.init(folder, [])
    authority.agent(folder, AGENT_ID)
    return folder


@pytest.fixture(scope="session")
def network() -> Iterator[Sequence[str]]:
    """Return a prefix that runs a command in a network namespace with nothing but `lo`; as root, else empty.

    So an agent under test watches no interface of this machine, and no agent of this machine meets ours.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        yield ()
        return
    name = f"kon-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield ("ip", "netns", "exec", name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that any user can enter and whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="kon-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def receiver(folder: Path, pki: Path, network: Sequence[str]) -> Iterator[Receiver]:
    """Start a receiver that accepts the authority's agents."""
    with Receiver(folder, pki, ["--client-ca", str(pki / "ca.pem")], network) as running:
        yield running


@pytest.fixture
def start_agent(folder: Path, receiver: Receiver, pki: Path, network: Sequence[str]) -> Iterator[StartAgent]:
    """Return what starts an agent of `receiver` with plugins and what else `Agent` takes."""
    with ExitStack() as stack:

        def start(plugins: Mapping[str, Mapping[str, Any]], **options: Any) -> Agent:
            options = {"pki": pki, "prefix": network, **options}
            return stack.enter_context(Agent(folder, receiver.port, plugins=plugins, **options))

        yield start
