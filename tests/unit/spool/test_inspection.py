"""The inspection says what is there and what is damaged, and touches nothing."""

from __future__ import annotations

import copy

from kon_agent.spool.frame import HEAD_BYTES, Entry, Kind, scan
from kon_agent.spool.inspection import Damage, SegmentReport, reports
from kon_agent.spool.limits import MIN_BYTES, Limits
from kon_agent.spool.log import Spool
from tests.support.faulty_disk import FaultyDisk


def make() -> FaultyDisk:
    """Return the disk of a live spool: one segment finished, one being written."""
    disk = FaultyDisk()
    disk.now_s = 100
    spool = Spool(disk, Limits(MIN_BYTES, 1e6, 0))
    spool.open(0)
    spool.store([Entry("cpu", 1, seq, b"payload") for seq in range(10)], 100)
    while spool.read(100, 1000) is not None:
        pass
    disk.now_s = 200
    spool.store([Entry("cpu", 1, seq, b"payload") for seq in range(10, 13)], 200)
    spool.store([Entry("cpu", 1, 13, count=5, reason=1)], 200)
    return disk


def looked_at(disk: FaultyDisk, is_thorough: bool = True) -> list[SegmentReport]:
    """Return the reports, having made sure that nothing was written."""
    before = copy.deepcopy(disk.files)
    began = disk.operations
    found = list(reports(disk, 300, is_thorough))
    assert before == disk.files
    assert {"names", "facts", "read"} >= set(disk.kinds[began:])
    return found


def record(disk: FaultyDisk, name: str, seq: int) -> int:
    """Return where a record's frame begins."""
    frames = scan(bytes(disk.files[name].data))
    return next(frame.start for frame in frames if frame.kind is Kind.RECORD and frame.entry.seq == seq)


def test_a_live_spool_is_whole() -> None:
    """Finished and open segments with their counts and ages."""
    for is_thorough in (False, True):
        first, second = looked_at(make(), is_thorough)
        assert ("finished", 10, 0, 200) == (first.state, first.records, first.losses, first.age_s)
        assert ("open", 3, 5, 100) == (second.state, second.records, second.losses, second.age_s)
        assert not first.damage
        assert not second.damage


def test_a_torn_end_is_no_damage() -> None:
    """What a killed writer left at the end of an open segment was never confirmed."""
    disk = make()
    name = max(disk.files)
    disk.files[name].data += b"KS" * 50
    assert ["finished", "open"] == [report.state for report in looked_at(disk)]


def test_damage_is_located_and_counted() -> None:
    """A damaged payload, a damaged head, and a byte between frames, each where it is."""
    for is_thorough in (False, True):
        disk = make()
        name = min(disk.files)
        payload, head = record(disk, name, 2), record(disk, name, 5)
        disk.files[name].data[payload + HEAD_BYTES + 4] ^= 1
        disk.files[name].data[head + 20] ^= 1
        size = record(disk, name, 3) - payload
        (report, _) = looked_at(disk, is_thorough)
        assert ("damaged", 10, 2) == (report.state, report.records, report.unreadable)
        assert [Damage(payload, size), Damage(head, size)] == report.damage


def test_a_byte_between_frames_is_damage_without_a_loss() -> None:
    """The file is not as it was written, though no record is touched."""
    disk = make()
    name = min(disk.files)
    disk.files[name].data[record(disk, name, 3) - 1] ^= 1
    (report, _) = looked_at(disk)
    assert ("damaged", 0, 1) == (report.state, report.unreadable, len(report.damage))


def test_a_file_that_vanishes_meanwhile_is_delivered() -> None:
    """Between looking at the folder and reading it the agent may have removed a file: no report, no error."""

    files = make().files
    first = min(files)

    class Live(FaultyDisk):
        looks = 0

        def read(self, name: str, offset: int, length: int) -> bytes:
            self.looks += name == first and length == len(self.files[first].data)
            if self.looks == 2:  # the survey's, then the one that is to examine it
                self.files.pop(first, None)
            return super().read(name, offset, length)

    disk = Live()
    disk.files = files
    assert [2] == [report.number for report in reports(disk, 300, True)]


def test_what_cannot_be_read_says_why() -> None:
    """An unreadable segment is damaged as a whole; a missing one between others as well."""
    disk = make()
    disk.unreadable = {min(disk.files): 13}
    (first, _) = looked_at(disk)
    assert ("damaged", 10, "Permission denied") == (first.state, first.unreadable, first.error)
    spool = Spool(disk := make(), Limits(MIN_BYTES, 1e6, 0))
    spool.open(0)
    spool.store([Entry("cpu", 1, 99, b"x")], 0)
    del disk.files[sorted(disk.files)[1]]
    assert [("finished", ""), ("damaged", "it has vanished")] == [(r.state, r.error) for r in looked_at(disk)[:2]]
