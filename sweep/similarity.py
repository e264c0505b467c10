"""How alike the rows of a decoder are: a function of the weights alone.

1. Cosines of all pairs, coarse, a tile at a time: for each row bounds of its largest in every range of rows.
2. For each range only the rows that may have their nearest in it, or a twin, are multiplied with it in float32.

Coarse is bfloat16 where the processor is fast at it, else float32.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sweep import chunks
from sweep.bfloat16 import UNIT, has_fast_bfloat16
from sweep.chunks import consecutive, pieces
from sweep.metrics import Metrics, ratio

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

RANGES_OF_A_TILE = 4
"""Along a side of the largest tile: the shorter they are, the fewer products are made again."""


class UnitRows:
    """Rows scaled to norm 1, for quick products; with the originals, for float64 where it matters."""

    def __init__(self, rows: Float[Tensor, "n d"]) -> None:
        self.rows = rows
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        self._scale = torch.where(norms > 0, 1 / norms, 0.0)
        parts = (self._double(piece) for piece in pieces(len(rows), 8 * rows.shape[1]))
        self._unit = torch.cat([part.float() for part in parts])
        # A float32 dot product of unit vectors is off by at most (d + 2) 2^-24 and second-order terms. Graphics cards
        # may be set to round the factors to 11 bits, which adds 2^-10.
        self.error = (rows.shape[1] + 8) * 2.0**-23 + (2.0**-9 if rows.is_cuda else 0)
        self._coarse, self._coarse_error, self._rounding = self._unit, self.error, 0.0
        if rows.device.type == "cpu" and has_fast_bfloat16():
            self._coarse = self._unit.bfloat16()
            changed = float(torch.linalg.vector_norm(self._unit - self._coarse, dim=1).max())
            self._coarse_error, self._rounding = self.error + 2.1 * changed, UNIT

    def _double(self, index: slice | Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return self.rows[index].double() * self._scale[index, None]

    def coarse(self, rows: slice, columns: slice) -> Float[Tensor, "m n"]:
        """Cosines of two ranges of rows, up to what `bounds` says."""
        return self._coarse[rows] @ self._coarse[columns].T

    def bounds(self, coarse: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """What cosines are at least and at most."""
        error = self._coarse_error + self._rounding * coarse.abs()
        return coarse - error, coarse + error

    def products(self, rows: Int[Tensor, " m"], columns: slice) -> Float[Tensor, "m n"]:
        """Cosines of some rows with a range of rows, to float32 rounding, which is less than `error`."""
        return self._unit[rows] @ self._unit[columns].T

    def exact(self, left: Int[Tensor, " m"], right: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Cosines of pairs of rows in float64."""
        parts = pieces(len(left), 8 * self.rows.shape[1])
        cosines = [(self._double(left[part]) * self._double(right[part])).sum(1) for part in parts]
        return torch.cat(cosines).clamp(-1, 1) if cosines else self._scale.new_empty(0)

    def similar(self, cosines: Float[Tensor, "m n"], rows: Int[Tensor, " m"], columns: slice) -> Bool[Tensor, "m n"]:
        """Which of the float32 products exceed SIMILAR."""
        similar = cosines > SIMILAR + self.error
        at, column = ((cosines > SIMILAR - self.error) ^ similar).nonzero(as_tuple=True)
        similar[at, column] = self.exact(rows[at], column + columns.start) > SIMILAR
        return similar


def decoder_similarity(W_dec: Float[Tensor, "dict_size d_out"]) -> DecoderSimilarity:
    """Compare every pair of decoder rows; a zero row has cosine 0 with all others.

    A pair whose float32 cosine is within the rounding error of SIMILAR is decided again in float64, so the count is
    that of float64. The nearest row is nearest up to float32 rounding, the first of equals; its cosine is float64.
    """
    n, device = len(W_dec), W_dec.device
    has_twin = torch.zeros(n, dtype=torch.bool, device=device)
    if n == 1:
        return DecoderSimilarity(0, has_twin.cpu(), None, None)
    unit = UnitRows(W_dec)
    width = max(math.isqrt(chunks.MAX_BYTES // 4) // RANGES_OF_A_TILE, 1)
    at_least, at_most = unit.bounds(largest_in_ranges(unit, n, width))
    needed = torch.minimum(at_least.amax(dim=1), at_least.new_tensor(SIMILAR))
    best = torch.full((n,), NO_COSINE, device=device)
    nearest = torch.zeros(n, dtype=torch.int64, device=device)
    n_similar = 0
    for i, columns in enumerate(consecutive(n, width)):  # smaller neighbours first: the first of equals stays
        for rows in torch.split((at_most[:, i] >= needed).nonzero().squeeze(1), RANGES_OF_A_TILE**2 * width):
            cosines = unit.products(rows, columns)
            own = ((rows >= columns.start) & (rows < columns.stop)).nonzero().squeeze(1)
            cosines[own, rows[own] - columns.start] = NO_COSINE
            largest, index = cosines.amax(dim=1), cosines.argmax(dim=1)
            better = largest > best[rows]
            best[rows[better]] = largest[better]
            nearest[rows[better]] = index[better] + columns.start
            if bool((largest > SIMILAR - unit.error).any()):
                similar = unit.similar(cosines, rows, columns)
                n_similar += int(similar.count_nonzero())
                has_twin[rows] |= similar.any(dim=1)
    nearest_cosine = unit.exact(torch.arange(n, device=device), nearest)
    return DecoderSimilarity(n_similar // 2, has_twin.cpu(), nearest.cpu(), nearest_cosine.cpu())


def largest_in_ranges(unit: UnitRows, n: int, width: int) -> Float[Tensor, "n n_ranges"]:
    """The largest coarse cosine of each row with another one in each range of `width` rows."""
    largest = unit.rows.new_empty(n, -(-n // width))
    tiles = list(consecutive(n, RANGES_OF_A_TILE * width))
    for rows, columns in itertools.combinations_with_replacement(tiles, 2):
        cosines = unit.coarse(rows, columns)
        if rows == columns:
            cosines.fill_diagonal_(NO_COSINE)
        for mine, axis, others in ((rows, 1, columns), (columns, 0, rows)):
            found = [part.amax(axis) for part in torch.split(cosines, width, axis)]
            first = others.start // width
            largest[mine, first : first + len(found)] = torch.stack(found, dim=1).float()
    return largest
