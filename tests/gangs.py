"""Run cells for real in a test: configs frozen on disk, one gang, everything `run_gang` does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from make import NO_BASELINES, make_cell

from sweep.config import Cell
from sweep.launch.rounds import freeze
from sweep.options import Workflow
from sweep.paths import CacheFolder, ResultsFolder
from sweep.progress import Report, silent
from sweep.results import TABLES

__all__ = ["GANG", "make_workflow", "run_cells", "same_bytes"]

GANG: list[dict[str, Any]] = [
    {},
    {"layer": 2, "dict_size": 96, "top_k": 6, "steps": 45, "seed": 3, "skip": True, "refit_iterations": 2},
    {"hook_in": "norm_unit", "lr": 1e-2, "activation": "top_k", "decay": "cosine", "refit_iterations": 3},
    {"n_batches_to_dead": 2, "aux_penalty": 0.5, "dict_size": 128, "top_k": 2, "steps": 37},
]
"""Cells of different layer, hook, width, k, lr, steps, seed, activation, revival and refit on one stream."""


def make_workflow(root: Path, cache: CacheFolder, **overrides: Any) -> Workflow:
    values: dict[str, Any] = {
        "results_dir": str(root),
        "cache_dir": str(cache.root),
        "cache_gib": 1.0,
        "dry_run": False,
        "checkpoint_steps": 10,
        "checkpoint_minutes": 0.0,
        "keep_checkpoints": True,
        "n_contexts": 0,
        "n_causal_rows": 0,
        "device": "cpu",
        **NO_BASELINES,
        "hang_minutes": 0.0,
        "retry": "all",
        "wait": True,
    }
    return Workflow(**values | overrides)


def run_cells(
    cells: Sequence[Cell], workflow: Workflow, report: Report = silent, stop: Callable[[], bool] = lambda: False
) -> ResultsFolder:
    from sweep.job import run_gang

    results = ResultsFolder(Path(workflow.results_dir))
    results.create()
    for cell in cells:
        freeze(cell, results)
    run_gang([cell.cell_id for cell in cells], workflow, report, stop)
    return results


def same_bytes(one: ResultsFolder, other: ResultsFolder, cell: Cell) -> None:
    """Assert that two runs of a cell left the same bytes: last checkpoint, transcoder, metrics and tables."""
    first, second = one.cell(cell.cell_id), other.cell(cell.cell_id)
    last = cell.schedule.steps
    for name in ("state.safetensors", "state.json"):
        assert (first.checkpoint(last) / name).read_bytes() == (second.checkpoint(last) / name).read_bytes()
    for path in ("transcoder/transcoder.safetensors", "transcoder/config.json", "metrics.json", "summary.txt"):
        assert (first.root / path).read_bytes() == (second.root / path).read_bytes()
    for table in ("curves", "latents", "sequences"):
        assert one.row(table, cell.cell_id).read_bytes() == other.row(table, cell.cell_id).read_bytes()
    volatile = [column.name for column in TABLES["runs"] if column.volatile]
    rows = [pl.read_parquet(folder.row("runs", cell.cell_id)).drop(volatile) for folder in (one, other)]
    assert rows[0].equals(rows[1])
    assert rows[0].width > 70


def gang_cells() -> list[Cell]:
    return [make_cell(**overrides) for overrides in GANG]
