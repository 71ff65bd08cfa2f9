"""A change in a file's text: only the intended line differs, and the text says what was intended."""

from __future__ import annotations

import difflib
import errno
import os
from pathlib import Path

import pytest

from kon_agent.config.edit import Addition, Change, Removal, Setting, edited
from kon_agent.config.load import check_text, load
from kon_agent.config.persist import persist
from kon_agent.config.schema import Config, Duration
from kon_agent.config.section import parse_section
from kon_agent.errors import ConfigError

SAMPLE = Path(__file__).parents[3] / "etc" / "agent.yaml"
OFF = Setting("cpu", "enable", False)
FAST = Setting("cpu", "period", Duration(1.0))
SETTINGS = {"type": "exec", "period": "1s", "command": "[/bin/ups, -v]"}
UPS = Addition("ups", parse_section("ups", SETTINGS, Config()), SETTINGS)


def settings(text: str) -> Config:
    """Return what a text means."""
    config, mistakes = check_text(text, "agent.yaml")
    assert config is not None, mistakes
    return config


def change(text: str, wanted: Change) -> list[str]:
    """Return what a change takes out (-) and puts in (+), line by line; it means what it should."""
    new = edited(text, wanted)
    assert wanted.applied(settings(text)) == settings(new)
    lines = difflib.ndiff(text.splitlines(keepends=True), new.splitlines(keepends=True))
    return [line[0] + line[2:] for line in lines if line[0] in "+-"]


@pytest.mark.parametrize(
    ("text", "wanted", "difference"),
    [
        pytest.param(
            "plugins:\n  cpu:\n    enable: true   # why\n    period: 5s\n",
            OFF,
            ["-    enable: true   # why\n", "+    enable: false   # why\n"],
            id="a value, its comment stays",
        ),
        pytest.param(
            "plugins:\n  cpu:\n    period: '5s' # quoted\n",
            FAST,
            ["-    period: '5s' # quoted\n", "+    period: '1s' # quoted\n"],
            id="quotes stay",
        ),
        pytest.param(
            "plugins:\n  cpu:\n    period:\n      5s\n", FAST, ["-      5s\n", "+      1s\n"], id="below its key"
        ),
        pytest.param(
            "plugins:\n  cpu: {enable: true, period: 5s} # flow\n",
            OFF,
            [
                "-  cpu: {enable: true, period: 5s} # flow\n",
                "+  cpu: {enable: false, period: 5s} # flow\n",
            ],
            id="flow",
        ),
        pytest.param(
            "plugins:\n  cpu: {period: 5s}\n",
            OFF,
            ["-  cpu: {period: 5s}\n", "+  cpu: {period: 5s, enable: false}\n"],
            id="flow without the key",
        ),
        pytest.param("plugins: {}\n", OFF, ["-plugins: {}\n", "+plugins: {cpu: {enable: false}}\n"], id="empty flow"),
        pytest.param(
            "plugins: {cpu: }\n",
            OFF,
            ["-plugins: {cpu: }\n", "+plugins: {cpu: {enable: false} }\n"],
            id="flow, unwritten",
        ),
        pytest.param(
            "plugins: {cpu: {deadline: }}\n",
            OFF,
            ["-plugins: {cpu: {deadline: }}\n", "+plugins: {cpu: {deadline: , enable: false }}\n"],
            id="flow, behind the unwritten",
        ),
        pytest.param(
            "plugins: {cpu}\n", OFF, ["-plugins: {cpu}\n", "+plugins: {cpu: {enable: false}}\n"], id="flow, bare key"
        ),
        pytest.param(
            "plugins:\n  cpu: ~ # nothing\n",
            OFF,
            ["-  cpu: ~ # nothing\n", "+  cpu: {enable: false} # nothing\n"],
            id="null in words",
        ),
        pytest.param(
            "plugins:\n    cpu:\n        period: 5s\n        # of cpu\n    # of memory\n    memory:\n",
            OFF,
            ["+        enable: false\n"],
            id="a key more, indented as the others",
        ),
        pytest.param(
            "plugins:\n  cpu:   # here\n    #enable: true\n  memory:\n",
            OFF,
            ["+    enable: false\n"],
            id="a section of comments",
        ),
        pytest.param(
            "plugins:\n  memory:\n    period: 5s\n", OFF, ["+  cpu:\n", "+    enable: false\n"], id="no section"
        ),
        pytest.param(
            "server: 'quic://h:1'\n\n# the end\n",
            OFF,
            ["+plugins:\n", "+  cpu:\n", "+    enable: false\n"],
            id="no plugins",
        ),
        pytest.param("plugins:\n# nothing yet\n", OFF, ["+  cpu:\n", "+    enable: false\n"], id="plugins without any"),
        pytest.param("", OFF, ["+plugins:\n", "+  cpu:\n", "+    enable: false\n"], id="empty"),
        pytest.param("# only this\n", FAST, ["+plugins:\n", "+  cpu:\n", "+    period: 1s\n"], id="comments only"),
        pytest.param(
            "plugins:\r\n  cpu:\r\n    enable: true\r\n",
            OFF,
            ["-    enable: true\r\n", "+    enable: false\r\n"],
            id="CRLF",
        ),
        pytest.param("plugins:\r\n  cpu:\r\n  agent:\r\n", OFF, ["+    enable: false\r\n"], id="CRLF, a line more"),
        pytest.param(
            "plugins:\n  cpu:\n    enable: true", OFF, ["-    enable: true", "+    enable: false"], id="no last end"
        ),
        pytest.param(
            "plugins:\n  cpu:\n    period: 5s",
            OFF,
            ["-    period: 5s", "+    period: 5s\n", "+    enable: false"],
            id="no last end, a line more",
        ),
        pytest.param(
            '{\n  "plugins": {\n    "cpu": {\n      "period": "5s"\n    }\n  }\n}\n',
            OFF,
            ['-      "period": "5s"\n', '+      "period": "5s",\n', '+      "enable": false\n'],
            id="JSON",
        ),
        pytest.param(
            "plugins:\n  load: {enable: false}\n",
            Setting("netdev", "period", Duration(60)),
            ["+  netdev:\n", "+    enable: false\n", "+    period: 1m\n"],
            id="what is off stays off",
        ),
        pytest.param(
            "plugins:\n  my-ups: {type: exec, command: [/bin/true], ring-size: 64KiB}\nlog: {}\n",
            Setting("my-ups", "enable", False),
            [
                "-  my-ups: {type: exec, command: [/bin/true], ring-size: 64KiB}\n",
                "+  my-ups: {type: exec, command: [/bin/true], ring-size: 64KiB, enable: false}\n",
            ],
            id="an instance",
        ),
        pytest.param(
            "---\nplugins:\n  cpu:\n  agent:\n    #enable: true\n\n# The log.\nlog: {}\n...\n",
            UPS,
            ["+  ups:\n", "+    type: exec\n", "+    period: 1s\n", "+    command: [/bin/ups, -v]\n"],
            id="add, behind the last one's comments",
        ),
        pytest.param(
            "plugins: {cpu: {period: 5s}}\n",
            UPS,
            [
                "-plugins: {cpu: {period: 5s}}\n",
                "+plugins: {cpu: {period: 5s}, ups: {type: exec, period: 1s, command: [/bin/ups, -v]}}\n",
            ],
            id="add to flow",
        ),
        pytest.param(
            "plugins:\n  # u\n  ups:\n    type: exec\n    command:\n    - /bin/ups\n    #read: []\n  # m\n  cpu:\n",
            Removal("ups"),
            ["-  ups:\n", "-    type: exec\n", "-    command:\n", "-    - /bin/ups\n", "-    #read: []\n"],
            id="remove",
        ),
        pytest.param(
            "plugins:\n  ups: {type: cpu}\nlog: {level: info}\n",
            Removal("ups"),
            ["-  ups: {type: cpu}\n"],
            id="remove the only one",
        ),
        pytest.param(
            "plugins: {a: {type: cpu}, b: {type: cpu}, c: {type: cpu}}\n",
            Removal("b"),
            [
                "-plugins: {a: {type: cpu}, b: {type: cpu}, c: {type: cpu}}\n",
                "+plugins: {a: {type: cpu}, c: {type: cpu}}\n",
            ],
            id="remove from flow",
        ),
        pytest.param(
            "plugins: {a: {type: cpu}, c: {type: cpu}}\n",
            Removal("c"),
            ["-plugins: {a: {type: cpu}, c: {type: cpu}}\n", "+plugins: {a: {type: cpu}}\n"],
            id="remove the last of flow",
        ),
        pytest.param("plugins:\n  cpu:\n", Removal("ups"), [], id="remove what is not there"),
    ],
)
def test_only_the_intended_line_differs(text: str, wanted: Change, difference: list[str]) -> None:
    """Whatever the file looks like."""
    assert difference == change(text, wanted)


@pytest.mark.parametrize(
    ("wanted", "difference"),
    [
        (OFF, ["-    enable: true\n", "+    enable: false\n"]),
        (FAST, ["-    period: 5s\n", "+    period: 1s\n"]),
        (Setting("memory", "period", Duration(0.5)), ["+    period: 500ms\n"]),
        (UPS, ["+  ups:\n", "+    type: exec\n", "+    period: 1s\n", "+    command: [/bin/ups, -v]\n"]),
    ],
)
def test_the_sample(wanted: Change, difference: list[str]) -> None:
    """The file everybody starts from, which is mostly comments."""
    assert difference == change(SAMPLE.read_text(), wanted)


def test_what_is_added_is_removed_again() -> None:
    """Without a trace."""
    text = SAMPLE.read_text()
    assert text == edited(edited(text, UPS), Removal("ups"))


# ── a section, key by key ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "exec"}, "needs 'command'"),
        ({"type": "exec", "command": "[ups]"}, "plugins.ups.command: 'ups' is not an absolute path"),
        ({"type": "cpu", "period": "10ms"}, "plugins.ups.period: 10ms is too short"),
        ({"type": "cpu", "periode": "1s"}, "plugins.ups.periode: unknown key; did you mean 'period'?"),
        ({"type": "cpuu"}, "plugins.ups.type: unknown plugin; did you mean 'cpu'?"),
        ({"type": "agent"}, "there can be one 'agent' only"),
        ({"period": "1s"}, "ups"),
        ({"type": "cpu", "per_core": "[1"}, "per_core: not valid YAML"),
        ({"type": "cpu", "period": "1s # fast"}, "period: holds a comment"),
        ({"type": "cpu", "period": "1s\n  enable: false"}, "period: a value is one line"),
        ({"type": "cpu", "a: b": "1"}, "a: b: is not a key"),
        ({"type": "cpu", "per_core": "a: b"}, "not valid YAML"),
    ],
)
def test_a_mistake_names_its_key(given: dict[str, str], message: str) -> None:
    """As the file's would."""
    with pytest.raises(ConfigError) as caught:
        parse_section("ups", given, Config())
    assert message in str(caught.value)


def test_a_section_is_what_the_file_would_make_of_it() -> None:
    """Quantities, lists, keys with `-`."""
    given = {"type": "disk", "ring-size": "64KiB", "exclude_devices": '["loop*", "#x"]'}
    section = parse_section("noise", given, Config())
    assert (65536, ["loop*", "#x"], "disk") == (section.ring_size, section.exclude_devices, section.type)  # type: ignore[attr-defined]


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    """Mode, owner, a byte order mark and the link to it stay; nothing else is left in the folder."""
    file, link = tmp_path / "real.yaml", tmp_path / "agent.yaml"
    file.write_bytes(b"\xef\xbb\xbfplugins:\r\n  cpu: {enable: true}\r\n")
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 1, 2)
    before = file.stat()
    link.symlink_to("real.yaml")
    persist(str(link), OFF)
    after = file.stat()
    assert b"\xef\xbb\xbfplugins:\r\n  cpu: {enable: false}\r\n" == file.read_bytes()
    assert (before.st_mode, before.st_uid, before.st_gid) == (after.st_mode, after.st_uid, after.st_gid)
    assert link.is_symlink() and {file, link} == set(tmp_path.iterdir())
    assert not load(str(link)).plugins.cpu.enable


def test_what_says_so_already_is_left_alone(tmp_path: Path) -> None:
    """A default that is wanted needs no line."""
    file = tmp_path / "agent.yaml"
    file.write_text("# nothing\n")
    before = file.stat()
    persist(str(file), Setting("cpu", "enable", True))
    assert before == file.stat()


@pytest.mark.parametrize(
    ("text", "wanted", "message"),
    [
        ("plugins: {cpu: {periode: 1s}}\n", OFF, "1:17: plugins.cpu.periode"),
        ("plugins: {ups: {type: cpu}}\n", UPS, "in the file already"),
        ("plugins:\n", Setting("ups", "enable", False), "without --persist"),
        ("? plugins\n: ? cpu\n  : {period: 1s}\n", UPS, "edit it by hand"),
    ],
)
def test_a_file_that_cannot_be_edited_is_left_as_it_is(tmp_path: Path, text: str, wanted: Change, message: str) -> None:
    """And the error says why."""
    file = tmp_path / "agent.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        persist(str(file), wanted)
    assert (text, [file]) == (file.read_text(), list(tmp_path.iterdir()))


@pytest.mark.parametrize(("code", "remedy"), [(errno.EIO, "by hand"), (errno.ENOSPC, "make room")])
def test_a_failing_disk_leaves_the_file_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    """Nothing is left behind, and the error names the file and what to do."""
    file = tmp_path / "agent.yaml"
    file.write_text("plugins:\n")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=rf"agent.yaml: cannot be written: {os.strerror(code)}; .*{remedy}"):
        persist(str(file), OFF)
    assert ("plugins:\n", [file]) == (file.read_text(), list(tmp_path.iterdir()))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """There is nothing to edit."""
    with pytest.raises(ConfigError, match="does not exist"):
        persist(str(tmp_path / "agent.yaml"), OFF)
