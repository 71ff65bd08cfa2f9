"""All checks, in the order of the report, each with how long it may take.

They are named as strings and imported when they are performed: a module that cannot be imported costs its own checks.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from kon_agent.doctor.finding import Finding, fail
from kon_agent.doctor.patient import BPF_PLUGINS, Patient

REPORT = "please report this, with the output of `kon-agent doctor --json`"


@dataclass(frozen=True, slots=True)
class Check:
    """A check.

    Attributes:
        name: of the check; those of its findings begin with it or say more.
        body: `module:function` in this package; the function takes a `Patient`, and `about` if that is not empty, and
            yields findings.
        deadline_s: seconds after which it is taken for hung.
        about: what the check is about, of several that share a function.
    """

    name: str
    body: str
    deadline_s: float = 5.0
    about: str = ""


CHECKS: tuple[Check, ...] = (
    Check("kernel", "kernel:check_kernel"),
    Check("btf", "kernel:check_btf"),
    Check("libbpf", "kernel:check_libbpf"),
    Check("capabilities", "kernel:check_capabilities"),
    Check("lockdown", "kernel:check_lockdown"),
    Check("unprivileged_bpf", "kernel:check_unprivileged_bpf"),
    Check("memlock", "kernel:check_memlock"),
    Check("jit", "kernel:check_jit"),
    # The verifier takes its time on a small and busy machine.
    *(Check(f"object:{plugin}", "kernel:check_object", 20.0, plugin) for plugin in BPF_PLUGINS),
    Check("map_memory", "limits:check_maps"),
    Check("interface", "network:check_interfaces"),
    Check("agent", "host:check_agent"),
    Check("socket", "host:check_socket"),
    Check("configuration", "host:check_configuration", 15.0),  # imports plugins of others, each within 5 s
    Check("user", "host:check_user"),
    Check("file", "host:check_credentials"),
    Check("spool", "host:check_spool"),
    Check("cgroup", "limits:check_group"),
    Check("clock", "host:check_clock"),
    Check("certificate", "receiver:check_certificate"),
    Check("receiver", "receiver:check_receivers"),
)


def perform(check: Check, patient: Patient) -> list[Finding]:
    """Return what a check finds; that it raises is a finding itself."""
    found: list[Finding] = []
    try:
        module, _, function = check.body.partition(":")
        body = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        for finding in body(patient, *filter(None, [check.about])):
            found.append(finding)  # what was found before it raised is kept
    except Exception as err:  # whatever it is, the other checks go on
        found.append(fail(check.name, f"the check itself failed: {type(err).__name__}: {err}", REPORT))
    return found
