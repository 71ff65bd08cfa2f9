"""Sections of plugins that are not built in: found, examined, judged. The examiner is the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kon_agent.config import check, load
from kon_agent.config.document import compose, from_plain, plain
from kon_agent.config.foreign import Exhibit, Verdict
from kon_agent.config.mistake import Mistake
from kon_agent.config.schema import Config, Duration, ForeignConfig, Size


class Examiner:
    """Gives the same verdict on everything, and notes what it was asked."""

    def __init__(self, verdict: Verdict = Verdict()) -> None:  # noqa: B008 - it is frozen
        self.verdict = verdict
        self.asked: list[Exhibit] = []
        self.user = ""

    def __call__(self, exhibits: Sequence[Exhibit], user: str) -> list[Verdict]:
        self.asked += exhibits
        self.user = user
        return [self.verdict] * len(exhibits)


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes a configuration beside a plugin folder with the plugin `greeting`."""
    folder = tmp_path / "plugins.d"
    folder.mkdir(mode=0o755)
    (folder / "greeting.py").write_text("raise SystemExit\n")
    (folder / "greeting.py").chmod(0o644)

    def write_file(text: str) -> str:
        file = tmp_path / "agent.yaml"
        file.write_text(f"plugin_dir: plugins.d\n{text}")
        return str(file)

    return write_file


def foreign(config: Config | None, name: str = "greeting") -> ForeignConfig:
    assert config is not None
    section = config.plugins.by_name()[name]
    assert isinstance(section, ForeignConfig)
    return section


def said(mistakes: list[Mistake]) -> list[str]:
    return [f"{each.line}:{each.column}: {each.path}: {each.what}" for each in mistakes]


def test_common_keys_are_typed_and_the_rest_is_kept(write) -> None:
    """Its own keys are plain values, as written: what they mean is for its code to say."""
    section = foreign(load(write("plugins: {greeting: {period: 1m, path: /x, times: [1, 2s], deep: {a: true}}}")))
    assert (True, 60.0) == (section.enable, section.period)
    assert {"period": "1m", "path": "/x", "times": [1, "2s"], "deep": {"a": True}} == section.options
    assert section.origin.target.endswith("/plugins.d/greeting.py")


def test_equal_sections_are_equal(write) -> None:
    """A reload compares: where a section stands and how it is laid out says nothing."""
    one = foreign(load(write("plugins: {greeting: {path: /x}}")))
    assert one == foreign(load(write("plugins:\n  # moved\n\n  greeting:\n    path: /x\n")))
    assert one != foreign(load(write("plugins: {greeting: {path: /y}}")))


def test_several_instances(write) -> None:
    """Each section with the `type` is one of its own."""
    config = load(write("plugins: {a: {type: greeting}, b: {type: greeting, x: 1}}"))
    assert ({}, {"x": 1}) == tuple(
        {key: value for key, value in foreign(config, name).options.items() if key != "type"} for name in "ab"
    )


def test_what_an_examination_shows_is_taken(write) -> None:
    """Needs, and defaults of its own for the common keys, which the file's go before."""
    defaults = {"period": 30.0, "memory_limit": 1 << 20}
    examiner = Examiner(Verdict(reads=("/var/log",), has_network=True, defaults=defaults))
    section = foreign(load(write("user: metrics\nplugins: {greeting: {memory-limit: 8MiB}}"), examiner))
    assert ("metrics", ["greeting"]) == (examiner.user, [exhibit.name for exhibit in examiner.asked])
    assert (("/var/log",), True, "") == (section.reads, section.has_network, section.obstacle)
    assert (Duration(30.0), Size(8 << 20)) == (section.period, section.memory_limit)


@pytest.mark.parametrize("default", [{"period": -1.0}, {"period": "x"}, {"priority": 1000}, {"ring_size": 5}])
def test_senseless_defaults_are_a_mistake(write, default: dict[str, object]) -> None:
    """What a plugin says of the common keys is judged as a file's is."""
    config, mistakes = check(write("plugins: {greeting: }"), Examiner(Verdict(defaults=default)))
    assert config is None
    (line,) = said(mistakes)
    assert line.startswith(f"2:11: plugins.greeting: cannot be used: its own default of {next(iter(default))}: ")


def test_all_mistakes_in_the_order_of_the_file(write) -> None:
    """The agent's, the plugin's own, and what both find, once."""
    name = write("plugins:\n  greeting:\n    enable: yes\n    path: 7\nlimts: 1\n")
    both = Mistake(name, 4, 13, "plugins.greeting.enable", "expected true or false, got 'yes'; write true")
    own = Mistake(name, 5, 11, "plugins.greeting.path", "expected text, got 7; put it in quotes")
    _, mistakes = check(name, Examiner(Verdict(mistakes=(both, own))))
    assert [both, own, Mistake(name, 6, 1, "limts", "unknown key; did you mean 'limits'?")] == mistakes


def test_a_failed_examination_is_a_mistake_at_the_section(write) -> None:
    """For check and reload: it names the section and why."""
    config, mistakes = check(write("plugins:\n  greeting: {}\n"), Examiner(Verdict(failure="ImportError: no")))
    assert (None, ["3:3: plugins.greeting: cannot be used: ImportError: no"]) == (config, said(mistakes))


def test_at_boot_a_failure_is_an_obstacle(write) -> None:
    """No plugin's code keeps the agent from starting."""
    name = write("plugins: {greeting: {}}")
    own = Verdict(mistakes=(Mistake(name, 2, 1, "plugins.greeting.x", "is wrong"),))
    assert "it hung" == foreign(load(name, Examiner(Verdict(failure="it hung")), is_boot=True)).obstacle
    assert "plugins.greeting.x: is wrong" == foreign(load(name, Examiner(own), is_boot=True)).obstacle


def test_at_boot_our_own_keys_are_still_judged(write) -> None:
    """What the agent itself finds wrong with a file is a mistake at any time."""
    config, mistakes = check(write("plugins: {greeting: {period: x}}"), Examiner(), is_boot=True)
    assert config is None
    assert ["plugins.greeting.period"] == [mistake.path for mistake in mistakes]


def test_a_disabled_plugin_may_be_broken(write) -> None:
    """To disable it is the way to keep its section and reload all the same; its own keys are still judged."""
    name = write("plugins: {greeting: {enable: false}}")
    assert "gone" == foreign(load(name, Examiner(Verdict(failure="gone")))).obstacle
    wrong = Verdict(mistakes=(Mistake(name, 2, 1, "plugins.greeting.x", "is wrong"),))
    assert check(name, Examiner(wrong))[0] is None


def test_without_an_examiner_nothing_is_asked(write) -> None:
    """Whoever only looks for the control socket starts no process."""
    assert "" == foreign(load(write("plugins: {greeting: {what: ever}}"))).obstacle


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plugins: {greting: {}}", "2:11: plugins.greting: unknown plugin; did you mean 'greeting'?"),
        ("plugins: {a: {type: greting}}", "2:21: plugins.a.type: unknown plugin; did you mean 'greeting'?"),
        ("plugins: {greeting: [1]}", "2:21: plugins.greeting: expected a section of keys and values, got a list"),
        ("plugins: {greeting: {}, GREETING: {type: greeting}}", "2:25: plugins.GREETING: a plugin's name is made of "
         "lower-case letters, digits, '-' and '_', and begins with a letter"),
        ("plugins: {greeting: {}, a: {type: greeting}, a: {type: cpu}}", "2:46: plugins.a: given twice; keep one of "
         "the two"),
        ("plugins: {cpu: {type: greeting}}", "2:23: plugins.cpu.type: 'cpu' is a plugin; name this section otherwise"),
        ("plugins: {exec: {command: [/x]}}", "2:11: plugins.exec: needs a name of its own, and 'type: exec' beside "
         "its other keys"),
        ("plugins: {greeting: {enable: 1}}", "2:30: plugins.greeting.enable: expected true or false, got 1; write "
         "true"),
    ],
)  # fmt: skip
def test_each_mistake_is_located(write, text: str, line: str) -> None:
    """What can be said without the plugin's code is said at its place."""
    _, mistakes = check(write(text))
    assert line in said(mistakes)


def test_plain_values_and_nodes() -> None:
    """A node made of a plain value means that value."""
    value = {"a": [1, 2.5, "x", True, None], "b": {"c": "5s"}}
    assert value == plain(from_plain(value))
    root = compose("a: [1, 2.5, x, true, ~]\nb: {c: 5s}", "f").root
    assert root is not None
    assert value == plain(root)
