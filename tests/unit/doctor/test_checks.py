"""The list of all checks, and how one is performed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import get_args

import pytest

from kon_agent.config.schema import BUILTIN_SECTIONS, Config
from kon_agent.doctor import kernel
from kon_agent.doctor.checks import CHECKS, Check, perform
from kon_agent.doctor.finding import SEVERITY, Finding, Verdict, ok, split, worst
from kon_agent.doctor.patient import BPF_PLUGINS, BTF_PLUGINS, Patient

NETWORK_S = 5.0


def test_every_check_names_a_function() -> None:
    """The list names them as strings; each is there."""
    for check in CHECKS:
        module, _, function = check.body.partition(":")
        assert callable(getattr(importlib.import_module(f"kon_agent.doctor.{module}"), function)), check.name


def test_every_check_has_a_name_of_its_own_and_an_end() -> None:
    """What asks the network is over within 5 s, everything within 20."""
    assert len(CHECKS) == len({check.name for check in CHECKS})
    assert all(0 < check.deadline_s <= 20 for check in CHECKS)
    assert [NETWORK_S] == [check.deadline_s for check in CHECKS if check.name == "receiver"]


def test_the_plugins_it_knows_are_there() -> None:
    """Those that need BPF, and of them those that need BTF."""
    assert set(BTF_PLUGINS) < set(BPF_PLUGINS) <= set(BUILTIN_SECTIONS)


def test_a_check_that_raises_costs_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had found before stays; why it failed is said."""

    def broken(patient: Patient) -> Iterator[Finding]:
        yield ok("kernel", "so far")
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(kernel, "check_kernel", broken)
    found = perform(Check("kernel", "kernel:check_kernel"), Patient(Config()))
    assert [("kernel", "ok"), ("kernel", "fail")] == [(each.check, each.verdict) for each in found]
    assert "ZeroDivisionError: by zero" in found[1].found


def test_a_module_that_cannot_be_imported_costs_its_own_checks() -> None:
    """A broken installation is a finding as well."""
    (found,) = perform(Check("gone", "no_such_module:check"), Patient(Config()))
    assert ("gone", "fail", True) == (found.check, found.verdict, "ModuleNotFoundError" in found.found)


def test_checks_of_disabled_plugins_say_nothing() -> None:
    """An object nobody loads is not tried."""
    (check,) = [check for check in CHECKS if check.about == "biolat"]
    assert [] == perform(check, Patient(Config()))


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [([], "ok"), (["ok", "warn"], "warn"), (["fail", "ok", "warn"], "fail")],
)
def test_the_worst_verdict_counts(verdicts: list[Verdict], expected: str) -> None:
    """Of all findings, in any order."""
    assert expected == worst(Finding("x", verdict, "") for verdict in verdicts)
    assert set(get_args(Verdict)) == set(SEVERITY)


def test_a_message_is_split_into_what_is_and_what_to_do() -> None:
    """The project's messages say both; the last part is the advice, if there is more than one."""
    assert ("a; b", "do c") == split("a; b; do c")
    assert ("a", "") == split("a")
