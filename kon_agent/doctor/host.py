"""What the agent needs of the machine besides its kernel: its files, its users, room on the disk, limits, the clock."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kon_agent import __version__
from kon_agent.config.load import check as check_file
from kon_agent.config.schema import CacheConfig
from kon_agent.control_protocol import Status
from kon_agent.doctor.finding import Finding, fail, ok, size, split, warn
from kon_agent.doctor.patient import Patient
from kon_agent.errors import ControlError, KonError, PrivilegeError
from kon_agent.examination import examine
from kon_agent.linux import clockstate, privileges, procfs
from kon_agent.linux.clockstate import ClockState
from kon_agent.linux.privileges import User
from kon_agent.spool import lock
from kon_agent.spool.place import folder_path

MAX_SOCKET_BYTES = 107  # unix(7): sun_path, less its end
SECRETS = ("key", "token_file")  # of the section `tls`


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file or folder: its owner and mode; `problem` says why it cannot be had."""

    path: str
    uid: int = 0
    mode: int = 0
    is_readable: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SpoolFacts:
    """Where the spool is or will be.

    Attributes:
        path: its folder.
        owner: of the folder; None: it is not there yet.
        holder: pid of who has its lock; None: nobody, 0: not known who.
        holder_parent: the parent of that process.
        is_readonly, free_bytes: of the filesystem.
        can_be_made: whether a folder that is not there can be made, or one that is there be written, by this process.
        problem: why nothing of this can be told.
    """

    path: str
    owner: int | None = None
    holder: int | None = None
    holder_parent: int = 0
    is_readonly: bool = False
    free_bytes: int = 0
    can_be_made: bool = True
    problem: str = ""


def judge_agent(
    status: Status | None, silence: ControlError | None, socket: str, kind: str, client_id: str | None
) -> Finding:
    """Return whether an agent runs, and whether it is this one.

    Args:
        status: what it says; None: nothing.
        silence: why.
        socket: the control socket's path.
        kind: what is there: `socket`, `nothing`, or `other`.
        client_id: who the configuration says it is; None: it says nothing.
    """
    if status is not None:
        return _judge_running(status, client_id)
    if len(os.fsencode(socket)) > MAX_SOCKET_BYTES:
        advice = f"set control.socket to one of at most {MAX_SOCKET_BYTES} bytes"
        return fail("agent", f"{socket} is too long a path for a unix socket", advice)
    if kind == "other":
        advice = "remove it, or set control.socket to another path"
        return fail("agent", f"{socket} exists and is no socket: no agent can listen there", advice)
    code = silence.code if silence else "not_running"
    if code == "not_running":
        left = "; a dead one has left its socket, which the next replaces" if kind == "socket" else ""
        return ok("agent", f"none runs: nobody answers on {socket}{left}", "start it: `kon-agent run`")
    hint = (silence.hint if silence else "") or "look at its log"
    return (warn if code == "permission_denied" else fail)("agent", str(silence), hint)


def _judge_running(status: Status, client_id: str | None) -> Finding:
    found = f"{status.agent_id} runs, version {status.version}, pid {status.pid}"
    down = [plugin.name for plugin in status.plugins if plugin.enabled and plugin.state in ("FAILED", "BACKOFF")]
    if client_id is not None and status.agent_id != client_id:
        advice = "give the agent of this file a control.socket of its own, or restart it if the file is newer"
        return fail("agent", f"{found}; the configuration is of {client_id}", advice)
    if down:
        return fail("agent", f"{found}; does not run: {', '.join(down)}", "`kon-agent plugins info NAME` says why")
    if status.version != __version__:
        return warn("agent", f"{found}; installed is {__version__}", "`kon-agent upgrade`")
    if status.warnings:
        more = f" (and {len(status.warnings) - 1} more)" if len(status.warnings) > 1 else ""
        return warn("agent", f"{found}; it warns: {status.warnings[0]}{more}", "`kon-agent status` has them all")
    return ok("agent", found)


def judge_socket(folder: FileFacts, is_writable: bool, is_telling: bool) -> Finding:
    """Return whether an agent can make its control socket.

    Args:
        folder: where, or the nearest one above that is there.
        is_writable: whether this process can make files in it.
        is_telling: whether it may what the agent may.
    """
    mode = stat.S_IMODE(folder.mode)
    if folder.problem:
        return fail("socket", f"{folder.path}: {folder.problem}", "choose another control.socket")
    if not is_writable:
        advice = "set control.socket to a folder that the agent's user can write, or run it as root"
        return (fail if is_telling else warn)("socket", f"{folder.path} cannot be written by this user", advice)
    if mode & 0o002 and not mode & stat.S_ISVTX:
        found = f"{folder.path} has mode {mode:04o}: any user can put another socket in the place of the agent's"
        return warn("socket", found, f"chmod o-w {folder.path}, or choose another control.socket")
    return ok("socket", f"can be made in {folder.path}")


def judge_configuration(path: str | None, mistakes: Sequence[str]) -> Finding:
    """Return whether the configuration is valid; `path` None: there is no file."""
    if path is None:
        return ok("configuration", "there is no file: the built-in defaults apply", "start from etc/agent.yaml")
    if not mistakes:
        return ok("configuration", f"{path} is valid")
    count = f"{len(mistakes)} mistakes, the first: " if len(mistakes) > 1 else ""
    advice = f"`kon-agent check -c {path}` lists all; the checks of this report go by the built-in defaults"
    return fail("configuration", f"{count}{mistakes[0]}", advice)


def judge_credential(key: str, facts: FileFacts, is_telling: bool) -> Finding:
    """Return whether a file of the section `tls` can be read by the agent, and a secret one by nobody else.

    Args:
        key: which.
        facts: of the file.
        is_telling: whether this process may read what the agent may.
    """
    check = f"file:tls.{key}"
    if facts.problem:
        return fail(check, f"{facts.path}: {facts.problem}", "correct the path, or put the file there")
    if not facts.is_readable:
        if not is_telling:
            advice = "run `kon-agent doctor` as root"
            return warn(check, f"{facts.path} cannot be read by this user; the agent may be able to", advice)
        return fail(check, f"{facts.path} cannot be read", "correct its permissions")
    mode = stat.S_IMODE(facts.mode)
    found = f"{facts.path} has mode {mode:04o}"
    if key in SECRETS and mode & 0o007:
        return fail(check, f"{found}: any user can use this secret", f"chmod 0600 {facts.path}")
    if key in SECRETS and mode & 0o070:
        return warn(check, f"{found}: its group can use this secret", f"chmod 0600 {facts.path}, unless that is meant")
    if mode & 0o002:
        return fail(check, f"{found}: any user decides whom the agent trusts", f"chmod go-w {facts.path}")
    return ok(check, f"{facts.path}, mode {mode:04o}")


def judge_user(name: str, found: User | None, problem: str, group: str, has_group: bool) -> Finding:
    """Return whether there is the user that workers become, and the group that may change things."""
    if found is None:
        return fail("user", *split(problem))
    if found.is_fallback:
        found_text = f"user {name!r} does not exist: workers run as {found.name!r}, as other services may"
        return warn("user", found_text, f"useradd --system {name}, or systemd-sysusers")
    who = f"workers and sender run as {found.name} (uid {found.uid})"
    if not has_group:
        return ok("user", f"{who}; there is no group {group!r}: only root may change things")
    return ok("user", f"{who}; root and the group {group} may change things")


def judge_spool(facts: SpoolFacts, cache: CacheConfig, own_uid: int, worker_uid: int, agent_pid: int | None) -> Finding:
    """Return whether the spool can be used.

    Args:
        facts: of its folder.
        cache: how much room it wants.
        own_uid: this process's user; only root can tell what an agent of root's can do.
        worker_uid: the sender's.
        agent_pid: the running agent's; None: none is known.
    """
    path, free = facts.path, facts.free_bytes
    if facts.problem:
        advice = "choose another cache.path; or run `kon-agent doctor` as root, if it is closed to this user"
        return warn("spool", f"{path}: {facts.problem}", advice)
    if facts.owner is not None and facts.owner not in (0, own_uid, worker_uid):
        found = f"{path} belongs to uid {facts.owner}, not to the sender (uid {worker_uid})"
        return fail("spool", found, "remove it, or choose another cache.path")
    if facts.is_readonly:
        return fail("spool", f"{path} is on a read-only filesystem", "remount it, or choose another cache.path")
    if not facts.can_be_made:
        advice = "run `kon-agent doctor` as root; for an agent without root choose another cache.path"
        return warn("spool", f"{path} cannot be written by this user", advice)
    if facts.holder is not None and agent_pid not in (facts.holder, facts.holder_parent):
        return fail(
            "spool",
            f"{path} is in use by pid {facts.holder or 'unknown'}, which is not the agent asked here",
            "stop that agent, or choose another cache.path; --socket names its control socket",
        )
    room = f"{path}: {size(free)} free"
    if free < cache.min_free:
        found = f"{room}, less than cache.min_free ({size(cache.min_free)}): nothing is stored"
        return fail("spool", found, "make room on that disk")
    if free < cache.min_free + cache.max_size:
        found = f"{room}: too little for a full spool ({size(cache.max_size)}) and cache.min_free"
        return warn("spool", found, "make room, or lower cache.max_size")
    made = "" if facts.owner is not None else "; the agent will make it"
    return ok("spool", f"{room}, {size(cache.max_size)} of it for us at most{made}")


def judge_clock(state: ClockState | None, problem: str) -> Finding:
    """Return whether something keeps the wall clock on time."""
    if state is None:
        return warn(
            "clock", f"the kernel does not tell: {problem}", "allow adjtimex in the sandbox around this process"
        )
    if not state.is_synchronized:
        found = "no time service keeps it on time: records are marked, and certificates may seem not valid"
        return warn("clock", found, "run chronyd, systemd-timesyncd or another time service")
    return ok("clock", f"synchronized, off by {state.max_error_s * 1000:.0f} ms at most")


# The checks.


def check_agent(patient: Patient) -> Iterable[Finding]:
    """Look for a running agent."""
    client_id = patient.config.client_id if patient.config_path and patient.is_valid else None
    yield judge_agent(patient.status, patient.silence, patient.socket, _kind(patient.socket), client_id)


def check_socket(patient: Patient) -> Iterable[Finding]:
    """Look at where the control socket is to be made, unless somebody holds it."""
    has_answered = patient.silence is None or patient.silence.code != "not_running"
    if not has_answered and _kind(patient.socket) != "other":
        place = _nearest(os.path.dirname(os.path.abspath(patient.socket)))
        facts = _read_file(place)
        if not facts.problem and not stat.S_ISDIR(facts.mode):
            facts = FileFacts(place, problem="it is no folder")
        yield judge_socket(facts, os.access(place, os.W_OK | os.X_OK), patient.stands_for_agent)


def check_configuration(patient: Patient) -> Iterable[Finding]:
    """Validate the configuration, with the help of plugins that are not built in."""
    try:
        mistakes = [] if patient.config_path is None else check_file(patient.config_path, examine)[1]
    except KonError as err:
        yield fail("configuration", *split(f"{patient.config_path}: {err}"))
        return
    yield judge_configuration(patient.config_path, [str(mistake) for mistake in mistakes])


def check_credentials(patient: Patient) -> Iterable[Finding]:
    """Look at the files of the section `tls`."""
    for key in ("ca", "cert", "key", "token_file"):
        path = getattr(patient.config.tls, key)
        if path is not None:
            yield judge_credential(key, _read_file(path), patient.stands_for_agent)


def check_user(patient: Patient) -> Iterable[Finding]:
    """Look for the workers' user and the control group."""
    config = patient.config
    try:
        found, problem = privileges.resolve_user(config.user), ""
    except PrivilegeError as err:
        found, problem = None, str(err)
    yield judge_user(config.user, found, problem, config.control.group, _has_group(config.control.group))


def check_spool(patient: Patient) -> Iterable[Finding]:
    """Look at the spool's folder and its disk."""
    try:
        worker_uid = privileges.resolve_user(patient.config.user).uid if patient.stands_for_agent else os.geteuid()
    except PrivilegeError:
        worker_uid = os.geteuid()  # `user` says it
    facts = _read_spool(folder_path(patient.config.cache.path))
    yield judge_spool(facts, patient.config.cache, os.geteuid(), worker_uid, patient.agent_pid)


def check_clock(patient: Patient) -> Iterable[Finding]:
    """Look at the wall clock's discipline."""
    try:
        yield judge_clock(clockstate.read_clock_state(), "")
    except OSError as err:
        yield judge_clock(None, str(err))


def _kind(path: str) -> str:
    try:
        return "socket" if stat.S_ISSOCK(os.stat(path).st_mode) else "other"
    except OSError:
        return "nothing"


def _has_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _read_file(path: str) -> FileFacts:
    try:
        info = os.stat(path)
    except PermissionError:
        return FileFacts(path)
    except OSError as err:
        return FileFacts(path, problem=err.strerror or str(err))
    return FileFacts(path, info.st_uid, info.st_mode, os.access(path, os.R_OK))


def _read_spool(path: str) -> SpoolFacts:
    """Look at the spool's folder, or at the nearest one above it that is there."""
    place = _nearest(path)
    if not os.path.isdir(place):
        return SpoolFacts(path, problem=f"{place} is no folder")
    try:
        info, disk = os.stat(place), os.statvfs(place)
        is_there = place == path
        holder = _holder(path) if is_there else None
    except PermissionError as err:
        return SpoolFacts(path, problem=f"cannot be looked at ({err.strerror})")
    except OSError as err:
        return SpoolFacts(path, problem=err.strerror or str(err))
    return SpoolFacts(
        path=path,
        owner=info.st_uid if is_there else None,
        holder=holder,
        holder_parent=_parent(holder) if holder else 0,
        is_readonly=bool(disk.f_flag & os.ST_RDONLY),
        free_bytes=disk.f_bavail * disk.f_frsize,
        can_be_made=os.access(place, os.W_OK),
    )


def _nearest(path: str) -> str:
    """Return `path`, or what is there of the way to it."""
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def _holder(path: str) -> int | None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return lock.holder(fd)
    finally:
        os.close(fd)


def _parent(pid: int) -> int:
    try:
        return int(procfs.read_status(pid).get("PPid", "0"))
    except OSError:
        return 0
