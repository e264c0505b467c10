"""How much saving stalls training: `python -m benchmarks.checkpoint --json checkpoint.json`.

A gang trains on made-up activations of the model's width and saves before every other stretch of steps, as a job does:
the same code, into a folder that should lie on the disk of the results. A stretch with a save is held against the one
without that follows it, so that noise hits both alike, and what a save does to the steps after it is counted too.

step_s    a step of all cells, median
save_s    a save of all cells, median
stall_s   what a stretch with a save takes longer than its like, median
stall     the share of the time that this is, one save every --minutes, at most as often as SaveClock lets it
cpu_s     processor time of a save of all cells, median: a busy machine changes it little
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.embedded import cell_of
from sweep import checkpoint
from sweep.config import Cell
from sweep.initialise import initial_state
from sweep.language_model import Activations
from sweep.paths import CellFolder
from sweep.state import TrainState
from sweep.train import SAVING_SHARE, Run

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2, help="of the gang")
    parser.add_argument("--steps", type=int, default=3, help="in a stretch")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of stretches")
    parser.add_argument("--minutes", type=float, default=5.0, help="between saves, as checkpoint_minutes=")
    parser.add_argument("--folder", type=Path, help="where to save, default: the system's folder for temporary files")
    parser.add_argument("--json", type=Path, help="write the row here as well")
    parser.add_argument("options", nargs="*", help="as for sweep_runner.py, default: dict_size=18432")
    asked = parser.parse_args()
    cells = [cell_of([*(asked.options or ["dict_size=18432"]), f"seed={seed}"]) for seed in range(asked.cells)]
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        row = measure(cells, Path(folder), asked.steps, asked.rounds, asked.minutes)
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if asked.json:
        asked.json.write_text(json.dumps(row, indent=2) + "\n")


def measure(cells: Sequence[Cell], folder: Path, n_steps: int, n_rounds: int, minutes: float) -> Row:
    """Train and save the cells below the folder; the row of what that took."""
    runs = [run_of(cell, CellFolder(folder / cell.cell_id)) for cell in cells]
    batch = activations(cells[0], cells[0].schedule.batch_size, seed=1)

    def stretch() -> float:
        return seconds(lambda: [run.advance(batch) for _ in range(n_steps) for run in runs])

    steps, saves, processor, stalls = [stretch()], [], [], []
    for _ in range(n_rounds):
        begun = time.process_time()
        saves.append(seconds(lambda: [run.checkpoint() for run in runs]))
        processor.append(time.process_time() - begun)
        with_save = saves[-1] + stretch()
        steps.append(stretch())
        stalls.append(with_save - steps[-1])
    stall = statistics.median(stalls)
    return {
        "cells": len(cells),
        "mib_of_a_save": sum(path.stat().st_size for path in newest(folder)) / 2**20,
        "step_s": statistics.median(steps) / n_steps,
        "save_s": statistics.median(saves),
        "cpu_s": statistics.median(processor),
        "stall_s": stall,
        "stall": stall / (max(60 * minutes, stall / SAVING_SHARE) + stall),
    }


def run_of(cell: Cell, folder: CellFolder) -> Run:
    """A run of the cell that saves as in a job, by nobody's clock."""
    first = activations(cell, 2 * cell.schedule.batch_size, seed=0)
    state = initial_state(first.source, first.target, cell.capacity, cell.seed, schedule=cell.schedule)

    def save(state: TrainState) -> None:
        checkpoint.save(state, folder, cell, {})

    def back(step: int) -> TrainState:
        raise AssertionError(f"diverged, and would go back to step {step}")

    return Run(cell, state, save, back, checkpoint_steps=0)


def activations(cell: Cell, n: int, seed: int) -> Activations:
    """So many made-up tokens: a target of rank 64 that depends on the source, and noise."""
    draw = torch.Generator().manual_seed(seed)
    source = torch.randn(n, cell.model.d_in, generator=draw)
    through = torch.randn(cell.model.d_in, 64, generator=draw) @ torch.randn(64, cell.model.d_out, generator=draw)
    target = source @ through / cell.model.d_in + 0.1 * torch.randn(n, cell.model.d_out, generator=draw)
    return Activations(source, target)


def newest(folder: Path) -> list[Path]:
    """The files of the last checkpoint of every cell."""
    return [path for cell in folder.iterdir() for path in max(cell.glob("checkpoints/step_*")).iterdir()]


def seconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
