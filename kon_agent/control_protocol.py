"""The control socket's language: one request, one answer, both a line of JSON, on a unix stream socket.

    client ── {"op": "plugin_restart", "plugin": "cpu"}\\n ──────────────────────────────▶ supervisor
           ◀─ {"ok": true, "result": {…}}\\n                                          or
              {"ok": false, "error": {"code": "…", "message": "…", "hint": "…"}}\\n ──── (and closes)

What each operation answers with:

    status                                                    Status
    plugins_list                                              list[PluginStatus]
    plugin_info|enable|disable|restart|set_period|add|remove  PluginStatus, after the change
    reload                                                    Reload
    shutdown                                                  Stopping
    upgrade                                                   Upgraded, by the code that has taken over
    tap                                                       Tapping, and a descriptor for each ring it lists

Invariants: a connection carries one request; neither side reads beyond its bound; a reader ignores fields it
does not know, so that either side may be the newer one. Fields are only ever added. Shared by supervisor and
command line: nothing here touches a socket.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from kon_agent.errors import ControlError
from kon_agent.nearest import nearest

DEFAULT_SOCKET = "/run/kon-agent/control.sock"
SOCKET_ENV = "KON_AGENT_SOCKET"

MAX_REQUEST_BYTES = 64 * 1024
"""A request is a few words; this only stops a stranger from making the supervisor buffer without end."""

MAX_RESPONSE_BYTES = 4 * 1024 * 1024
"""A status takes about 1 KiB per plugin or interface: room for thousands, and a bound for whoever answers."""

UPGRADE_TIMEOUT_S = 600.0
"""An upgrade replaces one worker after the other, each at the right moment between its ticks: some 2 s each."""

TIMEOUT_S = 10.0
"""Longest exchange: a worker may take its deadline (5 s by default) to end; twice that on a busy host."""


class Op(enum.Enum):
    """What may be asked for."""

    STATUS = "status"
    PLUGINS_LIST = "plugins_list"
    PLUGIN_INFO = "plugin_info"
    PLUGIN_ENABLE = "plugin_enable"
    PLUGIN_DISABLE = "plugin_disable"
    PLUGIN_RESTART = "plugin_restart"
    PLUGIN_SET_PERIOD = "plugin_set_period"
    PLUGIN_ADD = "plugin_add"
    PLUGIN_REMOVE = "plugin_remove"
    RELOAD = "reload"
    SHUTDOWN = "shutdown"
    UPGRADE = "upgrade"
    TAP = "tap"


READ_ONLY = frozenset({Op.STATUS, Op.PLUGINS_LIST, Op.PLUGIN_INFO})
"""What anyone who reaches the socket may ask; the rest is for root and the socket's group."""

NEEDS_PLUGIN = frozenset(op for op in Op if op.value.startswith("plugin_"))
"""What is about one plugin."""


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request.

    Attributes:
        op: the operation.
        plugin: the plugin it is about; given exactly where `op` is in NEEDS_PLUGIN.
        persist: write the change into the configuration file as well; where that fails, nothing changes.
        period: the new period as the configuration writes it (`500ms`), for PLUGIN_SET_PERIOD.
        settings: the new plugin's section, key to value, each value on one line as the configuration writes it, for
            PLUGIN_ADD.
    """

    op: Op
    plugin: str | None = None
    persist: bool = False
    period: str | None = None
    settings: dict[str, str] = {}


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The receiver as the sender sees it.

    Attributes:
        address: the `quic://host:port` in use or being tried.
        state: the connection's state, one word.
        since: when it entered that state, RFC 3339.
        rtt_ms: smoothed round trip time; None while not connected.
        detail: why it is not connected; empty when there is nothing to say.
    """

    address: str
    state: str
    since: str
    rtt_ms: float | None = None
    detail: str = ""


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """One death of a worker: when (RFC 3339), and of what, in words (`killed by SIGKILL`)."""

    when: str
    reason: str


class PluginStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One plugin: its process, and every term of the conservation law (DESIGN.md §2).

    Attributes:
        state: the lifecycle's state by name (`RUNNING`).
        last_exit: the latest death in words (`killed by SIGKILL`, `exit 70: ImportError: …`); None: none.
        breaker: `closed`, `open` or `half_open`.
        recovered: records of earlier runs found in the spool at the start; they are part of `produced`.
        dropped: records lost by reason.
        collect_ms: how long the latest cycle took.
        missed_ticks: cycles skipped because the one before was late.
        detail: why it is not running well; may be empty.
        type: the plugin this is an instance of; mostly its own name.
        origin: `built-in`, or where its code comes from.
        period_s: seconds between its cycles, as things are; `configured_period_s` as its section has it.
        priority: 0 to 100; what is paused first where the agent exceeds its limits.
        memory_limit_bytes: memory of its own at which its worker is replaced.
        rate_per_s: records a second, lately; None while that is unknown.
        deaths: the latest ones, the oldest first.
    """

    name: str
    state: str
    enabled: bool
    pid: int | None = None
    period_s: float
    restarts: int = 0
    last_exit: str | None = None
    breaker: str = "closed"
    produced: int = 0
    recovered: int = 0
    acked: int = 0
    in_flight: int = 0
    in_ring: int = 0
    spooled: int = 0
    dropped: dict[str, int] = {}
    ring_used_bytes: int = 0
    ring_size_bytes: int = 0
    collect_ms: float | None = None
    missed_ticks: int = 0
    uptime_s: float | None = None
    detail: str = ""
    type: str = ""
    origin: str = ""
    configured_period_s: float | None = None
    priority: int | None = None
    memory_limit_bytes: int | None = None
    rate_per_s: float | None = None
    deaths: list[Death] = []


class SpoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The disk spool.

    Attributes:
        bytes, segments: what its files take on disk, and how many there are.
        records: how many records it holds.
        oldest_age_s: seconds since its oldest segment was written; None while it is empty.
        mode: `idle`, `spooling`, `waiting`, `draining`, or `memory` where the disk cannot be used.
        detail: why it cannot; empty where it can.
    """

    bytes: int = 0
    max_bytes: int = 0
    segments: int = 0
    records: int = 0
    oldest_age_s: float | None = None
    mode: str = "idle"
    detail: str = ""


class StepStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the governor.

    Attributes:
        at: when, RFC 3339.
        step: `stretch`, `relax`, `pause` or `resume`.
        plugin: who was paused or resumed; None where it is about all periods.
        factor: of the periods since then.
        reason: why.
    """

    at: str
    step: str
    plugin: str | None = None
    factor: int = 1
    reason: str = ""


class ResourceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole process tree: percent of one core, proportional set size, and the governor's level.

    Attributes:
        cpu_percent: over the last ten seconds.
        level: `normal`, `stretch_2`, `stretch_4` or `paused`.
        cpu_limit_percent, memory_limit_bytes: the limits; 0 where a supervisor does not tell.
        detail: what is done, or cannot be done, about the limits; empty when there is nothing to say.
        steps: the latest steps, the oldest first.
    """

    cpu_percent: float = 0.0
    pss_bytes: int = 0
    level: str = "normal"
    cpu_limit_percent: float = 0.0
    memory_limit_bytes: int = 0
    detail: str = ""
    steps: list[StepStatus] = []


class InterfaceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How one network interface is watched, each way, and why not better where it is not the best mode."""

    name: str
    ingress_mode: str
    ingress_reason: str = ""
    egress_mode: str
    egress_reason: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Everything: what `status --json` prints."""

    agent_id: str
    version: str
    pid: int
    uptime_s: float
    server: ServerStatus
    plugins: list[PluginStatus]
    spool: SpoolStatus
    resources: ResourceStatus
    interfaces: list[InterfaceStatus] = []
    warnings: list[str] = []


class Reload(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload touched and what it left running, by configuration section or `plugins.NAME`.

    Attributes:
        waiting: what of the file takes effect when the agent is restarted, and differs from what it was started with.
    """

    changed: list[str]
    unchanged: list[str]
    waiting: list[str] = []


class Stopping(msgspec.Struct, frozen=True, kw_only=True):
    """The agent has begun to stop."""

    stopping: bool = True


class Upgraded(msgspec.Struct, frozen=True, kw_only=True):
    """The installed code has taken over.

    Attributes:
        before, after: the versions.
        pid: the supervisor's, which stays.
        replaced: the plugins whose workers run the new code now.
        missed_ticks: ticks nobody was there to keep, by plugin; those that missed none are left out.
        troubled: plugins that do not run since, and why.
        counters: what has become of the BPF programs: `kept` (they stayed attached), `anew`, or `none`.
        took_s: seconds from the moment the new code took over.
    """

    before: str
    after: str
    pid: int
    replaced: list[str] = []
    missed_ticks: dict[str, int] = {}
    troubled: dict[str, str] = {}
    counters: str = "none"
    took_s: float = 0.0


class RingPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A ring whose records can be read as they pass; `epoch` tells it from every other ring."""

    number: int
    plugin: str
    epoch: int
    size_bytes: int


class Tapping(msgspec.Struct, frozen=True, kw_only=True):
    """The rings there are now.

    Their descriptors ride along with the answer's first byte (SCM_RIGHTS, unix(7)), one each and in this order: the
    producers' areas, opened read-only. They are the receiver's to close.
    """

    agent_id: str
    rings: list[RingPlace]


Result = Status | PluginStatus | Reload | Stopping | Upgraded | Tapping | list[PluginStatus]
"""What an answer may carry."""

T = TypeVar("T")


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request failed: a stable word, a sentence, and what to do next (may be empty)."""

    code: str
    message: str
    hint: str = ""


class _Success(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool = True
    result: Result


class _Failure(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool = False
    error: ErrorBody


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool
    result: msgspec.Raw = msgspec.Raw()
    error: ErrorBody | None = None


def encode_request(request: Request) -> bytes:
    """Return the request as its line.

    Raises:
        ControlError: `bad_request`; it holds bytes of a command line that are no text.
    """
    try:
        return msgspec.json.encode(request) + b"\n"
    except UnicodeEncodeError as err:
        raise ControlError("bad_request", f"{err.object!a} is no UTF-8 text; write it as such") from err


def decode_request(line: bytes) -> Request:
    """Return the request a line holds.

    Raises:
        ControlError: `bad_request`; the line is too long, is no JSON, or asks for what does not exist.
    """
    if len(line) > MAX_REQUEST_BYTES:
        raise ControlError("bad_request", f"the request is longer than {MAX_REQUEST_BYTES} bytes")
    try:
        request = msgspec.json.decode(line, type=Request)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        hint = "the operations are " + ", ".join(op.value for op in Op)
        raise ControlError("bad_request", f"not a control request: {err}", hint) from err
    if request.op in NEEDS_PLUGIN and not request.plugin:
        raise ControlError("bad_request", f"{request.op.value} needs the field 'plugin'")
    if request.op is Op.PLUGIN_SET_PERIOD and not request.period:
        raise ControlError("bad_request", f"{request.op.value} needs the field 'period', for instance \"5s\"")
    return request


def encode_result(result: Result) -> bytes:
    """Return the line that answers a request that succeeded."""
    return msgspec.json.encode(_Success(result=result), enc_hook=_plain) + b"\n"


def _plain(value: object) -> object:
    """Return a number of a kind of its own, such as the configuration's sizes and durations, as the number it is."""
    return int(value) if isinstance(value, int) else float(value) if isinstance(value, float) else str(value)


def encode_error(error: ControlError) -> bytes:
    """Return the line that answers a request that failed."""
    body = ErrorBody(code=error.code, message=str(error), hint=error.hint)
    return msgspec.json.encode(_Failure(error=body)) + b"\n"


def decode_response(line: bytes, result: type[T]) -> T:
    """Return the result an answer carries.

    Raises:
        ControlError: the error it carries, or `bad_reply` when it is no answer, or not of type `result`.
    """
    try:
        answer = msgspec.json.decode(line, type=_Answer)
        if answer.ok:
            return msgspec.json.decode(answer.result, type=result)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise ControlError("bad_reply", f"the answer makes no sense: {err}") from err
    if answer.error is None:
        raise ControlError("bad_reply", "the answer makes no sense: neither a result nor an error")
    raise ControlError(answer.error.code, answer.error.message, answer.error.hint)


def unknown_plugin(name: str, known: Iterable[str]) -> ControlError:
    """Return the error for a plugin that does not exist, with the nearest of those that do."""
    names = sorted(known)
    near = nearest(name, names)
    hint = f"did you mean '{near}'?" if near else "the plugins are " + ", ".join(names)
    return ControlError("unknown_plugin", f"there is no plugin '{name}'", hint)
