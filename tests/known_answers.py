"""Transcoders in Google's layout whose right answers are known in closed form.

The sources and targets they are made from are read off Hugging Face's own modules, not through the code under test.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gemma_scope import Arrays

__all__ = ["D", "fvu", "hugging_face", "lookup"]

D = 32


def hugging_face(folder: Path, rows: Any) -> dict[str, np.ndarray]:
    """What layer 1 of the tiny model reads and writes at positions 1 and later, one row per token, in float64."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    layer, seen = network.model.layers[1], {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, (inputs[0].detach(), output.detach()))

    layer.pre_feedforward_layernorm.register_forward_hook(keep("norm"))
    layer.post_feedforward_layernorm.register_forward_hook(keep("post"))
    with torch.no_grad():
        network(torch.from_numpy(rows.astype("int64")))
    residual, normed = (tensor[:, 1:].reshape(-1, D).double().numpy() for tensor in seen["norm"])
    unit = residual / np.sqrt((residual**2).mean(1, keepdims=True) + network.config.rms_norm_eps)
    return {"norm_unit": unit, "norm_out": normed, "target": seen["post"][1][:, 1:].reshape(-1, D).double().numpy()}


def lookup(source: np.ndarray, target: np.ndarray, gain: np.ndarray) -> Arrays:
    """The MLP on these tokens: a latent for each, which fires on it alone and writes its target.

    `source` has rows of one norm; the transcoder reads them multiplied by `gain`.
    """
    unit = source / np.linalg.norm(source, axis=1, keepdims=True)
    keep: list[int] = []
    for i in range(len(unit)):  # the same token in the same context is one point
        if not keep or (unit[keep] @ unit[i]).max() < 1 - 1e-6:
            keep.append(i)
    unit, norm, target = unit[keep], np.linalg.norm(source[keep], axis=1), target[keep]
    cosines = unit @ unit.T - 2 * np.eye(len(unit))
    threshold = norm * (1 + cosines.max(1)) / 2
    arrays = {
        "W_enc": unit.T / gain[:, None], "b_enc": np.zeros(len(unit)),
        "W_dec": target / norm[:, None], "b_dec": np.zeros(D), "threshold": threshold,
    }  # fmt: skip
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def fvu(prediction: np.ndarray, target: np.ndarray) -> float:
    return float(((prediction - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum())
