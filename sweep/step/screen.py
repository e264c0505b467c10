"""Whether to look among bounds first, and among which: a matter of the processor and of sizes, never of the numbers."""

import torch
from jaxtyping import Float
from torch import Tensor

from sweep.processor import has_fast_bfloat16, has_fast_int8
from sweep.step.bfloat16 import BFloat16Bounds
from sweep.step.bounds import Bounds
from sweep.step.int8 import Int8Bounds

__all__ = ["fitting"]

FEWEST_TOKENS = 1024
"""In fewer, rounding the weights to 8 bits takes what the quicker product saves."""

LARGEST_SHARE = 1 / 64
"""Of entries that are looked for: of more, too many have to be looked at."""


def fitting(source: Float[Tensor, "batch d_in"], share: float) -> type[Bounds] | None:
    """The bounds that save time where this share of all entries is looked for, if any do.

    Those in bfloat16 leave hardly more than that; those in 8 bits two to four times as much, in half the time.
    """
    if source.device.type != "cpu" or source.dtype != torch.float32:
        return None
    if has_fast_bfloat16():
        return BFloat16Bounds
    return Int8Bounds if has_fast_int8() and len(source) >= FEWEST_TOKENS and share <= LARGEST_SHARE else None
