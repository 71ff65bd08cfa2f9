"""The sample files and the documentation say what the schema says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from kon_agent.config import Config, ReceiverConfig, check, load, load_receiver
from kon_agent.config.schema import CacheConfig, Duration, PluginsConfig, Share, Size, TlsConfig
from kon_agent.config.units import format_duration, format_share, format_size

ROOT = Path(__file__).resolve().parents[3]
DOC = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")


def _sections(section: type[msgspec.Struct], path: str = "") -> dict[str, type[msgspec.Struct]]:
    """Return every section below `section` by its dotted path."""
    found = {path: section}
    for field in msgspec.structs.fields(section):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found |= _sections(field.type, f"{path}.{field.name}".lstrip("."))
    return found


def _default(section: type[msgspec.Struct], field: msgspec.structs.FieldInfo) -> str:
    """Return a field's default as the documentation writes it."""
    value: Any = getattr(section(), field.name)
    if isinstance(value, msgspec.Struct):
        return "see below" if section is not ReceiverConfig else "as for the agent"
    if field.name == "client_id":
        return "the host name"
    if field.name == "deadline":
        return "twice the period, at least 5s"
    if value is None:
        return "none"
    formatters = {Duration: format_duration, Size: format_size, Share: format_share, str: str}
    return f"`{formatters.get(type(value), json.dumps)(value)}`"


def _documented(heading: str) -> dict[str, str]:
    """Return key to default of the table below a heading."""
    body = DOC.split(f"{heading}\n", 1)[1]
    table = re.split(r"^#", body, maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", table, flags=re.MULTILINE))


@pytest.mark.parametrize(("path", "section"), _sections(Config).items())
def test_documentation_names_every_key(path: str, section: type[msgspec.Struct]) -> None:
    """docs/configuration.md lists each section's keys with their defaults: all of them and no other."""
    heading = f"### `{path}`" if path else "## The agent's file"
    expected = {field.name: _default(section, field) for field in msgspec.structs.fields(section)}
    assert expected == _documented(heading)


def test_documentation_names_every_receiver_key() -> None:
    """The receiver's keys are listed as well."""
    expected = {field.name: _default(ReceiverConfig, field) for field in msgspec.structs.fields(ReceiverConfig)}
    assert expected == _documented("## The receiver's file")


def test_documented_mistakes_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of wrong settings yields exactly the output printed below it."""
    source = re.search(r"```yaml\n(.*?)```", DOC, flags=re.DOTALL)
    output = re.search(r"```text\n(.*?)```", DOC, flags=re.DOTALL)
    assert source is not None
    assert output is not None
    (tmp_path / "agent.yaml").write_text(source[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    _, mistakes = check("agent.yaml")
    assert output[1].splitlines() == [str(mistake) for mistake in mistakes]


def _uncommented(name: str, folder: Path) -> str:
    """Write a copy of a sample with every option it shows switched on; return the copy's name."""
    text = (ROOT / "etc" / name).read_text(encoding="utf-8")
    copy = folder / name
    copy.write_text(re.sub(r"^( *)#(?=\w+:)", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    return str(copy)


def _shown_keys(name: str) -> list[str]:
    text = (ROOT / "etc" / name).read_text(encoding="utf-8")
    return re.findall(r"^ *#?([\w-]+):(?: |$)", text, flags=re.MULTILINE)


def test_agent_sample_loads() -> None:
    """etc/agent.yaml is valid and is the original's example."""
    config = load(str(ROOT / "etc/agent.yaml"))
    assert ("quic://localhost:7843", "edge-agent-1") == (config.server, config.client_id)
    assert ("/tmp/edge_agent.cache", 50_000_000) == (config.cache.path, config.cache.max_size)
    assert PluginsConfig() == config.plugins


def test_agent_sample_shows_every_default(tmp_path: Path) -> None:
    """Every option etc/agent.yaml shows commented out is valid, stands in its section, and is the default."""
    config = load(_uncommented("agent.yaml", tmp_path))
    examples = {
        "server_name": "receiver.example",
        **{
            key: str(tmp_path / name)
            for key, name in (
                ("ca", "ca.pem"),
                ("cert", "agent.pem"),
                ("key", "agent.key"),
                ("token_file", "token"),
            )
        },
    }
    # The deadline shown is what the default comes to with the default period.
    plugins = {name: replace(plugin, deadline=10.0) for name, plugin in PluginsConfig().by_name().items()}
    expected = Config(
        client_id="edge-agent-1",
        plugins=PluginsConfig(**plugins),
        cache=CacheConfig(path="/tmp/edge_agent.cache"),
        tls=TlsConfig(**examples),
    )
    assert expected == config


@pytest.mark.parametrize(("name", "section"), [("agent.yaml", Config), ("receiver.yaml", ReceiverConfig)])
def test_sample_shows_every_key(name: str, section: type[msgspec.Struct]) -> None:
    """A sample shows each key of the schema as often as the schema has it."""
    expected = [field.name for part in _sections(section).values() for field in msgspec.structs.fields(part)]
    assert sorted(expected) == sorted(key.replace("-", "_") for key in _shown_keys(name))


def test_receiver_sample_loads(tmp_path: Path) -> None:
    """etc/receiver.yaml is valid, with its options switched on as well."""
    assert ReceiverConfig() == load_receiver(str(ROOT / "etc/receiver.yaml"))
    config = load_receiver(_uncommented("receiver.yaml", tmp_path))
    assert (str(tmp_path / "server.pem"), str(tmp_path / "ca.pem")) == (config.cert, config.client_ca)
    assert ReceiverConfig().store == config.store
