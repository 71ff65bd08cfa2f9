"""A tc-bpf program that drops all packets of an interface, and the count of what it has dropped."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

DROP_ALL = "1,6 0 0 2"  # classic BPF: return TC_ACT_SHOT


@contextmanager
def dropper(namespace: str, interface: str, hook: str = "ingress") -> Iterator[None]:
    """Drop whatever passes tc's ingress or egress of an interface in a network namespace."""
    if shutil.which("tc") is None:
        pytest.skip("needs the program tc")
    tc, device = ("tc", "-n", namespace), ("dev", interface)
    subprocess.run([*tc, "qdisc", "add", *device, "clsact"], check=True, capture_output=True)
    program = ("bpf", "bytecode", DROP_ALL, "direct-action")
    added = subprocess.run([*tc, "filter", "add", *device, hook, *program], capture_output=True)
    if added.returncode:
        pytest.skip(f"needs the tc classifier bpf: {added.stderr.decode().strip()}")
    yield
    subprocess.run([*tc, "filter", "delete", *device, hook], check=True, capture_output=True)


def drops(namespace: str, interface: str) -> int:
    """Return how many packets have been dropped at an interface's hooks."""
    show = ["tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", interface, "clsact"]
    shown = subprocess.run(show, check=True, capture_output=True).stdout
    return int(json.loads(shown)[0]["drops"])
