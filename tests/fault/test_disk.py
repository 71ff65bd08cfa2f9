"""Disks that are full, failing, read-only, gone, too small, or cut from their power."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kon_agent.receiver.reader import LedgerRow
from kon_agent.spool.reader import PATIENCE
from tests.fault.conftest import Matrix
from tests.support import disk_image
from tests.support.agent import AGENT_ID, Agent
from tests.support.disk_image import fill, make_readonly, tmpfs
from tests.support.faults import IS_LONG, RECONNECT_DEADLINE_S, Case, times
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

TMPFS_BYTES = (24 if IS_LONG else 6) * 1024 * 1024  # what is spooled in all of a row's outages must not fill it
RETRY_S = 5.0  # how often the spool tries a disk again that failed


def memory_mode(case: Case) -> str:
    """Return why the spool cannot be used; empty where it can."""
    spool = case.status().spool
    return spool.detail if spool.mode == "memory" else ""


def disk_case(matrix: Matrix, row: str, disk: Path, **cache: str) -> Case:
    """Return a case whose spool is on `disk`."""
    settings = {"path": str(disk / "spool"), "min_free": "1", **cache}
    return matrix.case(row, sections={"cache": settings})


# ── full, read-only, gone ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("min_free", ["1", *(["2MB"] if IS_LONG else [])])
def test_the_disk_is_full(matrix: Matrix, min_free: str) -> None:
    """Records stay in the rings, it is said once why, and the spool goes on by itself when there is room again."""
    disk = matrix.stack.enter_context(tmpfs(matrix.folder / "disk", TMPFS_BYTES))
    row = "disk full, then freed" if min_free == "1" else "less than cache.min_free, then freed"
    case = disk_case(matrix, row, disk, min_free=min_free)
    case.start()
    case.is_up()
    case.receiver.stop()
    for _ in range(times(1, 5)):
        case.wait_spooled(50)
        filler = fill(disk)
        case.line.injections += 1
        said = wait_for(lambda: memory_mode(case), "the spool gives up")
        assert "free" in said, said
        time.sleep(0.5)
        filler.unlink()
        wait_for(lambda: not memory_mode(case), "the spool works again", RETRY_S + 3)
    case.wait_spooled(50)
    case.receiver.start()
    case.finish(may_lose=["ring_full"])
    assert case.agent.log().count("the spool cannot be used") == case.line.injections


def test_the_disk_is_freed_just_before_the_end(matrix: Matrix) -> None:
    """An orderly end asks a disk once more that has refused before: what waits in the rings is kept."""
    disk = matrix.stack.enter_context(tmpfs(matrix.folder / "disk", TMPFS_BYTES))
    case = disk_case(matrix, "disk full, freed just before SIGTERM", disk)
    for _ in range(times(1, 10)):
        case.start()
        case.is_up()
        case.receiver.stop()
        case.wait_spooled(50)
        filler = fill(disk)
        case.line.injections += 1
        wait_for(lambda: memory_mode(case), "the spool gives up")
        filler.unlink()
        case.stop()
        case.receiver.start()
    case.start()
    case.finish()


def test_the_disk_becomes_readonly(matrix: Matrix) -> None:
    """Records stay in the rings until it can be written again."""
    disk = matrix.stack.enter_context(tmpfs(matrix.folder / "disk", TMPFS_BYTES))
    case = disk_case(matrix, "disk remounted read-only", disk)
    case.start()
    case.is_up()
    case.receiver.stop()
    case.wait_spooled(50)
    force_readonly(case, disk)
    case.line.injections += 1
    wait_for(lambda: memory_mode(case), "the spool gives up")
    make_readonly(disk, False)
    wait_for(lambda: not memory_mode(case), "the spool works again", RETRY_S + 3)
    case.wait_spooled(50)
    case.receiver.start()
    case.finish(may_lose=["ring_full"])


def force_readonly(case: Case, disk: Path) -> None:
    """Make the disk read-only although the sender has a file open for writing, as the kernel does after an error."""
    if "busy" in subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, text=True).stderr:
        case.kill_child("kon-agent: sender")  # tmpfs refuses while a file is open for writing
        make_readonly(disk, True)


@pytest.mark.parametrize("way", ["read-only", "missing"])
def test_the_spool_cannot_be_had_at_the_start(matrix: Matrix, way: str) -> None:
    """The agent runs without one, says why, and delivers from memory."""
    disk = matrix.stack.enter_context(tmpfs(matrix.folder / "disk", TMPFS_BYTES))
    if way == "read-only":
        make_readonly(disk, True)
    else:
        (disk / "spool").write_text("a file")
        (disk / "spool.spool").write_text("another, where the folder would be")
    case = disk_case(matrix, f"spool directory {way} at the start", disk)
    case.line.injections += 1
    case.start()
    case.is_up()
    assert "cannot be used" in wait_for(lambda: memory_mode(case), "the status says why")
    case.receiver.stop()
    wait_for(lambda: sum(plugin.in_ring for plugin in case.status().plugins) > 500, "records wait in the rings")
    case.receiver.start()
    case.finish()
    assert 1 == case.agent.log().count("no spool: "), "it is said once"


@pytest.mark.parametrize("what", ["files", *(["folder"] if IS_LONG else [])])
def test_the_spool_is_removed_under_it(matrix: Matrix, what: str) -> None:
    """Whoever removes it loses what it held: declared, not missing; the agent goes on."""
    case = matrix.case(f"spool's {what} removed while it runs")
    case.start()
    case.is_up()
    case.receiver.stop()
    case.wait_spooled(300)
    if what == "folder":
        shutil.rmtree(case.spool)
    else:
        for path in case.spool.glob("*.seg"):
            path.unlink()
    case.line.injections += 1
    case.receiver.start()
    case.finish(may_lose=["spool_corrupt", "ring_full"])


def test_the_spool_is_damaged(matrix: Matrix) -> None:
    """Bits flipped, files cut short while no agent runs: it starts; only what was damaged is lost, and declared."""
    case = matrix.case("spool damaged between two runs")
    for _ in range(times(1, 30)):
        case.start()
        case.is_up()
        case.receiver.stop()
        case.wait_spooled(300)
        case.stop()
        for path in case.spool.glob("*.seg"):
            damage(case, path)
        case.receiver.start()
        case.start()
        case.is_up()
        wait_for(lambda: 0 == case.status().spool.records, "the spool is empty")
        case.settle()
    line = case.balance(may_lose=["spool_corrupt"])
    assert line.lost["spool_corrupt"]


def damage(case: Case, path: Path) -> None:
    """Flip a few bits of a segment, or cut it short."""
    data = bytearray(path.read_bytes())
    case.line.injections += 1
    if case.line.injections % 3 == 0:
        del data[case.chance.randrange(len(data)) :]
    else:
        for _ in range(3):
            data[case.chance.randrange(len(data))] ^= 1 << case.chance.randrange(8)
    path.write_bytes(data)


# ── failing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def failing(case: Case, calls: str, first: int, more: int) -> Iterator[None]:
    """Have some system calls of the sender fail with EIO, those on the spool's files only."""
    pid = case.agent.sender()
    newest = max(int(path.stem) for path in case.spool.glob("*.seg"))
    paths = (
        [f"-P{case.spool}/{number:012d}.seg" for number in range(newest, newest + 50)]
        if calls in ("write", "pread64")
        else []
    )
    command = ["strace", "-f", "-qq", "-p", str(pid), "-e", f"trace={calls}", *paths]
    command += [
        "-e",
        f"inject={calls}:error=EIO:when={first}..{first + more - 1}",
        "-o",
        str(case.agent.folder / "strace"),
    ]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: f"TracerPid:\t{tracer.pid}" in Path(f"/proc/{pid}/status").read_text(), "strace is attached")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)  # it lets go of the sender and ends
        tracer.wait(10)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs the program strace")
@pytest.mark.parametrize("calls", ["write", "fdatasync", *(["fsync"] if IS_LONG else [])])
@pytest.mark.parametrize("more", [1, *([4] if IS_LONG else [])])
def test_the_disk_fails(matrix: Matrix, calls: str, more: int) -> None:
    """What may not be on disk is written again elsewhere, or stays in the rings: nothing is lost, nothing doubled."""
    # Segments are soon full, so that new ones begin; the long form waits longer than so small a quota lasts.
    cache = {"path": str(matrix.folder / "spool"), "max_size": "16MB" if IS_LONG else "2MB"}
    case = matrix.case(f"EIO on {calls}, {'once' if more == 1 else f'{more} times'}", sections={"cache": cache})
    case.start()
    case.is_up()
    for first in range(1, times(1, 4) + 1):
        case.receiver.stop()
        case.wait_spooled(50)
        with failing(case, calls, first, more):
            wait_for(lambda: injected(case) >= (1 if calls == "fsync" else more), "it has failed", 30)
        case.line.injections += injected(case)
        case.receiver.start()
        case.is_up()
    case.finish(may_lose=["ring_full"])


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs the program strace")
@pytest.mark.parametrize("more", [1, *([10] if IS_LONG else [])])
def test_the_disk_cannot_be_read(matrix: Matrix, more: int) -> None:
    """The backlog waits until the disk gives it back, and is delivered then; the status is as it was before.

    A disk that fails for longer than the reader's patience costs the blocks it does not give back, and no others.
    """
    case = matrix.case(f"EIO on read, {'once' if more == 1 else f'{more} times'}")
    case.start()
    case.is_up()
    for _ in range(times(1, 4)):
        case.receiver.stop()
        case.wait_spooled(300)
        with failing(case, "pread64", 1, more):
            case.receiver.start()
            wait_for(lambda: injected(case) >= more, "it has failed", 30)
        case.line.injections += injected(case)
        case.is_up()
        wait_for(lambda: 0 == case.status().spool.records, "the spool is empty")
        wait_for(lambda: "idle" == case.status().spool.mode, "the spool is itself again")
    case.finish(may_lose=["spool_corrupt"] if more > PATIENCE else [])


def injected(case: Case) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (case.agent.folder / "strace").read_text().count("(INJECTED)")
    return 0


# ── too small ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_quota_is_reached(matrix: Matrix) -> None:
    """The oldest records go first; every one of them is declared; `du` never exceeds cache.max_size."""
    case = quota_case(matrix, "spool quota reached")
    largest = 0
    for _ in range(times(1, 5)):
        before, until = evicted(case), time.monotonic() + 60
        while evicted(case) == before and time.monotonic() < until:
            largest = max(largest, disk_usage(case.spool))
        case.line.injections += 1
    case.receiver.start()
    line = case.finish(may_lose=["spool_evicted", "ring_full"], note=f"at most {largest} of {QUOTA_BYTES} bytes")
    assert line.lost["spool_evicted"]
    assert largest <= QUOTA_BYTES


def test_the_sender_is_killed_as_it_evicts(matrix: Matrix) -> None:
    """Whether a segment was evicted or not, its records are delivered or declared, and counted once."""
    case = quota_case(matrix, "sender killed, as the quota evicts")
    for _ in range(times(1, 20)):
        oldest = min(case.spool.glob("*.seg"))
        until = time.monotonic() + 60
        while oldest.exists() and time.monotonic() < until:
            pass
        case.nap(0.002)
        case.kill_child("kon-agent: sender")
        case.wait_child("kon-agent: sender")
        if case.line.injections % 4 == 0:  # once more, and its breaker would rest for a minute
            case.receiver.start()
            case.is_up()
            case.settle()
            case.start()
            case.is_up()
            case.receiver.stop()
            case.wait_spooled(50)
    case.receiver.start()
    case.is_up()
    case.settle()
    case.balance(may_lose=["spool_evicted", "ring_full"])


QUOTA_BYTES = 700_000  # small, so that it is reached within seconds


def quota_case(matrix: Matrix, row: str) -> Case:
    """Return a case that spools into a small quota."""
    cache = {"path": str(matrix.folder / "spool"), "max_size": str(QUOTA_BYTES)}
    case = matrix.case(row, sections={"cache": cache})
    case.start()
    case.is_up()
    case.receiver.stop()
    case.wait_spooled(50)
    return case


def evicted(case: Case) -> int:
    """Return how many records the status says were evicted."""
    return sum(plugin.dropped.get("spool_evicted", 0) for plugin in case.status().plugins)


def disk_usage(folder: Path) -> int:
    """Return what `du` says."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_blocks * 512
    return total


# ── power ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_power_is_cut(matrix: Matrix) -> None:
    """Whatever the sender called durable is delivered by the next start, which nothing on the disk can prevent."""
    image = matrix.folder / "disk.img"
    disk_image.make_image(image)
    with disk_image.mounted(image, matrix.folder / "disk") as disk:
        case = disk_case(matrix, "power cut", disk, max_size="16MB")
        slowest_s = 0.0
        case.start()
        case.is_up()
        for _ in range(times(1, 13)):
            case.receiver.stop()
            case.wait_spooled(100)
            for _ in range(times(1, 7)):
                case.nap(1.0)
                slowest_s = max(slowest_s, cut_and_recover(matrix, case, image, is_offline=True))
            case.receiver.start()
            wait_for(lambda: "connected" == case.status().server.state, "it is connected", RECONNECT_DEADLINE_S)
            case.nap(0.3)  # and now while the spool drains
            slowest_s = max(slowest_s, cut_and_recover(matrix, case, image, is_offline=False))
            case.is_up()
            wait_for(lambda: 0 == case.status().spool.records, "the spool is empty")
        case.finish(note=f"every copy recovered, connected within {slowest_s:.1f} s")


def cut_and_recover(matrix: Matrix, case: Case, image: Path, is_offline: bool) -> float:
    """Copy the image; see that a start on the copy delivers what it holds; return the seconds until it connected."""
    durable = {plugin.name: plugin.spooled for plugin in case.status().plugins} if is_offline else {}
    case.line.injections += 1
    target = matrix.folder / f"cut-{case.line.injections}.img"
    disk_image.copy(image, target)
    return recover(matrix, target, durable)


def recover(matrix: Matrix, image: Path, durable: dict[str, int]) -> float:
    """Start an agent on the image; all its spool holds is delivered. Return the seconds until it was connected."""
    folder = matrix.folder / image.stem
    folder.mkdir()
    with disk_image.mounted(image, folder / "disk") as disk:
        found = disk_image.held(disk / "spool")
        for plugin, count in durable.items():
            assert count <= sum(1 for each in found if each[0] == plugin), f"{plugin}: durable records are gone"
        prefix = matrix.here.prefix
        with Receiver(folder, matrix.pki, ["--client-ca", str(matrix.pki / "ca.pem")], prefix) as receiver:
            cache = {"path": str(disk / "spool"), "min_free": "1"}
            agent = Agent(folder, receiver.port, matrix.pki, {"memory": {}}, sections={"cache": cache}, prefix=prefix)
            began_s = time.monotonic()
            with agent:
                agent.wait_until_running("memory")
                took_s = time.monotonic() - began_s
                wait_for(lambda: 0 == agent.status().spool.records, "the spool is empty")
            check_recovered(receiver.ledger(), found)
    image.unlink()
    return took_s


def check_recovered(rows: list[LedgerRow], found: set[disk_image.Identity]) -> None:
    by_stream: dict[tuple[str, str], LedgerRow] = {
        (row.plugin, row.epoch): row for row in rows if row.agent == AGENT_ID
    }
    for plugin, epoch, seq in found:
        row = by_stream[plugin, f"{epoch:016x}"]
        assert any(first <= seq <= last for first, last in row.ranges), (plugin, epoch, seq, row)
