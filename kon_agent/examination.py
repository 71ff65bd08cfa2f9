"""Examinations: what a plugin that is not built in says about its section of the configuration.

Its code runs in a stripped child (`kon_agent.examinee`), which answers with one JSON object. That is decoded strictly,
by type, number and length, before anything of it is used, and it decides about that plugin's section and rights only:
what it may read is still read as an unprivileged user (docs/adr/0011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from kon_agent import catalog
from kon_agent.catalog import Origin
from kon_agent.config.document import plain
from kon_agent.config.foreign import Exhibit, Verdict
from kon_agent.config.mistake import Mistake
from kon_agent.config.schema import MAX_PLUGINS
from kon_agent.errors import PluginError
from kon_agent.inquiry import Question, Reply, ask, children_user
from kon_agent.plugins.declaration import MAX_READS
from kon_agent.process import Profile

DEADLINE_S = 5.0  # imports from a slow SD card; a reload waits that long
AFTER_HANG_S = 2.0  # for all the rest, once one has hung: whoever asks for a reload waits 10 s for what was wrong
BOOT_DEADLINE_S = 10.0  # everything else on the machine starts as well, and there is no second try before a reload
MAX_KNOWN = 2 * MAX_PLUGINS  # verdicts that are kept: those of the file, and as many that were tried
MAX_ANSWER_BYTES = 256 * 1024
MAX_MISTAKES = 64
MAX_TEXT = 2000  # characters
MAX_MEMORY_BYTES = 256 * 1024 * 1024  # what an import may take, numpy's included
MAX_THREADS = 16  # numerical libraries start some when imported

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Position = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mistake, without its file's name."""

    line: Position
    column: Position
    path: Text
    what: Text


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an examinee sends; the fields are those of `Verdict`."""

    failure: Text = ""
    mistakes: Annotated[list[Finding], msgspec.Meta(max_length=MAX_MISTAKES)] = []
    defaults: Annotated[dict[Text, int | float | bool | Text | None], msgspec.Meta(max_length=16)] = {}
    reads: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=4096, pattern=r"\A/[^\0]*\Z")]], msgspec.Meta(max_length=MAX_READS)
    ] = []
    has_network: bool = False
    description: Text = ""


@dataclass(frozen=True, slots=True)
class Examinee:
    """What the child is given.

    Attributes:
        exhibit: the section.
        source: the plugin's code, where it is a file.
        answer_fd: where to write its answer.
    """

    exhibit: Exhibit
    source: bytes
    answer_fd: int


class Examiner:
    """Asks plugins about their sections.

    What was right once is not asked again while section and code are the same: a reload examines what has changed.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Origin, str], Verdict] = {}

    def __call__(self, exhibits: Sequence[Exhibit], user: str, deadline_s: float | None = None) -> list[Verdict]:
        """Return a verdict on each section.

        Args:
            exhibits: the sections.
            user: the name of the user plugins run as.
            deadline_s: seconds each may take; None: DEADLINE_S.

        Raises:
            PrivilegeError: there is no user to examine them as.
        """
        verdicts = [self._verdict_at_hand(exhibit) for exhibit in exhibits]
        asked = [exhibit for exhibit, verdict in zip(exhibits, verdicts, strict=True) if verdict is None]
        replies: list[Reply] = []
        if asked:
            questions = [_question(exhibit) for exhibit in asked]
            after_hang_s = AFTER_HANG_S if deadline_s is None else deadline_s * len(questions)
            replies = ask(questions, children_user(user), deadline_s or DEADLINE_S, MAX_ANSWER_BYTES, after_hang_s)
        new = iter([_verdict(exhibit, reply) for exhibit, reply in zip(asked, replies, strict=True)])
        found = [verdict or next(new) for verdict in verdicts]
        for exhibit, verdict in zip(exhibits, found, strict=True):
            self._remember(exhibit, verdict)
        return found

    def at_boot(self, exhibits: Sequence[Exhibit], user: str) -> list[Verdict]:
        """Return a verdict on each section, with more patience."""
        return self(exhibits, user, BOOT_DEADLINE_S)

    def _verdict_at_hand(self, exhibit: Exhibit) -> Verdict | None:
        refusal = exhibit.origin.refusal
        return Verdict(failure=refusal) if refusal else self._known.get(_identity(exhibit))

    def _remember(self, exhibit: Exhibit, verdict: Verdict) -> None:
        if verdict.failure or verdict.mistakes:  # whose places may have moved
            return
        self._known[_identity(exhibit)] = verdict
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]


examine = Examiner()
"""This process's examiner."""


def _identity(exhibit: Exhibit) -> tuple[Origin, str]:
    return exhibit.origin, repr(plain(exhibit.node))


def source_of(origin: Origin) -> bytes:
    """Return the code of a plugin that is a file; nothing for one that is imported by name.

    Raises:
        PluginError: the file cannot be used.
    """
    return catalog.read_source(origin) if origin.kind == "file" else b""


def _question(exhibit: Exhibit) -> Question:
    def prepare(answer_fd: int) -> Examinee:
        return Examinee(exhibit, source_of(exhibit.origin), answer_fd)

    title, body = f"kon-agent: examines {exhibit.name}", "kon_agent.examinee:main"
    return Question(title, body, prepare, Profile(data_bytes=MAX_MEMORY_BYTES, max_processes=MAX_THREADS))


def _verdict(exhibit: Exhibit, reply: Reply) -> Verdict:
    if reply.failure:
        return Verdict(failure=f"{exhibit.origin.target}: {reply.failure}")
    try:
        answer = decode(reply.data)
    except PluginError as err:
        return Verdict(failure=f"{exhibit.origin.target}: {err}")
    return Verdict(
        failure=_shown(answer.failure),
        mistakes=tuple(
            Mistake(exhibit.file, each.line, each.column, _shown(each.path), _shown(each.what))
            for each in answer.mistakes
        ),
        defaults=answer.defaults,
        reads=tuple(answer.reads),
        has_network=answer.has_network,
        description=_shown(answer.description),
    )


def decode(data: bytes) -> Answer:
    """Return the answer in `data`.

    Raises:
        PluginError: it is none.
    """
    try:
        return msgspec.json.decode(data, type=Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise PluginError(f"its answer makes no sense: {_shown(str(err)[:MAX_TEXT])}") from err


def _shown(text: str) -> str:
    """Return a text of theirs with nothing in it that a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in text)
