"""Which cells are best: grouped by what makes their numbers comparable, and compared at equal L0.

1. Runs are grouped by language model, layer, target and held-out rows; across groups nothing compares.
2. Runs that differ only in their seed become one row: the mean of each metric, and the 95% interval of that mean.
3. Where the group has baselines, each row is placed against their frontier at its own L0, and rows are ordered by the
   ratio of their FVU to it: first those at an L0 the frontier reaches, then those whose ratio is extrapolated. Without
   baselines, and for metrics that no ratio stands for, by the metric itself.
4. Rows that neither the held-out sequences nor the spread of the seeds tell from the first are ties.
5. The Pareto front of L0 and FVU is marked.
6. Options that are the same for the whole group are told apart from those that vary.
7. Published baselines of the same model, layer and target stand beside them.

A run without a number to rank by is left out, and said to be.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from analysis.common_rows import on_common_rows
from analysis.place import MEASURES, PLACE_COLUMNS, Standing, standings
from analysis.rows import HISTORY, KEY, METRIC_NAMES, OPTIONS, Row, comparable, number, same_and_varying, some
from analysis.spread import Spread, pooled
from sweep.baselines.published import Published, published_for
from sweep.config import frozen
from sweep.errors import ConfigError
from sweep.results import METRICS

__all__ = ["FIELDS", "Group", "pareto_front", "rank", "records"]

RANKABLE = {column.name: column.better for column in METRICS if column.better}
"""Metrics one can rank by, and which way is better."""

HEAD = (*KEY, "kind", "rank", "tie", "pareto", "cell_id", "n_seeds", "seeds", "cell_ids", "hook_in")
INTERVALS = tuple(f"{name}_{end}" for name in METRIC_NAMES for end in ("low", "high"))
TAIL = (*HISTORY, "fvu_comparable_at", "same_heldout_rows", "baseline", "citation")
FIELDS = tuple(dict.fromkeys((*HEAD, *PLACE_COLUMNS, *METRIC_NAMES, *OPTIONS, *INTERVALS, *TAIL)))
"""Keys of a record, the same for every row and published baseline."""

AT_EQUAL_L0 = (*(name for measure in MEASURES for name in measure.metrics), "fvu_per_dimension", "cosine", "kl")
"""Metrics that more active latents improve: without a ratio their order means something at equal L0 only."""


@dataclass(frozen=True)
class Group:
    """Rows whose FVUs compare, best first, and the baselines of their model, layer and target."""

    key: Row
    by: str
    rows: list[Row]
    """Options, means of the metrics with `<metric>_low` and `<metric>_high`, `seeds` and `cell_ids` in the order of
    the seeds, `rank` from 1, `pareto`, PLACE_COLUMNS (null without baselines), and `tie`: not told from the first (null
    where nothing says)."""
    measured: list[Row]
    """Baselines measured on the same rows, sparsest first; `pareto` as among themselves."""
    standings: list[Standing]
    """How the rows stand against them, by each measure that can be compared."""
    baselines: list[Published]
    same: dict[str, str]
    """Options all rows share, as text."""
    varying: list[str]
    left_out: list[tuple[str, str]]
    """Cells that are not ranked, and why."""
    notes: list[str]
    """What a reader must know about how this group was put together."""

    @property
    def ordered_by(self) -> Standing | None:
        """The standing whose ratio orders the rows; None where they are ordered by the metric itself.

        One baseline has no slope, and so no FVU at another L0.
        """
        return next((s for s in self.standings if s.stands_for(self.by) and len(s.on_frontier) > 1), None)


def rank(runs: pl.DataFrame, by: str = "fvu", sequences: pl.DataFrame | None = None) -> list[Group]:
    """Group and order the rows of the table `runs`.

    Args:
        sequences: the table of that name; without it ratios have no intervals, and cross-entropies that were taken over
            different rows are left out.

    Raises:
        ConfigError: `by` is not a metric that says which way is better.
    """
    if by not in RANKABLE:
        raise ConfigError(f"--by {by}: no such metric; choose one of {', '.join(RANKABLE)}")
    found = comparable(runs)
    return [_group(dict(zip(KEY, key, strict=True)), rows, list(found), by, sequences) for key, rows in found.items()]


def _group(
    key: Row, runs: list[Row], keys: Sequence[tuple[Any, ...]], by: str, sequences: pl.DataFrame | None
) -> Group:
    runs, told = on_common_rows(runs, sequences)
    reasons = [_not_ranked(row, "fvu" if row["kind"] == "baseline" else by) for row in runs]
    left_out = [(row["cell_id"], reason) for row, reason in zip(runs, reasons, strict=True) if reason]
    ranked = [row for row, reason in zip(runs, reasons, strict=True) if not reason]
    cells = list(_by_cell([row for row in ranked if row["kind"] != "baseline"]).values())
    spreads = {name: pooled([_numbers(cell, name) for cell in cells]) for name in METRIC_NAMES}
    rows = [_mean_row(cell, spreads) for cell in cells]
    measured = [_mean_row([row], {}) for row in ranked if row["kind"] == "baseline"]
    measured.sort(key=lambda row: (number(row["l0"]), number(row["fvu"]), row["cell_id"]))
    found = list(standings(rows, measured, sequences))
    for row in rows:
        row.update(dict.fromkeys(PLACE_COLUMNS))
        for standing in found:
            row.update(standing.columns.get(row["cell_id"], {}))
    group = Group(
        key=key,
        by=by,
        rows=rows,
        measured=measured,
        standings=found,
        baselines=published_for(key["model"], key["layer"], key["hook_out"]),
        same={},
        varying=[],
        left_out=left_out,
        notes=[],
    )
    order = group.ordered_by
    _order(group, spreads[by] if order is None else pooled([order.measure.losses_of(cell) for cell in cells]))
    same, varying = same_and_varying(rows)
    notes = [*_notes(group, varying, keys, spreads[by]), *told, *_unsure_of_seeds(group, cells)]
    return replace(group, same=same, varying=varying, notes=notes)


def _order(group: Group, spread: Spread | None) -> None:
    """Sort the rows, and mark ranks, ties and Pareto fronts."""
    standing, rows = group.ordered_by, group.rows
    sign = -1 if RANKABLE[group.by] == "higher" else 1

    def place(row: Row) -> tuple[float, ...]:
        raw = (sign * row[group.by], number(row["fvu"]), number(row["l0"]))
        if standing is None:
            return raw
        ratio = row[f"{standing.measure.name}_ratio"]
        return (standing.guesses(row), 0.0 if standing.loses_nothing(row) else number(ratio), *raw)

    rows.sort(key=lambda row: (*place(row), row["cell_id"]))
    for part in (rows, group.measured):
        front = pareto_front([(number(row["l0"]), number(row["fvu"])) for row in part])
        for row, mark in zip(part, front, strict=True):
            row["pareto"] = mark
    for row in group.measured:
        row.update(rank=None, tie=None)
    for i, row in enumerate(rows, 1):
        row |= {"rank": i, "tie": _ties(rows[0], row, group.by, spread, standing)}


def _not_ranked(row: Row, by: str) -> str | None:
    """Why a run has no place in the ranking."""
    if row["status"] not in ("done", None):
        return f"it {row['status']}: {row['failure']}" if row["failure"] else f"its status is {row['status']}"
    if not math.isfinite(number(row[by])):
        return f"its {by} is {'missing' if row[by] is None else row[by]}"
    return None


def _by_cell(runs: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Runs that differ only in their seed, in the order of the seeds."""
    cells: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in sorted(runs, key=lambda row: (number(row["seed"]), row["cell_id"])):
        same = tuple(frozen(row[name]) for name in (*OPTIONS, *HISTORY))
        cells[same].append(row)
    return cells


def _numbers(cell: list[Row], metric: str) -> list[float]:
    return [row[metric] for row in cell if math.isfinite(number(row[metric]))]


def _mean_row(cell: list[Row], spreads: dict[str, Spread | None]) -> Row:
    """One row for the seeds of a cell."""
    row: Row = {
        **cell[0],
        "n_seeds": len(cell),
        "seeds": [seed["seed"] for seed in cell],
        "cell_ids": [seed["cell_id"] for seed in cell],
    }
    for name in METRIC_NAMES:
        values = _numbers(cell, name)
        mean = math.fsum(values) / len(values) if values else None
        spread = spreads.get(name)
        row[name] = values[0] if len(values) == 1 else mean  # a single value as it is, whole numbers whole
        row[f"{name}_low"] = row[f"{name}_high"] = None
        if spread and mean is not None:
            half = spread.half_width(mean, len(values))
            row |= {f"{name}_low": mean - half, f"{name}_high": mean + half}
    return row


def _ties(first: Row, row: Row, by: str, spread: Spread | None, standing: Standing | None) -> bool | None:
    """Whether the sequences or the seeds leave open which of two rows is better; None where neither says anything.

    The spread of a metric that is positive everywhere is relative, so it is also that of a ratio.
    """
    if row is first:
        return False
    if standing:
        if standing.guesses(first) or standing.guesses(row):
            return None
        by = f"{standing.measure.name}_ratio"
    said: list[bool] = []
    if standing and (tie := standing.tied(first["cell_id"], row["cell_id"])) is not None:
        said.append(tie)
    if spread and first[by] is not None and row[by] is not None and (spread.relative or not standing):
        said.append(not spread.resolves((first[by], first["n_seeds"]), (row[by], row["n_seeds"])))
    return any(said) if said else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Marks the points (l0, fvu) for which no other has both a lower or equal l0 and a lower fvu."""
    marks = [False] * len(points)
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        fvu = points[i][1]
        marks[i] = fvu <= best and math.isfinite(fvu)
        best = min(best, fvu)
    return marks


def _notes(group: Group, varying: list[str], keys: Sequence[tuple[Any, ...]], spread: Spread | None) -> Iterator[str]:
    key = group.key
    place = tuple(key[name] for name in KEY[:3])
    n_others = sum(other[:3] == place for other in keys) - 1
    if n_others:
        others = "another group" if n_others == 1 else f"{n_others} other groups"
        yield (
            f"ranked apart from {others} of this model, layer and target, measured on other held-out rows or weights "
            "(heldout_hash, model_hash): do not compare FVUs across them"
        )
    if "tokens_hash" in varying:
        yield "these cells trained on different token files (tokens_hash); their held-out rows are the same"
    if "schema_version" in varying:
        yield "these cells were made by versions in which the same options mean other numbers (schema_version)"
    if spread is None and len(group.rows) > 1:
        what = "which differences are chance" if group.ordered_by is None else "how much another seed would differ"
        yield f"one seed each: nothing here says {what}; seed=0,1,2 would"
    if group.standings and group.by in AT_EQUAL_L0 and not group.ordered_by:
        lonely = any(len(standing.on_frontier) == 1 for standing in group.standings if standing.stands_for(group.by))
        why = "one baseline is no frontier: " if lonely else ""
        yield f"{why}rows stand in the order of {group.by} alone, which compares at equal L0 only"
    for standing in group.standings:
        ratio = f"{standing.measure.name}_ratio"
        if not standing.sequences:
            yield f"no sums per held-out sequence of the frontier (table sequences): {ratio} without intervals"
        elif names := standing.unpaired:
            yield (
                f"no interval of {ratio} for {some(names)}: sums per held-out sequence missing or not "
                "of the baselines' sequences (table sequences)"
            )
        words = standing.measure.words
        if names := [row["cell_id"] for row in group.rows if standing.loses_nothing(row)]:
            yield f"no {words} at all by {some(names)}: that has no ratio, and stands first where ratios order"
        if standing.best_loses_nothing:
            first = standing.on_frontier[-1]
            yield f"no {words} at all by the baseline {first}: nothing that is as dense has a ratio to it"
        unsettled = [row for row in group.rows if row["cell_id"] in standing.sequences and row[ratio] is not None]
        if names := [row["cell_id"] for row in unsettled if row[f"{ratio}_low"] is None]:
            yield f"no interval of {ratio} for {some(names)}: on too many draws of the sequences nothing is added"
    if not key["heldout_hash"] or not key["model_hash"]:
        yield "rows without heldout_hash or model_hash: nothing shows that they were measured on the same vectors"


def _unsure_of_seeds(group: Group, cells: Sequence[list[Row]]) -> Iterator[str]:
    """Verdicts that hold for these transcoders, but perhaps not for those of other seeds."""
    for standing in group.standings:
        name, spread = standing.measure.name, pooled([standing.measure.losses_of(cell) for cell in cells])
        if spread is None or not spread.relative:
            continue
        sure = [row for row in group.rows if row[f"{name}_verdict"] in ("better", "worse")]
        halves = [(row, spread.half_width(row[f"{name}_ratio"], row["n_seeds"])) for row in sure]
        if unsure := [row["cell_id"] for row, half in halves if abs(row[f"{name}_ratio"] - 1) <= half]:
            yield (
                f"verdicts on {standing.measure.words} are about these transcoders; the spread of the seeds leaves "
                f"open what other seeds would get: {some(unsure)}"
            )


def records(groups: Sequence[Group], top: int | None = None) -> Iterator[Row]:
    """One flat record per row and per published baseline; `top` limits the rows of each group."""
    blank = dict.fromkeys(FIELDS)
    for group in groups:
        for row in (*group.rows[:top], *group.measured):
            known = {name: row[name] for name in FIELDS if name in row}
            yield {**blank, **known, "fvu_comparable_at": "equal l0", "same_heldout_rows": True}
        for line in group.baselines:
            yield {**blank, **_baseline(group, line)}


def _baseline(group: Group, line: Published) -> Row:
    return {
        **{name: group.key[name] for name in KEY[:3]},
        "kind": "baseline",
        "hook_in": line.hook_names[0],
        "dict_size": line.width,
        "l0": line.l0,
        "fvu": line.value,
        "dataset": line.dataset,
        "fvu_comparable_at": "equal l0",
        "same_heldout_rows": False,
        "baseline": f"{line.baseline} {line.path}".strip(),
        "citation": f"{line.source}; {line.note}",
    }
