"""The supervisor: the one privileged process, a single thread around one selector.

`startup` is how it begins and `main` the loop, `unit` one plugin with its process and rings, `courier` the sender's
process, `network` the BPF objects and the interfaces they watch, `control` the control socket, `requests` and `reload`
what is asked for there and `status` what is answered, `meter` what every process costs, `reading`, `ladder` and
`governor` what is done to stay within the limits and `regulation` who does it, `upgrade` how the installed code takes
over, `handover` what it is given, and `renewal` how it replaces the children.
"""

from kon_agent.supervisor.startup import run
from kon_agent.supervisor.upgrade import rehearse

__all__ = ["rehearse", "run"]
