"""How far off a number rounded to bfloat16 is, and whether this processor multiplies those faster than float32."""

from functools import cache
from typing import Any

import torch

__all__ = ["UNIT", "has_fast_bfloat16"]

UNIT = 2.0**-8
"""Rounding changes a number by no more than this share of it."""


@cache
def has_fast_bfloat16() -> bool:
    """Whether this processor has units that multiply matrices of bfloat16 (Intel's AMX)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has none
    return bool(capabilities.get("amx_bf16"))
