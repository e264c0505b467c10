"""What is too large to be held at once, cut into consecutive parts."""

from collections.abc import Iterator

__all__ = ["consecutive", "pieces"]

MAX_BYTES = 16 << 20
"""Size of the largest temporary array, where one row fits; larger ones were slower, not faster."""


def consecutive(n: int, size: int) -> Iterator[slice]:
    """Slices that cover 0 to `n`, each `size` long, the last one maybe less."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def pieces(n_rows: int, row_bytes: int, max_bytes: int | None = None) -> Iterator[slice]:
    """Consecutive slices of `n_rows` rows that stay within `max_bytes` each, MAX_BYTES without; one row at least."""
    return consecutive(n_rows, max((max_bytes or MAX_BYTES) // row_bytes, 1))
