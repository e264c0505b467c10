"""The reference: dense autograd, plain enough to be obviously right. The sparse step is compared with it."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sweep.config import Capacity, Revival
from sweep.state import TrainState
from sweep.step.loss import Loss, transcoder_loss
from sweep.step.update import update_
from sweep.transcoder import Parameters

__all__ = ["gradients", "learn_"]


def gradients(
    params: Parameters,
    source: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    capacity: Capacity,
    revival: Revival,
    dead: Bool[Tensor, " dict_size"],
) -> tuple[Loss, Parameters]:
    """The loss and its gradient with respect to every parameter."""
    leaves = params.map(lambda tensor: tensor.detach().requires_grad_())
    with torch.enable_grad():
        loss = transcoder_loss(leaves, source, target, capacity, revival, dead)
        grads = torch.autograd.grad(loss.total, leaves.tensors())
    return replace(loss, total=loss.total.detach()), Parameters(*grads)


def learn_(
    state: TrainState,
    source: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    capacity: Capacity,
    revival: Revival,
    dead: Bool[Tensor, " dict_size"],
    lr: float,
    betas: tuple[float, ...],
) -> Loss:
    """Change the parameters and moments by one step on scaled source and target."""
    loss, grads = gradients(state.params, source, target, capacity, revival, dead)
    update_(state, grads, lr, betas)
    return loss
