"""A transcoder that another program saved with torch: a state dict and a config.json, which may come from anywhere.

1. The file must be a zip whose parts are stored as they are and lie inside it: nothing can unpack to more.
2. torch reads it with weights_only, so a pickle in it can make tensors and plain values and run nothing.
3. Names, shapes and numbers are held against each other; which way a matrix lies follows from its shape.
4. What changes the numbers and is not understood is refused.
"""

import math
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from sweep.errors import CheckpointError, first_line
from sweep.transcoder import Transcoder

__all__ = ["ForeignTranscoder", "options_in"]

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
COUNTERS = ("num_batches_not_active", "batches_since_fired")
"""Tensors beside the weights that inference does not read."""

NAMES: dict[str, tuple[str, ...]] = {
    "dict_size": ("dict_size", "d_sae", "d_transcoder", "num_latents", "n_features"),
    "top_k": ("top_k", "k"),
    "layer": ("layer", "hook_layer", "layer_idx"),
    "hook_in": ("hook_in", "hook_name", "hook_point"),
    "hook_out": ("hook_out", "hook_name_out", "hook_point_out"),
    "model": ("model", "model_name"),
    "activation": ("activation", "activation_fn", "sae_type", "architecture"),
}
"""Our options, and what others call them in their config.json."""

ACTIVATIONS = {
    "top_k": "top_k", "topk": "top_k", "batch_top_k": "batch_top_k", "batchtopk": "batch_top_k", "relu": "relu",
    "global_matryoshka_topk": "batch_top_k", "matryoshka": "batch_top_k", "jump_relu": "jump_relu",
    "jumprelu": "jump_relu", "batch_topk": "batch_top_k", "global-matryoshka-topk": "batch_top_k",
}  # fmt: skip

CHANGES_NUMBERS = ("normalize_activations", "apply_b_dec_to_input", "input_unit_norm", "reshape_activations", "skip")
"""Settings that ask for arithmetic beyond encode, select, decode."""

OFF = (None, False, "none", "None", "")

UNREADABLE = (
    OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError, AssertionError,
    MemoryError, NotImplementedError, ImportError, RecursionError, struct.error, UnpicklingError,
    zipfile.BadZipFile,
)  # fmt: skip
"""What zipfile and torch raise on bytes that are not what they should be."""


def options_in(config: Mapping[str, Any], place: Path) -> dict[str, str | int]:
    """Our options that a foreign config.json tells, `activation` in our words (or relu, jump_relu).

    Raises:
        CheckpointError: a setting is not understood, or two contradict each other.
    """
    for key in CHANGES_NUMBERS:
        if config.get(key) not in OFF:
            raise CheckpointError(f"{place}: {key}={config[key]!r} changes the numbers and is not understood here")
    found: dict[str, str | int] = {}
    for option, names in NAMES.items():
        values = {name: config[name] for name in names if config.get(name) is not None}
        if len(set(map(str, values.values()))) > 1:
            raise CheckpointError(f"{place} contradicts itself: {', '.join(f'{k}={v}' for k, v in values.items())}")
        for name, value in values.items():
            found[option] = plain(option, name, value, place)
    if "activation" in found:
        word = str(found["activation"]).lower()
        if word not in ACTIVATIONS:
            raise CheckpointError(f"{place}: activation {word} is not understood; known: {', '.join(ACTIVATIONS)}")
        found["activation"] = ACTIVATIONS[word]
    return found


def plain(option: str, name: str, value: Any, place: Path) -> str | int:
    """A number for what is counted, a plain name for all else."""
    if option in ("dict_size", "top_k", "layer"):
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40:
            return value
    elif isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,200}", value):
        return value
    raise CheckpointError(f"{place}: {name}={str(value)[:50]!r} is not understood")


class ForeignTranscoder:
    """The tensors of a torch file, checked against each other. Shapes as ours: W_enc [d_in, dict_size]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors = read_tensors(path)
        missing = [name for name in WEIGHTS if name not in tensors]
        unknown = [name for name in tensors if name not in (*WEIGHTS, *COUNTERS, "threshold")]
        if missing or unknown:
            raise CheckpointError(
                f"{path} holds {', '.join(sorted(tensors)) or 'no tensor'}; a transcoder has "
                f"{', '.join(WEIGHTS)}, may have a threshold, and nothing else is understood"
            )
        for name in WEIGHTS:
            if not tensors[name].is_floating_point() or not bool(tensors[name].isfinite().all()):
                raise CheckpointError(f"{path}: {name} holds numbers that are not real or not finite")
        b_enc, b_dec = tensors["b_enc"].flatten().float(), tensors["b_dec"].flatten().float()
        self.dict_size, self.d_out = len(b_enc), len(b_dec)
        self.b_enc, self.b_dec = b_enc, b_dec
        self.W_enc = self._with_side(tensors["W_enc"], 1, None, "W_enc")
        self.W_dec = self._with_side(tensors["W_dec"], 0, self.d_out, "W_dec")
        self.d_in = self.W_enc.shape[0]
        self.threshold = self._threshold(tensors.get("threshold"))

    def _with_side(self, matrix: Tensor, side: int, other: int | None, name: str) -> Tensor:
        """The matrix with its latents along `side`, turned if need be."""
        shape = tuple(matrix.shape)
        fits = [s for s in (0, 1) if len(shape) == 2 and shape[s] == self.dict_size and other in (None, shape[1 - s])]
        if len(fits) != 1:
            why = "lies either way" if fits else "does not fit"
            raise CheckpointError(
                f"{self.path}: {name} of shape {shape} {why} with {self.dict_size} latents (b_enc) and "
                f"{self.d_out} outputs (b_dec)"
            )
        return (matrix if fits[0] == side else matrix.T).float().contiguous()

    def _threshold(self, threshold: Tensor | None) -> Tensor | None:
        if threshold is None:
            return None
        if threshold.numel() not in (1, self.dict_size) or not bool((threshold >= 0).all()):
            raise CheckpointError(f"{self.path}: threshold of shape {tuple(threshold.shape)} is not one per latent")
        return threshold.flatten().float().expand(self.dict_size).contiguous()

    def transcoder(self, activation: str, top_k: int, device: str) -> Transcoder:
        """It as ours; `activation` is top_k, batch_top_k, relu or jump_relu.

        Raises:
            CheckpointError: the activation needs a threshold that is not there.
        """
        threshold = self.threshold
        if activation == "relu":
            threshold = torch.zeros(self.dict_size)
        elif activation == "top_k":
            threshold = None
        elif threshold is None:
            raise CheckpointError(
                f"{self.path} is {activation} and holds no threshold, so what is active outside a batch is not known; "
                "give activation=top_k to score the largest top_k of each token instead"
            )
        return Transcoder(
            W_enc=self.W_enc.to(device),
            b_enc=self.b_enc.to(device),
            W_dec=self.W_dec.to(device),
            b_dec=self.b_dec.to(device),
            activation="top_k" if threshold is None else "jump_relu",
            top_k=top_k,
            threshold=None if threshold is None else threshold.to(device),
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file by name; nothing in it is run, and none claims more than the file has.

    Raises:
        CheckpointError: it is no such file, is damaged, or holds what is no tensor.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                    raise CheckpointError(f"{path}: {entry.filename} claims more than the file holds")
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} is not whole, or was saved by a very old torch; load it there and save it again: "
            f"{first_line(error)}"
        ) from error
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged, and nothing in it was run; save its state dict alone: "
            f"torch.save(model.state_dict(), ...) ({first_line(error)[:200]})"
        ) from error
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path} is no state dict: names and tensors, and nothing else")
    for name, tensor in found.items():
        if math.prod(tensor.shape) * tensor.element_size() > size or tensor.layout is not torch.strided:
            raise CheckpointError(f"{path}: {name} claims the shape {tuple(tensor.shape)}, more than the file holds")
    return {str(name): tensor for name, tensor in found.items()}
