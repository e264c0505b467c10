"""One group of a report, a model, layer and target: its words, its tables, and the rows of its charts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import polars as pl

from analysis.effects import Effect, Effects
from analysis.effects_table import SHOWN
from analysis.rank import Group, pareto_front
from analysis.report import headline
from analysis.report.cells import (
    HEADINGS,
    PLACED,
    Field,
    configs,
    field,
    label,
    named_by,
    rounded,
    table_columns,
    table_row,
)
from analysis.report.charts import CELL, MEASURED, PUBLISHED
from analysis.report.curves import thinned
from analysis.report.histograms import cosines, densities
from analysis.report.sweeps import Sweep
from analysis.rows import ALWAYS, Row, compact, number
from sweep.results import METRICS

__all__ = ["MAX_DRAWN", "Place", "drawn", "make_place"]

MAX_DRAWN = 60
"""Runs of a page whose curves and histograms are drawn: more lines cannot be told apart."""

NEAR = 0.06
"""Of the width and height of a front: ranks written nearer than this lie on each other."""

NUMBERS = tuple(column.name for column in METRICS if column.better)


@dataclass(frozen=True)
class Place:
    """What the template shows of a group; `data` goes to the charts as JSON."""

    name: str
    best: str
    best_id: str | None
    facts: list[tuple[str, str, str]]
    sentences: list[str]
    left_out: list[tuple[str, str]]
    columns: list[tuple[str, str, str]]
    rows: list[tuple[Field, str, str | None, list[Field]]]
    """Rank, id, name where it is a baseline, and the fields of `columns`, of each run."""
    options: list[str]
    """Options a chart can be coloured or divided by."""
    metrics: list[str]
    curve_metrics: list[str]
    effect_heads: list[tuple[str, str]]
    effect_rows: list[tuple[str, int, list[tuple[str, str, bool]]]]
    """Option and step, pairs, and for each metric the change, half its interval, and whether that leaves out zero."""
    unmatched: list[str]
    citations: list[str]
    notes: dict[str, str]
    """What each chart leaves out."""
    data: dict[str, Any]


def drawn(rows: Sequence[Row], n: int) -> list[str]:
    """The runs of a ranking that have curves and histograms, best first.

    All, or `n`: the best for half of them, the others evenly spaced down the ranking to the last.
    """
    ranked = [cell_id for row in rows for cell_id in row["cell_ids"]]
    if len(ranked) <= n:
        return ranked
    best, rest = ranked[: n // 2], ranked[n // 2 :]
    n_others = n - len(best)
    return best + [rest[(i + 1) * len(rest) // n_others - 1] for i in range(n_others)]


def make_place(
    group: Group,
    runs: Sequence[Row],
    effects: Effects | None,
    curves: pl.DataFrame,
    latents: pl.DataFrame,
    sweeps: Sequence[Sweep],
    wanted: Sequence[str],
) -> Place:
    """Put a group together.

    Args:
        runs: the rows of the table `runs` in the group, seeds apart.
        effects: what its options did; None where there is no cell.
        wanted: cells whose curves and latents are drawn.
        curves: theirs, as far as there are any.
        latents: theirs, likewise.
    """
    names = named_by(group)
    placed = PLACED if any(standing.measure.name == "fvu" for standing in group.standings) else {}
    of_cell = {
        cell_id: {name: row[name] for name in ("rank", *placed)} for row in group.rows for cell_id in row["cell_ids"]
    }
    ranked: list[Row] = [{**row, "rank": None, **of_cell.get(row["cell_id"], {})} for row in runs]
    ranked.sort(key=lambda row: (number(row["rank"]), number(row["l0"]) if row["baseline"] else 0.0, row["cell_id"]))
    cells = [row for row in ranked if row["kind"] != "baseline"]
    lines, thinning = thinned(curves)
    options = [name for name in names if len({compact(row[name]) for row in cells}) > 1]
    same, differing = configs(ranked)
    seeds = len({row["seed"] for row in cells}) > 1
    changed = effects.effects if effects else []
    return Place(
        name=headline.place_of(group),
        best=headline.title(group, names),
        best_id=next((row["cell_ids"][0] for row in group.rows), None),
        facts=headline.facts(group),
        sentences=list(headline.sentences(group, names)),
        left_out=group.left_out,
        columns=table_columns(names, list(placed)),
        rows=[
            (field("rank", row["rank"]), row["cell_id"], row["baseline"], table_row(row, names, list(placed)))
            for row in ranked
        ],
        options=options,
        metrics=[name for name in NUMBERS if any(math.isfinite(number(row[name])) for row in cells)],
        curve_metrics=_curve_metrics({line["metric"] for line in lines}),
        effect_heads=[(name, HEADINGS[name]) for name in SHOWN],
        effect_rows=_effect_table(changed),
        unmatched=effects.unmatched if effects else [],
        citations=_citations(group),
        notes=_notes(cells, wanted, thinning, lines, latents),
        data={
            "names": {row["cell_id"]: _name(row, names, seeds) for row in ranked},
            "runs": _columns(cells, dict.fromkeys((*ALWAYS, *names, *NUMBERS))),
            "front": [*_front_rows(group, names), *_published_rows(group)],
            "curves": lines,
            "density": densities(latents),
            "cosine": cosines(latents),
            "effects": [_effect_point(i, effect) for i, effect in enumerate(changed)],
            "config": {"same": same, "cells": dict(zip((row["cell_id"] for row in ranked), differing, strict=True))},
            "commands": {
                row["cell_id"]: [i for i, sweep in enumerate(sweeps) if row["cell_id"] in sweep.cell_ids]
                for row in ranked
            },
        },
    )


def _name(row: Row, names: Sequence[str], seeds: bool) -> str:
    return label(row, names) + (f" seed={row['seed']}" if seeds and row["kind"] != "baseline" else "")


def _columns(rows: Sequence[Row], names: Mapping[str, None]) -> dict[str, list[Any]]:
    """Values by column: half the size of records."""
    plain = {"cell_id": [row["cell_id"] for row in rows]}
    return plain | {
        name: [compact(row[name]) if isinstance(row[name], list) else rounded(row[name]) for row in rows]
        for name in names
    }


def _front_rows(group: Group, names: Sequence[str]) -> list[dict[str, Any]]:
    """A point for each row of the ranking; the front of cells leaves out baselines, and theirs the cells."""
    found = []
    for foreign in (False, True):
        rows = group.measured if foreign else group.rows
        some = [row for row in rows if math.isfinite(number(row["fvu"])) and 0 < number(row["l0"]) < math.inf]
        marks = pareto_front([(row["l0"], row["fvu"]) for row in some])
        for row, mark in zip(some, marks, strict=True):
            point = {name: rounded(row[name]) for name in ("l0", "fvu", "fvu_low", "fvu_high", "rank", "n_seeds")}
            options = {name: compact(row[name]) if isinstance(row[name], list) else row[name] for name in names}
            about = {"kind": MEASURED if foreign else CELL, "name": label(row, names), "front": mark}
            found.append({**options, **point, **about, "labelled": False})
    _label([point for point in found if point["kind"] == CELL and point["front"]])
    return found


def _label(front: Sequence[dict[str, Any]]) -> None:
    """Mark the points whose ranks are written, best first: those that no written one is too near."""
    if not front:
        return
    places = {id(point): (math.log(point["l0"]), point["fvu"]) for point in front}
    spans = [max(max(part) - min(part), 1e-9) for part in zip(*places.values(), strict=True)]
    written: list[tuple[float, float]] = []
    for point in sorted(front, key=lambda point: number(point["rank"])):
        x, y = places[id(point)]
        if all(abs(x - a) / spans[0] > NEAR or abs(y - b) / spans[1] > NEAR for a, b in written):
            written.append((x, y))
            point["labelled"] = True


def _published_rows(group: Group) -> list[dict[str, Any]]:
    marks = pareto_front([(line.l0, line.value) for line in group.baselines])
    return [
        {"l0": line.l0, "fvu": line.value, "fvu_low": None, "kind": PUBLISHED, "front": mark}
        | {"name": f"{line.baseline} {line.path}"}
        for line, mark in zip(group.baselines, marks, strict=True)
    ]


def _citations(group: Group) -> list[str]:
    """Where the published numbers are from, each source once."""
    return list(
        dict.fromkeys(
            f"{line.baseline}, measured on other text ({line.dataset}, {line.n_tokens} tokens): {line.source}"
            for line in group.baselines
        )
    )


def _curve_metrics(names: set[str]) -> list[str]:
    """What a reader looks at first comes first."""
    first = [name for name in ("fvu", "loss", "l0", "n_dead", "lr") if name in names]
    return [*first, *sorted(names - set(first))]


def _step(effect: Effect) -> str:
    return f"{effect.option}: {effect.from_value} → {effect.to_value}"


def _sure(effect: Effect) -> bool:
    return effect.low is not None and effect.high is not None and (effect.low > 0 or effect.high < 0)


def _effect_point(order: int, effect: Effect) -> dict[str, Any]:
    """A point of the chart; `order` keeps its lines in the order of the table."""
    numbers = {name: rounded(getattr(effect, name)) for name in ("change", "low", "high")}
    about = {"metric": effect.metric, "n_pairs": effect.n_pairs, "sure": _sure(effect)}
    return {"order": order, "step": _step(effect), **about, **numbers}


def _effect_table(effects: Sequence[Effect]) -> list[tuple[str, int, list[tuple[str, str, bool]]]]:
    rows = []
    for step, same in groupby(effects, _step):
        by_metric = {effect.metric: effect for effect in same}
        fields = []
        for name in SHOWN:
            effect = by_metric.get(name)
            if effect is None:
                fields.append(("-", "", False))
                continue
            half = "" if effect.low is None or effect.high is None else f"± {(effect.high - effect.low) / 2:.2g}"
            fields.append((f"{effect.change:+.3g}", half, _sure(effect)))
        rows.append((step, max(effect.n_pairs for effect in by_metric.values()), fields))
    return rows


def _notes(
    cells: Sequence[Row], wanted: Sequence[str], thinning: int, lines: Sequence[Any], latents: pl.DataFrame
) -> dict[str, str]:
    cut = ""
    if len(wanted) < len(cells):
        n_best = len(wanted) // 2
        others = f"{len(wanted) - n_best} others, evenly spaced down the ranking"
        cut = f"Of {len(cells):,} runs the best {n_best} are drawn, and {others}. "
    points = f"A point is the mean over {thinning} steps or fewer. " if thinning > 1 else ""
    n_without = len(set(wanted) - {line["cell_id"] for line in lines})
    missing = f"{n_without} runs have no readable curve. " if n_without else ""
    n_bare = len(set(wanted) - set(latents["cell_id"].unique()))
    bare = f"{n_bare} runs have no readable table of latents. " if n_bare else ""
    return {"curves": cut + points + missing, "density": cut + bare}
