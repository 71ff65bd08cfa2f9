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
from kon_agent.config.document import compose, plain
from kon_agent.config.rules import NO_KEYS
from kon_agent.config.schema import (
    BUILTIN_SECTIONS,
    CacheConfig,
    Duration,
    ExecConfig,
    PluginConfig,
    PluginsConfig,
    Share,
    Size,
    TlsConfig,
)
from kon_agent.config.units import format_duration, format_share, format_size

ROOT = Path(__file__).resolve().parents[3]
DOC = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")


def _sections(section: type[msgspec.Struct], path: str = "") -> dict[str, type[msgspec.Struct]]:
    """Return every section below `section` by its dotted path."""
    found = {path: section}
    for field in _own_fields(section):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found |= _sections(field.type, f"{path}.{field.name}".lstrip("."))
    return found


def _own_fields(section: type[msgspec.Struct]) -> list[msgspec.structs.FieldInfo]:
    """Return the keys of a section, without those that every plugin has."""
    common = PluginConfig.__struct_fields__ if issubclass(section, PluginConfig) and section != PluginConfig else ()
    fields = msgspec.structs.fields(section)
    return [field for field in fields if field.name not in common and (section, field.name) not in NO_KEYS]


def _default(section: type[msgspec.Struct], field: msgspec.structs.FieldInfo) -> str:
    """Return a field's default as the documentation writes it."""
    if field.required:
        return "required"
    if (section, field.name) == (ExecConfig, "timeout"):
        return "the period"
    value: Any = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
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


HEADINGS = {
    "## The agent's file": Config,
    "### Every plugin's keys": PluginConfig,
    "### `type: exec`": ExecConfig,
    **{f"### `{path}`": section for path, section in _sections(Config).items() if path and _own_fields(section)},
}


@pytest.mark.parametrize("heading", HEADINGS)
def test_documentation_names_every_key(heading: str) -> None:
    """docs/configuration.md lists each section's keys with their defaults: all of them and no other."""
    section = HEADINGS[heading]
    expected = {field.name: _default(section, field) for field in _own_fields(section)}
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


def _shown_keys(name: str, folder: Path) -> dict[str, Any]:
    """Return what a sample shows, in use or as an option."""
    root = compose(Path(_uncommented(name, folder)).read_text(encoding="utf-8"), name).root
    assert root is not None
    shown = plain(root)
    assert isinstance(shown, dict)
    return {key.replace("-", "_"): value for key, value in shown.items()}


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
    # The deadline shown is what the default comes to with the default period, as is the timeout.
    plugins: dict[str, Any] = {name: section() for name, section in BUILTIN_SECTIONS.items()}
    plugins["cpu"] = replace(plugins["cpu"], deadline=10.0)
    raid = ExecConfig(type="exec", command=["/usr/local/lib/kon-agent/raid-status"], timeout=Duration(5.0))
    expected = Config(
        client_id="edge-agent-1",
        plugins=PluginsConfig(**plugins, instances={"raid": raid}),
        cache=CacheConfig(path="/tmp/edge_agent.cache"),
        tls=TlsConfig(**examples),
    )
    assert expected == config


def test_agent_sample_shows_every_key(tmp_path: Path) -> None:
    """Each section shows each of its own keys; those of every plugin are shown once, with the first."""
    shown = _shown_keys("agent.yaml", tmp_path)
    common = {field.name for field in msgspec.structs.fields(PluginConfig)}
    assert {field.name for field in _own_fields(Config)} == shown.keys()
    assert {*BUILTIN_SECTIONS, "raid"} == shown["plugins"].keys()
    assert common <= shown["plugins"]["cpu"].keys() | {"type"}
    for path, section in _sections(Config).items():
        if path and section is not PluginsConfig:
            parent, _, name = path.rpartition(".")
            keys = (shown[parent] if parent else shown)[name] or {}
            assert {field.name for field in _own_fields(section)} == keys.keys() - common, path
    assert {field.name for field in _own_fields(ExecConfig)} | {"type"} == shown["plugins"]["raid"].keys()


def test_receiver_sample_shows_every_key(tmp_path: Path) -> None:
    """The receiver's sample shows each key of its schema."""
    shown = _shown_keys("receiver.yaml", tmp_path)
    assert {field.name for field in msgspec.structs.fields(ReceiverConfig)} == shown.keys()


def test_receiver_sample_loads(tmp_path: Path) -> None:
    """etc/receiver.yaml is valid, with its options switched on as well."""
    assert ReceiverConfig() == load_receiver(str(ROOT / "etc/receiver.yaml"))
    config = load_receiver(_uncommented("receiver.yaml", tmp_path))
    assert (str(tmp_path / "server.pem"), str(tmp_path / "ca.pem")) == (config.cert, config.client_ca)
    assert ReceiverConfig().store == config.store
