"""The reference step: dense autograd, plain enough to be obviously right. Faster steps are compared with it."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sweep.config import Capacity, Revival, Schedule
from sweep.schedule import learning_rate
from sweep.state import TrainState
from sweep.step.loss import Loss, transcoder_loss
from sweep.step.update import update_
from sweep.transcoder import Parameters

__all__ = ["StepReport", "gradients", "train_step_"]


@dataclass(frozen=True)
class StepReport:
    """What a step did; tensors stay on the device until somebody asks for a number."""

    loss: Loss
    n_dead: int
    lr: float

    def values(self) -> dict[str, float]:
        """The step's point on every training curve."""
        values = {"loss": float(self.loss.total), "n_dead": float(self.n_dead), "lr": self.lr}
        values["l0"] = float((self.loss.latents > 0).sum()) / len(self.loss.latents)
        values |= {f"loss_{i}": float(prefix) for i, prefix in enumerate(self.loss.prefixes)}
        if self.loss.aux is not None:
            values["aux_loss"] = float(self.loss.aux)
        return values


def gradients(
    params: Parameters,
    source: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    capacity: Capacity,
    revival: Revival,
    dead: Int64[Tensor, " n_dead"],
) -> tuple[Loss, Parameters]:
    """The loss and its gradient with respect to every parameter."""
    leaves = params.map(lambda tensor: tensor.detach().requires_grad_())
    with torch.enable_grad():
        loss = transcoder_loss(leaves, source, target, capacity, revival, dead)
        grads = torch.autograd.grad(loss.total, leaves.tensors())
    return replace(loss, total=loss.total.detach()), Parameters(*grads)


def train_step_(
    state: TrainState,
    source: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    capacity: Capacity,
    schedule: Schedule,
    revival: Revival,
) -> StepReport:
    """Learn from one batch of raw source and target, in place."""
    dead = (state.batches_since_fired >= revival.n_batches_to_dead).nonzero().flatten()
    dtype = state.params.W_enc.dtype
    scaled_source = source.to(dtype) * state.source_scale
    scaled_target = target.to(dtype) * state.target_scale
    loss, grads = gradients(state.params, scaled_source, scaled_target, capacity, revival, dead)
    lr = learning_rate(state.step, schedule)
    update_(state, grads, lr, schedule.betas)
    state.batches_since_fired += 1
    state.batches_since_fired[(loss.latents > 0).any(dim=0)] = 0
    state.step += 1
    return StepReport(loss, n_dead=len(dead), lr=lr)
