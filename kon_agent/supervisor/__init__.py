"""The supervisor: the one privileged process, a single thread around one selector.

`main` is the loop, `unit` one plugin with its process and rings, `courier` the sender's process, `network` the BPF
objects and the interfaces they watch, `control` the control socket, `status` what it answers, `meter` what every
process costs, `reading` and `governor` what is done to stay within the limits and `regulation` who does it, `upgrade`
how the installed code takes over, `handover` what it is given, and `renewal` how it replaces the children.
"""

from kon_agent.supervisor.main import run
from kon_agent.supervisor.upgrade import rehearse

__all__ = ["rehearse", "run"]
