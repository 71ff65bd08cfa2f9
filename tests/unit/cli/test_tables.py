"""What people see."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from kon_agent.cli import tables
from kon_agent.control_protocol import Death, PluginStatus, ServerStatus, Status
from kon_agent.metric import Metric


def _terminal(columns: int) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system=None,
        width=columns,
        highlight=False,
        soft_wrap=True,
    )


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plugins_fit_80_columns(cpu: PluginStatus, broken: PluginStatus) -> None:
    """A year's numbers and the longest pid fit a plain terminal without being cut."""
    out = _terminal(80)
    tables.print_plugins([cpu, broken], out)
    heading, first, second, *_ = _text(out).splitlines()
    assert [
        "NAME", "STATE", "PID", "PERIOD", "RESTARTS", "LAST-EXIT", "PRODUCED", "ACKED", "DROPPED",
    ] == heading.split()  # fmt: skip
    assert ["cpu", "RUNNING", "4194303", "5s", "0", "-", "69379200", "69379190", "0"] == first.split()
    assert ["memory", "HALF_OPEN", "-", "500ms", "12", "exit", "70", "0", "0", "4"] == second.split()
    assert max(map(len, (heading, first, second))) <= 80


@pytest.mark.parametrize("indent", [0, 2])
def test_numbers_stand_in_full_in_80_columns(cpu: PluginStatus, indent: int) -> None:
    """Where there are too many, headings give way, then long names; a number never does."""
    name = "an-instance-of-some-plugin"
    plugins = [msgspec.structs.replace(cpu, name=name, restarts=12, last_exit="killed by SIGKILL"), cpu]
    out = _terminal(80)
    tables.print_plugins(plugins, out, indent)
    lines = _text(out).splitlines()
    assert max(map(len, lines)) <= 80
    assert ["RUNNING", "4194303", "5s", "12", "SIGKILL", "69379200", "69379190", "0"] == lines[1].split()[1:]
    assert lines[1].split()[0].startswith("an-insta")


def test_a_wide_terminal_shows_more(cpu: PluginStatus) -> None:
    """Behind the columns that are always there."""
    out = _terminal(120)
    tables.print_plugins([msgspec.structs.replace(cpu, rate_per_s=2.4, uptime_s=3725.0)], out)
    heading, line = (row.split() for row in _text(out).splitlines())
    assert ["DROPPED", "UPTIME", "BREAKER", "RATE"] == heading[-4:]
    assert ["0", "1h", "2m", "closed", "2.4/s"] == line[-5:]


def test_plugin_info_tells_of_deaths_and_periods(cpu: PluginStatus) -> None:
    """Each with its time; a period that is not the configured one stands beside it."""
    deaths = [Death(when="2026-01-02T03:04:05.000+00:00", reason="killed by SIGKILL")]
    out = tables.console(io.StringIO())
    tables.print_plugin(msgspec.structs.replace(cpu, deaths=deaths, configured_period_s=1.0), out)
    lines = _text(out).splitlines()
    assert "death         2026-01-02T03:04:05.000+00:00  killed by SIGKILL" in lines
    assert "period        5s (configured: 1s)" in lines


def test_reason_of_a_death_stands_in_full(broken: PluginStatus) -> None:
    """The reason that does not fit the column is below the table, without its control characters."""
    out = tables.console(io.StringIO())
    tables.print_plugins([broken], out)
    assert "memory: last exit 70: ImportError: no module named 'nowhere' [31m" == _text(out).splitlines()[2]


def test_disabled_is_told_from_stopped(cpu: PluginStatus) -> None:
    """A plugin that was switched off says so instead of merely not running."""
    off = PluginStatus(name="cpu", state="STOPPED", enabled=False, period_s=5.0, last_exit="killed by SIGKILL")
    out = tables.console(io.StringIO())
    tables.print_plugins([off], out)
    assert ["cpu", "DISABLED", "-", "5s", "0", "SIGKILL", "0", "0", "0"] == _text(out).splitlines()[1].split()[:9]


def test_a_pipe_gets_plain_uncut_text(cpu: PluginStatus) -> None:
    """Without a terminal there is no colour and no column is cut, however long its content."""
    name = "n" * 200
    out = tables.console(io.StringIO())
    tables.print_plugins([PluginStatus(name=name, state="RUNNING", enabled=True, period_s=5.0)], out)
    assert name in _text(out)
    assert "\x1b" not in _text(out)


def test_status_says_why(whole: Status) -> None:
    """The summary holds each reason: the server's, the interface's, the worker's, the warnings."""
    out = tables.console(io.StringIO())
    tables.print_status(whole, out)
    text = _text(out)
    assert "kon-agent 9.8.7  edge-1  pid 321  up 1h 2m" == text.splitlines()[0]
    for reason in (
        "the server's certificate is not from our CA",
        "eth0 ingress: native refused: EOPNOTSUPP",
        "ImportError: no module named 'nowhere'",
        "warning: not root: nothing is dropped",
        "cpu 0.4% of a core  memory 43 MiB",
        "idle  1.5 KiB of 47.7 MiB  7 records in 1 segments  oldest 1m 1s",
    ):
        assert reason in text


def test_a_connected_agent_fits_80_columns(whole: Status) -> None:
    """The server's line as well, with an address and a time of day of common length."""
    server = ServerStatus(
        address="quic://metrics.example.org:7843", state="connected", since="2026-11-22T21:33:35.053+00:00", rtt_ms=12.3
    )
    out = _terminal(80)
    tables.print_status(msgspec.structs.replace(whole, server=server, interfaces=[], warnings=[]), out)
    head = _text(out).partition("plugins")[0].splitlines()
    assert "server     connected  quic://metrics.example.org:7843  rtt 12.3 ms" == head[1]
    assert max(map(len, head)) <= 80


def test_labels_are_never_cut() -> None:
    """What a narrow terminal does not take in one line goes on in the next, and the value stays whole."""
    labels = {"device": "/dev/mapper/data-volume", "fstype": "ext4", "mountpoint": "/srv/a-long-name-of-a-folder"}
    out = _terminal(80)
    tables.print_metrics([Metric("disk_inodes_total", 8796093022208.0, labels)], out)
    lines = _text(out).splitlines()
    assert max(map(len, lines)) <= 80
    assert {"mountpoint=/srv/a-long-name-of-a-folder", "8796093022208"} <= set(" ".join(lines).split())


def test_plugin_info_names_each_loss(broken: PluginStatus) -> None:
    """The long form shows what was dropped by reason."""
    out = tables.console(io.StringIO())
    tables.print_plugin(broken, out)
    assert "dropped       3 ring_full, 1 worker_crash" in _text(out).splitlines()


@pytest.mark.parametrize(
    ("shown", "count"),
    [("0 B", 0), ("1023 B", 1023), ("1 KiB", 1024), ("47.7 MiB", 50_000_000), ("2 TiB", 2 << 40)],
)
def test_size(shown: str, count: int) -> None:
    """Bytes are shown in the largest binary unit that keeps them above one."""
    assert shown == tables.size(count)


@pytest.mark.parametrize(("shown", "seconds"), [("100ms", 0.1), ("5s", 5.0), ("1.5s", 1.5), ("2m", 120.0)])
def test_period(shown: str, seconds: float) -> None:
    """A period reads as the configuration would write it."""
    assert shown == tables.period(seconds)


@pytest.mark.parametrize(
    ("shown", "seconds"), [("0s", 0.4), ("59s", 59.9), ("3m", 180.0), ("1h 2m", 3725.0), ("7d 3h", 615_600.0)]
)
def test_age(shown: str, seconds: float) -> None:
    """A length of time shows its two largest units."""
    assert shown == tables.age(seconds)
