"""Where the rows of a ranking stand against the baselines measured on the same held-out rows.

Sums per sequence come from the table `sequences`; of a cell with several seeds they are averaged over the seeds, as its
metrics are. A row whose sequences are missing, or are not the baselines', has a ratio but no interval and no verdict.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis.common_rows import in_all
from analysis.frontier import Array, Placement, Sums, frontier, place, tied

__all__ = ["MEASURES", "PLACE_COLUMNS", "Measure", "Standing", "standings"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A loss that is compared at equal L0."""

    name: str
    """Begins the names of its columns."""
    metrics: tuple[str, ...]
    """The metrics of `runs` that it stands for: at equal L0 their order in a group is its own."""
    words: str
    loss_of: Callable[[Row], float]
    """Of a row of `runs`; NaN where it has none."""
    sequence_loss: pl.Expr
    """Of a row of `sequences`, not divided by what all transcoders have in common; null where it was not run."""
    on_some: bool = False
    """It is taken on the first rows only, more for one transcoder than for another: what all have counts."""

    def losses_of(self, rows: Sequence[Row]) -> list[float]:
        """Of the rows that have one."""
        return [loss for row in rows if math.isfinite(loss := self.loss_of(row))]


MEASURES = (
    Measure(
        "fvu",
        ("fvu", "fvu_scalar_variance", "mse"),
        "FVU",
        lambda row: _number(row["fvu"]),
        pl.col("sum_squared_error"),
    ),
    Measure(
        "ce",
        ("ce_recovered_zero", "ce_recovered_mean", "ce_spliced"),
        "cross-entropy added",
        lambda row: _number(row["ce_spliced"]) - _number(row["ce_clean"]),
        pl.col("sum_ce_spliced") - pl.col("sum_ce_clean"),
        on_some=True,
    ),
)
"""All rows of a group share the variance of the targets, and the clean and ablated runs."""

ENDS = ("ratio", "ratio_low", "ratio_high", "verdict", "frontier", "matched_l0", "extrapolated")
PLACE_COLUMNS = tuple(f"{measure.name}_{end}" for measure in MEASURES for end in ENDS)


@dataclass(frozen=True)
class Standing:
    """How the rows of a group stand by one measure; rows are named by their `cell_id`."""

    measure: Measure
    sequences: dict[str, Array]
    """The numbers of the held-out sequences on which each row is paired; rows that are not there are on none."""
    l0_range: tuple[float, float]
    """The frontier's."""
    on_frontier: list[str]
    """Its baselines, sparsest first."""
    losses: list[float]
    """Theirs."""
    columns: dict[str, Row]
    """Values of PLACE_COLUMNS."""
    log_ratios: dict[str, Array]

    @property
    def unpaired(self) -> list[str]:
        """Rows whose sums per sequence are missing, or of other sequences than the baselines'."""
        return [cell_id for cell_id in self.columns if cell_id not in self.sequences]

    def stands_for(self, metric: str) -> bool:
        return metric in self.measure.metrics

    def guesses(self, row: Row) -> bool:
        """Whether the row's ratio rests on an extrapolation."""
        return bool(row[f"{self.measure.name}_extrapolated"])

    def loses_nothing(self, row: Row) -> bool:
        """Whether the row is as good as can be, or better: logarithms know no such loss."""
        return self.measure.loss_of(row) <= 0

    @property
    def best_loses_nothing(self) -> bool:
        """Whether that is so of the densest baseline of the frontier."""
        return self.losses[-1] <= 0

    def tied(self, one: str, other: str) -> bool | None:
        """Whether the sequences do not tell two rows apart, each at its own L0; None where nothing says, as of rows
        that were placed on different sequences.
        """
        if self.sequences.get(one) is not self.sequences.get(other):
            return None
        return tied(self.log_ratios[one], self.log_ratios[other])


def standings(rows: Sequence[Row], baselines: Sequence[Row], sequences: pl.DataFrame | None) -> Iterator[Standing]:
    """One for every measure that both rows and baselines have.

    Args:
        rows: of a group, one for all seeds of a cell, which `cell_ids` names.
        baselines: of the same group.
        sequences: the table; it may have other cells too. The rows' own losses are of sequences that compare.
    """
    for measure in MEASURES:
        known = [row for row in rows if math.isfinite(measure.loss_of(row))]
        points = [(_number(row["l0"]), measure.loss_of(row)) for row in baselines]
        edge = [baselines[i] for i in frontier(*np.array(points).reshape(-1, 2).T)]
        if not (known and edge):
            continue
        series = {} if sequences is None else _series([*known, *baselines], measure, sequences)
        parts: dict[bytes, list[Row]] = defaultdict(list)
        shared: dict[bytes, Array] = {}
        for row in known:
            numbers = _shared(row, edge, series)
            parts[numbers.tobytes()].append(row)
            shared.setdefault(numbers.tobytes(), numbers)
        placements: dict[str, Placement] = {}
        log_ratios: dict[str, Array] = {}
        paired: dict[str, Array] = {}
        for key, part in parts.items():
            if len(shared[key]):
                sums = {row["cell_id"]: _on(shared[key], series[row["cell_id"]]) for row in (*part, *edge)}
                paired |= {row["cell_id"]: shared[key] for row in part}
            else:
                sums = {row["cell_id"]: _total(row, measure) for row in (*part, *edge)}
            placed = place(_sums(part, sums), _sums(edge, sums))
            placements |= {row["cell_id"]: at for row, at in zip(part, placed.placements, strict=True)}
            log_ratios |= {row["cell_id"]: line for row, line in zip(part, placed.log_ratios.T, strict=True)}
        yield Standing(
            measure,
            sequences=paired,
            l0_range=(edge[0]["l0"], edge[-1]["l0"]),
            on_frontier=[row["cell_id"] for row in edge],
            losses=[measure.loss_of(row) for row in edge],
            columns={row["cell_id"]: _columns(measure, row, placements[row["cell_id"]]) for row in known},
            log_ratios=log_ratios,
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _columns(measure: Measure, row: Row, at: Placement) -> Row:
    on_frontier = None if at.ratio is None else measure.loss_of(row) / at.ratio
    values = (at.ratio, at.low, at.high, at.verdict, on_frontier, at.matched_l0, at.extrapolated)
    return {f"{measure.name}_{end}": value for end, value in zip(ENDS, values, strict=True)}


Series = Array
"""[4, sequences]: number, loss, active latents and number of tokens of every held-out sequence."""


def _series(rows: Sequence[Row], measure: Measure, sequences: pl.DataFrame) -> dict[str, Series]:
    """The sums of every row that has them, the mean over its seeds; of a measure taken on some sequences, on those that
    all of them have.
    """
    ids = {row["cell_id"]: row.get("cell_ids") or [row["cell_id"]] for row in rows}
    values = [value.cast(pl.Float64) for value in (measure.sequence_loss, pl.col("sum_l0"), pl.col("n_tokens"))]
    wanted = pl.col("cell_id").is_in([cell_id for seeds in ids.values() for cell_id in seeds])
    frame = sequences.filter(wanted, measure.sequence_loss.is_not_null())
    frame = frame.sort("cell_id", "sequence").select("cell_id", pl.col("sequence").cast(pl.Float64), *values)
    parts = frame.partition_by("cell_id", as_dict=True, include_key=False)
    arrays = {cell_id: part.to_numpy().T for (cell_id,), part in parts.items()}
    found = {name: [arrays[cell_id] for cell_id in seeds if cell_id in arrays] for name, seeds in ids.items()}
    if measure.on_some:
        numbers = in_all([series[0] for series in arrays.values()])
        found = {name: [_on(numbers, seed) for seed in seeds] for name, seeds in found.items()}
    return {
        name: np.mean(seeds, 0)
        for name, seeds in found.items()
        if len(seeds) == len(ids[name]) and _same_sequences(seeds) and np.isfinite(seeds).all()
    }


def _on(numbers: Array, series: Series) -> Series:
    """These sequences of a row."""
    return np.asarray(series[:, np.isin(series[0], numbers)])


def _same_sequences(series: Sequence[Series]) -> bool:
    """Whether all have the same sequences, each with the same number of tokens."""
    return all(np.array_equal(one[[0, 3]], series[0][[0, 3]]) for one in series)


def _shared(row: Row, edge: Sequence[Row], series: dict[str, Series]) -> Array:
    """The sequences on which a row is paired with all points of the frontier: its own, which are theirs; none where
    sums are missing, or of other sequences or tokens.
    """
    found = [series[one["cell_id"]] for one in (row, *edge) if one["cell_id"] in series]
    return found[0][0] if len(found) > len(edge) and _same_sequences(found) else np.empty(0)


def _total(row: Row, measure: Measure) -> Series:
    """What the row itself says, as if of one sequence of one token."""
    return np.array([[0.0], [measure.loss_of(row)], [_number(row["l0"])], [1.0]])


def _sums(rows: Sequence[Row], series: dict[str, Series]) -> Sums:
    _, loss, l0, n_tokens = np.array([series[row["cell_id"]] for row in rows]).swapaxes(0, 1)
    return Sums(loss, l0, n_tokens[0])
