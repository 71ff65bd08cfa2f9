"""The doctor on this machine: with a receiver and with none, with an agent and with none, with BPF and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import StartAgent
from tests.support.agent import AGENT_ID, Agent
from tests.support.denial import missing_tool, without_btf, without_capabilities, without_library, without_root
from tests.support.program import REPOSITORY, environment_of
from tests.support.receiver import Receiver, free_port

TIMEOUT_S = 100.0  # every check in turn to its deadline would take longer, but all of them never hang
PASSWORD = "correct-horse-battery-staple"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: BPF is denied to one that could have it")


def diagnose(
    config: Path, *arguments: str, prefix: Sequence[str] = ()
) -> tuple[int, dict[str, tuple[str, str, str]], str]:
    """Return the doctor's exit code, what it found by check (verdict, found, advice), and all it has printed."""
    command = [*prefix, sys.executable, "-m", "kon_agent.cli.agent", "doctor", "--json", "-c", str(config), *arguments]
    done = subprocess.run(
        command, env=environment_of(), cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert "" == done.stderr
    report = json.loads(done.stdout)
    assert {"version", "config", "verdict", "checks"} == set(report)
    found = {each["check"]: (each["verdict"], each["found"], each["advice"]) for each in report["checks"]}
    assert all(verdict == "ok" or advice for verdict, _, advice in found.values()), "each says what to do"
    assert (report["verdict"] == "fail") == (done.returncode == 1)
    return done.returncode, found, done.stdout


def configured(folder: Path, port: int, pki: Path, plugins: Mapping[str, Any], **tls: str) -> Path:
    """Write a configuration and return its file."""
    files = {"ca": str(pki / "ca.pem"), "cert": str(pki / f"{AGENT_ID}.pem"), "key": str(pki / f"{AGENT_ID}.key")}
    config = {
        "server": f"quic://127.0.0.1:{port}",
        "client-id": AGENT_ID,
        "tls": {**files, **tls},
        "cache": {"path": str(folder / "spool")},
        "control": {"socket": str(folder / "control.sock")},
        "plugins": {"ebpf": {"enable": False}, **plugins},
    }
    path = folder / "doctor.yaml"
    path.write_text(json.dumps(config))
    return path


def test_a_receiver_that_takes_us(folder: Path, receiver: Receiver, pki: Path, network: Sequence[str]) -> None:
    """It answers by our protocol, with a certificate that lasts; nothing is stored, and no file is made."""
    config = configured(folder, receiver.port, pki, {})
    before = set(folder.iterdir())
    _, found, _ = diagnose(config, prefix=network)
    server = f"127.0.0.1:{receiver.port}"
    assert ("ok", True) == (found[f"receiver:{server}"][0], "speaks kon-agent/2" in found[f"receiver:{server}"][1])
    assert "ok" == found[f"certificate:{server}"][0]
    assert "ok" == found["certificate:agent"][0]
    assert "ok" == found["agent"][0]
    assert [] == receiver.ledger()
    assert before == set(folder.iterdir())


def test_a_receiver_that_refuses_us(
    folder: Path, receiver: Receiver, pki: Path, other_pki: Path, network: Sequence[str]
) -> None:
    """A certificate of another authority, and a server that is none of ours."""
    cert, key = str(other_pki / f"{AGENT_ID}.pem"), str(other_pki / f"{AGENT_ID}.key")
    server = f"receiver:127.0.0.1:{receiver.port}"
    code, found, _ = diagnose(configured(folder, receiver.port, pki, {}, cert=cert, key=key), prefix=network)
    assert (1, "fail", True) == (code, found[server][0], "refused" in found[server][1])
    code, found, _ = diagnose(configured(folder, receiver.port, pki, {}, ca=str(other_pki / "ca.pem")), prefix=network)
    assert (1, "fail", True) == (code, found[server][0], "TLS failed" in found[server][1])


def test_no_receiver(folder: Path, pki: Path, network: Sequence[str]) -> None:
    """It is said at once that nobody listens there."""
    port = free_port()
    begun_s = time.monotonic()
    code, found, _ = diagnose(configured(folder, port, pki, {}), prefix=network)
    assert (1, "fail") == (code, found[f"receiver:127.0.0.1:{port}"][0])
    assert "Connection refused" in found[f"receiver:127.0.0.1:{port}"][1]
    assert time.monotonic() - begun_s < 60


def test_secrets_stay_secret(folder: Path, pki: Path, network: Sequence[str]) -> None:
    """Neither a token nor a key is printed, readable to everybody as they may be."""
    token = folder / "token"
    token.write_text(PASSWORD)
    token.chmod(0o644)
    config = configured(folder, free_port(), pki, {}, token_file=str(token))
    _, found, printed = diagnose(config, prefix=network)
    assert "fail" == found["file:tls.token_file"][0]
    assert PASSWORD not in printed
    assert "PRIVATE KEY" not in printed


def test_nothing_is_imported_from_where_one_stands(folder: Path, pki: Path, network: Sequence[str]) -> None:
    """Somebody's folder may hold modules named like ours: root, who calls the doctor there, does not run them."""
    config = configured(folder, free_port(), pki, {})
    for name in ("msgspec", "click", "kon_agent"):
        (folder / f"{name}.py").write_text("raise SystemExit('this must not run')\n")
    command = [*network, sys.executable, "-P", "-m", "kon_agent.cli.agent", "doctor", "--json", "-c", str(config)]
    done = subprocess.run(
        command, env=environment_of(), cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert "must not run" not in done.stdout + done.stderr
    assert "doctor" not in {each["check"] for each in json.loads(done.stdout)["checks"]}


def test_a_running_agent(start_agent: StartAgent, network: Sequence[str]) -> None:
    """Its own word counts; it goes on undisturbed, and its lock on the spool is no conflict."""
    agent: Agent = start_agent({"cpu": {}})
    agent.wait_until_running("cpu")
    _, found, _ = diagnose(agent.config_path, prefix=network)
    assert f"{AGENT_ID} runs" in found["agent"][1]
    assert f"pid {agent.pid}" in found["agent"][1]
    assert found["spool"][0] != "fail"
    assert agent.is_running
    other = json.loads(agent.config_path.read_text())
    other["control"]["socket"] = str(agent.folder / "other.sock")
    agent.config_path.write_text(json.dumps(other))
    _, found, _ = diagnose(agent.config_path, prefix=network)
    assert ("fail", True) == (found["spool"][0], "in use by pid" in found["spool"][1])


@pytest.mark.root
@pytest.mark.bpf
@needs_root
def test_the_running_agents_interfaces(start_agent: StartAgent, network: Sequence[str]) -> None:
    """How each is attached and why not better is the agent's to say; the loopback has no native XDP."""
    agent: Agent = start_agent({"ebpf": {"interfaces": ["lo"], "exclude": []}})
    agent.wait_until_running("ebpf")
    _, found, _ = diagnose(agent.config_path, prefix=network)
    assert ("ok", "ok") == (found["object:ebpf"][0], found["capabilities"][0])
    assert f"the agent (pid {agent.pid})" in found["capabilities"][1]
    assert "warn" == found["interface:lo"][0]
    assert "ingress generic (EOPNOTSUPP" in found["interface:lo"][1]


@pytest.mark.root
@pytest.mark.bpf
@needs_root
@pytest.mark.parametrize("kind", ["capabilities", "root", "btf", "library"])
def test_bpf_denied_is_explained(kind: str, folder: Path, pki: Path, network: Sequence[str]) -> None:
    """Whichever way it is denied: the check that finds it says so, and what to do."""
    prefixes = {
        "capabilities": (without_capabilities, "capabilities", "CAP_BPF", "fail", "setpriv"),
        "root": (without_root, "capabilities", "CAP_BPF", "warn", "unshare"),
        "btf": (without_btf, "btf", "tcp", "fail", "unshare"),
        "library": (without_library, "libbpf", "there is no libbpf", "fail", "unshare"),
    }
    denial, check, words, verdict, tool = prefixes[kind]
    if missing := missing_tool(tool):
        pytest.skip(f"needs {missing}")
    config = configured(folder, free_port(), pki, {"tcp": {"enable": True}})
    folder.chmod(0o755)
    _, found, _ = diagnose(config, prefix=[*network, *denial()])
    assert (verdict, True) == (found[check][0], words in found[check][1])
    assert found["object:tcp"][0] in ("warn", "fail")
    assert found["object:tcp"][2]


@pytest.mark.root
@pytest.mark.netns
@needs_root
def test_a_foreign_program_is_a_conflict(folder: Path, pki: Path, network: Sequence[str]) -> None:
    """An interface that another XDP program has is told from a free one; nothing is attached to either."""
    if missing := missing_tool("ip", "clang"):
        pytest.skip(f"needs {missing}")
    source = 'int __attribute__((section("xdp"),used)) pass(void *ctx) { return 2; }\n'
    source += 'char _license[] __attribute__((section("license"),used)) = "GPL";\n'
    build = ["clang", "-O2", "-target", "bpf", "-x", "c", "-c", "-", "-o", str(folder / "pass.o")]
    subprocess.run(build, input=source, text=True, check=True)
    add = ["ip", "link", "add", "kon7", "type", "veth", "peer", "name", "kon8"]
    subprocess.run([*network, *add], check=True)
    try:
        for name in ("kon7", "kon8"):
            subprocess.run([*network, "ip", "link", "set", name, "up"], check=True)
        occupy = ["ip", "link", "set", "dev", "kon7", "xdpgeneric", "obj", str(folder / "pass.o"), "sec", "xdp"]
        subprocess.run([*network, *occupy], check=True)
        config = configured(folder, free_port(), pki, {"ebpf": {"enable": True, "interfaces": ["kon*"]}})
        _, found, _ = diagnose(config, prefix=network)
        assert ("fail", True) == (
            found["interface:kon7"][0],
            "somebody else: generic pass" in found["interface:kon7"][1],
        )
        assert "ip link show dev kon7" in found["interface:kon7"][2]
        assert "free" in found["interface:kon8"][1]
        links = subprocess.run([*network, "ip", "-d", "link"], check=True, capture_output=True, text=True).stdout
        assert 1 == links.count("prog/xdp")
    finally:
        subprocess.run([*network, "ip", "link", "delete", "kon7"], check=True)
