"""Files from anywhere, changed thousands of times: each is read, or refused by name; nothing hangs or grows.

2,000 cases each.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gemma_scope import random_arrays, write_first, write_second
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from make import make_cell, make_site, row_file, write_cell
from mutations import (
    attack,
    changed_header,
    changed_npz,
    changed_parquet,
    changed_text,
    changed_words,
    limits,
    told,
    tree,
)
from omegaconf import open_dict
from states import INPUTS, make_state

from analysis.report.decoder import neighbours
from analysis.report.sweeps import sweeps_of
from analysis.tables import load_table
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
from sweep.launch import launch
from sweep.launch.console import out
from sweep.launch.help import CONF
from sweep.launch.machine import LocalOptions
from sweep.launch.plan import look_up
from sweep.launch.register import register
from sweep.launch.rounds import freeze
from sweep.launch.slurm import Submission
from sweep.paths import CacheFolder, CellFolder, ResultsFolder, write_json
from sweep.progress import Snapshot
from sweep.results import polars_schema
from sweep.revisions import _directory_facts, model_facts, sha256_of_file
from sweep.saved import config_in, open_saved
from sweep.status import Status
from sweep.text import parquet_rows
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

    @property
    def tables(self) -> Path:
        """Two finished cells, aa and bb."""
        return self.root / "tables"

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
    for cell_id in ("aa", "bb"):
        write_cell(found.tables, cell_id)
    pq.write_table(pa.table({"text": ["one", "two"], "other": [1, 2]}), found.root / "text.parquet")
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


def readable_text(place: Place) -> Any:
    return list(parquet_rows(place.root / "text.parquet", "text"))


def table_left_out(table: str) -> Callable[[Place], None]:
    """What is loaded of a table with one changed file: the others whole, and that one, or its name."""

    def read(place: Place) -> None:
        loaded = load_table(place.tables, table)
        frame = loaded.frame.collect()
        assert frame.schema == polars_schema(table)
        found = set(frame["cell_id"].to_list())
        changed = row_file(place.tables, "bb", table)
        assert "aa" in found and found <= {"aa", "bb"}
        assert [left.path for left in loaded.left_out] in ([], [changed])
        assert ("bb" in found) != bool(loaded.left_out) or (table != "runs" and "bb" not in found)  # it has no rows

    return read


PARQUET: dict[str, Reader] = {
    **{
        table: (n, lambda p, table=table: row_file(p.tables, "bb", table), table_left_out(table), "")
        for table, n in {"runs": 200, "curves": 200, "latents": 200, "sequences": 200, "contexts": 200}.items()
    },
    "text": (1000, lambda p: p.root / "text.parquet", readable_text, ""),
}


@pytest.mark.parametrize("name", PARQUET)
def test_changed_parquet_is_read_or_left_out_by_name(name: str, place: Place) -> None:
    n, path, read, says = PARQUET[name]
    attack(n, path(place), changed_parquet, lambda: read(place), says)


NPZ: dict[str, Reader] = {
    "": (2000, lambda p: next(p.root.glob("first/*/*/*/params.npz")), lambda p: p.baseline("first"), "")
}


def test_changed_npz_is_read_or_refused_by_name(place: Place) -> None:
    n, path, read, says = NPZ[""]
    assert attack(n, path(place), changed_npz, lambda: read(place), says) > n / 2


WORDS = (
    "dict_size=64,96", "top_k=4", "lr=1e-3,3e-3", "layer=1", "hook_in=norm_out", "groups=[8,64]", "betas=[0.9,0.99]",
    "device=cpu", "steps=30", "seed=range(0,3)", "dataset_path=null", "decay=choice(linear,cosine)",
    "text_column='a b'", "retry=failed", "model_repo=a/b", "model_format=tiny", "baselines_l0=nearest:4",
    "model_path=null", "epochs=2.0", "dataset=docstrings",
    "results_dir=out", "cache_dir=out/cache", "n_tokens=2048", "group_fractions=[0.5,1]",
    "model_revision=1", "dataset_format=docstrings", "min_lr=null", "batch_size=64", "baselines_dir=null", "wait=true",
    "model=tiny", "model_dtype=float32", "seq_len=32", "baselines=none", "cache_gib=1", "hang_minutes=0", "odd=1",
)  # fmt: skip


class Composer:
    """Hydra's loader, which merges the groups once and not again for every cell: a hundred times as fast."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def load_sweep_config(self, _: Any, overrides: list[str]) -> Any:
        config = deepcopy(self.config)
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(overrides), config)
        return config


def test_changed_overrides_are_taken_or_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the command does, up to its plan, with all that Hydra and we check."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "machine_flops", lambda: 1e11)
    register()
    with initialize_config_dir(str(CONF), job_name="sweep_runner", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        config = hydra.compose_config("config", ["model=tiny", "results_dir=out"], RunMode.MULTIRUN)
        context = HydraContext(hydra.config_loader, Callbacks())
        sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=print)
    options = deepcopy(config)
    with open_dict(options):
        del options["hydra"]
    sweeper.launcher.hydra_context = HydraContext(Composer(options), Callbacks())
    before, codes = tree(tmp_path), []
    with told() as broken:
        for seed in range(2000):
            words = changed_words(Random(f"words {seed}"), WORDS)
            try:
                with limits():
                    code = planned(sweeper, words)
            except Exception as error:
                broken(error, f"{seed} {words}")
                continue
            said = capsys.readouterr()
            if not (said.out if code == 0 else said.err):
                broken(f"{code} without a word", f"{seed} {words}")
            codes.append(code)
    assert tree(tmp_path) == before
    assert 200 < codes.count(0) < 1000
    assert set(codes) == {0, 2}


def planned(sweeper: Any, words: list[str]) -> int:
    """The exit code of `python sweep_runner.py -m dry_run=true <words>`."""
    try:
        cells = [sweeper.launcher.compose(cell) for cell in sweeper.grid(words)[:2]]
    except HydraException as error:  # it ends the program, in its words
        print(error, file=sys.stderr)
        return 2
    for _, options in cells:
        if isinstance(options, dict):
            options["dry_run"] = True
    return launch.launch(cells, LocalOptions())


def test_two_thousand_cases_of_each() -> None:
    for readers in (SAFETENSORS, JSON, PARQUET, NPZ):
        assert sum(n for n, *_ in readers.values()) == 2000
