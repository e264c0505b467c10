"""Rows of the table `runs` as they are compared: which belong together, and which options tell them apart.

An option that follows another by a fraction, as presets set it (steps by the text and the batch, groups by dict_size,
warmup_steps by steps, min_lr by lr), varies only where the fraction does.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import polars as pl

from sweep.config import SLICES, Cell, Data
from sweep.options import option_fields
from sweep.results import METRICS

__all__ = [
    "ALWAYS",
    "FOLLOWS",
    "HISTORY",
    "KEY",
    "METRIC_NAMES",
    "OPTIONS",
    "TEXT",
    "Row",
    "as_list",
    "common_fraction",
    "compact",
    "comparable",
    "number",
    "same_and_varying",
    "some",
]

Row = dict[str, Any]

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

TEXT = tuple(field.name for field in fields(Data))
"""Options that decide the token file."""

METRIC_NAMES = tuple(column.name for column in METRICS)


@dataclass(frozen=True)
class Base:
    """What an option is a fraction of, and how far a whole number may be from the fraction it was made from."""

    words: str
    of: Callable[[Row], float]
    """Of a row; 0 where there is none."""
    below: float = 0.5
    above: float = 0.5


def _epoch(row: Row) -> float:
    """Steps that read the training text once."""
    return row["n_tokens"] / row["batch_size"] if row["n_tokens"] and row["batch_size"] else 0.0


FOLLOWS = {
    "groups": Base("dict_size", lambda row: row["dict_size"] or 0),
    "steps": Base("n_tokens/batch_size", _epoch, below=0.0, above=1.0),
    "warmup_steps": Base("steps", lambda row: row["steps"] or 0),
    "min_lr": Base("lr", lambda row: row["lr"] or 0.0),
}


def comparable(runs: pl.DataFrame) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of `KEY`: models in alphabetical order, layers by number."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in runs.to_dicts():
        found[tuple(row[name] for name in KEY)].append(row)
    return dict(sorted(found.items(), key=lambda item: (str(item[0][0]), number(item[0][1]), *map(str, item[0][2:]))))


def same_and_varying(rows: Sequence[Row]) -> tuple[dict[str, str], list[str]]:
    """Options that all rows share, as text, and those (and `HISTORY`) in which they differ."""
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


def common_fraction(name: str, rows: Sequence[Row]) -> str | None:
    """`0.125,0.25,1*dict_size` where that gives the value of every row, whole numbers by rounding."""
    base = FOLLOWS.get(name)
    if base is None or any(row[name] is None or not base.of(row) for row in rows):
        return None
    values = [as_list(row[name]) for row in rows]
    if len({len(value) for value in values}) > 1:
        return None
    wholes = [base.of(row) for row in rows]
    fractions = []
    for column in zip(*values, strict=True):
        ends = [_ends(value, base) for value in column]
        low = max(below / whole for (below, _), whole in zip(ends, wholes, strict=True))
        high = min(above / whole for (_, above), whole in zip(ends, wholes, strict=True))
        if low >= high and any(column):
            return None
        fractions.append(_roundest(low, high))
    return f"{','.join(fractions)}*{base.words}"


def _ends(value: float, base: Base) -> tuple[float, float]:
    """Between which two numbers the value was before it was rounded."""
    slack = (base.below, base.above) if isinstance(value, int) else (1e-9 * abs(value),) * 2
    return value - slack[0], value + slack[1]


def _roundest(low: float, high: float) -> str:
    """The number with the fewest digits between two others."""
    middle = (low + high) / 2
    texts = (f"{middle:.{digits}g}" for digits in range(1, 12))
    return next((text for text in texts if low <= float(text) <= high), f"{middle:.12g}")


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def compact(value: Any) -> str:
    """A value in the words of the command line, hashes cut to ten digits."""
    if isinstance(value, list):
        return f"[{','.join(compact(item) for item in value)}]"
    if isinstance(value, str) and len(value) >= 40 and set(value) <= set("0123456789abcdef"):
        return value[:10]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def number(value: float | None) -> float:
    """A number that sorts: what is missing or not a number comes last."""
    return math.inf if value is None or math.isnan(value) else value
