"""The supervisor: the one privileged process, a single thread around one selector.

`main` is the loop, `unit` one plugin with its process and rings, `courier` the sender's process, `network` the BPF
objects and the interfaces they watch, `control` the control socket, `status` what it answers, `meter` what every
process costs.
"""

from kon_agent.supervisor.main import run

__all__ = ["run"]
