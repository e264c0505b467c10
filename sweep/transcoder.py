"""The transcoder: parameters, how they encode and decode, and which latents may be active.

    pre_latents = source @ W_enc + b_enc          [n, dict_size]
    latents     = select(relu(pre_latents))       sparse, by the activation rule
    target_hat  = latents @ W_dec + b_dec         [n, d_out]      (+ source @ W_skip, with skip)

`Parameters` are what training changes, in scaled units (source and target have unit mean square).
`Transcoder` is what inference reads, in the language model's own units: the scales are folded in.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sweep import devices
from sweep.config import Capacity
from sweep.errors import CheckpointError
from sweep.paths import write_atomic, write_json
from sweep.revisions import read_object

__all__ = [
    "Parameters",
    "Transcoder",
    "fold",
    "largest",
    "load_transcoder",
    "pre_latents",
    "save_transcoder",
    "select",
    "select_batch_top_k",
    "select_top_k",
]

FORMAT = "sparse-transcoder"
FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 1 << 20


@dataclass
class Parameters:
    """Tensors of one dtype, W_skip only with `skip`; also the shape of their gradients and of Adam's moments.

    In training the weights of one latent lie next to each other in memory: W_enc is the transpose of a contiguous
    [dict_size, d_in], see `by_latent`.
    """

    W_enc: Float[Tensor, "d_in dict_size"]
    b_enc: Float[Tensor, " dict_size"]
    W_dec: Float[Tensor, "dict_size d_out"]
    b_dec: Float[Tensor, " d_out"]
    W_skip: Float[Tensor, "d_in d_out"] | None = None

    @staticmethod
    def shapes(d_in: int, dict_size: int, d_out: int, skip: bool) -> dict[str, tuple[int, ...]]:
        """Of the tensors there are, by name."""
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (d_in, dict_size),
            "b_enc": (dict_size,),
            "W_dec": (dict_size, d_out),
            "b_dec": (d_out,),
        }
        return shapes | ({"W_skip": (d_in, d_out)} if skip else {})

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors there are, by name."""
        return ((f.name, tensor) for f in fields(self) if (tensor := getattr(self, f.name)) is not None)

    def tensors(self) -> list[Tensor]:
        return [tensor for _, tensor in self.items()]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Parameters":
        return Parameters(**{name: function(tensor) for name, tensor in self.items()})

    def by_latent(self) -> "Parameters":
        """The same values, laid out for training; no copy where they already are."""
        return replace(self, W_enc=self.W_enc.T.contiguous().T)


def pre_latents(params: Parameters, source: Float[Tensor, "n d_in"]) -> Float[Tensor, "n dict_size"]:
    return torch.addmm(params.b_enc, source, params.W_enc)


def largest(values: Float[Tensor, "n m"], k: int) -> Bool[Tensor, "n m"]:
    """Which entries are among the `k` largest positive ones of their row; of equals the first.

    NaN counts as largest, so that weights that are no numbers show in the loss.
    """
    values = values.detach().nan_to_num(nan=torch.inf, posinf=torch.inf)
    if k >= values.shape[1]:
        return values > 0
    least = values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True).clamp_min(0)
    chosen = values > least
    equal = (values == least) & (least > 0)
    n_left = k - chosen.count_nonzero(dim=1)
    if devices.reading_waits(values):
        return chosen | (equal & (equal.cumsum(dim=1) <= n_left.unsqueeze(1)))
    row, column = equal.nonzero(as_tuple=True)  # rarely more than one, found sooner than all are counted
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    fits = rank < n_left[row]
    chosen[row[fits], column[fits]] = True
    return chosen


def select_top_k(pre: Float[Tensor, "n dict_size"], top_k: int) -> Float[Tensor, "n dict_size"]:
    """The `top_k` largest positive entries of each row; zero elsewhere (Gao et al. 2024, TopK)."""
    return torch.where(largest(pre, top_k), pre, 0)


def select_batch_top_k(pre: Float[Tensor, "n dict_size"], top_k: int) -> Float[Tensor, "n dict_size"]:
    """The `top_k * n` largest positive entries of the batch; zero elsewhere (Bussmann et al. 2024, BatchTopK)."""
    chosen = largest(pre.flatten().unsqueeze(0), top_k * len(pre))
    return torch.where(chosen.view_as(pre), pre, 0)


def select(pre: Float[Tensor, "n dict_size"], capacity: Capacity) -> Float[Tensor, "n dict_size"]:
    """Latents in training, by the capacity's activation rule."""
    rule = select_batch_top_k if capacity.activation == "batch_top_k" else select_top_k
    return rule(pre, capacity.top_k)


@dataclass(frozen=True)
class Transcoder:
    """Inference only, in the language model's own units.

    `top_k` applies to activation "top_k"; `threshold` (one value per latent) to "jump_relu": a latent is active
    where its pre-latent exceeds its threshold, and then has the pre-latent's value (Rajamanoharan et al. 2024).
    """

    W_enc: Float[Tensor, "d_in dict_size"]
    b_enc: Float[Tensor, " dict_size"]
    W_dec: Float[Tensor, "dict_size d_out"]
    b_dec: Float[Tensor, " d_out"]
    activation: str
    top_k: int
    threshold: Float[Tensor, " dict_size"] | None
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """Adds a linear map of the source to the prediction; ours have one with `skip`."""

    def encode(self, source: Float[Tensor, "n d_in"]) -> Float[Tensor, "n dict_size"]:
        """The latents, mostly zeros, of what `hook_in` holds, as the language model has it."""
        pre = torch.addmm(self.b_enc, source, self.W_enc)
        if self.threshold is None:
            return select_top_k(pre, self.top_k)
        return torch.where(pre > self.threshold, pre, 0)

    def decode(
        self, latents: Float[Tensor, "n dict_size"], source: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """The prediction; `source`, from which the latents came, is needed where there is a `W_skip`."""
        prediction = torch.addmm(self.b_dec, latents, self.W_dec)
        if self.W_skip is None:
            return prediction
        assert source is not None, "a transcoder with W_skip decodes latents and source"
        return prediction.addmm_(source, self.W_skip)


def fold(
    params: Parameters, capacity: Capacity, source_scale: float, target_scale: float, threshold: float | None
) -> Transcoder:
    """The transcoder in raw units: reads `source / source_scale`-sized inputs, predicts unscaled targets.

    Training sees `source * source_scale` and `target * target_scale`. The decoder keeps its norm, so latents come
    out in units of the target: everything before the decoder is divided by `target_scale`.
    """
    n_latents = params.b_enc.numel()
    return Transcoder(
        W_enc=params.W_enc * (source_scale / target_scale),
        b_enc=params.b_enc / target_scale,
        W_dec=params.W_dec.clone(),
        b_dec=params.b_dec / target_scale,
        activation="top_k" if threshold is None else "jump_relu",
        top_k=capacity.top_k,
        threshold=None if threshold is None else params.b_enc.new_full((n_latents,), threshold / target_scale),
        W_skip=None if params.W_skip is None else params.W_skip * (source_scale / target_scale),
    )


def save_transcoder(folder: Path, transcoder: Transcoder, about: dict[str, Any]) -> None:
    """Write `transcoder.safetensors` and `config.json`, each atomically; `about` joins the config."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
    tensors = {name: tensor for name in names if (tensor := getattr(transcoder, name)) is not None}
    write_atomic(folder / "transcoder.safetensors", save({k: v.cpu().contiguous() for k, v in tensors.items()}))
    d_in, dict_size = transcoder.W_enc.shape
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "activation": transcoder.activation,
            "top_k": transcoder.top_k,
            "d_in": d_in,
            "dict_size": dict_size,
            "d_out": transcoder.W_dec.shape[1],
            "skip": transcoder.W_skip is not None,
            **about,
        },
    )


def load_transcoder(folder: Path, device: str = "cpu") -> Transcoder:
    """Read what `save_transcoder` wrote, after checking header, names, shapes and dtypes.

    Raises:
        CheckpointError: missing, damaged, or not a transcoder of ours.
    """
    try:
        config = read_object(folder / "config.json", MAX_CONFIG_BYTES)
        if config.get("format") != FORMAT or config.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{folder} is not a transcoder of format {FORMAT} {FORMAT_VERSION}")
        activation, top_k = config["activation"], operator.index(config["top_k"])
        if activation not in ("top_k", "jump_relu") or top_k < 0:
            raise CheckpointError(f"{folder}: activation {activation} with top_k={top_k} is not understood")
        expected = _expected_shapes(config)
        with safe_open(folder / "transcoder.safetensors", "pt", device=device) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                raise CheckpointError(f"{folder}: tensors {found} do not fit its config.json, which tells {expected}")
            if dtypes := {file.get_slice(name).get_dtype() for name in expected} - {"F64", "F32", "F16", "BF16"}:
                raise CheckpointError(f"{folder}: its tensors hold {', '.join(sorted(dtypes))}, not real numbers")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read as a transcoder: {error}") from error
    optional = {name: tensors.get(name) for name in ("threshold", "W_skip")}
    return Transcoder(**tensors | optional, activation=activation, top_k=top_k)


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = Parameters.shapes(config["d_in"], config["dict_size"], config["d_out"], bool(config.get("skip")))
    return shapes | ({"threshold": (config["dict_size"],)} if config["activation"] == "jump_relu" else {})
