"""The largest pre-latents of each token among many latents, where a product in bfloat16 takes a fraction of the time.

Of each token those with the largest bounds get exact values. The largest of these are the largest of all where they
reach the bound of the last on the list; a token for which they do not gets all its values.
"""

import torch
from jaxtyping import BFloat16, Float, Int16, Int64
from torch import Tensor

from sweep.chunks import consecutive, pieces
from sweep.processor import BFLOAT16_UNIT as UNIT
from sweep.step.bfloat16 import BFloat16Bounds
from sweep.step.bounds import Place
from sweep.step.entries import (
    aligned_product,
    counted,
    group_maxima,
    k_largest,
    places_of_largest,
    products,
    sorting,
    token_and_column,
)

__all__ = ["SHORT", "largest_by_bounds"]

SHORT = 1 / 16
"""Of all latents, so many are looked for in each token at most; of more, exact values of all are faster."""

N_GROUPS, LENGTH = 4, 1.25
"""Groups of latents that share a maximum, and maxima on a list, as multiples of what is looked for. About half as many
latents again are no less than the last of these maxima; to select from maxima takes a quarter of the time or less."""

TOKENS = 1024
"""That get their exact values at once: so many that each latent's weights are read for several."""

BLOCK_BYTES = 4 << 20
"""Bounds, or stretched weights, held at once."""

OFF = 2.0**-20
"""More than a difference of two numbers in float32 is off, as a share of them."""


def largest_by_bounds(
    bounds: BFloat16Bounds, among: Int64[Tensor, " n"], k: int
) -> tuple[Int64[Tensor, "batch k"], Float[Tensor, "batch k"]] | None:
    """Places in the list of latents, and values, of the `k` largest of each token; None where bounds do not hold.

    `bounds` are those of the batch, whichever latents they looked among before.
    """
    weights, bias = bounds.weights[among], bounds.bias[among]
    common = bias.mean()  # changes no order, and would leave bounds no digits for what differs
    parts = pieces(len(among), 4 * weights.shape[1], BLOCK_BYTES)
    right = torch.cat([bounds.right(weights[part] * bounds.stretch, bias[part] - common) for part in parts])
    if not bounds.hold:
        return None
    places, values = [], []
    for tokens in consecutive(len(bounds.source), TOKENS):
        read = bounds.source[tokens]
        lists, bound = listed(bounds, right, tokens, k)
        place, value = largest_listed(weights, bias, read, lists, k)
        least = value.amin(dim=1)
        reached = least - common - OFF * (least.abs() + common.abs())
        unsure = (reached < bound + UNIT * bound.abs()).nonzero().squeeze(1)
        for part in pieces(len(unsure), 4 * len(among)):
            of_all = aligned_product(read[unsure[part]], weights).add_(bias)
            place[unsure[part]] = best = places_of_largest(of_all, k)
            value[unsure[part]] = of_all.gather(1, best)
        places.append(place)
        values.append(value)
    return torch.cat(places), torch.cat(values)


def listed(
    bounds: BFloat16Bounds, right: BFloat16[Tensor, "n n_columns"], tokens: slice, k: int
) -> tuple[Place, Float[Tensor, " n_tokens"]]:
    """Where bounds are no less than the last on the token's list, which has `k` at least; and that bound.

    Tokens are counted from the first of these.
    """
    n_groups = len(right) // max(len(right) // (N_GROUPS * k), 1)
    token, latent, last = [], [], []
    for part in pieces(tokens.stop - tokens.start, bounds.element_bytes * len(right), BLOCK_BYTES):
        these = slice(tokens.start + part.start, tokens.start + part.stop)
        order = in_order(bounds.from_above(these, right).view(torch.int16))
        last.append(k_largest(group_maxima(order, n_groups), min(int(LENGTH * k), n_groups))[:, :1])
        row, column = token_and_column(order >= last[-1])
        token.append(row + part.start)
        latent.append(column)
    bound = in_order(torch.cat(last)).view(torch.bfloat16).squeeze(1).float()
    return (torch.cat(token), torch.cat(latent)), bound


def largest_listed(
    weights: Float[Tensor, "n d_in"],
    bias: Float[Tensor, " n"],
    source: Float[Tensor, "batch d_in"],
    lists: Place,
    k: int,
) -> tuple[Int64[Tensor, "batch k"], Float[Tensor, "batch k"]]:
    """Places and exact values of the `k` largest of each token among at least as many that are on its list."""
    token, latent = lists
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
