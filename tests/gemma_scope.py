"""Folders in Google's exact layout, made from arrays: `from gemma_scope import random_arrays, write_first`.

`python -m tests.gemma_scope RESULTS FOLDER` makes a family of Gemma Scope out of the cells of a sweep: those that read
norm_unit. `python -m tests.gemma_scope RESULTS/cells/CELL FOLDER` makes one of Gemma Scope 2 out of a cell that reads
norm_out: the same weights at five thresholds.
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
    """Every cell of a results folder that reads norm_unit, selects by a threshold and has no linear map, in Google's
    layout."""
    for folder in sorted((results / "cells").iterdir()):
        site = json.loads((folder / "config.json").read_text())["site"]
        weights = load_file(folder / "transcoder" / "transcoder.safetensors")
        if site["hook_in"] == "norm_unit" and "threshold" in weights and "W_skip" not in weights:
            l0 = round(json.loads((folder / "metrics.json").read_text())["l0"])
            write_first(root, weights, site["layer"], l0)


SECOND = (
    ("transcoder_all", "small"), ("transcoder", "small"), ("transcoder", "medium"), ("transcoder", "big"),
    ("transcoder_all", "big"),
)  # fmt: skip
"""Folders of Gemma Scope 2 for one layer and width, in the order in which they are filled here: the densest last."""


def write_thresholds(cell: Path, root: Path, l0s: tuple[int, ...] = (4, 8, 16, 24)) -> None:
    """A cell's transcoder at these L0s, and as it is: of a family whose last point is known. None may be near its own
    L0, or it may be the better one by chance."""
    import torch

    from sweep.paths import CacheFolder
    from sweep.progress import silent
    from sweep.saved import open_saved
    from sweep.score import Rows
    from sweep.tokens import row_counts

    saved = open_saved(cell)
    site, transcoder = saved.cell.site, saved.load("cpu")
    n_rows = row_counts(saved.cell.data)["heldout"]
    rows = Rows(saved.cell, [site], n_rows, CacheFolder(saved.default_cache), "cpu", silent)
    pre = torch.cat([block[site].source @ transcoder.W_enc + transcoder.b_enc for block in rows.blocks()])
    names = ("W_enc", "b_enc", "W_dec", "b_dec", *(["W_skip"] if transcoder.W_skip is not None else []))
    weights = {name: getattr(transcoder, name).numpy() for name in names}
    assert transcoder.threshold is not None
    thresholds = [float(pre.flatten().kthvalue(pre.numel() - l0 * len(pre)).values) for l0 in l0s]
    for (kind, size), threshold in zip(SECOND, [*thresholds, float(transcoder.threshold[0])], strict=True):
        l0 = float((pre > threshold).sum()) / len(pre)
        arrays = weights | {"threshold": np.full(pre.shape[1], threshold, np.float32)}
        write_second(root, arrays, site.layer, round(l0), size, kind=kind)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    (write_thresholds if (source / "transcoder").is_dir() else write_family)(source, target)
