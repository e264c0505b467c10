"""Nearest decoder rows of chosen latents, read from a saved transcoder with numpy: nothing here needs torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sweep.errors import ResultsError

__all__ = ["Neighbour", "neighbours"]

ROWS = 8192
"""Decoder rows held at a time."""

Neighbour = tuple[int, float]
"""A latent, and the cosine of the two decoder rows."""


def neighbours(transcoder: Path, latents: Sequence[int], n: int = 5) -> dict[int, list[Neighbour]]:
    """For each latent the `n` others whose decoder rows have the largest cosine with its own; a row of zeros has none.

    Args:
        transcoder: the folder with `transcoder.safetensors`.

    Raises:
        ResultsError: the file is missing, damaged or holds something else.
    """
    path = transcoder / "transcoder.safetensors"
    try:
        return _neighbours(path, latents, n)
    except (OSError, SafetensorError, ValueError, TypeError, IndexError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error


@np.errstate(over="ignore", invalid="ignore")  # a damaged file may hold any number
def _neighbours(path: Path, latents: Sequence[int], n: int) -> dict[int, list[Neighbour]]:
    with safe_open(path, framework="numpy") as file:
        decoder = file.get_slice("W_dec")
        dict_size = decoder.get_shape()[0]
        if latents and max(latents) >= dict_size:
            raise ValueError(f"it holds {dict_size} latents, not one of number {max(latents)}")
        chosen = _unit(np.concatenate([decoder[latent : latent + 1] for latent in latents]))
        parts = [(start, min(start + ROWS, dict_size)) for start in range(0, dict_size, ROWS)]
        cosines = np.concatenate([chosen @ _unit(decoder[start:end]).T for start, end in parts], axis=1)
    found: dict[int, list[Neighbour]] = {}
    for latent, row in zip(latents, cosines, strict=True):
        silent = row[latent] == 0
        row[latent] = -np.inf
        best = [] if silent else np.argsort(-row, kind="stable")[:n].tolist()
        found[latent] = [(other, float(row[other])) for other in best if other != latent]
    return found


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of length one, in float32; zeros stay zeros."""
    wide = rows.astype(np.float32)
    lengths = np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    unit: NDArray[np.float32] = wide / lengths
    return unit
