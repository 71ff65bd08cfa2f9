"""The errors of Kon-Agent: one small tree under `KonError`.

Foreign exceptions (OSError, msgspec, aioquic, libbpf) are translated once, at the adapter that meets them, with
`raise … from err`. A message names what failed, on which object, with which value, and what to do about it.
"""

from __future__ import annotations


class KonError(Exception):
    """Root of every error this project raises on purpose."""

    exit_code = 1


class ConfigError(KonError):
    """The configuration is unusable; the message holds one located line per mistake."""

    exit_code = 78  # EX_CONFIG, sysexits.h


class PrivilegeError(KonError):
    """A privilege could not be had, or, worse, could not be given up."""

    exit_code = 77  # EX_NOPERM, sysexits.h


class BpfError(KonError):
    """The kernel or libbpf refused an operation.

    Attributes:
        errno: the positive errno, 0 where libbpf gave none.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class PluginError(KonError):
    """A plugin's code cannot be used: it is refused, does not import, or is not what a plugin is."""


class RingError(KonError):
    """A ring's content is not what its producer may have written."""


class SpoolError(KonError):
    """The spool directory cannot be used as asked."""


class StoreError(KonError):
    """The receiver's store cannot be used as asked."""


class LocalProtocolError(KonError):
    """We were about to break the wire protocol (h11's distinction: our fault)."""


class RemoteProtocolError(KonError):
    """The peer broke the wire protocol: its fault."""


class ControlError(KonError):
    """A control request could not be carried out.

    Attributes:
        code: a stable word scripts may test: `not_running`, `unknown_plugin`, `permission_denied`, …
        hint: what to do next; may be empty.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class NoData(Exception):
    """The kernel offers nothing to collect here now; logged at debug level, never a failure."""
