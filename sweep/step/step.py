"""One step of training: what every way to learn from a batch has in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sweep.config import Capacity, Revival, Schedule
from sweep.schedule import learning_rate
from sweep.state import TrainState
from sweep.step import reference, sparse
from sweep.step.loss import Loss

__all__ = ["Learn", "StepReport", "default_learn", "train_step_"]

Learn = Callable[
    [TrainState, Tensor, Tensor, Capacity, Revival, Bool[Tensor, " dict_size"], float, tuple[float, ...]], Loss
]
"""Changes parameters and moments by one step on scaled source and target: `sparse.learn_` or `reference.learn_`."""


@dataclass(frozen=True)
class StepReport:
    """What a step did; tensors stay on the device until somebody asks for a number."""

    loss: Loss
    target: Float[Tensor, "batch d_out"]
    n_dead: Int[Tensor, ""]
    lr: float

    def values(self) -> dict[str, float]:
        """The step's point on every training curve.

        `fvu` is the squared error of the full reconstruction over the targets' squared deviation from their mean in
        this batch; it is left out where they do not vary.
        """
        values = {"loss": float(self.loss.total), "n_dead": float(self.n_dead), "lr": self.lr}
        values["l0"] = int(self.loss.n_active) / len(self.target)
        values |= {f"loss_{i}": float(prefix) for i, prefix in enumerate(self.loss.prefixes)}
        if (deviation := float((self.target - self.target.mean(dim=0)).square().mean())) > 0:
            values["fvu"] = float(self.loss.prefixes[-1]) / deviation
        if self.loss.aux is not None and values["n_dead"] > 0:
            values["aux_loss"] = float(self.loss.aux)
        return values


def default_learn(device: torch.device, step_dtype: str) -> Learn:
    """The sparse step on the CPU in float32; else the dense one, on CUDA because the two were not compared there.

    In bfloat16 only matrix products are rounded: both factors, and what they give, the pre-latents among it.
    """
    if step_dtype == "bfloat16":
        return cast(Learn, torch.autocast(device.type, torch.bfloat16)(reference.learn_))
    return sparse.learn_ if device.type == "cpu" else reference.learn_


@torch.no_grad()
def train_step_(
    state: TrainState,
    source: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    capacity: Capacity,
    schedule: Schedule,
    revival: Revival,
    learn_: Learn | None = None,
) -> StepReport:
    """Learn from one batch of raw source and target, in place.

    On CUDA the host waits for nothing here: it may put the next steps into the queue before this one has run.
    """
    learn_ = learn_ or default_learn(state.params.W_enc.device, schedule.step_dtype)
    dead = state.batches_since_fired >= revival.n_batches_to_dead
    dtype = state.params.W_enc.dtype
    scaled_source = source.to(dtype) * state.source_scale
    scaled_target = target.to(dtype) * state.target_scale
    lr = learning_rate(state.step, schedule) * state.lr_factor
    loss = learn_(state, scaled_source, scaled_target, capacity, revival, dead, lr, schedule.betas)
    state.batches_since_fired += 1
    state.batches_since_fired.masked_fill_(loss.fired, 0)
    state.step += 1
    return StepReport(loss, scaled_target, n_dead=dead.count_nonzero(), lr=lr)
