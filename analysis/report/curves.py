"""Training curves, thinned until a page can hold them."""

from typing import Any

import polars as pl

from analysis.report.cells import rounded

__all__ = ["MAX_POINTS_PER_CURVE", "thinned"]

MAX_POINTS = 40_000
"""Points of all curves of a page together."""

MAX_POINTS_PER_CURVE = 200
"""More than a plot has pixels for."""

MIN_POINTS_PER_CURVE = 20


def thinned(curves: pl.DataFrame) -> tuple[list[dict[str, Any]], int]:
    """One record per cell and metric, and how many steps a point stands for at most.

    A point is the mean over its steps, at the last of them. Values that are no number are left out.

    Args:
        curves: rows of the table `curves`.
    """
    finite = curves.filter(pl.col("value").is_finite())
    n_curves = max(finite.select("cell_id", "metric").unique().height, 1)
    n_points = max(min(MAX_POINTS // n_curves, MAX_POINTS_PER_CURVE), MIN_POINTS_PER_CURVE)
    place = pl.int_range(pl.len()).over("cell_id", "metric", order_by="step")
    size = (pl.len().over("cell_id", "metric") / n_points).ceil().cast(pl.Int64)
    points = (
        finite.with_columns(bucket=place // size, size=size)
        .group_by("cell_id", "metric", "bucket", maintain_order=True)
        .agg(pl.col("step").max(), pl.col("value").mean(), pl.col("size").first())
        .sort("cell_id", "metric", "step")
        .group_by("cell_id", "metric", maintain_order=True)
        .agg("step", "value", pl.col("size").first())
    )
    records = [
        {**row, "value": [rounded(value) for value in row["value"]]}
        for row in points.drop("size").iter_rows(named=True)
    ]
    return records, max(points["size"].to_list(), default=1)
