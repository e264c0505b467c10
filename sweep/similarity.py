"""How alike the rows of a decoder are: a function of the weights alone.

A tile of pairs at a time, each pair once:

1. Its cosines, coarse: by a product of rounded rows where the processor is fast at it, integers of 8 bits or bfloat16.
2. Of those that may be twins, or nearest of what was seen so far, the cosine in float32; in float64 where that decides.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from sweep import chunks
from sweep.chunks import consecutive, pieces
from sweep.metrics import Metrics, ratio
from sweep.processor import (
    BFLOAT16_UNIT,
    has_fast_bfloat16,
    has_fast_int8,
    int8_product,
    int8_scales,
    whole_multiples_,
)
from sweep.step.entries import counted, products, token_and_column

__all__ = ["SIMILAR", "DecoderSimilarity", "decoder_similarity"]

SIMILAR = 0.9
"""Two decoder rows whose cosine exceeds this are twins."""


@dataclass(frozen=True)
class DecoderSimilarity:
    """How alike the rows of a decoder are. A single row has no nearest one: `nearest` and its cosine are None."""

    n_similar_pairs: int
    has_twin: Bool[Tensor, " dict_size"]
    nearest: Int[Tensor, " dict_size"] | None
    nearest_cosine: Float[Tensor, " dict_size"] | None

    @property
    def n_pairs(self) -> int:
        n = len(self.has_twin)
        return n * (n - 1) // 2

    def metrics(self) -> Metrics:
        """Score and mean are None where there is no pair."""
        mean_max = None if self.nearest_cosine is None else float(self.nearest_cosine.mean())
        return {
            "absorption_score": ratio(self.n_similar_pairs, self.n_pairs),
            "n_decoder_pairs": self.n_pairs,
            "n_similar_pairs": self.n_similar_pairs,
            "frac_latents_with_twin": float(self.has_twin.double().mean()),
            "mean_max_decoder_cosine": mean_max,
        }

    def columns(self) -> dict[str, list[Any]]:
        """Per latent: the most similar other latent, and the cosine of the two."""
        if self.nearest is None or self.nearest_cosine is None:
            return {"nearest_latent": [None], "nearest_cosine": [None]}
        return {"nearest_latent": self.nearest.tolist(), "nearest_cosine": self.nearest_cosine.tolist()}


NO_COSINE = -2.0
"""Of a row with itself: less than any."""

DENSE_SHARE = 1 / 20
"""From this share of the pairs of a tile on, one product of all of them is faster."""

PIECE_BYTES = 4 << 20
"""Of rows in float64 at once: they stay in cache."""


def coarse_dtype(device: torch.device) -> torch.dtype:
    """In which cosines of all pairs are looked at first."""
    if device.type == "cpu" and has_fast_int8():
        return torch.int8
    return torch.bfloat16 if device.type == "cpu" and has_fast_bfloat16() else torch.float32


def rounded(unit: Float[Tensor, "n d"], dtype: torch.dtype) -> tuple[Tensor, Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Rows as multiples of a step for each, the steps, and the norms of what rounding changed."""
    if dtype == torch.int8:
        steps, rest = int8_scales(unit), unit.clone()
        multiples = whole_multiples_(rest, steps)
    else:
        steps, multiples = torch.ones_like(unit[:, 0]), unit.to(dtype)
        rest = unit - multiples
    return multiples.to(dtype), steps, torch.linalg.vector_norm(rest, dim=1)


class UnitRows:
    """Rows scaled to norm 1, for quick products; with the originals, for float64 where it matters."""

    def __init__(self, rows: Float[Tensor, "n d"]) -> None:
        self.rows = rows
        norms = torch.cat([rows[piece].double().norm(dim=1) for piece in self._pieces()])
        self._scale = torch.where(norms > 0, 1 / norms, 0.0)
        parts = [self._double(piece).float() for piece in self._pieces()]
        self._unit, self._dtype = torch.cat(parts), coarse_dtype(rows.device)
        coarse = (rounded(part, self._dtype) for part in parts)
        self._coarse, self._steps, self._changed = map(torch.cat, zip(*coarse, strict=True))
        # A float32 dot product of unit vectors is off by at most (d + 2) 2^-24 and second-order terms. Graphics cards
        # may be set to round the factors to 11 bits, which adds 2^-10.
        self.error = (rows.shape[1] + 8) * 2.0**-23 + (2.0**-9 if rows.is_cuda else 0)

    def _pieces(self, n: int | None = None) -> Iterator[slice]:
        return pieces(len(self.rows) if n is None else n, 8 * self.rows.shape[1], PIECE_BYTES)

    def _double(self, index: slice | Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return self.rows[index].double() * self._scale[index, None]

    def coarse(self, rows: slice, columns: slice) -> Float[Tensor, "m n"]:
        """Cosines of two ranges of rows, up to what `least` and `reached` say."""
        left, right = self._coarse[rows], self._coarse[columns]
        if self._dtype != torch.int8:
            return (left @ right.T).float()
        sums = int8_product(left, right, torch.empty(len(left), len(right), dtype=torch.int32))
        return sums.float().mul_(self._steps[columns]).mul_(self._steps[rows].unsqueeze(1))

    def _off(self, rows: slice, others: slice) -> Float[Tensor, " m"]:
        """By how much coarse cosines of each row with any of the others may be off, but for their own rounding."""
        changed, most = self._changed[rows], self._changed[others].amax()
        return 1.01 * (changed + most + changed * most) + self.error

    def _rounding(self, coarse: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        return coarse.abs() * (BFLOAT16_UNIT if self._dtype == torch.bfloat16 else 0)

    def least(self, coarse: Float[Tensor, " m"], rows: slice, others: slice) -> Float[Tensor, " m"]:
        """What cosines of rows with some of the others are at least."""
        return coarse - self._rounding(coarse) - self._off(rows, others)

    def reached(self, cosines: Float[Tensor, " m"], rows: slice, others: slice) -> Float[Tensor, " m"]:
        """What coarse cosines are at least where the cosine of a row with some of the others is at least so large."""
        coarse = cosines - self._off(rows, others)
        return coarse - self._rounding(coarse)

    def products(
        self, rows: slice, columns: slice, row: Int64[Tensor, " n"], column: Int64[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Cosines of pairs of a tile, by row, to float32 rounding, which is less than `error`."""
        left, right = self._unit[rows], self._unit[columns]
        if len(row) > DENSE_SHARE * len(left) * len(right):
            return (left @ right.T)[row, column]
        return products(left, right, counted(row, len(left)), column)

    def exact(self, left: Int[Tensor, " m"], right: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Cosines of pairs of rows in float64."""
        parts = self._pieces(len(left))
        cosines = [torch.linalg.vecdot(self._double(left[part]), self._double(right[part])) for part in parts]
        return torch.cat(cosines).clamp(-1, 1) if cosines else self._scale.new_empty(0)

    def similar(self, cosines: Float[Tensor, " n"], left: Int[Tensor, " n"], right: Int[Tensor, " n"]) -> Tensor:
        """Which pairs' float32 products exceed SIMILAR."""
        similar = cosines > SIMILAR + self.error
        near = ((cosines > SIMILAR - self.error) ^ similar).nonzero().squeeze(1)
        similar[near] = self.exact(left[near], right[near]) > SIMILAR
        return similar


class Nearest:
    """The nearest row of each so far, and its cosine in float32; the first of equals."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.cosine = torch.full((n,), NO_COSINE, device=device)
        self.row = torch.zeros(n, dtype=torch.int64, device=device)

    def see(self, left: Int64[Tensor, " n"], right: Int64[Tensor, " n"], cosines: Float[Tensor, " n"]) -> None:
        """That these rows have others with these cosines."""
        before = self.cosine
        self.cosine = before.scatter_reduce(0, left, cosines, "amax")
        self.row[self.cosine > before] = len(self.row)
        wins = (cosines == self.cosine[left]).nonzero().squeeze(1)
        self.row.scatter_reduce_(0, left[wins], right[wins], "amin")


def decoder_similarity(W_dec: Float[Tensor, "dict_size d_out"]) -> DecoderSimilarity:
    """Compare every pair of decoder rows; a zero row has cosine 0 with all others.

    A pair whose float32 cosine is within the rounding error of SIMILAR is decided again in float64, so the count is
    that of float64. The nearest row is nearest up to float32 rounding, the first of equals; its cosine is float64.
    """
    n, device = len(W_dec), W_dec.device
    has_twin = torch.zeros(n, dtype=torch.bool, device=device)
    if n == 1:
        return DecoderSimilarity(0, has_twin.cpu(), None, None)
    unit, nearest, n_similar = UnitRows(W_dec), Nearest(n, device), 0
    tiles = consecutive(n, max(math.isqrt(chunks.MAX_BYTES // 16), 1))
    for rows, columns in itertools.combinations_with_replacement(list(tiles), 2):
        at, column = promising(unit, nearest, rows, columns)
        cosines = unit.products(rows, columns, at, column)
        left, right = at + rows.start, column + columns.start
        nearest.see(left, right, cosines)
        nearest.see(right, left, cosines)
        if bool((cosines > SIMILAR - unit.error).any()):
            similar = unit.similar(cosines, left, right)
            n_similar += int(similar.count_nonzero())
            has_twin[left[similar]] = has_twin[right[similar]] = True
    nearest_cosine = unit.exact(torch.arange(n, device=device), nearest.row)
    return DecoderSimilarity(n_similar, has_twin.cpu(), nearest.row.cpu(), nearest_cosine.cpu())


def promising(
    unit: UnitRows, nearest: Nearest, rows: slice, columns: slice
) -> tuple[Int64[Tensor, " n_pairs"], Int64[Tensor, " n_pairs"]]:
    """The pairs of a tile that may be twins, or one the other's nearest: places in the two ranges, by row."""
    cosines = unit.coarse(rows, columns)
    if rows == columns:
        cosines.fill_diagonal_(NO_COSINE)
    bounds = []
    for mine, others, axis in ((rows, columns, 1), (columns, rows, 0)):
        needed = torch.maximum(nearest.cosine[mine], unit.least(cosines.amax(dim=axis), mine, others))
        bounds.append(unit.reached(needed.clamp(max=SIMILAR), mine, others))
    may_be = cosines >= torch.minimum(bounds[0].unsqueeze(1), bounds[1])
    return token_and_column(may_be.triu_(1) if rows == columns else may_be)
