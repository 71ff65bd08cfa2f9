"""What the control socket can ask of the supervisor, one method per operation.

Deciding and answering only: the process table belongs to `main`, what is asked for happens in its loop.
"""

from __future__ import annotations

import os

from kon_agent import __version__, clock, credentials
from kon_agent.clock import NS_PER_S
from kon_agent.config import rules
from kon_agent.config.edit import Addition, Change, Removal, Setting, with_plugin
from kon_agent.config.load import load
from kon_agent.config.naming import is_same
from kon_agent.config.persist import persist
from kon_agent.config.schema import BUILTIN_SECTIONS, MAX_PLUGINS, PluginConfig
from kon_agent.config.section import parse_section
from kon_agent.config.units import parse_duration
from kon_agent.control_protocol import (
    Op,
    PluginStatus,
    Reload,
    Request,
    Result,
    RingPlace,
    Status,
    Stopping,
    Tapping,
    unknown_plugin,
)
from kon_agent.errors import ConfigError, ControlError
from kon_agent.examination import examine
from kon_agent.lifecycle import State
from kon_agent.supervisor import reload, status
from kon_agent.supervisor.control import Pending, WithFds
from kon_agent.supervisor.supervision import Supervision
from kon_agent.supervisor.unit import Unit

MAX_TAPPED_RINGS = 250
"""The kernel passes no more than 253 descriptors at once (SCM_MAX_FD, linux/net/scm.h)."""


class Requests:
    """The operations.

    Args:
        supervisor: whose.
    """

    def __init__(self, supervisor: Supervision) -> None:
        self._supervisor = supervisor

    def handle(self, request: Request) -> Result | Pending | WithFds:
        """Carry out one request.

        Raises:
            ControlError: it cannot be carried out.
        """
        match request.op:
            case Op.STATUS:
                return self.status()
            case Op.PLUGINS_LIST:
                return self.status().plugins
            case Op.RELOAD:
                return self.reload()
            case Op.SHUTDOWN:
                self._supervisor.stop()
                return Stopping()
            case Op.UPGRADE:
                return self._supervisor.upgrade()
            case Op.TAP:
                return self._tap(request.plugin)
            case Op.PLUGIN_ADD:
                return self._add(request.plugin or "", request.settings, request.persist)
        unit = self._unit(request.plugin or "")
        match request.op:
            case Op.PLUGIN_ENABLE:
                return self._enable(unit, request.persist)
            case Op.PLUGIN_DISABLE:
                return self._disable(unit, request.persist)
            case Op.PLUGIN_RESTART:
                return self._restart(unit)
            case Op.PLUGIN_SET_PERIOD:
                return self._set_period(unit, request.period or "", request.persist)
            case Op.PLUGIN_REMOVE:
                return self._remove(unit, request.persist)
        return self._plugin(unit)

    def _tap(self, plugin: str | None) -> WithFds:
        """Hand out the rings of one plugin, or of all; the latest where there are too many."""
        units = [self._unit(plugin)] if plugin else list(self._supervisor.units.values())
        rings = sorted((ring for unit in units for ring in unit.rings()), key=lambda ring: ring.number)
        rings = rings[-MAX_TAPPED_RINGS:]
        places = [
            RingPlace(number=ring.number, plugin=ring.plugin, epoch=ring.epoch, size_bytes=int(ring.size_bytes))
            for ring in rings
        ]
        answer = Tapping(agent_id=self._supervisor.config.client_id, rings=places)
        return WithFds(answer, tuple(ring.tap_fd for ring in rings))

    def _plugin(self, unit: Unit) -> PluginStatus:
        statuses = self._supervisor.plugin_statuses(clock.now_ns())
        return next(plugin for plugin in statuses if plugin.name == unit.plugin)

    def _unit(self, name: str) -> Unit:
        unit = self._supervisor.units.get(name)
        if unit is None:
            raise unknown_plugin(name, self._supervisor.units)
        return unit

    def _enable(self, unit: Unit, is_kept: bool) -> Pending:
        if unit.obstacle:
            raise ControlError("unavailable", f"{unit.plugin} cannot run: {unit.obstacle}")
        if is_kept:
            self._keep(Setting(unit.plugin, "enable", True))
        unit.lifecycle.forgive()
        if unit.lifecycle.state in (State.BACKOFF, State.FAILED):
            unit.restart(clock.now_ns())
        unit.is_wanted = True
        return lambda: self._once(unit, unit.child is not None and unit.lifecycle.state is not State.STOPPING)

    def _disable(self, unit: Unit, is_kept: bool) -> Pending:
        if is_kept:
            self._keep(Setting(unit.plugin, "enable", False))
        unit.is_wanted = False
        unit.stop(clock.now_ns())
        return lambda: self._once(unit, unit.child is None, is_to_run=False)

    def _restart(self, unit: Unit) -> Pending:
        if not unit.is_wanted:
            raise ControlError("disabled", f"{unit.plugin} is disabled", f"kon-agent plugins enable {unit.plugin}")
        if unit.obstacle:
            raise ControlError("unavailable", f"{unit.plugin} cannot run: {unit.obstacle}")
        old_pid = unit.pid
        unit.restart(clock.now_ns())
        return lambda: self._once(unit, unit.pid not in (None, old_pid))

    def _set_period(self, unit: Unit, text: str, is_kept: bool) -> PluginStatus:
        try:
            period = parse_duration(text)
        except ValueError as err:
            raise ControlError("bad_value", f"period: {err}") from err
        if what := rules.complaint(type(unit.config), "period", period):
            raise ControlError("bad_value", f"period: {what}")
        if is_kept:
            self._keep(Setting(unit.plugin, "period", period))
        unit.set_period(float(period))
        return self._plugin(unit)

    def _add(self, name: str, settings: dict[str, str], is_kept: bool) -> Pending:
        supervisor = self._supervisor
        if there := next((known for known in supervisor.units if is_same(known, name)), None):
            raise ControlError("exists", f"there is a plugin '{there}' already", f"kon-agent plugins enable {there}")
        if len(supervisor.units) >= MAX_PLUGINS:
            raise ControlError("full", f"there are {MAX_PLUGINS} plugins, which is the most", "remove one first")
        if supervisor.slots.is_full and name not in supervisor.slots.names:
            raise ControlError(
                "full", "too many names of plugins have come and gone", "restart the agent, or reuse one"
            )
        try:
            section = parse_section(name, settings, supervisor.config, examine)
            addition = Addition(name, parse_section(name, settings, supervisor.config), settings)
        except ConfigError as err:
            raise ControlError("bad_value", str(err)) from err
        if is_kept:
            self._keep(addition, section)
        supervisor.add_unit(name, section)
        unit = supervisor.units[name]
        return lambda: self._once(unit, unit.child is not None or not unit.is_wanted or bool(unit.obstacle))

    def _remove(self, unit: Unit, is_kept: bool) -> Pending:
        supervisor, name = self._supervisor, unit.plugin
        if name in BUILTIN_SECTIONS:
            raise ControlError("built_in", f"'{name}' is built in and stays", f"kon-agent plugins disable {name}")
        if is_kept:
            self._keep(Removal(name))
        supervisor.remove_unit(name, clock.now_ns())

        def answer() -> PluginStatus | None:
            if unit.child is not None:
                return None
            in_spool = supervisor.courier.spool_report().plugins[supervisor.slots.of(name)]
            return status.plugin_status(unit, in_spool, clock.now_ns())

        return answer

    def _keep(self, change: Change, section: PluginConfig | None = None) -> None:
        """Write a change into the file, and take note of it as if the file had been loaded with it.

        Args:
            section: of an addition, as loading would make it.
        """
        supervisor = self._supervisor
        if supervisor.config_path is None:
            hint = "start the agent with -c FILE, or leave --persist out"
            raise ControlError("no_config", "the agent runs with built-in defaults: there is no file to write to", hint)
        plugins = supervisor.config.plugins.by_name()
        if isinstance(change, Setting) and plugins.get(change.plugin) not in (None, self._unit(change.plugin).config):
            why = f"a command has put another plugin in the place of the file's '{change.plugin}'"
            raise ControlError("not_persisted", why, "edit the file by hand, or leave --persist out")
        try:
            persist(supervisor.config_path, change)
        except ConfigError as err:
            raise ControlError("not_persisted", str(err), "nothing has been changed, neither there nor here") from err
        if isinstance(change, Addition):
            supervisor.go_by(with_plugin(supervisor.config, change.plugin, section))
        elif isinstance(change, Removal):
            supervisor.go_by(with_plugin(supervisor.config, change.plugin, None))
        elif change.plugin in plugins:
            supervisor.go_by(change.applied(supervisor.config))
            self._supervisor.units[change.plugin].config = supervisor.config.plugins.by_name()[change.plugin]

    def _once(self, unit: Unit, is_done: bool, *, is_to_run: bool = True) -> PluginStatus | None:
        """Return the plugin's state once what was asked for is done.

        Raises:
            ControlError: it never will be: another command, or a reload, wanted otherwise meanwhile.
        """
        if self._supervisor.units.get(unit.plugin) is not unit:
            raise ControlError("overtaken", f"{unit.plugin} has been removed meanwhile")
        if not is_done and unit.is_wanted is not is_to_run:
            raise ControlError("overtaken", f"{unit.plugin} has been {_switched(unit.is_wanted)} meanwhile")
        # A plugin that dies at once is an answer too: its state says so.
        is_done = is_done or (unit.is_wanted and unit.lifecycle.state in (State.BACKOFF, State.FAILED))
        return self._plugin(unit) if is_done or unit.is_held_back or unit.pause_reason else None

    def status(self) -> Status:
        """Return everything."""
        supervisor, now_ns = self._supervisor, clock.now_ns()
        return Status(
            agent_id=supervisor.config.client_id,
            version=__version__,
            pid=os.getpid(),
            uptime_s=(now_ns - supervisor.started_ns) / NS_PER_S,
            server=status.server_status(supervisor.courier.report(), supervisor.config.servers()[0]),
            plugins=supervisor.plugin_statuses(now_ns),
            spool=status.spool_status(
                supervisor.courier.spool_report(), int(supervisor.config.cache.max_size), clock.wall_ns() / NS_PER_S
            ),
            resources=supervisor.regulation.status(now_ns),
            interfaces=status.interface_status(supervisor.network.attachments()),
            warnings=list(supervisor.warnings),
        )

    def reload(self) -> Reload:
        """Read the configuration again and apply what changed; an invalid file changes nothing.

        Raises:
            ConfigError: the file is invalid; the message holds every mistake.
            ControlError: the agent runs without a file.
        """
        supervisor = self._supervisor
        if supervisor.config_path is None:
            raise ControlError("no_config", "the agent runs with built-in defaults: there is no file to reload")
        new = load(supervisor.config_path, examine)
        credentials.check(new.tls)
        return reload.apply(supervisor, new, clock.now_ns())


def _switched(is_on: bool) -> str:
    return "enabled" if is_on else "disabled"
