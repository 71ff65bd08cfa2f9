"""What is known of a segment: its index, its summary, what remains of it, and how entries are cut to fit one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kon_agent.ranges import RangeSet
from kon_agent.spool.frame import MAX_PAYLOAD_BYTES, Entry, Kind, encode, scan
from kon_agent.spool.portion import cut
from kon_agent.spool.segment import (
    MAX_INDEX_BYTES,
    Contents,
    Reason,
    Segment,
    damage,
    loss_bytes,
    merged,
    name_of,
    number_of,
    parse_summary,
    runs,
    scanned,
    summarize,
)

ENTRIES = st.lists(
    st.builds(
        Entry,
        plugin=st.sampled_from(("cpu", "disk", "ä-plugin")),
        epoch=st.sampled_from((0, 2**64 - 1)),
        seq=st.integers(0, 60) | st.just(2**63),
        payload=st.sampled_from((b"", b"x" * 40)),
    )
    | st.builds(Entry, plugin=st.just("cpu"), epoch=st.just(0), seq=st.integers(0, 60), reason=st.just(1)),
    max_size=60,
)


def known(*entries: Entry) -> Segment:
    """Return a segment that holds `entries`."""
    contents = Contents()
    contents.add(entries)
    return Segment(1, 100, 4096, 0.0, contents)


@given(ENTRIES)
def test_a_summary_tells_it_all(entries: list[Entry]) -> None:
    """What is summarized is what is parsed."""
    contents = Contents()
    contents.add(entries)
    parsed = parse_summary(summarize(contents))
    assert parsed is not None
    assert contents.is_same(parsed)


@given(ENTRIES)
def test_the_index_bounds_summary_and_losses(entries: list[Entry]) -> None:
    """Neither the summary nor the frames that declare everything lost are longer than the index says."""
    segment = known(*entries)
    assert segment.contents is not None
    index = segment.contents.index_bytes
    assert len(summarize(segment.contents)) <= index
    losses = [*segment.contents.losses, *segment.as_losses(Reason.EVICTED)]
    assert sum(len(encode(Kind.LOSS, 0, loss)) for loss in losses) <= index


def test_rubbish_is_no_summary() -> None:
    """What cannot be parsed is none, never an error."""
    for rubbish in (b"", b"\x00", b"\x93\x01\x02\x03", b"\x92\x90\xc0", bytes(100)):
        assert parse_summary(rubbish) is None


@given(ENTRIES)
def test_runs_are_the_records(entries: list[Entry]) -> None:
    """Runs hold each record once, in order, and no loss."""
    told = [(stream, seq) for stream, first, last in runs(entries) for seq in range(first, last + 1)]
    assert [((e.plugin, e.epoch), e.seq) for e in entries if not e.is_loss] == told


@given(ENTRIES)
def test_merged_losses_are_the_same_losses(entries: list[Entry]) -> None:
    """Merging neither adds nor forgets a sequence number, and leaves no neighbours."""

    def told(losses: list[Entry]) -> set[tuple[str, int, int, int]]:
        return {(e.plugin, e.epoch, e.reason, seq) for e in losses for seq in range(e.seq, e.last + 1)}

    joined = merged(entries)
    assert told(entries) == told(joined)
    assert len(told(joined)) == sum(entry.count for entry in joined)


def test_what_remains_is_neither_acknowledged_nor_told() -> None:
    """Damaged records keep their own reason, the rest takes the one given."""
    segment = known(*(Entry("cpu", 1, seq, b"x") for seq in range(10)))
    segment.damaged = [Entry("cpu", 1, 2, count=4, reason=Reason.CORRUPT)]
    assert 3 == segment.settle(("cpu", 1), 0, 2)
    assert 1 == segment.settle(("cpu", 1), 0, 3)
    assert [
        Entry("cpu", 1, 4, count=2, reason=Reason.CORRUPT),
        Entry("cpu", 1, 6, count=4, reason=Reason.EVICTED),
    ] == segment.as_losses(Reason.EVICTED)
    assert [(4, 9)] == list(segment.remaining()["cpu", 1])


def test_damage_is_what_is_missing() -> None:
    """Records and losses that should be there and are not are told apart, each as what it is."""
    entries = [Entry("cpu", 1, seq, b"payload") for seq in range(6)] + [Entry("cpu", 1, 6, count=2, reason=1)]
    contents = Contents()
    contents.add(entries)
    there = [encode(Kind.LOSS if e.is_loss else Kind.RECORD, n, e) for n, e in enumerate(entries)]
    del there[6], there[2:4]
    records, losses = damage(contents, scan(b"".join(there)))
    assert [Entry("cpu", 1, 2, count=2, reason=Reason.CORRUPT)] == records
    assert [entries[6]] == losses


def test_heads_between_neighbours_are_inferred_where_they_had_room() -> None:
    """A gap in ordinals and sequence numbers alike is records; a frame that merely claims so makes none up."""
    frames = [encode(Kind.RECORD, n, Entry("cpu", 1, n, b"payload")) for n in range(4)]
    gap = frames[0] + bytes(len(frames[1]) * 2) + frames[3]
    assert [(0, 3)] == list(scanned(scan(gap)).records["cpu", 1])
    claim = frames[0] + encode(Kind.RECORD, 1_000_000, Entry("cpu", 1, 1_000_000, b"payload"))
    assert [(0, 0), (1_000_000, 1_000_000)] == list(scanned(scan(claim)).records["cpu", 1])


def test_without_takes_away_what_was_declared() -> None:
    """Records and losses in the given ranges are gone, all others stay."""
    contents = Contents()
    contents.add([Entry("cpu", 1, 0, b"x"), Entry("cpu", 1, 1, b"x"), Entry("cpu", 1, 2, count=3, reason=1)])
    rest = contents.without({("cpu", 1): RangeSet([(1, 3)]), ("disk", 1): RangeSet([(0, 9)])})
    assert [(0, 0)] == list(rest.records["cpu", 1])
    assert [Entry("cpu", 1, 2, count=3, reason=1)] == rest.losses
    gone = contents.without({("cpu", 1): RangeSet([(0, 9)])})
    assert not gone.records
    assert not gone.losses


@given(ENTRIES, st.sampled_from((40_000, 65_536)))
def test_portions_are_the_entries_in_order(entries: list[Entry], segment_bytes: int) -> None:
    """Cutting loses nothing, and its sizes are upper bounds."""
    portions = cut(entries, segment_bytes)
    assert entries == [entry for portion in portions for entry in portion.entries]
    for portion in portions:
        assert sum(len(encode(Kind.RECORD, 0, entry)) for entry in portion.entries) <= portion.size
        contents = Contents()
        contents.add(portion.entries)
        assert contents.index_bytes <= portion.index_bytes + len(summarize(Contents())) + 16


def test_each_portion_fits_a_segment() -> None:
    """However large the entries and however many ranges, no portion exceeds an empty segment's room."""
    large = [Entry("cpu", 1, seq, bytes(20_000)) for seq in range(20)]
    scattered = [Entry("cpu", epoch, 0, b"x") for epoch in range(2000)]
    for portion in cut(large + scattered, 65_536):
        assert portion.size <= 65_536
        assert portion.index_bytes <= MAX_INDEX_BYTES
    assert 2000 * loss_bytes("cpu") // MAX_INDEX_BYTES < len(cut(scattered, 65_536))
    assert 1 == len(cut([Entry("cpu", 1, 0, bytes(MAX_PAYLOAD_BYTES))], 65_536))


def test_names_are_numbers() -> None:
    """A segment's number is found in its name, and nowhere else."""
    assert 42 == number_of(name_of(42))
    for foreign in (
        "lock",
        "state",
        "42.seg",
        "000000000042",
        "00000000004x.seg",
        "٠٠٠٠٠٠٠٠٠٠٤٢.seg",
        "000000000042.seg~",
    ):
        assert number_of(foreign) is None
