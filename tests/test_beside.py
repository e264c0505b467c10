"""Baselines scored beside the cells, in folders of Google's layout whose right answers are known in closed form.

The sources and targets they are made from are read off Hugging Face's own modules, not through the code under test.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from gangs import make_workflow, run_cells
from gemma_scope import Arrays, random_arrays, reference_prediction, write_first, write_second
from known_answers import D, fvu, hugging_face, lookup
from make import make_cell, make_options

from sweep.baselines.wanted import rows_beside
from sweep.config import Cell
from sweep.errors import BaselineError, ConfigError
from sweep.launch.beside import shortcomings, with_baselines, with_done_cells
from sweep.launch.launch import launch
from sweep.launch.machine import LocalOptions
from sweep.launch.outcome import DONE, NOT_DONE
from sweep.launch.plan import Plan, make_plan
from sweep.locks import try_lock
from sweep.options import Workflow, cell_from_options
from sweep.paths import CacheFolder, ResultsFolder
from sweep.progress import silent
from sweep.results import TABLES
from sweep.status import read_status


def constant(value: np.ndarray) -> Arrays:
    """Predicts one vector; no latent fires."""
    arrays = random_arrays(D, 8, D)
    return arrays | {"W_enc": 0 * arrays["W_enc"], "b_enc": 0 * arrays["b_enc"], "b_dec": value.astype(np.float32)}


@pytest.fixture(scope="module")
def truth(tiny_folder: Path, cache: CacheFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Sources and targets of the held-out rows of the cell below."""
    from sweep.language_model import load_tokenizer
    from sweep.tokens import prepare_tokens

    cell = make_cell()
    tokens = prepare_tokens(cell.data, cell.model, load_tokenizer(tiny_folder), cache, silent)
    return hugging_face(tiny_folder, tokens.heldout)


@pytest.fixture(scope="module")
def families(truth: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("google")
    target, gain = truth["target"], np.median(truth["norm_out"] / truth["norm_unit"], 0)
    write_first(root, constant(0 * target[0]), l0=1, width="zero")
    write_first(root, constant(target.mean(0)), l0=1, width="mean")
    write_first(root, lookup(truth["norm_unit"], target, np.ones(D)), l0=1, width="mlp")
    write_first(root, random_arrays(D, D, D), l0=9, width="square")
    write_first(root, random_arrays(D, 80, D, seed=1), l0=25, width="16k")
    write_second(root, lookup(truth["norm_unit"], target, gain), l0=1, width="mlp")
    write_second(root, random_arrays(D, 80, D, seed=2, skip=True), l0=25)
    return root


@pytest.fixture(scope="module")
def rows(families: Path, cache: CacheFolder, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """The rows of `runs` after two sweeps over one cell each, baselines beside them, of every width."""
    root = tmp_path_factory.mktemp("beside")
    for i, width in enumerate(("zero", "mean", "mlp", "square", "16k")):
        workflow = make_workflow(
            root, cache, baselines="gemma_scope", baselines_dir=str(families), baselines_width=width
        )
        run_cells([make_cell(seed=i, steps=2)], workflow)
    return pl.read_parquet(sorted((root / "runs").glob("*.parquet")))


def row(rows: pl.DataFrame, name: str) -> dict[str, Any]:
    return rows.filter(pl.col("baseline") == name).row(0, named=True)


def test_zero_the_mean_and_the_mlp_score_as_they_must(rows: pl.DataFrame, truth: dict[str, np.ndarray]) -> None:
    target = truth["target"]
    zero, mean = (row(rows, f"layer_1/width_{width}/average_l0_1") for width in ("zero", "mean"))
    assert zero["fvu"] == pytest.approx(fvu(np.zeros_like(target), target), rel=1e-5)
    assert mean["fvu"] == pytest.approx(1, rel=1e-5)
    assert zero["l0"] == mean["l0"] == 0
    for name in ("layer_1/width_mlp/average_l0_1", "transcoder_all/layer_1_width_mlp_l0_small"):
        mlp = row(rows, name)
        assert mlp["fvu"] < 1e-6
        assert mlp["l0"] == 1
        assert mlp["cosine"] == pytest.approx(1)
        assert mlp["remarks"] is None


@pytest.mark.parametrize(
    ("name", "hook", "arrays"),
    [
        ("layer_1/width_square/average_l0_9", "norm_unit", random_arrays(D, D, D)),
        ("layer_1/width_16k/average_l0_25", "norm_unit", random_arrays(D, 80, D, seed=1)),
        ("transcoder_all/layer_1_width_16k_l0_small_affine", "norm_out", random_arrays(D, 80, D, seed=2, skip=True)),
    ],
)
def test_baselines_score_as_their_published_definition(
    rows: pl.DataFrame, truth: dict[str, np.ndarray], name: str, hook: str, arrays: Arrays
) -> None:
    latents, prediction = reference_prediction(arrays, truth[hook])
    found = row(rows, name)
    assert found["fvu"] == pytest.approx(fvu(prediction, truth["target"]), rel=1e-4)
    assert found["l0"] == pytest.approx((latents > 0).sum(1).mean(), rel=1e-3)
    assert (found["hook_in"], found["hook_out"], found["dict_size"]) == (hook, "mlp_out", arrays["b_enc"].shape[0])
    assert found["n_evaluated_tokens"] == len(truth["target"])


def test_cells_and_baselines_share_their_held_out_rows(rows: pl.DataFrame) -> None:
    assert rows["kind"].value_counts().rows_by_key("kind") == {"cell": [(5,)], "baseline": [(7,)]}
    assert rows["heldout_hash"].n_unique() == rows["model_hash"].n_unique() == 1


def test_a_baseline_is_scored_once_and_changes_no_number_of_the_cells(
    families: Path, cache: CacheFolder, tmp_path: Path
) -> None:
    alone = run_cells([make_cell()], make_workflow(tmp_path / "alone", cache))
    workflow = make_workflow(tmp_path / "both", cache, baselines="gemma_scope", baselines_dir=str(families))
    both = run_cells([make_cell()], workflow)
    cell_id = make_cell().cell_id
    for table in ("sequences", "latents", "curves"):
        assert alone.row(table, cell_id).read_bytes() == both.row(table, cell_id).read_bytes()
    before = baseline_files(both)
    assert len(before) == 2
    run_cells([make_cell(seed=1)], workflow)
    assert baseline_files(both) == before


def test_baselines_asked_for_afterwards_are_scored_alone(families: Path, cache: CacheFolder, tmp_path: Path) -> None:
    cell = make_cell(steps=2)
    google = {"baselines": "gemma_scope", "baselines_dir": str(families)}
    results = run_cells([cell], make_workflow(tmp_path / "one", cache))
    row, status = results.row("runs", cell.cell_id).read_bytes(), read_status(results.cell(cell.cell_id))
    asked = make_workflow(tmp_path / "one", cache, **google)
    assert actions(asked, cell) == ["baselines"]
    assert [len(part) for part in shortcomings(planned(asked, cell), results)] == [2, 0]
    run_cells([cell], asked)
    assert actions(asked, cell) == ["done"]
    assert shortcomings(planned(asked, cell), results) == ([], [])
    beside = run_cells([cell], make_workflow(tmp_path / "other", cache, **google))
    assert scores(results) == scores(beside)
    assert results.row("runs", cell.cell_id).read_bytes() == row
    after = read_status(results.cell(cell.cell_id))
    assert (after.state, after.step, after.fvu, after.failures) == ("done", 2, status.fvu, 0)


def test_baselines_are_scored_again_for_cross_entropies_on_more_rows(
    families: Path, cache: CacheFolder, tmp_path: Path
) -> None:
    cell = make_cell(steps=2)
    rows = []
    for n_rows in (0, 2, 1):
        asked = make_workflow(
            tmp_path, cache, baselines="gemma_scope", baselines_dir=str(families), n_causal_rows=n_rows
        )
        assert actions(asked, cell) == [{0: "new", 2: "baselines", 1: "done"}[n_rows]]
        rows.append(scores(run_cells([cell], asked)))
    assert [{row["n_causal_tokens"] for row in each.values()} for each in rows] == [{None}, {60}, {60}]
    assert all(row["fvu"] == rows[0][name]["fvu"] and row["kl"] > 0 for name, row in rows[1].items())
    assert set(rows[0]) == set(rows[1])


def test_a_sweep_names_the_baselines_that_were_not_scored(
    cache: CacheFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = random_arrays(D, 8, D)
    write_first(tmp_path / "google", arrays, l0=4)
    write_first(tmp_path / "google", arrays | {"W_enc": np.nan * arrays["W_enc"]}, l0=8)  # a header does not show it
    asked = make_workflow(
        tmp_path / "r", cache, baselines="gemma_scope", baselines_dir=str(tmp_path / "google"), checkpoint_steps=0
    )
    sweep = [([], make_options(steps=2) | vars(asked))]
    for _ in range(2):
        assert launch(sweep, LocalOptions(backend="inline")) == NOT_DONE
        said = capsys.readouterr().err.replace("\n", " ")
        assert "baselines not scored: layer_1/width_16k/average_l0_8; the logs" in said
    results = ResultsFolder(tmp_path / "r")
    assert [*scores(results)] == ["layer_1/width_16k/average_l0_4"]
    log = results.cell(cell_from_options(make_options(steps=2)).cell_id).log.read_text()
    assert log.count("average_l0_8/params.npz has weights that are not finite") == 2


def planned(workflow: Workflow, cell: Cell) -> Plan:
    results = ResultsFolder(Path(workflow.results_dir))
    return with_done_cells(make_plan(workflow, [((), cell)], results), results)


def actions(workflow: Workflow, cell: Cell) -> list[str]:
    return [each.action for each in planned(workflow, cell).cells]


def scores(results: ResultsFolder) -> dict[str, dict[str, Any]]:
    """The rows of baselines by name, without what differs between identical runs."""
    volatile = [column.name for column in TABLES["runs"] if column.volatile]
    frames = [pl.read_parquet(results.table("runs") / name).drop(volatile) for name in baseline_files(results)]
    return {frame["baseline"][0]: frame.row(0, named=True) for frame in frames}


def baseline_files(results: ResultsFolder) -> dict[str, tuple[int, int]]:
    """Baselines' files in `runs`, and when they were written."""
    files = results.table("runs").glob("*.parquet")
    found = [path for path in files if pl.read_parquet(path)["kind"][0] == "baseline"]
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def test_a_baseline_that_vanished_costs_no_cell_anything(cache: CacheFolder, tmp_path: Path) -> None:
    workflow = make_workflow(tmp_path, cache, baselines="gemma_scope", baselines_dir=str(tmp_path / "gone"))
    results = run_cells([make_cell(steps=2)], workflow)
    assert results.row("runs", make_cell(steps=2).cell_id).exists()
    assert "no baselines at layer 1" in results.cell(make_cell(steps=2).cell_id).log.read_text()


def test_a_baseline_that_another_job_is_scoring_is_left_to_it(cache: CacheFolder, tmp_path: Path) -> None:
    for l0 in (4, 8):
        write_first(tmp_path / "google", random_arrays(D, 8, D, seed=l0), l0=l0)
    asked = make_workflow(tmp_path / "r", cache, baselines="gemma_scope", baselines_dir=str(tmp_path / "google"))
    cell = make_cell(steps=2)
    results = run_cells([cell], make_workflow(tmp_path / "r", cache))
    (sparse, _), (_, dense) = rows_beside(cell, asked, results).items()
    held = try_lock(results.scoring(sparse))
    assert held is not None
    with held:
        run_cells([cell], asked)
    assert [*scores(results)] == [dense.entry.name]
    assert "another job is scoring it" in results.cell(cell.cell_id).log.read_text()
    run_cells([cell], asked)
    assert len(scores(results)) == 2
    assert not list(results.table("runs").glob(".*"))


def test_a_link_in_place_of_a_lock_leads_nowhere(cache: CacheFolder, tmp_path: Path) -> None:
    write_first(tmp_path / "google", random_arrays(D, 8, D), l0=4)
    asked = make_workflow(tmp_path / "r", cache, baselines="gemma_scope", baselines_dir=str(tmp_path / "google"))
    cell = make_cell(steps=2)
    results = run_cells([cell], make_workflow(tmp_path / "r", cache))
    (row_id,) = rows_beside(cell, asked, results)
    results.scoring(row_id).symlink_to(tmp_path / "elsewhere")
    run_cells([cell], asked)
    assert len(scores(results)) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_an_l0_far_from_its_authors_is_told_in_the_row_the_log_and_at_the_end(
    cache: CacheFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_first(tmp_path / "google", random_arrays(D, 80, D, seed=1), l0=400)
    workflow = make_workflow(tmp_path / "r", cache, baselines="gemma_scope", baselines_dir=str(tmp_path / "google"))
    options = make_options(steps=2)
    assert launch([([], options | vars(workflow))], LocalOptions(backend="inline")) == DONE
    results = ResultsFolder(tmp_path / "r")
    (name,) = baseline_files(results)
    said = " ".join(capsys.readouterr().err.split())
    log = results.cell(cell_from_options(options).cell_id).log.read_text()
    for words in (pl.read_parquet(results.table("runs") / name)["remarks"][0], log, said):
        assert "its authors' is 400" in words
    assert "warning: baseline layer_1/width_16k/average_l0_400: measured L0" in said


def resolve(tmp_path: Path, cache: CacheFolder, cells: Any = None, **workflow: Any) -> Any:
    asked = make_workflow(tmp_path / "results", cache, baselines="gemma_scope", **workflow)
    return with_baselines(asked, [make_cell()] if cells is None else cells, silent)


def test_launch_finds_the_folder_and_makes_it_absolute(
    families: Path, cache: CacheFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(families.parent)
    assert resolve(tmp_path, cache, baselines_dir=families.name).baselines_dir == str(families)


@pytest.mark.parametrize(
    ("workflow", "cell", "message"),
    [
        ({"baselines_l0": "113"}, {}, r"baselines_dir=.*L0 113 is not in .* it has L0 25"),
        ({"baselines_width": "1k"}, {}, r"width 1k is not in .* it has widths 16k"),
        ({}, {"layer": 2}, r"layer 2 is not in .* it has layer 1"),
        ({"baselines_dir": "/nowhere"}, {}, r"/nowhere is no folder"),
    ],
)
def test_launch_says_what_is_not_there(
    families: Path, cache: CacheFolder, tmp_path: Path, workflow: Any, cell: Any, message: str
) -> None:
    with pytest.raises(BaselineError, match=message):
        resolve(tmp_path, cache, [make_cell(**cell)], **{"baselines_dir": str(families)} | workflow)


def test_launch_refuses_weights_of_another_model_and_truncated_ones(cache: CacheFolder, tmp_path: Path) -> None:
    folder = write_first(tmp_path / "google", random_arrays(D + 1, 80, D))
    with pytest.raises(BaselineError, match="belongs to another model"):
        resolve(tmp_path, cache, baselines_dir=str(tmp_path / "google"))
    (folder / "params.npz").write_bytes((folder / "params.npz").read_bytes()[:3000])
    with pytest.raises(BaselineError, match="not whole"):
        resolve(tmp_path, cache, baselines_dir=str(tmp_path / "google"))
    assert not (tmp_path / "results").exists()


def test_launch_refuses_baselines_where_there_are_none(cache: CacheFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are none for model=tiny.*baselines_dir="):
        resolve(tmp_path, cache)
    with pytest.raises(ConfigError, match="predict mlp_out"):
        resolve(tmp_path, cache, [cell_from_options(make_options(hook_out="resid_mid"))])


def test_launch_says_at_once_that_the_hub_cannot_be_reached(
    cache: CacheFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cell = make_cell()
    cell = replace(cell, model=replace(cell.model, model="gemma-2-2b"), site=replace(cell.site, layer=17))
    with pytest.raises(BaselineError, match=r"hub cannot be reached .*nothing was downloaded before.*baselines_dir="):
        resolve(tmp_path, cache, [cell])
    with pytest.raises(BaselineError, match=r"L0 113 is not in .* it has L0 12, 20, 34, 112, 1246"):
        resolve(tmp_path, cache, [cell], baselines_l0="113")
