"""`python -m sweep`: how every command is typed, how it refuses, and how light it starts."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from commands import sweep as run
from make import make_cell, write_cell

from sweep.__main__ import app
from sweep.launch.rounds import freeze
from sweep.paths import ResultsFolder

COMMANDS = [command.name for command in app.registered_commands]


def test_start_loads_nothing_heavy() -> None:
    code = "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module('sweep', run_name='__main__')\n"
    code += (
        "except SystemExit: pass\nprint(sorted({'torch', 'transformer_lens', 'polars', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command_and_each_has_examples() -> None:
    text = run("--help").stdout
    for command in COMMANDS:
        assert command in text
        helped = run(command, "--help")
        assert helped.exit_code == 0
        assert f"python -m sweep {command}" in helped.stdout


def test_no_command_shows_the_help() -> None:
    assert "evaluate" in run().output


@pytest.mark.parametrize("option", ["--batch_size", "--batch-size"])
def test_options_are_spelled_either_way(option: str) -> None:
    refused = run("evaluate", "--checkpoint", "nowhere", option, "0")
    assert refused.exit_code == 2
    assert "Invalid value for '--batch-size'" in refused.output


def test_a_mistyped_option_is_refused_with_a_hint() -> None:
    refused = run("evaluate", "--chekpoint", "x")
    assert refused.exit_code == 2
    assert "--checkpoint" in refused.output


@pytest.mark.parametrize("command", ["status", "collect"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("{}", "is not the config of a cell of this version"), (" " * 2_000_000, "larger than")],
)
def test_a_cell_whose_config_cannot_be_read_is_one_message(
    command: str, content: str, message: str, tmp_path: Path
) -> None:
    write_cell(tmp_path, "a")
    config = ResultsFolder(tmp_path).cell("a").config
    config.parent.mkdir(parents=True)
    config.write_text(content)
    good = make_cell()
    freeze(good, ResultsFolder(tmp_path))
    told = run(command, tmp_path)
    assert told.exit_code == (0 if command == "status" else 2)
    assert (good.cell_id in told.stdout) == (command == "status")  # the others are shown
    assert message in told.stderr
    assert told.stderr.endswith("; move its folder away\n")
    assert len(told.stderr.splitlines()) == 1
