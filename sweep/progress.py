"""How long phases speak: one callable, passed in, so that nothing below the launcher knows about terminals.

`Progress` is a callable that remembers: where each phase is, how fast it goes, how long everything will take.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "Report", "Snapshot", "silent"]

Report = Callable[[str, int, int, str], None]
"""Called often as report(phase, done, total, unit); the receiver decides what to show. A total of 0 is unknown."""


def silent(phase: str, done: int, total: int, unit: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Snapshot:
    """What is going on at a moment: `done` of `total` units, at a pace, and the time until all begun phases end."""

    phase: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    per_second: float = 0.0
    seconds_left: float = 0.0


@dataclass
class _Phase:
    """One phase: how far it is, and the units and seconds from which its pace is known."""

    done: int
    total: int
    unit: str
    n_timed: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return self.n_timed / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        return max(self.total - self.done, 0) / self.per_second if self.n_timed and self.total else 0.0


class Progress:
    """A report that keeps the pace of every phase.

    Phases take turns: the language model fills a window, then training empties it. The time between two reports belongs
    to the phase that made the second one, so each phase's pace is its own and what is left can be added up.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._last = time.monotonic()
        self.snapshot = Snapshot()

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        known = self._phases.get(phase)
        if known is None:
            known = self._phases[phase] = _Phase(done, total, unit)
        else:
            known.n_timed += max(done - known.done, 0)
            known.seconds += now - self._last
            known.done, known.total = done, total
        self._last = now
        left = sum(each.seconds_left for each in self._phases.values())
        self.snapshot = Snapshot(phase, done, total, unit, known.per_second, left)
