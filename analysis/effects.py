"""What each swept option did, the others held fixed.

1. Runs are grouped as in a ranking: only FVUs of the same rows and weights are subtracted, and cross-entropies of the
   rows that all have.
2. Two runs are a pair if they differ in one option, seeds equal too. Values that follow another option (steps follow
   the text and batch_size, groups dict_size, warmup_steps steps, min_lr lr) count as equal if they are the same
   fraction of it. Each value is compared with the smallest one it has pairs with.
3. The change of a metric is the mean over pairs, with Student's 95% interval.
4. Options A, B and C change several values at once: a run has a preset of conf/ if its values are those that the
   preset would give it, whatever was typed.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.common_rows import on_common_rows
from analysis.presets import decides, has_preset, preset
from analysis.rows import (
    FOLLOWS,
    KEY,
    METRIC_NAMES,
    OPTIONS,
    TEXT,
    Row,
    as_list,
    common_fraction,
    compact,
    comparable,
    number,
)
from analysis.spread import interval_of_mean
from sweep.config import frozen

__all__ = ["FIELDS", "Effect", "Effects", "effects"]

IMPROVEMENTS = {"A": "capacity", "B": "schedule", "C": "revival"}
"""The letters under which presets `improved` of these groups are known."""

FROM = ("base", "tuned")
"""What an improvement is measured from."""

FIELDS = (
    *(*KEY, "option", "from_value", "to_value", "metric"),
    *("n_pairs", "change", "low", "high", "mean_from", "mean_to"),
)


@dataclass(frozen=True)
class Effect:
    """The mean change of one metric as one option goes from one value to another, in runs equal otherwise."""

    option: str
    from_value: str
    to_value: str
    metric: str
    n_pairs: int
    change: float
    low: float | None
    """95% interval of the change; null for a single pair."""
    high: float | None
    mean_from: float
    mean_to: float


@dataclass(frozen=True)
class Effects:
    """The effects of one group; `key` is that of a ranking."""

    key: Row
    effects: list[Effect]
    unmatched: list[str]
    """Options that vary, but never alone: nothing can be said of them."""
    notes: list[str]
    """What a reader must know about the metrics."""


Pair = tuple[Row, Row]


def effects(runs: pl.DataFrame, sequences: pl.DataFrame | None = None) -> list[Effects]:
    """The effects of every option that varies in the table `runs`, by group.

    Args:
        sequences: the table of that name; without it cross-entropies that were taken over different rows are left out.
    """
    found = comparable(runs.filter(pl.col("kind") == "cell", pl.col("status") == "done"))
    groups = {key: on_common_rows(rows, sequences) for key, rows in found.items()}
    return [_group(dict(zip(KEY, key, strict=True)), *group) for key, group in groups.items()]


def _group(key: Row, rows: list[Row], notes: list[str]) -> Effects:
    found: list[Effect] = []
    unmatched: list[str] = []
    together: set[str] = set()
    for (letter, group), origin in itertools.product(IMPROVEMENTS.items(), FROM):
        if pairs := _improvement_pairs(rows, group, origin):
            found += _changes(f"{letter} {group}", origin, "improved", pairs)
            together |= decides(preset(group, origin)) | decides(preset(group, "improved"))
    for name in OPTIONS:
        if common_fraction(name, rows) or len({frozen(row[name]) for row in rows}) == 1:
            continue
        levels = _levels(rows, name)
        changes = [effect for steps in _steps(levels, name) for effect in _changes(name, *steps)]
        found += changes
        if len(levels) > 1 and not changes and name not in together:
            unmatched.append(name)
    return Effects(key, found, unmatched, notes)


def _levels(rows: list[Row], name: str) -> dict[str, list[Row]]:
    """Runs by the value of an option as text, the smallest first; by its fraction of another where that varies."""
    base = FOLLOWS.get(name)
    relative = base is not None and len({base.of(row) for row in rows}) > 1
    levels: dict[str, list[Row]] = defaultdict(list)

    def size(row: Row) -> Any:
        whole = base.of(row) if base and relative else 0
        return [value / whole for value in as_list(row[name])] if whole and row[name] is not None else row[name]

    for row in sorted(rows, key=lambda row: _order(size(row))):
        fraction = common_fraction(name, [row]) if relative else None
        levels[fraction or compact(row[name])].append(row)
    return levels


def _steps(levels: Mapping[str, list[Row]], name: str) -> Iterator[tuple[str, str, list[Pair]]]:
    """From one value of an option to another, and the pairs: each value from the first that it has pairs with."""
    for i, there in enumerate(levels):
        for here in itertools.islice(levels, i):
            if pairs := _pairs(levels[here], levels[there], {name}):
                yield here, there, pairs
                break


def _improvement_pairs(rows: list[Row], group: str, origin: str) -> list[Pair]:
    """Runs with the preset `origin` of a group of presets, each with its like that has `improved`."""
    try:
        before, after = preset(group, origin), preset(group, "improved")
    except FileNotFoundError:  # not every group has a tuned preset
        return []
    here, there = ([row for row in rows if has_preset(row, values)] for values in (before, after))
    return _pairs(here, there, {*decides(before), *decides(after)})


def _pairs(here: list[Row], there: list[Row], changed: Collection[str]) -> list[Pair]:
    """Pairs that are equal in all options but those `changed`, in seed and in text.

    Of several partners that differ in what follows another option, those that follow it count.
    """
    followers = [name for name in FOLLOWS if name not in changed]
    history = ["schema_version"] if set(changed) & set(TEXT) else ["schema_version", "tokens_hash"]
    fixed = [name for name in OPTIONS if name not in changed and name not in followers]

    def follows(name: str, a: Row, b: Row) -> bool:
        if name == "min_lr" and "decay" in changed and "constant" in (a["decay"], b["decay"]):
            return True  # a constant rate has no other
        return bool(a[name] == b[name] or common_fraction(name, [a, b]))

    def equal(row: Row) -> tuple[Any, ...]:
        return tuple(frozen(row[name]) for name in (*fixed, "seed", *history))

    alike: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in there:
        alike[equal(row)].append(row)
    pairs = [(a, b) for a in here for b in alike[equal(a)] if all(follows(name, a, b) for name in followers)]
    closeness = [sum(common_fraction(name, pair) is not None for name in followers) for pair in pairs]
    closest: dict[str, int] = defaultdict(int)
    for pair, close in zip(pairs, closeness, strict=True):
        for row in pair:
            closest[row["cell_id"]] = max(closest[row["cell_id"]], close)
    return [
        (a, b)
        for (a, b), close in zip(pairs, closeness, strict=True)
        if close == closest[a["cell_id"]] == closest[b["cell_id"]]
    ]


def _changes(option: str, from_value: str, to_value: str, pairs: Sequence[Pair]) -> list[Effect]:
    """The mean change of each metric that both runs of a pair have."""
    found = []
    for metric in METRIC_NAMES:
        values = [(a[metric], b[metric]) for a, b in pairs]
        known = [(a, b) for a, b in values if math.isfinite(number(a)) and math.isfinite(number(b))]
        if not known:
            continue
        differences = [b - a for a, b in known]
        low, high = interval_of_mean(differences) or (None, None)
        change, mean_from, mean_to = (math.fsum(part) / len(known) for part in (differences, *zip(*known, strict=True)))
        found.append(Effect(option, from_value, to_value, metric, len(known), change, low, high, mean_from, mean_to))
    return found


def _order(value: Any) -> tuple[bool, bool, Any]:
    """Missing values first, then by size or alphabet."""
    return (value is not None, isinstance(value, str), frozen(value) if value is not None else 0)
