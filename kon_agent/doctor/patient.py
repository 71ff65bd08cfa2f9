"""The patient: what is examined, read once before the checks begin."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from kon_agent.config.schema import Config
from kon_agent.control_protocol import Status
from kon_agent.errors import ControlError
from kon_agent.linux import procfs
from kon_agent.linux.privileges import CAPABILITIES, Privileges

BPF_PLUGINS = ("ebpf", "flows", "tcp", "drops", "runqlat", "biolat")
"""The plugins whose figures come from programs in the kernel."""

BTF_PLUGINS = ("tcp", "drops", "runqlat", "biolat")
"""Those of them whose programs find their way in the kernel by its BTF."""


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined.

    Attributes:
        config: the configuration; the built-in defaults where there is no file, or no valid one.
        config_path: its file; None: there is none.
        is_valid: whether that could be used.
        socket: the control socket's path.
        status: what the agent behind it says of itself; None: no agent answers.
        silence: why not, as the client has it.
        privileges: what this process may do.
    """

    config: Config
    config_path: str | None = None
    is_valid: bool = True
    socket: str = ""
    status: Status | None = None
    silence: ControlError | None = None
    privileges: Privileges = field(default_factory=lambda: Privileges(os.geteuid(), frozenset()))

    def wants(self, *plugins: str) -> list[str]:
        """Return those of `plugins` that are enabled: in the running agent, or else by the configuration."""
        if self.status is not None:
            enabled = {plugin.name for plugin in self.status.plugins if plugin.enabled}
        else:
            enabled = {name for name, section in self.config.plugins.by_name().items() if section.enable}
        return [name for name in plugins if name in enabled]

    @property
    def agent_pid(self) -> int | None:
        """The running agent's process; None where none runs, or not where this process can see it."""
        pid = self.status.pid if self.status else 0
        return pid if pid and os.path.exists(f"/proc/{pid}/status") else None

    @property
    def has_bpf(self) -> bool:
        """Whether this process may load BPF programs, as far as capabilities decide."""
        return not {"CAP_BPF", "CAP_SYS_ADMIN"}.isdisjoint(self.privileges.effective)

    @property
    def stands_for_agent(self) -> bool:
        """Whether what this process may do tells what an agent may: the units and the documents start it as root."""
        return self.privileges.uid == 0


def privileges_of(pid: int) -> Privileges:
    """Return the user and the effective capabilities of a process.

    Raises:
        OSError: it has ended, or /proc hides it.
    """
    status = procfs.read_status(pid)
    mask = int(status["CapEff"], 16)
    held = frozenset(name for number, name in enumerate(CAPABILITIES) if mask >> number & 1)
    return Privileges(int(status["Uid"].split()[1]), held)
