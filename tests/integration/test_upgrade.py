"""An upgrade of the running agent: the process stays, its code and its children change, and no record is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import kon_agent
from kon_agent.cli import client
from kon_agent.control_protocol import UPGRADE_TIMEOUT_S, Op, Request, Status, Upgraded
from kon_agent.errors import ControlError
from tests.support import law
from tests.support.agent import Agent
from tests.support.faults import Book
from tests.support.holdings import descriptors
from tests.support.netns import run
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a child's descriptors are hidden from its own user"),
]

UPGRADES = 10
PLUGINS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"per_core": True},
    "memory": {},
    "ebpf": {"interfaces": ["lo"], "exclude": []},
}
CALM: Mapping[str, Mapping[str, Any]] = {name: {**keys, "period": "1s"} for name, keys in PLUGINS.items()}

TAKE_OVER = "    try:\n        supervisor = Supervisor(config, config_path, taken)"
"""The first thing new code does with what it is handed."""

StartAgent = Callable[..., Agent]


class Code:
    """What is installed: a copy of the package, to be changed between two upgrades.

    Args:
        folder: where it is installed; any user must be able to read it.
    """

    def __init__(self, folder: Path) -> None:
        self.place = folder / "site"
        self.package = self.place / "kon_agent"
        source = Path(kon_agent.__file__).parent
        shutil.copytree(source, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("ebpf",):  # the BPF object is beside the package in a checkout
            if (source.parent / name).is_dir():
                shutil.copytree(source.parent / name, self.place / name)

    def change(self, module: str, old: str, new: str) -> None:
        """Change a module's text, which must be there."""
        path = self.package / module
        text = path.read_text()
        assert old in text, (module, old)
        path.write_text(text.replace(old, new, 1))

    def release(self, version: str) -> None:
        """Give it another version."""
        (self.package / "__init__.py").write_text(f'__version__ = "{version}"\n')


@pytest.fixture
def code(folder: Path) -> Code:
    """Install a copy of the package that no other test sees."""
    return Code(folder)


@pytest.fixture
def book() -> Iterator[Book]:
    """Return a book of every ring."""
    book = Book()
    yield book
    book.close()


@pytest.fixture
def agent(start_agent: StartAgent, code: Code) -> Agent:
    """Return an agent that runs the installed copy."""
    agent = start_agent(CALM, environment={"PYTHONPATH": str(code.place)})
    agent.wait_until_running()
    return agent


def upgrade(agent: Agent) -> Upgraded:
    """Have the agent upgraded, and wait until that is done."""
    return client.call(str(agent.socket), Request(op=Op.UPGRADE), Upgraded, UPGRADE_TIMEOUT_S)


def disturb(agent: Agent) -> ControlError:
    """Have the agent upgraded by code that cannot take over; return its answer."""
    with pytest.raises(ControlError) as failure:
        upgrade(agent)
    return failure.value


def pids(agent: Agent) -> dict[str, int]:
    """Return the process id of every worker."""
    return {plugin.name: plugin.pid for plugin in agent.status().plugins if plugin.pid is not None}


def attached(network: Sequence[str]) -> Any:
    """Return what the kernel tells of the XDP program of `lo`: its id, and the link that holds it."""
    namespace = network[-1]
    (lo,) = json.loads(run("ip", "-n", namespace, "-d", "-j", "link", "show", "lo"))
    if "xdp" not in lo:
        return None
    program = lo["xdp"].get("prog", lo["xdp"]).get("id")
    links = json.loads(run("bpftool", "-j", "link", "show")) if shutil.which("bpftool") else []
    return program, [link["id"] for link in links if link.get("prog_id") == program]


def settle(agent: Agent) -> Status:
    """Have every worker end and everything delivered; return the status then."""
    for name in pids(agent):
        agent.change(Op.PLUGIN_DISABLE, name)
    wait_for(lambda: law.is_drained(agent.status()), "everything is delivered")
    return agent.status()


# ── it succeeds ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_upgrades_in_a_row(
    start_agent: StartAgent, code: Code, receiver: Receiver, network: Sequence[str], book: Book
) -> None:
    """Ten upgrades under load: the process and the attachment stay, every child is new, and the books balance."""
    agent = start_agent(PLUGINS, environment={"PYTHONPATH": str(code.place)})
    book.watch(agent.pid)
    agent.wait_until_running()
    agent.wait_for_acks()
    held, program = descriptors(agent.pid), attached(network)
    assert program is not None
    for number in range(UPGRADES):
        before, children = agent.status(), set(agent.children().values())
        code.release(f"9.{number}.0")
        result = upgrade(agent)
        after = agent.status()
        assert (before.version, f"9.{number}.0") == (result.before, result.after)
        assert (f"9.{number}.0", before.pid) == (after.version, after.pid)
        assert ("kept", program) == (result.counters, attached(network))
        assert set(PLUGINS) == set(result.replaced)
        assert set() == children & set(agent.children().values())
        assert before.uptime_s < after.uptime_s
        for old, new in zip(before.plugins, after.plugins, strict=True):
            assert old.produced <= new.produced and old.acked <= new.acked
            assert (0, None, "closed") == (new.restarts, new.last_exit, new.breaker)
    agent.wait_for_acks()
    wait_for(lambda: not descriptors(agent.pid) - held, f"the supervisor holds no more than {dict(held)}")
    status = settle(agent)
    law.exactly_once(status, receiver.ledger())
    made = book.by_plugin(book.produced())
    assert {name: made[name] for name in PLUGINS} == {
        plugin.name: plugin.produced for plugin in status.plugins if plugin.name in PLUGINS
    }
    assert (UPGRADES + 1) * len(PLUGINS) == len(book.produced())


def test_no_plugin_misses_more_than_a_tick(agent: Agent, code: Code, receiver: Receiver) -> None:
    """Between two ticks stored there are never two missing, nor do the packet counters go back."""
    agent.wait_for_acks(more=5)
    result = upgrade(agent)
    agent.wait_for_acks(more=5)
    assert [] == [name for name, missed in result.missed_ticks.items() if missed > 1]
    for plugin in CALM:
        ticks = sorted({record.ts_ns for record in receiver.query(plugin)})
        gaps = [(later - earlier) / 1e9 for earlier, later in pairwise(ticks)]
        assert 3.0 > max(gaps), (plugin, gaps)
    labels = {"interface": "lo", "direction": "ingress", "protocol": "udp"}
    counts = [
        record.value
        for record in receiver.query("ebpf", "network_packets_total")
        if labels.items() <= record.labels.items()
    ]
    assert sorted(counts) == counts


def test_nobody_is_turned_away(agent: Agent) -> None:
    """Whoever asks while the code changes is answered: the socket is always there, and no question is lost."""
    failures: list[Exception] = []
    answers: list[Status] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            try:
                answers.append(agent.status())
            except Exception as err:
                failures.append(err)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        upgrade(agent)
    finally:
        is_over.set()
        for asker in askers:
            asker.join()
    assert [] == failures
    assert 100 < len(answers)


def test_what_was_changed_by_hand_stays(agent: Agent, code: Code) -> None:
    """A plugin that was disabled by command is not started by an upgrade; one the file has dropped is let go."""
    agent.change(Op.PLUGIN_DISABLE, "memory")
    agent.configure({name: keys for name, keys in CALM.items() if name != "cpu"})
    upgrade(agent)
    states = {plugin.name: (plugin.enabled, plugin.state) for plugin in agent.status().plugins}
    assert ((False, "STOPPED"), (False, "STOPPED"), (True, "RUNNING")) == (
        states["memory"],
        states["cpu"],
        states["ebpf"],
    )


def test_another_object_is_loaded_anew(agent: Agent, code: Code, network: Sequence[str]) -> None:
    """Where the new code brings another BPF object, the old one is detached and the new one attached."""
    before = attached(network)
    with next(code.place.rglob("kon_net.bpf.o")).open("ab") as file:
        file.write(b"\0")  # behind the end of the ELF file: another object, and the same
    result = upgrade(agent)
    agent.wait_for_acks("ebpf", more=5)
    after = attached(network)
    assert "anew" == result.counters
    assert after is not None and before != after


def test_a_worker_that_dies_meanwhile(agent: Agent, code: Code, receiver: Receiver) -> None:
    """One that is killed while the new code starts is found dead by it, and replaced like any other."""
    code.change("supervisor/startup.py", TAKE_OVER, f"    os.kill(taken.plugins[0].life.pid, 9)\n{TAKE_OVER}")
    result = upgrade(agent)
    plugins = {plugin.name: plugin for plugin in agent.status().plugins}
    assert ({"memory", "ebpf"}, {}) == (set(result.replaced), result.troubled)
    assert (1, "killed by SIGKILL") == (plugins["cpu"].restarts, plugins["cpu"].last_exit)
    settle(agent)
    law.gapless(receiver.ledger())


def test_during_an_outage(agent: Agent, receiver: Receiver) -> None:
    """Where nobody can be reached the spool is handed on as well; when somebody can, all arrives once."""
    agent.wait_for_acks(more=5)
    receiver.kill()
    wait_for(lambda: agent.status().spool.records, "records are in the spool", 30)
    for _ in range(2):
        before = agent.status()
        upgrade(agent)
        after = agent.status()
        assert before.spool.records <= after.spool.records
        for old, new in zip(before.plugins, after.plugins, strict=True):
            assert (old.produced, old.acked) <= (new.produced, new.acked)
    receiver.start()
    wait_for(lambda: "connected" == agent.status().server.state, "it is connected", 45)
    agent.wait_for_acks(more=5)
    law.exactly_once(settle(agent), receiver.ledger())


def test_by_signal(agent: Agent, code: Code) -> None:
    """SIGUSR2 does what the command does; the command waits until all is done and says what came of it."""
    code.release("7.0.0")
    agent.signal(signal.SIGUSR2)
    wait_for(lambda: "7.0.0" == agent.status().version, "the new code has taken over")
    wait_for(lambda: "every process runs kon-agent 7.0.0" in agent.log(), "all children are replaced")
    code.release("7.1.0")
    shown = agent.control("upgrade")
    assert 0 == shown.returncode, shown.stderr
    assert shown.stdout.startswith(f"kon-agent 7.0.0 -> 7.1.0, pid {agent.pid}, ")
    assert "packet counters stayed attached" in shown.stdout


def test_a_stop_that_comes_meanwhile_is_obeyed(agent: Agent, code: Code) -> None:
    """A SIGTERM that arrives while the new code starts is not lost."""
    code.change("supervisor/startup.py", TAKE_OVER, f"    os.kill(os.getpid(), 15)\n{TAKE_OVER}")
    agent.signal(signal.SIGUSR2)
    assert 0 == agent.wait()
    assert "stopping" in agent.log()


# ── it is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("module", ["supervisor/main.py", "sender/main.py", "plugins/cpu.py", "cli/agent.py"])
def test_broken_code_is_refused(agent: Agent, code: Code, receiver: Receiver, module: str) -> None:
    """New code that cannot even be imported changes nothing: no process, no connection, no record."""
    children = agent.children()
    code.change(module, "from __future__ import annotations", "from __future__ import annotations\ndef broken(:")
    error = disturb(agent)
    assert "refused" == error.code
    assert "invalid syntax" in str(error)
    assert children == agent.children()
    agent.wait_for_acks(more=5)
    law.gapless(receiver.ledger())


def test_a_broken_configuration_is_refused(agent: Agent) -> None:
    """The new code reads the file again; a mistake in it is told with its place, and nothing changes."""
    children = agent.children()
    agent.config_path.write_text(agent.config_path.read_text().replace('"period": "1s"', '"period": "soon"', 1))
    error = disturb(agent)
    assert f"{agent.config_path}:" in str(error)
    assert children == agent.children()


def test_another_spool_takes_a_restart(agent: Agent) -> None:
    """What is handed over belongs to the spool it was made with."""
    agent.config_path.write_text(agent.config_path.read_text().replace("/spool", "/other"))
    assert "cache.path" in str(disturb(agent))


def test_code_that_knows_no_upgrade_is_refused(agent: Agent, code: Code) -> None:
    """An older version does not know what is asked of it, and does nothing."""
    code.change("cli/agent.py", '"--take-over"', '"--something-else"')
    assert "No such option" in str(disturb(agent))


def test_one_at_a_time(agent: Agent) -> None:
    """While one upgrade is under way, another one is refused."""
    agent.signal(signal.SIGUSR2)
    wait_for(lambda: "tries whether it can take over" in agent.log(), "it has begun")
    assert "busy" == disturb(agent).code
    wait_for(lambda: "every process runs" in agent.log(), "it is over")


# ── it fails ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_new_code_that_is_killed_leaves_nothing(
    agent: Agent, code: Code, receiver: Receiver, network: Sequence[str]
) -> None:
    """Killed as soon as it runs: no process, no program attached, and what was in the rings arrives later."""
    agent.wait_for_acks(more=5)
    good = (code.package / "supervisor/startup.py").read_text()
    code.change(
        "supervisor/startup.py",
        "def _take_over(",
        "def _take_over(*_: object) -> int:\n    os.kill(os.getpid(), 9)\n    return 1\n\n\ndef _former(",
    )
    assert "bad_reply" == disturb(agent).code
    assert -signal.SIGKILL == agent.wait()
    wait_for(agent.is_gone, "no process of the agent is left")
    assert None is attached(network)
    (code.package / "supervisor/startup.py").write_text(good)
    agent.start()
    agent.wait_until_running()
    agent.wait_for_acks(more=5)
    settle(agent)
    law.gapless(receiver.ledger())


def test_new_code_that_cannot_go_on_starts_afresh(
    agent: Agent, code: Code, receiver: Receiver, network: Sequence[str]
) -> None:
    """What is handed over to it is ended in order, and it starts as if it had been restarted; it says so loudly."""
    agent.wait_for_acks(more=5)
    pid, children = agent.pid, set(agent.children().values())
    code.change(
        "supervisor/main.py", "        self.courier.adopt(taken.sender)", '        raise RuntimeError("no way")'
    )
    assert "failed" == disturb(agent).code
    wait_for(lambda: agent.socket.exists() and "RuntimeError: no way" in agent.log(), "it has said so")

    def is_back() -> bool:
        try:
            return all(plugin.state == "RUNNING" for plugin in agent.status().plugins if plugin.enabled)
        except ControlError:
            return False

    wait_for(is_back, "it runs again")
    agent.wait_until_running()
    agent.wait_for_acks(more=5)
    assert pid == agent.status().pid
    assert set() == children & set(agent.children().values())
    assert None is not attached(network)
    settle(agent)
    law.gapless(receiver.ledger())


# ── by hand ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stop_and_start(agent: Agent, receiver: Receiver) -> None:
    """TERM and a new start instead: nothing is lost, and no more than a tick is missed."""
    agent.wait_for_acks(more=5)
    assert 0 == agent.stop()
    agent.start()
    agent.wait_until_running()
    agent.wait_for_acks(more=5)
    settle(agent)
    law.gapless(receiver.ledger())
    assert [] == [row for row in receiver.ledger() if row.declared_lost]
    for plugin in CALM:
        ticks = sorted({record.ts_ns for record in receiver.query(plugin)})
        assert 5.0 > max((later - earlier) / 1e9 for earlier, later in pairwise(ticks))  # the default period
