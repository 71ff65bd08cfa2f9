"""A finding: one line of the doctor's report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Verdict = Literal["ok", "warn", "fail"]
"""`fail`: the agent does not start, does not deliver, or does not do what it is configured to. `warn`: it does, with
less, or not for long, or it cannot be told from here."""

SEVERITY: dict[Verdict, int] = {"ok": 0, "warn": 1, "fail": 2}


class Finding(msgspec.Struct, frozen=True):
    """What one check has found.

    Attributes:
        check: its name, a word; of one that is about one of several things, `word:thing` (`interface:eth0`).
        verdict: how bad it is.
        found: what there is, one line.
        advice: what to do; empty where there is nothing to do.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def ok(check: str, found: str, advice: str = "") -> Finding:
    """Return that all is well."""
    return Finding(check, "ok", found, advice)


def warn(check: str, found: str, advice: str) -> Finding:
    """Return that something could be better."""
    return Finding(check, "warn", found, advice)


def fail(check: str, found: str, advice: str) -> Finding:
    """Return that something is in the way."""
    return Finding(check, "fail", found, advice)


def split(message: str) -> tuple[str, str]:
    """Return what happened and what to do of a message of this project, which says both: `what; what to do`."""
    found, _, advice = message.rpartition("; ")
    return (found, advice) if found else (advice, "")


def size(count: int) -> str:
    """Return bytes as people read them, in MiB, or in whole KiB, the last begun."""
    return f"{-(-count // 1024)} KiB" if count < 1024 * 1024 else f"{count / 1024 / 1024:.1f} MiB"


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the worst verdict there is; `ok` where there is none."""
    return max((finding.verdict for finding in findings), key=SEVERITY.__getitem__, default="ok")
