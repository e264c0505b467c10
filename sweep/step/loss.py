"""What is minimised, as a differentiable function of the parameters.

1. Encode the whole width, select the active latents.
2. Decode every nested prefix; each one reconstructs the target and is in the loss (Bussmann et al. 2025). With
   `skip`, the linear map is part of each.
3. The residual of the full reconstruction, detached, is reconstructed by the latents that are dead, from their
   *raw* pre-latents (Gao et al. 2024, section A.2, without the relu, so that a silent latent gets a gradient).

    loss = weighted mean over prefixes of mse(prefix) + aux_penalty * min(n_dead / top_k_aux, 1) * mse(aux)

where mse is the mean over tokens and output dimensions, on targets of unit mean square, and the weights are
`prefix_weight` for a prefix and 1 for the whole.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from sweep import devices
from sweep.config import Capacity, Revival
from sweep.transcoder import Parameters, pre_latents, select

__all__ = ["Loss", "aux_weight", "mean_squares", "transcoder_loss"]


@dataclass(frozen=True)
class Loss:
    """The loss of one batch and what is worth knowing about it. Only `total` may carry a graph.

    `n_active` counts the active latents of all tokens, `fired` tells which latents were active for any.
    """

    total: Float[Tensor, ""]
    prefixes: list[Float[Tensor, ""]]
    aux: Float[Tensor, ""] | None
    n_active: Int[Tensor, ""]
    fired: Bool[Tensor, " dict_size"]


def transcoder_loss(
    params: Parameters,
    source: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    capacity: Capacity,
    revival: Revival,
    dead: Bool[Tensor, " dict_size"],
) -> Loss:
    """The loss on scaled source and target; `dead` tells which latents count as dead."""
    pre = pre_latents(params, source)
    latents = select(pre, capacity)
    reconstruction = params.b_dec.expand_as(target)
    if params.W_skip is not None:
        reconstruction = reconstruction + source @ params.W_skip
    prefixes = []
    widths = [end - start for start, end in capacity.spans]
    for part, rows in zip(latents.split(widths, dim=1), params.W_dec.split(widths), strict=True):
        reconstruction = reconstruction + part @ rows
        prefixes.append((reconstruction - target).square().mean())
    total = torch.stack([share * prefix for share, prefix in zip(capacity.shares, prefixes, strict=True)]).sum()
    aux = None
    if revival.aux_penalty > 0 and (devices.reading_waits(dead) or bool(dead.any())):
        aux = aux_loss(params, pre, (target - reconstruction).detach(), revival.top_k_aux, dead)
        total = total + aux_weight(dead, revival).to(aux) * aux
        aux = aux.detach()
    active = latents.detach() > 0
    return Loss(total, [prefix.detach() for prefix in prefixes], aux, active.sum(), active.any(dim=0))


def aux_loss(
    params: Parameters,
    pre: Float[Tensor, "batch dict_size"],
    residual: Float[Tensor, "batch d_out"],
    top_k_aux: int,
    dead: Bool[Tensor, " dict_size"],
) -> Float[Tensor, ""]:
    """Mean squared error of reconstructing the residual from the top dead latents of each token.

    The dead are gathered, or the others masked where it would take waiting to learn how many there are.
    """
    waits = devices.reading_waits(dead)
    dead_pre = pre.masked_fill(~dead, -torch.inf) if waits else pre[:, dead]
    values, index = dead_pre.topk(min(top_k_aux, dead_pre.shape[1]), dim=-1, sorted=False)
    if waits:  # where fewer are dead, others came along
        values = values.masked_fill(~dead[index], 0)
    revived = torch.zeros_like(dead_pre).scatter(1, index, values)
    return (revived @ (params.W_dec if waits else params.W_dec[dead]) - residual).square().mean()


def aux_weight(dead: Bool[Tensor, " dict_size"], revival: Revival) -> Float64[Tensor, ""]:
    """Of the auxiliary loss in the total: less while fewer latents are dead than may take part."""
    return revival.aux_penalty * (dead.count_nonzero().double() / revival.top_k_aux).clamp(max=1)


def mean_squares(errors: Float[Tensor, "batch n d"]) -> Float[Tensor, " n"]:
    """Means over tokens and dimensions, summed token by token: the same for any number of threads."""
    return torch.linalg.vector_norm(errors, dim=2).square().mean(dim=0) / errors.shape[2]
