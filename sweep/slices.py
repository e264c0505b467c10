"""What is too large to be held at once, cut into consecutive parts."""

from collections.abc import Iterator

__all__ = ["consecutive"]


def consecutive(n: int, size: int) -> Iterator[slice]:
    """Slices that cover 0 to `n`, each `size` long, the last one maybe less."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
