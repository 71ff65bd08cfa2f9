"""Loading configuration files: what they become, and what is said when they are wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kon_agent.config import MAX_CONFIG_BYTES, Config, check, check_receiver, load, load_receiver
from kon_agent.config.schema import TYPES
from kon_agent.errors import ConfigError

SEED = """\
server: "quic://localhost:7843"
client-id: "edge-agent-1"
plugins:
  cpu:
    enable: true
    period: 5s
  ebpf:
    enable: true
    period: 5s
cache:
  path: /tmp/edge_agent.cache
  max_size: 50MB
"""


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes a configuration file and returns its name."""

    def write_file(content: str | bytes) -> str:
        file = tmp_path / "agent.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(file)

    return write_file


def mistakes(path: str) -> list[str]:
    """Return the file's mistakes as `line:column: path: what`."""
    config, found = check(path)
    assert (config is None) == bool(found)
    return [str(mistake).removeprefix(f"{path}:").strip() for mistake in found]


def test_the_seed_loads_verbatim(write) -> None:
    """The original's example is valid as it stands and means what it says."""
    config = load(write(SEED))
    assert ["quic://localhost:7843"] == config.servers()
    assert "edge-agent-1" == config.client_id
    assert (True, 5.0) == (config.plugins.cpu.enable, config.plugins.cpu.period)
    assert (True, 5.0) == (config.plugins.ebpf.enable, config.plugins.ebpf.period)
    assert ("/tmp/edge_agent.cache", 50_000_000) == (config.cache.path, config.cache.max_size)
    assert Config().plugins.disk == config.plugins.disk


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n", "\ufeff", "{}", "plugins:\ntls:\nlog: ~\n"])
def test_nothing_means_defaults(write, text: str) -> None:
    """An empty file, and a section with nothing in it, have every default."""
    assert Config() == load(write(text))


def test_dash_and_underscore_are_one(write) -> None:
    """Keys may be written with either."""
    config = load(write("client_id: a\nshutdown-timeout: 1m\ncache: {max-age: 2h}"))
    assert ("a", 60.0, 7200.0) == (config.client_id, config.shutdown_timeout, config.cache.max_age)


def test_every_kind_of_value(write) -> None:
    """Lists, shares, numbers, choices, nested sections and absent options arrive as written."""
    config = load(
        write(
            'server: ["quic://a:1", "quic://[::1]:2"]\nplugins: {ebpf: {interfaces: [eth*], exclude: []}}\n'
            "limits: {cpu: 150%}\nbatch: {max_records: 7, max_bytes: 8192}\nlog: {level: debug}\ntls: {ca: }"
        )
    )
    assert ["quic://a:1", "quic://[::1]:2"] == config.servers()
    assert (["eth*"], []) == (config.plugins.ebpf.interfaces, config.plugins.ebpf.exclude)
    assert (1.5, 7, 8192, "debug", None) == (
        config.limits.cpu,
        config.batch.max_records,
        config.batch.max_bytes,
        config.log.level,
        config.tls.ca,
    )


def test_relative_paths_start_at_the_file(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is relative to the folder of its file, wherever the process stands."""
    name = write("cache: {path: ../spool}\ncontrol: {socket: c.sock}\ntls: {ca: pki/ca.pem, token_file: /t}")
    monkeypatch.chdir(tmp_path.parent)
    config = load(os.path.relpath(name))
    assert str(tmp_path.parent / "spool") == config.cache.path
    assert str(tmp_path / "c.sock") == config.control.socket
    assert (str(tmp_path / "pki/ca.pem"), "/t") == (config.tls.ca, config.tls.token_file)


WRONG = [
    # keys
    ("client-idd: x", "1:1: client-idd: unknown key; did you mean 'client-id'?"),
    ("cache: {max_sise: 1MB}", "1:9: cache.max_sise: unknown key; did you mean 'max_size'?"),
    ("plugins: {cup: {}}", "1:11: plugins.cup: unknown plugin; did you mean 'cpu'?"),
    ("plugins: {zzz: {}}", f"1:11: plugins.zzz: unknown plugin; known are {', '.join(TYPES)}"),
    ("user: a\nuser: b", "2:1: user: given twice, first on line 1; keep one of the two"),
    (
        "client_id: a\nclient-id: b",
        "2:1: client-id: given twice, first as 'client_id' on line 1; keep one of the two",
    ),
    ("? [a]\n: b", "1:3: a key must be a single word"),
    # types
    ("- a", "1:1: expected a section of keys and values, got a list"),
    ("hello", "1:1: expected a section of keys and values, got 'hello'"),
    ("plugins: [cpu]", "1:10: plugins: expected a section of keys and values, got a list"),
    ("client-id: 7", "1:12: client-id: expected text from 1 to 256 characters, got 7; put it in quotes"),
    ("user: [a]", "1:7: user: expected text from 1 to 256 characters, got a list"),
    ("user:\nlog:", "1:1: user: has no value; write one, or remove the key to have its default"),
    (
        "tls: {insecure_skip_verify: no}",
        "1:29: tls.insecure_skip_verify: expected true or false, got 'no'; write false",
    ),
    (
        "plugins: {cpu: {enable: on}}",
        "1:25: plugins.cpu.enable: expected true or false, got 'on'; write true",
    ),
    ("plugins: {cpu: {enable: 1}}", "1:25: plugins.cpu.enable: expected true or false, got 1; write true"),
    ("plugins: {ebpf: {exclude: lo}}", "1:27: plugins.ebpf.exclude: expected a list, got 'lo'"),
    (
        "plugins: {ebpf: {exclude: [lo, 5]}}",
        "1:32: plugins.ebpf.exclude[1]: expected text from 1 to 256 characters, got 5; put it in quotes",
    ),
    (
        "log: {level: warn}",
        "1:14: log.level: expected one of debug, info, warning, error, got 'warn'; did you mean 'warning'?",
    ),
    # values
    (
        "plugins: {cpu: {period: 5 parsecs}}",
        "1:25: plugins.cpu.period: '5 parsecs' is not a duration; write 100ms, 5s, 1m, 2h or 7d",
    ),
    (
        "plugins: {cpu: {period: 99ms}}",
        "1:25: plugins.cpu.period: 99ms is too short; the shortest period is 100ms",
    ),
    ("plugins: {cpu: {deadline: 0}}", "1:27: plugins.cpu.deadline: must be more than 0"),
    (
        "plugins: {cpu: {ring_size: 100KiB}}",
        "1:28: plugins.cpu.ring_size: must be a power of two from 16KiB to 64MiB; did you mean '128KiB'?",
    ),
    (
        "plugins: {cpu: {ring_size: 1GiB}}",
        "1:28: plugins.cpu.ring_size: must be a power of two from 16KiB to 64MiB; did you mean '64MiB'?",
    ),
    ("cache: {max_size: 0}", "1:19: cache.max_size: must be more than 0"),
    ("cache: {max_size: .inf}", "1:19: cache.max_size: inf is not a size; write 50MB (10^6) or 64KiB (2^10)"),
    ('cache: {path: ""}', "1:15: cache.path: expected text from 1 to 256 characters, got ''"),
    ('cache: {path: "a\\0b"}', "1:15: cache.path: holds a character that cannot be printed; remove it"),
    ("limits: {cpu: .nan}", "1:15: limits.cpu: nan is not a share of a core; write 2% or 0.02"),
    ("limits: {cpu: 65}", "1:15: limits.cpu: 65 is out of range; a share is from 0% to 6400%"),
    ("batch: {max_records: 0}", "1:22: batch.max_records: expected a whole number from 1 to 10000, got 0"),
    ("batch: {max_bytes: 1KiB}", "1:20: batch.max_bytes: must be from 8KiB to 512KiB"),
    ("plugins: {flows: {memory: 1GiB}}", "1:27: plugins.flows.memory: must be from 128KiB to 64MiB"),
    ("server: []", "1:9: server: is an empty list; name at least one quic://host:port"),
    (
        "server: ['quic://a:1', 'quic://b:x']",
        "1:24: server[1]: 'quic://b:x' is not quic://host:port: the port must be a number from 1 to 65535",
    ),
    ("tls: {cert: a.pem}", "1:7: tls.cert: needs 'key' beside it; give both or neither"),
    ("tls:\n  key: a.key", "2:3: tls.key: needs 'cert' beside it; give both or neither"),
    # YAML
    ("user: &u x", "1:7: anchors are not allowed; write the value out instead of '&u'"),
    ("user: *u", "1:7: aliases are not allowed; write the value out instead of '*u'"),
    ("user: !!str x", "1:7: tags are not allowed; remove 'tag:yaml.org,2002:str'"),
    ("user: a\n---\nuser: b", "2:1: a second document starts here; keep one document per file"),
    ("server: " + "[" * 50, "1:24: nested deeper than 16 levels; no setting is"),
    ("user: a: b", "1:8: not valid YAML: mapping values are not allowed here"),
    ("user: a\x07", "1:8: the character U+0007 is not allowed in YAML; remove it"),
    (
        "log:\n\tlevel: info",
        "2:1: not valid YAML: while scanning for the next token: found character '\\t' that cannot start any "
        "token; indent with spaces, not with tabs",
    ),
    ('user: "\\UFFFFFFFF"', "1:1: not valid YAML: what follows holds an impossible character escape"),
]


@pytest.mark.parametrize(("text", "line"), WRONG, ids=[line.split(": ", 1)[1][:50] for _, line in WRONG])
def test_each_mistake_is_located(write, text: str, line: str) -> None:
    """Each kind of mistake is one line that says where, what, and what to write instead."""
    assert line in mistakes(write(text))


def test_all_mistakes_at_once(write) -> None:
    """One run reports everything, in the order of the file, once each."""
    text = "servr: x\nplugins:\n  cpu: {enable: yes, period: 1}\n  dsk: {}\ntls: {cert: c}\nlimits: {cpu: -1}\n"
    assert ["1:1", "3:17", "4:3", "5:7", "6:15"] == [":".join(m.split(":")[:2]) for m in mistakes(write(text))]


def test_mistakes_before_a_syntax_error_are_found(write) -> None:
    """A syntax error hides what follows it, not what precedes it; what it cuts off is not judged."""
    found = mistakes(write("servr: x\ntls:\n  cert: a\n  key: [\nuser: b"))
    assert ["1:1: servr", "5:8: not valid YAML"] == [":".join(m.split(":")[:3]) for m in found]


def test_yaml_bomb_is_refused(write) -> None:
    """Nested aliases are named as what they are and expand to nothing."""
    bomb = "a: &a [x, x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{f'*{chr(97 + n)},' * 9}]\n" for n in range(20))
    assert any("aliases are not allowed" in line for line in mistakes(write(bomb)))


def test_load_raises_every_line(write) -> None:
    """ConfigError's message holds one located line per mistake; its exit code is EX_CONFIG."""
    name = write("a: 1\nb: 2")
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert [f"{name}:1:1", f"{name}:2:1"] == [line.split(": ")[0] for line in str(caught.value).splitlines()]
    assert 78 == caught.value.exit_code


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is named, with what to do."""
    with pytest.raises(ConfigError, match=r"/no\.yaml: does not exist; name an existing file with -c"):
        load(str(tmp_path / "no.yaml"))


def test_directory(tmp_path: Path) -> None:
    """A directory is called one."""
    with pytest.raises(ConfigError, match="is a directory; name the file in it"):
        load(str(tmp_path))


def test_unreadable_file(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file this user may not read is said to be one."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")  # root, who runs CI, is never refused

    name = write("")
    monkeypatch.setattr("builtins.open", refuse)
    _, found = check(name)
    monkeypatch.undo()
    assert [f"{name}: may not be read by this user; run as root, or change the file's permissions"] == [
        str(mistake) for mistake in found
    ]


def test_oversized_file(write) -> None:
    """A file over the bound is refused before it is parsed."""
    with pytest.raises(ConfigError, match=f"is larger than {MAX_CONFIG_BYTES} bytes"):
        load(write(b"#" * (MAX_CONFIG_BYTES + 1)))


def test_not_utf8(write) -> None:
    """A byte that is no UTF-8 is located by character."""
    assert ["2:8: is not UTF-8 text (byte 0xff); save the file as UTF-8"] == mistakes(
        write("user: a\n# ééé: ".encode() + b"\xff")
    )


def test_receiver_file(write, tmp_path: Path) -> None:
    """The receiver's file is read by the same rules into its own shape."""
    config = load_receiver(write("listen: 0.0.0.0:7843\nstore: s.db\ncert: c.pem\nkey: /k\nlog: {format: json}"))
    assert ("0.0.0.0:7843", str(tmp_path / "s.db"), str(tmp_path / "c.pem"), "/k", "json") == (
        config.listen,
        config.store,
        config.cert,
        config.key,
        config.log.format,
    )


def test_receiver_mistakes(write) -> None:
    """The receiver's own rules hold: a listen address, a key beside its certificate."""
    _, found = check_receiver(write("listen: '7843'\ncert: c.pem\nclient-id: x"))
    assert ["listen", "cert", "client-id"] == [mistake.path for mistake in found]


def test_import_is_light() -> None:
    """Importing the package loads neither ruamel.yaml nor anything beyond the leaves."""
    program = (
        "import sys, kon_agent.config\n"
        "heavy = ('ruamel', 'aioquic', 'google', 'kon_agent.plugins', 'kon_agent.wire')\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=_import_path(),
    )
    assert "[]" == done.stdout.strip()


def _import_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


WORDS = [
    "server",
    "client-id",
    "plugins",
    "cpu",
    "period",
    "tls",
    "cert",
    "5s",
    "true",
    "yes",
    ".nan",
    "1e999",
    "0x",
]
SIGNS = [
    "{",
    "}",
    "[",
    "]",
    ", ",
    '"',
    "'",
    ": ",
    "\n",
    "\n  ",
    "\n- ",
    "? ",
    "&a ",
    "*a",
    "!t ",
    "|",
    "#",
    "\\",
    "<<: ",
]
OTHERS = ["%YAML 1.1\n", "---\n", "...\n", "\t", "\u2028", "\x1b", "é"]
FRAGMENTS = st.lists(st.sampled_from([*WORDS, *SIGNS, *OTHERS]), max_size=25).map(lambda parts: "".join(parts).encode())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(FRAGMENTS, st.binary(max_size=60)))
def test_no_file_is_a_traceback(write, content: bytes) -> None:
    """Whatever a file holds, it becomes either settings or mistakes of one line each, never another error."""
    config, found = check(write(content))
    assert (config is None) == bool(found)
    assert all(str(mistake).isprintable() for mistake in found)
