"""Examinations: what a child's answer may be, and what real children answer."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kon_agent import examination, inquiry
from kon_agent.catalog import Catalog
from kon_agent.config.document import compose
from kon_agent.config.foreign import Exhibit, Verdict
from kon_agent.config.mistake import Place
from kon_agent.errors import PluginError
from kon_agent.examination import Answer, Examiner, decode, examine
from kon_agent.inquiry import EXIT_GRACE_S, Question, Reply, ask
from kon_agent.linux import privileges

HEAD = "from kon_agent.plugins import Duration, PluginConfig, plugin\n"
NEEDY = f"""{HEAD}
class NeedyConfig(PluginConfig, frozen=True, kw_only=True):
    path: str
    pause: Duration = Duration(1)
    period: Duration = Duration(30)

@plugin("needy", config=NeedyConfig, reads=lambda config: ["/var/log", config.path], network=True)
class Needy:
    '''Read a file.

    At length.
    '''
    def collect(self): return []
"""


def judge(tmp_path: Path, code: str, section: str = "path: /x") -> Verdict:
    """Return the verdict on a section of a plugin that is this code."""
    (verdict,) = examine([exhibit_of(tmp_path, code, section)], "nobody")
    return verdict


def exhibit_of(tmp_path: Path, code: str, section: str) -> Exhibit:
    """Return a section of a plugin that is this code."""
    folder = tmp_path / "plugins.d"
    folder.mkdir(mode=0o755, exist_ok=True)
    file = folder / "needy.py"
    file.write_text(code)
    file.chmod(0o644)
    origin = Catalog(str(folder)).find("needy")
    node = compose(section, "agent.yaml").root
    assert origin is not None and node is not None
    return Exhibit("needy", origin, node, file="agent.yaml", path="plugins.needy")


@pytest.fixture(autouse=True)
def as_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where children could be neither the same user nor another."""
    if os.geteuid() == 0 and not privileges.current_privileges().can_change_user:
        pytest.skip("needs CAP_SETUID and CAP_SETGID, or not to be root")


def test_a_right_section(tmp_path: Path) -> None:
    """What the plugin needs with this configuration, its own defaults, and what it says of itself."""
    expected = Verdict(
        defaults={"period": 30.0}, reads=("/var/log", "/x"), has_network=True, description="Read a file."
    )
    assert expected == judge(tmp_path, NEEDY)


def test_a_wrong_section(tmp_path: Path) -> None:
    """Every mistake with its place in the file, judged by the plugin's own types."""
    verdict = judge(tmp_path, NEEDY, "pause: soon\npuase: 1")
    assert [
        "agent.yaml:1:8: plugins.needy.pause: 'soon' is not a duration; write 100ms, 5s, 1m, 2h or 7d",
        "agent.yaml:2:1: plugins.needy.puase: unknown key; did you mean 'pause'?",
        "agent.yaml:1:1: plugins.needy: needs 'path'",
    ] == [str(mistake) for mistake in verdict.mistakes]


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name' ("),
        ("import sys\nsys.exit('no')", "SystemExit: no ("),
        ("import os\nos.kill(os.getpid(), 9)", "its process killed by SIGKILL"),
        (NEEDY.replace('plugin("needy"', 'plugin("other"'), "is found as 'needy' and calls itself 'other'"),
        (NEEDY.replace('"/var/log"', '"var/log"'), "reads 'var/log', which is not an absolute path"),
        (NEEDY.replace('"/var/log"', "1 / 0"), "ZeroDivisionError: division by zero ("),
    ],
)
def test_a_failure_says_why(tmp_path: Path, code: str, failure: str) -> None:
    """In one line, with the place in the plugin's code."""
    assert failure in judge(tmp_path, code).failure


def test_a_hang_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the deadline the child is killed, whatever it does."""
    monkeypatch.setattr(examination, "DEADLINE_S", 0.5)
    verdict = judge(tmp_path, "import signal, time\nsignal.signal(signal.SIGABRT, signal.SIG_IGN)\ntime.sleep(1000)")
    assert "hung: no answer within 0.5 s" in verdict.failure


def test_many_that_hang_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight that ignore SIGABRT take the time of one: the supervisor waits meanwhile."""
    monkeypatch.setattr(examination, "DEADLINE_S", 0.5)
    code = "import signal, time\nsignal.signal(signal.SIGABRT, signal.SIG_IGN)\ntime.sleep(1000)"
    exhibits = [exhibit_of(tmp_path, code, f"path: /{number}") for number in range(8)]
    began_s = time.monotonic()
    verdicts = Examiner()(exhibits, "nobody")
    assert ({True}, True) == (
        {"hung: no answer within 0.5 s" in verdict.failure for verdict in verdicts},
        time.monotonic() - began_s < 0.5 + 4 * EXIT_GRACE_S,  # one after another would take the grace of each
    )


def test_after_a_hang_the_rest_hurries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many hang, whoever waits for the reload learns it in time."""
    monkeypatch.setattr(examination, "DEADLINE_S", 0.5)
    monkeypatch.setattr(examination, "AFTER_HANG_S", 0.2)
    monkeypatch.setattr(inquiry, "MAX_AT_ONCE", 1)
    code = "import time\ntime.sleep(1000)"
    exhibits = [exhibit_of(tmp_path, code, f"path: /{number}") for number in range(3)]
    failures = [verdict.failure.partition(": ")[2] for verdict in Examiner()(exhibits, "nobody")]
    assert [
        "hung: no answer within 0.5 s",
        "hung: no answer within 0.2 s",
        "not asked: those before it hung",
    ] == failures


def test_what_a_plugin_prints_is_no_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It goes to the log, and standard output stays clean."""
    assert "" == judge(tmp_path, f"print('hello')\n{NEEDY}").failure
    said = capfd.readouterr()
    assert ("", True) == (said.out, "hello" in said.err)


def test_what_was_right_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While section and code are the same; what was wrong is, and so is what has changed."""
    asked: list[int] = []

    def count(questions: Sequence[Question], *others: Any) -> list[Reply]:
        asked.append(len(questions))
        return ask(questions, *others)

    monkeypatch.setattr(examination, "ask", count)
    examiner = Examiner()
    right, wrong = exhibit_of(tmp_path, NEEDY, "path: /x"), exhibit_of(tmp_path, NEEDY, "path: 7")
    first = examiner([right, wrong], "nobody")
    moved = msgspec.structs.replace(right, place=Place(7, 7))
    assert first == examiner([moved, wrong], "nobody")
    examiner([exhibit_of(tmp_path, NEEDY + "\n", "path: /x")], "nobody")
    assert [2, 1, 1] == asked


def test_a_refused_file_is_not_run(tmp_path: Path) -> None:
    """Its refusal is the verdict."""
    origin = msgspec.structs.replace(Catalog(str(tmp_path)).find("x") or _origin(), refusal="belongs to others")
    node = compose("{}", "f").root
    assert node is not None
    assert [Verdict(failure="belongs to others")] == examine([Exhibit("x", origin, node)], "nobody")


def _origin() -> examination.Origin:
    return examination.Origin("x", "file", "/nowhere/x.py")


def test_an_answer_is_decoded() -> None:
    """What an honest child says arrives as it was said."""
    answer = Answer(reads=["/a"], has_network=True, defaults={"period": 1.5, "deadline": None})
    assert answer == decode(msgspec.json.encode(answer))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"reads": ["relative"]}',
        b'{"reads": ["/a\\u0000b"]}',
        b'{"reads": [%s]}' % b",".join([b'"/a"'] * 33),
        b'{"reads": ["/%s"]}' % (b"a" * 5000),
        b'{"has_network": 1}',
        b'{"unknown": 1}',
        b'{"failure": "%s"}' % (b"a" * 3000),
        b'{"mistakes": [{"line": -1, "column": 1, "path": "", "what": ""}]}',
        b'{"defaults": {"period": [1]}}',
    ],
)
def test_nonsense_is_no_answer(data: bytes) -> None:
    """A hostile child's answer is refused as a whole."""
    with pytest.raises(PluginError, match="its answer makes no sense"):
        decode(data)


@pytest.mark.parametrize("said", [b'{"failure": "a\\u001b[2Jb"}', b'{"\\u001b[2J%s": 1}' % (b"a" * 9000)])
def test_nothing_they_say_moves_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """What is shown of an answer is printable, and short, also where it is refused."""
    monkeypatch.setattr(examination, "ask", lambda *_: [Reply(said)])
    failure = judge(tmp_path, NEEDY).failure
    assert (True, True) == (failure.isprintable(), len(failure) < examination.MAX_TEXT + 200)
