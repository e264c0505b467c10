"""The compact cache: the same table as without it, and never a reason to read a file twice."""

import shutil
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make import row_file, write_cell

from analysis import cache, files, tables
from analysis.tables import Loaded, load_table
from sweep.paths import ResultsFolder
from sweep.results import fingerprint


@pytest.fixture(autouse=True)
def cached_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CACHED_FROM", 1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells whose files were opened."""
    opened: list[str] = []
    original = files._checked
    monkeypatch.setattr(files, "_checked", lambda path: opened.append(path.stem) or original(path))
    return opened


def fvus(loaded: Loaded) -> dict[str, float]:
    return dict(loaded.frame.select("cell_id", "fvu").collect().iter_rows())


def test_what_did_not_change_is_not_read_again(tmp_path: Path, reads: list[str]):
    for cell_id in ("aa", "bb", "cc"):
        write_cell(tmp_path, cell_id)
    first = load_table(tmp_path, "runs")
    assert reads == ["aa", "bb", "cc"]
    again = load_table(tmp_path, "runs")
    assert reads == ["aa", "bb", "cc"]
    assert again.frame.collect().equals(first.frame.collect())
    write_cell(tmp_path, "ab", fvu=0.25)
    write_cell(tmp_path, "bb", fvu=0.125)
    assert fvus(load_table(tmp_path, "runs")) == {"aa": 0.5, "ab": 0.25, "bb": 0.125, "cc": 0.5}
    assert reads[3:] == ["ab", "bb"]


def test_what_was_left_out_stays_named(tmp_path: Path, reads: list[str]):
    write_cell(tmp_path, "aa")
    write_cell(tmp_path, "bb")
    pl.DataFrame({"cell_id": ["aa"], "brand_new": [1]}).write_parquet(row_file(tmp_path, "aa"))
    row_file(tmp_path, "bb").write_bytes(b"PAR1")
    first = load_table(tmp_path, "runs")
    assert len(first.warnings) == 2
    assert load_table(tmp_path, "runs").warnings == first.warnings
    assert reads == ["aa", "bb"]


def test_a_file_that_was_repaired_comes_back(tmp_path: Path):
    write_cell(tmp_path, "aa")
    write_cell(tmp_path, "bb")
    row_file(tmp_path, "bb").write_bytes(b"")
    assert len(load_table(tmp_path, "runs").left_out) == 1
    write_cell(tmp_path, "bb")
    loaded = load_table(tmp_path, "runs")
    assert (loaded.left_out, loaded.n_files) == ((), 2)


def test_a_damaged_cache_is_made_again(tmp_path: Path):
    write_cell(tmp_path, "aa")
    load_table(tmp_path, "runs")
    path = ResultsFolder(tmp_path).compact("runs")
    good = path.read_bytes()
    for bad in (b"", b"PAR1", good[: len(good) // 2], good[:100] + bytes([good[100] ^ 1]) + good[101:]):
        path.write_bytes(bad)
        assert fvus(load_table(tmp_path, "runs")) == {"aa": 0.5}
        assert path.read_bytes() == good


@pytest.mark.parametrize("change", ["FORMAT", "columns"])
def test_a_cache_of_another_version_is_made_again(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, change: str
):
    write_cell(tmp_path, "aa")
    load_table(tmp_path, "runs")
    if change == "FORMAT":
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    else:
        monkeypatch.setattr(cache, "fingerprint", lambda table: fingerprint(table)[::-1])
    load_table(tmp_path, "runs")
    assert reads == ["aa", "aa"]


def test_a_folder_that_takes_no_cache_is_read_all_the_same(tmp_path: Path):
    write_cell(tmp_path, "aa")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (tmp_path / "cache").write_text("not a folder")
    assert fvus(load_table(tmp_path, "runs")) == {"aa": 0.5}


def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(7):
        write_cell(tmp_path, f"cell{i}", fvu=i / 7)
    row_file(tmp_path, "cell3", "curves").write_bytes(b"")
    whole = load_table(tmp_path, "curves")
    ResultsFolder(tmp_path).compact("curves").unlink()
    monkeypatch.setattr(cache, "BATCH_FILES", 2)
    parts = load_table(tmp_path, "curves")
    assert parts.frame.collect().equals(whole.frame.collect())
    assert parts.left_out == whole.left_out


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_cache_never_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject):
    """Whatever is written, damaged or deleted between readings, the table is what a reader without cache sees."""
    folder = tmp_path / "results"
    shutil.rmtree(folder, ignore_errors=True)
    ResultsFolder(folder).create()
    for _ in range(3):
        for cell_id in data.draw(st.sets(st.sampled_from("abcdef"), max_size=3)):
            match data.draw(st.sampled_from(["write", "damage", "delete"])):
                case "write":
                    write_cell(folder, cell_id, fvu=data.draw(st.floats(0, 1)))
                case "damage":
                    row_file(folder, cell_id, data.draw(st.sampled_from(["runs", "curves"]))).write_bytes(b"PAR1")
                case "delete":
                    row_file(folder, cell_id).unlink(missing_ok=True)
        for table in ("runs", "curves"):
            with_cache = load_table(folder, table)
            with monkeypatch.context() as patch:
                patch.setattr(tables, "CACHED_FROM", 1000)
                without = load_table(folder, table)
            assert with_cache.frame.collect().equals(without.frame.collect())
            assert with_cache.warnings == without.warnings
