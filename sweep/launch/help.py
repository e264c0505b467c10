"""The text of `--help`: every option by group, with its meaning and its value, made from the config itself."""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sweep.checkout import CONF
from sweep.config import Cell
from sweep.options import ABSOLUTE, Relative, option_fields

__all__ = ["GROUPS", "help_text", "presets_of"]

GROUPS = ("model", "data", "capacity", "schedule", "revival", "experiment")
WIDTH = 110

HEAD = """Train, evaluate and compare sparse transcoders: a grid of cells for one language-model pass.

Usage: python sweep_runner.py [-m] [group=preset] [option=value] [option=value1,value2]

Several values make a grid; every combination is a cell. The same command again resumes what was interrupted and
skips what is done. Everything lands in results_dir; read it with `python -m analysis --help`.

Examples
  python sweep_runner.py -m model=tiny dict_size=64,128 top_k=4,8 steps=30 results_dir=out    seconds, no download
  python sweep_runner.py -m dict_size=4608,9216 top_k=32,64                                   Gemma 3 270M
  python sweep_runner.py -m lr=1e-3,3e-3,1e-2 seed=0,1,2 dry_run=true                         plan and cost only
  python sweep_runner.py -m capacity=base,wide schedule=base,improved model=gemma-2-2b data=fineweb-edu
  python sweep_runner.py -m data=file dataset_path=corpus.jsonl layer=9,12
"""

SECTIONS = {
    "Capacity": "",
    "Schedule": "",
    "Revival": "",
    "Model": "",
    "Site": "",
    "Data": "",
    "Relative": " (fit any width and length; an absolute key given beside one wins)",
    "Cell": "",
    "Workflow": " (how, not what: the same for all cells, part of no identity)",
}


def help_text(*, _root_: DictConfig | None = None) -> str:
    """Help for the composed config, so that the values shown are those of this command line."""
    return "\n".join([HEAD, *presets(), *options(_root_), exit_codes()])


def presets() -> Iterator[str]:
    yield "Presets"
    for group in GROUPS:
        yield f"  {group + '=':<14}{' | '.join(presets_of(group))}"


def presets_of(group: str) -> list[str]:
    """The presets of a group of options, by name."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def options(config: DictConfig | None) -> Iterator[str]:
    section = ""
    for kind, name, _, metadata in option_fields():
        if kind.__name__ != section:
            section = kind.__name__
            title = "Seed" if kind is Cell else "Relative values" if kind is Relative else section
            yield f"\n{title}{SECTIONS[section]}"
        doc = metadata["doc"]
        if name in ABSOLUTE:
            doc += f"; null: from {ABSOLUTE[name]}"
        first, *rest = wrap(doc, WIDTH - 40)
        yield f"  {f'{name}={value_of(config, name)}':<37} {first}"
        yield from (f"  {'':<37} {line}" for line in rest)


def value_of(config: DictConfig | None, name: str) -> str:
    value: Any = None if config is None else OmegaConf.select(config, name, throw_on_missing=False)
    if value is None:
        return "null"
    text = str(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value).replace(" ", "")
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= 34 - len(name) else text[:12] + "..."


def exit_codes() -> str:
    return (
        "\nExit codes: 0 every cell is done, 1 a cell failed or a baseline was not scored, 2 the command is wrong, "
        "130 interrupted."
    )
