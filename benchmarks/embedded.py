"""Activations for benchmarks: the framework's own stream, from the options a user would type."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sweep.activations import ActivationStream
from sweep.blocks import HarvestedBlocks, from_model, with_cache
from sweep.config import Cell
from sweep.language_model import ensure_model_folder, load_tokenizer
from sweep.launch.compose import cells_of
from sweep.paths import CacheFolder
from sweep.progress import Report, silent
from sweep.revisions import weights_hash
from sweep.tokens import prepare_tokens

__all__ = ["Prepared", "cell_of", "prepare"]

COMPOSING = threading.Lock()
"""Hydra's state is one for the whole process."""


def cell_of(overrides: Sequence[str]) -> Cell:
    """The cell that `python sweep_runner.py OVERRIDES` would train."""
    return composed(tuple(overrides))


@cache
def composed(overrides: tuple[str, ...]) -> Cell:
    with COMPOSING:
        _, (cell,) = cells_of(overrides)
    return cell


@dataclass(frozen=True)
class Prepared:
    """A stream, and the blocks behind it, which load the language model when it is asked for."""

    stream: ActivationStream
    harvested: HarvestedBlocks


def prepare(cells: Sequence[Cell], cache: Path, *, cached: bool = True, report: Report = silent) -> Prepared:
    """One stream for the sites of all cells, which share model and data; on the CPU."""
    config, sites = cells[0].stream, list(dict.fromkeys(cell.site for cell in cells))
    folder = ensure_model_folder(config.model, CacheFolder(cache), report)
    tokens = prepare_tokens(config.data, config.model, load_tokenizer(folder), CacheFolder(cache), report)
    harvested = from_model(config, folder, tokens, "cpu", report)
    gib = 64.0 if cached else 0.0
    blocks = with_cache(harvested, config, sites, weights_hash(folder), "cpu", CacheFolder(cache), gib)
    return Prepared(ActivationStream(config, blocks, sites), harvested)
