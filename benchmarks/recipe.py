"""Whose recipe trains the better transcoder: `python -m benchmarks.recipe --json recipe.json`.

1. Every recipe learns from the same cached activations in the same order, scaled alike, with the same warm-up, decay
   and number of tokens.
2. Each tries the same learning rates. The best is chosen on the calibration split, never on the reported one.
3. At its best rate each gets more seeds. Reported are means over seeds on the held-out split, with 95% intervals.

A recipe of a peer is its initialisation, selection rule, loss and update in plain torch. Two liberties are in the
peers' favour: they get our scaling of the data and our decay, and where they have an auxiliary loss it is ours, whose
gradient reaches the encoder. Rows are written to the file as they come, and those found there are not run again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.embedded import Prepared, cell_of, prepare
from sweep.activations import ActivationStream
from sweep.config import Capacity, Cell, Revival
from sweep.evaluate import evaluate
from sweep.finish import finish
from sweep.initialise import initial_state
from sweep.paths import write_json
from sweep.state import TrainState
from sweep.step import sparse
from sweep.step.loss import Loss
from sweep.step.step import Learn, train_step_
from sweep.step.update import normalise_rows_
from sweep.transcoder import Parameters, Transcoder

RATES = (3e-4, 1e-3, 3e-3, 5e-3, 1e-2, 3e-2)
"""Two decades."""

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
"""Student's t by degrees of freedom."""

SCORES = ("fvu", "fvu_per_dimension", "l0", "dead_fraction", "absorption_score")

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A way to train: options of ours that say the same, where it starts and how it updates."""

    options: tuple[str, ...]
    start: Callable[[Tensor, Tensor, Cell], TrainState]
    learn_: Learn


def from_data(source: Tensor, target: Tensor, cell: Cell) -> TrainState:
    return initial_state(source, target, cell.capacity, cell.seed)


def from_zero_decoder(source: Tensor, target: Tensor, cell: Cell) -> TrainState:
    """sparsify's: a random linear layer, and a decoder that writes nothing yet."""
    state, generator = from_data(source, target, cell), torch.Generator().manual_seed(cell.seed)
    params = state.params.map(torch.zeros_like)
    width = params.W_enc.shape[0]
    params.W_enc = (torch.rand(params.W_enc.shape, generator=generator) * 2 - 1) / math.sqrt(width)
    return TrainState.initial(params, state.source_scale, state.target_scale)


def from_tied(source: Tensor, target: Tensor, cell: Cell) -> TrainState:
    """dictionary_learning's and matryoshka_sae's: random unit decoder rows, the encoder their transpose."""
    state, generator = from_data(source, target, cell), torch.Generator().manual_seed(cell.seed)
    params = state.params.map(torch.zeros_like)
    params.W_dec = torch.randn(params.W_dec.shape, generator=generator)
    normalise_rows_(params.W_dec)
    params.W_enc = params.W_dec.T.contiguous()
    return TrainState.initial(params, state.source_scale, state.target_scale)


Update = Callable[[TrainState, Parameters, float, tuple[float, ...]], None]


def learning_by(update_: Update) -> Learn:
    """A step with our gradients, which are exact, and another update."""

    def learn_(
        state: TrainState,
        source: Tensor,
        target: Tensor,
        capacity: Capacity,
        revival: Revival,
        dead: Tensor,
        lr: float,
        betas: tuple[float, ...],
    ) -> Loss:
        found = sparse.gradients(state.params, source, target, capacity, revival, dead, state.threshold)
        loss, gradients, state.threshold = found
        update_(state, gradients.parameters(), lr, betas)
        return loss

    return learn_


def adam_free_(state: TrainState, gradients: Parameters, lr: float, betas: tuple[float, ...]) -> None:
    """Adam without a constraint on decoder rows."""
    for (name, parameter), (_, gradient) in zip(state.params.items(), gradients.items(), strict=True):
        first, second = getattr(state.first_moments, name), getattr(state.second_moments, name)
        first.lerp_(gradient, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        n = state.step + 1
        scale = (second / (1 - betas[1] ** n)).sqrt_().add_(1e-8)
        parameter.addcdiv_(first, scale, value=-lr / (1 - betas[0] ** n))


def signum_(state: TrainState, gradients: Parameters, lr: float, betas: tuple[float, ...]) -> None:
    """The sign of momentum 0.95, sparsify's default optimiser; `betas` plays no part."""
    for (name, parameter), (_, gradient) in zip(state.params.items(), gradients.items(), strict=True):
        first = getattr(state.first_moments, name).lerp_(gradient, 0.05)
        parameter.add_(first.sign(), alpha=-lr)


SPARSIFY = ("activation=top_k", "group_fractions=[1.0]", "aux_penalty=0")
BUSSMANN = (
    "activation=batch_top_k",
    "aux_penalty=0.03125",
    "top_k_aux=512",
    "n_batches_to_dead=20",
    "betas=[0.9,0.99]",
)

RECIPES = {
    "ours": Recipe((), from_data, sparse.learn_),
    "ours, not nested": Recipe(("group_fractions=[1.0]",), from_data, sparse.learn_),
    "sparsify, Adam": Recipe(SPARSIFY, from_zero_decoder, learning_by(adam_free_)),
    "sparsify, signum": Recipe(SPARSIFY, from_zero_decoder, learning_by(signum_)),
    "batch top-k": Recipe((*BUSSMANN, "group_fractions=[1.0]"), from_tied, sparse.learn_),
    "Matryoshka batch top-k": Recipe(BUSSMANN, from_tied, sparse.learn_),
}
"""By the names rows carry. batch top-k: dictionary_learning; Matryoshka batch top-k: matryoshka_sae."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates each recipe tries")
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the chosen rate; the rates are tried on seed 0")
    parser.add_argument("--cache", type=Path, default=Path("results/cache"), help="models, tokens and activations")
    parser.add_argument("--json", type=Path, help="rows, written as they come and read again")
    parser.add_argument("options", nargs="*", help="options for all, as for sweep_runner.py: layer=5 dict_size=9216")
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json and asked.json.exists() else []
    place: Prepared | None = None

    def measured(name: str, lr: float, seed: int) -> Row:
        nonlocal place
        cell = cell_of([*RECIPES[name].options, *asked.options, f"lr={lr}", f"seed={seed}"])
        key = {"recipe": name, "options": asked.options, "lr": lr, "seed": seed}
        found = next((row for row in rows if key.items() <= row.items()), None)
        if found is None:
            place = place or prepare([cell], asked.cache)
            found = {**key, **measure(RECIPES[name], cell, place.stream)}
            rows.append(found)
            if asked.json:
                write_json(asked.json, rows)
            print(f"{name}: lr {lr:g}, seed {seed}: {told(found)}", flush=True)
        return found

    chosen = {}
    for name in asked.recipes:
        chosen[name] = best_rate([measured(name, lr, seed=0) for lr in asked.rates])
    print(f"\n{'recipe':24} {'lr':>7}  " + "  ".join(f"{score:>17}" for score in SCORES))
    for name, lr in chosen.items():
        print(f"{name:24} {lr:7g}  " + summary([measured(name, lr, seed) for seed in range(asked.seeds)]))


def best_rate(rows: Iterable[Row]) -> float:
    """The rate with the lowest FVU on the calibration split; runs that diverged do not count."""
    rate: float = min((row for row in rows if row["finite"]), key=lambda row: row["calibration_fvu"])["lr"]
    return rate


def measure(recipe: Recipe, cell: Cell, stream: ActivationStream) -> Row:
    """Train one cell by a recipe and score it on both splits."""
    started = time.perf_counter()
    state = train(recipe, cell, stream)
    row: Row = {"steps": cell.schedule.steps, "finite": all(bool(t.isfinite().all()) for t in state.params.tensors())}
    if not row["finite"]:
        return row
    calibration = [block[cell.site] for block in stream.split("calibration")]
    transcoder = finish(state, cell, calibration, sum(len(block.source) for block in calibration))
    row |= {f"calibration_{name}": value for name, value in scores(transcoder, cell, stream, "calibration").items()}
    row |= scores(transcoder, cell, stream, "heldout")
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def train(recipe: Recipe, cell: Cell, stream: ActivationStream) -> TrainState:
    """The state after the last step, or after the first one that is not finite."""
    window = stream.first_window()[cell.site]
    state = recipe.start(window.source.float(), window.target.float(), cell)
    for _, batch in stream.batches(0, cell.schedule.steps):
        slices = (cell.capacity, cell.schedule, cell.revival)
        report = train_step_(state, *batch[cell.site], *slices, learn_=recipe.learn_)
        if not math.isfinite(float(report.loss.total)):
            state.params.b_dec.fill_(math.nan)
            return state
    return state


def scores(transcoder: Transcoder, cell: Cell, stream: ActivationStream, split: str) -> Row:
    seq_tokens = cell.data.seq_len - 1
    metrics = evaluate({"it": (cell.site, transcoder)}, stream.split(split), seq_tokens)["it"].metrics
    return {name: metrics[name] for name in SCORES}


def summary(rows: Sequence[Row]) -> str:
    """Mean and half the width of the 95% interval over seeds, for each score."""
    return "  ".join(f"{interval([row[score] for row in rows]):>17}" for score in SCORES)


def interval(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    half = T_975[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.4f} ± {half:.4f}"


def told(row: Row) -> str:
    if not row["finite"]:
        return "diverged"
    return "  ".join(f"{score} {row[score]:.4f}" for score in SCORES) + f"  ({row['seconds']} s)"


if __name__ == "__main__":
    main()
