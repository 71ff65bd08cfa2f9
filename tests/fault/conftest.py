"""One agent, one receiver, one fault per test; and at the end the table of all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kon_agent.receiver import pki as authority
from tests.support import faults
from tests.support.agent import AGENT_ID, Agent
from tests.support.faults import Case, Plugins
from tests.support.netns import Namespace, cable
from tests.support.receiver import Receiver
from tests.support.udp_proxy import UdpProxy

LONG_TIMEOUT_S = 3600
SHORT_TIMEOUT_S = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every row needs root: rings are read beyond their owners' death, and the agent attaches BPF programs."""
    missing = _missing_feature()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_S if faults.IS_LONG else SHORT_TIMEOUT_S))
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


def _missing_feature() -> str:
    if os.geteuid() != 0:
        return "root"
    return "" if shutil.which("ip") else "the program ip"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if faults.TABLE:
        terminalreporter.section("fault matrix")
        for line in faults.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an authority, a server's certificate and the agent's."""
    folder = tmp_path_factory.mktemp("fault-pki")
    authority.init(folder, [])
    authority.agent(folder, AGENT_ID)
    return folder


@pytest.fixture(scope="session")
def ends() -> Iterator[tuple[Namespace, Namespace]]:
    """Return two namespaces joined by a cable: the agent's, and the receiver's."""
    with cable() as pair:
        yield pair


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that any user can enter and whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="kon-fault-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


class Matrix:
    """Makes cases, and clears them away.

    Args:
        folder: for what one case keeps.
        pki: the certificates.
        ends: the namespaces.
        stack: what clears away.
    """

    def __init__(self, folder: Path, pki: Path, ends: tuple[Namespace, Namespace], stack: ExitStack) -> None:
        self.folder = folder
        self.pki = pki
        self.here, self.there = ends
        self.stack = stack

    def case(
        self,
        row: str,
        plugins: Plugins = faults.LOAD,
        sections: Mapping[str, Any] | None = None,
        has_receiver: bool = True,
        environment: dict[str, str] | None = None,
    ) -> Case:
        """Return a case on the loopback; its receiver runs, if wanted, its agent does not yet."""
        receiver = Receiver(self.folder, self.pki, ["--client-ca", str(self.pki / "ca.pem")], self.here.prefix)
        options: dict[str, Any] = {
            "sections": dict(sections or {}),
            "prefix": self.here.prefix,
            "environment": environment,
        }
        agent = Agent(self.folder, receiver.port, self.pki, plugins, **options)
        return self._enter(row, agent, receiver, has_receiver)

    def case_over_proxy(self, row: str, plugins: Plugins = faults.LOAD, is_open: bool = False) -> tuple[Case, UdpProxy]:
        """Return a case over the cable, with a proxy before the receiver; `is_open`: it asks for no certificate."""
        flags = [] if is_open else ["--client-ca", str(self.pki / "ca.pem")]
        receiver = Receiver(self.folder, self.pki, flags, self.there.prefix)
        files = {"ca": "ca.pem"} if is_open else _TLS_FILES
        tls = {name: str(self.pki / file) for name, file in files.items()}
        server = f"quic://{self.there.address}:{receiver.port}"
        agent = Agent(
            self.folder,
            receiver.port,
            self.pki,
            {**plugins, "ebpf": {**plugins.get("ebpf", {}), "interfaces": [self.here.interface], "exclude": []}},
            sections={"server": server, "tls": {**tls, "server_name": "localhost"}},
            prefix=self.here.prefix,
        )
        proxy = self.stack.enter_context(UdpProxy(self.there, receiver.port))
        return self._enter(row, agent, receiver, True), proxy

    def neighbour(self, case: Case) -> Agent:
        """Return another agent, not started, that wants the spool of a case's."""
        folder = self.folder / "neighbour"
        folder.mkdir()
        sections = {"cache": {"path": str(case.spool)}}
        return Agent(folder, case.receiver.port, self.pki, {"cpu": {}}, sections=sections, prefix=self.here.prefix)

    def _enter(self, row: str, agent: Agent, receiver: Receiver, has_receiver: bool) -> Case:
        self.stack.callback(agent.clear)
        self.stack.callback(receiver.clear)
        case = Case(row, agent, receiver)
        self.stack.callback(case.close)
        if has_receiver:
            receiver.start()
        return case


_TLS_FILES = {"ca": "ca.pem", "cert": f"{AGENT_ID}.pem", "key": f"{AGENT_ID}.key"}


@pytest.fixture
def matrix(folder: Path, pki: Path, ends: tuple[Namespace, Namespace]) -> Iterator[Matrix]:
    """Return what makes cases."""
    with ExitStack() as stack:
        yield Matrix(folder, pki, ends, stack)
