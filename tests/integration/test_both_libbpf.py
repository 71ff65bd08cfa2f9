"""Either libbpf does: the one in pylibbpf, and the system's. The same programs load, attach and count."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kon_agent.bpf.libbpf import CHOICE_VARIABLE
from tests.support.agent import Agent
from tests.support.denial import missing_tool, pylibbpf_folders, system_libbpf, without_pylibbpf
from tests.support.program import environment_of
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

PLUGINS: dict[str, dict[str, Any]] = {"ebpf": {"interfaces": ["lo"], "exclude": []}, "tcp": {"namespaces": "own"}}
PINGS = 200
CONNECTIONS = 20
PING = ["ping", "-q", "-c", str(PINGS), "-i", "0.001", "127.0.0.1"]
FILES = {"pylibbpf": "/pylibbpf", "system": "/libbpf.so."}  # what of its path tells one from the other
INSTALLED: dict[str, Callable[[], Sequence[str]]] = {"pylibbpf": pylibbpf_folders, "system": system_libbpf}

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: BPF programs are loaded"),
]

UNSAFE = """
struct xdp_md {
	unsigned data, data_end;
};
__attribute__((section("xdp"), used)) int kon_unsafe(struct xdp_md *frame)
{
	return *(unsigned char *)(unsigned long)frame->data; /* not compared with data_end */
}
char LICENSE[] __attribute__((section("license"), used)) = "GPL";
"""

LOAD = """
import sys
from kon_agent.bpf import loader
from kon_agent.errors import BpfError
try:
    loader.load(sys.argv[1], shapes={})
except BpfError as err:
    print(err)
"""

CONNECT = f"""
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    for _ in range({CONNECTIONS}):
        with socket.create_connection(server.getsockname()), server.accept()[0]:
            pass
"""


@pytest.fixture(params=INSTALLED)
def choice(request: pytest.FixtureRequest) -> str:
    """Return the name of a libbpf that is installed here."""
    name: str = request.param
    if not INSTALLED[name]():
        pytest.skip(f"needs {name}'s libbpf")
    return name


def origins(receiver: Receiver) -> set[tuple[str, str]]:
    """Return each plugin with what it said of its source."""
    return {(each.labels["plugin"], each.labels["source"]) for each in receiver.query(name="ebpf_source")}


def mapped_by(agent: Agent) -> list[str]:
    """Return which of the two the supervisor has in its memory."""
    mapped = {line.split()[-1] for line in Path(f"/proc/{agent.pid}/maps").read_text().splitlines()}
    return [name for name, part in FILES.items() if any(part in file for file in mapped)]


def test_the_same_programs_count(
    start_agent: Callable[..., Agent], receiver: Receiver, network: Sequence[str], choice: str
) -> None:
    """With either, packets and connections are counted exactly; the other one is not even opened."""
    if missing := missing_tool("ping"):
        pytest.skip(f"needs {missing}")
    agent = start_agent(PLUGINS, environment={CHOICE_VARIABLE: choice})
    agent.wait_for_acks()
    assert [choice] == mapped_by(agent)
    assert {(plugin, "bpf") for plugin in PLUGINS} == origins(receiver)

    def stored(plugin: str, name: str, **labels: str) -> float:
        records = receiver.query(plugin, name)
        return next((each.value for each in reversed(records) if labels.items() <= each.labels.items()), 0.0)

    def counts() -> list[float]:
        of_lo = {"interface": "lo", "protocol": "icmp"}
        echoes = [stored("ebpf", "network_packets_total", direction=way, **of_lo) for way in ("ingress", "egress")]
        return echoes + [stored("tcp", f"tcp_connections_{what}_total") for what in ("opened", "accepted")]

    before = counts()
    subprocess.run([*network, *PING], check=True, capture_output=True)
    subprocess.run([*network, sys.executable, "-c", CONNECT], check=True)
    expected = [
        count + more for count, more in zip(before, [2 * PINGS, 2 * PINGS, CONNECTIONS, CONNECTIONS], strict=True)
    ]
    wait_for(lambda: all(now >= then for now, then in zip(counts(), expected, strict=True)), "all is stored")
    agent.wait_for_acks()
    assert expected == counts()


def test_the_systems_is_taken_where_there_is_no_pylibbpf(
    start_agent: Callable[..., Agent], receiver: Receiver, network: Sequence[str]
) -> None:
    """Nobody has to choose: a machine without a wheel of pylibbpf has BPF by the system's libbpf."""
    if missing := missing_tool("unshare", "mount"):
        pytest.skip(f"needs {missing}")
    if not system_libbpf():
        pytest.skip("needs the system's libbpf")
    agent = start_agent(PLUGINS, prefix=[*network, *without_pylibbpf()])
    agent.wait_for_acks()
    assert ["system"] == mapped_by(agent)
    assert {(plugin, "bpf") for plugin in PLUGINS} == origins(receiver)


def test_the_verifiers_words_are_shown(tmp_path: Path, choice: str) -> None:
    """A program that the kernel refuses is an error that carries the verifier's verdict, with either."""
    if missing := missing_tool("clang"):
        pytest.skip(f"needs {missing}")
    source = tmp_path / "unsafe.bpf.c"
    source.write_text(UNSAFE)
    built = str(tmp_path / "unsafe.bpf.o")
    subprocess.run(["clang", "-target", "bpf", "-O2", "-g", "-c", str(source), "-o", built], check=True)
    environment = environment_of(**{CHOICE_VARIABLE: choice})
    said = subprocess.run([sys.executable, "-c", LOAD, built], env=environment, check=True, capture_output=True).stdout
    assert "cannot load BPF object unsafe: EACCES" in said.decode()
    assert "invalid access to packet" in said.decode()
