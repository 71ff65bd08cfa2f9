"""Whose packets and sockets a probe counts: all, or those of one network namespace, told by its inode number."""

from __future__ import annotations

import os
import struct

from kon_agent.config.schema import DropsConfig, PluginConfig, TcpConfig
from kon_agent.errors import BpfError

_OWN = "/proc/thread-self/ns/net"
_INODE = struct.Struct("=I")  # ns_common.inum is an unsigned int
_ALL = 0  # no namespace has it: inode numbers of procfs begin at 0xeffffff8 (linux/proc_ns.h)


def settings(config: PluginConfig) -> bytes:
    """Return the member `netns` of a probe's settings, as `namespaces` of the section has it.

    Raises:
        BpfError: the own namespace is asked for and cannot be told.
    """
    if not isinstance(config, TcpConfig | DropsConfig) or config.namespaces == "all":
        return _INODE.pack(_ALL)
    try:
        return _INODE.pack(os.stat(_OWN).st_ino)
    except OSError as err:
        raise BpfError(f"cannot tell the own network namespace by {_OWN}: {err}; is /proc mounted?") from err
