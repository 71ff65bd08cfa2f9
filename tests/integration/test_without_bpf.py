"""Where BPF is denied the agent runs all the same: the same metrics from procfs, and a word on why."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kon_agent.bpf.layout import DIRECTIONS
from kon_agent.receiver.reader import StoredRecord
from tests.support import law
from tests.support.agent import Agent
from tests.support.denial import (
    missing_tool,
    without_btf,
    without_call,
    without_capabilities,
    without_library,
    without_root,
)
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

LOOPBACK = {"interfaces": ["lo"], "exclude": []}
SPARE = "kon7"  # an interface besides `lo`, which `flows` watches without BPF, too
TRACING = ("tcp", "drops", "runqlat", "biolat")
PLUGINS: dict[str, dict[str, Any]] = {
    "ebpf": {"interfaces": ["lo", SPARE], "exclude": []},
    "flows": {},
    **{plugin: {} for plugin in TRACING},
}

SCHEDSTAT = Path("/proc/schedstat").exists()  # a kernel without it has nothing in the place of `runqlat`

CORE = {
    "ebpf": {
        *(f"network_{what}_total" for what in ("packets", "bytes", "cast_packets", "malformed_packets", "tcp_flags")),
        "ebpf_attach",
    },
    "flows": {"flow_bytes", "flow_packets", "flow_interface_bytes_total", "flow_interface_packets_total"},
    "tcp": {
        *(f"tcp_connections_{what}_total" for what in ("opened", "accepted", "failed", "aborted")),
        *("tcp_retransmits_total", "tcp_resets_sent_total", "tcp_sockets"),
    },
    "drops": {"kernel_drops_total"},
    "runqlat": {f"scheduler_run_queue_latency_seconds_{part}" for part in ("bucket", "sum", "count") if SCHEDSTAT},
    "biolat": {f"disk_io_latency_seconds_{part}" for part in ("bucket", "sum", "count")},
}
"""What each plugin reports with BPF and without."""

FRAMES, FRAME_BYTES = 50, 60

_PASS = """
__attribute__((section("xdp"), used)) int pass(void *frame)
{
	return 2; /* XDP_PASS */
}
char LICENSE[] __attribute__((section("license"), used)) = "GPL";
"""

_FRAMES = f"""
import socket
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
    raw.bind(("kon8", 0))
    for _ in range({FRAMES}):
        raw.send(bytes.fromhex("ffffffffffff" + "020000000008" + "88b5").ljust({FRAME_BYTES}, b"\\0"))
"""

_TRAFFIC = """
import contextlib, socket
with socket.create_server(("127.0.0.1", 0)) as server:
    for _ in range(10):
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as served:
            client.sendall(bytes(1000))
            served.recv(1000)
    address = server.getsockname()
with contextlib.suppress(ConnectionRefusedError):
    socket.create_connection(address)
"""

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: BPF is denied to one that could have it"),
]


@dataclass(frozen=True)
class Denial:
    """One way BPF is denied.

    Attributes:
        prefix: makes what to put before the agent's command.
        says: a part of the reason that is given.
        plugins: who must do without BPF.
        tools: programs it takes.
    """

    prefix: Callable[[], Sequence[str]]
    says: str
    plugins: Sequence[str] = tuple(PLUGINS)
    tools: Sequence[str] = ()


DENIALS = {
    "a user without privilege": Denial(without_root, "is missing", tools=["unshare"]),
    "root without CAP_BPF": Denial(without_capabilities, "CAP_BPF", tools=["setpriv"]),
    "root without CAP_PERFMON": Denial(
        partial(without_capabilities, "-perfmon,-sys_admin"), "CAP_PERFMON is missing", tools=["setpriv"]
    ),
    "root without CAP_NET_ADMIN": Denial(
        partial(without_capabilities, "-net_admin,-sys_admin"),
        "CAP_NET_ADMIN is missing",
        ["ebpf", "flows"],
        ["setpriv"],
    ),
    "bpf(2) refused": Denial(without_call, "no capability is missing"),
    "BTF hidden": Denial(without_btf, "BTF", TRACING, ["unshare", "mount"]),
    "no libbpf": Denial(without_library, "there is no libbpf", tools=["unshare", "mount"]),
}


@dataclass(frozen=True)
class Run:
    """What one agent has stored and said."""

    agent: Agent
    receiver: Receiver

    def records(self, plugin: str) -> list[StoredRecord]:
        """Return all that a plugin has stored."""
        return self.receiver.query(plugin)

    def names(self, plugin: str) -> set[str]:
        """Return the names of the metrics a plugin has stored."""
        return {record.name for record in self.records(plugin)}

    def origins(self) -> dict[str, tuple[str, str]]:
        """Return what each plugin said last of its source, and the reason."""
        records = self.receiver.query(name="ebpf_source")
        return {each.labels["plugin"]: (each.labels["source"], each.labels["reason"]) for each in records}


@pytest.fixture(scope="module")
def spare(network: Sequence[str]) -> Iterator[str]:
    """Make the interface SPARE in the tests' network."""
    ip = [*network, "ip", "link"]
    subprocess.run([*ip, "add", SPARE, "type", "veth", "peer", f"{SPARE}-peer"], check=True)
    subprocess.run([*ip, "set", SPARE, "up"], check=True)
    yield SPARE
    subprocess.run([*ip, "delete", SPARE], check=True)


@contextmanager
def delivering(pki: Path, network: Sequence[str], prefix: Sequence[str] = ()) -> Iterator[Run]:
    """Run an agent that has delivered for a while, and its receiver."""
    with tempfile.TemporaryDirectory(prefix="kon-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with (
            Receiver(folder, pki, ["--client-ca", str(pki / "ca.pem")], network) as receiver,
            Agent(folder, receiver.port, pki, PLUGINS, prefix=[*network, *prefix]) as agent,
        ):
            agent.wait_until_running()
            provoke(network)
            agent.wait_for_acks()
            yield Run(agent, receiver)


@pytest.fixture(scope="module")
def with_bpf(pki: Path, network: Sequence[str], spare: str) -> dict[str, set[str]]:
    """Return the names of each plugin's metrics where it has BPF."""
    with delivering(pki, network) as run:
        assert {(plugin, ("bpf", "")) for plugin in PLUGINS} == set(run.origins().items())
        assert {0} == {plugin.restarts for plugin in run.agent.status().plugins}, "loading it all has cost a worker"
        return {plugin: run.names(plugin) for plugin in PLUGINS}


@pytest.fixture(scope="module", params=DENIALS)
def denied(
    request: pytest.FixtureRequest, pki: Path, network: Sequence[str], with_bpf: dict[str, set[str]]
) -> Iterator[tuple[Run, Denial]]:
    """Start an agent that is denied BPF in one of the ways, and let it deliver for a while."""
    denial = DENIALS[request.param]
    if missing := missing_tool(*denial.tools):
        pytest.skip(f"needs {missing}")
    with delivering(pki, network, denial.prefix()) as run:
        yield run, denial


def provoke(network: Sequence[str]) -> None:
    """Have connections made and refused where the agent looks."""
    subprocess.run([*network, sys.executable, "-c", _TRAFFIC], check=True, capture_output=True)


def test_everything_runs_and_says_why(denied: tuple[Run, Denial], with_bpf: dict[str, set[str]]) -> None:
    """Every plugin runs and delivers the names it has with BPF, labelled as procfs's; each gives the reason."""
    run, denial = denied
    origins = run.origins()
    for plugin in PLUGINS:
        names = run.names(plugin)
        assert CORE[plugin] | {"ebpf_source"} <= names & with_bpf[plugin], plugin
        assert set() == names - with_bpf[plugin], plugin
        source, reason = origins[plugin]
        if plugin not in denial.plugins:
            assert ("bpf", "") == (source, reason), plugin
            continue
        assert "procfs" == source, plugin
        assert denial.says in reason, plugin
        figures = [each.labels for each in run.records(plugin) if each.labels and not each.name.startswith("ebpf_")]
        assert {"procfs"} >= {labels.get("source") for labels in figures}, plugin
    law.gapless(run.receiver.ledger())


def test_the_status_says_why(denied: tuple[Run, Denial]) -> None:
    """Every plugin is RUNNING, and a warning names each that does without BPF, and the reason."""
    run, denial = denied
    status = run.agent.status()
    assert {("RUNNING", 0)} == {(plugin.state, plugin.restarts) for plugin in status.plugins if plugin.enabled}
    for plugin in denial.plugins:
        said = [text for text in status.warnings if text.startswith(f"{plugin} reads procfs instead of BPF: ")]
        assert [True] == [denial.says in text for text in said], (plugin, status.warnings)


def test_figures_are_the_kernels(start_agent: Callable[..., Agent], receiver: Receiver, network: Sequence[str]) -> None:
    """What crosses the loopback shows on both sides of it, and as TCP segments of the host."""
    agent = start_agent({"ebpf": LOOPBACK}, prefix=[*network, *without_call()])
    agent.wait_for_acks()

    def stored(**labels: str) -> float:
        records = receiver.query("ebpf", "network_packets_total")
        return next(each.value for each in reversed(records) if labels.items() <= each.labels.items())

    before = {direction: stored(interface="all", direction=direction, protocol="tcp") for direction in DIRECTIONS}
    provoke(network)
    agent.wait_for_acks()
    after = {direction: stored(interface="all", direction=direction, protocol="tcp") for direction in DIRECTIONS}
    segments = {direction: after[direction] - before[direction] for direction in DIRECTIONS}
    assert segments["ingress"] == segments["egress"] >= 10 * 7  # 3 to open, data and its acknowledgement, 2 to close
    assert stored(interface="lo", direction="ingress") == stored(interface="lo", direction="egress")


@pytest.fixture
def occupied(network: Sequence[str], tmp_path: Path) -> Iterator[str]:
    """Make a veth pair, kon8 and kon9, in the tests' network, with a foreign XDP program on kon9; return its name."""
    if missing := missing_tool("ip", "clang"):
        pytest.skip(f"needs {missing}")
    source, built = tmp_path / "pass.bpf.c", str(tmp_path / "pass.bpf.o")
    source.write_text(_PASS)
    subprocess.run(["clang", "-target", "bpf", "-O2", "-c", str(source), "-o", built], check=True)
    ip = [*network, "ip", "link"]
    subprocess.run([*ip, "add", "kon9", "type", "veth", "peer", "kon8"], check=True)
    try:
        for name in ("kon8", "kon9"):
            quiet = f"echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6"
            subprocess.run([*network, "sh", "-c", quiet], check=True)
            subprocess.run([*ip, "set", name, "up"], check=True)
        subprocess.run([*ip, "set", "kon9", "xdpgeneric", "obj", built, "sec", "xdp"], check=True)
        yield "kon9"
    finally:
        subprocess.run([*ip, "delete", "kon9"], check=True)


def test_an_occupied_direction_is_procfs(
    start_agent: Callable[..., Agent], receiver: Receiver, network: Sequence[str], occupied: str
) -> None:
    """Where another program has the ingress, its frames are the driver's count; the egress is still counted by BPF."""
    agent = start_agent({"ebpf": {"interfaces": [occupied]}}, prefix=network)
    agent.wait_for_acks()
    subprocess.run([*network, sys.executable, "-c", _FRAMES], check=True)
    ingress = {"interface": occupied, "direction": "ingress"}

    def stored(name: str, **labels: str) -> float:
        records = receiver.query("ebpf", name)
        return next((each.value for each in reversed(records) if labels.items() <= each.labels.items()), -1.0)

    of_procfs = {**ingress, "protocol": "all", "mode": "none", "source": "procfs"}
    wait_for(lambda: stored("network_packets_total", **of_procfs) >= FRAMES, "the frames are stored")
    agent.wait_for_acks()
    assert FRAMES == stored("network_packets_total", **of_procfs)
    assert FRAMES * FRAME_BYTES == stored("network_bytes_total", **of_procfs)
    assert 0.0 == stored("ebpf_attach", **ingress, mode="none")
    figures = [each.labels for each in receiver.query("ebpf") if each.labels.get("interface") == occupied]
    assert {None} == {labels.get("source") for labels in figures if labels.get("direction") == "egress"}
