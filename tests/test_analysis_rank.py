"""Ranking: what is compared with what, in which order, and what is said about it."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import write_cell

from analysis.rank import FIELDS, Group, pareto_front, rank, records
from analysis.rank_table import rank_text
from analysis.tables import load_table
from sweep.errors import ConfigError


def ranked(root: Path) -> list[Group]:
    return rank(load_table(root, "runs").frame.collect())


def cell_ids(group: Group) -> list[str]:
    return [row["cell_id"] for row in group.rows]


def write_seeds(root: Path, name: str, fvus: list[float], **row: Any) -> None:
    """One cell with several seeds."""
    options = row.pop("options", {})
    for seed, fvu in enumerate(fvus):
        write_cell(root, f"{name}{seed}", options={**options, "seed": seed}, fvu=fvu, **row)


def test_rank_orders_by_fvu_and_says_why_a_run_has_no_place(tmp_path: Path):
    fvus = {"aa": 0.5, "bb": math.nan, "cc": 0.25, "dd": None, "ee": math.inf}
    for lr, (cell_id, fvu) in enumerate(fvus.items(), 1):
        write_cell(tmp_path, cell_id, options={"lr": lr / 1000}, fvu=fvu)
    write_cell(tmp_path, "ff", options={"lr": 0.5}, fvu=0.1, status="diverged")
    (group,) = ranked(tmp_path)
    assert cell_ids(group) == ["cc", "aa"]
    assert [row["rank"] for row in group.rows] == [1, 2]
    assert [row["pareto"] for row in group.rows] == [True, False]
    assert group.left_out == [
        ("bb", "its fvu is nan"),
        ("dd", "its fvu is missing"),
        ("ee", "its fvu is inf"),
        ("ff", "its status is diverged"),
    ]
    assert "left out ff: its status is diverged" in rank_text(group)


def test_rank_of_a_group_without_a_number_says_so(tmp_path: Path):
    write_cell(tmp_path, "aa", fvu=None)
    (group,) = ranked(tmp_path)
    assert group.rows == []
    assert "left out aa: its fvu is missing" in rank_text(group)


def test_seeds_are_one_row_with_mean_and_interval(tmp_path: Path):
    write_seeds(tmp_path, "a", [0.2, 0.22, 0.24], options={"lr": 1e-3})
    write_seeds(tmp_path, "b", [0.3], options={"lr": 2e-3})
    (group,) = ranked(tmp_path)
    best, single = group.rows
    assert (best["n_seeds"], best["seeds"], best["cell_ids"]) == (3, [0, 1, 2], ["a0", "a1", "a2"])
    assert best["fvu"] == pytest.approx(0.22)
    deviation = math.sqrt(2 * (0.02 / 0.22) ** 2 / 2)
    assert best["fvu_high"] - best["fvu"] == pytest.approx(4.3027 * deviation * 0.22 / math.sqrt(3))
    assert single["fvu_high"] - 0.3 == pytest.approx(4.3027 * deviation * 0.3)  # what the others' seeds say of one
    assert single["n_seeds"] == 1
    assert "4 runs of 2 cells" in rank_text(group)


def test_ties_are_what_the_seeds_do_not_tell_from_the_first(tmp_path: Path):
    write_seeds(tmp_path, "a", [0.200, 0.204], options={"lr": 1e-3})
    write_seeds(tmp_path, "b", [0.203, 0.205], options={"lr": 2e-3})
    write_seeds(tmp_path, "c", [0.300, 0.301], options={"lr": 3e-3})
    (group,) = ranked(tmp_path)
    assert [(row["cell_id"], row["tie"]) for row in group.rows] == [("a0", False), ("b0", True), ("c0", False)]
    lines = [line.split()[0] for line in rank_text(group).splitlines() if line[:1].isdigit()]
    assert [line.rstrip("*") for line in lines] == ["1", "2=", "3"]


def test_without_a_second_seed_nothing_is_called_a_tie(tmp_path: Path):
    write_cell(tmp_path, "aa", options={"lr": 1e-3}, fvu=0.2)
    write_cell(tmp_path, "bb", options={"lr": 2e-3}, fvu=0.3)
    (group,) = ranked(tmp_path)
    assert [row["tie"] for row in group.rows] == [False, None]
    assert group.rows[1]["fvu_low"] is None
    assert "one seed each" in group.notes[0]
    assert "±" not in rank_text(group)


def test_other_transcoders_are_never_taken_for_seeds_of_each_other(tmp_path: Path):
    write_cell(tmp_path, "cell")
    for cell_id in ("aa", "bb"):
        write_cell(tmp_path, cell_id, kind="baseline")
    (group,) = ranked(tmp_path)
    assert [row["cell_id"] for row in group.measured] == ["aa", "bb"]
    assert [row["n_seeds"] for row in group.measured] == [1, 1]


def test_rank_by_another_metric_knows_which_way_is_better(tmp_path: Path):
    write_cell(tmp_path, "aa", options={"lr": 1e-3}, fvu=0.2, cosine=0.8, mse=5.0)
    write_cell(tmp_path, "bb", options={"lr": 2e-3}, fvu=0.3, cosine=0.9, mse=4.0)
    frame = load_table(tmp_path, "runs").frame.collect()
    assert {by: cell_ids(rank(frame, by)[0])[0] for by in ("fvu", "cosine", "mse")} == {
        "fvu": "aa",
        "cosine": "bb",
        "mse": "bb",
    }
    assert " mse " in rank_text(rank(frame, "mse")[0])
    with pytest.raises(ConfigError, match="choose one of fvu"):
        rank(frame, "lr")


@pytest.mark.parametrize(
    "other",
    [
        {"options": {"layer": 2}},
        {"options": {"hook_out": "resid_mid"}},
        {"model": "another"},
        {"heldout_hash": "c" * 64},
        {"model_hash": "c" * 64},
    ],
)
def test_rank_keeps_apart_what_does_not_compare(tmp_path: Path, other: dict[str, Any]):
    write_cell(tmp_path, "aa")
    write_cell(tmp_path, "bb", **other)
    assert sorted(map(cell_ids, ranked(tmp_path))) == [["aa"], ["bb"]]


def test_rank_says_when_held_out_rows_differ(tmp_path: Path):
    write_cell(tmp_path, "aa")
    write_cell(tmp_path, "bb", heldout_hash="c" * 64)
    write_cell(tmp_path, "cc", heldout_hash="d" * 64, options={"layer": 2})
    notes = {group.rows[0]["cell_id"]: " ".join(group.notes) for group in ranked(tmp_path)}
    assert "ranked apart from another group" in notes["aa"]
    assert "ranked apart from another group" in notes["bb"]
    assert notes["cc"] == ""


def test_rank_says_when_token_files_or_versions_differ(tmp_path: Path):
    write_cell(tmp_path, "aa")
    write_cell(tmp_path, "bb", tokens_hash="8" * 64, schema_version=2)
    (group,) = ranked(tmp_path)
    assert group.varying == ["tokens_hash", "schema_version"]
    assert "tokens_hash" in group.notes[0]
    assert "schema_version" in group.notes[1]


def test_rank_says_when_nothing_shows_the_rows_were_the_same(tmp_path: Path):
    write_cell(tmp_path, "aa", heldout_hash=None)
    (group,) = ranked(tmp_path)
    assert "nothing shows" in group.notes[0]
    assert "held-out rows -" in rank_text(group)


def test_rank_tells_what_varies_from_what_is_the_same(tmp_path: Path):
    write_cell(tmp_path, "aa", options={"lr": 1e-3, "dict_size": 64})
    write_cell(tmp_path, "bb", options={"lr": 3e-3, "dict_size": 128})
    (group,) = ranked(tmp_path)
    assert group.varying == ["lr"]
    assert group.same["decay"] == "linear"
    assert group.same["groups"] == "0.125,0.25,0.5,0.75,1*dict_size"
    assert group.same["min_lr"] == "0.01*lr"
    assert not {"dict_size", "top_k", "seed", "model_path", "layer"} & {*group.same, *group.varying}


@pytest.mark.parametrize(
    ("name", "values", "varies"),
    [
        ("groups", ([8, 64], [16, 128]), False),
        ("groups", ([8, 64], [17, 128]), False),  # within the rounding of 1/8 of 64
        ("groups", ([8, 64], [32, 128]), True),
        ("groups", ([64], [16, 128]), True),
        ("warmup_steps", (3, 4), True),
        ("min_lr", (3e-5, 6e-5), True),
    ],
)
def test_rank_shows_a_relative_option_only_where_its_fraction_varies(
    tmp_path: Path, name: str, values: tuple[Any, Any], varies: bool
):
    for cell_id, width, value in zip(("aa", "bb"), (64, 128), values, strict=True):
        write_cell(tmp_path, cell_id, options={"dict_size": width, "steps": 3000}, **{name: value})
    (group,) = ranked(tmp_path)
    assert (name in group.varying, name in group.same) == (varies, not varies)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_pareto_front_is_its_definition(points: list[tuple[int, int]]):
    wanted = [
        not any(j != i and other[0] <= point[0] and other[1] < point[1] for j, other in enumerate(points))
        for i, point in enumerate(points)
    ]
    assert pareto_front(points) == wanted


def test_pareto_front_leaves_out_what_is_no_number():
    assert pareto_front([(1.0, math.inf), (2.0, 0.5), (math.inf, 0.25)]) == [False, True, True]


def test_records_have_the_same_keys_and_say_how_fvu_compares(tmp_path: Path):
    write_cell(tmp_path, "aa", model="gemma-2-2b", options={"layer": 1})
    write_cell(tmp_path, "bb", model="gemma-2-2b", layer=18)
    found = list(records(ranked(tmp_path)))
    assert {tuple(record) for record in found} == {FIELDS}
    assert {record["fvu_comparable_at"] for record in found} == {"equal l0"}
    baselines = [record for record in found if record["kind"] == "baseline"]
    assert [(record["layer"], record["fvu"], record["l0"]) for record in baselines] == [
        (18, 0.3195, 61.1),
        (18, 0.3397, 53.6),
    ]
    assert all(record["same_heldout_rows"] is False and "Sid-MB" in record["citation"] for record in baselines)
    assert [record["same_heldout_rows"] for record in found if record["kind"] == "cell"] == [True, True]


def test_records_cut_runs_but_not_baselines(tmp_path: Path):
    for lr, cell_id in enumerate(("aa", "bb", "cc"), 1):
        write_cell(tmp_path, cell_id, options={"lr": lr / 1000}, model="gemma-2-2b", layer=18)
    assert [record["kind"] for record in records(ranked(tmp_path), top=2)] == ["cell"] * 2 + ["baseline"] * 2


def test_rank_text_shows_baselines_among_the_runs_with_their_citation(tmp_path: Path):
    write_cell(tmp_path, "bad", options={"lr": 1e-3}, model="gemma-2-2b", layer=18, fvu=0.33)
    write_cell(tmp_path, "good", model="gemma-2-2b", layer=18, fvu=0.25)
    text = rank_text(ranked(tmp_path)[0])
    order = [line.split()[-1] for line in text.splitlines() if " cell " in line or " baseline " in line.split("[")[0]]
    assert order[:4] == ["good", "[1]", "bad", "[2]"]
    assert "[1] gemma-scope-2b-pt-transcoders layer_18/width_16k/average_l0_57, published" in text
    assert "github Sid-MB/transcoder-adapters" in text
    assert "no published baseline" not in text


def test_rank_text_says_what_is_the_same_what_is_missing_and_what_compares(tmp_path: Path):
    for i, lr in enumerate((1e-3, 2e-3, 3e-3)):
        write_cell(tmp_path, f"cell{i}", options={"lr": lr}, fvu=0.5 + i)
    text = rank_text(ranked(tmp_path)[0], top=2)
    header = next(line for line in text.splitlines() if line.startswith("rank"))
    assert header.split() == [
        *("rank", "dict_size", "top_k", "l0", "fvu", "fvu_per_dimension"),
        *("dead_fraction", "absorption_score", "seed", "lr", "cell_id"),
    ]
    assert "decay=linear" in text
    assert "1*" in text
    assert "cell2" not in text
    assert "1 more rows left out by --top 2" in text
    assert "FVU compares fairly only at equal L0" in text
    assert "no published baseline for tiny layer 1 mlp_out" in text
