"""What a user types: flat options, and how they become a cell and a workflow.

Names are flat (`dict_size=`, `lr=`, ...), their values live in `conf/`. `cell_from_options` resolves what is
relative (`warmup_fraction` of the steps, `group_fractions` of the width), looks up revisions and checks everything
once.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from itertools import chain
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sweep.config import HOOKS, SLICES, Cell, at_least, frozen, is_of, not_text, option
from sweep.errors import ConfigError
from sweep.revisions import data_facts, model_facts

__all__ = [
    "ABSOLUTE",
    "Relative",
    "Workflow",
    "cell_from_options",
    "device_problems",
    "must_be",
    "not_an_option",
    "option_fields",
    "options_schema",
    "workflow_from_options",
]

ABSOLUTE = {
    "groups": "group_fractions",
    "warmup_steps": "warmup_fraction",
    "min_lr": "min_lr_fraction",
    "steps": "epochs",
}
"""Absolute keys and the relative ones they win over when both are given."""

L0_CHOICE = r"all|lowest|nearest:\d+(\.\d+)?|\d+"

LOOKED_UP = ("model_revision", "n_layers", "d_in", "d_out", "n_body_params", "dataset_revision")
"""Keys that may be left null because they can be read off a folder, a file or the installed packages."""


@dataclass(frozen=True)
class Relative:
    """Values that fit any length and width; the cell resolves them, and the absolute key wins where given."""

    group_fractions: tuple[float, ...] = option("groups as fractions of dict_size")
    warmup_fraction: float = option("warmup_steps as a fraction of steps")
    min_lr_fraction: float = option("min_lr as a fraction of lr")
    epochs: float = option("passes over the n_tokens of the stream")

    def problems(self) -> Iterator[str]:
        for key in ("warmup_fraction", "min_lr_fraction"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                yield f"{key}={value} must be between 0 and 1"
        if not 0 < self.epochs < math.inf:
            yield f"epochs={self.epochs} must be a positive number"
        if not self.group_fractions or not all(0 < fraction <= 1 for fraction in self.group_fractions):
            yield f"group_fractions={list(self.group_fractions)} must lie between 0 and 1, such as [0.25,0.5,1]"


@dataclass(frozen=True)
class Workflow:
    """How the sweep is run, not what it computes: outside every identity, the same for all cells."""

    results_dir: str = option("folder of rows, curves and cells")
    cache_dir: str = option("folder of models, tokens and activations; each can be rebuilt")
    cache_gib: float = option("largest activation cache; a stream that needs more is harvested anew each epoch")
    dry_run: bool = option("print the plan and its cost, and stop")
    checkpoint_steps: int = option("steps between checkpoints; 0 saves by minutes alone")
    checkpoint_minutes: float = option(
        "minutes between checkpoints, more where saving would take over a hundredth of the time; 0 saves by steps alone"
    )
    keep_checkpoints: bool = option("keep the checkpoints of finished cells")
    n_contexts: int = option("contexts kept of each latent: the held-out tokens that excite it most; 0 keeps none")
    n_causal_rows: int = option(
        "held-out rows on which the language model's cross-entropy is taken with predictions in it; 0 takes none"
    )
    device: str = option("auto, cpu, cuda or cuda:<n>")
    baselines: Literal["none", "gemma_scope"] = option(
        "gemma_scope: also score Google's transcoders of each layer, in the same pass over the held-out rows"
    )
    baselines_dir: str | None = option("a local folder in Google's layout; null takes them from the hub")
    baselines_l0: str = option("which of them: all, lowest, nearest:<number>, or an L0 that is there")
    baselines_width: str = option("their width, as in their folders' names")
    baselines_revision: str | None = option("commit on the hub; null takes the newest")
    hang_minutes: float = option("minutes without a sign of life after which a job is ended; 0 waits for ever")
    retry: Literal["all", "failed", "none"] = option(
        "cells that failed before: all runs them with the others, failed runs them only, none leaves them"
    )
    wait: bool = option("watch until the jobs are over; false submits and returns (hydra/launcher=slurm)")

    @property
    def saves(self) -> bool:
        """Whether cells save while they train."""
        return self.checkpoint_steps > 0 or self.checkpoint_minutes > 0

    def problems(self) -> Iterator[str]:
        yield from at_least(
            0,
            n_contexts=self.n_contexts,
            n_causal_rows=self.n_causal_rows,
            checkpoint_steps=self.checkpoint_steps,
            checkpoint_minutes=self.checkpoint_minutes,
            cache_gib=self.cache_gib,
            hang_minutes=self.hang_minutes,
        )
        yield from device_problems(self.device)
        if not re.fullmatch(L0_CHOICE, self.baselines_l0):
            yield f"baselines_l0={self.baselines_l0} is no L0; choose all, lowest, nearest:<number> or a number"
        for key in ("results_dir", "cache_dir", "baselines_dir", "baselines_width"):
            yield from not_text(key, getattr(self, key) or "")
        if self.baselines == "none" and self.baselines_dir is not None:
            yield f"baselines_dir={self.baselines_dir} has nobody to read it; add baselines=gemma_scope"
        if self.baselines_revision is not None and not re.fullmatch(r"[\w.-]{1,100}", self.baselines_revision):
            yield f"baselines_revision={self.baselines_revision} is no commit"
        for key in ("results_dir", "cache_dir"):
            if not getattr(self, key):
                yield f"{key} is empty; name a folder"


def device_problems(device: str) -> Iterator[str]:
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not re.fullmatch("[0-9]{1,4}", index))):
        yield f"device={device} is not a device; choose auto, cpu, cuda or cuda:<n>"


def cell_from_options(options: Mapping[str, Any]) -> Cell:
    """Resolve and check flat options; absolute keys win over relative ones.

    Raises:
        ConfigError: with every problem of this cell, not only the first.
    """
    if problems := tuple(not_of_their_type(options, (*SLICES.values(), Relative, Cell))):
        raise ConfigError(*problems)
    relative = Relative(**{f.name: frozen(options[f.name]) for f in fields(Relative)})
    if problems := tuple(relative.problems()):
        raise ConfigError(*problems)
    if problems := tuple(chain(*(not_text(key, options[key] or "") for key in ("model_path", "dataset_path")))):
        raise ConfigError(*problems)
    values = dict(options) | model_facts(options) | data_facts(options)
    values["hook_in"] = canonical_hook(values["hook_in"], values["layer"])
    values["hook_out"] = canonical_hook(values["hook_out"], values["layer"])
    absolute(values, relative)
    slices = {name: kind(**{f.name: frozen(values[f.name]) for f in fields(kind)}) for name, kind in SLICES.items()}
    cell = Cell(**slices, seed=values["seed"])
    if problems := tuple(cell.problems()):
        raise ConfigError(*problems)
    return cell


def workflow_from_options(options: Mapping[str, Any]) -> Workflow:
    """The workflow slice of flat options.

    Raises:
        ConfigError: a value is out of range.
    """
    if problems := tuple(not_of_their_type(options, (Workflow,))):
        raise ConfigError(*problems)
    workflow = Workflow(**{f.name: options[f.name] for f in fields(Workflow)})
    if problems := tuple(workflow.problems()):
        raise ConfigError(*problems)
    return workflow


def absolute(values: dict[str, Any], relative: Relative) -> None:
    """Fill in place each absolute key that was left null from its relative one."""
    width, batch_size = values["dict_size"], max(values["batch_size"], 1)
    if values["groups"] is None:
        ends = (max(round(fraction * width), 1) for fraction in relative.group_fractions)
        values["groups"] = tuple(dict.fromkeys(ends))  # a very narrow dictionary has fewer prefixes
    if values["steps"] is None:
        values["steps"] = int(values["n_tokens"] * relative.epochs) // batch_size
    if values["warmup_steps"] is None:
        values["warmup_steps"] = round(relative.warmup_fraction * max(values["steps"] - 1, 0))
    if values["decay"] == "constant":
        values["min_lr"] = values["lr"]
    elif values["min_lr"] is None:
        values["min_lr"] = relative.min_lr_fraction * values["lr"]


def not_of_their_type(options: Mapping[str, Any], kinds: Collection[type]) -> Iterator[str]:
    """What Hydra lets through: choices, which are strings to it, values behind an interpolation, options taken away."""
    for kind, name, hint, _ in option_fields():
        if kind not in kinds:
            continue
        if name not in options:
            yield f"{name} is missing; leave ~{name} out"
            continue
        value = options[name]
        if value is None and (name in ABSOLUTE or name in LOOKED_UP):
            continue
        if get_origin(hint) is Literal and not is_of(value, hint):
            yield f"{name}={value} is not a choice; choose one of {', '.join(get_args(hint))}"
        elif not is_of(frozen(value), hint):
            yield must_be(name, value, hint)
        elif isinstance(value, int) and abs(value) >= 2**63:
            yield f"{name}={value} is too large; the largest number is {2**63 - 1}"


def must_be(name: str, value: Any, hint: Any) -> str:
    """What to say about a value that does not have the type of its option."""
    return f"{name}={'null' if value is None else value} must be {_in_words(hint)}"


def _in_words(hint: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    lists = {int: "whole numbers, such as [1,2]", float: "numbers, such as [0.1,0.2]", str: "texts, such as [a,b]"}
    if isinstance(hint, UnionType):
        return " or ".join("null" if each is NoneType else _in_words(each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) in (list, tuple):
        return f"a list of {lists[get_args(hint)[0]]}"
    return kinds.get(hint, "as --help tells")


def not_an_option(name: str, value: Any, known: Collection[str]) -> str:
    """What to say about a name that there is not; the nearest one is told."""
    spelled = (name, name.replace(".", "_"))
    near = [close for each in spelled for close in difflib.get_close_matches(each, known, n=1, cutoff=0.75)]
    return f"{name}={value} is not an option; {f'did you mean {near[0]}? See' if near else 'see'} --help"


def canonical_hook(hook: str, layer: int) -> str:
    """The meaning of a full name where it has one, so that both spellings are one cell."""
    return next((meaning for meaning, name in HOOKS.items() if name.format(layer=layer) == hook), hook)


def option_fields() -> Iterator[tuple[type, str, Any, Mapping[str, Any]]]:
    """Every option as (slice, name, type, metadata), in the order of the slices."""
    for kind in (*SLICES.values(), Relative, Workflow):
        hints = get_type_hints(kind)
        for f in fields(kind):
            yield kind, f.name, hints[f.name], f.metadata
    yield Cell, "seed", int, next(f for f in fields(Cell) if f.name == "seed").metadata


def options_schema() -> type:
    """The flat dataclass Hydra checks names and types against, made from the slices."""
    members: list[Any] = []
    for _, name, hint, _ in option_fields():
        kind = _hydra_type(hint)
        optional = name in ABSOLUTE or name in LOOKED_UP
        members.append((name, kind | None if optional else kind, field()))
    return make_dataclass("Options", members)


def _hydra_type(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    return hint
