"""The state a cell starts from: scales and parameters read off the first window of its own site.

Each latent starts as one pair of the data: it reads the direction of a source and writes the direction of the
target that belongs to it. The encoder is then scaled so that the first reconstruction fits in least squares. With
`skip` the linear map starts from zero: trained on from least squares it ended worse (docs/log.md).
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sweep.config import Capacity, Schedule
from sweep.state import TrainState
from sweep.step.update import normalise_rows_
from sweep.transcoder import Parameters, pre_latents, select

__all__ = ["initial_state", "write_rates"]

BLEND = 0.5
"""Share of the second token: below 1, so that (a, b) and (b, a) differ."""

N_FIT_TOKENS = 1024
"""Tokens on which the encoder's scale is fitted: the estimate is one number, a few hundred would do."""


def initial_state(
    source: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    capacity: Capacity,
    seed: int,
    dtype: torch.dtype = torch.float32,
    schedule: Schedule | None = None,
) -> TrainState:
    """A fresh state; a pure function of its arguments. The schedule tells whether steps are fitted to the window."""
    source_scale, target_scale = unit_mean_square_scale(source), unit_mean_square_scale(target)
    params = data_parameters(source.to(dtype) * source_scale, target.to(dtype) * target_scale, capacity, seed)
    state = TrainState.initial(params, source_scale, target_scale)
    if schedule and schedule.rate_by_spread:
        state.write_rates = write_rates(target.to(dtype))
    if schedule and schedule.centre_source:
        state.source_mean = (source.to(dtype) * source_scale).mean(dim=0)
    return state


def write_rates(target: Float[Tensor, "n d_out"]) -> Float[Tensor, " d_out"]:
    """The standard deviation of each dimension over their root mean square, at most 1; 1 where nothing varies."""
    variance = target.double().var(dim=0, correction=0)
    mean = variance.mean()
    if not mean > 0:
        return target.new_ones(target.shape[1])
    return (variance / mean).sqrt().clamp_max(1).to(target.dtype)


def unit_mean_square_scale(values: Float[Tensor, "n d"]) -> float:
    """The factor that gives `values` a mean square of 1; 1.0 when all are zero."""
    mean_square = float(values.double().square().mean())
    return 1 / math.sqrt(mean_square) if mean_square > 0 else 1.0


def data_parameters(
    source: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], capacity: Capacity, seed: int
) -> Parameters:
    """Latent i reads (source_i - mean) and writes (target_i - mean), both as unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    source_mean, target_mean = source.mean(dim=0), target.mean(dim=0)
    first, second = (pair.to(source.device) for pair in sample_pairs(len(source), capacity.dict_size, generator))
    reads = source[first] - source_mean
    writes = target[first] - target_mean
    blended = second >= 0
    reads[blended] += BLEND * (source[second[blended]] - source_mean)
    writes[blended] += BLEND * (target[second[blended]] - target_mean)
    normalise_rows_(reads)
    normalise_rows_(writes)
    params = Parameters(
        W_enc=reads.T.contiguous(), b_enc=-(reads @ source_mean), W_dec=writes, b_dec=target_mean.clone()
    )
    if capacity.skip:
        params.W_skip = source.new_zeros(source.shape[1], target.shape[1])
    scale = least_squares_scale(params, source[:N_FIT_TOKENS], target[:N_FIT_TOKENS], capacity)
    params.W_enc *= scale
    params.b_enc *= scale
    return params


def sample_pairs(
    n: int, dict_size: int, generator: torch.Generator
) -> tuple[Int64[Tensor, " dict_size"], Int64[Tensor, " dict_size"]]:
    """Which token each latent starts from, and a second one to blend in, or -1 for none.

    Each token is used once in random order; a dictionary wider than the window goes round again, and from then on
    each latent blends two tokens, another pair each time, so that no two latents start equal.
    """
    n_rounds = -(-dict_size // n)
    order = torch.randperm(n, generator=generator)
    first = order.repeat(n_rounds)
    second = torch.cat([torch.full((n,), -1), *(order.roll(shift) for shift in range(1, n_rounds))])
    return first[:dict_size], second[:dict_size]


def least_squares_scale(
    params: Parameters, source: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], capacity: Capacity
) -> float:
    """The factor on the encoder that minimises the squared error of the first reconstruction."""
    written = select(pre_latents(params, source), capacity) @ params.W_dec
    wanted = target - params.b_dec
    power = float(written.double().square().sum())
    fit = float((written.double() * wanted.double()).sum())
    return fit / power if fit > 0 and power > 0 else 1.0
