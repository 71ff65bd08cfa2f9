"""The documents: what they name exists, and they name nothing of one machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kon_agent.cli import agent, receiver

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "ebpf/*.md", "protocol/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
OURS = [*DOCUMENTS, *sorted(path for path in (ROOT / "etc").iterdir() if path.is_file())]
PROGRAMS: dict[str, click.Command] = {"kon-agent": agent.main, "kon-receiver": receiver.main}

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_MODULE = re.compile(r"`(kon_agent/[\w/]+\.py)`")
_REPOSITORY_FILE = re.compile(r"`((?:etc|ebpf|protocol|tests)/[\w./-]+\.\w+)`")
# A call stands in code: at the start of a line of a block after its prompt, or right behind a backquote.
_CALL = re.compile(
    r"(?:`|^[$#] (?:[A-Z_]+=\S+ )?|^    |ExecStart=\S*/|ExecReload=\S*/)"
    r"(kon-agent|kon-receiver)((?: [a-z][a-z|-]*)+)",
    re.MULTILINE,
)
_REGISTRIES = ("pypi" + ".org", "pythonhosted" + ".org", "docker" + ".io", "ghcr" + ".io", "npmjs" + ".com")
_MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|tmp/lab|Users)(?:/|\b)")


def _names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def _anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _problem(program: str, words: list[str]) -> str:
    """Return what is wrong with a call of `program`; empty where its subcommands exist."""
    command = PROGRAMS[program]
    for word in words:
        if not isinstance(command, click.Group):
            return ""  # its arguments begin
        missing = [each for each in word.split("|") if each not in command.commands]
        if missing:
            return f"{program} has no {missing[0]!r} (in {' '.join(words)!r})"
        command = command.commands[word.split("|")[0]]
    return ""


def _calls(text: str) -> Iterator[tuple[str, list[str]]]:
    for program, words in _CALL.findall(text):
        yield program, words.split()


@pytest.mark.parametrize("name", _names(DOCUMENTS))
def test_links_resolve(name: str) -> None:
    """Every relative link leads to a file, and to a heading in it where it names one."""
    path = ROOT / name
    broken = []
    for target in _LINK.findall(_FENCE.sub("", path.read_text())):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if not found.exists() or (anchor and anchor not in _anchors(found.read_text())):
            broken.append(target)
    assert [] == broken


@pytest.mark.parametrize("name", _names(OURS))
def test_commands_exist(name: str) -> None:
    """Every subcommand a document or a unit calls is one of the command line's."""
    calls = _calls((ROOT / name).read_text())
    assert [] == [problem for program, words in calls if (problem := _problem(program, words))]


def test_calls_are_found() -> None:
    """The search for calls sees the documents' ways of writing one, and an unknown command is a problem."""
    text = "run `kon-agent plugins list --json`\n$ kon-receiver pki init pki\n# kon-agent bogus\n"
    found = list(_calls(text))
    assert [
        ("kon-agent", ["plugins", "list"]),
        ("kon-receiver", ["pki", "init", "pki"]),
        ("kon-agent", ["bogus"]),
    ] == found
    assert ["", "", "kon-agent has no 'bogus' (in 'bogus')"] == [_problem(*call) for call in found]


@pytest.mark.parametrize("name", _names(OURS))
def test_nothing_of_one_machine(name: str) -> None:
    """No document names a package registry's host or a path of the machine it was written on."""
    text = (ROOT / name).read_text()
    assert [] == [host for host in _REGISTRIES if host in text] + _MACHINE_PATH.findall(text)


@pytest.mark.parametrize("name", _names(DOCUMENTS))
def test_named_files_exist(name: str) -> None:
    """Every module and repository file named in backquotes exists."""
    text = (ROOT / name).read_text()
    named = {*_MODULE.findall(text), *_REPOSITORY_FILE.findall(text)}
    assert [] == sorted(file for file in named if not (ROOT / file).exists())


def test_readmes_are_each_others() -> None:
    """The English and the Chinese README link to each other near their top and show the same blocks but for remarks."""
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    assert "(README.zh-CN.md)" in english[:200]
    assert "(README.md)" in chinese[:200]
    blocks = [[re.sub(r"  +# .*", "", block) for block in _FENCE.findall(text)] for text in (english, chinese)]
    assert blocks[0] == blocks[1]
