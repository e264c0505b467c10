"""Cells placed against measured baselines in a ranking: order, intervals, ties, and what a condition may leave out."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import analysis as run
from make import row_file, write_cell
from placed import BASELINES, CELLS, N, sequences, write

from analysis.place import PLACE_COLUMNS
from analysis.rank import FIELDS, Group, rank, records
from analysis.rank_table import rank_text
from analysis.tables import load_table


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for i, (name, (l0, fvu)) in enumerate(BASELINES.items()):
        write(tmp_path, name, l0, fvu, i, kind="baseline", baseline=f"layer_1/{name}", dead_fraction=0.9)
    for i, (name, (l0, fvu)) in enumerate(CELLS.items()):
        write(tmp_path, name, l0, fvu, 100 + i, options={"lr": (i + 1) / 1000})
    return tmp_path


def ranked(root: Path, by: str = "fvu") -> Group:
    runs, sums = (load_table(root, table).frame.collect() for table in ("runs", "sequences"))
    (group,) = rank(runs, by, sums)
    return group


def test_cells_stand_in_the_order_of_their_ratio_not_of_their_fvu(results: Path) -> None:
    rows = {row["cell_id"]: row for row in ranked(results).rows}
    at_100 = 0.4 * (0.2 / 0.4) ** (np.log(100 / 32) / np.log(128 / 32))
    assert rows["dense"]["fvu_ratio"] == pytest.approx(0.3 / at_100)
    assert rows["dense"]["fvu_frontier"] == pytest.approx(at_100)
    assert rows["sparse"]["fvu_ratio"] == pytest.approx(0.5 / (0.8 * 0.4) ** 0.5)
    assert rows["sparse"]["fvu_matched_l0"] == pytest.approx(8 * 4 ** (np.log(0.8 / 0.5) / np.log(2)))
    assert rows["even"]["fvu_ratio"] == pytest.approx(1)
    assert rows["beyond"]["fvu_ratio"] == pytest.approx(0.9 / (0.8 * 2**0.5))
    order = [row["cell_id"] for row in ranked(results).rows]
    assert order == ["sparse", "even", "even2", "dense", "dominant", "beyond"]
    verdicts = {name: row["fvu_verdict"] for name, row in rows.items()}
    assert verdicts == {
        "dense": "worse", "sparse": "better", "even": "tie", "even2": "tie", "beyond": "not comparable",
        "dominant": "dominates",
    }  # fmt: skip
    assert {name for name, row in rows.items() if row["fvu_extrapolated"]} == {"beyond", "dominant"}
    for name in ("even", "even2"):
        assert rows[name]["fvu_ratio_low"] < 1 < rows[name]["fvu_ratio_high"]


def test_an_extrapolated_ratio_stands_last_and_ties_with_nothing(results: Path) -> None:
    ties = {row["cell_id"]: row["tie"] for row in ranked(results).rows}
    assert ties == {"sparse": False, "even": False, "even2": False, "dense": False, "dominant": None, "beyond": None}
    for name in ("sparse", "even", "even2", "dense"):
        for table in ("runs", "sequences"):
            row_file(results, name, table).unlink()
    assert [(row["cell_id"], row["tie"]) for row in ranked(results).rows] == [("dominant", False), ("beyond", None)]


def test_the_frontier_has_no_beaten_baseline(results: Path) -> None:
    group = ranked(results)
    assert [row["cell_id"] for row in group.measured] == ["low", "middle", "beaten", "high"]
    (standing,) = group.standings
    assert standing.on_frontier == ["low", "middle", "high"]
    assert standing.l0_range == (8.0, 128.0)
    assert {len(numbers) for numbers in standing.sequences.values()} == {N}


def test_ties_with_the_first_are_judged_each_at_its_own_l0(tmp_path: Path) -> None:
    for i, (name, (l0, fvu)) in enumerate(BASELINES.items()):
        write(tmp_path, name, l0, fvu, i, kind="baseline")
    write(tmp_path, "one", 16.0, 0.5, 20, options={"lr": 1e-3})
    write(tmp_path, "other", 64.0, 0.252, 21, options={"lr": 2e-3})
    write(tmp_path, "third", 64.0, 0.3, 22, options={"lr": 3e-3})
    group = ranked(tmp_path)
    assert [(row["cell_id"], row["tie"]) for row in group.rows] == [("one", False), ("other", True), ("third", False)]
    assert "= not told from the first by the held-out sequences (95%, fvu at equal L0" in rank_text(group)


def test_seeds_of_a_cell_are_placed_by_their_mean(tmp_path: Path) -> None:
    for i, (name, (l0, fvu)) in enumerate(BASELINES.items()):
        write(tmp_path, name, l0, fvu, i, kind="baseline")
    for seed, (l0, fvu) in enumerate([(15.0, 0.48), (17.0, 0.52)]):
        write(tmp_path, f"seed{seed}", l0, fvu, 20 + seed, options={"seed": seed})
    (row,) = ranked(tmp_path).rows
    assert row["fvu_ratio"] == pytest.approx(0.5 / (0.8 * 0.4) ** 0.5)
    assert row["fvu_ratio_low"] < row["fvu_ratio"] < row["fvu_ratio_high"] < 1


def test_an_interval_that_nothing_added_prevents_is_told(tmp_path: Path) -> None:
    for name, l0, added, kind in (
        ("low", 8.0, 9.0, "baseline"),
        ("high", 32.0, 5.0, "baseline"),
        ("ours", 16.0, 7.0, "cell"),
    ):
        rows = sequences(l0, 0.5, 0)
        for i, row in enumerate(rows):
            row |= {
                "sum_ce_clean": 60.0,
                "sum_ce_spliced": 60.0 + (-0.7 * added if kind == "cell" and i % 2 else added),
            }
        write_cell(tmp_path, name, l0=l0, fvu=0.5, sequences=rows, kind=kind, ce_clean=2.0, ce_spliced=2.0 + added / 31)
    group = ranked(tmp_path)
    assert group.rows[0]["ce_ratio"] is not None
    assert any(note.startswith("no interval of ce_ratio for ours: on too many draws") for note in group.notes)


def test_a_verdict_that_other_seeds_may_not_get_is_told(tmp_path: Path) -> None:
    for i, (name, (l0, fvu)) in enumerate({"low": (8.0, 0.8), "high": (32.0, 0.4)}.items()):
        write(tmp_path, name, l0, fvu, i, kind="baseline", baseline=name)
    for name, fvus in {"scattered": (0.4, 0.6), "far": (0.2, 0.3)}.items():
        for seed, fvu in enumerate(fvus):
            write(tmp_path, f"{name}{seed}", 16.0, fvu, 20 + seed, options={"seed": seed, "lr": fvus[0] / 100})
    group = ranked(tmp_path)
    assert [row["fvu_verdict"] for row in group.rows] == ["better", "better"]
    (note,) = (note for note in group.notes if "other seeds would get" in note)
    assert note == (
        "verdicts on FVU are about these transcoders; the spread of the seeds leaves open what other seeds would get: "
        "scattered0"
    )


@pytest.mark.parametrize("missing", ["even", "middle"])
def test_without_sequences_there_is_a_ratio_but_no_interval(results: Path, missing: str) -> None:
    row_file(results, missing, "sequences").unlink()
    rows = {row["cell_id"]: row for row in ranked(results).rows}
    assert rows["even"]["fvu_ratio"] == pytest.approx(1)
    assert (rows["even"]["fvu_ratio_low"], rows["even"]["fvu_verdict"]) == (None, None)
    assert (rows["sparse"]["fvu_verdict"] is None) == (missing == "middle")
    if missing == "middle":
        assert "(table sequences): fvu_ratio without intervals" in rank_text(ranked(results))
    else:
        assert f"no interval of fvu_ratio for {missing}: sums per held-out sequence" in rank_text(ranked(results))


@pytest.mark.parametrize("change", ["fewer", "others", "longer"])
def test_other_sequences_are_not_paired(results: Path, change: str) -> None:
    sums = sequences(16.0, 0.5, 3)
    if change == "fewer":
        sums.pop()
    elif change == "others":
        sums[-1]["sequence"] += 1
    else:
        sums[-1]["n_tokens"] += 1
    write_cell(results, "odd", l0=16.0, fvu=0.5, options={"lr": 0.5}, sequences=sums)
    rows = {row["cell_id"]: row for row in ranked(results).rows}
    assert rows["odd"]["fvu_ratio"] == pytest.approx(rows["sparse"]["fvu_ratio"])
    assert rows["odd"]["fvu_verdict"] is None
    assert "no interval of fvu_ratio for odd: sums per held-out sequence" in rank_text(ranked(results))


def test_another_metric_orders_by_itself_and_still_places(results: Path) -> None:
    group = ranked(results, "l0")
    assert [row["cell_id"] for row in group.rows][:2] == ["dominant", "beyond"]
    assert group.ordered_by is None
    assert all(row["fvu_ratio"] is not None for row in group.rows)


@pytest.mark.parametrize("by", ["mse", "fvu_scalar_variance"])
def test_squared_errors_by_any_name_are_compared_at_equal_l0(results: Path, by: str) -> None:
    for name, (_, fvu) in (BASELINES | CELLS).items():
        path = row_file(results, name)
        pl.read_parquet(path).with_columns(pl.lit(7 * fvu).alias(by)).write_parquet(path)
    assert [row["cell_id"] for row in ranked(results, by).rows] == [row["cell_id"] for row in ranked(results).rows]


def test_a_metric_without_a_ratio_is_said_to_compare_at_equal_l0_only(results: Path) -> None:
    for i, name in enumerate(BASELINES | CELLS):
        path = row_file(results, name)
        pl.read_parquet(path).with_columns(kl=pl.lit(i / 10)).write_parquet(path)
    said = "rows stand in the order of kl alone, which compares at equal L0 only"
    assert said in ranked(results, "kl").notes
    assert not [note for note in ranked(results, "l0").notes if "alone" in note]


def test_conditions_choose_cells_and_leave_the_frontier(results: Path) -> None:
    found = json.loads(run("rank", results, "--where", "dead_fraction < 0.5 and l0 < 50", "--json").stdout)
    assert [record["cell_id"] for record in found][:3] == ["sparse", "dominant", "beyond"]
    assert [record["cell_id"] for record in found][3:] == ["low", "middle", "beaten", "high"]
    assert [record["kind"] for record in found] == ["cell"] * 3 + ["baseline"] * 4
    assert {tuple(record) for record in found} == {FIELDS}
    narrow = run("rank", results, "--frontier", "l0 > 20", "--json")
    assert "left out 1 of 4 baselines: they do not satisfy l0 > 20" in narrow.stderr
    assert {r["cell_id"]: r["fvu_extrapolated"] for r in json.loads(narrow.stdout)}["sparse"]


def test_the_text_says_what_its_marks_mean(results: Path) -> None:
    text = rank_text(ranked(results))
    lines = {line.split()[-1]: line for line in text.splitlines() if line.strip()}
    assert "~" in lines["beyond"]
    assert "not comparable" in lines["beyond"]
    assert "fvu_ratio~: extrapolated, for the baselines were measured at L0 8 to 128; such rows stand last" in text
    assert f"held-out sequences (fvu {N}) drawn" in text
    assert lines["beaten"].split()[:2] == ["layer_1/beaten", "-"]
    assert lines["high"].split()[:2] == ["layer_1/high", "fvu"]
    assert "< 8" in lines["beyond"]
    assert "FVU compares fairly only" not in text
    assert "6 runs and 4 baselines" in text
    without = ranked(results, "ce_recovered_zero")  # which no row of these has
    assert not without.rows
    assert "No baseline was measured" not in rank_text(without)


def test_beside_one_baseline_nothing_is_ordered_by_a_ratio(results: Path) -> None:
    found = run("rank", results, "--frontier", "l0 = 128")
    assert "one baseline is no frontier" in found.stdout
    lines = {line.split()[-1]: line for line in found.stdout.splitlines() if line.strip()}
    assert "not comparable" in lines["sparse"]


def test_records_of_baselines_have_no_place(results: Path) -> None:
    for record in records([ranked(results)]):
        if record["kind"] == "baseline":
            assert [record[name] for name in PLACE_COLUMNS] == [None] * len(PLACE_COLUMNS)
