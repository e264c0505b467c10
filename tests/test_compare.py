"""`python -m sweep compare`: ours and Google's on the same rows, a verdict at equal L0 only, and every refusal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from commands import sweep as run
from foreign_files import OVERRIDES, weights, write
from gangs import make_workflow, run_cells
from gemma_scope import random_arrays, write_first, write_second
from make import make_cell

from sweep.paths import CacheFolder, ResultsFolder

CELL = make_cell()


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family: of latents that always fire, the denser ones predict less of what they should not."""
    root = tmp_path_factory.mktemp("google")
    for l0, size in ((2, 6.0), (16, 1.0)):
        arrays = random_arrays(32, 16, 32, seed=l0)
        arrays |= {"W_enc": 0 * arrays["W_enc"], "b_enc": np.float32(np.arange(16) < l0), "b_dec": 0 * arrays["b_dec"]}
        write_first(root, arrays | {"threshold": 0 * arrays["threshold"], "W_dec": size * arrays["W_dec"]}, l0=l0)
    return root


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder, google: Path) -> ResultsFolder:
    """A cell, with the family beside it as rows of its sweep."""
    root = tmp_path_factory.mktemp("results")
    workflow = make_workflow(root, cache, baselines="gemma_scope", baselines_dir=str(google))
    return run_cells([CELL], workflow)


def compare(results: ResultsFolder, cache: CacheFolder, google: Path, *words: object) -> Any:
    cell = results.cell(CELL.cell_id).root
    start = ("compare", "--ours_checkpoint", cell, "--google_dir", google, "--cache_dir", cache.root, "--device", "cpu")
    return run(*start, *words)


def test_both_sides_have_the_numbers_of_the_sweep(
    results: ResultsFolder, cache: CacheFolder, google: Path, tmp_path: Path
) -> None:
    done = compare(results, cache, google, "--layer", 1, "--output_dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    read = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in (
        "comparison", "ours_metrics", "google_metrics")}  # fmt: skip
    rows = pl.read_parquet(sorted(results.table("runs").glob("*.parquet")))
    names = ("fvu", "l0", "cosine", "dead_fraction", "absorption_score", "frac_latents_with_twin")
    for row in rows.iter_rows(named=True):
        found = read["google_metrics"][row["baseline"]] if row["baseline"] else read["ours_metrics"]
        assert {name: found[name] for name in names} == {name: row[name] for name in names}
    assert len(read["google_metrics"]) == 2
    dense = read["google_metrics"]["layer_1/width_16k/average_l0_16"]
    assert (dense["l0"], dense["hook_in"], dense["remarks"]) == (16, "norm_unit", [])
    found = read["comparison"]
    assert found["frontier"] == ["layer_1/width_16k/average_l0_2", "layer_1/width_16k/average_l0_16"]
    assert found["verdict"] == "better"
    assert found["fvu_at_equal_l0"]["high"] < 1
    assert "verdict: better at equal L0" in done.stdout
    assert found["summary"] in done.stdout
    assert found["budget"]["ours"] == {
        "training_tokens": 1920, "width": 64, "hook_in": "norm_out", "linear_map": "no", "weights": "tiny",
    }  # fmt: skip
    assert found["budget"]["layer_1/width_16k/average_l0_2"] == {
        "training_tokens": "4 billion", "width": 16, "hook_in": "norm_unit", "linear_map": "no",
        "weights": "google/gemma-2-2b (other weights)",
    }  # fmt: skip


def test_one_folder_gives_no_winner_across_l0(results: ResultsFolder, cache: CacheFolder, google: Path) -> None:
    dense = compare(results, cache, google / "layer_1" / "width_16k" / "average_l0_16")
    assert "verdict: ours is sparser and its FVU lower: it dominates" in dense.stdout
    sparse = compare(results, cache, google, "--l0", 2)
    assert "verdict: not comparable at these L0s" in sparse.stdout
    assert "Google's at 2" in sparse.stdout


def test_gemma_scope_2_has_its_own_hook(results: ResultsFolder, cache: CacheFolder, tmp_path: Path) -> None:
    write_second(tmp_path / "google", random_arrays(32, 48, 32, skip=True), l0=9)
    out = ("--output_dir", tmp_path / "out")
    done = compare(results, cache, tmp_path / "google", *out, "--batches", 1, "--causal_rows", 2)
    assert done.exit_code == 0, done.output
    assert "ce_recovered_zero" in done.stdout
    (found,) = json.loads((tmp_path / "out" / "google_metrics.json").read_text()).values()
    assert found["hook_in"] == "norm_out"
    assert found["n_causal_tokens"] == 60
    assert "8 held-out rows" in done.stdout


def test_a_torch_file_of_another_program_is_compared_too(cache: CacheFolder, google: Path, tmp_path: Path) -> None:
    old = write(tmp_path / "old", weights(), {"activation": "topk"})
    done = run("compare", "--ours_checkpoint", old, "--google_dir", google, "--layer", 1, "--cache_dir", cache.root,
               "--device", "cpu", "--output_dir", tmp_path / "out", *OVERRIDES, "model=tiny", "top_k=4")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["budget"]["ours"] == {
        "training_tokens": None, "width": 64, "hook_in": "norm_out", "linear_map": "no", "weights": "tiny",
    }  # fmt: skip
    assert found["name"] == "old"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", 2], "was trained on layer 1 of tiny"),
        (["--width", "1k"], "width 1k is not in"),
        (["--l0", "7"], "it has L0 2, 16"),
        (["--l0", "many"], "--l0 many is no L0"),
        (["--google_dir", "/nowhere"], "/nowhere is no folder"),
        (["--ours_checkpoint", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_a_wrong_request_is_one_message(
    results: ResultsFolder, cache: CacheFolder, google: Path, words: list[object], message: str, tmp_path: Path
) -> None:
    refused = compare(results, cache, google, *words, "--output_dir", tmp_path / "out")
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_other_layers_other_models_and_truncated_files_are_refused(
    results: ResultsFolder, cache: CacheFolder, tmp_path: Path
) -> None:
    write_first(tmp_path / "layers", random_arrays(32, 8, 32), layer=0)
    write_first(tmp_path / "other", random_arrays(33, 8, 32))
    cut = write_first(tmp_path / "cut", random_arrays(32, 8, 32)) / "params.npz"
    cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("layers", "it has layer 0"), ("other", "belongs to another model"), ("cut", "not whole"),
        ("empty", "holds no transcoder of Google's"),
    ):  # fmt: skip
        refused = compare(results, cache, tmp_path / name, "--output_dir", tmp_path / "out")
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert not (tmp_path / "out").exists()
