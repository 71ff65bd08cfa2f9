"""The demo: a receiver and an agent on this machine, with certificates of their own, in one private folder.

Owns the folder and the two processes. Both run in sessions of their own: Ctrl-C reaches only the demo, which
ends them in order, the agent first, so that it can deliver what it holds, then the receiver. Whatever happens,
both are gone when `run` returns, and a temporary folder with them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from kon_agent.cli import tables
from kon_agent.control_protocol import SOCKET_ENV
from kon_agent.receiver import pki

PERIOD = "2s"

FIRST_RECORDS_S = 15.0
"""How long to wait for a record of every plugin before showing what there is."""

STOP_TIMEOUT_S = 8.0
"""The agent takes 5 s at most to deliver what it holds (`shutdown_timeout`), and a little more to end."""

POLL_S = 0.5
"""Between two looks into the store: each is a process of its own."""

QUERY_LIMIT = 5000
"""Records looked at for the latest values: several cycles of every plugin on a large host."""

QUERY_TIMEOUT_S = 10.0
"""A query takes a fraction of a second; this one hangs."""

PLUGINS = ("cpu", "memory", "disk", "ebpf", "agent")
"""The built-in plugins in the order in which they are shown."""


class Record(msgspec.Struct, frozen=True):
    """What the demo needs of a line of `kon-receiver query --json`; JSON has no NaN, so that is None there."""

    plugin: str
    ts_ns: int
    name: str
    value: float | None
    labels: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the demo's files are, and where its receiver listens."""

    folder: Path
    port: int

    @property
    def store(self) -> Path:
        """The receiver's store."""
        return self.folder / "store.db"

    @property
    def control(self) -> Path:
        """The agent's control socket."""
        return self.folder / "control.sock"

    @property
    def config(self) -> Path:
        """The agent's configuration."""
        return self.folder / "agent.yaml"


def run(folder: Path | None, seconds: float | None) -> int:
    """Run receiver and agent until SIGINT or SIGTERM, or for `seconds`; return the exit code.

    0: ended as asked; 1: a process ended by itself, or `seconds` were over before all plugins had records.
    """
    with _private(folder) as where, _stop_signals() as wakeup_fd:
        place = Place(where, _free_port())
        _prepare(place)
        _introduce(place)
        with (  # left in reverse: agent, receiver
            _running("receiver", _receiver_command(place)) as receiver,
            _running("agent", _agent_command(place)) as agent,
        ):
            return _watch(place, {"receiver": receiver, "agent": agent}, wakeup_fd, seconds)


def agent_yaml(place: Place, agent_id: str) -> str:
    """Return the agent's configuration: PLUGINS every PERIOD, all files in the place."""
    sections = "".join(f"  {name}: {{enable: true, period: {PERIOD}}}\n" for name in PLUGINS)
    return (
        f'server: "quic://127.0.0.1:{place.port}"\n'
        f'client-id: "{agent_id}"\n'
        f"plugins:\n{sections}"
        f'tls: {{ca: ca.pem, cert: "{agent_id}.pem", key: "{agent_id}.key"}}\n'
        "cache: {path: spool}\n"
        f"control: {{socket: {place.control.name}}}\n"
    )


def latest(records: Iterable[Record]) -> dict[str, dict[str, list[Record]]]:
    """Return the newest record of every series, by plugin and metric name."""
    newest: dict[tuple[str, str, str], Record] = {}
    for record in records:
        key = (record.plugin, record.name, tables.labels(record.labels))
        if key not in newest or newest[key].ts_ns <= record.ts_ns:
            newest[key] = record
    found: dict[str, dict[str, list[Record]]] = {}
    for (plugin, name, _), record in sorted(newest.items()):
        found.setdefault(plugin, {}).setdefault(name, []).append(record)
    return found


def _prepare(place: Place) -> None:
    host = socket.gethostname()
    agent_id = f"{host}-agent" if host in pki.RESERVED else host
    if not (place.folder / "ca.pem").exists():
        pki.init(place.folder, [])
    if not (place.folder / f"{agent_id}.pem").exists():
        pki.agent(place.folder, agent_id)
    place.config.write_text(agent_yaml(place, agent_id))


def _introduce(place: Place) -> None:
    _say(f"everything is in {place.folder}")
    if os.geteuid() != 0:
        _say("not root: packets are counted as far as procfs does, not by BPF")
    _say("in another terminal:")
    click.echo(f"    {SOCKET_ENV}={place.control} kon-agent plugins list")
    click.echo(f"    {SOCKET_ENV}={place.control} kon-agent status")
    click.echo(f"    kon-receiver query --store {place.store}")
    _say("Ctrl-C ends both")


def _watch(
    place: Place,
    processes: dict[str, subprocess.Popen[bytes]],
    wakeup_fd: int,
    seconds: float | None,
) -> int:
    """Show the first records, then wait for the end: a signal, a death, or the time."""
    started = time.monotonic()
    missing: list[str] = list(PLUGINS)
    is_shown = False
    while not _has_byte(wakeup_fd, POLL_S):
        for name, process in processes.items():
            if process.poll() is not None:
                _say(f"the {name} has ended: {_exit_in_words(process.returncode)}", err=True)
                return 1
        elapsed = time.monotonic() - started
        if missing and not (is_shown and seconds is None):
            found = latest(_query(place))
            missing = [name for name in PLUGINS if name not in found]
            if not is_shown and (not missing or elapsed > FIRST_RECORDS_S):
                is_shown = True
                _show(found, missing)
        if seconds is not None and elapsed >= seconds:
            if missing:
                _say(f"after {seconds:g} s there is no record of {', '.join(missing)}", err=True)
            return 1 if missing else 0
    return 0


def _show(found: dict[str, dict[str, list[Record]]], missing: Sequence[str]) -> None:
    _say("stored so far, the latest value of each metric, the largest of several series:")
    rows = []
    for plugin, metrics in found.items():
        for name, series in metrics.items():
            most = max(series, key=lambda record: record.value or 0.0)
            value = "nan" if most.value is None else f"{most.value:.15g}"
            more = f" (+{len(series) - 1} more)" if len(series) > 1 else ""
            rows.append((plugin, name, value, tables.labels(most.labels) + more))
    tables.print_table(["PLUGIN", "NAME", ">VALUE", "LABELS"], rows, tables.console())
    if missing:
        _say(f"nothing yet from {', '.join(missing)}: 'kon-agent status' says why", err=True)


def _query(place: Place) -> list[Record]:
    """Return what is stored; nothing while there is no store yet."""
    command = [sys.executable, "-P", "-m", "kon_agent.cli.receiver", "query", "--json"]
    command += ["--store", str(place.store), "--limit", str(QUERY_LIMIT)]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, timeout=QUERY_TIMEOUT_S, check=False)
        return [msgspec.json.decode(line, type=Record) for line in done.stdout.splitlines()]
    return []


def _receiver_command(place: Place) -> list[str]:
    folder = place.folder
    command = [sys.executable, "-P", "-m", "kon_agent.cli.receiver", "run", "-v"]
    command += ["--listen", f"127.0.0.1:{place.port}", "--store", str(place.store)]
    command += ["--cert", str(folder / "server.pem"), "--key", str(folder / "server.key")]
    return [*command, "--client-ca", str(folder / "ca.pem")]


def _agent_command(place: Place) -> list[str]:
    return [sys.executable, "-P", "-m", "kon_agent.cli.agent", "run", "-c", str(place.config)]


@contextlib.contextmanager
def _running(name: str, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a session of its own; end it on leaving, by force if it does not obey."""
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        yield process
    finally:
        process.terminate()  # does nothing to one already reaped
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _say(f"the {name} does not end within {STOP_TIMEOUT_S:g} s and is killed", err=True)
            process.kill()
            process.wait()


@contextlib.contextmanager
def _private(folder: Path | None) -> Iterator[Path]:
    """Make the folder, readable by its owner only; a temporary one is removed on leaving."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="kon-agent-demo.") as temporary:  # 0700 by itself
            yield Path(temporary)
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        yield folder.absolute()


@contextlib.contextmanager
def _stop_signals() -> Iterator[int]:
    """Yield a file descriptor that becomes readable on SIGINT, SIGTERM or SIGHUP, which do nothing else."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    fd_before = signal.set_wakeup_fd(write_fd)
    try:
        yield read_fd
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read_fd)
        os.close(write_fd)


def _has_byte(fd: int, timeout_s: float) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def _free_port() -> int:
    """Return a UDP port of the loopback nobody uses now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _exit_in_words(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def _say(text: str, err: bool = False) -> None:
    click.echo(f"demo: {text}", err=err)
