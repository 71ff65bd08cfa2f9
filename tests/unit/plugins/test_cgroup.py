"""The cgroup collector's promises."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kon_agent.config.schema import CgroupConfig
from kon_agent.errors import NoData
from kon_agent.plugins import cgroup, procfs
from kon_agent.plugins.cgroup import Cgroup
from kon_agent.plugins.context import Context

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755",
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 master:2 - cgroup cgroup rw,cpu,cpuacct",
    "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
    "34 31 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids",
    "35 31 0:32 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio",
    "36 31 0:33 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd",
    "37 31 0:34 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
)
HYBRID = (*V1, "38 31 0:35 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw")

SERVICE_V2 = {
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\nnr_throttled 3\nthrottled_usec 750000\n",
    "memory.current": "4096\n",
    "memory.max": "8192\n",
    "memory.events": "low 0\nhigh 0\nmax 5\noom 1\noom_kill 2\n",
    "io.stat": "8:0 rbytes=1000 wbytes=200 rios=1 wios=1 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=2 rios=1 wios=1\n9:0 \n",
    "pids.current": "7\n",
    "cpu.pressure": "some avg10=0.00 avg60=0.00 total=1500000\nfull avg10=0.00 avg60=0.00 total=0\n",
}
SERVICE_V1 = {
    "cpu,cpuacct/cpuacct.usage": "2500000000\n",
    "cpu,cpuacct/cpu.stat": "nr_periods 10\nnr_throttled 3\nthrottled_time 750000000\n",
    "memory/memory.usage_in_bytes": "4096\n",
    "memory/memory.limit_in_bytes": "8192\n",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "pids/pids.current": "7\n",
    "blkio/blkio.throttle.io_service_bytes": "8:0 Read 1001\n8:0 Write 202\n8:0 Sync 9\n8:0 Total 1212\nTotal 1212\n",
}
FIGURES = {
    "cgroup_cpu_seconds_total": 2.5,
    "cgroup_cpu_throttled_seconds_total": 0.75,
    "cgroup_memory_bytes": 4096,
    "cgroup_memory_limit_bytes": 8192,
    "cgroup_oom_kills_total": 2,
    "cgroup_io_read_bytes_total": 1001,
    "cgroup_io_write_bytes_total": 202,
    "cgroup_tasks": 7,
}

Values = dict[tuple[str, str], float]


class Tree:
    """A machine with control groups."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = root / "sys/fs/cgroup"
        self.top.mkdir(parents=True)
        (root / "proc/self").mkdir(parents=True)

    def mount(self, *lines: str) -> None:
        """Have these hierarchies."""
        (self.root / "proc/self/mountinfo").write_text("".join(f"{line}\n" for line in lines))

    def put(self, group: str, files: dict[str, str]) -> None:
        """Have a group with these files."""
        for name, text in files.items():
            folder, _, file = f"/{name}".rpartition("/")
            path = Path(f"{self.top}{folder}{group}")
            path.mkdir(parents=True, exist_ok=True)
            (path / file).write_text(text)

    def values(self, config: CgroupConfig | None = None) -> Values:
        """Collect; return the values by name and group."""
        collected = Cgroup(config or CgroupConfig(), Context(root=str(self.root))).collect()
        return {(metric.name, metric.labels.get("cgroup", "")): metric.value for metric in collected}

    def groups(self, config: CgroupConfig | None = None) -> list[str]:
        """Collect; return the groups reported, in order."""
        return list(dict.fromkeys(group for _, group in self.values(config) if group))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Return a machine without a group yet."""
    return Tree(tmp_path)


def of(collected: Values, group: str) -> dict[str, float]:
    """Return a group's values by name."""
    return {name: value for (name, of_group), value in collected.items() if of_group == group}


def test_version_2_is_read(tree: Tree) -> None:
    """Each figure is in seconds or bytes, I/O summed over the disks, pressure as time."""
    tree.mount(V2)
    tree.put("/system.slice/ssh.service", SERVICE_V2)
    pressure = {"cgroup_pressure_cpu_some_seconds_total": 1.5, "cgroup_pressure_cpu_full_seconds_total": 0.0}
    assert {**FIGURES, **pressure} == of(tree.values(), "/system.slice/ssh.service")


def test_version_1_is_read(tree: Tree) -> None:
    """The same figures come from the controllers' own hierarchies, two of them mounted together."""
    tree.mount(*V1)
    tree.put("/docker/ab", SERVICE_V1)
    assert FIGURES == of(tree.values(), "/docker/ab")


def test_version_1_counts_io_of_the_groups_below_where_it_can(tree: Tree) -> None:
    """The recursive count goes before the group's own."""
    tree.mount(*V1)
    tree.put("/a", {**SERVICE_V1, "blkio/blkio.throttle.io_service_bytes_recursive": "8:0 Read 5\n8:0 Write 6\n"})
    figures = of(tree.values(), "/a")
    assert (5, 6) == (figures["cgroup_io_read_bytes_total"], figures["cgroup_io_write_bytes_total"])


def test_io_that_is_not_counted_is_not_zero(tree: Tree) -> None:
    """Version 1's file names no disk where the kernel does not count: that is left out."""
    tree.mount(*V1)
    tree.put("/a", {"blkio/blkio.throttle.io_service_bytes_recursive": "Total 0\n", "pids/pids.current": "1\n"})
    assert {"cgroup_tasks": 1} == of(tree.values(), "/a")


def test_in_a_hybrid_each_figure_comes_from_one_hierarchy(tree: Tree) -> None:
    """Version 1 where it has the controller, version 2 for the rest; a path is one group in all of them."""
    tree.mount(*HYBRID)
    tree.put("/a", {"memory/memory.usage_in_bytes": "1\n", "cpu,cpuacct/cpuacct.usage": "1000000000\n"})
    tree.put("/a", {"unified/cpu.stat": "usage_usec 9000000\n", "unified/memory.current": "9\n"})
    tree.put("/b", {"unified/cpu.stat": "usage_usec 3000000\n"})
    collected = tree.values()
    assert {"cgroup_cpu_seconds_total": 1.0, "cgroup_memory_bytes": 1} == of(collected, "/a")
    assert {"cgroup_cpu_seconds_total": 3.0} == of(collected, "/b")


@pytest.mark.parametrize(
    ("mounts", "files"),
    [
        ((V2,), {"memory.current": "1\n", "memory.max": "max\n"}),
        (V1, {"memory/memory.usage_in_bytes": "1\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}),
    ],
)
def test_no_limit_is_left_out(tree: Tree, mounts: tuple[str, ...], files: dict[str, str]) -> None:
    """Unlimited memory is no number."""
    tree.mount(*mounts)
    tree.put("/a", files)
    assert {"cgroup_memory_bytes": 1} == of(tree.values(), "/a")


def test_stacked_devices_are_not_counted_twice(tree: Tree) -> None:
    """What a device mapper or loop device carries, the disk below carries again: only the disk counts."""
    tree.mount(V2)
    (tree.root / "sys/dev/block/253:0/slaves/sda").mkdir(parents=True)
    (tree.root / "sys/dev/block/8:0/slaves").mkdir(parents=True)
    tree.put("/a", {"io.stat": "253:0 rbytes=5 wbytes=5\n8:0 rbytes=5 wbytes=5\n7:0 rbytes=5 wbytes=5\n"})
    assert {"cgroup_io_read_bytes_total": 5, "cgroup_io_write_bytes_total": 5} == of(tree.values(), "/a")


def test_those_nearest_to_the_root_come_first_and_the_rest_is_counted(tree: Tree) -> None:
    """No more than max_cgroups are reported: level by level, by name; how many were omitted is a figure."""
    tree.mount(V2)
    for group in ("/", "/a", "/a/deep", "/b", "/b/deep"):
        tree.put(group, {"pids.current": "1\n"})
    config = CgroupConfig(max_cgroups=4)
    assert ["/", "/a", "/b", "/a/deep"] == tree.groups(config)
    assert 1 == tree.values(config)["cgroup_omitted", ""]


def test_patterns_choose(tree: Tree) -> None:
    """A group is reported if a pattern includes and none excludes it, whatever stands above it."""
    tree.mount(V2)
    for group in ("/", "/system.slice", "/system.slice/a.service", "/system.slice/b.mount", "/user.slice"):
        tree.put(group, {"pids.current": "1\n"})
    config = CgroupConfig(include=["/system.slice/*"], exclude=["*.mount"])
    assert ["/system.slice/a.service"] == tree.groups(config)
    assert 0 == tree.values(config)["cgroup_omitted", ""]


def test_a_group_that_goes_is_skipped(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose files give ENODEV has no figures; the others are reported."""
    tree.mount(V2)
    tree.put("/a", {"pids.current": "1\n"})
    tree.put("/b", {"pids.current": "1\n"})
    read = procfs.read

    def vanish(context: Context, path: str) -> bytes:
        if "/a/" in path:
            raise OSError(19, "No such device")
        return read(context, path)

    monkeypatch.setattr(procfs, "read", vanish)
    assert ["/b"] == tree.groups()


def test_a_folder_that_goes_is_skipped(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group removed between its parent's listing and its own is no failure."""
    tree.mount(V2)
    tree.put("/a/b", {"pids.current": "1\n"})
    tree.put("/c/d", {"pids.current": "1\n"})
    scandir: Callable[[str], object] = os.scandir

    def vanish(path: str) -> object:
        if path.endswith("/a"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanish)
    assert ["/c/d"] == tree.groups()


def test_no_more_folders_than_the_bound_are_looked_into(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond MAX_FOLDERS nothing deeper is seen, and that is said once."""
    monkeypatch.setattr(cgroup, "MAX_FOLDERS", 2)
    tree.mount(V2)
    for group in ("/a", "/b", "/a/deep", "/b/deep"):
        tree.put(group, {"pids.current": "1\n"})
    collector = Cgroup(CgroupConfig(), Context(root=str(tree.root)))
    with caplog.at_level(logging.WARNING):
        seen = {metric.labels["cgroup"] for metric in collector.collect() if metric.labels}
        collector.collect()
    assert {"/a", "/b", "/a/deep"} == seen
    assert 1 == len(caplog.records)


def test_undecodable_names_are_replaced(tree: Tree) -> None:
    """A group's name may hold any byte; its label is UTF-8."""
    tree.mount(V2)
    folder = os.fsencode(tree.top) + b"/\xff"
    os.mkdir(folder)
    with open(folder + b"/pids.current", "w") as file:
        file.write("1\n")
    assert ["/\ufffd"] == tree.groups()


def test_a_machine_without_control_groups_is_no_data(tree: Tree) -> None:
    """Neither version mounted, or only hierarchies without figures: no failure."""
    tree.mount("36 31 0:33 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd")
    with pytest.raises(NoData, match="no control group"):
        tree.values()
