"""What the control socket can ask of the supervisor, one method per operation.

Deciding and answering only: the process table belongs to `main`, what is asked for happens in its loop.
"""

from __future__ import annotations

import os
from typing import Protocol

from kon_agent import __version__, clock, credentials
from kon_agent.clock import NS_PER_S
from kon_agent.config.load import load
from kon_agent.config.schema import Config
from kon_agent.control_protocol import (
    Op,
    PluginStatus,
    Reload,
    Request,
    ResourceStatus,
    Result,
    Status,
    Stopping,
    unknown_plugin,
)
from kon_agent.errors import ControlError
from kon_agent.lifecycle import State
from kon_agent.supervisor import status
from kon_agent.supervisor.control import Pending
from kon_agent.supervisor.courier import Courier
from kon_agent.supervisor.meter import Meter
from kon_agent.supervisor.network import NetworkWatch
from kon_agent.supervisor.unit import Unit

_NEEDS_RESTART = ("cache", "control", "user", "limits", "log")
"""Sections that decide how the supervisor itself is set up."""


class Supervision(Protocol):
    """What the operations need of the supervisor: its process table, and the few verbs that change it."""

    config: Config
    config_path: str | None
    warnings: list[str]
    started_ns: int
    units: dict[str, Unit]
    courier: Courier
    network: NetworkWatch
    meter: Meter

    def warn(self, text: str) -> None:
        """Say once, and show in the status from now on."""

    def stop(self) -> None:
        """Begin to end."""

    def plugin_statuses(self, now_ns: int) -> list[PluginStatus]:
        """Return every plugin's status."""


class Requests:
    """The operations.

    Args:
        supervisor: whose.
    """

    def __init__(self, supervisor: Supervision) -> None:
        self._supervisor = supervisor

    def handle(self, request: Request) -> Result | Pending:
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
            case Op.PLUGIN_SET_PERIOD:
                raise ControlError("unsupported", "a plugin's period changes with its configuration", "edit and reload")
        unit = self._unit(request.plugin or "")
        if request.persist:
            raise ControlError("unsupported", "the configuration file is not edited from here", "edit it and reload")
        match request.op:
            case Op.PLUGIN_ENABLE:
                return self._enable(unit)
            case Op.PLUGIN_DISABLE:
                return self._disable(unit)
            case Op.PLUGIN_RESTART:
                return self._restart(unit)
        return self._plugin(unit)

    def _plugin(self, unit: Unit) -> PluginStatus:
        statuses = self._supervisor.plugin_statuses(clock.now_ns())
        return next(plugin for plugin in statuses if plugin.name == unit.plugin)

    def _unit(self, name: str) -> Unit:
        unit = self._supervisor.units.get(name)
        if unit is None:
            raise unknown_plugin(name, self._supervisor.units)
        return unit

    def _enable(self, unit: Unit) -> Pending:
        if unit.obstacle:
            raise ControlError("unavailable", f"{unit.plugin} cannot run: {unit.obstacle}")
        if unit.lifecycle.state in (State.BACKOFF, State.FAILED):
            unit.restart(clock.now_ns())
        unit.is_wanted = True
        return lambda: self._once(unit, unit.child is not None and unit.lifecycle.state is not State.STOPPING)

    def _disable(self, unit: Unit) -> Pending:
        unit.is_wanted = False
        unit.stop(clock.now_ns())
        return lambda: self._once(unit, unit.child is None)

    def _restart(self, unit: Unit) -> Pending:
        if not unit.is_wanted:
            raise ControlError("disabled", f"{unit.plugin} is disabled", f"kon-agent plugins enable {unit.plugin}")
        if unit.obstacle:
            raise ControlError("unavailable", f"{unit.plugin} cannot run: {unit.obstacle}")
        old_pid = unit.pid
        unit.restart(clock.now_ns())
        return lambda: self._once(unit, unit.pid not in (None, old_pid))

    def _once(self, unit: Unit, is_done: bool) -> PluginStatus | None:
        # A plugin that dies at once is an answer too: its state says so.
        is_done = is_done or (unit.is_wanted and unit.lifecycle.state in (State.BACKOFF, State.FAILED))
        return self._plugin(unit) if is_done or unit.is_held_back else None

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
            resources=ResourceStatus(cpu_percent=supervisor.meter.cpu_percent, pss_bytes=supervisor.meter.pss_bytes),
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
        new = load(supervisor.config_path)
        credentials.check(new.tls)
        return self._apply(new)

    def _apply(self, new: Config) -> Reload:
        supervisor, now_ns = self._supervisor, clock.now_ns()
        old, supervisor.config = supervisor.config, new
        changed: list[str] = []
        for name, section in new.plugins.by_name().items():
            if section != getattr(old.plugins, name):
                changed.append(f"plugins.{name}")
                self._reconfigure(supervisor.units[name], now_ns)
        sections = [name for name in new.__struct_fields__ if name != "plugins"]
        differing = [name for name in sections if getattr(new, name) != getattr(old, name)]
        for name in set(differing).intersection(_NEEDS_RESTART):
            supervisor.warn(f"{name}: the change takes effect when the agent is restarted")
        if set(differing).difference(_NEEDS_RESTART):
            supervisor.courier.reconfigure(new, now_ns)
        everything = [*(f"plugins.{name}" for name in supervisor.units), *sections]
        changed += differing
        return Reload(changed=changed, unchanged=[name for name in everything if name not in changed])

    def _reconfigure(self, unit: Unit, now_ns: int) -> None:
        section = getattr(self._supervisor.config.plugins, unit.plugin)
        unit.config, unit.is_wanted = section, section.enable
        if unit.plugin == "ebpf":
            self._supervisor.network.config = section
            self._supervisor.network.refresh()
        unit.restart(now_ns)
