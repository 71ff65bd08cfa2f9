"""Loop devices on files of their own: disks nobody else uses."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support.netns import run

SIZE_BYTES = 4 * 1024 * 1024


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """Have a loop device on a new file; the device is let go and the file removed afterwards.

    It is locked: so udev does not look into it (systemd's BLOCK_DEVICE_LOCKING), and all its requests are the caller's.
    """
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    try:
        device = Path(run("losetup", "--find", "--show", str(image)).strip())
        try:
            with device.open("rb", buffering=0) as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                yield device
        finally:
            run("losetup", "--detach", str(device))
    finally:
        image.unlink()


def number_of(device: Path) -> tuple[int, int]:
    """Return a device's major and minor number."""
    number = device.stat().st_rdev
    return os.major(number), os.minor(number)


def completed(device: Path) -> dict[str, int]:
    """Return how many reads, writes, and discards and flushes the kernel says were completed since boot."""
    fields = Path(f"/sys/block/{device.name}/stat").read_text(encoding="ascii").split()
    return {"read": int(fields[0]), "write": int(fields[4]), "other": int(fields[11]) + int(fields[15])}
