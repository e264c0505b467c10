"""How far off a number rounded to bfloat16 is, and whether this processor multiplies those faster than float32."""

from functools import cache
from typing import Any

import torch

__all__ = ["UNIT", "has_fast_bfloat16"]

UNIT = 2.0**-8
"""Rounding changes a number by no more than this share of it."""


@cache
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 at least twice as fast: Intel's with AMX do, and AMD's
    with AVX-512 for it; Intel's with that alone take as long as for float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has none
    is_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return bool(capabilities.get("amx_bf16") or (is_amd and capabilities.get("avx512_bf16")))
