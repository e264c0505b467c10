"""Pre-latents that may be large, found by a product of rounded factors, which takes a fraction of the time.

With x = x' + dx and w = w' + dw, the primed ones being rounded,

    |x w - x' w'| <= |dx| |w| + |x'| |dw|        (Cauchy and Schwarz)

Columns more of both factors hold the two terms, so the product itself is a bound from above. Only what may be as large
as is looked for gets its exact value, so nothing that comes out depends on a rounded factor.

Bounds are close where all dimensions vary alike. So each is stretched in the weights as much as it is shortened in the
source; and what all tokens share, the mean of the source, is multiplied in float32, with the bias.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from sweep.chunks import pieces
from sweep.step.entries import Active, counted, no_less, products
from sweep.transcoder import Parameters

__all__ = ["Bounds", "Place", "finite", "norms"]

MOST_CANDIDATES = 1 / 20
"""A share of all entries."""

Place = tuple[Int64[Tensor, " n_found"], Int64[Tensor, " n_found"]]
"""Of entries in a block: token, and column."""


class Bounds(ABC):
    """Looks for large pre-latents of a batch, a block of latents at a time; of all latents or `among` some, sorted."""

    element_bytes: int
    """Of a bound."""
    block_bytes: int
    """Bounds held at once: the fewer, the more of them stay in cache; the more, the fewer small operations."""

    def __init__(
        self, params: Parameters, source: Float[Tensor, "batch d_in"], among: Int64[Tensor, " n"] | None = None
    ) -> None:
        self.weights, self.bias, self.source = params.W_enc.T, params.b_enc, source
        """Weights and biases of all latents, a row for each, whichever it looks among."""
        self._among = among
        self._n_latents = len(params.b_enc if among is None else among)
        mean = source.mean(dim=0)
        centred = source - mean
        self.stretch = stretch(centred, self.weights)
        """Of each dimension, what weights are multiplied by."""
        self._centred, self._mean = centred.div_(self.stretch), mean / self.stretch
        self._mean_norm = self._mean.norm()
        # Sums of d_in products in float32 are off, too: by less than this share of the factors' norms.
        self._of_sums = (source.shape[1] + 16) * 2.0**-23
        self._room: Tensor | None = None
        self.n_candidates = 0
        """Entries that had to be looked at since the first block."""
        self.hold = finite(source, params.b_enc)
        """Whether all that was looked at is finite; else bounds mean nothing."""

    @property
    def serve(self) -> bool:
        """Whether they hold and tell enough apart that to look among them takes less time than all pre-latents."""
        return self.hold and self.n_candidates <= MOST_CANDIDATES * len(self.source) * self._n_latents

    def blocks(self) -> Iterator[slice]:
        """Consecutive ones of the latents, from the first."""
        self.n_candidates = 0
        return pieces(self._n_latents, self.element_bytes * len(self.source), self.block_bytes)

    def at_least(self, block: slice, least: float) -> Active:
        """The entries of a block that are no less than a positive value, by token."""
        latents = block if self._among is None else self._among[block]
        weights, bias = self.weights[latents], self.bias[latents]
        token, column = self.candidates(weights * self.stretch, bias, least)
        self.n_candidates += len(token)
        value = products(self.source, weights, counted(token, len(self.source)), column) + bias[column]
        kept = no_less(value, least).nonzero().squeeze(1)
        latent = column[kept] + block.start
        return Active(token[kept], latent if self._among is None else self._among[latent], value[kept])

    def room(self, n_tokens: int, n_columns: int, dtype: torch.dtype) -> Shaped[Tensor, "n_tokens n_columns"]:
        """Memory for the bounds of a block, which those of the next overwrite."""
        n = n_tokens * n_columns
        if self._room is None or len(self._room) < n:
            self._room = torch.empty(n, dtype=dtype, device=self.source.device)
        return self._room[:n].view(n_tokens, n_columns)

    @abstractmethod
    def candidates(self, weights: Float[Tensor, "n d_in"], bias: Float[Tensor, " n"], least: float) -> Place:
        """Where pre-latents may be as large as that, by token; the weights are stretched, and may be overwritten."""


def stretch(source: Float[Tensor, "batch d_in"], weights: Float[Tensor, "n d_in"]) -> Float[Tensor, " d_in"]:
    """Powers of two, which change no digit, by which weights and sources vary about alike in each dimension."""
    some = weights[:: max(len(weights) // 1024, 1)]
    ratio = (source.square().mean(dim=0) / some.square().mean(dim=0)).sqrt()
    return torch.where((ratio > 0) & ratio.isfinite(), ratio.log2().div(2).round().exp2(), 1)


def finite(*tensors: Float[Tensor, "..."]) -> bool:
    """Whether all elements are finite, and not so large that their squares are not: one sum, where to ask each takes
    as long as a product."""
    return bool(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]).isfinite().all())


def norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(rows, dim=1)
