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


def ranked(root: Path) -> list[Group]:
    return rank(load_table(root, "runs").frame.collect())


def cell_ids(group: Group) -> list[str]:
    return [row["cell_id"] for row in group.rows]


def test_rank_orders_by_fvu_and_puts_numberless_rows_last(tmp_path: Path):
    for cell_id, fvu in {"aa": 0.5, "bb": math.nan, "cc": 0.25, "dd": None, "ee": math.inf}.items():
        write_cell(tmp_path, cell_id, fvu=fvu)
    (group,) = ranked(tmp_path)
    assert cell_ids(group)[:2] == ["cc", "aa"]
    assert [row["rank"] for row in group.rows] == [1, 2, 3, 4, 5]
    assert [row["pareto"] for row in group.rows] == [True, False, False, False, False]


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
    for cell_id in ("aa", "bb", "cc"):
        write_cell(tmp_path, cell_id, model="gemma-2-2b", layer=18)
    assert [record["kind"] for record in records(ranked(tmp_path), top=2)] == ["cell"] * 2 + ["baseline"] * 2


def test_rank_text_shows_baselines_among_the_runs_with_their_citation(tmp_path: Path):
    write_cell(tmp_path, "bad", model="gemma-2-2b", layer=18, fvu=0.33)
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
    assert "1 more runs left out by --top 2" in text
    assert "FVU compares fairly only at equal L0" in text
    assert "no published baseline for tiny layer 1 mlp_out" in text
