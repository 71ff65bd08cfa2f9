"""Which rights a plugin's worker keeps, by the plugin's configuration. Pure: nothing is looked up here."""

from __future__ import annotations

import signal

from kon_agent.config.schema import ExecConfig, ForeignConfig, PluginConfig
from kon_agent.process import Profile

PROGRAM_NOFILE = 256  # the program's as well as the worker's: pipes, libraries, a data file for each core
PROGRAM_MAX_PROCESSES = 64  # a pipeline takes a handful, a runtime's thread pool a few dozen; a fork bomb all

FOREIGN_MAX_THREADS = 16  # a resolver, a pool; few enough that a bomb of them leaves room for other plugins' programs
MEMORY_HEADROOM_BYTES = 64 * 1024 * 1024  # what a worker has mapped before its plugin takes anything
MEMORY_FACTOR = 4  # far enough above its limit for the supervisor to see it grow, and to say so, before this wall


def profile_for(config: PluginConfig) -> Profile:
    """Return the profile of a worker that collects by `config`."""
    data_bytes = MEMORY_FACTOR * config.memory_limit + MEMORY_HEADROOM_BYTES
    match config:
        case ExecConfig():
            return Profile(
                data_bytes=data_bytes,
                read=tuple(config.read),
                write=("/dev/null",),
                execute=(config.command[0], *config.execute),
                allow=frozenset({"exec"}),
                nofile=PROGRAM_NOFILE,
                max_processes=PROGRAM_MAX_PROCESSES,
                death_signal=signal.SIGTERM,  # a killed worker could not take its program with it
            )
        case ForeignConfig():
            return Profile(
                data_bytes=data_bytes,
                read=config.reads,
                allow=frozenset({"network"}) if config.has_network else frozenset(),
                can_connect_tcp=config.has_network,
                max_processes=FOREIGN_MAX_THREADS,
            )
        case _:
            return Profile(data_bytes=data_bytes)
