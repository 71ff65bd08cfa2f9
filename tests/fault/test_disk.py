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
from tests.fault.conftest import Matrix
from tests.support import disk_image
from tests.support.agent import AGENT_ID, Agent
from tests.support.disk_image import fill, make_readonly, tmpfs
from tests.support.faults import Case, times
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

TMPFS_BYTES = 6 * 1024 * 1024
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


@pytest.mark.parametrize("min_free", ["1", "2MB"], ids=["to the last byte", "to cache.min_free"])
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
    assert "cannot be used" in memory_mode(case)
    case.receiver.stop()
    wait_for(lambda: sum(plugin.in_ring for plugin in case.status().plugins) > 500, "records wait in the rings")
    case.receiver.start()
    case.finish()


def test_the_spool_is_removed_under_it(matrix: Matrix) -> None:
    """Whoever removes its files loses what they held: declared, not missing; the rest goes on."""
    case = matrix.case("spool's files removed while it runs")
    case.start()
    case.is_up()
    case.receiver.stop()
    case.wait_spooled(300)
    for path in case.spool.glob("*.seg"):
        path.unlink()
    case.line.injections += 1
    case.receiver.start()
    case.finish(may_lose=["spool_corrupt"])


def test_the_spool_folder_is_removed_under_it(matrix: Matrix) -> None:
    """Whoever removes the folder loses what it held: declared, not missing; the rest goes on."""
    case = matrix.case("spool's folder removed while it runs")
    case.start()
    case.is_up()
    case.receiver.stop()
    case.wait_spooled(300)
    shutil.rmtree(case.spool)
    case.line.injections += 1
    time.sleep(2)
    case.receiver.start()
    case.finish(may_lose=["spool_corrupt", "ring_full"])


# ── failing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def failing(case: Case, calls: str, first: int, more: int) -> Iterator[None]:
    """Have some system calls of the sender fail with EIO, those on the spool's files only."""
    pid = case.agent.sender()
    paths = [f"-P{case.spool}/{number:012d}.seg" for number in range(1, 200)] if calls == "write" else []
    command = ["strace", "-f", "-qq", "-p", str(pid), "-e", f"trace={calls}", *paths]
    command += ["-e", f"inject={calls}:error=EIO:when={first}..{first + more - 1}", "-o", str(case.agent.folder / "strace")]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: f"TracerPid:\t{tracer.pid}" in Path(f"/proc/{pid}/status").read_text(), "strace is attached")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)  # it lets go of the sender and ends
        tracer.wait(10)
        print((case.agent.folder / "strace").read_text()[-3000:])
        print(case.status().spool, os.listdir(f"/proc/{pid}/fd"), [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")])


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs the program strace")
@pytest.mark.parametrize("calls", ["write", "fdatasync", "fsync"])
@pytest.mark.parametrize("more", [1, 4], ids=["once", "for a while"])
def test_the_disk_fails(matrix: Matrix, calls: str, more: int) -> None:
    """What may not be on disk is written again elsewhere, or stays in the rings: nothing is lost, nothing doubled."""
    case = matrix.case(f"EIO on {calls}, {'once' if more == 1 else f'{more} times'}")
    case.start()
    case.is_up()
    for first in range(1, times(1, 8) + 1):
        case.receiver.stop()
        case.wait_spooled(50)
        with failing(case, calls, first, more):
            wait_for(lambda: injected(case) >= (1 if calls == "fsync" else more), "it has failed", 40)
        case.line.injections += injected(case)
        case.receiver.start()
        case.is_up()
    case.finish(may_lose=["ring_full"])


def injected(case: Case) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (case.agent.folder / "strace").read_text().count("(INJECTED)")
    return 0


# ── too small ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_killed", [False, True], ids=["quota", "quota, sender killed as it evicts"])
def test_the_quota_is_reached(matrix: Matrix, is_killed: bool) -> None:
    """The oldest records go first; every one of them is declared; `du` never exceeds cache.max_size."""
    max_bytes = 1_000_000
    row = "spool quota reached" + (", sender killed as it evicts" if is_killed else "")
    case = matrix.case(row, sections={"cache": {"path": str(matrix.folder / "spool"), "max_size": str(max_bytes)}})
    case.start()
    case.is_up()
    case.receiver.stop()
    largest = 0
    for _ in range(times(1, 3)):
        evicted = sum(p.dropped.get("spool_evicted", 0) for p in case.status().plugins)
        until = time.monotonic() + 60
        oldest = min(case.spool.glob("*.seg"), default=None)
        while time.monotonic() < until:
            largest = max(largest, disk_usage(case.spool))
            now = min(case.spool.glob("*.seg"), default=None)
            if is_killed and oldest and now and now > oldest:
                case.kill_child("kon-agent: sender")
                case.wait_child("kon-agent: sender")
                break
            if now and not is_killed and sum(p.dropped.get("spool_evicted", 0) for p in case.status().plugins) > evicted:
                case.line.injections += 1
                break
            oldest = oldest or now
    case.receiver.start()
    line = case.finish(may_lose=["spool_evicted", "ring_full"], note=f"at most {largest} of {max_bytes} bytes")
    assert line.lost["spool_evicted"]
    assert largest <= max_bytes


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
        case = disk_case(matrix, "power cut", disk, max_size="12MB")
        copies = []
        case.start()
        case.is_up()
        case.receiver.stop()
        case.wait_spooled(100)
        for number in range(times(4, 120)):
            case.nap(1.0)
            durable = {plugin.name: plugin.spooled for plugin in case.status().plugins}
            target = matrix.folder / f"cut-{number}.img"
            disk_image.copy(image, target)
            copies.append((target, durable))
            case.line.injections += 1
        case.receiver.start()
        case.is_up()
        case.settle()
    slowest_s = 0.0
    for target, durable in copies:
        slowest_s = max(slowest_s, recover(matrix, target, durable))
    case.balance(note=f"every copy recovered, connected within {slowest_s:.1f} s")


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
    by_stream: dict[tuple[str, str], LedgerRow] = {(row.plugin, row.epoch): row for row in rows if row.agent == AGENT_ID}
    for plugin, epoch, seq in found:
        row = by_stream[plugin, f"{epoch:016x}"]
        assert any(first <= seq <= last for first, last in row.ranges), (plugin, epoch, seq, row)
