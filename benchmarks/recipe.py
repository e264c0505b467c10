"""Whose recipe trains the better transcoder: `python -m benchmarks.recipe`.

1. Every recipe learns from the same cached activations in the same order, scaled alike, for as many tokens.
2. Each walks the same learning rates: from the middle one to the neighbour that is better, and on until one is worse.
   What decides is FVU on the calibration split, at a threshold fitted there.
3. At its best rate each gets more seeds. Only these runs are scored on the held-out split, all in one pass, with their
   predictions spliced into the language model: means over seeds with 95% intervals.

Each finished run is a line of `--runs`; given again, the command goes on after the last one.
"""

import argparse
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from analysis.spread import interval_of_mean
from benchmarks.embedded import Prepared, cell_of, prepare
from benchmarks.peers import FOLDER, PEERS, python
from benchmarks.recipes import RECIPES, Diverged, Place, Recipe
from sweep.activations import ActivationStream
from sweep.causal import CausalRows
from sweep.config import Cell
from sweep.evaluate import Predictor, evaluate
from sweep.finish import finish
from sweep.paths import write_json
from sweep.schedule import n_refit_batches
from sweep.state import TrainState
from sweep.transcoder import Transcoder, load_transcoder, save_transcoder

RATES = (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 3e-2)
"""Two decades."""

COMPARED = (
    "ours",
    "ours, not nested",
    "ours, no linear map",
    "ours, no linear map, not nested",
    "simple",
    "simple, linear map",
    "sparsify",
    "dictionary_learning",
    "SAELens",
    "matryoshka_sae",
)
"""What runs if nothing is chosen."""

SCORES = ("fvu", "fvu_per_dimension", "l0", "dead_fraction", "ce_recovered_mean")

QUICK = ("experiment=smoke", "n_heldout_tokens=1024")

Row = dict[str, Any]


class Runs:
    """The lines of finished runs, and their transcoders beside them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: list[Row] = [json.loads(line) for line in read_lines(path)]

    def find(self, **key: Any) -> Row | None:
        return next((row for row in self._rows if key.items() <= row.items()), None)

    def add(self, row: Row) -> None:
        with self._lock:
            self._rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def seconds(self, recipe: str) -> list[float]:
        return [row["seconds"] for row in self._rows if row["recipe"] == recipe and "seconds" in row]

    def folder(self, key: Row) -> Path:
        """Of a run's transcoder."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.path.with_suffix(".transcoders") / name


def read_lines(path: Path) -> list[str]:
    """The whole lines of a file; what a killed writer left of a last one is cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return whole.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(COMPARED))
    parser.add_argument("--changes", nargs="*", default=[], metavar="OPTION=VALUE", help="ours with an option changed")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates, from low to high")
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best rate; the walk is seed 0's")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows that the language model runs on; 0: none")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--quick", action="store_true", help="a random model, one rate and one seed: under a minute")
    parser.add_argument("--cache", type=Path, default=Path("results/cache"), help="models, tokens and activations")
    parser.add_argument("--peers", type=Path, default=FOLDER, help="where `benchmarks.peers build` put them")
    parser.add_argument("--runs", type=Path, default=Path("results/recipe.jsonl"), help="finished runs, a line each")
    parser.add_argument("--json", type=Path, help="the table as a list of rows")
    parser.add_argument("options", nargs="*", help="options for all, as for sweep_runner.py: layer=5 dict_size=9216")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.quick:
            asked.options, asked.rates, asked.seeds = [*QUICK, *asked.options], [1e-2], 1
            asked.runs = Path(folder) / "recipe.jsonl"
        table = Comparison(asked).table()
    print_table(table)
    if asked.json:
        write_json(asked.json, table)


class Comparison:
    """What was asked for, and its runs."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.runs = Runs(asked.runs)
        self.recipes = {name: RECIPES[name] for name in asked.recipes if self._is_there(RECIPES[name])}
        for change in asked.changes:
            self.recipes[f"ours, {change}"] = Recipe((change,), RECIPES["ours"].train)
        self.n_cores = len(os.sched_getaffinity(0))
        self.place = Place(max(self.n_cores // asked.jobs, 1), asked.peers)
        self._threads = threading.local()
        self._prepared = threading.Lock()

    def table(self) -> list[Row]:
        """Run what is missing; a row for each recipe."""
        self._say_plan()
        with ThreadPoolExecutor(self.asked.jobs) as pool:
            chosen = dict(zip(self.recipes, pool.map(self._best_rate, self.recipes), strict=True))
            wanted = [(name, lr, seed) for name, lr in chosen.items() if lr for seed in range(self.asked.seeds)]
            runs = list(pool.map(lambda run: self._measured(*run), wanted))
        scored = self._scored([run for run in runs if run["finite"]])
        return [summary(name, lr, scored) for name, lr in chosen.items()]

    def _is_there(self, recipe: Recipe) -> bool:
        if recipe.peer is None or python(self.asked.peers, PEERS[recipe.peer]).exists():
            return True
        print(f"{recipe.peer} is missing: python -m benchmarks.peers build {recipe.peer}", flush=True)
        return False

    def _best_rate(self, name: str) -> float | None:
        return walk(self.asked.rates, lambda lr: self._measured(name, lr, seed=0).get("calibration_fvu"))

    def _key(self, name: str, lr: float, seed: int) -> Row:
        """What tells runs apart: the cell says what recipe and presets are today."""
        cell_id = self._cell(name, lr, seed).cell_id
        return {"recipe": name, "options": self.asked.options, "lr": lr, "seed": seed, "cell_id": cell_id}

    def _cell(self, name: str, lr: float, seed: int) -> Cell:
        recipe = self.recipes.get(name) or RECIPES[name]
        return cell_of([*recipe.options, *self.asked.options, f"lr={lr}", f"seed={seed}"])

    def _measured(self, name: str, lr: float, seed: int) -> Row:
        """The run, found or carried out."""
        key = self._key(name, lr, seed)
        found = self.runs.find(**key, kind="run")
        if found is None:
            place = self._place(name, lr, seed)
            row, transcoder = measure(self.recipes[name], self._cell(name, lr, seed), place.stream, self.place)
            found = {**key, "kind": "run", **row}
            if transcoder:
                save_transcoder(self.runs.folder(key), transcoder, {})
            self.runs.add(found)
            print(f"{name}: lr {lr:g}, seed {seed}: {told(found)}", flush=True)
        return found

    def _place(self, name: str, lr: float, seed: int) -> Prepared:
        """The stream, one for each thread: it keeps a window of its own."""
        if not hasattr(self._threads, "place"):
            with self._prepared:
                torch.set_num_threads(self.n_cores)  # the cache's key holds it
                self._threads.place = prepare([self._cell(name, lr, seed)], self.asked.cache)
            torch.set_num_threads(self.place.n_threads)
        place: Prepared = self._threads.place
        return place

    def _scored(self, runs: Sequence[Row]) -> list[Row]:
        """The runs with their held-out scores, found or measured."""
        keys = [self._key(run["recipe"], run["lr"], run["seed"]) for run in runs]
        missing = [key for key in keys if not self.runs.find(**key, kind="score", rows=self.asked.rows)]
        if missing:
            print(f"scoring {len(missing)} transcoders on the held-out split", flush=True)
            first = missing[0]
            cell = self._cell(first["recipe"], first["lr"], first["seed"])
            place = self._place(first["recipe"], first["lr"], first["seed"])
            loaded = [load_transcoder(self.runs.folder(key)) for key in missing]
            predictors = {str(i): (cell.site, transcoder) for i, transcoder in enumerate(loaded)}
            causal = CausalRows.first(self.asked.rows, place.harvested)
            found = evaluate(predictors, place.stream.split("heldout"), cell.data.seq_len - 1, causal=causal)
            for i, key in enumerate(missing):
                metrics = {name: found[str(i)].metrics[name] for name in SCORES}
                self.runs.add({**key, "kind": "score", "rows": self.asked.rows, **metrics})
        return [row for key in keys if (row := self.runs.find(**key, kind="score", rows=self.asked.rows))]

    def _say_plan(self) -> None:
        """What will run at most, and about how long it takes."""
        n_walk, n_more = len(self.asked.rates), self.asked.seeds - 1
        done = {name: len(self.runs.seconds(name)) for name in self.recipes}
        print(f"{len(self.recipes)} recipes: {', '.join(self.recipes)}")
        print(f"each: up to {n_walk} learning rates, then {n_more} more seeds; {sum(done.values())} runs are done")
        typical = min(n_walk, 3) + n_more
        known = [s / self.recipes[name].cost for name in self.recipes for s in self.runs.seconds(name)]
        unit = mean(known) if known else self._seconds_of_a_run()
        left = 0.0
        for name, recipe in self.recipes.items():
            seconds = self.runs.seconds(name)
            each = mean(seconds) if seconds else unit * recipe.cost
            left += each * max(typical - done[name], 0)
        print(f"about {left / self.asked.jobs / 60:.0f} min, if each walks {min(n_walk, 3)} rates", flush=True)

    def _seconds_of_a_run(self) -> float:
        """From a few steps of ours."""
        stream = self._place("ours", self.asked.rates[0], 0).stream
        _, short, long = (
            timed(RECIPES["ours"], cell_of([*self.asked.options, f"steps={steps}"]), stream, self.place)
            for steps in (1, 2, 10)
        )
        return short + max(long - short, 0) / 8 * self._cell("ours", self.asked.rates[0], 0).schedule.steps


def walk(rates: Sequence[float], score: Callable[[float], float | None]) -> float | None:
    """The rate with the lowest score, from the middle outwards; None where every one diverged.

    From the middle it goes up while that is better, else down. A rate that diverged counts as worse; where the middle
    did, it goes down.
    """
    worst = float("inf")

    def loss(i: int) -> float:
        if not 0 <= i < len(rates):
            return worst
        found = score(rates[i])
        return worst if found is None else found

    at = len(rates) // 2
    best = loss(at)
    for direction in (1, -1):
        moved = False
        while (found := loss(at + direction)) < best or (found == best == worst and direction < 0 < at):
            at, best, moved = at + direction, found, True
        if moved:
            break
    return rates[at] if best < worst else None


def measure(recipe: Recipe, cell: Cell, stream: ActivationStream, place: Place) -> tuple[Row, Transcoder | None]:
    """Train one cell by a recipe and score it on the calibration split, on which its threshold is fitted."""
    started = time.perf_counter()
    row: Row = {"steps": cell.schedule.steps, "finite": False}
    try:
        state = trained(recipe, cell, stream, place)
    except Diverged:
        return row, None
    calibration = [block[cell.site] for block in stream.split("calibration")]
    sample = [batch[cell.site] for _, batch in stream.batches(0, n_refit_batches(cell))]
    transcoder = finish(state, cell, calibration, sample)
    scores = calibrated(transcoder, cell, stream)
    return row | {"finite": True, **scores, "seconds": round(time.perf_counter() - started, 1)}, transcoder


def trained(recipe: Recipe, cell: Cell, stream: ActivationStream, place: Place) -> TrainState:
    """The state after the last step.

    Raises:
        Diverged: something is no number.
    """
    batches = (batch[cell.site] for _, batch in stream.batches(0, cell.schedule.steps))
    state = recipe.train(cell, stream.first_window()[cell.site], batches, place)
    if not all(bool(tensor.isfinite().all()) for tensor in state.params.tensors()):
        raise Diverged("the weights are no numbers")
    return state


def timed(recipe: Recipe, cell: Cell, stream: ActivationStream, place: Place) -> float:
    started = time.perf_counter()
    trained(recipe, cell, stream, place)
    return time.perf_counter() - started


def calibrated(transcoder: Predictor, cell: Cell, stream: ActivationStream) -> Row:
    blocks = stream.split("calibration")
    metrics = evaluate({"it": (cell.site, transcoder)}, blocks, cell.data.seq_len - 1)["it"].metrics
    return {f"calibration_{name}": metrics[name] for name in ("fvu", "fvu_per_dimension", "l0", "dead_fraction")}


def summary(name: str, lr: float | None, scored: Iterable[Row]) -> Row:
    """Means over seeds and half the widths of their 95% intervals; null for a single seed."""
    rows = [row for row in scored if row["recipe"] == name and row["lr"] == lr]
    found: Row = {"recipe": name, "lr": lr, "n_seeds": len(rows)}
    for score in SCORES:
        values = [row[score] for row in rows if row[score] is not None]
        interval = interval_of_mean(values) if values else None
        found[score] = mean(values) if values else None
        found[f"{score}_half_width"] = (interval[1] - interval[0]) / 2 if interval else None
    return found


def print_table(rows: Sequence[Row]) -> None:
    print(f"\n{'recipe':32} {'lr':>7}  {'seeds':>5}  " + "  ".join(f"{score:>17}" for score in SCORES))
    for row in rows:
        lr = "none" if row["lr"] is None else f"{row['lr']:g}"
        print(f"{row['recipe']:32} {lr:>7}  {row['n_seeds']:5}  " + "  ".join(f"{shown(row, s):>17}" for s in SCORES))


def shown(row: Row, score: str) -> str:
    value, half = row[score], row[f"{score}_half_width"]
    if value is None:
        return ""
    return f"{value:.4f}" if half is None else f"{value:.4f} ± {half:.4f}"


def told(row: Row) -> str:
    if not row["finite"]:
        return "diverged"
    names = ("fvu", "fvu_per_dimension", "l0", "dead_fraction")
    scores = "  ".join(f"{name} {row[f'calibration_{name}']:.4f}" for name in names)
    return f"calibration {scores}  ({row['seconds']:.0f} s)"


if __name__ == "__main__":
    main()
