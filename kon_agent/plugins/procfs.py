"""The kernel's text files, read whole: the one way a collector touches /proc."""

from __future__ import annotations

from kon_agent.errors import NoData
from kon_agent.plugins.context import Context


def read(context: Context, path: str) -> bytes:
    """Return the content of the kernel's file `path` below the context's root.

    Raises:
        NoData: this kernel, or this /proc mount (`subset=pid`), has no such file.
        OSError: it is there but cannot be read.
    """
    try:
        # Unbuffered: procfs makes the text at the first read, a second copy in a buffer gains nothing.
        with open(context.path(path), "rb", buffering=0) as file:
            return file.read()
    except FileNotFoundError as err:
        raise NoData(f"{context.path(path)} does not exist in this kernel or /proc mount") from err
