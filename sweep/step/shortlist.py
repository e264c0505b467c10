"""The largest pre-latents of each token among many latents, where a product in bfloat16 takes a fraction of the time.

Of each token those with the largest bounds get exact values. The largest of these are the largest of all where they
reach the bound of the last on the list; a token for which they do not gets all its values.
"""

import torch
from jaxtyping import Bool, Float, Int16, Int64
from torch import Tensor

from sweep.chunks import pieces
from sweep.processor import BFLOAT16_UNIT as UNIT
from sweep.step.bfloat16 import BFloat16Bounds
from sweep.step.entries import (
    aligned_product,
    counted,
    k_largest,
    places_of_largest,
    products,
    sorting,
    token_and_column,
)
from sweep.transcoder import Parameters

__all__ = ["largest_by_bounds"]

LENGTH = 1.5
"""Of a list, as a multiple of what is looked for."""

BLOCK_BYTES = 4 << 20
"""Bounds, or stretched weights, held at once."""

OFF = 2.0**-20
"""More than a difference of two numbers in float32 is off, as a share of them."""


def largest_by_bounds(
    params: Parameters, source: Float[Tensor, "batch d_in"], among: Int64[Tensor, " n"], k: int
) -> tuple[Int64[Tensor, "batch k"], Float[Tensor, "batch k"]] | None:
    """Places in the list of latents, and values, of the `k` largest of each token; None where bounds do not hold."""
    weights, bias = params.W_enc.T[among], params.b_enc[among]
    common = bias.mean()  # changes no order, and would leave bounds no digits for what differs
    bounds = BFloat16Bounds(params, source)
    parts = pieces(len(among), 4 * weights.shape[1], BLOCK_BYTES)
    right = torch.cat([bounds.right(weights[part] * bounds.stretch, bias[part] - common) for part in parts])
    if not bounds.hold:
        return None
    n_listed = min(int(LENGTH * k), len(among))
    places, values = [], []
    for tokens in pieces(len(source), bounds.element_bytes * len(among), BLOCK_BYTES):
        order = in_order(bounds.from_above(tokens, right).view(torch.int16))
        last_listed = k_largest(order, n_listed)[:, :1]
        place, value = largest_listed(weights, bias, source[tokens], order >= last_listed, k)
        least, bound = value.amin(dim=1), in_order(last_listed).view(torch.bfloat16).squeeze(1).float()
        reached = least - common - OFF * (least.abs() + common.abs())
        unsure = (reached < bound + UNIT * bound.abs()).nonzero().squeeze(1)
        if len(unsure):
            exact = aligned_product(source[tokens][unsure], weights).add_(bias)
            place[unsure] = places_of_largest(exact, k)
            value[unsure] = exact.gather(1, place[unsure])
        places.append(place)
        values.append(value)
    return torch.cat(places), torch.cat(values)


def largest_listed(
    weights: Float[Tensor, "n d_in"],
    bias: Float[Tensor, " n"],
    source: Float[Tensor, "n_tokens d_in"],
    listed: Bool[Tensor, "n_tokens n"],
    k: int,
) -> tuple[Int64[Tensor, "n_tokens k"], Float[Tensor, "n_tokens k"]]:
    """Places and exact values of the `k` largest of each token among at least as many that are on its list."""
    token, latent = token_and_column(listed)
    by_latent = sorting(latent)  # so that a latent's weights are read once
    value = source.new_empty(len(token))
    value[by_latent] = products(weights, source, counted(latent, len(weights)), token[by_latent])
    value += bias[latent]
    starts = counted(token, len(source))
    rank = torch.arange(len(token)) - starts[token]
    values = value.new_full((len(source), int(rank.max()) + 1), -torch.inf)
    values.view(-1)[token * values.shape[1] + rank] = value
    best = places_of_largest(values, k)
    return latent[starts[:-1].unsqueeze(1) + best], values.gather(1, best)


def in_order(bits: Int16[Tensor, "n m"]) -> Int16[Tensor, "n m"]:
    """Integers in the order of the numbers in bfloat16 whose bits these are; and back."""
    return bits ^ ((bits >> 15) & 0x7FFF)
