"""`python -m analysis`: what goes to stdout, what to stderr, the exit codes, and how light it starts."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from commands import ROOT
from commands import analysis as run
from commands import analysis_process as process
from make import row_file, write_cell

from analysis import files, show
from analysis.query import tables_named
from sweep.results import TABLES

COMMANDS = (["rank"], ["effects"], ["query"], ["report"], ["schema"])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Four finished cells."""
    folder = tmp_path / "results"
    for i, (width, top_k, fvu) in enumerate([(64, 4, 0.7), (64, 8, 0.5), (128, 4, 0.6), (128, 8, 1 / 3)]):
        write_cell(folder, f"cell{i}", options={"dict_size": width, "top_k": top_k}, fvu=fvu, l0=float(top_k))
    return folder


def test_rank_and_query_work_as_a_process(results: Path):
    rank = process("rank", results)
    assert (rank.returncode, rank.stderr) == (0, "")
    assert "tiny layer 1 target mlp_out: 4 runs" in rank.stdout
    query = process("query", results, "select dict_size, top_k, fvu, l0 from runs order by fvu")
    assert (query.returncode, query.stderr) == (0, "")
    assert [line.split() for line in query.stdout.splitlines() if line[:1] != "─"] == [
        ["dict_size", "top_k", "fvu", "l0"],
        ["128", "8", "0.3333", "8"],
        ["64", "8", "0.5", "8"],
        ["128", "4", "0.6", "4"],
        ["64", "4", "0.7", "4"],
    ]


def test_start_loads_nothing_heavy():
    code = "import sys, runpy; sys.argv[1:] = ['--help']\n"
    code += "import analysis\ntry: runpy.run_module('analysis', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformer_lens', 'polars', 'pyarrow'} & set(sys.modules)))"
    assert process(code=code).stdout.splitlines()[-1] == "[]"


def test_rank_loads_no_torch(results: Path):
    code = f"import sys, runpy; sys.argv[1:] = ['rank', {str(results)!r}]\n"
    code += "try: runpy.run_module('analysis', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformer_lens', 'polars'} & set(sys.modules)))"
    assert process(code=code).stdout.splitlines()[-1] == "['polars']"


def test_a_reader_that_had_enough_ends_it_quietly(results: Path):
    sql = "select a.cell_id from curves a cross join curves b cross join curves c cross join curves d"
    command = [sys.executable, "-m", "analysis", "query", str(results), sql, "--csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"cell_id\n"
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == b""
    assert child.returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: list[str]):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"python -m analysis {command[0]}" in result.stdout


def test_results_is_the_folder_taken_when_none_is_named(results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(results.parent)
    assert "4 runs" in run("rank").stdout
    assert json.loads(run("query", "select count(*) as n from runs", "--json").stdout) == [{"n": 4}]


def test_rank_json_is_records_best_first(results: Path):
    found = json.loads(run("rank", results, "--json").stdout)
    assert [record["cell_id"] for record in found] == ["cell3", "cell1", "cell2", "cell0"]
    assert found[0]["fvu"] == 1 / 3
    assert found[0]["groups"] == [16, 32, 64, 96, 128]
    assert [record["pareto"] for record in found] == [True, False, True, False]


def test_rank_csv_has_the_same_records(results: Path):
    lines = list(csv.DictReader(io.StringIO(run("rank", results, "--csv").stdout)))
    assert [line["cell_id"] for line in lines] == ["cell3", "cell1", "cell2", "cell0"]
    assert float(lines[0]["fvu"]) == 1 / 3
    assert json.loads(lines[0]["groups"]) == [16, 32, 64, 96, 128]


def test_rank_where_and_top_choose_runs(results: Path):
    found = json.loads(run("rank", results, "--where", "dict_size = 64 and l0 < 9", "--json").stdout)
    assert [record["cell_id"] for record in found] == ["cell1", "cell0"]
    assert [r["cell_id"] for r in json.loads(run("rank", results, "--top", 1, "--json").stdout)] == ["cell3"]
    none = run("rank", results, "--where", "dict_size = 1", "--json")
    assert (none.exit_code, json.loads(none.stdout)) == (0, [])
    assert "no run satisfies dict_size = 1" in none.stderr


def test_rank_says_how_many_runs_a_condition_left_out(results: Path):
    result = run("rank", results, "--where", "dict_size = 64")
    assert result.stderr == "left out 2 of 4 runs: they do not satisfy dict_size = 64\n"
    assert "2 runs" in result.stdout


def test_rank_by_a_column_that_is_no_metric_names_those_that_are(results: Path):
    result = run("rank", results, "--by", "lr")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "choose one of fvu" in result.stderr


def test_rank_json_names_what_it_does_not_rank_on_stderr(results: Path):
    write_cell(results, "odd", options={"lr": 0.5}, fvu=None)
    result = run("rank", results, "--json")
    assert len(json.loads(result.stdout)) == 4
    assert result.stderr == "left out odd: its fvu is missing\n"


@pytest.mark.parametrize("condition", ["width = 64", "dict_size =", "dict_size", "fvu = 'low'", "fvu < 1; drop"])
def test_rank_with_a_bad_condition_names_the_columns(results: Path, condition: str):
    result = run("rank", results, "--where", condition)
    assert (result.exit_code, result.stdout) == (2, "")
    problem, columns, *_ = result.stderr.splitlines()
    assert problem.startswith("SQL: ")
    assert columns.startswith("runs: cell_id, kind, ")


def test_query_json_says_null_for_what_json_cannot_say(results: Path):
    write_cell(results, "odd", fvu=float("nan"), l0=float("inf"), mse=None, betas=[0.5, float("nan")])
    result = run("query", results, "select fvu, l0, mse, betas from runs where cell_id = 'odd'", "--json")
    assert json.loads(result.stdout) == [{"fvu": None, "l0": None, "mse": None, "betas": [0.5, None]}]


def test_query_csv_keeps_every_digit(results: Path):
    result = run("query", results, "select cell_id, fvu, groups from runs order by fvu limit 1", "--csv")
    assert result.stdout == f'cell_id,fvu,groups\ncell3,{1 / 3!r},"[16, 32, 64, 96, 128]"\n'


def test_query_without_rows_is_an_empty_list(results: Path):
    assert json.loads(run("query", results, "select * from runs where fvu > 9", "--json").stdout) == []


def test_query_joins_tables(results: Path):
    sql = "select r.top_k, c.value from runs r join curves c on r.cell_id = c.cell_id where c.step = 2 and r.fvu < 0.4"
    assert json.loads(run("query", results, sql, "--json").stdout) == [{"top_k": 8, "value": 1 / 3}]


def test_query_says_how_many_rows_it_did_not_show(results: Path):
    sql = "select cell_id, step from curves"
    assert "9 more of 12 rows" in run("query", results, sql, "--limit", 3).stdout
    assert "more of" not in run("query", results, sql, "--limit", 0).stdout
    assert len(json.loads(run("query", results, sql, "--limit", 3, "--json").stdout)) == 12


@pytest.mark.parametrize(
    ("sql", "problem", "names"),
    [
        ("select width from runs", 'unable to find column "width"', "runs: cell_id, kind"),
        ("select fuv from runs", "did you mean fvu", "runs: cell_id, kind"),
        ("select fvu from run", "did you mean runs", "runs: cell_id, kind"),
        ("drop table runs", "nothing can be changed here", "begin with select"),
        ("select * from cells", "'cells' was not found", "curves: cell_id, step, metric, value"),
        ("selec", "sql parser error", "sequences: cell_id"),
        ("select fvu from runs where fvu = 'low'", "cannot compare string", "more tables: curves, latents"),
    ],
)
def test_query_with_bad_sql_gives_one_line_and_the_names(results: Path, sql: str, problem: str, names: str):
    result = run("query", results, sql)
    assert (result.exit_code, result.stdout) == (2, "")
    assert problem in result.stderr.splitlines()[0]
    assert names in result.stderr
    assert "Resolved plan" not in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_query_reads_only_the_tables_it_names(results: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    original = files._checked
    monkeypatch.setattr(files, "_checked", lambda path: read.append(path) or original(path))
    assert run("query", results, "select count(*) from latents").exit_code == 0
    assert {path.parent.name for path in read} == {"latents"}


def test_tables_named_misses_none():
    assert tables_named('select * from "runs" join curves using (cell_id)') == ["runs", "curves"]
    assert tables_named("show tables") == []


def test_query_needs_sql_in_one_piece(results: Path):
    assert "no SQL after" in run("query", results).stderr
    assert "put the statement in quotes" in run("query", results, "select", "*").stderr
    assert run("query").exit_code == run("query", results).exit_code == 2


@pytest.mark.parametrize("words", [["rank"], ["query", "select * from runs"]])
def test_json_and_csv_exclude_each_other(results: Path, words: list[str]):
    result = run(words[0], results, *words[1:], "--json", "--csv")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "not both" in result.stderr


@pytest.mark.parametrize("words", [["rank"], ["query", "select cell_id from runs"]])
def test_an_empty_folder_says_what_to_run(tmp_path: Path, words: list[str]):
    folder = tmp_path / "no runs"
    folder.mkdir()
    result = run(words[0], folder, *words[1:], "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, [])
    command = "python sweep_runner.py -m model=tiny dict_size=64,128 top_k=4,8 steps=30 results_dir="
    assert f"{command}'{folder}'" in result.stderr


@pytest.mark.parametrize("words", [["rank"], ["query", "select cell_id from runs"]])
def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, words: list[str]):
    missing = run(words[0], tmp_path / "nowhere", *words[1:])
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert "does not exist" in missing.stderr
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "thesis.txt").write_text("mine")
    foreign = run(words[0], tmp_path, *words[1:])
    assert (foreign.exit_code, foreign.stdout) == (2, "")
    assert "is not a results folder" in foreign.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]


def test_damaged_files_are_named_on_stderr_only(results: Path):
    row_file(results, "cell0").write_bytes(b"")
    row_file(results, "cell1").write_bytes(row_file(results, "cell1").read_bytes()[:-100])
    result = run("rank", results, "--json")
    assert result.exit_code == 0
    assert [record["cell_id"] for record in json.loads(result.stdout)] == ["cell3", "cell2"]
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        f"left out {row_file(results, 'cell0')}",
        f"left out {row_file(results, 'cell1')}",
    ]


def test_a_folder_of_damaged_files_is_not_called_empty(results: Path):
    for path in (results / "runs").iterdir():
        path.write_bytes(b"")
    result = run("rank", results)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no readable run: all 4 files are left out" in result.stderr
    assert "sweep_runner" not in result.stderr


def test_schema_lists_every_column_of_every_table():
    found = json.loads(run("schema", "--json").stdout)
    wanted = [(table, column.name) for table, columns in TABLES.items() for column in columns]
    assert [(record["table"], record["column"]) for record in found] == wanted
    text = run("schema", "curves").stdout
    assert "training step, from 0" in text
    assert "batches_since_fired" not in text
    assert len(run("schema", "runs", "--csv").stdout.splitlines()) == len(TABLES["runs"]) + 1


def test_schema_of_an_unknown_table_names_the_tables():
    result = run("schema", "cells")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "runs, curves, latents, sequences" in result.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "True"),
        (18432, "18432"),
        (1 / 3, "0.3333"),
        (123456.7, "123457"),
        (4e-7, "4e-07"),
        (float("nan"), "nan"),
        ([8, 16], "[8,16]"),
        ("\x1b[2Jgone\n", "?[2Jgone?"),
    ],
)
def test_readable_gives_four_digits_and_no_control_characters(value: object, text: str):
    assert show.readable(value) == text


def test_a_table_in_a_narrow_terminal_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(show.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setenv("TERM", "xterm")
    text = show.as_table(["fvu_per_dimension", "cell_id"], [[0.12345, "0123456789"]])
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "fvu_per_" in text
    assert "dimension" in text
    assert "0.1235" in text
    assert "0123456789" in text
    assert max(map(len, text.splitlines())) <= 24


def test_tables_are_whole_where_nobody_reads_them():
    frame = pl.DataFrame({f"a_long_column_name_{i}": [i] for i in range(30)})
    lines = show.as_table(frame.columns, frame.rows()).splitlines()
    assert lines[0].split() == frame.columns
    assert os.linesep not in lines[0]
