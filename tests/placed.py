"""Made-up cells and baselines whose places beside each other are known."""

from pathlib import Path
from typing import Any

import numpy as np
from make import write_cell

__all__ = ["BASELINES", "CELLS", "N", "sequences", "write"]

N = 30
BASELINES = {"low": (8.0, 0.8), "middle": (32.0, 0.4), "beaten": (40.0, 0.5), "high": (128.0, 0.2)}
CELLS = {
    "dense": (100.0, 0.3),  # the lowest FVU, and worse than the baselines at L0 100
    "sparse": (16.0, 0.5),
    "even": (64.0, 0.4 / 2**0.5),
    "even2": (64.0, 0.4 / 2**0.5),
    "beyond": (4.0, 0.9),
    "dominant": (4.0, 0.7),
}


def sequences(l0: float, fvu: float, seed: int) -> list[dict[str, Any]]:
    """Sums that add up to this L0 and, with a variance of 1 per token, to this FVU."""
    noise = np.random.default_rng(seed).uniform(0.8, 1.2, N)
    errors = 31 * N * fvu * noise / noise.sum()
    return [
        {"sequence": i, "n_tokens": 31, "sum_squared_error": error, "sum_l0": 31 * l0} for i, error in enumerate(errors)
    ]


def write(root: Path, name: str, l0: float, fvu: float, seed: int, **row: Any) -> None:
    write_cell(root, name, l0=l0, fvu=fvu, sequences=sequences(l0, fvu, seed), **row)
