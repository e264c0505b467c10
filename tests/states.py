"""States of a cell as checkpoints hold them, and whether two are the same."""

import torch
from make import make_cell

from sweep.initialise import initial_state
from sweep.state import TrainState

__all__ = ["CELL", "INPUTS", "equal", "make_state"]

CELL = make_cell(rate_by_spread=True, centre_source=True)
INPUTS = {"tokens_hash": "hash", "model_hash": "weights"}


def make_state(step: int) -> TrainState:
    g = torch.Generator().manual_seed(step)
    pair = (torch.randn(99, 32, generator=g) for _ in range(2))
    state = initial_state(*pair, CELL.capacity, step, schedule=CELL.schedule)
    state.step = step
    state.curve = [(0, "loss", 0.1 + 0.2), (step, "l0", 1e-17)]
    return state


def equal(one: TrainState, other: TrainState) -> bool:
    tensors = zip(one.tensors().items(), other.tensors().items(), strict=True)
    same = all(a == b and torch.equal(x, y) for (a, x), (b, y) in tensors)
    return same and one.scalars() == other.scalars()
