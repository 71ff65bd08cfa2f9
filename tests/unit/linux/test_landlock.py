"""The ruleset by ABI. (Confinement itself is tested on real children: test_process.)"""

from __future__ import annotations

import pytest

from kon_agent.linux import landlock


@pytest.mark.parametrize(
    ("fs", "net", "scoped", "abi"),
    [
        (0x1FFF, 0, 0, 1),
        (0x3FFF, 0, 0, 2),
        (0x7FFF, 0, 0, 3),
        (0x7FFF, 3, 0, 4),
        (0xFFFF, 3, 0, 5),
        (0xFFFF, 3, 3, 6),
        (0xFFFF, 3, 3, 99),
    ],
)
def test_everything_the_kernel_can_deny_is_denied(fs: int, net: int, scoped: int, abi: int) -> None:
    """Each ABI adds its rights (landlock(7)); a newer kernel than this code still gets all that is known."""
    ruleset = landlock._ruleset(abi)
    assert (fs, net, scoped) == (ruleset.fs, ruleset.net, ruleset.scoped)


def test_a_kernel_without_landlock_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSYS or EOPNOTSUPP: 0, and nothing was applied."""

    def syscall(*_: object, what: str) -> int:
        raise OSError(38, what)

    monkeypatch.setattr(landlock, "syscall", syscall)
    assert 0 == landlock.restrict(read=["/"])
