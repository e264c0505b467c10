"""The latents of one cell for a reader: what excites them, how often they fire, and which others write the same."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from analysis.report.cells import rounded
from analysis.report.decoder import Neighbour, neighbours
from analysis.tables import load_table
from sweep.errors import ConfigError, ResultsError
from sweep.paths import ResultsFolder

__all__ = ["CHOICES", "LatentPage", "latent_page", "the_cell"]

N_SHOWN = 16
"""Latents of each choice."""

N_CONTEXTS = 20
"""Contexts of a latent; more would bury them."""

CHOICES = {"asked": "Asked for", "most": "Most used", "least": "Least used", "random": "At random"}


@dataclass(frozen=True)
class LatentPage:
    """What the page shows; `cards` by latent, `chosen` the latents of each choice in order."""

    cell_id: str
    n_latents: int
    n_silent: int
    chosen: dict[str, list[int]]
    cards: list[dict[str, Any]]
    remarks: list[str]


def the_cell(runs: pl.DataFrame, asked: str, best: str | None) -> str:
    """The id of the cell that was asked for: `best`, an id or its beginning.

    Raises:
        ConfigError: no cell or several are called so.
    """
    known = runs.filter(pl.col("kind").is_null() | (pl.col("kind") != "baseline"))["cell_id"].to_list()
    if asked == "best" and best:
        return best
    found = [cell_id for cell_id in known if cell_id == asked] or [c for c in known if asked and c.startswith(asked)]
    if len(found) == 1:
        return str(found[0])
    shown = f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}" or "none is finished"
    what = "several cells begin so" if found else "no such cell among the runs chosen"
    raise ConfigError(f"--latents {asked}: {what}; give the id of one, or best: {shown}")


def latent_page(results: Path, cell_id: str, asked: Sequence[int]) -> LatentPage:
    """Choose latents of a cell and gather what is known of each.

    Args:
        asked: latents to show beside the most and the least used, and some at random.

    Raises:
        ConfigError: the cell has no latent of such a number.
        ResultsError: its table of latents is missing or damaged.
    """
    table = load_table(results, "latents", [cell_id])
    facts = {row["latent"]: row for row in table.frame.collect().iter_rows(named=True)}
    if not facts:
        why = "; ".join(table.warnings) or "its table of latents is empty"
        raise ResultsError(f"no latents of cell {cell_id} in {results / 'latents'}: {why}")
    if wrong := [latent for latent in asked if latent not in facts]:
        raise ConfigError(f"--latent {wrong[0]}: cell {cell_id} has latents 0 to {max(facts)}")
    chosen = _chosen(facts, asked)
    latents = sorted({latent for some in chosen.values() for latent in some})
    remarks = []
    contexts = load_table(results, "contexts", [cell_id])
    remarks += contexts.warnings
    if not contexts.n_files:
        remarks.append(
            "This cell stored no contexts, so there is no text to show. Sweep with n_contexts=20 into another "
            "results_dir to keep them."
        )
    try:
        near = neighbours(ResultsFolder(results).cell(cell_id).transcoder, latents)
    except ResultsError as error:
        near = {latent: _from_table(facts[latent]) for latent in latents}
        remarks.append(f"Only the nearest decoder row of each latent is shown: {error}")
    texts = _contexts(contexts.frame, latents)
    return LatentPage(
        cell_id=cell_id,
        n_latents=len(facts),
        n_silent=sum(not row["density"] for row in facts.values()),
        chosen=chosen,
        cards=[_card(facts[latent], texts.get(latent, []), near[latent]) for latent in latents],
        remarks=remarks,
    )


def _chosen(facts: Mapping[int, Mapping[str, Any]], asked: Sequence[int]) -> dict[str, list[int]]:
    """Latents by choice; silent ones only where they are asked for."""
    alive = sorted((latent for latent, row in facts.items() if row["density"]), key=lambda i: (facts[i]["density"], i))
    some = random.Random(0).sample(alive, min(N_SHOWN, len(alive)))
    chosen = {"asked": list(dict.fromkeys(asked)), "most": alive[::-1][:N_SHOWN], "least": alive[:N_SHOWN]}
    return {name: latents for name, latents in {**chosen, "random": sorted(some)}.items() if latents}


def _from_table(row: Mapping[str, Any]) -> list[Neighbour]:
    known = row["nearest_latent"] is not None and row["nearest_cosine"] is not None
    return [(row["nearest_latent"], row["nearest_cosine"])] if known else []


def _contexts(frame: pl.LazyFrame, latents: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """Contexts by latent, the largest activation first: tokens, the value at each, which one is the peak."""
    found: dict[int, list[dict[str, Any]]] = {}
    wanted = pl.col("latent").is_in(latents) & (pl.col("place") < N_CONTEXTS)
    for row in frame.filter(wanted).sort("latent", "place").collect().iter_rows(named=True):
        tokens, values = row["tokens"] or [], row["activations"] or []
        if not tokens or len(tokens) != len(values):
            continue
        peak = max(range(len(values)), key=lambda i: values[i] or 0.0)
        found.setdefault(row["latent"], []).append(
            {"tokens": tokens, "values": [rounded(v or 0.0) for v in values], "peak": peak, "sequence": row["sequence"]}
        )
    return found


def _card(row: Mapping[str, Any], contexts: list[dict[str, Any]], near: Sequence[Neighbour]) -> dict[str, Any]:
    peaks = Counter(context["tokens"][context["peak"]] for context in contexts)
    facts = ("latent", "group", "density", "mean_activation", "max_activation")
    return {
        **{name: rounded(row[name]) for name in facts},
        "peaks": peaks.most_common(5),
        "near": [[latent, round(cosine, 3)] for latent, cosine in near],
        "contexts": contexts,
    }
