"""The supervisor's loop: everything that is privileged, in one thread around one selector.

Owns the BPF objects, the rings, the process table and the control socket. Reads nothing a child wrote but range-checked
words and texts it only shows. A signal handler writes one byte; the loop does the rest.
"""

from __future__ import annotations

import enum
import itertools
import logging
import os
import selectors
import signal
from collections.abc import Iterator, Mapping

from setproctitle import setproctitle

from kon_agent import clock, credentials, logs, telemetry
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Config
from kon_agent.control_protocol import PluginStatus
from kon_agent.errors import KonError, PrivilegeError
from kon_agent.lifecycle import State
from kon_agent.linux import notify, privileges
from kon_agent.plugins import BUILTIN
from kon_agent.process import prepare_to_fork, reap
from kon_agent.supervisor import preload as _preload  # noqa: F401 - for its pages
from kon_agent.supervisor import status
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.control import ControlServer
from kon_agent.supervisor.courier import Courier, Parts
from kon_agent.supervisor.meter import Meter
from kon_agent.supervisor.network import NetworkWatch
from kon_agent.supervisor.requests import Requests
from kon_agent.supervisor.sharedpage import SharedPage
from kon_agent.supervisor.sharedring import SharedRing
from kon_agent.supervisor.unit import Grants, Surroundings, Unit

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0  # how often heartbeats are looked at when nothing else happens
STARTING_INTERVAL_S = 0.1  # while something starts or stops, somebody is waiting to see it
FIRST_MEASUREMENT_NS = 900_000_000  # just before the agent plugin's first tick, and so before all that follow
SNAPSHOT_ATTEMPTS = 5  # the spool's figures change a few times a second: the first one usually does
ASLEEP_NS = 3 * NS_PER_S  # the loop looks once a second: a longer gap is a suspended machine, or all of us stopped
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Phase(enum.Enum):
    """How far the supervisor's own end has come."""

    RUNNING = "running"
    STOPPING_WORKERS = "stopping workers"
    STOPPING_SENDER = "stopping the sender"
    DONE = "done"


def run(config: Config, config_path: str | None) -> int:
    """Run the agent in the foreground until told to stop; return the process's exit code.

    Args:
        config: the validated configuration.
        config_path: where it came from, for reloads; None for the built-in defaults.

    Raises:
        KonError: it cannot start.
    """
    _open_standard_streams()
    logs.dont_wait_for_readers()
    logs.setup("supervisor", config.log.level, config.log.format)
    setproctitle("kon-agent: supervisor")
    credentials.check(config.tls)
    supervisor = Supervisor(config, config_path)
    try:
        supervisor.open()
        return supervisor.run()
    finally:
        supervisor.close()


def _open_standard_streams() -> None:
    """Have something behind descriptors 0 to 2, or the next thing opened would be there, and every child has those."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


class Supervisor:
    """The process table and what it needs."""

    def __init__(self, config: Config, config_path: str | None) -> None:
        self.config = config
        self.config_path = config_path
        self.warnings: list[str] = []
        self.started_ns = clock.now_ns()
        self.meter = Meter()
        self.network = NetworkWatch(config.plugins.ebpf)
        self.units: dict[str, Unit] = {}
        self._phase = Phase.RUNNING
        self._selector = selectors.DefaultSelector()
        self._signal_fds = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._telemetry = SharedPage("kon-telemetry", telemetry.MAX_TELEMETRY_BYTES)
        self._measure_at_ns = self.started_ns + FIRST_MEASUREMENT_NS
        self._looked_ns = self.started_ns
        self._awake_since_ns = 0
        self._watched: dict[int, Supervised] = {}  # pid to the process whose pidfd the selector watches
        user = self._user()
        self._around = Surroundings(
            user=user,
            doorbell=self._doorbell,
            log=config.log,
            announce=lambda ring: self.courier.announce(ring),
            dismiss=lambda ring: self.courier.dismiss(ring),
            next_ring_number=itertools.count(1).__next__,
        )
        self.courier = Courier(config, Parts(user, self._doorbell, tuple(config.plugins.by_name()), self._rings))
        self._control: ControlServer | None = None

    def _user(self) -> privileges.User | None:
        if os.getuid() != 0:
            self.warn("started without root: the ebpf plugin is left out (it needs CAP_BPF, CAP_NET_ADMIN and "
                      "CAP_PERFMON) and all processes run as this user; start it with sudo to have both")  # fmt: skip
            return None
        if lacking := privileges.current_privileges().missing("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            raise PrivilegeError(f"{', '.join(lacking)} is missing: workers of another user could not be made or ended")
        user = privileges.resolve_user(self.config.user)
        if user.is_fallback:
            self.warn(f"user {self.config.user!r} does not exist: the workers run as {user.name!r}; create it with "
                      f"'useradd --system {self.config.user}' so that no other service shares their user")  # fmt: skip
        return user

    def warn(self, text: str) -> None:
        """Say once, and show in the status from now on, what does not work and why."""
        if text not in self.warnings:
            self.warnings.append(text)
            log.warning("%s", text)

    def open(self) -> None:
        """Take the control socket, load BPF, make the units; nothing is spawned yet.

        Raises:
            ConfigError: another agent is running, or the socket cannot be made.
            SpoolError: another agent uses the spool.
        """
        self._control = ControlServer(self.config.control, self._selector, Requests(self).handle)
        self.courier.claim_spool()
        self._open_network()
        for name, section in self.config.plugins.by_name().items():
            self.units[name] = Unit(name, BUILTIN[name], section, self._around, self._grants(name))
        self.units["ebpf"].obstacle = self.network.obstacle
        self._selector.register(self._signal_fds[0], selectors.EVENT_READ, lambda: None)
        signal.set_wakeup_fd(self._signal_fds[1])
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # the wakeup byte is the message

    def _open_network(self) -> None:
        if os.getuid() != 0 and not privileges.current_privileges().effective:
            self.network.obstacle = "needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
            return
        if not self.config.plugins.ebpf.enable:
            self.network.obstacle = "was disabled when the agent started; enabling it takes a restart of the agent"
            return
        self.network.open()
        if self.network.obstacle:
            self.warn(f"ebpf: {self.network.obstacle}")
        if self.network.monitor is not None:
            self._selector.register(self.network.monitor, selectors.EVENT_READ, self.network.on_change)

    def _grants(self, plugin: str) -> Grants:
        def telemetry_page() -> Mapping[str, memoryview]:
            return {"telemetry": self._telemetry.map_readonly()}

        return {"ebpf": self.network.grants, "agent": telemetry_page}.get(plugin, dict)

    def run(self) -> int:
        """Supervise until every process has ended."""
        prepare_to_fork()
        notify.notify("READY=1")
        log.info("agent %s runs, plugins: %s", self.config.client_id, ", ".join(self._enabled()))
        while self._phase is not Phase.DONE:
            now_ns = clock.now_ns()
            self._reap(now_ns)
            self._spawn_due(now_ns)
            self._look(now_ns)
            self._publish_telemetry(now_ns)
            self._serve_control(now_ns)
            self._advance_phase(now_ns)
            self._wait(now_ns)
            self._take_signals()
        log.info("stopped")
        return os.EX_OK

    def _enabled(self) -> list[str]:
        return [unit.plugin for unit in self.units.values() if unit.is_wanted and not unit.obstacle]

    def _wait(self, now_ns: int) -> None:
        if self._phase is Phase.DONE:
            return
        # One that has passed was served above, or cannot be yet (held back, unkillable): waiting for it would spin.
        deadlines = [due for process in self._processes() if (due := process.next_deadline_ns()) and due > now_ns]
        restless = any(
            process.lifecycle.state in (State.STARTING, State.HALF_OPEN, State.STOPPING)
            for process in self._processes()
        )
        timeout_s = STARTING_INTERVAL_S if restless else LOOK_INTERVAL_S
        if deadlines:
            timeout_s = min(timeout_s, max(0.0, (min(deadlines) - now_ns) / NS_PER_S))
        for key, _ in self._selector.select(timeout_s):
            key.data()

    def _take_signals(self) -> None:
        try:
            numbers = os.read(self._signal_fds[0], 1024)
        except BlockingIOError:
            return
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self.stop()
        if signal.SIGHUP in numbers:
            try:
                Requests(self).reload()
            except KonError as err:
                log.error("the reload changed nothing: %s", err)

    def stop(self) -> None:
        """Begin to end: workers first, then the sender once it has delivered, then everything else."""
        if self._phase is Phase.RUNNING:
            log.info("stopping")
            notify.notify("STOPPING=1")
            self._phase = Phase.STOPPING_WORKERS
            now_ns = clock.now_ns()
            for unit in self.units.values():
                unit.is_wanted = False
                unit.stop(now_ns)

    def _advance_phase(self, now_ns: int) -> None:
        if self._phase is Phase.STOPPING_WORKERS and not any(unit.child for unit in self.units.values()):
            self._phase = Phase.STOPPING_SENDER
            self.courier.is_wanted = False
            self.courier.stop(now_ns)
        if self._phase is Phase.STOPPING_SENDER and self.courier.child is None:
            self._phase = Phase.DONE

    def _processes(self) -> Iterator[Supervised]:
        yield from self.units.values()
        yield self.courier

    def _rings(self) -> list[SharedRing]:
        return [ring for unit in self.units.values() for ring in unit.rings()]

    def _reap(self, now_ns: int) -> None:
        for ended in reap():
            process = self._watched.pop(ended.pid, None)
            if process is None or process.child is None:
                continue  # somebody else's: left to us by whoever started us, or because we are process 1
            self._selector.unregister(process.child.pidfd)
            process.gone(ended, now_ns)

    def _spawn_due(self, now_ns: int) -> None:
        for process in self._processes():
            if process.is_due(now_ns) and (self._phase is Phase.RUNNING or process is self.courier):
                process.spawn(now_ns)
                if process.child is not None:
                    self._watched[process.child.pid] = process
                    self._selector.register(process.child.pidfd, selectors.EVENT_READ, lambda: None)

    def _look(self, now_ns: int) -> None:
        if now_ns - self._looked_ns > ASLEEP_NS:
            self._awake_since_ns = now_ns
        self._looked_ns = now_ns
        for process in self._processes():
            process.look(now_ns, self._awake_since_ns)
        for unit in self.units.values():
            unit.settle_rings(now_ns)

    def _serve_control(self, now_ns: int) -> None:
        if self._control is not None:
            self._control.tick(now_ns)

    def plugin_statuses(self, now_ns: int) -> list[PluginStatus]:
        """Return every plugin's status."""
        for _ in range(SNAPSHOT_ATTEMPTS):  # until nothing moved from the rings to the spool meanwhile
            report = self.courier.spool_report()
            units = zip(self.units.values(), report.plugins, strict=False)
            found = [status.plugin_status(unit, in_spool, now_ns) for unit, in_spool in units]
            if report == self.courier.spool_report():
                break
        return found

    def _publish_telemetry(self, now_ns: int) -> None:
        if now_ns < self._measure_at_ns:
            return
        self._measure_at_ns = now_ns + int(self.units["agent"].config.period * NS_PER_S)
        alive = [(process.name, process.pid) for process in self._processes() if process.pid is not None]
        self.meter.measure([("supervisor", os.getpid()), *alive], now_ns)
        plugins = self.plugin_statuses(now_ns)
        self._telemetry.writer.publish(
            telemetry.encode(
                telemetry.Telemetry(
                    uptime_s=(now_ns - self.started_ns) / NS_PER_S,
                    processes=self.meter.samples,
                    plugins=[status.plugin_sample(plugin) for plugin in plugins],
                    server_state=self.courier.report().state.name.lower(),
                )
            )
        )

    def close(self) -> None:
        """Detach BPF, remove the socket, release the memory; children are gone by now, or die with us."""
        signal.set_wakeup_fd(-1)
        self.network.close()
        if self._control is not None:
            self._control.close()
        for ring in self._rings():
            ring.release()
        self.courier.release()
        self._telemetry.release()
        self._selector.close()
        for fd in (*self._signal_fds, self._doorbell):
            os.close(fd)
