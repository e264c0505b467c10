"""What this processor multiplies faster than float32: matrices of bfloat16, of integers of 8 bits."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

__all__ = [
    "BFLOAT16_UNIT",
    "LARGEST_INT8",
    "has_fast_bfloat16",
    "has_fast_int8",
    "int8_product",
    "int8_scales",
    "whole_multiples_",
]

BFLOAT16_UNIT = 2.0**-8
"""Rounding to bfloat16 changes a number by no more than this share of it."""

LARGEST_INT8 = 127
"""And -127 the smallest, so that a product of two has the same range."""


@cache
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 at least twice as fast: Intel's with AMX do, and AMD's
    with AVX-512 for it; Intel's with that alone take as long as for float32."""
    is_amd = str(capabilities().get("cpu_name", "")).startswith("AMD")
    return has_any("amx_bf16") or (is_amd and has_any("avx512_bf16"))


@cache
def has_fast_int8() -> bool:
    """Whether it multiplies matrices of such integers about four times as fast, which takes an instruction that sums
    four products in 32 bits; without it the library multiplies pairs in 16 bits, where they may overflow."""
    if not has_any("avx512_vnni", "avx_vnni", "amx_int8"):
        return False
    largest = torch.full((64, 256), LARGEST_INT8, dtype=torch.int8)
    product = int8_product(largest, -largest, torch.empty(64, 64, dtype=torch.int32))
    return bool((product == -256 * LARGEST_INT8**2).all())


def int8_product(
    left: Int8[Tensor, "m d"], right: Int8[Tensor, "n d"], out: Int32[Tensor, "m n"]
) -> Int32[Tensor, "m n"]:
    """left @ right.T, exactly."""
    if left.shape[1] == 1:  # the library's product of single columns is anything
        return torch.mul(left.int(), right.int().T, out=out)
    return torch._int_mm(left, right.T, out=out)


def int8_scales(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """For each row the least scale of which its elements are no more than 127 multiples; positive for zeros, too."""
    largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))
    return (largest / LARGEST_INT8).clamp_min(torch.finfo(rows.dtype).tiny)


def whole_multiples_(rows: Float[Tensor, "n d"], scales: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """The nearest whole multiples of each row's scale; what rounding changed is left in the rows."""
    whole = (rows / scales.unsqueeze(1)).round_()
    rows.addcmul_(whole, scales.unsqueeze(1), value=-1)
    return whole


def has_any(*names: str) -> bool:
    return any(capabilities().get(name) for name in names)


def capabilities() -> Mapping[str, Any]:
    """Empty in torch 2.6, which tells none."""
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told
