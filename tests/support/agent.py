"""The agent under test."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kon_agent.cli import client
from kon_agent.config.schema import BUILTIN_SECTIONS
from kon_agent.control_protocol import Op, PluginStatus, Request, Status
from tests.support.program import Program, environment_of
from tests.support.waiting import wait_for

AGENT_ID = "edge-1"
PERIOD = "100ms"
DEADLINE = "5s"  # beyond the period; a test of the hung gives its own
COMMAND_TIMEOUT_S = 30.0

Sections = Mapping[str, Any]


class Agent(Program):
    """An agent with the plugins it is given, quick in everything.

    Args:
        folder: where its configuration, socket and log are kept.
        port: the receiver's, on 127.0.0.1.
        pki: a folder with `ca.pem` and the certificate of `certificate`.
        plugins: the plugins to enable, each with the keys that differ from quick defaults.
        certificate: whose certificate to show; None for none.
        sections: further sections of the configuration.
        prefix: what to put before its command.
        environment: what to add to ours.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        pki: Path,
        plugins: Mapping[str, Sections],
        *,
        certificate: str | None = AGENT_ID,
        sections: Sections | None = None,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        super().__init__("agent", folder, prefix, environment)
        self.config_path = folder / "agent.yaml"
        self.socket = folder / "control.sock"
        self._base: dict[str, Any] = {
            "server": f"quic://127.0.0.1:{port}",
            "client-id": AGENT_ID,
            "tls": _tls(pki, certificate),
            "cache": {"path": str(folder / "spool")},
            "batch": {"max_age": PERIOD},
            "control": {"socket": str(self.socket)},
            "shutdown_timeout": "5s",
            "limits": {"cpu": "100%", "memory": "1GiB"},  # quick in everything is not frugal
            **(sections or {}),
        }
        self.configure(plugins)

    def configure(self, plugins: Mapping[str, Sections]) -> None:
        """Write its configuration, with these plugins enabled; a running agent learns of it by `reload`."""
        common = {"period": PERIOD, "deadline": DEADLINE}
        names = dict.fromkeys([*BUILTIN_SECTIONS, *plugins])  # instances of a type come with their type
        sections = {name: {"enable": name in plugins, **common, **plugins.get(name, {})} for name in names}
        self.config_path.write_text(json.dumps({**self._base, "plugins": sections}, indent=2))  # JSON is YAML

    def arguments(self) -> list[str]:
        """Return what follows `python -m`."""
        return ["kon_agent.cli.agent", "run", "-c", str(self.config_path)]

    # What it says.

    def status(self) -> Status:
        """Return everything it tells of itself."""
        return client.call(str(self.socket), Request(op=Op.STATUS), Status)

    def plugin(self, name: str) -> PluginStatus:
        """Return what it tells of one plugin."""
        return client.call(str(self.socket), Request(op=Op.PLUGIN_INFO, plugin=name), PluginStatus)

    def change(self, op: Op, name: str) -> PluginStatus:
        """Have it change one plugin; return the plugin's state after that."""
        return client.call(str(self.socket), Request(op=op, plugin=name), PluginStatus)

    def control(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `kon-agent` with these arguments against it, as a user does."""
        command = [sys.executable, "-m", "kon_agent.cli.agent", *arguments, "--socket", str(self.socket)]
        return subprocess.run(
            command, env=environment_of(), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )

    # Its processes.

    def children(self) -> dict[str, int]:
        """Return its children as `ps` shows them, title to process id."""
        pids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return {title(int(pid)): int(pid) for pid in pids}

    def worker(self, plugin: str) -> int:
        """Return the process id of a plugin's worker."""
        return self.children()[f"kon-agent: worker {plugin}"]

    def sender(self) -> int:
        """Return the process id of the sender."""
        return self.children()["kon-agent: sender"]

    # What tests wait for.

    def wait_until_running(self, *plugins: str) -> None:
        """Wait until these plugins, by default all enabled, have shown a heartbeat and the sender is connected."""
        names = plugins or self._enabled()

        def is_running() -> bool:
            now = self.status()
            states = {plugin.name: plugin.state for plugin in now.plugins}
            return now.server.state == "connected" and all(states[name] == "RUNNING" for name in names)

        wait_for(is_running, f"connected, and {', '.join(names)} run")

    def wait_for_acks(self, *plugins: str, more: int = 20) -> None:
        """Wait until `more` further records of each of these plugins, by default all enabled, are acknowledged."""
        names = plugins or self._enabled()

        def acked() -> dict[str, int]:
            return {plugin.name: plugin.acked for plugin in self.status().plugins}

        before = acked()

        def are_there() -> bool:
            now = acked()
            return all(now[name] >= before[name] + more for name in names)

        wait_for(are_there, f"{more} more records of each of {', '.join(names)} are acknowledged")

    def _enabled(self) -> Sequence[str]:
        return [plugin.name for plugin in self.status().plugins if plugin.enabled]


def title(pid: int) -> str:
    """Return what `ps` shows of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _tls(pki: Path, certificate: str | None) -> dict[str, str]:
    tls = {"ca": str(pki / "ca.pem")}
    if certificate is not None:
        tls |= {"cert": str(pki / f"{certificate}.pem"), "key": str(pki / f"{certificate}.key")}
    return tls
