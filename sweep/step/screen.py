"""Bounds of all pre-latents by products in bfloat16, so that only what may be large needs its exact value.

With x = x' + dx and w = w' + dw, the primed ones being rounded to bfloat16,

    |x w - x' w'| <= |dx| |w| + |x'| |dw|        (Cauchy and Schwarz)

A column more of both factors for each of the two terms, and the product is a bound from above; two columns hold the
bias, and what the mean of the batch adds to it. Which entries turn out as the largest then, and what values they have,
depends on no rounding to bfloat16. This pays where a processor multiplies bfloat16 several times as fast as float32.
"""

from collections.abc import Iterator

import torch
from jaxtyping import BFloat16, Float, Int64
from torch import Tensor

from sweep.bfloat16 import UNIT, has_fast_bfloat16
from sweep.chunks import consecutive
from sweep.step.entries import Active, counted, entries, products, sorting
from sweep.transcoder import Parameters

__all__ = ["Screen", "pays"]


def pays(source: Float[Tensor, "batch d_in"]) -> bool:
    """Whether screening saves time. Where it does is a matter of the processor alone, never of the numbers."""
    return source.device.type == "cpu" and source.dtype == torch.float32 and has_fast_bfloat16()


class Screen:
    """Bounds for the pre-latents of a batch, a block of latents at a time, and the exact values of chosen ones; of all
    latents or `among` some, sorted."""

    def __init__(
        self, params: Parameters, source: Float[Tensor, "batch d_in"], among: Int64[Tensor, " n"] | None = None
    ) -> None:
        self._weights, self._bias, self._source = params.W_enc.T, params.b_enc, source
        self._among = among
        self._mean = source.mean(dim=0)  # what all tokens share is multiplied in float32, with the bias
        centred = source - self._mean
        rounded = centred.bfloat16()
        # sums of d_in products in float32 are off, too: by less than this share of |x'| |w'|
        self._of_sums = (source.shape[1] + 16) * 2.0**-23
        norm = norms(rounded.float())
        error = norms(centred - rounded) + self._of_sums * norm + 2.0**-22 * (norms(source) + self._mean.norm())
        self._of_token = torch.stack([error, norm], dim=1) * (1 + 2 * UNIT)
        self._of_latent = source.new_zeros(len(self._bias), 3)
        """What the two errors of a token are multiplied by, and the error of the bias."""
        ones = rounded.new_ones(len(source), 2)
        self._left = torch.cat([rounded, self._of_token.bfloat16(), ones], dim=1)

    def blocks(self, n_bytes: int) -> Iterator[tuple[slice, BFloat16[Tensor, "batch n"]]]:
        """Consecutive ones of the latents and their bounds, in memory that the next block overwrites."""
        batch, width = len(self._left), len(self._bias if self._among is None else self._among)
        size = min(max(n_bytes // (2 * batch), 1), width)
        right, out = self._left.new_empty(size, self._left.shape[1]), self._left.new_empty(batch * size)
        for latents in consecutive(width, size):
            n = latents.stop - latents.start
            self._fill(right[:n], latents if self._among is None else self._among[latents])
            yield latents, torch.mm(self._left, right[:n].T, out=out[: batch * n].view(batch, n))

    def _fill(self, right: BFloat16[Tensor, "n d_in_and_4"], latents: slice | Int64[Tensor, " n"]) -> None:
        weights, d_in = self._weights[latents], self._weights.shape[1]
        right[:, :d_in] = weights
        norm = norms(weights)
        errors = torch.stack([norm, norms(weights - right[:, :d_in])], dim=1) * (1 + 2 * UNIT)
        bias = self._bias[latents] + weights @ self._mean
        of_bias = (self._bias[latents].abs() + norm * self._mean.norm()) * (self._of_sums + UNIT**2)
        high = bias.bfloat16()
        right[:, d_in:] = torch.cat([errors, torch.stack([high.float(), bias - high + of_bias], dim=1)], dim=1)
        self._of_latent[latents] = torch.cat([errors, of_bias.unsqueeze(1)], dim=1)

    def above(self, latents: slice, bounds: BFloat16[Tensor, "batch n"], least: float) -> Active:
        """The entries of a block that may be as large as `least`, which is positive; their values are bounds."""
        bits = int(torch.tensor(least * (1 - UNIT)).view(torch.int32)) >> 16  # integers of 16 bits compare faster
        found = entries(latents.start, bounds, bounds.view(torch.int16) >= bits)
        latent = found.latent if self._among is None else self._among[found.latent]
        return Active(found.token, latent, found.value.float() * (1 + UNIT))

    def below(self, found: Active) -> Float[Tensor, " n"]:
        """What entries found above are at least."""
        token, latent = self._of_token[found.token], self._of_latent[found.latent]
        of_bias = latent[:, 2]
        return found.value * (1 - 3 * UNIT) - (2 + 4 * UNIT) * (token * latent[:, :2]).sum(dim=1) - 2 * of_bias

    def exact(self, found: Active) -> Active:
        """Entries with their pre-latents, by latent: so the weights, which are many, are read in order."""
        order = sorting(found.latent)
        token, latent = found.token[order], found.latent[order]
        starts = counted(latent, len(self._bias))
        return Active(token, latent, products(self._weights, self._source, starts, token) + self._bias[latent])

    @property
    def hold(self) -> bool:
        """Whether all that was screened is finite; else bounds mean nothing."""
        return all(bool(each.isfinite().all()) for each in (self._of_token, self._of_latent, self._bias))


def norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(rows, dim=1)
