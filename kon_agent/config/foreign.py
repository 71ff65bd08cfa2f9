"""What is asked about the section of a plugin that is not built in, and what is answered. Data only.

Its own keys can be judged by its own code alone, which no process with a privilege may run: `kon_agent.examination`
asks a child. Whoever loads a file brings an `Examine`; without one such a section is taken as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kon_agent.catalog import Origin
from kon_agent.config.document import Node
from kon_agent.config.mistake import Mistake, Place


class Exhibit(msgspec.Struct, frozen=True):
    """A section to be examined.

    Attributes:
        name: the section's name.
        origin: where the plugin's code is.
        node: what the section holds.
        place: where its key stands.
        file, path: the file's name and the section's dotted path, as mistakes show them.
        is_whole: whether the file has been read to its end.
    """

    name: str
    origin: Origin
    node: Node
    place: Place = Place()
    file: str = ""
    path: str = ""
    is_whole: bool = True


class Verdict(msgspec.Struct, frozen=True):
    """What an examination has shown.

    Attributes:
        failure: why there was none; empty: there was.
        mistakes: what is wrong with the section.
        defaults: the keys common to all plugins for which this one has defaults of its own.
        reads: files and folders it declares to read, absolute.
        has_network: whether it declares to use the network.
        description: what it says of itself, one line.
    """

    failure: str = ""
    mistakes: tuple[Mistake, ...] = ()
    defaults: dict[str, Any] = {}
    reads: tuple[str, ...] = ()
    has_network: bool = False
    description: str = ""


Examine = Callable[[Sequence[Exhibit], str], Sequence[Verdict]]
"""Takes sections and the name of the user plugins run as; returns a verdict for each."""
