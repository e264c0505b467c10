"""How often latents fire, and how alike their decoder rows are: the share of a cell's latents in each bin."""

import math
from typing import Any

import polars as pl

from analysis.report.cells import rounded

__all__ = ["LOWEST", "cosines", "densities"]

LOWEST = -6
"""Power of ten at which the densities begin; rarer ones count into the first bin."""

BINS_PER_DECADE = 5
COSINE_BINS = 50


def densities(latents: pl.DataFrame) -> list[dict[str, Any]]:
    """Per cell: the lower ends of the bins of the density, and the share of all its latents in each. Silent ones are
    in none, so the shares of a cell sum to the share that fires."""
    place = ((pl.col("density").log10().clip(LOWEST, 0) - LOWEST) * BINS_PER_DECADE).floor().cast(pl.Int64)
    n_bins = -LOWEST * BINS_PER_DECADE
    bins = pl.when(pl.col("density") > 0).then(place.clip(0, n_bins - 1))
    return _shares(latents, bins, [10 ** (LOWEST + i / BINS_PER_DECADE) for i in range(n_bins + 1)])


def cosines(latents: pl.DataFrame) -> list[dict[str, Any]]:
    """Per cell: bins of the cosine with the most similar decoder row, and the share of its latents in each."""
    place = ((pl.col("nearest_cosine") + 1) / 2 * COSINE_BINS).floor().cast(pl.Int64).clip(0, COSINE_BINS - 1)
    return _shares(latents, place, [-1 + 2 * i / COSINE_BINS for i in range(COSINE_BINS + 1)])


def _shares(latents: pl.DataFrame, bins: pl.Expr, edges: list[float]) -> list[dict[str, Any]]:
    counted = latents.with_columns(bin=bins).group_by("cell_id", "bin").len().drop_nulls("bin").sort("cell_id", "bin")
    n_latents = dict(latents.group_by("cell_id").len().iter_rows())
    found: dict[str, dict[int, int]] = {}
    for cell_id, place, n in counted.iter_rows():
        found.setdefault(cell_id, {})[place] = n
    return [_outline(cell_id, counts, n_latents[cell_id], edges) for cell_id, counts in found.items()]


def _outline(cell_id: str, counts: dict[int, int], n: int, edges: list[float]) -> dict[str, Any]:
    """The steps of a histogram: bins beyond the outermost that hold anything are dropped, but for one at each end."""
    first, last = max(min(counts) - 1, 0), min(max(counts) + 1, len(edges) - 2)
    places = range(first, last + 1)
    return {
        "cell_id": cell_id,
        "low": [rounded(edges[i]) for i in places],
        "high": [rounded(edges[i + 1]) for i in places],
        "share": [rounded(counts.get(i, 0) / n) if n else math.nan for i in places],
    }
