"""Everything a sweep fetches, made ahead: what `python -m sweep prepare` does.

Compute nodes often have no network. Models and token files lie in `cache_dir`, and hub models in the hub's own cache;
where both are on a disk that the nodes share, a sweep finds all of it there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sweep.cached import model_is_there
from sweep.config import Cell, Data, Model
from sweep.errors import ModelError
from sweep.language_model import ensure_model_folder, load_tokenizer
from sweep.paths import CacheFolder
from sweep.progress import Report
from sweep.revisions import layers_in
from sweep.tokens import prepare_tokens, tokens_folder

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """One thing a sweep needs, and whether it was there before."""

    kind: Literal["model", "tokens"]
    what: str
    folder: Path
    n_bytes: int
    was_there: bool


def prepare(cells: Iterable[Cell], cache: CacheFolder, report: Report) -> list[Prepared]:
    """Fetch and convert every model of the cells, and tokenise every text.

    Raises:
        SweepError: what a sweep would end with: no network, no licence, a package that is missing, text too short.
    """
    cells = list(cells)
    done = []
    for model in dict.fromkeys(cell.model for cell in cells):
        was_there = model_is_there(model, cache)
        folder = ensure_model_folder(model, cache, report)
        if (found := layers_in(folder)) != model.n_layers:
            raise ModelError(f"n_layers={model.n_layers}: model={model.model} has {found} layers")
        done.append(Prepared("model", model.model, folder, size_of(folder), was_there))
        tokenizer = load_tokenizer(folder)
        for data in dict.fromkeys(cell.data for cell in cells if cell.model == model):
            place = tokens_folder(data, model, cache)
            if any(place == each.folder for each in done):  # cells may differ in what no row depends on
                continue
            was_there = place.is_dir()
            prepare_tokens(data, model, tokenizer, cache, report)
            done.append(Prepared("tokens", words(data, model), place, size_of(place), was_there))
    return done


def words(data: Data, model: Model) -> str:
    return f"{data.dataset} for {model.model}: {data.n_tokens:,} training tokens in rows of {data.seq_len}"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
