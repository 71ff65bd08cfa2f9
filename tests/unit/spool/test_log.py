"""The spool's promises one by one, on a disk in memory; test_faults and test_damage break that disk systematically."""

from __future__ import annotations

import errno
import logging
import os
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from kon_agent.errors import SpoolError
from kon_agent.spool.disk import Folder
from kon_agent.spool.frame import HEAD_BYTES, Entry, Kind, scan
from kon_agent.spool.limits import MIN_BYTES, Limits
from kon_agent.spool.log import CLOCK_SET_S, Reason, Spool
from kon_agent.spool.reader import MAX_LOSSES, MAX_RUNS, PATIENCE
from tests.support.faulty_disk import Crash, Fault, FaultyDisk, File
from tests.support.spooling import members

LIMITS = Limits(MIN_BYTES, max_age_s=100, min_free_bytes=0)
NOW_S = 1000.0


def records(first: int, count: int, plugin: str = "cpu", epoch: int = 1, size: int = 100) -> list[Entry]:
    """Return consecutive records."""
    return [Entry(plugin, epoch, seq, f"{seq} ".encode().ljust(size, b".")) for seq in range(first, first + count)]


def opened(disk: FaultyDisk, limits: Limits = LIMITS, now_s: float = NOW_S) -> Spool:
    """Return a spool that has been opened."""
    disk.now_s = now_s
    spool = Spool(disk, limits)
    spool.open(now_s)
    return spool


def drained(spool: Spool, max_records: int = 1000) -> list[Entry]:
    """Read and acknowledge everything."""
    entries: list[Entry] = []
    while (chunk := spool.read(max_records, 1 << 20)) is not None:
        entries += chunk.entries
        spool.acknowledge(chunk)
    return entries


def segments(spool: Spool, *batches: list[Entry], now_s: float = NOW_S) -> None:
    """Store each batch in a segment of its own: reading all there is ends the one that is being written."""
    for batch in batches:
        spool.store(batch, now_s)
        while spool.read(1000, 1 << 20) is not None:
            pass
        spool.rewind()


# Order and acknowledgement.


def test_what_is_stored_is_read_in_order() -> None:
    """First in, first out, across segments; acknowledged, nothing is left, on disk neither."""
    disk = FaultyDisk()
    spool = opened(disk)
    entries = records(0, 50) + records(7, 20, "disk", 5) + [Entry("disk", 5, 27, count=3, reason=1)] + records(50, 5)
    spool.store(entries[:30], NOW_S)
    spool.store(entries[30:], NOW_S)
    assert Counter(cpu=55, disk=20) == spool.pending
    assert entries == drained(spool, 7)
    assert spool.is_empty()
    assert not disk.files
    assert 0 == spool.bytes_on_disk() == spool.segment_count()


def test_a_chunk_is_bounded() -> None:
    """A chunk has no more records and bytes than asked for."""
    spool = opened(FaultyDisk())
    spool.store(records(0, 100), NOW_S)
    few = spool.read(2, 1 << 20)
    some = spool.read(1000, 450)
    assert few
    assert some
    assert (2, 5) == (len(few.entries), len(some.entries))


def test_a_chunk_is_no_more_than_a_batch_may_be() -> None:
    """However damaged a segment is, no chunk has more losses or runs of records than one batch can carry."""
    disk = FaultyDisk()
    spool = opened(disk, Limits(10_000_000, 100, 0))
    spool.store(records(0, 2000, size=64), NOW_S)
    spool.close()
    data = disk.files[min(disk.files)].data
    for frame in list(scan(bytes(data))):
        if frame.kind is Kind.RECORD and frame.entry.seq % 2:
            data[frame.start + HEAD_BYTES + len("cpu")] ^= 1
    spool = opened(disk)
    chunks = []
    while (chunk := spool.read(10_000, 1 << 20)) is not None:
        chunks.append(chunk)
        spool.acknowledge(chunk)
    assert all(sum(entry.is_loss for entry in chunk.entries) <= MAX_LOSSES for chunk in chunks)
    assert all(sum(not entry.is_loss for entry in chunk.entries) <= MAX_RUNS for chunk in chunks)
    assert Counter({("cpu", Reason.CORRUPT): 1000}) == spool.dropped
    assert not +spool.pending


def test_rewound_it_is_read_again_from_the_last_acknowledgement() -> None:
    """What was acknowledged is not read again, what was only read is."""
    spool = opened(FaultyDisk())
    spool.store(records(0, 10), NOW_S)
    first = spool.read(4, 1 << 20)
    second = spool.read(4, 1 << 20)
    assert first and second
    spool.acknowledge(first)
    spool.rewind([second])
    assert Counter(cpu=6) == spool.pending
    assert records(4, 6) == drained(spool)


def test_a_late_acknowledgement_counts_once() -> None:
    """A chunk acknowledged after it was rewound, and again when it was read again, is one chunk."""
    spool = opened(FaultyDisk())
    spool.store(records(0, 10), NOW_S)
    stale = spool.read(10, 1 << 20)
    assert stale
    spool.rewind([stale])
    again = spool.read(5, 1 << 20)
    assert again
    spool.acknowledge(again)
    assert Counter(cpu=5) == spool.pending
    spool.acknowledge(stale)
    assert not +spool.pending
    assert spool.is_empty()


def test_a_successor_goes_on_from_the_position() -> None:
    """With the end of the last chunk acknowledged, whatever chunk that was, nothing is delivered or counted twice."""
    for stop_after in range(1, 9):
        disk = FaultyDisk()
        spool = opened(disk)
        segments(spool, records(0, 10), records(10, 10))
        seen: list[Entry] = []
        for _ in range(stop_after):
            chunk = spool.read(3, 1 << 20)
            assert chunk
            seen += chunk.entries
            last = chunk
        disk.kill()  # before the spool heard of the acknowledgement
        spool = opened(disk)
        if last.number > min(int(name[:12]) for name in disk.files):
            spool.resume(last.number - 1, 1 << 20)
        spool.resume(last.number, last.end)
        assert 20 - len(seen) == spool.pending["cpu"]
        assert records(0, 20) == seen + drained(spool)


def test_a_successor_does_not_tell_again_what_expired() -> None:
    """Behind the position of a segment that was told as a loss, nothing of it is left."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 5), NOW_S)
    spool.close()
    spool = opened(disk, now_s=NOW_S + 200)
    chunk = spool.read(100, 1 << 20)
    assert chunk
    disk.kill()
    spool = opened(disk, now_s=NOW_S + 200)
    spool.resume(chunk.number, chunk.end)
    assert spool.is_empty()
    assert not +spool.pending
    assert not spool.dropped


def test_what_was_given_up_in_the_middle_has_not_vanished() -> None:
    """A segment evicted while an older one was in flight is not missed by a successor."""
    disk = FaultyDisk()
    spool = opened(disk)
    segments(spool, records(0, 50, size=1000))
    assert spool.read(10, 1 << 20)
    for turn in range(60):
        spool.store(records(20 * turn, 20, "disk", size=1000), NOW_S)
    evicted = spool.dropped.total()
    disk.kill()
    spool = opened(disk)
    assert 50 + 1200 - evicted == spool.pending.total()
    assert {int(Reason.EVICTED)} == {entry.reason for entry in drained(spool) if entry.is_loss}
    assert not spool.dropped


def test_a_number_is_not_used_again_below_a_position() -> None:
    """An emptied folder knows no numbers; a position of before must not meet a new segment."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 3), NOW_S)
    chunk = spool.read(10, 1 << 20)
    assert chunk
    spool.acknowledge(chunk)
    spool = opened(disk)
    spool.resume(chunk.number, chunk.end)
    spool.store(records(3, 3), NOW_S)
    disk.kill()
    spool = opened(disk)
    spool.resume(chunk.number, chunk.end)
    assert records(3, 3) == drained(spool)


# The quota.


def test_the_oldest_is_evicted_and_counted() -> None:
    """At the quota the oldest records go, each is declared, and `du` is never above it."""
    disk = FaultyDisk(MIN_BYTES)  # which checks after each operation
    spool = opened(disk)
    for turn in range(100):
        spool.store(records(20 * turn, 20, size=1000), NOW_S)
    entries = drained(spool)
    lost = [seq for entry in entries if entry.is_loss for _, _, seq in members(entry)]
    kept = [entry.seq for entry in entries if not entry.is_loss]
    assert {int(Reason.EVICTED)} == {entry.reason for entry in entries if entry.is_loss}
    assert list(range(2000)) == sorted(lost + kept)
    assert len(lost) == spool.dropped["cpu", Reason.EVICTED]
    assert MIN_BYTES // 2 < 1000 * len(kept)


def test_the_quota_holds_on_a_real_disk(tmp_path: Path) -> None:
    """`du` of the folder, its lock and state file included, stays within max_bytes after every store."""
    limits = Limits(600_000, 1e6, 0)
    folder = Folder(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    folder.lock()
    spool = Spool(folder, limits)
    spool.open(time.time())
    for turn in range(80):
        spool.store(records(30 * turn, 30, ("cpu", "disk")[turn % 2], size=700 + turn), time.time())
        if turn % 20 == 19:
            spool.close()
            spool = Spool(folder, limits)
            spool.open(time.time())
        paths = [tmp_path, *tmp_path.iterdir()]
        assert sum(path.stat().st_blocks for path in paths) * 512 <= limits.max_bytes
        assert spool.bytes_on_disk() <= limits.max_bytes
    folder.release()


def test_many_ranges_are_all_declared_within_the_quota() -> None:
    """Records without a neighbour, each with a loss of its own: segments become small, nothing goes undeclared."""
    disk = FaultyDisk(MIN_BYTES)
    spool = opened(disk)
    count = 0
    while not spool.dropped:
        for epoch in range(count, count + 50):
            spool.store([Entry("a-plugin-with-a-long-name", epoch, 2 * at, b"x" * 150) for at in range(8)], NOW_S)
        count += 50
    told = {each for entry in drained(spool) for each in members(entry)}
    assert {("a-plugin-with-a-long-name", epoch, 2 * at) for epoch in range(count) for at in range(8)} == told
    assert 0 == spool.undeclared


def test_a_partly_acknowledged_segment_is_evicted_for_its_rest() -> None:
    """What the server has of the oldest segment is not declared lost."""
    spool = opened(FaultyDisk(MIN_BYTES))
    spool.store(records(0, 30, size=1000), NOW_S)
    chunk = spool.read(12, 1 << 20)
    assert chunk
    spool.acknowledge(chunk)
    for turn in range(60):
        spool.store(records(20 * turn, 20, "disk", size=1000), NOW_S)
    assert 18 == spool.dropped["cpu", Reason.EVICTED]
    told = [each for entry in drained(spool) if entry.plugin == "cpu" for each in members(entry)]
    assert [("cpu", 1, seq) for seq in range(12, 30)] == told


def test_what_is_in_flight_is_not_evicted() -> None:
    """Records on their way are not declared lost; the next segments go instead, and in the end nothing is stored."""
    spool = opened(FaultyDisk(MIN_BYTES))
    segments(spool, records(0, 50, size=1000))
    chunk = spool.read(10, 1 << 20)
    assert chunk
    for turn in range(60):
        spool.store(records(20 * turn, 20, "disk", size=1000), NOW_S)
    assert 0 == spool.dropped["cpu", Reason.EVICTED] < spool.dropped["disk", Reason.EVICTED]
    spool.acknowledge(chunk)
    assert [entry.seq for entry in drained(spool) if entry.plugin == "cpu"] == list(range(10, 50))


def test_a_quota_in_flight_as_a_whole_refuses() -> None:
    """Where everything is on its way, `store` says so instead of evicting it."""
    spool = opened(FaultyDisk(MIN_BYTES))
    for turn in range(20):
        spool.store(records(20 * turn, 20, size=1000), NOW_S)
    while spool.read(1000, 1 << 20) is not None:
        pass
    dropped = spool.dropped.total()
    with pytest.raises(SpoolError, match=r"is being sent"):
        spool.store(records(400, 100, size=1000), NOW_S)
    assert dropped == spool.dropped.total()


def test_more_than_fits_at_once_is_refused() -> None:
    """Nothing is evicted for entries the quota could not hold anyway."""
    spool = opened(FaultyDisk(MIN_BYTES))
    spool.store(records(0, 10), NOW_S)
    with pytest.raises(SpoolError, match=r"cache\.max_size .* has no room"):
        spool.store(records(10, 600, size=1000), NOW_S)
    assert records(0, 10) == drained(spool)


@pytest.mark.parametrize("max_bytes", [0, 1, MIN_BYTES - 1])
def test_a_quota_too_small_is_refused(max_bytes: int) -> None:
    """A quota no spool can work with is an error that says how much it takes."""
    spool = opened(FaultyDisk(), Limits(max_bytes, 100, 0))
    with pytest.raises(SpoolError, match=rf"cache\.max_size {max_bytes} is too small; make it {MIN_BYTES}"):
        spool.store(records(0, 1), NOW_S)


def test_a_quota_that_shrank_is_kept_from_the_start_on() -> None:
    """What is too much is evicted when the spool is opened, and declared."""
    disk = FaultyDisk()
    spool = opened(disk, Limits(4 * MIN_BYTES, 100, 0))
    for turn in range(50):
        spool.store(records(20 * turn, 20, size=1000), NOW_S)
    spool.close()
    spool = opened(disk)
    assert disk.du() <= MIN_BYTES
    assert 1000 == spool.dropped["cpu", Reason.EVICTED] + spool.pending["cpu"]
    assert 1000 == sum(entry.count for entry in drained(spool))


def test_the_disk_is_not_filled_up() -> None:
    """cache.min_free stays free; once there is room again, storing works again."""
    disk = FaultyDisk()
    spool = opened(disk, Limits(MIN_BYTES, 100, 1_000_000))
    disk.free = 1_001_000
    with pytest.raises(SpoolError, match=r"less than cache\.min_free \(1000000 bytes\) is left"):
        spool.store(records(0, 1), NOW_S)
    assert not disk.files
    disk.free = 2_000_000
    spool.store(records(0, 1), NOW_S)


def test_a_file_that_cannot_be_removed_still_counts() -> None:
    """What is on disk is in the quota, whoever it belongs to, and its removal is tried again."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 50, size=1000), NOW_S)
    disk.broken = {"unlink": errno.EIO}
    assert 50 == len(drained(spool))
    assert spool.bytes_on_disk() >= 50_000
    assert spool.is_empty()
    disk.broken = {}
    spool.store([], NOW_S)
    assert 0 == spool.bytes_on_disk()
    assert not disk.files


# Age.


def test_what_is_too_old_expires() -> None:
    """Older than max_age, a segment is given up at the next store: declared, counted, removed."""
    disk = FaultyDisk()
    spool = opened(disk)
    segments(spool, records(0, 5), now_s=NOW_S)
    segments(spool, records(5, 5), now_s=NOW_S + 60)
    spool.store(records(10, 5), NOW_S + 101)
    assert Counter({("cpu", Reason.EXPIRED): 5}) == spool.dropped
    assert [Entry("cpu", 1, 0, count=5, reason=Reason.EXPIRED)] == [e for e in drained(spool) if e.is_loss]


def test_what_is_too_old_at_the_start_is_declared_not_delivered() -> None:
    """An expired segment is told as a loss, in its turn, also where nothing is ever stored again."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 5), NOW_S)
    spool.close()
    spool = opened(disk, now_s=NOW_S + 101)
    disk.kill()
    spool = opened(disk, now_s=NOW_S + 102)  # not told yet: it is still there
    assert [Entry("cpu", 1, 0, count=5, reason=Reason.EXPIRED)] == drained(spool)
    assert Counter({("cpu", Reason.EXPIRED): 5}) == spool.dropped
    assert spool.is_empty()


def test_a_segment_half_read_expires_for_its_rest() -> None:
    """Read up to its middle and acknowledged there, it is told from there."""
    spool = opened(FaultyDisk())
    segments(spool, records(0, 10))
    chunk = spool.read(4, 1 << 20)
    assert chunk
    spool.store(records(10, 1), NOW_S + 200)  # in flight: it does not expire
    assert not spool.dropped
    spool.acknowledge(chunk)
    spool.store(records(11, 1), NOW_S + 201)
    assert Counter({("cpu", Reason.EXPIRED): 6}) == spool.dropped
    told = [entry for entry in drained(spool) if entry.is_loss]
    assert [Entry("cpu", 1, 4, count=6, reason=Reason.EXPIRED)] == told


def test_a_clock_set_back_ages_nothing() -> None:
    """What seems to come from the future is new."""
    disk = FaultyDisk()
    spool = opened(disk)
    segments(spool, records(0, 5))
    spool.store(records(5, 5), NOW_S - 500)
    spool.close()
    spool = opened(disk, now_s=NOW_S - 900)
    assert records(0, 10) == drained(spool)


def test_a_clock_set_for_the_first_time_ages_nothing() -> None:
    """A device without a clock starts in 1970; what it spools does not expire when it learns the time."""
    disk = FaultyDisk()
    spool = opened(disk)
    segments(spool, records(0, 5))
    spool.store(records(5, 5), CLOCK_SET_S + 1e8)
    assert not spool.dropped
    spool.close()
    assert records(0, 10) == drained(opened(disk, now_s=CLOCK_SET_S + 1e8 + 50))


# A disk that misbehaves.


def test_after_a_failed_sync_it_goes_on_in_a_new_segment() -> None:
    """A sync that fails once is not an error of `store`, and is not retried on its file."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 5), NOW_S)
    disk.faults[disk.operations + 2] = Fault(errno.EIO)
    spool.store(records(5, 5), NOW_S)
    assert "sync" == disk.kinds[min(disk.faults)]
    assert 2 == spool.segment_count()
    assert records(0, 10) == drained(spool)


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_stands_behind_the_last_sync_is_not_delivered(is_killed: bool) -> None:
    """Where the file cannot even be cut back, what was refused and stored again elsewhere is still delivered once."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 5), NOW_S)
    disk.broken = {"truncate": errno.EIO}
    disk.faults[disk.operations + 2] = Fault(errno.EIO)
    spool.store(records(5, 5), NOW_S)
    if is_killed:
        disk.kill()
        spool = opened(disk)
    assert Counter(cpu=10) == spool.pending
    assert records(0, 10) == drained(spool)


def test_a_failed_write_leaves_nothing_behind() -> None:
    """On a full disk the part that was written is given back."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 5), NOW_S)
    size = sum(len(file.data) for file in disk.files.values())
    disk.faults[disk.operations + 1] = Fault(errno.ENOSPC, torn=300)
    with pytest.raises(SpoolError, match=r"No space left on device; free some space, or lower cache\.max_size"):
        spool.store(records(5, 5), NOW_S)
    assert size == sum(len(file.data) for file in disk.files.values())


def test_a_large_store_is_all_or_nothing() -> None:
    """Entries for several segments of which one cannot be written are all refused, and can be stored again."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 5), NOW_S)
    many = records(5, 150, size=1000)
    disk.broken = {"create": errno.EROFS}  # the first part fits the segment there is
    with pytest.raises(SpoolError, match="Read-only file system"):
        spool.store(many, NOW_S)
    assert Counter(cpu=5) == spool.pending
    disk.broken = {}
    spool.store(many, NOW_S)
    assert Counter(cpu=155) == spool.pending
    disk.kill()
    assert [*records(0, 5), *many] == drained(opened(disk))


def test_only_an_unreadable_folder_stops_the_start() -> None:
    """Each file by itself may refuse everything; what it held is declared lost once that is certain."""
    disk = FaultyDisk()
    spool = opened(disk)
    segments(spool, records(0, 5), records(5, 5), records(10, 5))
    second = sorted(disk.files)[1]
    disk.unreadable = {second: errno.EIO}
    spool = opened(disk)
    assert Counter(cpu=15) == spool.pending
    chunk = spool.read(100, 1 << 20)
    assert chunk
    spool.acknowledge(chunk)
    for _ in range(PATIENCE - 1):
        with pytest.raises(SpoolError, match=f"{second} cannot be read: Input/output error"):
            spool.read(100, 1 << 20)
    assert [Entry("cpu", 1, 5, count=5, reason=Reason.CORRUPT), *records(10, 5)] == drained(spool)
    assert Counter({("cpu", Reason.CORRUPT): 5}) == spool.dropped
    disk.broken = {"names": errno.EIO}
    with pytest.raises(OSError, match="Input/output"):
        opened(disk)


def test_a_want_of_descriptors_is_no_damage() -> None:
    """What is wrong with this process says nothing about the file, however often it happens."""
    disk = FaultyDisk()
    spool = opened(disk)
    segments(spool, records(0, 5))
    disk.unreadable = dict.fromkeys(disk.files, errno.EMFILE)
    for _ in range(3 * PATIENCE):
        with pytest.raises(SpoolError):
            spool.read(100, 1 << 20)
    disk.unreadable = {}
    assert records(0, 5) == drained(spool)


def test_of_a_bad_sector_the_rest_is_read() -> None:
    """A block the disk does not give back costs what is in it."""

    class BadSector(FaultyDisk):
        def read(self, name: str, offset: int, length: int) -> bytes:
            if name.endswith(".seg") and offset <= 8192 < offset + length:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(name, offset, length)

    disk = FaultyDisk()
    spool = opened(disk)
    segments(spool, records(0, 150, size=200))
    spool.close()
    bad = BadSector()
    bad.files = disk.files
    spool = opened(bad)
    for _ in range(PATIENCE - 1):
        with pytest.raises(SpoolError):
            spool.read(1000, 1 << 20)
    entries = drained(spool)
    lost = sum(entry.count for entry in entries if entry.is_loss)
    assert 4096 // 256 <= lost <= 4096 // 256 + 2
    assert 150 == lost + sum(not entry.is_loss for entry in entries)


def test_what_a_predecessor_wrote_is_made_durable_before_it_counts() -> None:
    """A record written and not yet synced when its writer was killed is synced by the next, or not claimed to be."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 5), NOW_S)
    disk.faults[disk.operations + 2] = Fault(errno=0)
    with pytest.raises(Crash):
        spool.store(records(5, 5), NOW_S)
    disk.kill()
    disk.broken = {"harden": errno.EIO}
    assert {} == opened(disk).highest()
    disk.broken = {}
    assert {("cpu", 1): 9} == opened(disk).highest()
    disk.cut_power()
    assert records(0, 10) == drained(opened(disk))


def test_heads_missing_in_a_segment_without_summary_are_inferred() -> None:
    """Where a killed writer's file is damaged too, records between neighbours are known by their neighbours."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.store(records(0, 20), NOW_S)
    disk.kill()
    (file,) = disk.files.values()
    file.data[600:800] = bytes(200)
    entries = drained(opened(disk))
    assert list(range(20)) == sorted(seq for entry in entries for _, _, seq in members(entry))
    assert 2 <= sum(entry.count for entry in entries if entry.is_loss) <= 3


def test_rubbish_in_the_folder_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Foreign files, links, folders and pipes, also under a segment's name, neither stop the spool nor vanish."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "000000000005.seg").mkdir()
    (tmp_path / "000000000006.seg").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "000000000007.seg")
    (tmp_path / "000000000008.seg").write_bytes(os.urandom(3000))
    (tmp_path / "000000000009.seg").touch()
    (tmp_path / "state").write_bytes(os.urandom(100))
    folder = Folder(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    spool = Spool(folder, Limits(10_000_000, 1e9, 0))
    spool.open(time.time())
    spool.store(records(0, 10), time.time())
    assert records(0, 10) == [entry for entry in drained(spool) if entry.plugin == "cpu"]
    spool.close()
    left = {"notes.txt", "000000000005.seg", "000000000006.seg", "000000000007.seg", "state"}
    assert left == {path.name for path in tmp_path.iterdir()}
    folder.release()


# Size.


def test_a_start_with_a_full_spool_is_quick_and_small(tmp_path: Path) -> None:
    """50 MB of backlog are known within a second and 2 MiB."""
    limits = Limits(60_000_000, 1e6, 0)
    folder = Folder(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    spool = Spool(folder, limits)
    spool.open(time.time())
    seq = 0
    while spool.bytes_on_disk() < 50_000_000:
        spool.store(records(seq, 120, size=4000), time.time())
        seq += 120
    spool.close()
    began = time.perf_counter()
    Spool(folder, limits).open(time.time())
    took_s = time.perf_counter() - began
    tracemalloc.start()
    spool = Spool(folder, limits)
    spool.open(time.time())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seq == spool.pending["cpu"]
    assert took_s < 1.0
    assert peak < 2 * 1024 * 1024
    folder.release()


def test_the_age_of_the_oldest_is_known() -> None:
    """The oldest segment's last write, the one being written where there is no other, None where there is none."""
    spool = opened(FaultyDisk())
    assert spool.oldest_s() is None
    spool.store(records(0, 1), NOW_S + 1)
    assert NOW_S + 1 == spool.oldest_s()
    segments(spool, records(1, 1), now_s=NOW_S + 2)
    spool.store(records(2, 1), NOW_S + 9)
    assert NOW_S + 2 == spool.oldest_s()


def test_an_entry_no_frame_can_hold_is_refused() -> None:
    """What could never be written is an error at once, and spoils nothing."""
    spool = opened(FaultyDisk())
    for entry in (
        Entry("cpu", 1, 0, bytes(70_000)),
        Entry("p" * 300, 1, 0, b"x"),
        Entry("cpu", 2**64, 0, b"x"),
        Entry("cpu", 1, 2**64 - 1, count=2, reason=1),
        Entry("cpu", 1, 5, b"payload", reason=1),
        Entry("cpu", 1, 5, b"payload", count=2),
    ):
        with pytest.raises(SpoolError, match="cannot be spooled"):
            spool.store([*records(0, 3), entry], NOW_S)
    assert spool.is_empty()
    spool.store([Entry("cpu", 1, 0, count=2**60, reason=1)], NOW_S)
    assert [Entry("cpu", 1, 0, count=2**60, reason=1)] == drained(spool)


def test_quiet_when_healthy(caplog: pytest.LogCaptureFixture) -> None:
    """Storing, delivering, evicting and reopening log nothing."""
    with caplog.at_level(logging.DEBUG):
        disk = FaultyDisk()
        spool = opened(disk)
        for turn in range(60):
            spool.store(records(20 * turn, 20, size=1000), NOW_S)
        spool.close()
        drained(opened(disk))
    assert [] == caplog.records


# Trying a disk.


def test_a_probe_leaves_nothing_behind() -> None:
    """A disk that takes a byte again is found out about without changing what the spool holds."""
    disk = FaultyDisk()
    spool = opened(disk)
    spool.probe()
    disk.files["probe"] = File(bytearray(b"x"))  # a predecessor was killed at it
    spool.probe()
    assert "probe" not in disk.files


@pytest.mark.parametrize("kind", ["create", "write", "sync", "free"])
def test_a_probe_says_what_is_wrong(kind: str) -> None:
    """A disk that still refuses is said to, in the operator's words."""
    disk = FaultyDisk()
    spool = opened(disk)
    disk.broken[kind] = errno.EROFS
    with pytest.raises(SpoolError, match="Read-only file system"):
        spool.probe()


def test_records_survive_the_removal_of_the_file_being_written(tmp_path: Path) -> None:
    """Somebody empties the folder while it is in use: what is stored from then on is kept, in a new segment."""
    folder = Folder(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    spool = Spool(folder, LIMITS)
    spool.open(NOW_S)
    spool.store(records(0, 5), NOW_S)
    for path in tmp_path.iterdir():
        path.unlink()
    spool.store(records(5, 5), NOW_S)
    kept = drained(spool)
    assert [5, 6, 7, 8, 9] == [entry.seq for entry in kept if not entry.is_loss]
    assert Counter({("cpu", Reason.CORRUPT): 5}) == spool.dropped
    folder.release()
