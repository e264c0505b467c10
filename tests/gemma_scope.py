"""Folders in Google's exact layout, made from arrays: `from gemma_scope import random_arrays, write_first`.

`python -m tests.gemma_scope RESULTS FOLDER` makes a family of Gemma Scope out of the cells of a sweep: those that read
norm_unit.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

__all__ = ["Arrays", "random_arrays", "reference_prediction", "write_first", "write_second"]

Arrays = dict[str, NDArray[np.float32]]
"""W_enc [d_in, F], b_enc, W_dec [F, d_out], b_dec, threshold, and for some of Gemma Scope 2 W_skip [d_in, d_out]."""


def random_arrays(d_in: int, width: int, d_out: int, seed: int = 0, *, skip: bool = False) -> Arrays:
    """Weights of a size at which some latents fire on inputs of norm sqrt(d_in)."""
    rng = np.random.default_rng(seed)
    arrays = {
        "W_enc": rng.normal(size=(d_in, width)) / np.sqrt(d_in),
        "b_enc": rng.normal(size=width) / 4,
        "W_dec": rng.normal(size=(width, d_out)) / np.sqrt(width),
        "b_dec": rng.normal(size=d_out),
        "threshold": rng.uniform(0.2, 1.5, size=width),
    }
    if skip:
        arrays["W_skip"] = rng.normal(size=(d_in, d_out)) / np.sqrt(d_in)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def reference_prediction(arrays: Arrays, source: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latents and prediction in float64, from the published definition alone."""
    weights = {name: array.astype(np.float64) for name, array in arrays.items()}
    pre = source.astype(np.float64) @ weights["W_enc"] + weights["b_enc"]
    latents = np.maximum(pre, 0) * (pre > weights["threshold"])
    prediction = latents @ weights["W_dec"] + weights["b_dec"]
    if "W_skip" in weights:
        prediction += source.astype(np.float64) @ weights["W_skip"]
    return latents, prediction


def write_first(root: Path, arrays: Arrays, layer: int = 1, l0: int = 4, width: str = "16k") -> Path:
    """A transcoder of Gemma Scope; returns its folder."""
    folder = root / f"layer_{layer}" / f"width_{width}" / f"average_l0_{l0}"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays)  # type: ignore[arg-type]
    return folder


def write_second(
    root: Path,
    arrays: Arrays,
    layer: int = 1,
    l0: int = 4,
    size: str = "small",
    width: str = "16k",
    kind: str = "transcoder_all",
    **config: Any,
) -> Path:
    """A transcoder of Gemma Scope 2, affine where the arrays have a skip; returns its folder."""
    affine = "W_skip" in arrays
    folder = root / kind / f"layer_{layer}_width_{width}_l0_{size}{'_affine' * affine}"
    folder.mkdir(parents=True)
    theirs = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
    tensors = {theirs.get(name, name): np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(tensors, folder / "params.safetensors")
    values = {
        "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
        "width": arrays["b_enc"].shape[0],
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": l0,
        "affine_connection": affine,
        "type": "transcoder",
    }
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def write_family(results: Path, root: Path) -> None:
    """Every cell of a results folder that reads norm_unit and selects by a threshold, in Google's layout."""
    for folder in sorted((results / "cells").iterdir()):
        site = json.loads((folder / "config.json").read_text())["site"]
        weights = load_file(folder / "transcoder" / "transcoder.safetensors")
        if site["hook_in"] == "norm_unit" and "threshold" in weights:
            l0 = round(json.loads((folder / "metrics.json").read_text())["l0"])
            write_first(root, weights, site["layer"], l0)


if __name__ == "__main__":
    write_family(*map(Path, sys.argv[1:]))
