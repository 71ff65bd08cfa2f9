"""Processes killed at random instants: whatever dies, the others go on, and every record is accounted for."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.fault.conftest import Matrix
from tests.support.faults import IS_LONG, LOAD, RATE, Case, times
from tests.support.udp_proxy import Weather
from tests.support.waiting import wait_for

DEATHS = times(2, 3)  # of one child in one run: at five within a minute its breaker would rest for another
SENDER = "kon-agent: sender"
DAY_NS = 86_400 * 10**9
BURIED_S = 1.5  # records that die with the rings: those younger than a batch, and what a busy machine adds


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row", ["worker killed, at any instant", "worker killed, while it writes", "worker crashed (SIGSEGV)"]
)
def test_a_worker_dies(matrix: Matrix, row: str) -> None:
    """A worker that dies loses at most the record it was writing, and that one is declared."""
    case = matrix.case(row)
    for _ in range(times(1, 14)):
        case.start()
        case.is_up()
        for _ in range(DEATHS):
            for plugin in LOAD:
                kill_worker(case, plugin)
            for plugin in LOAD:
                case.wait_child(f"kon-agent: worker {plugin}")
        case.is_up()
        case.settle()
    line = case.balance(may_lose=["worker_crash"])
    assert line.lost["worker_crash"] <= line.injections


def kill_worker(case: Case, plugin: str) -> None:
    if "writes" in case.line.row:
        case.kill_worker_writing(plugin)
        return
    case.nap(0.1)
    case.kill_child(f"kon-agent: worker {plugin}", signal.SIGSEGV if "SEGV" in case.line.row else signal.SIGKILL)


# ── the sender ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_sender_is_killed_while_connected(matrix: Matrix) -> None:
    """Its successor reads on from the committed tails: what was in flight arrives twice at most, and is refused."""
    case, proxy = matrix.case_over_proxy("sender killed, mid-batch")
    proxy.up = proxy.down = Weather(delay_s=0.05)  # so that there is always one
    for _ in range(times(1, 20)):
        case.start()
        case.is_up()
        for _ in range(DEATHS):
            case.nap(0.3)
            case.kill_child(SENDER)
            case.is_up(more=1)
        case.is_up()
        case.settle()
    case.balance()


@pytest.mark.parametrize("row", ["sender killed, while it spools", "sender killed, just after a spool write"])
def test_the_sender_is_killed_while_it_spools(matrix: Matrix, row: str) -> None:
    """What is on disk is not taken from the ring again, what is not is still there."""
    case = matrix.case(row)
    for _ in range(times(1, 17)):
        case.start()
        case.is_up()
        case.receiver.stop()
        for _ in range(times(1, 3)):
            case.wait_spooled(20)
            if "just after" in row:
                case.wait_spool_written()
            else:
                case.nap(1.0)
            case.kill_child(SENDER)
            case.wait_child(SENDER)
        case.wait_spooled(20)
        case.receiver.start()
        case.is_up()
        case.settle()
    case.balance(may_lose=["ring_full"] if IS_LONG else [])  # three times in a row: it comes back ever later


def test_the_sender_is_killed_while_it_drains(matrix: Matrix) -> None:
    """A backlog half delivered is delivered once."""
    case = matrix.case("sender killed, while the spool drains")
    for _ in range(times(1, 17)):
        case.start()
        case.is_up()
        for _ in range(times(1, 3)):
            case.receiver.stop()
            case.wait_spooled(500)
            case.receiver.start()
            wait_for(lambda: "connected" == case.status().server.state, "it is connected")
            case.nap(0.3)
            case.kill_child(SENDER)
            case.wait_child(SENDER)
        case.is_up()
        case.settle()
    case.balance()


# ── the supervisor, and all at once ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_online", [True, False], ids=["connected", "offline"])
def test_the_supervisor_is_killed(matrix: Matrix, is_online: bool) -> None:
    """Every child and XDP program is gone within 2 s, the sender has saved the rings, the next start delivers them."""
    case = matrix.case(f"supervisor killed, {'connected' if is_online else 'offline'}")
    slowest_s = 0.0
    for _ in range(times(1, 50)):
        case.start()
        case.is_up()
        assert matrix.here.xdp_programs()
        if not is_online:
            case.receiver.stop()
        case.nap(0.5)
        case.agent.kill()
        killed_s = time.monotonic()
        wait_for(case.agent.is_gone, "all its children are gone", 3)
        slowest_s = max(slowest_s, time.monotonic() - killed_s)
        case.line.injections += 1
        assert [] == matrix.here.xdp_programs()
        if not is_online:
            case.receiver.start()
    case.start()
    case.finish(may_lose=["worker_crash"], note=f"all gone within {slowest_s:.2f} s")
    assert slowest_s <= 2


def test_all_are_killed_at_once(matrix: Matrix) -> None:
    """Only what was younger than a batch dies with the memory it lay in; the store and the spool are whole."""
    case = matrix.case("all killed at once")
    for _ in range(times(1, 50)):
        case.start()
        case.is_up()
        case.nap(0.5)
        case.kill_all()
        case.line.injections += 1
        case.receiver.start()
    case.start()
    case.is_up()
    case.settle()
    line = case.balance(buried_at_most=int(case.line.injections * BURIED_S * RATE))
    line.note = f"{line.buried / RATE / line.injections:.2f} s of records each time"


def test_sigterm_under_load(matrix: Matrix) -> None:
    """An orderly end at any instant of its life leaves no process, and no record behind."""
    case = matrix.case("SIGTERM under load")
    for _ in range(times(2, 50)):
        case.start()
        case.nap(1.5)
        case.stop()
        case.line.injections += 1
    case.start()
    case.finish()


def test_a_second_instance_on_the_same_spool(matrix: Matrix) -> None:
    """It is refused by name of the process that has the spool, and the first one is not disturbed."""
    case = matrix.case("second instance on the same spool")
    case.start()
    case.is_up()
    second = matrix.neighbour(case)
    process = second.launch(-1)
    said = process.communicate(timeout=30)[0].decode()
    case.line.injections += 1
    assert 0 != process.returncode
    assert "in use by pid" in said
    pid = int(said.split("in use by pid ")[1].split(";")[0])
    assert pid in case.agent.children().values()
    assert os.path.exists(f"/proc/{pid}")
    case.finish(note=f"exit {process.returncode}")


# ── the receiver ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_receiver_is_killed_under_load(matrix: Matrix) -> None:
    """What it had stored and not acknowledged comes again, and is refused."""
    case = matrix.case("receiver killed and restarted under load")
    case.start()
    case.is_up()
    for _ in range(times(1, 30)):
        case.nap(0.5)
        case.receiver.kill()
        case.line.injections += 1
        case.receiver.start()
        case.is_up(more=1)
    case.finish()


def test_the_receiver_comes_late(matrix: Matrix) -> None:
    """An agent started before any receiver keeps what it makes."""
    case = matrix.case("receiver absent from the start", has_receiver=False)
    case.start()
    case.line.injections += 1
    case.wait_spooled(times(1000, 20_000), deadline_s=120)
    case.receiver.start()
    case.finish()


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_wall_clock_is_stepped(matrix: Matrix) -> None:
    """A day ahead, a day back: nothing expires, nothing is lost, no schedule and no deadline notices."""
    file = matrix.folder / "clock"
    file.write_bytes(bytes(8))
    environment = {"PYTHONPATH": str(Path(__file__).parent / "stepped"), "KON_TEST_CLOCK": str(file)}
    case = matrix.case("wall clock stepped by a day", environment=environment)
    case.start()
    case.is_up()
    case.receiver.stop()
    with file.open("r+b", buffering=0) as clock:
        for days in times(1, 10) * [1, -1]:
            os.pwrite(clock.fileno(), (days * DAY_NS).to_bytes(8, sys.byteorder, signed=True), 0)
            case.line.injections += 1
            case.wait_produced(RATE)
        case.wait_spooled(1)
        case.receiver.start()
        case.is_up()
        os.pwrite(clock.fileno(), (-DAY_NS).to_bytes(8, sys.byteorder, signed=True), 0)
        case.line.injections += 1
        case.finish()
    stamps = [record.ts_ns for record in case.receiver.query("memory")]
    assert max(stamps) - min(stamps) > 1.9 * DAY_NS, "the agent did not see the clock move"
