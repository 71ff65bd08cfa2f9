"""What every worker will import, imported once before the fork: its pages are then shared instead of made N times.

Only our own leaves and the protobuf runtime: never a plugin, never the network (docs/adr/0006). The supervisor itself
calls none of it.
"""

import importlib
import select
import traceback

import kon_agent.plugins.context
import kon_agent.schedule
import kon_agent.spec
import kon_agent.wire.encode

__all__ = ["importlib", "kon_agent", "select", "traceback"]
