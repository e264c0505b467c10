"""Google's transcoders as transcoders of ours, each with its own hook.

    Gemma Scope      reads x / rms(x), without the norm's weight; params.npz
    Gemma Scope 2    reads what the MLP reads, the norm's weight applied; params.safetensors and config.json

    pre = x W_enc + b_enc;  f = pre where pre > threshold, else 0;  y = f W_dec + b_dec (+ x W_skip)

Both predict what is added to the residual. b_dec is not subtracted from the input, and nothing is scaled.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sweep.baselines.family import Entry
from sweep.baselines.header import NAMES, check
from sweep.baselines.npz import read_npz, why_not_whole
from sweep.config import Site
from sweep.errors import BaselineError
from sweep.revisions import sha256_of_file
from sweep.transcoder import Transcoder

__all__ = ["Baseline", "load_baseline", "suspicions"]

L0_FACTOR = 1.5
"""A measured L0 further than this from the authors' says that something is read the wrong way, or another text."""

NORM_TOLERANCE = 0.05


@dataclass(frozen=True)
class Baseline:
    """Somebody else's transcoder, ready to be scored beside ours."""

    name: str
    site: Site
    transcoder: Transcoder
    l0: float | None
    """The L0 its authors measured, where it is known."""
    file_hash: str
    trained_on: str
    """The language model it was trained on."""


def load_baseline(entry: Entry, layer: int, d_in: int, d_out: int, device: str = "cpu") -> Baseline:
    """Read a transcoder of Google's after checking its header, names and shapes.

    Raises:
        BaselineError: it is missing, not whole, of another model or layer, or of a kind we do not know.
    """
    shapes, config = check(entry, layer, d_in, d_out)
    tensors = _read(entry.params, shapes)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise BaselineError(f"{entry.params} has weights that are not finite; download it again")
    weights = {name: tensor.to(device) for name, tensor in tensors.items() if name != "threshold"}
    transcoder = Transcoder(
        **weights,
        activation="jump_relu",
        top_k=0,
        threshold=tensors["threshold"].clamp(min=0).to(device),  # a latent below zero is never active there
    )
    return Baseline(
        name=entry.name,
        site=entry.site(layer),
        transcoder=transcoder,
        l0=entry.l0,
        file_hash=sha256_of_file(entry.params),
        trained_on="google/gemma-2-2b" if entry.is_first else str(config.get("model_name", "")),
    )


def suspicions(baseline: Baseline, l0: float, source_norm: float) -> list[str]:
    """What is wrong with how a baseline was read, judged by what it measured; one line each.

    Args:
        l0: measured on held-out tokens.
        source_norm: mean Euclidean norm of what it read there.
    """
    lines = []
    expected = math.sqrt(baseline.transcoder.W_enc.shape[0])
    if baseline.site.hook_in == "norm_unit" and abs(source_norm / expected - 1) > NORM_TOLERANCE:
        lines.append(f"its inputs have norm {source_norm:.4g} instead of {expected:.4g}: it read the wrong hook")
    if baseline.l0 and not 1 / L0_FACTOR <= l0 / baseline.l0 <= L0_FACTOR:
        lines.append(
            f"measured L0 {l0:.4g}, its authors' is {baseline.l0:g}: it was read the wrong way, or this text or these "
            "weights are very different from theirs"
        )
    return lines


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of these names, in float32."""
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in read_npz(path).items() if name in shapes}
    ours_to_theirs = {ours: theirs for theirs, ours in NAMES.items()}
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(ours_to_theirs[name]).float() for name in shapes}
    except (SafetensorError, OSError, ValueError) as error:
        raise BaselineError(why_not_whole(path, error)) from error
