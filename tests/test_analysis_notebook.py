"""The snippets of docs/queries.md, run as they stand on a results folder."""

import re
import shlex
from pathlib import Path

import polars as pl
import pytest
from make import write_cell
from typer.testing import CliRunner

from analysis.__main__ import app

PAGE = (Path(__file__).parents[1] / "docs" / "queries.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^python -m analysis (query .*)$", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, fvu in enumerate((0.5, 0.25)):
        write_cell(tmp_path / "results", f"cell{i}", options={"top_k": 4 + i}, fvu=fvu)
    monkeypatch.chdir(tmp_path)


def snippet(word: str) -> dict[str, object]:
    """What the snippet that imports `word` leaves behind."""
    (code,) = (code for code in SNIPPETS if re.search(rf"^import {word}\b", code, re.MULTILINE))
    names: dict[str, object] = {}
    exec(code, names)
    return names


def test_every_snippet_is_tested():
    assert len(SNIPPETS) == 4
    assert len(COMMANDS) == 4


def test_notebook():
    names = snippet("analysis")
    assert names["best"].rows()[0] == ("cell1", 64, 5, 0.25, 4.0)
    assert names["curves"]["cell_id"].unique().to_list() == ["cell1"]


def test_polars():
    (code,) = (code for code in SNIPPETS if "import polars" in code and "import analysis" not in code)
    names: dict[str, object] = {}
    exec(code, names)
    assert sorted(names["runs"]["fvu"]) == [0.25, 0.5]
    assert names["dead"].height == 2


def test_pandas():
    names = snippet("pandas")
    assert sorted(names["runs"]["fvu"]) == [0.25, 0.5]
    assert list(names["loss"].columns) == ["cell0", "cell1"]
    assert names["loss"].loc[1, "cell0"] == 0.5


def test_duckdb():
    names = snippet("duckdb")
    assert names["best"][0] == ("cell1", 0.25, 4.0)
    assert len(names["fvu"]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str):
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    if "--parquet" in command:
        assert pl.read_parquet("dense.parquet").height == 4
        assert result.stdout == ""
    else:
        assert result.stdout


def test_a_file_that_cannot_be_written_is_told():
    result = CliRunner().invoke(app, ["query", "select * from runs", "--parquet", "nowhere/x.parquet"])
    assert result.exit_code == 2
    assert "--parquet nowhere/x.parquet cannot be written" in result.stderr
