"""What a few repetitions say: means, 95% intervals, and which differences they do not resolve.

Seeds are few, so the spread of one cell's own seeds is hardly known. As in a one-way analysis of variance, it is pooled
over all cells of a group: s^2 = sum over cells and seeds of (x - cell mean)^2, over df = sum of (seeds - 1). Metrics
that are positive everywhere spread in proportion to their size, so there x is taken relative to the cell's mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Z_975", "Spread", "interval_of_mean", "pooled", "t_quantile"]

T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""97.5% quantiles of Student's t for 1 to 30 degrees of freedom."""

Z_975 = 1.959964
"""The 97.5% quantile of the normal distribution."""


def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t; beyond the table by expansion about the normal, off by under 1e-4.

    Raises:
        ValueError: there is no degree of freedom.
    """
    if df < 1:
        raise ValueError(f"df={df} must be at least 1")
    if df <= len(T_975):
        return T_975[df - 1]
    z = Z_975
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


@dataclass(frozen=True)
class Spread:
    """The standard deviation of one repetition, pooled over cells, and the degrees of freedom it rests on."""

    deviation: float
    df: int
    relative: bool
    """The deviation is a fraction of the mean."""

    def half_width(self, mean: float, n: int) -> float:
        """Half of the 95% interval of a mean of `n` repetitions."""
        scale = mean if self.relative else 1.0
        return t_quantile(self.df) * self.deviation * scale / math.sqrt(n)

    def resolves(self, a: tuple[float, int], b: tuple[float, int]) -> bool:
        """Whether two means, each with its number of repetitions, differ at 95%."""
        (mean_a, n_a), (mean_b, n_b) = a, b
        variance = sum((m if self.relative else 1.0) ** 2 / n for m, n in ((mean_a, n_a), (mean_b, n_b)))
        return abs(mean_a - mean_b) > t_quantile(self.df) * self.deviation * math.sqrt(variance)


def pooled(cells: Sequence[Sequence[float]]) -> Spread | None:
    """The spread of repetitions inside cells; None where no cell has two."""
    df = sum(len(values) - 1 for values in cells if values)
    if df < 1:
        return None
    relative = all(value > 0 for values in cells for value in values)
    squares = 0.0
    for values in cells:
        if values:
            mean = math.fsum(values) / len(values)
            squares += math.fsum(((value - mean) / (mean if relative else 1.0)) ** 2 for value in values)
    return Spread(math.sqrt(squares / df), df, relative)


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of the mean of independent values; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return mean - half, mean + half
