"""Which rights a worker keeps."""

from __future__ import annotations

import pytest

from kon_agent.catalog import Origin
from kon_agent.config.schema import CpuConfig, ExecConfig, ForeignConfig, PluginConfig
from kon_agent.process import Profile
from kon_agent.supervisor.profiles import profile_for


@pytest.mark.parametrize("config", [CpuConfig(), PluginConfig()])
def test_a_collector_needs_nothing(config: PluginConfig) -> None:
    """The kernel's files are open to every worker; there is no more. Its memory has a wall."""
    assert Profile(data_bytes=4 * 64 * 2**20 + 64 * 2**20) == profile_for(config)


def test_a_plugin_of_others_has_what_it_declares() -> None:
    """The files it reads, and the network or none; and few threads."""
    origin = Origin("probe", "package", "probe:Probe")
    plain = profile_for(ForeignConfig(origin=origin, reads=("/var/log",)))
    assert (("/var/log",), frozenset(), False) == (plain.read, plain.allow, plain.can_connect_tcp)
    assert ((), (), 16) == (plain.write, plain.execute, plain.max_processes)
    networked = profile_for(ForeignConfig(origin=origin, has_network=True))
    assert ((), {"network"}, True) == (networked.read, networked.allow, networked.can_connect_tcp)


def test_a_program_s_worker_may_run_it_and_what_is_listed() -> None:
    """Its own program, the listed ones, the listed files; no argument of the command, no network, a bound on forks."""
    profile = profile_for(ExecConfig(command=["/opt/probe", "/etc"], execute=["/bin/true"], read=["/var/lib/probe"]))
    assert ("/opt/probe", "/bin/true") == profile.execute
    assert ("/var/lib/probe",) == profile.read
    assert ("/dev/null",) == profile.write
    assert {"exec"} == profile.allow
    assert None is not profile.max_processes
