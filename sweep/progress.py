"""How long phases speak: one callable, passed in, so that nothing below the launcher knows about terminals."""

from collections.abc import Callable

__all__ = ["Report", "silent"]

Report = Callable[[str, int, int, str], None]
"""Called often as report(phase, done, total, unit); the receiver decides what to show. A total of 0 is unknown."""


def silent(phase: str, done: int, total: int, unit: str) -> None:
    """Report nothing."""
