"""Transcoders as other programs save them, and a pickle that does harm."""

import json
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["CONFIG", "OVERRIDES", "Evil", "weights", "write"]

CONFIG = {"model_name": "tiny", "hook_layer": 1, "k": 4, "activation": "topk", "lr": 3e-4}
OVERRIDES = ("seq_len=32", "n_tokens=2048", "n_calibration_tokens=512", "n_heldout_tokens=512", "batch_size=64")


def weights(dict_size: int = 64, d_in: int = 32, d_out: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, dict_size), "b_enc": (dict_size,), "W_dec": (dict_size, d_out), "b_dec": (d_out,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, state: Any, config: dict[str, Any] | None = None, name: str = "transcoder.pt") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)
