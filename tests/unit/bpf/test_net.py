"""kon_agent.bpf.net: modes, reasons and slots, decided against a kernel made of answers."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from kon_agent.bpf import layout, libbpf, net
from kon_agent.bpf.hooks import ASKED
from kon_agent.bpf.net import NetCounters
from kon_agent.errors import BpfError

NATIVE = (libbpf.BPF_XDP, libbpf.XDP_FLAGS_DRV_MODE)
GENERIC = (libbpf.BPF_XDP, libbpf.XDP_FLAGS_SKB_MODE)
TCX = (libbpf.BPF_TCX_EGRESS, 0)


class Kernel(libbpf.Library):
    """Refuses what `refusals` names; keeps the interface table it was given."""

    def __init__(self) -> None:
        self.refusals: dict[tuple[int, int], int] = {}
        self.links: list[tuple[int, int]] = []
        self.programs: list[int] = []
        self.refused_programs: set[int] = set()
        self.exchanged: list[tuple[int, int]] = []
        self.refuses_exchange = False
        self.table: dict[int, tuple[int, int]] = {}

    def link(self, program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
        number = self.refusals.get((attach_type, flags))
        if number or program_fd in self.refused_programs:
            raise BpfError("refused", number or errno.EOPNOTSUPP)
        self.programs.append(program_fd)
        self.links.append((attach_type, flags))
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def exchange(self, link_fd: int, program_fd: int) -> None:
        if self.refuses_exchange:
            raise BpfError("refused", errno.ENOLINK)
        self.exchanged.append((link_fd, program_fd))

    def update(self, map_fd: int, name: str, index: int, value: bytes) -> None:
        present = {entry[0]: entry[1:] for entry in struct.iter_unpack("=IHH", value) if entry[0]}
        self.table = {i: e for i, e in self.table.items() if i % layout.BUCKETS != index} | present


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def memory() -> bytearray:
    return bytearray(layout.COUNTERS_BYTES)


@pytest.fixture
def counters(kernel: Kernel, memory: bytearray) -> Iterator[NetCounters]:
    fds = {name: os.open("/dev/null", os.O_RDONLY) for name in ("interfaces", "kon_xdp_ingress", "kon_tc_egress")}
    loaded = NetCounters(kernel, fds, memoryview(memory).toreadonly(), cpus=1024)  # four slots
    yield loaded
    loaded.close()


@pytest.mark.parametrize(
    ("refusals", "ingress", "egress"),
    [
        ({}, ("native", ""), ("tcx", "")),
        (
            {NATIVE: errno.EOPNOTSUPP, TCX: errno.EINVAL},
            ("generic", "EOPNOTSUPP: Operation not supported"),
            ("none", "EINVAL: TCX needs kernel 6.6"),
        ),
        (
            {NATIVE: errno.EBUSY, TCX: errno.EBUSY},
            ("none", "busy: another program is attached, EBUSY: Device or resource busy"),
            ("none", "busy: another program is attached, EBUSY: Device or resource busy"),
        ),
        (
            {NATIVE: errno.EOPNOTSUPP, GENERIC: errno.EEXIST},
            ("none", "busy: another program is attached, EEXIST: File exists"),
            ("tcx", ""),
        ),
        ({NATIVE: errno.ENODEV, GENERIC: errno.ENODEV}, ("none", "ENODEV: No such device"), ("tcx", "")),
    ],
)
def test_modes_and_reasons(
    counters: NetCounters,
    kernel: Kernel,
    refusals: dict[tuple[int, int], int],
    ingress: tuple[str, str],
    egress: tuple[str, str],
) -> None:
    """Native, else generic with native's errno as the reason; a busy hook is never tried in another mode."""
    kernel.refusals = refusals
    attachment = counters.attach(7, "eth0")
    assert ingress == (attachment.ingress_mode, attachment.ingress_reason)
    assert egress == (attachment.egress_mode, attachment.egress_reason)
    assert [attachment] == counters.attachments()


def test_an_interface_attached_nowhere_uses_no_slot(counters: NetCounters, kernel: Kernel) -> None:
    """It is listed with its reasons, and the kernel's table does not know it."""
    kernel.refusals = dict.fromkeys((NATIVE, GENERIC, TCX), errno.ENODEV)
    assert -1 == counters.attach(7, "eth0").slot
    assert {} == kernel.table


def test_the_kernels_table_follows(counters: NetCounters, kernel: Kernel) -> None:
    """Interfaces of one bucket stand side by side, with their first rows; a detached one is gone."""
    counters.attach(7, "eth0")
    counters.attach(7 + layout.BUCKETS, "eth1")
    assert {7: (0, 0), 7 + layout.BUCKETS: (1024, 0)} == kernel.table
    counters.detach(7)
    assert {7 + layout.BUCKETS: (1024, 0)} == kernel.table


def test_attaching_again_keeps_the_slot(counters: NetCounters) -> None:
    """An interface that comes back goes on counting where it was."""
    first = counters.attach(7, "eth0")
    counters.attach(8, "eth1")
    assert first == counters.attach(7, "eth0")
    counters.detach(7)
    assert first == counters.attach(7, "eth0")


def test_slots_run_out_and_come_back(counters: NetCounters) -> None:
    """One interface more than slots is listed with the limit as its reason; a detached one makes room."""
    for ifindex in range(1, 5):
        counters.attach(ifindex, f"eth{ifindex}")
    refused = counters.attach(5, "eth5")
    assert (-1, "none", "none") == (refused.slot, refused.ingress_mode, refused.egress_mode)
    assert "no free slot" in refused.ingress_reason
    counters.detach(2)
    assert 1 == counters.attach(5, "eth5").slot


def test_a_used_slot_starts_at_zero_for_its_next_owner(counters: NetCounters, memory: bytearray) -> None:
    """The new interface's base is what the slot had counted; fresh slots are given out first."""
    counters.attach(1, "eth1")
    struct.pack_into("=QQ", memory, 0, 600, 10)
    counters.detach(1)
    assert [1, 2, 3] == [counters.attach(ifindex, f"eth{ifindex}").slot for ifindex in (2, 3, 4)]
    new = counters.attach(5, "eth5")
    assert (0, [600, 10]) == (new.slot, new.base[:2])
    struct.pack_into("=QQ", memory, 0, 660, 11)
    assert (1, 60) == layout.read_slot(counters.counters(), 0, 1024, new.base)["ingress", "tcp"]


def test_a_name_that_is_no_utf8_is_written_out(counters: NetCounters) -> None:
    """The kernel allows such names; the table stays JSON."""
    assert r"eth\udcff" == counters.attach(7, os.fsdecode(b"eth\xff")).name
    assert r"eth\udcff" == layout.decode(counters.table()).interfaces[0].name


def test_table_is_what_a_worker_decodes(counters: NetCounters) -> None:
    """The published bytes carry the CPUs and every attachment."""
    attachment = counters.attach(7, "eth0")
    assert layout.Table(1024, [attachment]) == layout.decode(counters.table())


def test_close_closes_every_fd(kernel: Kernel) -> None:
    """No link, map or program outlives it."""
    before = os.listdir("/proc/self/fd")
    fds = {name: os.open("/dev/null", os.O_RDONLY) for name in ("interfaces", "kon_xdp_ingress", "kon_tc_egress")}
    counters = NetCounters(kernel, fds, memoryview(bytes(layout.COUNTERS_BYTES)), cpus=2)
    counters.attach(7, "eth0")
    counters.close()
    assert before == os.listdir("/proc/self/fd")


def test_other_programs_take_over_and_give_back(counters: NetCounters, kernel: Kernel) -> None:
    """Every link's program is exchanged, in its place; interfaces to come get the same; None is our own again."""
    counters.attach(7, "eth0")
    own = counters.program_fds()
    other = {"kon_xdp_ingress": 1000, "kon_tc_egress": 1001}
    counters.run(other)
    assert [1001, 1000] == [program for _, program in kernel.exchanged]
    counters.attach(8, "eth1")
    assert [1000, 1001] == kernel.programs[-2:]
    counters.run(None)
    assert [own["kon_tc_egress"], own["kon_xdp_ingress"]] * 2 == [program for _, program in kernel.exchanged[2:]]
    assert 4 == len(kernel.links)


def test_what_cannot_be_exchanged_is_attached_anew(counters: NetCounters, kernel: Kernel) -> None:
    """An interface that has gone meanwhile, or a driver that refuses: no error, and the slot stays."""
    before = counters.attach(7, "eth0")
    kernel.refuses_exchange = True
    counters.run({"kon_xdp_ingress": 1000, "kon_tc_egress": 1001})
    assert [before] == counters.attachments()
    assert [1000, 1001] == kernel.programs[-2:]


def test_mending_tries_what_is_missing(counters: NetCounters, kernel: Kernel) -> None:
    """Thoroughly, or not at all where nothing has changed; what is attached stays untouched."""
    kernel.refusals = {NATIVE: errno.EBUSY}
    before = counters.attach(7, "eth0")
    links = list(kernel.links)
    assert not counters.mend(7, is_thorough=True)
    kernel.refusals = {}
    assert not counters.mend(7, is_thorough=False)
    assert links == kernel.links
    assert counters.mend(7, is_thorough=True)
    assert [*links, NATIVE] == kernel.links
    after = counters.attachment(7)
    assert ("native", before.slot, before.created_ns) == (after.ingress_mode, after.slot, after.created_ns)
    assert not counters.mend(7, is_thorough=True)


def test_mending_finds_a_slot_where_there_was_none(counters: NetCounters, kernel: Kernel) -> None:
    """An interface that nothing was attached to, or that came too late, gets its turn."""
    kernel.refusals = dict.fromkeys((NATIVE, GENERIC, TCX), errno.ENODEV)
    counters.attach(7, "eth0")
    kernel.refusals = {}
    assert counters.mend(7, is_thorough=True)
    assert 0 <= counters.attachment(7).slot


def test_frames_in_pieces_first(kernel: Kernel, memory: bytearray) -> None:
    """Where the object has the program for them it is the one; a driver that refuses it gets the other."""
    fds = {name: os.open("/dev/null", os.O_RDONLY) for name in ("interfaces", "kon_xdp_ingress", "kon_tc_egress")}
    fds["kon_xdp_frags"] = os.open("/dev/null", os.O_RDONLY)
    counters = NetCounters(kernel, fds, memoryview(memory).toreadonly(), cpus=1024)
    counters.attach(7, "eth0")
    assert fds["kon_xdp_frags"] == kernel.programs[0]
    kernel.refused_programs = {fds["kon_xdp_frags"]}
    assert ("native", "") == (counters.attach(8, "eth1").ingress_mode, counters.attachment(8).ingress_reason)
    assert fds["kon_xdp_ingress"] == kernel.programs[-2]
    counters.close()


def test_since_when_it_counts(counters: NetCounters, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interface that comes back to its numbers has the time of their beginning; another one has its own."""
    monkeypatch.setattr(net, "wall_ns", iter(range(100, 1000)).__next__)
    assert 100 == counters.attach(7, "eth0").created_ns
    counters.detach(7)
    assert 100 == counters.attach(7, "eth0").created_ns
    assert 101 == counters.attach(8, "eth1").created_ns


def test_a_driver_is_spared_where_that_is_asked_for(counters: NetCounters, kernel: Kernel) -> None:
    """An interface whose name matches is attached generically, with the reason; changing one's mind re-attaches it."""
    counters.restrict(["veth*"])
    attached = counters.attach(7, "veth0")
    assert ("generic", ASKED, "tcx") == (attached.ingress_mode, attached.ingress_reason, attached.egress_mode)
    assert "native" == counters.attach(8, "eth0").ingress_mode
    kernel.links.clear()
    counters.restrict(["veth*"])
    assert [False, False] == [counters.mend(ifindex, is_thorough=False) for ifindex in (7, 8)]
    assert [] == kernel.links
    counters.restrict(["eth*"])
    assert [True, True] == [counters.mend(ifindex, is_thorough=False) for ifindex in (7, 8)]
    assert [False, False] == [counters.mend(ifindex, is_thorough=True) for ifindex in (7, 8)]
    assert {"veth0": "native", "eth0": "generic"} == {each.name: each.ingress_mode for each in counters.attachments()}
    assert [NATIVE, TCX, GENERIC, TCX] == kernel.links


@pytest.mark.parametrize("error", [BpfError("the kernel does not say"), OSError(errno.EMFILE, "no descriptor left")])
def test_what_cannot_be_finished_leaves_nothing(
    counters: NetCounters, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An error between the two directions takes the first one's link and the slot back; later all is as ever."""

    def failing(*_: object) -> None:
        raise error

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr("kon_agent.bpf.hooks.Hooks.attach_egress", failing)
        for _ in range(5):  # one more than there are slots
            with pytest.raises(type(error)):
                counters.attach(7, "eth0")
    assert ({}, {}) == (kernel.table, counters.watched())
    assert before == os.listdir("/proc/self/fd")
    assert 0 <= counters.attach(7, "eth0").slot
