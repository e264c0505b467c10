"""The schema as data, and tables that are written whole."""

from pathlib import Path

import polars as pl
import pytest
from make import make_cell

from sweep.paths import ResultsFolder
from sweep.results import OPTIONAL_TABLES, OPTIONS, TABLES, polars_schema, seal_holds, write_run, write_table


def test_every_column_has_a_meaning_and_a_unique_name() -> None:
    for columns in TABLES.values():
        names = [column.name for column in columns]
        assert len(names) == len(set(names))
        assert all(len(column.doc) > 3 for column in columns)


def test_every_number_has_a_unit_and_nothing_else_has_one() -> None:
    for columns in TABLES.values():
        for column in columns:
            assert bool(column.unit) == ("int" in column.dtype or "float" in column.dtype), column.name


def test_option_columns_are_the_options_of_a_cell() -> None:
    assert [column.name for column in OPTIONS] == list(make_cell().flat())


def test_write_table_casts_fills_and_keeps_floats_exact(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_table("curves", path, [{"cell_id": "a", "step": 1, "value": 0.1 + 0.2}, {"cell_id": "a", "metric": "loss"}])
    frame = pl.read_parquet(path)
    assert frame.schema == polars_schema("curves")
    assert frame.rows() == [("a", 1, None, 0.1 + 0.2), ("a", None, "loss", None)]


def test_write_table_refuses_a_column_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="speed"):
        write_table("curves", tmp_path / "x.parquet", [{"speed": 3}])
    assert not list(tmp_path.iterdir())


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    rows = [{"cell_id": "a", "step": i, "metric": "loss", "value": i / 3} for i in range(100)]
    for name in ("a", "b"):
        write_table("curves", tmp_path / name, rows)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_flipped_byte_breaks_the_seal(tmp_path: Path) -> None:
    write_table("curves", tmp_path / "x", [{"cell_id": "a", "step": 1}])
    content = (tmp_path / "x").read_bytes()
    assert seal_holds(content) is True
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        assert seal_holds(bytes(flipped)) is not True
    assert seal_holds(content[:-1]) is False


def test_the_row_in_runs_is_the_last_to_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultsFolder(tmp_path)
    results.create()
    written: list[str] = []
    monkeypatch.setattr("sweep.results.write_table", lambda table, path, rows: written.append(table))
    write_run(results, "a", {table: [] for table in TABLES})
    assert written[-1] == "runs"
    assert {*written} | {*OPTIONAL_TABLES} == {*TABLES}
