"""A peer that trains a transcoder in a process of its own, on batches that come through its standard input.

1. The first line is a task, as JSON.
2. Then come the batches: source [batch, d_in] and target [batch, d_out], float32, one after the other.
3. After the last one the four tensors are written to the task's file, in the shapes of `sweep.transcoder`; a latent is
   active where `source @ W_enc + b_enc` is large.

Torch and the standard library are all this needs, so it runs in the environments of peers.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Task", "Trainee", "scheduled", "serve"]


@dataclass(frozen=True)
class Task:
    """What to train; `rates` are the learning rates of all steps, `groups` cumulative ends of prefixes."""

    d_in: int
    d_out: int
    dict_size: int
    top_k: int
    batch_size: int
    groups: tuple[int, ...]
    rates: tuple[float, ...]
    lr: float
    """The highest of the rates; what a recipe without a schedule uses throughout."""
    n_batches_to_dead: int
    seed: int
    n_threads: int
    path: str


class Trainee(Protocol):
    """A transcoder in training."""

    def step(self, source: Tensor, target: Tensor) -> None:
        """Learn from a batch."""

    def parameters(self) -> dict[str, Tensor]:
        """W_enc [d_in, dict_size], b_enc, W_dec [dict_size, d_out] and b_dec, for inference."""


def serve(make: Callable[[Task], Trainee]) -> None:
    """Train as told, write the result, and end."""
    asked: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    task = Task(**asked | {"groups": tuple(asked["groups"]), "rates": tuple(asked["rates"])})
    torch.set_num_threads(task.n_threads)
    torch.manual_seed(task.seed)
    trainee = make(task)
    for _ in task.rates:
        source, target = (received(task.batch_size, width) for width in (task.d_in, task.d_out))
        trainee.step(source, target)
    torch.save({name: tensor.detach().clone() for name, tensor in trainee.parameters().items()}, task.path)


def received(n: int, width: int) -> Tensor:
    """The next `n` rows of the input."""
    n_bytes = 4 * n * width
    data = bytearray(sys.stdin.buffer.read(n_bytes))
    if len(data) < n_bytes:
        raise SystemExit("the input ended before the last batch")
    return torch.frombuffer(data, dtype=torch.float32).view(n, width)


def scheduled(optimizer: torch.optim.Optimizer, task: Task) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler for the task's rates, where a library has one of its own that is stepped after every update."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = task.lr
    last = len(task.rates) - 1
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: task.rates[min(step, last)] / task.lr)
