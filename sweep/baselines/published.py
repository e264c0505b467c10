"""Published numbers of other people's transcoders, each with its citation."""

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from sweep.config import HOOKS

__all__ = ["Published", "full_hook_name", "published", "published_for"]


@dataclass(frozen=True)
class Published:
    """One number somebody reported: a line of published.csv, whose columns are these fields."""

    baseline: str
    path: str
    model: str
    layer: int
    hook_in: str
    hook_out: str
    width: int
    l0: float
    metric: str
    value: float
    dataset: str
    n_tokens: str
    source: str
    comparable: bool
    note: str

    @property
    def hook_names(self) -> tuple[str, str]:
        """Full TransformerLens names of source and target; the file names them within their block."""
        return f"blocks.{self.layer}.{self.hook_in}", f"blocks.{self.layer}.{self.hook_out}"


@lru_cache(maxsize=1)
def published() -> tuple[Published, ...]:
    """Every published number, in the order of the file."""
    text = files("sweep.baselines").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(_parse(line) for line in csv.DictReader(text.splitlines(keepends=True), strict=True))


def _parse(line: dict[str, str]) -> Published:
    numbers = {"layer": int(line["layer"]), "width": int(line["width"])}
    reals = {"l0": float(line["l0"]), "value": float(line["value"])}
    comparable = {"yes": True, "no": False}[line["comparable"]]
    return Published(**{**line, **numbers, **reals, "comparable": comparable})  # type: ignore[arg-type]


def full_hook_name(hook: str, layer: int) -> str:
    """The TransformerLens name of a hook given by meaning; a full name stays what it is."""
    return HOOKS.get(hook, hook).replace("{layer}", str(layer))


def published_for(model: str, layer: int, hook_out: str) -> list[Published]:
    """Published FVUs defined as ours that predict the same target, best first; each transcoder reads its own source.

    Args:
        model: name of the language model.
        layer: its layer.
        hook_out: the target, by meaning (`mlp_out`) or by full TransformerLens name.
    """
    target = full_hook_name(hook_out, layer)
    found = [
        line
        for line in published()
        if line.metric == "fvu"
        and line.comparable
        and (line.model, line.layer, line.hook_names[1]) == (model, layer, target)
    ]
    return sorted(found, key=lambda line: line.value)
