"""kon_agent.bpf.netns: which namespace a probe is told to count."""

from __future__ import annotations

import os

from kon_agent.bpf import netns
from kon_agent.config.schema import CpuConfig, DropsConfig, TcpConfig


def test_all_is_zero_and_own_is_the_inode() -> None:
    """0 stands for all, the inode number of this process's namespace for its own."""
    own = os.stat("/proc/self/ns/net").st_ino.to_bytes(4, "little")
    assert bytes(4) == netns.settings(TcpConfig()) == netns.settings(DropsConfig()) == netns.settings(CpuConfig())
    assert own == netns.settings(TcpConfig(namespaces="own")) == netns.settings(DropsConfig(namespaces="own"))
