"""A child process: forked, stripped of every privilege, and only then given code to run. The only `os.fork`.

    supervisor ── spawn(role, argument) ─▶ fork ─▶ title, signals, descriptors, limits
                                                ─▶ user, capabilities, parent check, no_new_privs
                                                ─▶ Landlock, seccomp ─▶ verify
                                                ─▶ import role.body ─▶ body(argument)

Invariants:
* The body's module is imported after the drop has been verified, so no code of a plugin or of a network
  library ever runs with a privilege.
* A child never returns into its parent's stack: it leaves by `os._exit`, whatever happens.
* A child holds standard streams, the descriptors its role names, and, where its user cannot reach the Python
  code by name, O_PATH descriptors of those folders. Nothing else.
* Privilege only shrinks; where a step that matters fails, the child ends with `PrivilegeError.exit_code`.

Started without root, the user and the bounding set stay as they are and everything else is done all the same.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import setproctitle

from kon_agent import importpath
from kon_agent.errors import KonError, PrivilegeError
from kon_agent.linux import landlock, privileges, seccomp
from kon_agent.linux.executable import needed_to_run
from kon_agent.linux.pidfd import PidFd
from kon_agent.linux.privileges import User
from kon_agent.linux.tasks import count_tasks

WORKER_NOFILE = 64  # a collector reads one file at a time; the rest is head room for imports
CRASH_EXIT = os.EX_SOFTWARE  # 70: the body raised; the traceback is on stderr

# What any Python program reads: the kernel's files, configuration, shared libraries, time zones.
SYSTEM_READ = (
    *("/proc", "/sys", "/etc", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"),
    *("/usr/share/zoneinfo", "/dev/null", "/dev/urandom"),
)
# Besides, for names and certificates: where /etc/resolv.conf and /etc/ssl/certs usually point to.
NETWORK_READ = (
    *("/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager"),
    *("/usr/share/ca-certificates", "/usr/local/share/ca-certificates", "/usr/share/pki"),
)
SCOPED_SIGNALS_ABI = 6  # of Landlock: from then on signals reach only what the process has started
DNS_PORT = 53  # a name server's answer may be too long for a datagram (RFC 7766)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a role may still do after the drop.

    Attributes:
        read: files and folders to read, besides Python's own and the system's.
        write: folders to write beneath, by name or descriptor; they must exist, and belong to the role's user,
            before the spawn.
        execute: programs to run, with what is needed to load them; `allow` must hold `exec`.
        allow: names of `seccomp.GROUPS`; `network` also opens what name resolution and certificates need.
        can_connect_tcp: whether, with `network`, it may connect to any TCP port; otherwise to a name server's only.
        nofile: how many descriptors may be open.
        max_processes: how many processes and threads its user may have more than now, for a role that makes some: they
            are counted by user, so those of others come off; None for no limit.
        data_bytes: memory it may have of its own, RLIMIT_DATA, in each of its processes; None for no limit.
        address_space_bytes: RLIMIT_AS, None for no limit.
        death_signal: what the kernel sends when the supervisor dies; None for a role that notices by itself
            (a pipe) and has work to finish.
    """

    read: tuple[str, ...] = ()
    write: tuple[str | int, ...] = ()
    execute: tuple[str, ...] = ()
    allow: frozenset[str] = frozenset()
    can_connect_tcp: bool = False
    nofile: int = WORKER_NOFILE
    max_processes: int | None = None
    data_bytes: int | None = None
    address_space_bytes: int | None = None
    death_signal: signal.Signals | None = signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Role:
    """What a child is to be.

    Attributes:
        title: what `ps` shows, for instance `kon-agent: worker cpu`.
        body: `package.module:function`; called with the argument of `spawn`, returns the exit code.
        keep_fds: descriptors the child keeps, besides the standard streams; its stdin is /dev/null.
        user: whom to become; None only where the supervisor is not root.
        stderr_fd: what its standard error is to be; None: ours.
    """

    title: str
    body: str
    keep_fds: tuple[int, ...] = ()
    user: User | None = None
    profile: Profile = Profile()
    stderr_fd: int | None = None


@dataclass(frozen=True, slots=True)
class Child:
    """A spawned process; close `pidfd` once it has been reaped."""

    pid: int
    pidfd: PidFd


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended: exactly one of `code` and `signum` is set."""

    pid: int
    code: int | None = None
    signum: int | None = None


def prepare_to_fork() -> None:
    """Collect garbage once and exempt what is left: no child's collection then copies a shared page."""
    importpath.survey()
    gc.collect()
    gc.freeze()


def spawn(role: Role, argument: object = None, prepare: Callable[[], object] | None = None) -> Child:
    """Fork a child, strip it, and have it call `role.body` with `argument`.

    Args:
        role: what the child is to be.
        argument: any object; the child inherits it as it is, nothing is pickled.
        prepare: makes the argument in the child instead, before the drop: maps shared memory and reads secret files,
            which then need not be open, nor even nameable, afterwards. It runs with every privilege: our own code only.

    Raises:
        PrivilegeError: the child would run as root.
        OSError: no process or no descriptor is left.
    """
    has = privileges.current_privileges()
    if has.uid == 0 and (role.user is None or not has.can_change_user):
        lacking = has.missing("CAP_SETUID", "CAP_SETGID")
        remedy = f"grant the supervisor {', '.join(lacking)}" if lacking else "give the role a user"
        raise PrivilegeError(f"{role.title}: would run as root; {remedy}")
    parent_pid = os.getpid()
    # Blocked until the child has its own handlers: it must not write into the parent's wakeup descriptor.
    unblocked = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _live(role, prepare or (lambda: argument), has, parent_pid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    return _hold(pid)


def launch(command: Sequence[str], keep_fds: Iterable[int], output_fd: int) -> Child:
    """Run a program of ours with all our privileges, and nothing but these descriptors.

    Args:
        command: an absolute path and the arguments.
        keep_fds: what it inherits besides the standard streams; its stdin is /dev/null.
        output_fd: where what it says goes.

    Raises:
        OSError: it cannot be run, or no process or descriptor is left.
    """
    keep = list(keep_fds)
    try:
        for fd in keep:
            os.set_inheritable(fd, True)
        pid = os.posix_spawn(
            command[0],
            tuple(command),
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output_fd, 1),
                (os.POSIX_SPAWN_DUP2, output_fd, 2),
            ],
            setpgroup=0,  # Ctrl-C is for us
            setsigmask=(),
        )
    finally:
        for fd in keep:
            os.set_inheritable(fd, False)
    return _hold(pid)


def _hold(pid: int) -> Child:
    try:
        return Child(pid, PidFd(pid))
    except OSError:
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still the child's
        os.waitpid(pid, 0)
        raise


def reap(leaders: Container[int] = ()) -> list[Exit]:
    """Return every child that has ended since the last call; never waits.

    Args:
        leaders: pids of spawned children: what one of them has started and left behind is killed. Each leads a process
            group, which its programs cannot leave (`seccomp`).
    """
    ended: list[Exit] = []
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # no child at all
            return ended
        if found is None:
            return ended
        if found.si_pid in leaders:
            # Not reaped yet, so the number is still its own. One that died before setsid leads no group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(found.si_pid, signal.SIGKILL)
        ended.append(_parse_status(*os.waitpid(found.si_pid, 0)))


def _parse_status(pid: int, status: int) -> Exit:
    if os.WIFSIGNALED(status):
        return Exit(pid, signum=os.WTERMSIG(status))
    return Exit(pid, code=os.WEXITSTATUS(status))


def describe_exit(ended: Exit) -> str:
    """Return the end of a child in words, for instance `killed by SIGKILL`."""
    if ended.signum is not None:
        return f"killed by {_signal_name(ended.signum)}"
    meaning = {
        CRASH_EXIT: " (uncaught exception; see its traceback in the log)",
        PrivilegeError.exit_code: " (could not give up its privileges or read its code; see the log)",
    }
    return f"exited with {ended.code}{meaning.get(ended.code or 0, '')}"


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal has no name of its own
        return f"signal {signum}"


# ── in the child
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def _live(role: Role, prepare: Callable[[], object], had: privileges.Privileges, parent_pid: int) -> NoReturn:
    """Be the child, from its first instruction to its last."""
    code = CRASH_EXIT
    try:
        gc.freeze()  # what the parent has made since `prepare_to_fork`, too: a collection would copy its pages
        argument = prepare()
        _detach(role)
        try:
            _drop(role, had, parent_pid)
        except OSError as err:
            raise PrivilegeError(f"cannot give up its privileges: {err}") from err
        code = _call(role.body, argument)
    except KonError as err:
        _complain(f"{role.title}: {err}\n")
        code = err.exit_code
    except BaseException:
        _complain(f"{role.title}: uncaught exception\n{traceback.format_exc()}")
    finally:
        _flush()
        os._exit(code & 0xFF)


def _detach(role: Role) -> None:
    """Cut what ties the child to its parent: name, signals, terminal, descriptors, limits."""
    setproctitle.setproctitle(role.title)
    signal.set_wakeup_fd(-1)
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Python's own default: a broken pipe is an OSError
    # A session of its own: Ctrl-C, Ctrl-Z and a closed terminal are the supervisor's to interpret, in its
    # order.
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if role.stderr_fd is not None:
        os.dup2(role.stderr_fd, 2)
    _close_all_but(role.keep_fds)
    os.umask(0o077)
    sys.dont_write_bytecode = True
    profile = role.profile
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, profile.nofile)
    if profile.data_bytes is not None:
        _limit(resource.RLIMIT_DATA, profile.data_bytes)
    if profile.address_space_bytes is not None:
        _limit(resource.RLIMIT_AS, profile.address_space_bytes)


def _close_all_but(keep_fds: Iterable[int]) -> None:
    keep = {0, 1, 2, *keep_fds}
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in keep:
            try:
                os.close(fd)
            except OSError:  # the listing's own
                continue
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    # Streams of the child's own: what the parent had buffered is written once, by the parent.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (
        os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False) for fd in (1, 2)
    )
    faulthandler.disable()  # else a parent's enable() stands, and the handlers just reset are not set again
    faulthandler.enable(2)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (ceiling, ceiling))


def _drop(role: Role, had: privileges.Privileges, parent_pid: int) -> None:
    """Give up every privilege, for good, and prove it; in this order, as each step may undo others."""
    profile = role.profile
    places = importpath.hold()
    os.chdir("/")  # not before: the current folder is no place to import from, but `hold` must know it
    libraries = _open_libraries()
    if had.can_drop_bounding_set:
        privileges.drop_bounding_set()
    user = role.user if had.can_change_user else None
    if user is not None:
        privileges.change_user(user)
    privileges.clear_capabilities()
    if profile.max_processes is not None:
        _limit(resource.RLIMIT_NPROC, count_tasks(os.getuid()) + profile.max_processes)
    if profile.death_signal is not None:
        privileges.set_parent_death_signal(profile.death_signal)
        if os.getppid() != parent_pid:  # it died before the line above: nobody would tell us
            raise KonError("the supervisor is gone")
    privileges.set_dumpable(False)
    privileges.set_no_new_privs()
    _confine(profile, places, libraries)
    privileges.verify_dropped(
        user.uid if user else os.getuid(),
        user.gid if user else os.getgid(),
        is_user_changed=user is not None,
        is_bounding_set_dropped=had.can_drop_bounding_set,
    )


def _confine(profile: Profile, places: dict[str, int], libraries: list[int]) -> None:
    has_network = "network" in profile.allow
    network_read = NETWORK_READ if has_network else ()
    abi = landlock.restrict(
        read=(*places.values(), *libraries, *SYSTEM_READ, *network_read, *profile.read),
        write=profile.write,
        execute=[file for program in profile.execute for file in needed_to_run(program)],
        connect_tcp=None if profile.can_connect_tcp else (DNS_PORT,) if has_network else (),
    )
    for fd in libraries:
        os.close(fd)
    importpath.adopt(places)
    signals = {"signals"} if "exec" in profile.allow and _has_scoped_signals(abi) else set[str]()
    seccomp.apply(profile.allow | signals)


def _has_scoped_signals(abi: int) -> bool:
    """Whether signals reach only what this process starts: the kernel says so, and it is so with our own parent."""
    if abi < SCOPED_SIGNALS_ABI:
        return False
    try:
        os.kill(os.getppid(), 0)
    except OSError:
        return True
    return False


def _open_libraries() -> list[int]:
    """Open the folders of Python's own shared libraries, which the child's user may not reach by name."""
    folders = ("lib", sys.platlibdir)
    names = {f"{prefix}/{folder}" for prefix in (sys.prefix, sys.base_prefix) for folder in folders}
    opened = []
    for name in sorted(names):
        try:
            opened.append(os.open(name, os.O_PATH | os.O_CLOEXEC))
        except OSError:
            continue
    return opened


def _call(body: str, argument: object) -> int:
    module_name, _, function_name = body.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, PermissionError) as err:
        places = importpath.unreadable(module_name)
        if not places:
            raise
        raise PrivilegeError(
            f"uid {os.getuid()} cannot import {module_name}: {err}; it may not read {', '.join(places)}; "
            "run chmod -R o+rX on it, or install where every user may read"
        ) from err
    try:
        return int(getattr(module, function_name)(argument) or 0)
    except SystemExit as err:
        if err.code is None or isinstance(err.code, int):
            return err.code or 0
        _complain(f"{err.code}\n")
        return 1


def import_all(names: Sequence[str]) -> int:
    """Be the body of a child that finds out whether these modules can be imported by who it has become."""
    for name in names:
        importlib.import_module(name)
    return os.EX_OK


def _complain(text: str) -> None:
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:  # nobody listens any more; the exit code still tells
        return


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
