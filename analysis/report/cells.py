"""Cells as a report names, tabulates and explains them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from analysis.rank import Group
from analysis.rows import ALWAYS, HISTORY, OPTIONS, Row, compact
from sweep.config import SLICES, Cell
from sweep.results import METRICS

__all__ = [
    "HEADINGS",
    "PLACED",
    "Field",
    "configs",
    "field",
    "label",
    "named_by",
    "rounded",
    "table_columns",
    "table_row",
]

HEADINGS = {
    "l0": "L0",
    "fvu": "FVU",
    "fvu_per_dimension": "FVU per dimension",
    "dead_fraction": "dead",
    "absorption_score": "redundancy",
}
"""Metrics with a column, and its heading."""

PLACED = {
    "fvu_ratio": ("FVU_ratio", "FVU over the baselines' at the same L0, of the mean over seeds; below 1 is better"),
    "fvu_verdict": ("verdict", "against the baselines at the same L0, by 95% intervals over held-out sequences"),
}
"""Columns of a group with measured baselines: heading and explanation."""

DOCS = {column.name: column.doc for column in METRICS}


@dataclass(frozen=True)
class Field:
    """One field of a table: what is read, and what it is sorted by."""

    text: str
    value: Any
    numeric: bool


def named_by(group: Group) -> list[str]:
    """Options that tell the cells of a group apart, the width and sparsity first."""
    cells = group.rows
    always = [name for name in ALWAYS if len({row[name] for row in cells}) > 1]
    return [*always, *(name for name in group.varying if name not in HISTORY)] or list(ALWAYS)


def label(row: Row, names: Sequence[str]) -> str:
    """A cell in the words of the command line; a baseline by its own name."""
    if row["kind"] == "baseline":
        return str(row["baseline"] or "baseline")
    return " ".join(f"{name}={compact(row[name])}" for name in names)


def table_columns(names: Sequence[str], placed: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Name, heading and explanation of each column that can be sorted by, but for the cell's id.

    Args:
        placed: of PLACED.
    """
    options = [(name, name, "") for name in dict.fromkeys((*ALWAYS, *names))]
    metrics = [(name, heading, DOCS[name]) for name, heading in HEADINGS.items()]
    return [*options, ("seed", "seed", ""), *((name, *PLACED[name]) for name in placed), *metrics]


def table_row(row: Row, names: Sequence[str], placed: Sequence[str] = ()) -> list[Field]:
    """The fields of `table_columns` for a run."""
    options: Mapping[str, Any] = {} if row["kind"] == "baseline" else row
    wanted = [*dict.fromkeys((*ALWAYS, *names)), "seed"]
    width = {"dict_size": row["dict_size"]}
    return [
        *(field(name, {**width, **options}.get(name)) for name in wanted),
        *(field(name, row.get(name)) for name in placed),
        *(field(name, row[name]) for name in HEADINGS),
    ]


def field(name: str, value: Any) -> Field:
    """A value with as many digits as people compare."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Field("-", None, True)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Field(compact(value), compact(value), False)
    return Field(_digits(name, value), value, True)


def _digits(name: str, value: float) -> str:
    if name.startswith("dead_fraction"):
        return f"{100 * value:.1f} %"
    if name.startswith("fvu"):
        return f"{value:.4f}"
    if name.startswith("l0"):
        return f"{value:.1f}"
    if isinstance(value, float):
        return compact(value) if name in OPTIONS else f"{value:.3g}"
    return f"{value:,}" if value >= 10_000 else str(value)


def configs(rows: Sequence[Row]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Every option as text: those all rows share, and for each row the others. Names are `<slice>.<option>`."""
    everything = [dict(_options(row)) for row in rows]
    if not everything:
        return {}, []
    first = everything[0]
    same = {key: value for key, value in first.items() if all(row.get(key) == value for row in everything)}
    return same, [{key: value for key, value in row.items() if key not in same} for row in everything]


def _options(row: Row) -> Iterator[tuple[str, str]]:
    for name, kind in (*SLICES.items(), ("cell", Cell)):
        for option in fields(kind):
            if option.name in row:
                yield f"{name}.{option.name}", "-" if row[option.name] is None else compact(row[option.name])


def rounded(value: Any) -> Any:
    """Five digits are more than a plot shows; what JSON cannot say is null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None
