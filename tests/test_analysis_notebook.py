"""The snippets of docs/queries.md, run as they stand on a results folder, and the columns of the answers they show."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from commands import analysis
from make import write_cell

PAGE = (Path(__file__).parents[1] / "docs" / "queries.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL))
"""Each with what it prints."""
COMMANDS = re.findall(r"^python -m analysis (query [^\n]*)\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
"""Each with its answer."""


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, fvu in enumerate((0.5, 0.25)):
        write_cell(tmp_path / "results", f"cell{i}", options={"top_k": 4 + i}, fvu=fvu)
    monkeypatch.chdir(tmp_path)


def words(line: str) -> set[str]:
    return set(re.findall(r"\w+", line))


@pytest.fixture
def snippet(capsys: pytest.CaptureFixture[str]) -> Callable[[str], dict[str, Any]]:
    """What the snippet that begins with these words leaves behind; the columns it prints are those that are shown."""

    def ran(start: str) -> dict[str, Any]:
        ((code, shown),) = ((code, shown) for code, shown in SNIPPETS.items() if code.startswith(start))
        names: dict[str, Any] = {}
        exec(code, names)
        columns = re.findall(r"\b(?!shape\b)[a-z]\w+", shown.partition("---")[0].partition("varchar")[0])
        assert columns
        assert set(columns) <= words(capsys.readouterr().out)
        return names

    return ran


Snippet = Callable[[str], dict[str, Any]]


def test_every_snippet_and_command_is_tested():
    assert len(SNIPPETS) == PAGE.count("```python") == 4
    assert len(COMMANDS) == PAGE.count("python -m analysis query ") == 8


def test_notebook(snippet: Snippet):
    names = snippet("import polars as pl\n\nimport analysis")
    assert names["best"].rows()[0] == ("cell1", 64, 5, 0.25, 4.0)
    assert names["curves"]["cell_id"].unique().to_list() == ["cell1"]


def test_polars(snippet: Snippet):
    names = snippet("import polars as pl\n\nruns")
    assert sorted(names["runs"]["fvu"]) == [0.25, 0.5]
    assert names["dead"].height == 2


def test_pandas(snippet: Snippet):
    names = snippet("import pandas")
    assert sorted(names["runs"]["fvu"]) == [0.25, 0.5]
    assert list(names["loss"].columns) == ["cell0", "cell1"]
    assert names["loss"].loc[1, "cell0"] == 0.5


def test_duckdb(snippet: Snippet):
    names = snippet("import duckdb")
    assert names["best"][0] == ("cell1", 0.25, 4.0)
    assert len(names["fvu"].fetchall()) == 2


@pytest.mark.parametrize(("command", "shown"), COMMANDS)
def test_commands_answer_in_the_columns_that_are_shown(command: str, shown: str):
    result = analysis(*shlex.split(command))
    if "did you mean" in shown:
        assert (result.exit_code, result.stderr.splitlines()[0]) == (2, shown.splitlines()[0])
    elif "--parquet" in command:
        assert pl.read_parquet("dense.parquet").height == 4
        assert result.stdout == shown == ""
    else:
        assert (result.exit_code, result.stderr) == (0, "")
        if "--json" in command:
            assert list(json.loads(result.stdout)[0]) == list(json.loads(shown)[0])
        else:
            assert words(result.stdout.splitlines()[0]) == words(shown.splitlines()[0])


def test_a_file_that_cannot_be_written_is_told():
    result = analysis("query", "select * from runs", "--parquet", "nowhere/x.parquet")
    assert result.exit_code == 2
    assert "--parquet nowhere/x.parquet cannot be written (No such file or directory)" in result.stderr
