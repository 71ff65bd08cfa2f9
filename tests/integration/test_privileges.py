"""What the kernel says of the agent's processes: who they are, what they have lost, what they hold."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kon_agent.linux import procfs, seccomp
from tests.support.agent import Agent, title
from tests.support.receiver import Receiver

WORKERS = ("cpu", "memory", "disk", "ebpf", "agent")
PLUGINS = {name: {"interfaces": ["lo"], "exclude": []} if name == "ebpf" else {} for name in WORKERS}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: children change their user")


@pytest.fixture
def agent(start_agent: Callable[..., Agent]) -> Agent:
    """Return an agent that runs every plugin."""
    agent = start_agent(PLUGINS)
    agent.wait_until_running()
    return agent


@pytest.mark.root
@needs_root
def test_ps_shows_who_is_who(agent: Agent) -> None:
    """The supervisor, one worker for each plugin and one sender, by title, and nobody else."""
    expected = {f"kon-agent: worker {name}" for name in WORKERS} | {"kon-agent: sender"}
    assert expected == agent.children().keys()
    assert "kon-agent: supervisor" == title(agent.pid)


@pytest.mark.root
@needs_root
def test_children_have_no_privilege(agent: Agent) -> None:
    """Each is another user than root, without a capability, a way to gain one, or a system call it does not need."""
    for name, pid in agent.children().items():
        status = procfs.read_status(pid)
        assert "0" not in status["Uid"].split() + status["Gid"].split(), name
        assert {0} == {int(status[field], 16) for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}, name
        assert "1" == status["NoNewPrivs"], name
        if seccomp.current_architecture():
            assert "2" == status["Seccomp"], name


@pytest.mark.root
@needs_root
def test_workers_hold_no_bpf_object_and_no_socket(agent: Agent) -> None:
    """What a worker could use to reach the kernel's BPF side, the network or another process is not open there."""
    for name in WORKERS:
        files = descriptors(agent.worker(name))
        assert files, name
        assert [] == [file for file in files if "bpf" in file or "socket" in file or "memfd" in file], name


@pytest.mark.root
@needs_root
def test_a_worker_sees_no_ring_but_its_own(agent: Agent) -> None:
    """Of all the shared memory only its own ring is mapped in a worker, and only the producer's side is writable."""
    for name in WORKERS:
        maps = Path(f"/proc/{agent.worker(name)}/maps").read_text()
        mapped = set(re.findall(r" (\S{4}) .*/memfd:(kon-(?:ring|tail)-\w+)", maps))
        assert {("rw-s", f"kon-ring-{name}"), ("r--s", f"kon-tail-{name}")} == mapped


@pytest.mark.root
@needs_root
def test_only_the_sender_has_the_network(agent: Agent) -> None:
    """The supervisor holds no internet socket; the sender does, and maps the producers' areas read-only."""
    udp = {line.split()[9] for line in Path(f"/proc/{agent.pid}/net/udp").read_text().splitlines()[1:]}
    assert not udp & socket_inodes(agent.pid)
    assert udp & socket_inodes(agent.sender())
    maps = Path(f"/proc/{agent.sender()}/maps").read_text()
    assert {"r--s"} == set(re.findall(r" (\S{4}) .*/memfd:kon-ring-", maps))


def descriptors(pid: int) -> list[str]:
    """Return what each open descriptor of a process is."""
    folder = f"/proc/{pid}/fd"
    return [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]


def socket_inodes(pid: int) -> set[str]:
    """Return the inodes of a process's sockets."""
    return {found[1] for file in descriptors(pid) if (found := re.fullmatch(r"socket:\[(\d+)\]", file))}


def without_privilege(network: Sequence[str]) -> list[str]:
    """Return a prefix that runs a command as a user without any capability.

    As root: in a user namespace, since there it may still read what root owns, and Python may live in root's home.
    """
    if os.geteuid() != 0:
        return []
    prefix = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"needs user namespaces and unshare(1): {err}")
    return [*network, *prefix]


def test_without_root_everything_runs(
    start_agent: Callable[..., Agent], receiver: Receiver, network: Sequence[str]
) -> None:
    """Started without root every plugin delivers, `ebpf` what procfs has, and the status says so."""
    agent = start_agent(PLUGINS, prefix=without_privilege(network))
    agent.wait_for_acks()
    assert {f"kon-agent: worker {name}" for name in WORKERS} | {"kon-agent: sender"} == agent.children().keys()
    warnings = agent.status().warnings
    assert [] != [text for text in warnings if text.startswith("started without root")]
    assert [] != [text for text in warnings if text.startswith("ebpf reads procfs instead of BPF: CAP_BPF, ")]
    assert {"procfs"} == {record.labels["source"] for record in receiver.query("ebpf", "network_packets_total")}
    assert set(WORKERS) == {row.plugin for row in receiver.ledger()}
