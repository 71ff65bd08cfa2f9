"""A trial: one collection of one plugin, here and now, without a daemon, worker or ring.

Runs the collector in this process with this process's rights: its author, or an operator, sees what it sees.
What the supervisor would grant a plugin is made here for the moment, and gone when `collect` returns.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from kon_agent import clock
from kon_agent.bpf import interfaces, layout
from kon_agent.config.schema import Config, EbpfConfig
from kon_agent.control_protocol import unknown_plugin
from kon_agent.errors import BpfError, ControlError, NoData, PrivilegeError
from kon_agent.metric import Metric
from kon_agent.page import PageWriter, page_size
from kon_agent.plugins import BUILTIN
from kon_agent.plugins.context import Context

INTERVAL_S = 0.5
"""Between the two collections of a trial: a rate needs two readings, and a person will wait this long."""


def collect(name: str, config: Config) -> list[Metric]:
    """Return what plugin `name` collects in its second cycle, `INTERVAL_S` after its first.

    Raises:
        ControlError: there is no such plugin, or it needs the running agent.
        PrivilegeError: it needs root.
        BpfError: its BPF object cannot be loaded or attached.
        NoData: the kernel offers it nothing here.
    """
    if name not in BUILTIN:
        raise unknown_plugin(name, BUILTIN)
    with _grants(name, config) as grants:
        module, _, attribute = BUILTIN[name].partition(":")
        collector = getattr(importlib.import_module(module), attribute)(
            config.plugins.by_name()[name], Context(grants=grants)
        )
        getattr(collector, "start", _nothing)()
        try:
            return _second_cycle(collector)
        finally:
            getattr(collector, "stop", _nothing)()


def _second_cycle(collector: Any) -> list[Metric]:
    with contextlib.suppress(NoData):  # a first reading may have nothing to compare with
        list(collector.collect())
    time.sleep(INTERVAL_S)
    now_ns = clock.wall_ns()
    return [metric if metric.ts_ns else msgspec.structs.replace(metric, ts_ns=now_ns) for metric in collector.collect()]


@contextlib.contextmanager
def _grants(name: str, config: Config) -> Iterator[Mapping[str, memoryview]]:
    """Yield what the supervisor would hand to the plugin."""
    if name == "agent":
        raise ControlError(
            "needs_agent",
            "the plugin 'agent' reports on a running agent; a trial runs without one",
            "see 'kon-agent status', or its stored records with 'kon-receiver query --plugin agent'",
        )
    if name == "ebpf":
        with _counting(config.plugins.ebpf) as grants:
            yield grants
    else:
        yield {}


@contextlib.contextmanager
def _counting(config: EbpfConfig) -> Iterator[Mapping[str, memoryview]]:
    """Count the packets of the chosen interfaces for as long as the context is open."""
    from kon_agent.bpf.net import NetCounters

    chosen = interfaces.choose(interfaces.scan(), config.interfaces, config.exclude)
    if not chosen:
        raise NoData("no interface that is up matches plugins.ebpf.interfaces")
    try:
        counters = NetCounters.load()
    except BpfError as err:
        if err.errno == errno.EPERM:
            raise PrivilegeError("loading a BPF program needs root; use sudo") from err
        raise
    try:
        attached = [counters.attach(interface.ifindex, interface.name) for interface in chosen]
        if all(interface.slot < 0 for interface in attached):
            reasons = "; ".join(f"{interface.name}: {interface.ingress_reason}" for interface in attached)
            raise BpfError(f"no interface can be counted: {reasons}")
        page = memoryview(bytearray(page_size(layout.TABLE_BYTES)))
        PageWriter(page).publish(counters.table())
        yield {"counters": counters.counters(), "interfaces": page.toreadonly()}
    finally:
        counters.close()


def _nothing() -> None:
    """Stand in for a `start` or `stop` a collector does not have."""
