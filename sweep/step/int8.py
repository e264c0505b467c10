"""Bounds of pre-latents by products of integers of 8 bits, in units of the two factors' scales.

    x is about s q, w about t r, so x w is at most s t (q r + |dx| / s |w| / t + |q| |dw| / t)

What that must reach, the `height` that is looked for without the latent's bias, is h / (s t) in these units: a product,
too, if the scales of tokens are a unit divided by a whole number. So every term is a product of whole numbers, and a
place in question is where the sum is not negative. Numbers that are too large for one column are spread over some.
"""

import math

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from sweep.processor import LARGEST_INT8, int8_product, int8_scales, whole_multiples_
from sweep.step.bounds import Bounds, Place, norms
from sweep.step.entries import token_and_column
from sweep.transcoder import Parameters

__all__ = ["Int8Bounds"]

LEVEL_COLUMNS = 16
"""For the height: enough for a quarter of |x| |w|; a latent for which it is more gets a larger scale."""

MOST_COLUMNS = 64
"""For what rounding changed in the source; where it takes more, there is no telling anything apart."""

NARROWEST = 64
"""No token's scale is a smaller part of the largest one than one by this."""

SAFE = 1 + 2.0**-10
"""More than float32 may be off where a bound is computed."""


class Int8Bounds(Bounds):
    element_bytes = 4
    block_bytes = 8 << 20

    def __init__(
        self, params: Parameters, source: Float[Tensor, "batch d_in"], among: Int64[Tensor, " n"] | None = None
    ) -> None:
        super().__init__(params, source, among)
        d_in = source.shape[1]
        self._root = SAFE**2 * math.sqrt(d_in)
        """What norms are divided by, so that they fit a column, and what they are multiplied with is multiplied by."""
        own = int8_scales(self._centred)
        self._unit = torch.maximum(own.amin(), own.amax() / NARROWEST)
        share = (LARGEST_INT8 * self._unit / own).floor().clamp(1, LARGEST_INT8)
        scale = LARGEST_INT8 * self._unit / share
        of_source = norms(self._centred)
        whole = whole_multiples_(self._centred, scale)
        norm, changed = norms(whole), norms(self._centred) + 2.0**-21 * (of_source + self._mean_norm)
        error = SAFE * self._root * (changed / scale + self._of_sums * norm)
        self.hold &= bool(error.isfinite().all()) and float(error.amax()) < MOST_COLUMNS * LARGEST_INT8
        self._n_error = math.ceil(float(error.amax()) / LARGEST_INT8) if self.hold else 0
        self._n_norm = math.ceil((0.51 * d_in + 1) / LARGEST_INT8)
        self._left = side_by_side(
            (whole, d_in),
            (-share.unsqueeze(1), LEVEL_COLUMNS),
            (spread(error.ceil(), self._n_error), self._n_error),
            ((SAFE / self._root * norm).ceil().unsqueeze(1), self._n_norm),
        )

    def candidates(self, weights: Float[Tensor, "n d_in"], bias: Float[Tensor, " n"], least: float) -> Place:
        right = self._right(weights, bias, least)
        sums = int8_product(self._left, right, self.room(len(self._left), len(right), torch.int32))
        return token_and_column(sums >= 0)

    def _right(
        self, weights: Float[Tensor, "n d_in"], bias: Float[Tensor, " n"], least: float
    ) -> Int8[Tensor, "n n_columns"]:
        norm = norms(weights)
        height = least - bias - weights @ self._mean - (bias.abs() + norm * self._mean_norm) * self._of_sums
        full = LARGEST_INT8 * self._unit
        coarsest = SAFE * height.abs() / (LEVEL_COLUMNS * LARGEST_INT8 * full)
        scale = torch.maximum(int8_scales(weights), coarsest)
        self.hold &= bool((norm / scale).isfinite().all())
        whole = whole_multiples_(weights, scale)
        changed = norms(weights)
        level = height / (scale * full)
        return side_by_side(
            (whole, weights.shape[1]),
            (spread((level - level.abs() * 2.0**-20).floor(), LEVEL_COLUMNS), LEVEL_COLUMNS),
            ((SAFE / self._root * norm / scale).ceil().unsqueeze(1), self._n_error),
            (spread((SAFE * self._root * changed / scale).ceil(), self._n_norm), self._n_norm),
        )


def side_by_side(*parts: tuple[Float[Tensor, "n _"], int]) -> Int8[Tensor, "n n_columns"]:
    """Matrices of so many columns each, or of one that is repeated."""
    widths = [width for _, width in parts]
    out = torch.empty(len(parts[0][0]), sum(widths), dtype=torch.int8)
    for columns, (part, _) in zip(out.split(widths, dim=1), parts, strict=True):
        columns.copy_(part)
    return out


def spread(values: Float[Tensor, " n"], n_columns: int) -> Float[Tensor, "n n_columns"]:
    """Whole numbers as sums of whole numbers that are as equal as can be."""
    return (values.unsqueeze(1) + torch.arange(n_columns)).div_(n_columns, rounding_mode="floor")
