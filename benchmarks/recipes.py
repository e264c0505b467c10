"""Ways to train a transcoder, ours and others', each on the batches it is given.

Ours, the simple one and matryoshka_sae take our step's gradients, which are exact, with an initialisation and an update
of their own. sparsify, dictionary_learning and SAELens run their own code, each in its environment
(`benchmarks.peers`). What is favourable to the others: they get our scaling of the data, our decay, a threshold fitted
as ours, and matryoshka_sae an auxiliary loss whose gradient reaches the encoder.
"""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contest import ROOT
from benchmarks.peers import PEERS, python
from benchmarks.trainee import Task
from sweep.config import Capacity, Cell, Revival
from sweep.initialise import initial_state
from sweep.language_model import Activations
from sweep.schedule import learning_rate
from sweep.state import TrainState
from sweep.step import sparse
from sweep.step.loss import Loss
from sweep.step.step import Learn, train_step_
from sweep.step.update import normalise_rows_
from sweep.transcoder import Parameters

__all__ = ["RECIPES", "Diverged", "Place", "Recipe"]

Start = Callable[[Tensor, Tensor, Cell], TrainState]


class Diverged(Exception):
    """The loss or the weights became no number."""


@dataclass(frozen=True)
class Place:
    """Where a recipe is carried out: threads it may take, and the folder of the peers' environments."""

    n_threads: int
    peers: Path


@dataclass(frozen=True)
class Recipe:
    """A way to train: options of ours that say the same, and how the state after the last step is reached.

    `train` gets the cell, the first window and the batches. `cost` is about how long a step takes, in steps of ours;
    `peer` names the library that must be there.
    """

    options: tuple[str, ...]
    train: Callable[[Cell, Activations, Iterable[Activations], Place], TrainState]
    cost: float = 1.0
    peer: str | None = None


def by_steps(start: Start, learn_: Learn) -> Callable[[Cell, Activations, Iterable[Activations], Place], TrainState]:
    """Train by our step, from a start and with a way to learn from gradients."""

    def train(cell: Cell, window: Activations, batches: Iterable[Activations], place: Place) -> TrainState:
        state = start(window.source.float(), window.target.float(), cell)
        for source, target in batches:
            slices = (cell.capacity, cell.schedule, cell.revival)
            report = train_step_(state, source, target, *slices, learn_=learn_)
            if not math.isfinite(float(report.loss.total)):
                raise Diverged(f"the loss of step {state.step - 1} is no number")
        return state

    return train


def from_data(source: Tensor, target: Tensor, cell: Cell) -> TrainState:
    return initial_state(source, target, cell.capacity, cell.seed, schedule=cell.schedule)


def from_zero_decoder(source: Tensor, target: Tensor, cell: Cell) -> TrainState:
    """sparsify's: a random linear layer, biases that centre source and target, a decoder that writes nothing yet."""
    state, generator = from_data(source, target, cell), torch.Generator().manual_seed(cell.seed)
    params = state.params.map(torch.zeros_like)
    width = params.W_enc.shape[0]
    params.W_enc = (torch.rand(params.W_enc.shape, generator=generator) * 2 - 1) / math.sqrt(width)
    params.b_enc = -(source.mean(0) * state.source_scale) @ params.W_enc
    params.b_dec = target.mean(0) * state.target_scale
    return TrainState.initial(params, state.source_scale, state.target_scale)


def from_data_zero_decoder(source: Tensor, target: Tensor, cell: Cell) -> TrainState:
    """Ours, but for a decoder that writes nothing yet."""
    state = from_data(source, target, cell)
    state.params.W_dec.zero_()
    return state


def from_tied(source: Tensor, target: Tensor, cell: Cell) -> TrainState:
    """matryoshka_sae's: random unit decoder rows, the encoder their transpose."""
    state, generator = from_data(source, target, cell), torch.Generator().manual_seed(cell.seed)
    params = state.params.map(torch.zeros_like)
    params.W_dec = torch.randn(params.W_dec.shape, generator=generator)
    normalise_rows_(params.W_dec)
    params.W_enc = params.W_dec.T.contiguous()
    return TrainState.initial(params, state.source_scale, state.target_scale)


Update = Callable[[TrainState, Parameters, float, tuple[float, ...]], None]


def learning_by(update_: Update) -> Learn:
    """A step with our gradients and another update."""

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
        found = sparse.gradients(state.params, source, target, capacity, revival, dead, state.guess)
        loss, gradients, state.guess = found
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


def train_peer(
    module: str, cell: Cell, window: Activations, batches: Iterable[Activations], place: Place
) -> TrainState:
    """Train by a library's own code, which gets the same batches, scaled as ours; the result as a state of ours."""
    name = module.removesuffix("_recipe")
    scaled = initial_state(window.source.float(), window.target.float(), Capacity(1, 1, "top_k", (1,)), seed=0)
    rates = tuple(learning_rate(step, cell.schedule) for step in range(cell.schedule.steps))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "parameters.pt"
        capacity = cell.capacity
        task = Task(
            d_in=window.source.shape[1],
            d_out=window.target.shape[1],
            dict_size=capacity.dict_size,
            top_k=capacity.top_k,
            batch_size=cell.schedule.batch_size,
            groups=capacity.groups,
            rates=rates,
            lr=cell.schedule.lr,
            n_batches_to_dead=cell.revival.n_batches_to_dead,
            seed=cell.seed,
            n_threads=place.n_threads,
            path=str(result),
        )
        command = [python(place.peers, PEERS[name]), "-m", f"benchmarks.peers.{module}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(place.n_threads)}
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=errors, stderr=errors, cwd=ROOT, env=environment
        )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
            for source, target in batches:
                process.stdin.write((source.float() * scaled.source_scale).numpy().tobytes())
                process.stdin.write((target.float() * scaled.target_scale).numpy().tobytes())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before the last batch, and said why
        if code := process.wait():
            errors.seek(0)
            raise SystemExit(f"{name} ended with exit code {code}:\n{errors.read()[-2000:]}")
        tensors = torch.load(result, weights_only=True)
    state = TrainState.initial(Parameters(**tensors), scaled.source_scale, scaled.target_scale)
    state.step = cell.schedule.steps
    return state


def by_peer(module: str) -> Callable[[Cell, Activations, Iterable[Activations], Place], TrainState]:
    return partial(train_peer, module)


NOT_NESTED = "group_fractions=[1.0]"
MAP, NO_MAP = "skip=true", "skip=false"
PLAIN = ("rate_by_spread=false", "centre_source=false", "refit_iterations=0", "prefix_weight=1", NO_MAP)
SIMPLE = (*PLAIN, "activation=top_k", NOT_NESTED, "aux_penalty=0", "betas=[0.9,0.999]")
BUSSMANN = (*PLAIN, "aux_penalty=0.03125", "top_k_aux=512", "n_batches_to_dead=20", "betas=[0.9,0.99]")
NO_AUX = "aux_penalty=0"
FREE = by_steps(from_data, learning_by(adam_free_))
FREE_FROM_ZERO = by_steps(from_data_zero_decoder, learning_by(adam_free_))

RECIPES = {
    "ours": Recipe((), by_steps(from_data, sparse.learn_)),
    "ours, not nested": Recipe((NOT_NESTED,), by_steps(from_data, sparse.learn_)),
    "ours, no linear map": Recipe((NO_MAP,), by_steps(from_data, sparse.learn_)),
    "ours, no linear map, not nested": Recipe((NO_MAP, NOT_NESTED), by_steps(from_data, sparse.learn_)),
    "simple": Recipe(SIMPLE, by_steps(from_zero_decoder, learning_by(adam_free_))),
    "simple, linear map": Recipe((*SIMPLE, MAP), by_steps(from_zero_decoder, learning_by(adam_free_))),
    "simple, linear map, refitted": Recipe(
        (*SIMPLE, MAP, "refit_iterations=10"), by_steps(from_zero_decoder, learning_by(adam_free_))
    ),
    "sparsify": Recipe(SIMPLE, by_peer("sparsify_recipe"), cost=1.5, peer="sparsify"),
    "dictionary_learning": Recipe(PLAIN, by_peer("dictionary_learning_recipe"), cost=3, peer="dictionary_learning"),
    "SAELens": Recipe(PLAIN, by_peer("sae_lens_recipe"), cost=4, peer="sae_lens"),
    "matryoshka_sae": Recipe(BUSSMANN, by_steps(from_tied, sparse.learn_)),
    "ours, free decoder": Recipe((*PLAIN, NO_AUX), FREE),
    "ours, free decoder, not nested": Recipe((*PLAIN, NO_AUX, NOT_NESTED), FREE),
    "ours, free zero decoder": Recipe((*PLAIN, NO_AUX), FREE_FROM_ZERO),
    "ours, free zero decoder, not nested": Recipe((*PLAIN, NO_AUX, NOT_NESTED), FREE_FROM_ZERO),
}
"""By the names rows carry. simple: sparsify's transcoder with Adam instead of its default, in plain torch."""
