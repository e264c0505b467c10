"""Which cells are best: grouped by what makes their numbers comparable, best held-out FVU first.

1. Runs are grouped by language model, layer, target and held-out rows; across groups nothing compares.
2. Inside a group they are ordered by FVU, and the Pareto front of L0 and FVU is marked.
3. Options that are the same for the whole group are told apart from those that vary.
4. Published baselines of the same model, layer and target stand beside them.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from sweep.baselines.published import Published, published_for
from sweep.config import SLICES, Cell
from sweep.options import option_fields
from sweep.results import METRICS

__all__ = ["FIELDS", "KEY", "Group", "pareto_front", "rank", "records"]

KEY = ("model", "layer", "hook_out", "heldout_hash", "model_hash", "model_dtype", "activation_dtype")
"""Runs that agree on these were measured on the same vectors, so their FVUs compare."""

OPTIONS = tuple(
    name
    for kind, name, _, metadata in option_fields()
    if kind in (*SLICES.values(), Cell) and metadata["identity"] and name not in KEY
)
ALWAYS = ("dict_size", "top_k", "seed")
"""Options that have a column even where they do not vary."""

HISTORY = ("tokens_hash", "schema_version")
"""Not options, but a group in which they vary must say so."""

METRIC_NAMES = tuple(column.name for column in METRICS)
HEAD = (*KEY, "kind", "rank", "pareto", "cell_id", "hook_in")
TAIL = (*HISTORY, "fvu_comparable_at", "same_heldout_rows", "baseline", "citation")
FIELDS = tuple(dict.fromkeys((*HEAD, *METRIC_NAMES, *OPTIONS, *TAIL)))
"""Keys of a record, the same for every run and published baseline."""

RELATIVE_TO = {"groups": "dict_size", "warmup_steps": "steps", "min_lr": "lr"}
"""Options that presets give as a fraction of another: they vary only where the fraction does."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs whose FVUs compare, best first, and the published baselines of their model, layer and target."""

    key: Row
    rows: list[Row]
    """Columns of `runs`, with `rank` (from 1) and `pareto` added."""
    baselines: list[Published]
    same: dict[str, str]
    """Options all rows share, as text."""
    varying: list[str]
    notes: list[str]
    """What a reader must know about how this group was put together."""


def rank(runs: pl.DataFrame) -> list[Group]:
    """Group and order the rows of the table `runs`."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in runs.to_dicts():
        found[tuple(row[name] for name in KEY)].append(row)
    keys = sorted(found, key=lambda key: (str(key[0]), number(key[1]), *map(str, key[2:])))
    return [_group(dict(zip(KEY, key, strict=True)), found[key], keys) for key in keys]


def _group(key: Row, rows: list[Row], keys: Sequence[tuple[Any, ...]]) -> Group:
    rows = sorted(rows, key=lambda row: (number(row["fvu"]), number(row["l0"]), row["cell_id"]))
    front = pareto_front([(number(row["l0"]), number(row["fvu"])) for row in rows])
    rows = [{**row, "rank": i, "pareto": mark} for i, (row, mark) in enumerate(zip(rows, front, strict=True), 1)]
    same, varying = _same_and_varying([row for row in rows if row["kind"] != "baseline"] or rows)
    return Group(
        key=key,
        rows=rows,
        baselines=published_for(key["model"], key["layer"], key["hook_out"]),
        same=same,
        varying=varying,
        notes=list(_notes(key, varying, keys)),
    )


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
    for name in (*OPTIONS, *HISTORY):
        if name in ALWAYS:
            continue
        if all(row[name] == rows[0][name] for row in rows):
            if name in OPTIONS and rows[0][name] not in (None, ""):
                same[name] = compact(rows[0][name])
        elif fraction := _common_fraction(name, rows):
            same[name] = fraction
        else:
            varying.append(name)
    return same, varying


def _common_fraction(name: str, rows: list[Row]) -> str | None:
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


def _notes(key: Row, varying: list[str], keys: Sequence[tuple[Any, ...]]) -> Iterator[str]:
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
    if not key["heldout_hash"] or not key["model_hash"]:
        yield "rows without heldout_hash or model_hash: nothing shows that they were measured on the same vectors"


def records(groups: Sequence[Group], top: int | None = None) -> Iterator[Row]:
    """One flat record per run and per published baseline; `top` limits the runs of each group."""
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
