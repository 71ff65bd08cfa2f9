"""The body of an examined child: third-party code is loaded, asked about its section, and what it says is written down.

Runs after the drop of every privilege. Nobody has to believe it: the code it loads may do to it what it likes.
"""

from __future__ import annotations

import inspect
import os

import msgspec

from kon_agent.config.walk import Walker
from kon_agent.errors import PluginError
from kon_agent.examination import MAX_MISTAKES, MAX_TEXT, Answer, Examinee, Finding
from kon_agent.plugins.loading import common_defaults, load, words_of


def main(examinee: Examinee) -> int:
    """Answer what the supervisor asks about a section; return the process's exit code."""
    os.dup2(2, 1)  # what it prints is no result of ours
    try:
        answer = _answer(examinee)
    except PluginError as err:
        answer = Answer(failure=str(err)[:MAX_TEXT])
    except (Exception, SystemExit) as err:  # of its configuration's type, or of `reads`
        answer = Answer(failure=words_of(err)[:MAX_TEXT])
    data = msgspec.json.encode(answer)
    while data:
        data = data[os.write(examinee.answer_fd, data) :]
    return os.EX_OK


def _answer(examinee: Examinee) -> Answer:
    exhibit = examinee.exhibit
    cls, declaration = load(exhibit.origin, examinee.source)
    walker = Walker(exhibit.file, "/", exhibit.is_whole)
    config = walker.section(exhibit.node, declaration.config, exhibit.path)
    is_right = config is not msgspec.UNSET and not walker.mistakes
    return Answer(
        mistakes=[
            Finding(mistake.line, mistake.column, mistake.path[:MAX_TEXT], mistake.what[:MAX_TEXT])
            for mistake in walker.mistakes[:MAX_MISTAKES]
        ],
        defaults=common_defaults(declaration.config),
        reads=list(declaration.places(config)) if is_right else [],
        has_network=declaration.network,
        description=(inspect.getdoc(cls) or "").partition("\n")[0][:MAX_TEXT],
    )
