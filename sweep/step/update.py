"""How gradients change the state: Adam on unit-norm decoder rows."""

import torch
from torch import Tensor
from torch.optim.adam import adam

from sweep.state import TrainState
from sweep.transcoder import Parameters

__all__ = ["normalise_rows_", "update_"]


def update_(state: TrainState, gradients: Parameters, lr: float, betas: tuple[float, ...]) -> None:
    """One Adam step (Kingma & Ba 2015, eps 1e-8, no weight decay), in place; `state.step` is not changed.

    The part of the decoder's gradient along each row is removed first: the renormalisation afterwards would undo
    it, and it would only disturb the moments.
    """
    rows, along = state.params.W_dec, gradients.W_dec
    along -= (along * rows).sum(dim=1, keepdim=True) * rows
    steps_done = [torch.tensor(float(state.step), dtype=torch.float32, device=rows.device) for _ in range(4)]
    adam(
        state.params.tensors(),
        gradients.tensors(),
        state.first_moments.tensors(),
        state.second_moments.tensors(),
        [],
        steps_done,
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=0.0,
        eps=1e-8,
        maximize=False,
    )
    normalise_rows_(rows)


def normalise_rows_(rows: Tensor) -> None:
    """Scale each row to Euclidean norm 1, in place; a zero row stays zero."""
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
