"""Cross-entropies of runs that the language model ran on different numbers of held-out rows for."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from make import row_file, write_cell

from analysis.effects import effects
from analysis.effects_table import effects_text
from analysis.rank import Group, rank
from analysis.rank_table import rank_text
from analysis.tables import load_table
from sweep.causal import Effect
from sweep.recovered import SUMS

N, TOKENS = 20, 30
HARDNESS = 2 + np.arange(N) / 10
"""Clean cross-entropy of a token of each held-out row: later rows are harder."""


def write(root: Path, name: str, l0: float, added: float, n_run: int, sums: bool = True, **row: Any) -> None:
    """A run whose predictions add this much per token, a fifth more in later rows, measured on the first `n_run`."""
    clean = HARDNESS[:n_run]
    more = added * np.linspace(1, 1.2, N)[:n_run]
    per_token = {"clean": clean, "spliced": clean + more, "ablated_zero": clean + 2, "ablated_mean": clean + 1}
    effect = Effect(TOKENS, **{key: torch.tensor(TOKENS * value) for key, value in (per_token | {"kl": more}).items()})
    rows = pl.DataFrame({"sequence": range(N), "n_tokens": [TOKENS + 1] * N, **effect.columns(N)}).with_columns(
        sum_squared_error=15.0 + pl.col("sequence"), sum_l0=l0 * (TOKENS + 1)
    )
    write_cell(root, name, l0=l0, fvu=0.5, sequences=rows.to_dicts(), **effect.metrics(), **row)
    if not sums:
        row_file(root, name, "sequences").unlink()


def tables(root: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    runs, sequences = (load_table(root, table).frame.collect() for table in ("runs", "sequences"))
    return runs, sequences


def ranked(root: Path, by: str) -> Group:
    runs, sequences = tables(root)
    (group,) = rank(runs, by, sequences)
    return group


def causal_columns(row: dict[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in row if name.startswith("ce_") or name in ("kl", "n_causal_tokens")}


@pytest.mark.parametrize("by", ["kl", "ce_spliced", "ce_recovered_mean"])
def test_metrics_are_those_of_the_rows_that_all_have(tmp_path: Path, by: str) -> None:
    write(tmp_path / "unlike", "better", 16, 0.45, N, options={"lr": 0.001})
    write(tmp_path / "unlike", "worse", 16, 0.46, 8, options={"lr": 0.002})
    write(tmp_path / "alike", "better", 16, 0.45, 8, options={"lr": 0.001})
    write(tmp_path / "alike", "worse", 16, 0.46, 8, options={"lr": 0.002})
    raw = {row["cell_id"]: row["kl"] for row in tables(tmp_path / "unlike")[0].to_dicts()}
    assert raw["better"] > raw["worse"]  # later rows are harder
    unlike, alike = (ranked(tmp_path / name, by) for name in ("unlike", "alike"))
    assert [row["cell_id"] for row in unlike.rows] == ["better", "worse"]
    for found, expected in zip(unlike.rows, alike.rows, strict=True):
        assert causal_columns(found) == pytest.approx(causal_columns(expected))
        assert found["n_causal_tokens"] == 8 * TOKENS
    said = "of the 8 held-out rows that all of these have; n_causal_rows differs, and worse has fewest"
    assert [note for note in unlike.notes if said in note]
    assert said in rank_text(unlike)
    assert not [note for note in alike.notes if "cross-entropies" in note]


def test_runs_without_cross_entropies_take_no_rows_from_the_others(tmp_path: Path) -> None:
    write(tmp_path, "one", 16, 0.5, N, options={"lr": 0.001})
    write_cell(tmp_path, "none", options={"lr": 0.002})
    group = ranked(tmp_path, "fvu")
    assert {row["cell_id"]: row["n_causal_tokens"] for row in group.rows} == {"one": N * TOKENS, "none": None}


@pytest.mark.parametrize("lost", ["worse", "all"])
def test_what_cannot_be_taken_anew_is_left_out(tmp_path: Path, lost: str) -> None:
    write(tmp_path, "better", 16, 0.45, N, options={"lr": 0.001}, sums=lost != "all")
    write(tmp_path, "worse", 16, 0.46, 8, options={"lr": 0.002}, sums=False)
    group = ranked(tmp_path, "fvu")
    kl = {row["cell_id"]: row["kl"] for row in group.rows}
    assert kl["worse"] is None
    assert (kl["better"] is None) == (lost == "all")
    (note,) = (note for note in group.notes if note.startswith("no cross-entropies of"))
    assert ("better" in note) == (lost == "all") and "worse" in note


def test_an_option_has_no_effect_through_the_number_of_rows(tmp_path: Path) -> None:
    write(tmp_path, "a", 16, 0.45, N, options={"lr": 0.001})
    write(tmp_path, "b", 16, 0.45, 8, options={"lr": 0.002})
    (group,) = effects(*tables(tmp_path))
    changes = {effect.metric: effect.change for effect in group.effects}
    assert changes["ce_clean"] == changes["kl"] == changes["ce_recovered_zero"] == 0
    assert "of the 8 held-out rows that all of these have" in effects_text(group)
    (alone,) = effects(tables(tmp_path)[0])
    assert {effect.metric for effect in alone.effects}.isdisjoint(changes.keys() & {"ce_clean", "kl"})


def test_cells_and_baselines_are_placed_on_the_rows_that_all_have(tmp_path: Path) -> None:
    """The cross-entropy that a prediction adds stands in for the FVU; most rows were not run, and more for one."""
    for name, l0, added, n_run in (("low", 8, 0.8, 12), ("middle", 16, 0.4, 16), ("high", 32, 0.2, N)):
        write(tmp_path, name, l0, added, n_run, kind="baseline", baseline=f"layer_1/{name}")
    write(tmp_path, "better", 16, 0.3, 12, options={"lr": 0.001})
    write(tmp_path, "worse", 16, 0.5, N, options={"lr": 0.002})
    group = ranked(tmp_path, "ce_recovered_zero")
    standing = group.ordered_by
    assert standing is not None and standing.measure.name == "ce"
    assert standing.on_frontier == ["low", "middle", "high"]
    assert {name: len(numbers) for name, numbers in standing.sequences.items()} == {"better": 12, "worse": 12}
    assert standing.tied("better", "worse") is False
    assert [row["cell_id"] for row in group.rows] == ["better", "worse"]
    assert [row["ce_verdict"] for row in group.rows] == ["better", "worse"]
    assert [row["ce_ratio"] for row in group.rows] == pytest.approx([0.3 / 0.4, 0.5 / 0.4])
    on_frontier = 0.4 * np.linspace(1, 1.2, N)[:12].mean()
    assert [row["ce_frontier"] for row in group.rows] == pytest.approx([on_frontier] * 2)
    text = rank_text(group)
    assert "95%: held-out sequences (fvu 20, ce 12) drawn" in text
    assert "ce_matched_l0" in text and "cross-entropy added over the baselines'" in text
    assert "ce_matched_l0" not in rank_text(ranked(tmp_path, "fvu")).split("\n\n")[1]


def test_a_baseline_that_adds_nothing_is_not_passed_over(tmp_path: Path) -> None:
    for name, l0, added in (("low", 8, 0.4), ("middle", 32, -0.002), ("high", 128, 0.1)):
        write(tmp_path, name, l0, added, N, kind="baseline", baseline=f"layer_1/{name}")
    write(tmp_path, "sparse", 8, 0.5, N, options={"lr": 0.001})
    write(tmp_path, "dense", 64, 0.15, N, options={"lr": 0.002})
    group = ranked(tmp_path, "ce_spliced")
    (standing,) = (standing for standing in group.standings if standing.measure.name == "ce")
    assert standing.on_frontier == ["low", "middle"]
    dense = next(row for row in group.rows if row["cell_id"] == "dense")
    assert (dense["ce_ratio"], dense["ce_verdict"]) == (None, "not comparable")
    assert [note for note in group.notes if "added at all by the baseline middle" in note]


def test_a_cell_that_adds_nothing_stands_first(tmp_path: Path) -> None:
    for name, l0, added in (("low", 8, 0.4), ("high", 128, 0.1)):
        write(tmp_path, name, l0, added, N, kind="baseline", baseline=f"layer_1/{name}")
    write(tmp_path, "bad", 32, 0.9, N, options={"lr": 0.001})
    write(tmp_path, "perfect", 32, -0.01, N, options={"lr": 0.002})
    write(tmp_path, "good", 32, 0.1, N, options={"lr": 0.003})
    group = ranked(tmp_path, "ce_spliced")
    assert [row["cell_id"] for row in group.rows] == ["perfect", "good", "bad"]
    assert [note for note in group.notes if note.startswith("no cross-entropy added at all by perfect")]


def test_sums_of_older_versions_are_not_taken_for_zeros(tmp_path: Path) -> None:
    for name, n_run in (("one", N), ("other", 8)):
        write(tmp_path, name, 16, 0.4, n_run, options={"lr": n_run / 1000})
    runs, sequences = tables(tmp_path)
    (group,) = rank(runs, "fvu", sequences.with_columns(sum_kl=pl.lit(None, pl.Float64)))
    assert [row["kl"] for row in group.rows] == [None, None]
    assert set(SUMS.values()) <= set(sequences.columns)
