"""Files from anywhere, changed thousands of times: each is read, or refused by name; nothing hangs or grows.

2,000 cases each.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gemma_scope import random_arrays, write_first, write_second
from make import make_cell, make_site
from mutations import attack, changed_header, changed_text
from test_checkpoint import INPUTS, make_state

from analysis.report.decoder import neighbours
from analysis.report.sweeps import sweeps_of
from sweep import checkpoint
from sweep.attempt import Attempt
from sweep.baselines.family import scan
from sweep.baselines.gemma_scope import load_baseline
from sweep.block_files import BlockFiles
from sweep.cache import entries
from sweep.config import as_json
from sweep.foreign import options_in
from sweep.language_model import Activations
from sweep.launch import folder as folder_command
from sweep.launch.console import out
from sweep.launch.plan import look_up
from sweep.launch.rounds import freeze
from sweep.launch.slurm import Submission
from sweep.paths import CacheFolder, CellFolder, ResultsFolder, write_json
from sweep.progress import Snapshot
from sweep.revisions import _directory_facts, model_facts, sha256_of_file
from sweep.saved import config_in, open_saved
from sweep.status import Status
from sweep.tokens import identity_of, open_tokens, prepare_tokens, tokens_folder
from sweep.transcoder import Transcoder, save_transcoder

CELL = make_cell()


@dataclass
class Place:
    """A results folder with everything in it, and models and baselines beside it; all small."""

    root: Path

    @property
    def results(self) -> ResultsFolder:
        return ResultsFolder(self.root / "results")

    @property
    def cell(self) -> CellFolder:
        return self.results.cell(CELL.cell_id)

    @property
    def cache(self) -> CacheFolder:
        return CacheFolder(self.root / "results" / "cache")

    @property
    def copy(self) -> Path:
        """A transcoder folder away from its cell."""
        return self.root / "transcoder"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def forged(self) -> None:
        """Give the checkpoint a manifest that fits, as whoever wants to do harm would."""
        folder = self.cell.checkpoint(20)
        sizes = {name: (folder / name).stat().st_size for name in checkpoint.FILES}
        hashes = {name: sha256_of_file(folder / name) for name in checkpoint.FILES}
        write_json(folder / "manifest.json", {"sizes": sizes, "sha256": hashes}, durable=False)

    def load_forged(self) -> Any:
        self.forged()
        return self.load_checkpoint()

    def load_checkpoint(self) -> Any:
        return checkpoint.load_latest(self.cell, CELL, INPUTS, "cpu")

    def baseline(self, family: str) -> Any:
        return [load_baseline(entry, 1, 32, 32) for entry in scan(self.root / family)]

    def facts(self) -> Any:
        _directory_facts.cache_clear()
        return model_facts({"model_path": str(self.model)})

    def tokens(self) -> None:
        entries(self.cache)
        with contextlib.suppress(OSError, ValueError):  # it is made again
            open_tokens(tokens_folder(CELL.data, CELL.model, self.cache), identity_of(CELL.data, CELL.model))

    def shown(self) -> None:
        """What a person is told of the cells."""
        with out.capture():
            folder_command.status(self.results)
        look_up(CELL, self.results, {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, language_model: Any) -> Place:
    found = Place(tmp_path_factory.mktemp("place"))
    results, cell = found.results, found.cell
    results.create()
    freeze(CELL, results)
    running = Snapshot("train", 3, 30, "steps", 2.0, 9.0)
    Status("running", 3, 30, attempts=1, fvu=0.5, l0=4.0, notes=("slow",), progress=running).changed().write(cell)
    Attempt.begin(cell, "12_3")
    checkpoint.save(make_state(20), cell, CELL, INPUTS)
    weights = {name: tensor.detach() for name, tensor in make_state(0).params.items()}
    transcoder = Transcoder(**weights, activation="jump_relu", top_k=4, threshold=torch.ones(64))
    save_transcoder(cell.transcoder, transcoder, {"cell_id": CELL.cell_id, "cell": json.loads(as_json(CELL))})
    shutil.copytree(cell.transcoder, found.copy)
    command = {"sweep_id": "a", "command": "x", "started_at": "2026", "cell_ids": [CELL.cell_id], "git_sha": "f"}
    write_json(results.sweep("a"), command)
    (found.root / "slurm").mkdir()
    write_json(found.root / "slurm" / "submission.json", {"jobs": [["a", "b"], ["c"]], "slurm_id": "12"})
    (found.root / "foreign").mkdir()
    told = {"model_name": "tiny", "hook_layer": 1, "k": 4, "activation": "topk", "lr": 3e-4, "d_sae": 64}
    write_json(found.root / "foreign" / "config.json", told)
    write_first(found.root / "first", random_arrays(32, 16, 32))
    write_second(found.root / "second", random_arrays(32, 16, 32, skip=True))
    shutil.copytree(tiny_folder, found.model)
    from sweep.language_model import load_tokenizer
    from sweep.progress import silent

    prepare_tokens(CELL.data, CELL.model, load_tokenizer(tiny_folder), found.cache, silent)
    activations = Activations(torch.ones(8, 32), torch.zeros(8, 32))
    BlockFiles(found.cache.activations("key"), CELL.stream, "cpu").save(("train", 0), make_site(), activations)
    return found


Reader = tuple[int, Callable[[Place], Path], Callable[[Place], Any], str]
"""Cases, the file that is changed, what reads it, and what a refusal says if not the file's name."""


def checkpoint_file(name: str) -> Callable[[Place], Path]:
    return lambda place: place.cell.checkpoint(20) / name


def foreign(place: Place) -> Any:
    return options_in(config_in(place.root / "foreign"), place.root / "foreign" / "config.json")


def blocks(place: Place) -> Any:
    files = BlockFiles(place.cache.activations("key"), CELL.stream, "cpu")
    return files.load(("train", 0), make_site(), 8)


WEIGHTS = "transcoder.safetensors"
STEP = "step_00000020"

SAFETENSORS: dict[str, Reader] = {
    "checkpoint": (100, checkpoint_file("state.safetensors"), Place.load_checkpoint, STEP),
    "forged checkpoint": (500, checkpoint_file("state.safetensors"), Place.load_forged, STEP),
    "transcoder": (400, lambda p: p.cell.transcoder / WEIGHTS, lambda p: open_saved(p.cell.root).load("cpu"), "transc"),
    "decoder": (200, lambda p: p.cell.transcoder / WEIGHTS, lambda p: neighbours(p.cell.transcoder, [0, 5]), ""),
    "baseline": (400, lambda p: next(p.root.glob("second/*/*/params.safetensors")), lambda p: p.baseline("second"), ""),
    "model": (200, lambda p: p.model / "model.safetensors", Place.facts, "model_path="),
    "activations": (200, lambda p: next(p.cache.root.glob("activations/key/*/train_000000.safetensors")), blocks, ""),
}

JSON: dict[str, Reader] = {
    "cell": (300, lambda p: p.cell.config, lambda p: open_saved(p.cell.root), ""),
    "cell shown": (150, lambda p: p.cell.config, Place.shown, ""),
    "cell told beside it": (100, lambda p: p.copy / "config.json", lambda p: open_saved(p.copy), "transcoder"),
    "transcoder": (
        200,
        lambda p: p.cell.transcoder / "config.json",
        lambda p: open_saved(p.cell.root).load("cpu"),
        "transcoder",
    ),
    "status": (250, lambda p: p.cell.status, Place.shown, ""),
    "attempt": (50, lambda p: p.cell.attempt, lambda p: Attempt(p.cell, "t").check(), "started again"),
    "manifest": (100, checkpoint_file("manifest.json"), Place.load_checkpoint, STEP),
    "forged state": (200, checkpoint_file("state.json"), Place.load_forged, STEP),
    "sweep": (100, lambda p: p.results.sweep("a"), lambda p: sweeps_of(p.results.root), ""),
    "submission": (100, lambda p: p.root / "slurm/submission.json", lambda p: Submission.read(p.root / "slurm"), ""),
    "tokens": (100, lambda p: next(p.cache.root.glob("tokens/*/manifest.json")), Place.tokens, ""),
    "activations": (
        100,
        lambda p: next(p.cache.root.glob("activations/*/*/about.json")),
        lambda p: entries(p.cache),
        "",
    ),
    "foreign": (100, lambda p: p.root / "foreign" / "config.json", foreign, ""),
    "baseline": (100, lambda p: next(p.root.glob("second/*/*/config.json")), lambda p: p.baseline("second"), ""),
    "model": (50, lambda p: p.model / "config.json", Place.facts, "model_path="),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_changed_safetensors_are_read_or_refused_by_name(name: str, place: Place) -> None:
    n, path, read, says = SAFETENSORS[name]
    attack(n, path(place), changed_header, lambda: read(place), says)


@pytest.mark.parametrize("name", JSON)
def test_changed_json_is_read_or_refused_by_name(name: str, place: Place) -> None:
    n, path, read, says = JSON[name]
    attack(n, path(place), changed_text, lambda: read(place), says)


@pytest.mark.parametrize("readers", [SAFETENSORS, JSON])
def test_two_thousand_cases_of_each(readers: dict[str, Reader]) -> None:
    assert sum(n for n, *_ in readers.values()) == 2000
