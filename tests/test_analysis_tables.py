"""Loading results: whole files of committed cells; everything else is named, nothing is fatal."""

import io
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make import row_file, write_cell

import analysis
from analysis import tables
from analysis.tables import load_table, open_results
from sweep.errors import ConfigError, ResultsError
from sweep.results import TABLES, polars_schema


def rewrite(path: Path, **columns: Any) -> None:
    """Replace or add columns of a committed file, as another version of the code would have written them."""
    pl.read_parquet(io.BytesIO(path.read_bytes())).with_columns(**columns).write_parquet(path)


@pytest.fixture(autouse=True, params=[tables.CACHED_FROM, 1], ids=["files", "cache"])
def path_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise holds for the few that are read directly and for the many that go through the cache."""
    monkeypatch.setattr(tables, "CACHED_FROM", request.param)


@pytest.mark.parametrize("table", list(TABLES))
def test_load_gives_the_schema_and_the_rows(tmp_path: Path, table: str):
    write_cell(tmp_path, "bb")
    write_cell(tmp_path, "aa")
    loaded = load_table(tmp_path, table)
    frame = loaded.frame.collect()
    assert frame.schema == polars_schema(table)
    assert frame["cell_id"].unique(maintain_order=True).to_list() == ["aa", "bb"]
    assert frame.height == 2 * {"runs": 1, "curves": 3, "latents": 2, "sequences": 1, "contexts": 1}[table]
    assert (loaded.n_files, loaded.left_out, loaded.warnings) == (2, (), [])


def test_load_keeps_values_to_the_last_digit(tmp_path: Path):
    write_cell(tmp_path, "aa", fvu=0.1 + 0.2, l0=float("nan"), n_decoder_pairs=2**62 + 1)
    row = load_table(tmp_path, "runs").frame.collect().row(0, named=True)
    assert row["fvu"] == 0.1 + 0.2
    assert row["l0"] != row["l0"]
    assert row["n_decoder_pairs"] == 2**62 + 1
    assert row["groups"] == [8, 16, 32, 48, 64]


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """One bit of the footer's length, so that no reader can find the footer."""
    return content[:-5] + bytes([content[-5] ^ 0x40]) + content[-4:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "truncated"),
        (flipped, "damaged"),
        (lambda _: b"", "0 bytes"),
        (lambda _: b"cell_id,fvu\naa,0.1\n", "not a Parquet file"),
        (lambda content: b"PAR1" + bytes(64) + b"PAR1", "damaged"),
    ],
)
@pytest.mark.parametrize("table", list(TABLES))
def test_load_names_and_skips_a_damaged_file(tmp_path: Path, damage: Any, reason: str, table: str):
    for cell_id in ("aa", "bb", "cc"):
        write_cell(tmp_path, cell_id)
    bad = row_file(tmp_path, "bb", table)
    bad.write_bytes(damage(bad.read_bytes()))
    loaded = load_table(tmp_path, table)
    assert [file.path for file in loaded.left_out] == [bad]
    assert reason in loaded.left_out[0].reason
    assert str(bad) in loaded.warnings[0]
    assert loaded.frame.collect()["cell_id"].unique(maintain_order=True).to_list() == ["aa", "cc"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_load_survives_any_flipped_bit(tmp_path: Path, where: float, bit: int):
    good, bad = row_file(tmp_path, "aa"), row_file(tmp_path, "bb")
    if not good.exists():
        write_cell(tmp_path, "aa")
        write_cell(tmp_path, "bb")
        (tmp_path / "intact").write_bytes(bad.read_bytes())
    content = bytearray((tmp_path / "intact").read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    bad.write_bytes(content)
    loaded = load_table(tmp_path, "runs")
    frame = loaded.frame.collect()
    if not loaded.left_out:  # the bit was in the words of the seal itself
        bad.write_bytes((tmp_path / "intact").read_bytes())
        assert frame.equals(load_table(tmp_path, "runs").frame.collect())
    else:
        assert [file.path for file in loaded.left_out] == [bad]
        assert frame["cell_id"].to_list() == ["aa"]


def test_load_leaves_out_a_file_of_another_cell(tmp_path: Path):
    write_cell(tmp_path, "aa")
    row_file(tmp_path, "bb").write_bytes(row_file(tmp_path, "aa").read_bytes())
    (left_out,) = load_table(tmp_path, "runs").left_out
    assert left_out.path.name == "bb.parquet"
    assert "cell aa" in left_out.reason


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"cell_id": pl.lit(7)}, "cell_id"),
        ({"fvu": pl.lit("low")}, "column fvu is String, not Float64"),
        ({"dict_size": pl.lit(0.5)}, "column dict_size is Float64, not Int64"),
        ({"groups": pl.lit(4)}, "column groups"),
        ({"seed": pl.lit(2**63, dtype=pl.UInt64)}, "values outside the schema"),
    ],
)
def test_load_leaves_out_a_foreign_schema(tmp_path: Path, columns: dict[str, Any], reason: str):
    write_cell(tmp_path, "aa")
    rewrite(row_file(tmp_path, "aa"), **columns)
    loaded = load_table(tmp_path, "runs")
    assert reason in loaded.left_out[0].reason
    assert loaded.frame.collect().schema == polars_schema("runs")


def test_load_leaves_out_a_run_of_two_rows(tmp_path: Path):
    write_cell(tmp_path, "aa")
    path = row_file(tmp_path, "aa")
    row = pl.read_parquet(io.BytesIO(path.read_bytes()))
    pl.concat([row, row]).write_parquet(path)
    assert "2 rows" in load_table(tmp_path, "runs").left_out[0].reason


def test_load_reads_older_and_newer_files(tmp_path: Path):
    for cell_id in ("aa", "bb", "cc"):
        write_cell(tmp_path, cell_id)
    old = row_file(tmp_path, "aa")
    pl.read_parquet(io.BytesIO(old.read_bytes())).drop("fvu", "groups").write_parquet(old)
    rewrite(row_file(tmp_path, "bb"), l0=pl.lit(4), seed=pl.lit(3, dtype=pl.Int32), brand_new=pl.lit(1.0))
    rewrite(row_file(tmp_path, "cc"), fvu=pl.lit(0.25, dtype=pl.Float32), betas=pl.lit(None))
    loaded = load_table(tmp_path, "runs")
    frame = loaded.frame.collect()
    assert frame.schema == polars_schema("runs")
    assert frame["fvu"].to_list() == [None, 0.5, 0.25]
    assert frame["l0"].to_list() == [4.0, 4.0, 4.0]
    assert frame["seed"].to_list() == [0, 3, 0]
    assert loaded.left_out == ()
    assert loaded.unknown_columns == {"brand_new": 1}
    assert "brand_new of 1 runs file:" in loaded.warnings[0]


def test_load_ignores_files_that_are_being_written(tmp_path: Path):
    write_cell(tmp_path, "aa")
    content = row_file(tmp_path, "aa").read_bytes()
    (tmp_path / "runs" / ".bb.parquet.x1.tmp").write_bytes(content[:10])
    (tmp_path / "runs" / ".bb.parquet").write_bytes(content[:10])
    loaded = load_table(tmp_path, "runs")
    assert (loaded.n_files, loaded.left_out) == (1, ())


@pytest.mark.parametrize("table", ["curves", "latents", "sequences"])
def test_load_takes_committed_cells_only(tmp_path: Path, table: str):
    write_cell(tmp_path, "aa")
    write_cell(tmp_path, "bb")
    row_file(tmp_path, "bb").unlink()
    loaded = load_table(tmp_path, table)
    assert loaded.frame.collect()["cell_id"].unique().to_list() == ["aa"]
    assert (loaded.n_uncommitted, loaded.left_out) == (1, ())


def test_load_says_when_a_finished_cell_lacks_a_file(tmp_path: Path):
    write_cell(tmp_path, "aa")
    write_cell(tmp_path, "bb")
    (tmp_path / "curves" / "bb.parquet").unlink()
    loaded = load_table(tmp_path, "curves")
    assert loaded.warnings == ["1 finished cell without a file in curves/"]
    assert load_table(tmp_path, "latents").warnings == []
    (tmp_path / "contexts" / "bb.parquet").unlink()
    assert load_table(tmp_path, "contexts").warnings == []  # kept only where they were asked for


@pytest.mark.parametrize("name", ["a'; echo foo", "lr=1", "[ab]*?", "s3:", "with space"])
def test_load_reads_folders_with_hostile_names(tmp_path: Path, name: str):
    write_cell(tmp_path / name, "aa", fvu=0.125)
    frame = load_table(tmp_path / name, "runs").frame.collect()
    assert frame["fvu"].to_list() == [0.125]
    assert frame.columns == [column.name for column in TABLES["runs"]]


def test_load_of_an_empty_folder_is_an_empty_table(tmp_path: Path):
    loaded = load_table(tmp_path, "curves")
    assert loaded.frame.collect().is_empty()
    assert loaded.frame.collect_schema() == polars_schema("curves")


def test_open_results_refuses_what_is_not_a_results_folder(tmp_path: Path):
    with pytest.raises(ResultsError, match="does not exist"):
        open_results(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ResultsError, match="is not a results folder"):
        open_results(tmp_path)
    with pytest.raises(ResultsError, match="is not a results folder"):
        open_results(tmp_path / "thesis.txt")


def test_load_of_some_cells_reads_only_theirs(tmp_path: Path):
    for cell_id in ("aa", "bb", "cc"):
        write_cell(tmp_path, cell_id)
    row_file(tmp_path, "bb", "curves").write_bytes(b"")
    loaded = load_table(tmp_path, "curves", cells=["cc", "aa", "zz"])
    assert loaded.frame.collect()["cell_id"].unique(maintain_order=True).to_list() == ["aa", "cc"]
    assert (loaded.n_files, loaded.warnings) == (2, [])


def test_load_in_a_notebook_warns_of_what_it_leaves_out(tmp_path: Path):
    write_cell(tmp_path, "aa", fvu=0.25)
    write_cell(tmp_path, "bb")
    row_file(tmp_path, "bb").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out .*bb.parquet: it is empty"):
        frame = analysis.load(tmp_path)
    assert frame.select("fvu").collect()["fvu"].to_list() == [0.25]
    assert analysis.load(str(tmp_path), "curves").collect().height == 6


def test_load_of_an_unknown_table_names_the_tables(tmp_path: Path):
    with pytest.raises(ConfigError, match="runs, curves, latents, sequences"):
        load_table(tmp_path, "cells")


def test_load_leaves_out_a_value_repeated_twenty_million_times(tmp_path: Path):
    write_cell(tmp_path, "aa")
    path = row_file(tmp_path, "aa", "latents")
    pq.write_table(pa.table({"cell_id": pa.nulls(20_000_000), "density": pa.nulls(20_000_000)}), path)
    assert path.stat().st_size < 100_000
    assert "claims 40,000,000 values in" in load_table(tmp_path, "latents").left_out[0].reason
