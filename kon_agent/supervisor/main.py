"""The supervisor's loop: everything that is privileged, in one thread around one selector.

Owns the BPF objects, the rings, the process table and the control socket. Reads nothing a child wrote but range-checked
words and texts it only shows. A signal handler writes one byte; the loop does the rest.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import logging
import os
import selectors
import signal
from collections.abc import Callable, Iterator

from kon_agent import __version__, clock, logs, telemetry
from kon_agent.bpf.handover import Counters
from kon_agent.bpf.probes import PROBES
from kon_agent.clock import NS_PER_S
from kon_agent.config.naming import canonical
from kon_agent.config.schema import Config, ForeignConfig, PluginConfig
from kon_agent.control_protocol import PluginStatus
from kon_agent.errors import ControlError, KonError, PrivilegeError
from kon_agent.lifecycle import State
from kon_agent.linux import notify, privileges
from kon_agent.plugins import BUILTIN
from kon_agent.process import prepare_to_fork, reap
from kon_agent.spoolreport import Slots
from kon_agent.supervisor import handover, status
from kon_agent.supervisor import preload as _preload  # noqa: F401 - for its pages
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.control import ControlServer
from kon_agent.supervisor.courier import Courier, Parts
from kon_agent.supervisor.instruments import Instrument, Published, Tracing
from kon_agent.supervisor.network import Counting, Flowing, NetworkWatch
from kon_agent.supervisor.regulation import Regulation, own_group
from kon_agent.supervisor.renewal import Renewal
from kon_agent.supervisor.requests import Requests
from kon_agent.supervisor.sharedpage import SharedPage
from kon_agent.supervisor.sharedring import SharedRing
from kon_agent.supervisor.unit import Surroundings, Unit
from kon_agent.supervisor.upgrade import Succession

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0  # how often heartbeats are looked at when nothing else happens
STARTING_INTERVAL_S = 0.1  # while something starts or stops, somebody is waiting to see it
FIRST_MEASUREMENT_NS = 900_000_000  # just before the agent plugin's first tick, and so before all that follow
SNAPSHOT_ATTEMPTS = 5  # the spool's figures change a few times a second: the first one usually does
ASLEEP_NS = 3 * NS_PER_S  # the loop looks once a second: a longer gap is a suspended machine, or all of us stopped
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR2)


class Phase(enum.Enum):
    """How far the supervisor's own end has come."""

    RUNNING = "running"
    STOPPING_WORKERS = "stopping workers"
    STOPPING_SENDER = "stopping the sender"
    DONE = "done"


class Supervisor:
    """The process table and what it needs."""

    def __init__(self, config: Config, config_path: str | None, taken: handover.Handover | None = None) -> None:
        self.config = self.started_with = config
        self.config_path = config_path
        self.warnings: list[str] = []
        self._taken = taken
        self._kept = handover.kept_settings(config)
        self._succession = Succession(self, _SIGNALS)
        self.started_ns = taken.started_ns if taken else clock.now_ns()
        self.regulation = Regulation(config.limits, clock.now_ns(), own_group())
        self.units: dict[str, Unit] = {}
        self.slots = Slots([*(taken.slots if taken else ()), *config.plugins.by_name()])
        self._leaving: list[Unit] = []  # removed, and not gone yet
        self._phase = Phase.RUNNING
        self._selector = selectors.DefaultSelector()
        self.network = NetworkWatch(config.plugins.ebpf, self, self._selector, self._instruments)
        self._signal_fds = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._telemetry = SharedPage("kon-telemetry", telemetry.MAX_TELEMETRY_BYTES)
        self._measure_at_ns = clock.now_ns() + FIRST_MEASUREMENT_NS
        self._looked_ns = clock.now_ns()
        self._awake_since_ns = 0
        self._watched: dict[int, Supervised] = {}  # pid to the process whose pidfd the selector watches
        user = self._user()
        self._around = Surroundings(
            user=user,
            doorbell=self._doorbell,
            log=config.log,
            announce=lambda ring: self.courier.announce(ring),
            dismiss=lambda ring: self.courier.dismiss(ring),
            next_ring_number=itertools.count(taken.next_ring if taken else 1).__next__,
        )
        self.courier = Courier(config, Parts(user, self._doorbell, self.slots, self._rings))
        self._control: ControlServer | None = None

    def _user(self) -> privileges.User | None:
        if os.getuid() != 0:
            self.warn("started without root: all processes run as this user, and what needs CAP_BPF, CAP_NET_ADMIN and "
                      "CAP_PERFMON is read from procfs; start it with sudo to have both")  # fmt: skip
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

    def withdraw(self, text: str) -> None:
        """Take a warning back: what it was about is over."""
        if text in self.warnings:
            self.warnings.remove(text)

    def go_by(self, config: Config) -> None:
        """Go by another configuration in what is the supervisor's own; children log by it from their next start."""
        if config.log != self.config.log:
            logs.setup("supervisor", config.log.level, config.log.format)
            self._around = dataclasses.replace(self._around, log=config.log)
            for unit in self.units.values():
                unit.log = config.log
        if config.limits != self.config.limits:
            self.regulation.set_limits(config.limits)
        self.config = config

    def open(self) -> None:
        """Take the control socket, load BPF, make the units; nothing is spawned yet.

        Raises:
            ConfigError: another agent is running, or the socket cannot be made.
            SpoolError: another agent uses the spool.
        """
        taken = self._taken
        listener_fd = taken.listener_fd if taken else None
        self._control = ControlServer(self.config.control, self._selector, Requests(self).handle, listener_fd)
        if taken is None:
            self.courier.claim_spool()
        if taken is not None and taken.counters is not None:
            self._take_over_network(taken.counters)
        for name, section in self.config.plugins.by_name().items():
            self.add_unit(name, section)
        if taken is not None:
            self._adopt(taken, self._control)
        self._selector.register(self._signal_fds[0], selectors.EVENT_READ, lambda: None)
        signal.set_wakeup_fd(self._signal_fds[1])
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # the wakeup byte is the message
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # who has handed over to us had blocked them

    def _adopt(self, taken: handover.Handover, control: ControlServer) -> None:
        """Go on with the processes and rings that are there; those who run the old code are replaced by and by."""
        now_ns = clock.now_ns()
        os.dup2(taken.doorbell_fd, self._doorbell, inheritable=False)
        os.close(taken.doorbell_fd)
        for plugin in taken.plugins:
            unit = self.units.get(plugin.name)
            if unit is not None and plugin.kind == (unit.config.type or plugin.name):
                unit.adopt(plugin)
                if not unit.is_wanted:
                    unit.stop(now_ns)
            else:
                self._see_off(plugin, now_ns)
        for plugin in taken.leaving:
            self._see_off(plugin, now_ns)
        self.courier.adopt(taken.sender)
        for process in self._processes():
            self._watch(process)
        renewal = Renewal(taken, self.courier, self.units, self.network.inheritance, now_ns)
        if taken.asking_fd is not None:
            control.adopt(taken.asking_fd, renewal.outcome)
        for connection in taken.connections:
            control.go_on(connection)
        self._succession.go_on(renewal)
        log.info("upgrade: kon-agent %s has taken over from %s", __version__, taken.version)
        self._taken = None

    def _see_off(self, plugin: handover.Plugin, now_ns: int) -> None:
        """Take a plugin over that is configured no longer, or as another one, and let it go."""
        unit = Unit(plugin.name, "", PluginConfig(enable=False), self._around)
        unit.adopt(plugin)
        unit.is_wanted = False
        unit.stop(now_ns)
        self._leaving.append(unit)

    def is_asked_for_nothing_but(self, question: Callable[[], None]) -> bool:
        """Whether no control connection waits for anything but the answer to `question`."""
        return self._control is None or self._control.is_quiet(question)

    def capture(self, question: Callable[[], None] | None) -> handover.Handover:
        """Return what the code that takes our place is given.

        Args:
            question: whose answer it shall give, if somebody waits for it.
        """
        assert self._control is not None
        return handover.Handover(
            format=handover.FORMAT,
            version=__version__,
            started_ns=self.started_ns,
            next_ring=self._around.next_ring_number(),
            doorbell_fd=self._doorbell,
            listener_fd=self._control.fileno(),
            asking_fd=self._control.asking(question) if question else None,
            connections=self._control.capture(),
            slots=list(self.slots.names),
            plugins=[unit.capture() for unit in self.units.values()],
            leaving=[unit.capture() for unit in self._leaving],
            sender=self.courier.capture(),
            counters=self.network.capture(),
            kept=self._kept,
        )

    def upgrade(self) -> Callable[[], None]:
        """Let the installed code take over, if it can; return the question how that goes.

        Raises:
            ControlError: there is an upgrade under way, the agent is about to stop, or it cannot be tried.
        """
        return self._succession.begin(clock.now_ns())

    @property
    def is_ending(self) -> bool:
        """Whether the agent is about to stop."""
        return self._phase is not Phase.RUNNING

    def add_unit(self, name: str, section: PluginConfig) -> None:
        """Take a plugin in; it runs if its section says so."""
        self.slots.give(name)
        kind = canonical(section.type or name)
        target = section.origin.target if isinstance(section, ForeignConfig) else BUILTIN[kind]
        unit = self.units[name] = Unit(name, target, section, self._around, self._instrument(kind))
        if unit.obstacle:
            log.warning("%s is left out: %s", name, unit.obstacle)

    def remove_unit(self, name: str, now_ns: int) -> None:
        """Let a plugin go: it is forgotten once its worker has ended and its rings are drained."""
        unit = self.units.pop(name)
        unit.is_wanted = False
        unit.stop(now_ns)
        self._leaving.append(unit)

    def _forget_the_left(self) -> None:
        for unit in [unit for unit in self._leaving if unit.child is None and not unit.rings()]:
            self._leaving.remove(unit)
            unit.release()

    def _take_over_network(self, taken: Counters) -> None:
        sections = self.config.plugins.by_name()
        if plugins := [name for name in ("ebpf", "flows") if sections[name].enable]:
            self.network.take_over(taken, plugins)
        else:
            taken.discard()

    def _instruments(self) -> list[Instrument]:
        return [unit.instrument for unit in self._all_units()]

    def _instrument(self, plugin: str) -> Instrument:
        if plugin in PROBES:
            return Tracing(plugin, PROBES[plugin], self)
        if plugin == "ebpf":
            return Counting(self.network)
        if plugin == "flows":
            return Flowing(self.network, self)
        if plugin == "agent":
            return Published("telemetry", self._telemetry)
        return Instrument()

    def run(self) -> int:
        """Supervise until every process has ended."""
        prepare_to_fork()
        notify.notify("READY=1")
        log.info("agent %s runs, plugins: %s", self.config.client_id, ", ".join(self._enabled()))
        while self._phase is not Phase.DONE:
            now_ns = clock.now_ns()
            self._reap(now_ns)
            self._spawn_due(now_ns)
            now_ns = clock.now_ns()  # what a plugin needs of the kernel takes a while to load; its worker beats by now
            self._look(now_ns)
            self.network.tick(now_ns)
            self.regulation.tick(self.units, self._leaving, self.courier, now_ns)
            self._publish_telemetry(now_ns)
            self._serve_control(now_ns)
            self._succession.advance(now_ns)
            self._advance_phase(now_ns)
            self._wait(now_ns)
            self.take_signals()
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
        timeout_s = min(STARTING_INTERVAL_S if restless else LOOK_INTERVAL_S, self._succession.interval_s)
        if self.regulation.due_ns > now_ns:
            deadlines.append(self.regulation.due_ns)
        deadlines.append(self.network.due_ns)
        if deadlines:
            timeout_s = min(timeout_s, max(0.0, (min(deadlines) - now_ns) / NS_PER_S))
        for key, _ in self._selector.select(timeout_s):
            key.data()

    def take_signals(self) -> None:
        """Do what the signals that have come ask for."""
        try:
            numbers = os.read(self._signal_fds[0], 1024)
        except BlockingIOError:
            return
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self.stop()
        if signal.SIGHUP in numbers:
            try:
                Requests(self).reload()
            except (KonError, OSError) as err:
                log.error("the reload changed nothing: %s", err)
        if signal.SIGUSR2 in numbers:
            try:
                self.upgrade()
            except ControlError as err:
                log.error("the upgrade is refused: %s", err)

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
        if self._phase is Phase.STOPPING_WORKERS and not any(unit.child for unit in self._all_units()):
            self._phase = Phase.STOPPING_SENDER
            self.courier.is_wanted = False
            self.courier.stop(now_ns)
        if self._phase is Phase.STOPPING_SENDER and self.courier.child is None:
            self._phase = Phase.DONE

    def _all_units(self) -> list[Unit]:
        return [*self.units.values(), *self._leaving]

    def _processes(self) -> Iterator[Supervised]:
        yield from self._all_units()
        yield self.courier

    def _rings(self) -> list[SharedRing]:
        return [ring for unit in self._all_units() for ring in unit.rings()]

    def _reap(self, now_ns: int) -> None:
        for ended in reap(self._watched):
            process = self._watched.pop(ended.pid, None)
            if process is None or process.child is None:
                self._succession.gone(ended, now_ns)
                continue  # somebody else's: left to us by whoever started us, or because we are process 1
            self._selector.unregister(process.child.pidfd)
            process.gone(ended, now_ns)

    def _spawn_due(self, now_ns: int) -> None:
        for process in self._processes():
            if process.is_due(now_ns) and (self._phase is Phase.RUNNING or process is self.courier):
                process.spawn(now_ns)
                self._watch(process)

    def _watch(self, process: Supervised) -> None:
        if process.child is not None:
            self._watched[process.child.pid] = process
            self._selector.register(process.child.pidfd, selectors.EVENT_READ, lambda: None)

    def _look(self, now_ns: int) -> None:
        if now_ns - self._looked_ns > ASLEEP_NS:
            self._awake_since_ns = now_ns
        self._looked_ns = now_ns
        for process in self._processes():
            process.look(now_ns, self._awake_since_ns)
        for unit in self._all_units():
            unit.settle_rings(now_ns)
        self._forget_the_left()

    def _serve_control(self, now_ns: int) -> None:
        if self._control is not None:
            self._control.tick(now_ns)

    def plugin_statuses(self, now_ns: int) -> list[PluginStatus]:
        """Return every plugin's status."""
        for _ in range(SNAPSHOT_ATTEMPTS):  # until nothing moved from the rings to the spool meanwhile
            report = self.courier.spool_report()
            found = [
                status.plugin_status(unit, report.plugins[self.slots.of(name)], now_ns)
                for name, unit in self.units.items()
            ]
            if report == self.courier.spool_report():
                break
        return found

    def _publish_telemetry(self, now_ns: int) -> None:
        if now_ns < self._measure_at_ns:
            return
        self._measure_at_ns = now_ns + int(self.units["agent"].period_s * NS_PER_S)
        plugins = self.plugin_statuses(now_ns)
        self._telemetry.writer.publish(
            telemetry.encode(
                telemetry.Telemetry(
                    uptime_s=(now_ns - self.started_ns) / NS_PER_S,
                    processes=self.regulation.meter.samples,
                    plugins=[status.plugin_sample(plugin) for plugin in plugins if plugin.enabled or plugin.produced],
                    server_state=self.courier.report().state.name.lower(),
                    governor=self.regulation.sample(),
                )
            )
        )

    def close(self) -> None:
        """Detach BPF, remove the socket, release the memory; children are gone by now, or die with us."""
        signal.set_wakeup_fd(-1)
        self.network.close()
        if self._control is not None:
            self._control.close()
        for unit in self._all_units():
            unit.release()
        self.courier.release()
        self._telemetry.release()
        self._selector.close()
        for fd in (*self._signal_fds, self._doorbell):
            os.close(fd)
