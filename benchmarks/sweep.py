"""What sharing saves: `python -m benchmarks.sweep --json sweep.json` (`--model tiny` for a try in a minute).

grid    a gang of cells that differ in their seed, as one command, against as many separate commands, on a small budget;
        no activation cache, model and tokens ready. Seconds on the clock and, under `cpu_`, of the processor, which
        other work on the machine changes less.
parts   the gang alone, on twice the default budget with the default cache, empty at first, against its parts: one
        language-model pass plus the cells' own steps. The rest is what is done once for each cell, whatever the budget,
        so the ratio falls with the steps: n_tokens=65024 tells that of the default budget.
layers  tokens that go through the language model for one layer and for three.
cache   tokens a second that the activation cache reads, each block once.
pairs   the exact comparison of all decoder rows against a blocked product of all rows with all rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # python benchmarks/sweep.py is the same as python -m benchmarks.sweep

import torch

from benchmarks.contest import ROOT
from benchmarks.embedded import cell_of, prepare
from sweep.initialise import initial_state
from sweep.similarity import decoder_similarity
from sweep.step.step import train_step_

Row = dict[str, Any]

Taken = tuple[float, float]
"""Seconds on the clock, and of the processor."""

KINDS = ("", "cpu_")
"""Of seconds: those on the clock and those of the processor."""

BUDGET = ("n_tokens=16256", "epochs=1", "n_calibration_tokens=2032", "n_heldout_tokens=2032", "batch_size=512")

LONGER = ("n_tokens=130048",)
"""Twice the default budget: 1,016 steps of 512 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--model", default="gemma-3-270m", help="a preset of conf/model, default: %(default)s")
    parser.add_argument("--cells", type=int, default=8, help="of the gang")
    parser.add_argument("--cache", type=Path, default=Path("results/cache"), help="models and tokens")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("options", nargs="*", help="options for all, as for sweep_runner.py: dict_size=9216")
    asked = parser.parse_args()
    options = [f"model={asked.model}", *asked.options]
    rows = []
    for part in asked.parts:
        row = {"part": part, **PARTS[part](options, asked.cache.absolute(), asked.cells)}
        rows.append(row)
        print(" ".join(f"{name} {value:.4g}" if name != "part" else value for name, value in row.items()), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=2) + "\n")


def grid(options: Sequence[str], cache: Path, n_cells: int) -> Row:
    asked = [*BUDGET, *options, "cache_gib=0"]
    prepare([cell_of(asked)], cache, cached=False)  # model and tokens
    seeds = [str(seed) for seed in range(n_cells)]
    gang = command([*asked, f"seed={','.join(seeds)}"], cache)
    separate = [command([*asked, f"seed={seed}"], cache) for seed in seeds]
    row: Row = {"cells": n_cells}
    for i, kind in enumerate(KINDS):
        gang_s, separate_s = gang[i], sum(one[i] for one in separate)
        row |= {
            f"{kind}gang_s": gang_s,
            f"{kind}separate_s": separate_s,
            f"{kind}separate_over_gang": separate_s / gang_s,
        }
    return row


def parts(options: Sequence[str], cache: Path, n_cells: int) -> Row:
    asked = [*LONGER, *options]
    of_pass, of_steps = parts_of_a_run(asked, cache)
    with tempfile.TemporaryDirectory(dir=cache.parent) as empty:
        for name in ("models", "tokens"):
            (Path(empty) / name).symlink_to(cache / name)
        gang = command([*asked, f"seed={','.join(str(seed) for seed in range(n_cells))}"], Path(empty))
    row: Row = {"cells": n_cells, "steps": cell_of(asked).schedule.steps}
    for i, kind in enumerate(KINDS):
        row |= {
            f"{kind}gang_s": gang[i],
            f"{kind}pass_s": of_pass[i],
            f"{kind}steps_of_a_cell_s": of_steps[i],
            f"{kind}gang_over_pass_and_steps": gang[i] / (of_pass[i] + n_cells * of_steps[i]),
        }
    return row


def parts_of_a_run(options: Sequence[str], cache: Path) -> tuple[Taken, Taken]:
    """What the language model takes over everything a cell reads, and what all training steps of a cell take."""
    cell = cell_of(options)
    harvested = prepare([cell], cache, cached=False).harvested
    harvested.language_model()
    stream = prepare([cell], cache).stream
    blocks = sorted(stream.demand(cell.schedule.steps).blocks)
    of_pass = taken(lambda: [harvested.harvest(read, stream.sites) for read in blocks])
    window = stream.first_window()[cell.site]
    pair = window.source.float(), window.target.float()
    state = initial_state(*pair, cell.capacity, cell.seed, schedule=cell.schedule)
    slices = (cell.capacity, cell.schedule, cell.revival)
    steps = [
        taken(lambda batch=batch: train_step_(state, *batch[cell.site], *slices))
        for _, batch in stream.batches(0, cell.schedule.steps)
    ]
    return of_pass, (sum(step[0] for step in steps), sum(step[1] for step in steps))


def command(overrides: Sequence[str], cache: Path) -> Taken:
    """What a sweep in a results folder of its own takes, from the start of the process to its end, jobs included."""
    with tempfile.TemporaryDirectory() as results:
        words = [*overrides, f"cache_dir={cache}", f"results_dir={results}"]
        run = [sys.executable, "sweep_runner.py", "-m", *words]
        return taken(lambda: subprocess.run(run, cwd=ROOT, check=True, capture_output=True))


def layers(options: Sequence[str], cache: Path, n_cells: int) -> Row:
    last = cell_of(options).model.n_layers - 1
    three = [cell_of([*BUDGET, *options, f"layer={layer}"]) for layer in (0, last // 2, last)]
    tokens = []
    for cells in (three[-1:], three):
        prepared = prepare(cells, cache, cached=False)
        for _ in prepared.stream.batches(0, three[0].schedule.steps):
            pass
        tokens.append(prepared.harvested.n_tokens_seen)
    return {"tokens_of_one_layer": tokens[0], "tokens_of_three_layers": tokens[1]}


def cache_speed(options: Sequence[str], cache: Path, n_cells: int) -> Row:
    cell = cell_of([*BUDGET, *options])
    stream = prepare([cell], cache).stream
    blocks = list(range(stream.epochs.n_blocks))
    stream.blocks.read("train", blocks, stream.sites)  # harvested where they are not there yet
    again = prepare([cell], cache).stream
    read_s = seconds(lambda: [again.blocks.read("train", [block], again.sites) for block in blocks])
    return {"d": cell.model.d_in, "tokens_per_second": stream.epochs.epoch_tokens / read_s}


def pairs(options: Sequence[str], cache: Path, n_cells: int) -> Row:
    rows = torch.randn(18432, 640, generator=torch.Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True)
    exact_s = min(seconds(lambda: decoder_similarity(rows)) for _ in range(3))
    product_s = min(seconds(lambda: [piece @ rows.T for piece in rows.split(256)]) for _ in range(3))
    return {"exact_s": exact_s, "product_s": product_s, "exact_over_product": exact_s / product_s}


def taken(work: Callable[[], Any]) -> Taken:
    begun = time.perf_counter(), processor()
    work()
    return time.perf_counter() - begun[0], processor() - begun[1]


def processor() -> float:
    """Seconds of the processor so far, in this process and in its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(work: Callable[[], Any]) -> float:
    return taken(work)[0]


PARTS: dict[str, Callable[[Sequence[str], Path, int], Row]] = {
    "grid": grid,
    "parts": parts,
    "layers": layers,
    "cache": cache_speed,
    "pairs": pairs,
}

if __name__ == "__main__":
    main()
