"""What every worker will import, imported once before the fork: its pages are then shared instead of made N times.

Only our own leaves and the protobuf runtime: never a plugin, never the network (docs/adr/0006). The supervisor itself
calls none of it. A module that makes classes is worth the most: an enumeration or a structure of ctypes that each
worker makes for itself dirties a megabyte of shared pages (reference counts of what it touches).
"""

import importlib
import select
import traceback

import kon_agent.linux.clockstate
import kon_agent.plugins.context
import kon_agent.plugins.events
import kon_agent.plugins.procfs
import kon_agent.schedule
import kon_agent.spec
import kon_agent.wire.encode

__all__ = ["importlib", "kon_agent", "select", "traceback"]
