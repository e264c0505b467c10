"""Cross-entropies of runs on the held-out rows that all of them have.

`n_causal_rows` is no part of what a cell is, so the language model may have run on more rows for one than for another.
Means over different rows do not compare: where rows differ they are taken anew, from the sums per sequence.
"""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.rows import Row, some
from analysis.tables import load_table
from sweep.recovered import SUMS, causal_metrics
from sweep.results import CAUSAL_METRICS

__all__ = ["in_all", "on_common_rows", "sequences_of"]


def sequences_of(results: Path, runs: pl.DataFrame) -> pl.DataFrame | None:
    """The table of sequences, where comparing these runs takes it: with baselines, or on common rows."""
    numbers_of_rows = runs["n_causal_tokens"].drop_nulls()
    if (runs["kind"] == "baseline").any() or numbers_of_rows.n_unique() > 1:
        return load_table(results, "sequences").frame.collect()
    return None


def in_all(numbers: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The numbers that all of these have, rising."""
    return reduce(np.intersect1d, numbers) if numbers else np.empty(0)


def on_common_rows(rows: Sequence[Row], sequences: pl.DataFrame | None) -> tuple[list[Row], list[str]]:
    """The rows, with cross-entropies that compare, and what a reader must know of that.

    Args:
        rows: of `runs`, whose held-out rows are the same.
        sequences: the table; it may have other cells too. Runs that are not in it lose theirs, if they need it.
    """
    run = [row for row in rows if row["n_causal_tokens"]]
    if len({row["n_causal_tokens"] for row in run}) < 2:
        return list(rows), []
    sums = {} if sequences is None else _sums([row["cell_id"] for row in run], sequences)
    shared = in_all([part["sequence"].to_numpy() for part in sums.values()])
    found = {cell_id: _metrics(part.filter(pl.col("sequence").is_in(shared))) for cell_id, part in sums.items()}
    none = dict.fromkeys(CAUSAL_METRICS)
    notes = []
    if len(shared):
        fewest = min(run, key=lambda row: (row["n_causal_tokens"], row["cell_id"]))
        notes.append(
            f"cross-entropies are those of the {len(shared)} held-out rows that all of these have; n_causal_rows "
            f"differs, and {fewest['cell_id']} has fewest"
        )
    if lost := [row["cell_id"] for row in run if row["cell_id"] not in found]:
        notes.append(
            f"no cross-entropies of {some(lost)}: taken over other rows than the rest's, and without sums per held-out "
            "sequence (table sequences)"
        )
    return [row | found.get(row["cell_id"], none) if row["n_causal_tokens"] else row for row in rows], notes


def _sums(cell_ids: Sequence[str], sequences: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Of the runs that have them, on the sequences that were run."""
    known = [pl.col(column).is_not_null() for column in SUMS.values()]
    frame = sequences.filter(pl.col("cell_id").is_in(cell_ids), pl.col("n_causal_tokens") > 0, *known)
    return {str(name): part for (name,), part in frame.partition_by("cell_id", as_dict=True).items()}


def _metrics(part: pl.DataFrame) -> Row:
    n_tokens = int(part["n_causal_tokens"].sum())
    if not n_tokens:
        return dict.fromkeys(CAUSAL_METRICS)
    return causal_metrics(n_tokens, {name: float(part[column].sum()) for name, column in SUMS.items()})
