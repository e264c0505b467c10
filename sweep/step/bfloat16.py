"""Bounds of pre-latents by products in bfloat16; two columns hold the bias, and what the mean adds to it."""

import torch
from jaxtyping import BFloat16, Float, Int64
from torch import Tensor

from sweep.processor import BFLOAT16_UNIT as UNIT
from sweep.step.bounds import Bounds, Place, finite, norms
from sweep.step.entries import token_and_column
from sweep.transcoder import Parameters

__all__ = ["BFloat16Bounds"]


class BFloat16Bounds(Bounds):
    element_bytes = 2
    block_bytes = 4 << 20

    def __init__(
        self, params: Parameters, source: Float[Tensor, "batch d_in"], among: Int64[Tensor, " n"] | None = None
    ) -> None:
        super().__init__(params, source, among)
        rounded = self._centred.bfloat16()
        norm = norms(rounded.float())
        error = norms(self._centred - rounded) + self._of_sums * norm
        error += 2.0**-21 * (norms(self._centred) + self._mean_norm)
        of_token = torch.stack([error, norm], dim=1) * (1 + 2 * UNIT)
        self._left = torch.cat([rounded, of_token.bfloat16(), rounded.new_ones(len(source), 2)], dim=1)
        self.hold &= finite(of_token)

    def candidates(self, weights: Float[Tensor, "n d_in"], bias: Float[Tensor, " n"], least: float) -> Place:
        bounds = self.from_above(slice(None), self.right(weights, bias))
        bits = int(torch.tensor(least * (1 - UNIT)).view(torch.int32)) >> 16  # integers of 16 bits compare faster
        return token_and_column(bounds.view(torch.int16) >= bits)

    def right(self, weights: Float[Tensor, "n d_in"], bias: Float[Tensor, " n"]) -> BFloat16[Tensor, "n n_columns"]:
        """What latents of these stretched weights are for `from_above`."""
        rounded, norm = weights.bfloat16(), norms(weights)
        errors = torch.stack([norm, norms(weights - rounded)]) * (1 + 2 * UNIT)
        of_bias = (bias.abs() + norm * self._mean_norm) * (self._of_sums + UNIT**2)
        bias = bias + weights @ self._mean
        high = bias.bfloat16()
        of_latent = torch.stack([*errors, high, bias - high + of_bias], dim=1)
        self.hold &= finite(of_latent)
        return torch.cat([rounded, of_latent.bfloat16()], dim=1)

    def from_above(self, tokens: slice, right: BFloat16[Tensor, "n n_columns"]) -> BFloat16[Tensor, "n_tokens n"]:
        """Bounds of these latents' pre-latents, rounded once more; the next ones overwrite them."""
        left = self._left[tokens]
        return torch.mm(left, right.T, out=self.room(len(left), len(right), torch.bfloat16))
