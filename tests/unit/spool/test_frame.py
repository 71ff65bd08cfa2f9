"""Frames: what is written is read, what is damaged is found out, and the next frame is found again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kon_agent.spool.frame import ALIGN, HEAD_BYTES, Entry, Kind, decode, encode, scan

ENTRIES = st.builds(
    Entry,
    plugin=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    epoch=st.integers(0, 2**64 - 1),
    seq=st.integers(0, 2**64 - 1),
    payload=st.binary(max_size=300),
    count=st.integers(1, 2**64 - 1),
    reason=st.integers(0, 6),
)


@given(ENTRIES, st.sampled_from(Kind), st.integers(0, 2**32 - 1))
def test_what_is_encoded_is_decoded(entry: Entry, kind: Kind, ordinal: int) -> None:
    """Every field comes back, and the frame ends where the next may begin."""
    data = encode(kind, ordinal, entry)
    frame = decode(data, 0)
    assert frame is not None
    assert (kind, ordinal, entry, 0, len(data), False) == (
        frame.kind, frame.ordinal, frame.entry, frame.start, frame.end, frame.is_damaged,
    )  # fmt: skip
    assert 0 == len(data) % ALIGN


@given(st.lists(ENTRIES, max_size=5), st.binary(max_size=64))
def test_frames_are_found_behind_rubbish(entries: list[Entry], rubbish: bytes) -> None:
    """Whatever stands before them, at a multiple of 8, whole frames are found."""
    rubbish += bytes(-len(rubbish) % ALIGN)
    data = rubbish + b"".join(encode(Kind.RECORD, n, entry) for n, entry in enumerate(entries))
    assert entries == [frame.entry for frame in scan(data)]


def test_a_damaged_payload_costs_its_own_record() -> None:
    """The head still tells whose it was and where the next frame begins."""
    first, second = (Entry("cpu", 1, seq, b"payload") for seq in (0, 1))
    data = bytearray(encode(Kind.RECORD, 0, first) + encode(Kind.RECORD, 1, second))
    data[HEAD_BYTES + len("cpu")] ^= 1
    frames = list(scan(bytes(data)))
    assert [True, False] == [frame.is_damaged for frame in frames]
    assert [Entry("cpu", 1, 0), second] == [frame.entry for frame in frames]
    assert [False, True] == [frame.is_entry for frame in frames]


def test_a_loss_has_no_payload_to_damage() -> None:
    """The body's CRC of a frame without a body does not matter."""
    data = bytearray(encode(Kind.LOSS, 0, Entry("cpu", 1, 5, count=3, reason=2)))
    data[4] ^= 1
    assert [Entry("cpu", 1, 5, count=3, reason=2)] == [frame.entry for frame in scan(bytes(data)) if frame.is_entry]


def test_a_head_does_not_adopt_another_payload() -> None:
    """A whole head before a whole payload of the same length, written elsewhere, is damage."""
    ours, theirs = (encode(Kind.RECORD, seq, Entry("cpu", 1, seq, bytes([65 + seq]) * 8)) for seq in (0, 1))
    at = HEAD_BYTES + len("cpu")
    frame = decode(ours[:at] + theirs[at:], 0)
    assert frame is not None
    assert frame.is_damaged


def test_no_truncation_is_taken_for_a_frame() -> None:
    """A frame is whole with its last byte; the padding behind that may be missing."""
    data = encode(Kind.RECORD, 0, Entry("cpu", 1, 0, b"0123456789"))
    whole = HEAD_BYTES + len("cpu") + 10
    assert [] == [length for length in range(whole) if decode(data[:length], 0) is not None]
    assert all(decode(data[:length], 0) is not None for length in range(whole, len(data)))


def test_no_bit_flip_goes_unnoticed() -> None:
    """Any one bit of head or payload that changes makes no frame, or a damaged one."""
    entry = Entry("cpu", 1, 0, b"0123456789")
    data = encode(Kind.RECORD, 0, entry)
    for at in range((HEAD_BYTES + len("cpu") + 10) * 8):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        frame = decode(bytes(flipped), 0)
        assert frame is None or frame.is_damaged, at
