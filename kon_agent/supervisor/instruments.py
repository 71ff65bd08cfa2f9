"""What the supervisor holds for a plugin that its worker may not: BPF programs in the kernel, pages of its own figures.

An instrument is made ready before a worker is forked, mapped by that worker before its drop, and let go once no worker
is wanted. One that cannot be had is no reason not to run: the worker is told why, and reads procfs instead.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from typing import Protocol

from kon_agent.bpf.origin import Origin
from kon_agent.bpf.probe import Probe
from kon_agent.bpf.rows import ProbeSpec
from kon_agent.config.schema import PluginConfig
from kon_agent.errors import BpfError
from kon_agent.linux import privileges
from kon_agent.supervisor.sharedpage import SharedPage

log = logging.getLogger(__name__)

MAX_OBSTACLE_CHARS = 300  # a line in the status; the verifier's whole story is for the log
CAPABILITIES = ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")


class Herald(Protocol):
    """Who tells the user what does not work."""

    def warn(self, text: str) -> None:
        """Say once, and show in the status from now on."""

    def withdraw(self, text: str) -> None:
        """Take a warning back."""


class Instrument:
    """Nothing: what most plugins need."""

    def open(self, config: PluginConfig) -> None:
        """Make it ready for a worker of this section; where that cannot be, its grants say why."""

    def grants(self) -> Mapping[str, memoryview]:
        """Map what the worker reads. Called in the worker before the drop."""
        return {}

    def close(self) -> None:
        """Let it go: no worker is wanted."""

    def programs(self) -> Mapping[str, int]:
        """Return the descriptors of its BPF programs, by name."""
        return {}

    def maps(self) -> Mapping[str, int]:
        """Return the descriptors of its BPF maps, by name."""
        return {}


class Published(Instrument):
    """A page that the supervisor keeps writing, whether anybody reads it or not.

    Args:
        name: of the grant.
        page: the page.
    """

    def __init__(self, name: str, page: SharedPage) -> None:
        self._name = name
        self._page = page

    def grants(self) -> Mapping[str, memoryview]:
        """Map the page."""
        return {self._name: self._page.map_readonly()}


def story_of(err: BpfError) -> str:
    """Return why BPF cannot be had, on one line: first what to do about it, then what libbpf and the kernel say."""
    said = " | ".join(str(err).splitlines())
    if lacking := privileges.current_privileges().missing(*CAPABILITIES):
        remedy = "start it as root" if os.geteuid() else "give them to this root (CapabilityBoundingSet=, cap_add)"
        return f"{', '.join(lacking)} is missing: {remedy}; {said}"
    if err.errno == errno.EPERM:
        return f"no capability is missing: a seccomp profile, a security module or kernel lockdown refuses it; {said}"
    return said


class Complaint:
    """The one warning of an instrument, as long as it holds.

    Args:
        what: what does not work, for instance `tcp reads procfs instead of BPF`.
        herald: who says it.
    """

    def __init__(self, what: str, herald: Herald) -> None:
        self._what = what
        self._herald = herald
        self._story = self._said = self.reason = ""

    def make(self, story: str) -> None:
        """Say it, and why; nothing where that has been said."""
        if story == self._story:
            return
        self.withdraw()
        self._story = story
        self.reason = story[:MAX_OBSTACLE_CHARS]
        if story != self.reason:
            log.info("in full: %s: %s", self._what, story)
        self._said = f"{self._what}: {self.reason}"
        self._herald.warn(self._said)

    def withdraw(self) -> None:
        """Take it back."""
        if self._said:
            self._herald.withdraw(self._said)
        self._story = self._said = self.reason = ""


class Tracing(Instrument):
    """The probe of a plugin.

    Args:
        plugin: the plugin's name.
        spec: its probe.
        herald: who says what does not work.
    """

    def __init__(self, plugin: str, spec: ProbeSpec, herald: Herald) -> None:
        self._spec = spec
        self._complaint = Complaint(f"{plugin} reads procfs instead of BPF", herald)
        self._probe: Probe | None = None
        self._settings = b""

    def open(self, config: PluginConfig) -> None:
        """Load and attach it, unless it is there with the same settings: then its counters go on."""
        try:
            settings = self._spec.settings(config) if self._spec.settings else b""
            if self._probe is not None and settings == self._settings:
                return
            self._unload()
            self._probe, self._settings = Probe.load(self._spec, config), settings
            self._complaint.withdraw()
        except BpfError as err:
            self._complaint.make(story_of(err))

    def grants(self) -> Mapping[str, memoryview]:
        """Map the rows."""
        if self._probe is None:
            return Origin.without_bpf(self._complaint.reason).grant()
        return self._probe.grants()

    def close(self) -> None:
        """Detach and unload it."""
        self._unload()
        self._complaint.withdraw()

    def programs(self) -> Mapping[str, int]:
        """Return those of the probe."""
        return self._probe.programs if self._probe is not None else {}

    def maps(self) -> Mapping[str, int]:
        """Return those of the probe."""
        return self._probe.maps if self._probe is not None else {}

    def _unload(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None
