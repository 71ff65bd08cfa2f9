"""What the control operations need of the supervisor: a seam, so that they can be tried without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kon_agent.config.schema import Config, PluginConfig
from kon_agent.control_protocol import PluginStatus
from kon_agent.spoolreport import Slots
from kon_agent.supervisor.courier import Courier
from kon_agent.supervisor.network import NetworkWatch
from kon_agent.supervisor.regulation import Regulation
from kon_agent.supervisor.unit import Unit


class Supervision(Protocol):
    """The supervisor's process table, and the few verbs that change it."""

    config: Config
    config_path: str | None
    started_with: Config
    warnings: list[str]
    started_ns: int
    units: dict[str, Unit]
    slots: Slots
    courier: Courier
    network: NetworkWatch
    regulation: Regulation

    def warn(self, text: str) -> None:
        """Say once, and show in the status from now on."""

    def withdraw(self, text: str) -> None:
        """Take a warning back."""

    def go_by(self, config: Config) -> None:
        """Go by another configuration in what is the supervisor's own."""

    def stop(self) -> None:
        """Begin to end."""

    def upgrade(self) -> Callable[[], None]:
        """Let the installed code take over; return the question how that goes."""

    def add_unit(self, name: str, section: PluginConfig) -> None:
        """Take a plugin in."""

    def remove_unit(self, name: str, now_ns: int) -> None:
        """Let a plugin go."""

    def plugin_statuses(self, now_ns: int) -> list[PluginStatus]:
        """Return every plugin's status."""
