"""How long phases speak: one callable, passed in, so that nothing below the launcher knows about terminals."""

from typing import Protocol

__all__ = ["Report", "silent"]


class Report(Protocol):
    """Called often with how far a phase is; the receiver decides what to show. `total` 0 means unknown."""

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None: ...


def silent(phase: str, done: int, total: int, unit: str) -> None:
    """Report nothing."""
