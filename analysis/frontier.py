"""Losses compared at equal L0: a cell against the frontier of baselines, at the cell's own L0.

1. The frontier is the baselines that no other beats at a lower or equal L0. Between neighbours log loss is linear in
   log L0. Beyond its ends the last piece is carried on, and what follows from that is marked as extrapolated.
2. ratio = the cell's loss / the frontier's at the cell's L0. Below 1 the cell is better.
3. Held-out sequences are drawn with replacement, the same draws for the cell and for every point of the frontier. L0
   and loss of all of them are taken anew on each draw; the ratio's 95% interval lies between its 2.5% and 97.5%
   quantiles. What makes a sequence hard for everybody cancels. Draws from n sequences spread less than the truth, so
   their distance from the ratio is stretched by sqrt(n / (n - 1)) t(n - 1) / 1.96: 1.03 for 64, 1.3 for 8, 9 for 2.
4. Inside the range the interval decides: better, worse, or a tie if it holds 1. Outside nothing is known but that a
   frontier falls: a cell that is sparser than all and better than the sparsest `dominates`, one that is denser than
   all and worse than the densest is `dominated`, anything else is `not comparable`.

Any loss that is a sum over tokens will do: squared error, cross-entropy over the clean model's. What it is divided by
(the variance of the targets) is the same for all and cancels in the ratio.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.spread import Z_975, t_quantile

__all__ = [
    "N_RESAMPLES",
    "Array",
    "Placed",
    "Placement",
    "Sums",
    "Verdict",
    "counts",
    "frontier",
    "interpolate",
    "place",
    "tied",
]

Array = NDArray[np.float64]

Verdict = Literal["better", "tie", "worse", "dominates", "dominated", "not comparable"]

N_RESAMPLES = 1_000
SURE = 0.975
"""Share of the draws in which a cell must be sparser and better at once to dominate."""

ROUNDING = 1e-9
"""Logarithms closer than this are equal: the order in which sums are taken shows in their last digits."""

CELLS_AT_ONCE = 512
"""Bounds the temporary arrays."""


@dataclass(frozen=True)
class Sums:
    """What n transcoders scored on the same R held-out sequences. With R = 1 there is nothing to draw from."""

    loss: Array
    """[n, R], summed over the tokens of a sequence; in any unit, the same for all."""
    l0: Array
    """[n, R], active latents summed over tokens."""
    n_tokens: Array
    """[R]"""

    def part(self, which: slice | NDArray[np.intp]) -> "Sums":
        """Some of the transcoders, on all sequences."""
        return Sums(self.loss[which], self.l0[which], self.n_tokens)


@dataclass(frozen=True)
class Placement:
    """Where one cell stands. None is what cannot be said: a logarithm of zero, a frontier of one point."""

    ratio: float | None
    low: float | None
    """95% interval of the ratio; None without several sequences."""
    high: float | None
    matched_l0: float | None
    """The L0 at which the frontier has the cell's loss; None where it nowhere has."""
    extrapolated: bool
    """The cell's L0 lies outside the frontier's."""
    verdict: Verdict | None
    """None without several sequences."""


@dataclass(frozen=True)
class Placed:
    """The placements of all cells; `log_ratios` [draws, n] has the ratio of each on every draw."""

    placements: list[Placement]
    log_ratios: Array


def tied(one: Array, other: Array) -> bool | None:
    """Whether the ratios of two cells on the same draws do not tell them apart; None where nothing says."""
    if len(one) != len(other):
        return None
    low, high = _interval(one - other)
    return None if low is None or high is None else low <= ROUNDING and high >= -ROUNDING


def place(cells: Sums, baselines: Sums, n_resamples: int = N_RESAMPLES) -> Placed:
    """Place each cell against the frontier of the baselines, all scored on the same sequences.

    The draws depend on the number of sequences alone, so a cell's placement does not depend on the other cells.

    Raises:
        ValueError: no baseline has an L0 above zero.
    """
    chosen = frontier(*_totals(baselines))
    if not len(chosen):
        raise ValueError("no baseline has an L0 above zero")
    n_sequences = len(cells.n_tokens)
    draws = counts(n_sequences, n_resamples if n_sequences > 1 else 0)
    edge = _sorted(*_log_points(baselines.part(chosen), draws))
    n = len(cells.loss)
    parts = [_place(cells.part(slice(i, i + CELLS_AT_ONCE)), edge, draws) for i in range(0, n, CELLS_AT_ONCE)]
    placements = [placement for part in parts for placement in part.placements]
    return Placed(placements, np.concatenate([part.log_ratios for part in parts], 1) if parts else np.empty((0, 0)))


def frontier(l0: Array, loss: Array) -> NDArray[np.intp]:
    """Indices of the points that no other beats at a lower or equal L0, sparsest first; points at L0 0 never count.

    A loss of zero or less ends it, as none lies below: no ratio to it exists, nor beyond its neighbour's L0.
    """
    chosen: list[int] = []
    best = np.inf
    for i in np.lexsort((loss, l0)):
        if l0[i] > 0 and loss[i] < best and best > 0:
            chosen.append(int(i))
            best = loss[i]
    return np.array(chosen, dtype=np.intp)


def counts(n_sequences: int, n_resamples: int) -> Array:
    """[1 + n_resamples, n_sequences]: how often each sequence is drawn; the first line takes each once."""
    rng = np.random.default_rng(0)
    drawn = np.ones((1 + n_resamples, n_sequences))
    for line in drawn[1:]:
        line[:] = np.bincount(rng.integers(n_sequences, size=n_sequences), minlength=n_sequences)
    return drawn


def interpolate(xs: Array, ys: Array, x: Array) -> Array:
    """On every line: the value at each x [lines, n] of the polygon through xs, ys [lines, points], its ends carried on.

    `xs` rise along a line, and there are at least two points.
    """
    right = np.ones(x.shape, dtype=np.intp)
    for i in range(1, xs.shape[1] - 1):
        right += x > xs[:, i, None]
    x0, x1, y0, y1 = (np.take_along_axis(a, i, 1) for a in (xs, ys) for i in (right - 1, right))
    slope = np.divide(y1 - y0, x1 - x0, out=np.zeros_like(x0), where=x1 > x0)
    return np.asarray(y0 + slope * (x - x0))


def _stretch(n_sequences: int) -> float:
    """How much further the truth lies than draws with replacement do, as for Student's interval of a mean. Of one
    sequence there are no draws.
    """
    if n_sequences < 2:
        return 1.0
    return math.sqrt(n_sequences / (n_sequences - 1)) * t_quantile(n_sequences - 1) / Z_975


def _place(cells: Sums, edge: tuple[Array, Array], draws: Array) -> Placed:
    (xs, ys), (x, y) = edge, _log_points(cells, draws)
    at = interpolate(xs, ys, x) if xs.shape[1] > 1 else np.where(x[0] == xs[0], ys, np.nan)
    stretch = _stretch(draws.shape[1])
    log_ratios = _stretched(y - at, stretch)
    placements = [_placement(xs, ys, x[:, i], y[:, i], log_ratios[:, i], stretch) for i in range(x.shape[1])]
    return Placed(placements, log_ratios[1:])


def _stretched(values: Array, stretch: float) -> Array:
    """Draws moved away from the first line, which stays."""
    return np.asarray(values[0] + stretch * (values - values[0]))


def _placement(xs: Array, ys: Array, x: Array, y: Array, log_ratio: Array, stretch: float) -> Placement:
    """One cell. In all arrays the first line is the sequences as they are, the others are the draws."""
    low, high = _interval(log_ratio[1:])
    below, above = bool(x[0] < xs[0, 0] - ROUNDING), bool(x[0] > xs[0, -1] + ROUNDING)
    verdict: Verdict | None = None
    if low is not None and high is not None and not (below or above):
        verdict = "better" if high < -ROUNDING else "worse" if low > ROUNDING else "tie"
    elif len(x) > 1 and (below or above):
        (l0_low, loss_low), (l0_high, loss_high) = (
            (_stretched(x - xs[:, end], stretch)[1:], _stretched(y - ys[:, end], stretch)[1:]) for end in (0, -1)
        )
        dominates = np.mean((l0_low <= 0) & (loss_low < 0)) >= SURE
        dominated = np.mean((l0_high >= 0) & (loss_high > 0)) >= SURE
        verdict = "dominates" if dominates else "dominated" if dominated else "not comparable"
    return Placement(
        _exp(log_ratio[0]), _exp(low), _exp(high), _exp(_where(xs[0], ys[0], y[0])), below or above, verdict
    )


def _where(xs: Array, ys: Array, y: float) -> float | None:
    """The x at which a falling polygon has the value y; None where it nowhere has. Its end may be no number."""
    known = np.isfinite(ys)
    xs, ys = xs[known], ys[known]
    if not ys[-1] - ROUNDING <= y <= ys[0] + ROUNDING:
        return None
    return float(np.interp(y, ys[::-1], xs[::-1]))


def _totals(sums: Sums) -> tuple[Array, Array]:
    """L0 and loss over all sequences."""
    return sums.l0.sum(1) / sums.n_tokens.sum(), sums.loss.sum(1)


def _log_points(sums: Sums, draws: Array) -> tuple[Array, Array]:
    """[lines, n] each: log L0 and log loss on every draw; what is not above zero is not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        l0 = np.log((draws @ sums.l0.T) / (draws @ sums.n_tokens)[:, None])
        loss = np.log(draws @ sums.loss.T)
    l0[~np.isfinite(l0)] = loss[~np.isfinite(loss)] = np.nan
    return l0, loss


def _sorted(xs: Array, ys: Array) -> tuple[Array, Array]:
    """The points of every line by their L0 there: on a draw two neighbours may change places."""
    order = np.argsort(xs, axis=1, kind="stable")
    return np.take_along_axis(xs, order, 1), np.take_along_axis(ys, order, 1)


def _interval(values: Array) -> tuple[float | None, float | None]:
    """Between the 2.5% and 97.5% quantiles. A draw without a number counts at both ends; nothing where many are."""
    if not len(values):
        return None, None
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        low = np.quantile(np.where(known, values, -np.inf), 0.025)
        high = np.quantile(np.where(known, values, np.inf), 0.975)
    return (float(low), float(high)) if np.isfinite([low, high]).all() else (None, None)


def _exp(value: float | None) -> float | None:
    return float(np.exp(value)) if value is not None and np.isfinite(value) else None
