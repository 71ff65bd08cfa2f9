"""A trial: one collection of one plugin, here and now, without a daemon, worker or ring.

Runs a built-in collector in this process with this process's rights: an operator sees what it sees. A plugin that is
not built in has the rights its worker would have, and no others.
What the supervisor would grant a plugin is made here for the moment, and gone when `collect` returns.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from kon_agent import clock
from kon_agent.bpf import interfaces, layout
from kon_agent.bpf.origin import Origin
from kon_agent.bpf.probes import PROBES
from kon_agent.catalog import Catalog
from kon_agent.config.naming import canonical
from kon_agent.config.schema import Config, EbpfConfig, ExecConfig, FlowsConfig, ForeignConfig
from kon_agent.config.section import parse_section
from kon_agent.control_protocol import unknown_plugin
from kon_agent.errors import BpfError, ControlError, NoData, PluginError
from kon_agent.examination import examine, source_of
from kon_agent.inquiry import Question, ask, children_user
from kon_agent.metric import Metric
from kon_agent.page import PageWriter, page_size
from kon_agent.plugins import BUILTIN, loading
from kon_agent.plugins.context import Context
from kon_agent.plugins.events import EventRun

INTERVAL_S = 0.5
"""Between the two collections of a trial: a rate needs two readings, and a person will wait this long."""

LISTENING_S = 2.0
"""How long an event-style plugin is listened to."""

TRIAL_DEADLINE_S = 30.0
"""After which a plugin that does not come to an end is taken for hung: a program may take a while."""

MAX_OUTCOME_BYTES = 4 * 1024 * 1024


def collect(name: str, config: Config) -> list[Metric]:
    """Return what plugin `name` collects in its second cycle, `INTERVAL_S` after its first.

    Of one that is not built in, or runs a program, that happens in a child with the rights of its worker, and an
    event-style one is listened to for `LISTENING_S`.

    Raises:
        ControlError: there is no such plugin, or it needs the running agent.
        ConfigError: it is not configured, and cannot be without.
        PluginError: its code cannot be used, or fails.
        PrivilegeError: it needs root.
        BpfError: its BPF object cannot be loaded or attached.
        NoData: the kernel offers it nothing here.
    """
    section = config.plugins.by_name().get(name)
    if section is None:
        catalog = Catalog(config.plugin_dir)
        if catalog.find(name) is None:
            raise unknown_plugin(name, [*config.plugins.by_name(), *catalog.names()])
        section = parse_section(name, {}, config, examine)
    if isinstance(section, ForeignConfig | ExecConfig):
        return _collect_apart(name, section, config.user)
    with _grants(name, config) as grants:
        module, _, attribute = BUILTIN[canonical(section.type or name)].partition(":")
        collector = getattr(importlib.import_module(module), attribute)(section, Context(grants=grants))
        getattr(collector, "start", _nothing)()
        try:
            return _second_cycle(collector)
        finally:
            getattr(collector, "stop", _nothing)()


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What the child of a trial is given: a section, its plugin's code where that is a file, where to answer."""

    section: ForeignConfig | ExecConfig
    source: bytes
    answer_fd: int


class Outcome(msgspec.Struct, frozen=True):
    """What it answers: metrics, or why there are none."""

    metrics: list[Metric] = []
    no_data: str = ""
    failure: str = ""


def rehearse(rehearsal: Rehearsal) -> int:
    """Collect in the child, after the drop of every privilege; return the process's exit code."""
    os.dup2(2, 1)  # what a plugin prints is no metric
    try:
        outcome = Outcome(_perform(rehearsal))
    except NoData as reason:
        outcome = Outcome(no_data=str(reason) or "no reason is given")
    except PluginError as err:
        outcome = Outcome(failure=str(err))
    except Exception as err:
        traceback.print_exc()
        outcome = Outcome(failure=loading.words_of(err))
    data = msgspec.msgpack.encode(outcome)
    while data:
        data = data[os.write(rehearsal.answer_fd, data) :]
    return os.EX_OK


def _perform(rehearsal: Rehearsal) -> list[Metric]:
    section = rehearsal.section
    if isinstance(section, ForeignConfig):
        collector = loading.make(section, rehearsal.source, Context())
    else:
        module, _, attribute = BUILTIN["exec"].partition(":")
        collector = getattr(importlib.import_module(module), attribute)(section, Context())
    getattr(collector, "start", _nothing)()
    try:
        return _listen(collector, section.period) if hasattr(collector, "run") else _second_cycle(collector)
    finally:
        getattr(collector, "stop", _nothing)()


def _listen(collector: Any, period_s: float) -> list[Metric]:
    """Return what an event-style collector emits within `LISTENING_S`."""
    emitted: list[Metric] = []
    events = EventRun(lambda: collector.run(lambda metric: emitted.append(_stamped(metric))))
    ends_s, is_ready = time.monotonic() + LISTENING_S, False
    try:
        while (left_s := ends_s - time.monotonic()) > 0:
            wish = events.resume(is_ready)
            sources = [] if wish.fd is None else [wish.fd]
            wait_s = min(left_s, period_s if wish.seconds is None else wish.seconds)
            is_ready = bool(select.select(sources, (), (), wait_s)[0])
    finally:
        events.close()
    return emitted


def _collect_apart(name: str, section: ForeignConfig | ExecConfig, user: str) -> list[Metric]:
    from kon_agent.supervisor.profiles import profile_for  # a worker's rights are its to say

    if isinstance(section, ForeignConfig) and section.obstacle:
        raise PluginError(f"{name} cannot be used: {section.obstacle}")

    def prepare(answer_fd: int) -> Rehearsal:
        source = source_of(section.origin) if isinstance(section, ForeignConfig) else b""
        return Rehearsal(section, source, answer_fd)

    question = Question(f"kon-agent: tries {name}", "kon_agent.cli.trial:rehearse", prepare, profile_for(section))
    (reply,) = ask([question], children_user(user), TRIAL_DEADLINE_S, MAX_OUTCOME_BYTES)
    if reply.failure:
        raise PluginError(f"{name}: {reply.failure}")
    try:
        outcome = msgspec.msgpack.decode(reply.data, type=Outcome)
    except msgspec.MsgspecError as err:
        raise PluginError(f"{name}: its answer makes no sense: {err}") from err
    if outcome.failure:
        raise PluginError(f"{name}: {outcome.failure}")
    if outcome.no_data:
        raise NoData(outcome.no_data)
    return outcome.metrics


def _second_cycle(collector: Any) -> list[Metric]:
    with contextlib.suppress(NoData):  # a first reading may have nothing to compare with
        list(collector.collect())
    time.sleep(INTERVAL_S)
    return [_stamped(metric) for metric in collector.collect()]


def _stamped(metric: Metric) -> Metric:
    return msgspec.structs.replace(metric, value=float(metric.value), ts_ns=metric.ts_ns or clock.wall_ns())


@contextlib.contextmanager
def _grants(name: str, config: Config) -> Iterator[Mapping[str, memoryview]]:
    """Yield what the supervisor would hand to the plugin."""
    if name == "agent":
        raise ControlError(
            "needs_agent",
            "the plugin 'agent' reports on a running agent; a trial runs without one",
            "see 'kon-agent status', or its stored records with 'kon-receiver query --plugin agent'",
        )
    with contextlib.ExitStack() as stack:
        try:
            grants = _measuring(name, config, stack)
        except BpfError as err:
            from kon_agent.supervisor.instruments import story_of

            print(f"{name}: reads procfs instead of BPF: {story_of(err)}", file=sys.stderr)
            grants = Origin.without_bpf(story_of(err)).grant()
        yield grants


def _measuring(name: str, config: Config, stack: contextlib.ExitStack) -> Mapping[str, memoryview]:
    """Return what BPF programs count from now on, until `stack` is closed."""
    if name in PROBES:
        from kon_agent.bpf.probe import Probe

        probe = Probe.load(PROBES[name], config.plugins.by_name()[name])
        stack.callback(probe.close)
        return probe.grants()
    if name in ("ebpf", "flows"):
        return _counting(config.plugins.ebpf, config.plugins.flows if name == "flows" else None, stack)
    return {}


def _counting(config: EbpfConfig, flows: FlowsConfig | None, stack: contextlib.ExitStack) -> Mapping[str, memoryview]:
    """Count the packets of the chosen interfaces, and their flows."""
    from kon_agent.bpf.flowcount import FlowCount
    from kon_agent.bpf.net import NetCounters

    counters = NetCounters.load()
    stack.callback(counters.close)
    counters.restrict(config.generic)
    tables: dict[str, memoryview] = {}
    if flows is not None:
        count = FlowCount.load(counters.shared_maps, int(flows.memory))
        stack.callback(count.close)
        counters.run(count.substitutes)
        tables = {"flows": count.map_table()}
    for interface in interfaces.choose(interfaces.scan(), config.interfaces, config.exclude):
        counters.attach(interface.ifindex, interface.name)
    page = memoryview(bytearray(page_size(layout.TABLE_BYTES)))
    PageWriter(page).publish(counters.table())
    return {"counters": counters.counters(), "interfaces": page.toreadonly(), **tables, **Origin("bpf").grant()}


def _nothing() -> None:
    """Stand in for a `start` or `stop` a collector does not have."""
