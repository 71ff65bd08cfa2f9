"""Going from one configuration to the next: only what differs is touched.

What was changed by command and not written into the file stays as long as the file says of that plugin what it said
before; where the file's section changes, the file wins.
"""

from __future__ import annotations

import msgspec

from kon_agent.config.schema import Config, EbpfConfig, PluginConfig
from kon_agent.control_protocol import Reload
from kon_agent.supervisor.supervision import Supervision
from kon_agent.supervisor.unit import Unit

SENDERS = ("server", "client_id", "tls", "batch", "cache", "shutdown_timeout")
"""Sections that the sender goes by: another one of them takes another sender. The rings stay."""


def apply(supervisor: Supervision, new: Config, now_ns: int) -> Reload:
    """Go on with the valid configuration `new`; return what that has touched."""
    old = supervisor.config
    changed = _apply_plugins(supervisor, old.plugins.by_name(), new.plugins.by_name(), now_ns)
    sections = [name for name in new.__struct_fields__ if name != "plugins"]
    changed += [name for name in sections if getattr(new, name) != getattr(old, name)]
    supervisor.go_by(new)
    _apply_to_sender(supervisor, new, now_ns)
    waiting = []
    for name, is_waiting in _waits_for_restart(supervisor.started_with, new).items():
        text = f"{name}: the change takes effect when the agent is restarted"
        if is_waiting:
            waiting.append(name)
            supervisor.warn(text)
        else:
            supervisor.withdraw(text)
    everything = [*(f"plugins.{name}" for name in supervisor.units), *sections]
    return Reload(changed=changed, unchanged=[name for name in everything if name not in changed], waiting=waiting)


def _apply_plugins(
    supervisor: Supervision, before: dict[str, PluginConfig], after: dict[str, PluginConfig], now_ns: int
) -> list[str]:
    changed = []
    for name in [name for name in before if name not in after]:
        changed.append(f"plugins.{name}")
        if name in supervisor.units:
            supervisor.remove_unit(name, now_ns)
    for name, section in after.items():
        known = before.get(name)
        if section == known:
            continue
        changed.append(f"plugins.{name}")
        if name in supervisor.units and known is not None and section.type == known.type:
            _reconfigure(supervisor, supervisor.units[name], section, now_ns)
            continue
        if name in supervisor.units:
            supervisor.remove_unit(name, now_ns)
        supervisor.add_unit(name, section)
    return changed


def _reconfigure(supervisor: Supervision, unit: Unit, section: PluginConfig, now_ns: int) -> None:
    if isinstance(section, EbpfConfig):
        supervisor.network.config = section
        supervisor.network.refresh()
    unit.reconfigure(section, now_ns)


def _apply_to_sender(supervisor: Supervision, new: Config, now_ns: int) -> None:
    """Give the sender what is its own; its spool stays where it is, whose folder was claimed at the start."""
    courier = supervisor.courier
    cache = msgspec.structs.replace(new.cache, path=courier.config.cache.path)
    usable = msgspec.structs.replace(new, cache=cache)
    if any(getattr(usable, name) != getattr(courier.config, name) for name in SENDERS):
        courier.reconfigure(usable, now_ns)
    else:
        courier.config = usable  # how it logs, from its next start


def _waits_for_restart(started_with: Config, new: Config) -> dict[str, bool]:
    """Return what is decided at the start, and whether the file says otherwise now."""
    return {
        "control": new.control != started_with.control,
        "user": new.user != started_with.user,
        "cache.path": new.cache.path != started_with.cache.path,
    }
