"""Files and names made to do harm: nothing outside the results folder is touched."""

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from commands import sweep as run
from foreign_files import Evil, weights, write
from gangs import make_workflow, run_cells
from make import make_cell, make_options, row_file, write_cell
from mutations import tree

from analysis.tables import load_table
from sweep.config import as_json
from sweep.errors import ModelError
from sweep.language_model import load_language_model, load_tokenizer
from sweep.launch.launch import launch
from sweep.launch.machine import LocalOptions
from sweep.paths import CacheFolder, ResultsFolder

CELL = make_cell(steps=2)
NAMES = ("../up", "../../../../up", "/up", "up\0", "\x1b[2J", "x" * 300, "up/../../../up", ".", "..", "a'; touch up")
"""Names that lead elsewhere, or that no file system takes."""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with something to lose, beside the results."""
    folder = tmp_path / "outside"
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000001" / "thesis.txt").write_text("mine")
    (folder / "profile").write_text("mine\n")
    return folder


@contextlib.contextmanager
def untouched(root: Path, *but: str) -> Iterator[None]:
    """Nothing below a folder changes, but for what is in some folders there."""

    def seen() -> dict[str, Any]:
        return {name: facts for name, facts in tree(root).items() if name.split("/")[0] not in but}

    before = seen()
    yield
    assert seen() == before


class EvilLater(Evil):
    """Does the same when it is called, or put into a list."""

    def __reduce__(self) -> Any:
        return (exec, (f"import os; os.mkdir({str(self.path)!r})",))


def zipped(path: Path, evil: Any) -> None:
    torch.save({**weights(), "extra": evil}, path)


def named(path: Path, evil: Any) -> None:
    torch.save({evil: torch.ones(1), **weights()}, path)


def old(path: Path, evil: Any) -> None:
    torch.save({**weights(), "extra": [evil]}, path, _use_new_zipfile_serialization=False)


def bare(path: Path, evil: Any) -> None:
    path.write_bytes(pickle.dumps(evil))


def harmful(path: Path) -> None:
    """Read a file as a careless program would."""
    with contextlib.suppress(RuntimeError):  # what it reads first was no torch file after all
        torch.load(path, weights_only=False)


@pytest.mark.parametrize("made", [zipped, named, old, bare])
@pytest.mark.parametrize("evil", [Evil, EvilLater])
def test_pickles_given_to_evaluate_do_nothing(made: Any, evil: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "old", weights())
    made(folder / "transcoder.pt", evil(tmp_path / "harm"))
    with untouched(tmp_path):
        refused = run("evaluate", "--checkpoint", folder, "--layer", 1, "--output_dir", tmp_path / "out")
    assert refused.exit_code == 2
    assert "transcoder.pt" in refused.stderr
    harmful(folder / "transcoder.pt")
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_place_of_a_checkpoint_does_nothing(name: str, tmp_path: Path, cache: CacheFolder) -> None:
    workflow = make_workflow(tmp_path / "results", cache, checkpoint_steps=1)
    results = run_cells([CELL], workflow)
    row_file(results.root, CELL.cell_id).unlink()
    for step in results.cell(CELL.cell_id).checkpoint_steps():
        bare(results.cell(CELL.cell_id).checkpoint(step) / name, Evil(tmp_path / "harm"))
    with untouched(tmp_path, "results"):
        run_cells([CELL], workflow)


def index(folder: Path, shard: str) -> None:
    """A model whose index sends its reader to another file."""
    header = json.loads((folder / "model.safetensors").read_bytes()[8:][: header_size(folder)])
    names = [name for name in header if name != "__metadata__"]
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    shards = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))


def header_size(folder: Path) -> int:
    return int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


@pytest.mark.parametrize("shard", ["../evil.bin", "{root}/evil.bin", "pytorch_model.bin", "a\0b", "x" * 300])
def test_an_index_that_leads_to_a_pickle_runs_nothing(shard: str, tiny_folder: Path, tiny: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    index(folder, shard.format(root=tmp_path))
    for place in (tmp_path / "evil.bin", folder / "pytorch_model.bin"):
        bare(place, Evil(tmp_path / "harm"))
    with untouched(tmp_path), pytest.raises(ModelError):
        load_language_model(tiny, folder, "cpu")


def test_code_beside_a_model_is_not_run(tiny_folder: Path, tiny: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil") | {
            "AutoTokenizer": ["evil.Evil"] * 2
        }
        (folder / name).write_text(json.dumps(config | {"auto_map": classes, "model_type": config.get("model_type")}))
    with untouched(tmp_path):
        load_language_model(tiny, folder, "cpu")
        load_tokenizer(folder)


def options(results: Path, **changed: Any) -> list[Any]:
    """What Hydra hands over for a sweep of one cell."""
    workflow = vars(make_workflow(results, CacheFolder(results / "cache")))
    return [([], make_options(steps=2) | workflow | changed)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "key", ["model", "model_revision", "model_repo", "dataset", "text_column", "baselines_revision"]
)
def test_names_that_lead_elsewhere_are_refused_or_stay_inside(
    key: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {key: name} | ({"dataset_format": "hub", "dataset_revision": "0" * 40} if key == "dataset" else {})
    changed |= {"model_format": "hub", "model_revision": "0" * 40} if key == "model_repo" else {}
    with untouched(tmp_path, "results"):
        code = launch(options(tmp_path / "results", **changed, dry_run=True), LocalOptions(backend="inline"))
    assert code == 0 or capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["x" * 300, "up\0", "x/" * 3000])
@pytest.mark.parametrize("key", ["results_dir", "cache_dir", "baselines_dir", "model_path", "dataset_path"])
def test_folders_that_no_file_system_takes_are_refused(
    key: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {key: str(tmp_path / name)} | ({"baselines": "gemma_scope"} if key == "baselines_dir" else {})
    with untouched(tmp_path, "results"):
        assert launch(options(tmp_path / "results", **changed), LocalOptions(backend="inline")) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300, "up\0", "x/" * 3000])
def test_an_output_folder_that_no_file_system_takes_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    results = ResultsFolder(tmp_path / "results")
    results.create()
    folder = write(tmp_path / "old", weights(), {"activation": "topk"})
    with untouched(tmp_path):
        refused = run("evaluate", "--checkpoint", folder, "--layer", 1, "--output_dir", tmp_path / name, "model=tiny",
                      "top_k=4", "seq_len=32")  # fmt: skip
    assert refused.exit_code == 2
    assert "--output" in refused.stderr


@pytest.mark.parametrize("key", ["model", "model_revision"])
@pytest.mark.parametrize("name", NAMES)
def test_a_config_with_names_that_lead_elsewhere_is_refused(key: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "cells" / CELL.cell_id
    folder.mkdir(parents=True)
    config = json.loads(as_json(CELL))
    config["model"][key] = name
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "transcoder").mkdir()
    (folder / "transcoder" / "config.json").write_text(json.dumps({"format": "sparse-transcoder", "cell_id": "x"}))
    with untouched(tmp_path):
        refused = run("evaluate", "--checkpoint", folder)
    assert refused.exit_code == 2
    assert "config.json" in refused.stderr


LINKS = (
    "cells", "runs", "curves", "sweeps", "slurm", "cells/{id}", "cells/{id}/checkpoints",
    "cells/{id}/checkpoints/step_00000001", "cells/{id}/transcoder", "cells/{id}/log.txt", "cells/{id}/.lock",
)  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_links_out_of_the_results_folder_are_refused(
    link: str, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ResultsFolder(tmp_path / "results")
    results.create()
    place = results.root / link.format(id=CELL.cell_id)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside / "profile" if place.suffix or place.name == ".lock" else outside)
    with untouched(tmp_path):
        assert launch(options(results.root), LocalOptions(backend="inline")) == 2
    assert f"{place} is a link out of the results folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["config.json", "status.json", ".attempt", "metrics.json", "summary.txt"])
def test_files_that_are_links_are_replaced_and_not_followed(
    name: str, outside: Path, tmp_path: Path, cache: CacheFolder
) -> None:
    results = ResultsFolder(tmp_path / "results")
    results.create()
    folder = results.cell(CELL.cell_id)
    folder.root.mkdir()
    (folder.root / name).symlink_to(outside / "profile")
    with untouched(tmp_path, "results"):
        run_cells([CELL], make_workflow(results.root, cache))
    assert not (folder.root / name).is_symlink()
    assert row_file(results.root, CELL.cell_id).exists()


@pytest.mark.parametrize("cell_id", ["../up", "/up", "..", "x" * 250])
def test_a_row_of_a_cell_that_leads_elsewhere_is_left_out(cell_id: str, tmp_path: Path) -> None:
    write_cell(tmp_path, "aa")
    write_cell(tmp_path / "other", "bb", config="{}")
    frame = pl.read_parquet(io.BytesIO(row_file(tmp_path / "other", "bb").read_bytes()))
    frame.with_columns(cell_id=pl.lit(cell_id)).write_parquet(row_file(tmp_path, "bb"))
    loaded = load_table(tmp_path, "runs")
    assert loaded.frame.collect()["cell_id"].to_list() == ["aa"]
    assert loaded.left_out[0].path == row_file(tmp_path, "bb")
