"""Tracing programs in the kernel: loaded, attached to their tracepoints, their rows frozen for an unprivileged reader.

Invariants:
* A link's fd is the attachment: whoever dies with all of them leaves nothing behind. No child may keep one.
* The rows can be changed by the programs alone; a mapping of them survives fork and the closing of every fd.
"""

from __future__ import annotations

import logging
import os
import struct

from kon_agent import clock
from kon_agent.bpf import libbpf, loader
from kon_agent.bpf.loader import Loaded, MapShape
from kon_agent.bpf.origin import Origin
from kon_agent.bpf.rows import ProbeSpec
from kon_agent.config.schema import PluginConfig
from kon_agent.errors import BpfError
from kon_agent.linux.memory import map_memory

log = logging.getLogger(__name__)

_CPUS = struct.Struct("=I")


class Probe:
    """One loaded and attached object. Make one with `load`; end it with `close`."""

    def __init__(self, spec: ProbeSpec, loaded: Loaded, link_fds: list[int], cpus: int) -> None:
        self._spec = spec
        self._loaded = loaded
        self._link_fds = link_fds
        self._rows_bytes = spec.rows_for(cpus) * spec.row_bytes
        self.origin = Origin("bpf", created_ns=clock.wall_ns(), left_out=loaded.left_out)

    @classmethod
    def load(cls, spec: ProbeSpec, config: PluginConfig) -> Probe:
        """Load the object, freeze its rows and attach its programs.

        Args:
            spec: which.
            config: the plugin's section, of which its settings are made.

        Raises:
            BpfError: there is no libbpf, or the kernel refused: in libbpf's words.
        """
        library = libbpf.library()
        cpus = library.possible_cpus()
        loaded = load_object(spec, cpus)
        link_fds: list[int] = []
        try:
            if spec.settings_bytes:
                library.update(loaded.maps["settings"], "settings", 0, _settings(spec, config, cpus))
            library.freeze(loaded.maps["rows"], "rows")
            for name, fd in loaded.programs.items():
                link_fds.append(library.trace(fd, name))
        except BpfError:
            _close(link_fds)
            loaded.close()
            raise
        if loaded.left_out:
            log.warning("%s: this kernel has no tracepoint for %s", spec.object, ", ".join(loaded.left_out))
        return cls(spec, loaded, link_fds, cpus)

    @property
    def programs(self) -> dict[str, int]:
        """The programs' descriptors, by name."""
        return self._loaded.programs

    @property
    def maps(self) -> dict[str, int]:
        """The maps' descriptors, by name."""
        return {f"{self._spec.object}.{name}": fd for name, fd in self._loaded.maps.items()}

    def map_rows(self) -> memoryview:
        """Map the rows, read-only, into this process; a child made by fork does not have them.

        Raises:
            BpfError: no memory left.
        """
        try:
            return map_memory(self._loaded.maps["rows"], self._rows_bytes, writable=False, inherit=False)
        except OSError as err:
            raise BpfError(f"cannot map the rows of {self._spec.object}: {err}", err.errno or 0) from err

    def grants(self) -> dict[str, memoryview]:
        """Return what the plugin is granted. Called in its worker before the drop."""
        return {"rows": self.map_rows(), **self.origin.grant()}

    def close(self) -> None:
        """Detach the programs and let the object go; mapped rows stay readable."""
        _close(self._link_fds)
        self._link_fds.clear()
        self._loaded.close()


def load_object(spec: ProbeSpec, cpus: int) -> Loaded:
    """Load a probe's object for so many possible CPUs; nothing is attached yet.

    Raises:
        BpfError: the kernel refused: in libbpf's words.
    """
    shapes = {name: MapShape(table.value_bytes, table.entries) for name, table in spec.tables.items()}
    shapes["rows"] = MapShape(spec.row_bytes, spec.rows_for(cpus), is_sized=True)
    if spec.settings_bytes:
        shapes["settings"] = MapShape(spec.settings_bytes, 1)
    return loader.load(loader.object_path(spec.object), shapes=shapes, optional=spec.optional)


def _settings(spec: ProbeSpec, config: PluginConfig, cpus: int) -> bytes:
    value = _CPUS.pack(cpus) + (spec.settings(config) if spec.settings else b"")
    if len(value) > spec.settings_bytes:
        raise BpfError(f"{spec.object}: settings of {len(value)} bytes do not fit its {spec.settings_bytes}")
    return value.ljust(spec.settings_bytes, b"\0")


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
