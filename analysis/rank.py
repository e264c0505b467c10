"""Which cells are best: grouped by what makes their numbers comparable, best held-out FVU first.

1. Runs are grouped by language model, layer, target and held-out rows; across groups nothing compares.
2. Runs that differ only in their seed become one row: the mean of each metric, and the 95% interval of that mean.
3. Rows are ordered by one metric. Those that the spread of the seeds does not tell from the first are ties.
4. The Pareto front of L0 and FVU is marked.
5. Options that are the same for the whole group are told apart from those that vary.
6. Published baselines of the same model, layer and target stand beside them.

A run without a number to rank by is left out, and said to be.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.spread import Spread, pooled
from sweep.baselines.published import Published, published_for
from sweep.config import SLICES, Cell, frozen
from sweep.errors import ConfigError
from sweep.options import option_fields
from sweep.results import METRICS

__all__ = [
    "FIELDS",
    "KEY",
    "METRIC_NAMES",
    "OPTIONS",
    "RELATIVE_TO",
    "Group",
    "as_list",
    "common_fraction",
    "compact",
    "comparable",
    "number",
    "pareto_front",
    "rank",
    "records",
]

KEY = ("model", "layer", "hook_out", "heldout_hash", "model_hash", "model_dtype", "activation_dtype")
"""Runs that agree on these were measured on the same vectors, so their FVUs compare."""

OPTIONS = tuple(
    name
    for kind, name, _, metadata in option_fields()
    if kind in (*SLICES.values(), Cell) and metadata["identity"] and name not in (*KEY, "seed")
)
ALWAYS = ("dict_size", "top_k")
"""Options that have a column even where they do not vary."""

HISTORY = ("tokens_hash", "schema_version")
"""Not options, but a group in which they vary must say so."""

METRIC_NAMES = tuple(column.name for column in METRICS)
RANKABLE = {column.name: column.better for column in METRICS if column.better}
"""Metrics one can rank by, and which way is better."""

HEAD = (*KEY, "kind", "rank", "tie", "pareto", "cell_id", "n_seeds", "seeds", "cell_ids", "hook_in")
INTERVALS = tuple(f"{name}_{end}" for name in METRIC_NAMES for end in ("low", "high"))
TAIL = (*HISTORY, "fvu_comparable_at", "same_heldout_rows", "baseline", "citation")
FIELDS = tuple(dict.fromkeys((*HEAD, *METRIC_NAMES, *OPTIONS, *INTERVALS, *TAIL)))
"""Keys of a record, the same for every row and published baseline."""

RELATIVE_TO = {"groups": "dict_size", "warmup_steps": "steps", "min_lr": "lr"}
"""Options that presets give as a fraction of another: they vary only where the fraction does."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Rows whose FVUs compare, best first, and the published baselines of their model, layer and target."""

    key: Row
    by: str
    rows: list[Row]
    """Options, means of the metrics with `<metric>_low` and `<metric>_high`, `seeds` and `cell_ids` in the order of
    the seeds, `rank` from 1, `pareto`, and `tie`: not told from the first (null where no cell has two seeds)."""
    baselines: list[Published]
    same: dict[str, str]
    """Options all rows share, as text."""
    varying: list[str]
    left_out: list[tuple[str, str]]
    """Cells that are not ranked, and why."""
    notes: list[str]
    """What a reader must know about how this group was put together."""


def rank(runs: pl.DataFrame, by: str = "fvu") -> list[Group]:
    """Group and order the rows of the table `runs`.

    Raises:
        ConfigError: `by` is not a metric that says which way is better.
    """
    if by not in RANKABLE:
        raise ConfigError(f"--by {by}: no such metric; choose one of {', '.join(RANKABLE)}")
    found = comparable(runs)
    return [_group(dict(zip(KEY, key, strict=True)), rows, list(found), by) for key, rows in found.items()]


def comparable(runs: pl.DataFrame) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of `KEY`: models in alphabetical order, layers by number."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in runs.to_dicts():
        found[tuple(row[name] for name in KEY)].append(row)
    return dict(sorted(found.items(), key=lambda item: (str(item[0][0]), number(item[0][1]), *map(str, item[0][2:]))))


def _group(key: Row, runs: list[Row], keys: Sequence[tuple[Any, ...]], by: str) -> Group:
    left_out = [(row["cell_id"], reason) for row in runs if (reason := _not_ranked(row, by))]
    ranked = [row for row in runs if not _not_ranked(row, by)]
    cells = list(_by_cell(ranked).values())
    spreads = {name: pooled([_numbers(cell, name) for cell in cells]) for name in METRIC_NAMES}
    rows = [_mean_row(cell, spreads) for cell in cells]
    sign = -1 if RANKABLE[by] == "higher" else 1
    rows.sort(key=lambda row: (sign * row[by], number(row["fvu"]), number(row["l0"]), row["cell_id"]))
    front = pareto_front([(number(row["l0"]), number(row["fvu"])) for row in rows])
    for i, (row, mark) in enumerate(zip(rows, front, strict=True), 1):
        row |= {"rank": i, "pareto": mark, "tie": _ties(rows[0], row, by, spreads[by])}
    same, varying = _same_and_varying([row for row in rows if row["kind"] != "baseline"] or rows)
    return Group(
        key=key,
        by=by,
        rows=rows,
        baselines=published_for(key["model"], key["layer"], key["hook_out"]),
        same=same,
        varying=varying,
        left_out=left_out,
        notes=list(_notes(key, varying, keys, spreads[by], rows)),
    )


def _not_ranked(row: Row, by: str) -> str | None:
    """Why a run has no place in the ranking."""
    if row["status"] not in ("done", None):
        return f"its status is {row['status']}"
    if not math.isfinite(number(row[by])):
        return f"its {by} is {'missing' if row[by] is None else row[by]}"
    return None


def _by_cell(runs: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Runs that differ only in their seed, in the order of the seeds."""
    cells: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in sorted(runs, key=lambda row: (number(row["seed"]), row["cell_id"])):
        same = tuple(frozen(row[name]) for name in (*OPTIONS, *HISTORY))
        alone = None if row["kind"] == "cell" else row["cell_id"]  # other transcoders share the options of none
        cells[(*same, alone)].append(row)
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
        spread = spreads[name]
        row[name] = values[0] if len(values) == 1 else mean  # a single value as it is, whole numbers whole
        row[f"{name}_low"] = row[f"{name}_high"] = None
        if spread and mean is not None:
            half = spread.half_width(mean, len(values))
            row |= {f"{name}_low": mean - half, f"{name}_high": mean + half}
    return row


def _ties(first: Row, row: Row, by: str, spread: Spread | None) -> bool | None:
    if row is first:
        return False
    if spread is None:
        return None
    return not spread.resolves((first[by], first["n_seeds"]), (row[by], row["n_seeds"]))


def number(value: float | None) -> float:
    """A number that sorts: what is missing or not a number comes last."""
    return math.inf if value is None or math.isnan(value) else value


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Marks the points (l0, fvu) for which no other has both a lower or equal l0 and a lower fvu."""
    marks = [False] * len(points)
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        fvu = points[i][1]
        marks[i] = fvu <= best and math.isfinite(fvu)
        best = min(best, fvu)
    return marks


def _same_and_varying(rows: list[Row]) -> tuple[dict[str, str], list[str]]:
    same: dict[str, str] = {}
    varying: list[str] = []
    if not rows:
        return same, varying
    for name in (*OPTIONS, *HISTORY):
        if name in ALWAYS:
            continue
        if all(row[name] == rows[0][name] for row in rows):
            if name in OPTIONS and rows[0][name] not in (None, ""):
                same[name] = compact(rows[0][name])
        elif fraction := common_fraction(name, rows):
            same[name] = fraction
        else:
            varying.append(name)
    return same, varying


def common_fraction(name: str, rows: list[Row]) -> str | None:
    """`0.125,0.25,1*dict_size` where that gives the value of every row, whole numbers by rounding."""
    base = RELATIVE_TO.get(name)
    if base is None or any(not row[base] or row[name] is None for row in rows):
        return None
    values = [as_list(row[name]) for row in rows]
    if len({len(value) for value in values}) > 1:
        return None
    fractions = []
    for column in zip(*values, strict=True):
        slack = [0.5 if isinstance(value, int) else 1e-9 * abs(value) for value in column]
        low = max((v - s) / row[base] for v, s, row in zip(column, slack, rows, strict=True))
        high = min((v + s) / row[base] for v, s, row in zip(column, slack, rows, strict=True))
        if low >= high and any(column):
            return None
        fractions.append((low + high) / 2)
    return f"{','.join(f'{fraction:.4g}' for fraction in fractions)}*{base}"


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def compact(value: Any) -> str:
    """A value in the words of the command line, hashes cut to ten digits."""
    if isinstance(value, list):
        return f"[{','.join(compact(item) for item in value)}]"
    if isinstance(value, str) and len(value) >= 40 and set(value) <= set("0123456789abcdef"):
        return value[:10]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _notes(
    key: Row, varying: list[str], keys: Sequence[tuple[Any, ...]], spread: Spread | None, rows: list[Row]
) -> Iterator[str]:
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
    if spread is None and len(rows) > 1:
        yield "one seed each: nothing here says which differences are chance; seed=0,1,2 would"
    if not key["heldout_hash"] or not key["model_hash"]:
        yield "rows without heldout_hash or model_hash: nothing shows that they were measured on the same vectors"


def records(groups: Sequence[Group], top: int | None = None) -> Iterator[Row]:
    """One flat record per row and per published baseline; `top` limits the rows of each group."""
    blank = dict.fromkeys(FIELDS)
    for group in groups:
        for row in group.rows[:top]:
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
