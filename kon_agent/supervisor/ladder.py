"""The governor's ladder as data: its rungs, the steps from one to the next, and what it may use. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

CPU = "cpu"
MEMORY = "memory"


class Level(enum.Enum):
    """How far down the ladder the tree is."""

    NORMAL = "normal"
    STRETCH_2 = "stretch_2"
    STRETCH_4 = "stretch_4"
    PAUSED = "paused"  # at least one plugin, at whatever periods the others have


RUNGS: dict[int, Level] = {1: Level.NORMAL, 2: Level.STRETCH_2, 4: Level.STRETCH_4}
"""By the factor of the periods, while no plugin is paused."""


class Move(enum.Enum):
    """What a step does."""

    STRETCH = "stretch"
    RELAX = "relax"
    PAUSE = "pause"
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the tree may use: `cpu` a fraction of one core, `memory_bytes` its proportional set size."""

    cpu: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step taken.

    Attributes:
        at_ns: when.
        move: what was done.
        plugin: to whom; empty where it was to all.
        factor: of the periods, from now on.
        reason: why.
    """

    at_ns: int
    move: Move
    plugin: str
    factor: int
    reason: str

    def __str__(self) -> str:
        match self.move:
            case Move.STRETCH | Move.RELAX:
                return f"periods x{self.factor}: {self.reason}"
            case _:
                return f"{self.move.value} {self.plugin}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Pause:
    """One plugin's pause.

    Attributes:
        since_ns: when it began.
        hold_s: how long it lasts at least where what the plugin used before does not fit.
        cause: CPU or MEMORY.
        cpu: what the plugin used before, in cores, at `factor` times its period.
        terms: its priority and its period then; with others it is tried at once.
    """

    since_ns: int
    hold_s: float
    cause: str
    cpu: float
    factor: int
    terms: tuple[int, float]
