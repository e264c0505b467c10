"""The program as a user runs it: real processes, the real command line, the tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from commands import GRID, ROOT
from commands import analysis_process as analysis
from commands import sweep_runner as run
from gangs import same_bytes

from sweep.config import cell_from_json
from sweep.launch.rounds import stopping
from sweep.paths import CacheFolder, ResultsFolder


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The README's tiny sweep, run once from another folder."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder / "out", run("-m", *GRID, "results_dir=out", cwd=folder)


def test_a_sweep_trains_evaluates_and_ranks(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = swept
    assert done.returncode == 0, done.stderr
    assert "4 cells: 4 new\n" in done.stdout
    assert "Traceback" not in done.stderr
    rows = pl.read_parquet(sorted((out / "runs").glob("*.parquet")))
    assert sorted(rows.select("dict_size", "top_k").rows()) == [(64, 4), (64, 8), (128, 4), (128, 8)]
    assert rows["fvu"].is_between(0.05, 0.95).all()
    for row in rows.iter_rows(named=True):
        assert row["l0"] == pytest.approx(row["top_k"], rel=0.1)
        cell = out / "cells" / row["cell_id"]
        assert {path.name for path in cell.iterdir()} - {".lock", ".attempt"} == {
            "config.json", "status.json", "metrics.json", "summary.txt", "log.txt", "transcoder",
        }  # fmt: skip
        assert json.loads((cell / "metrics.json").read_text())["fvu"] == row["fvu"]
        assert cell_from_json((cell / "config.json").read_text()).cell_id == row["cell_id"]
        for table in ("curves", "latents", "sequences"):
            assert pl.read_parquet(out / table / f"{row['cell_id']}.parquet").height > 0


def test_a_sweep_leaves_nothing_surprising(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = swept
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "README.txt", "runs", "curves", "latents", "sequences", "cells", "sweeps", "cache",
    }  # fmt: skip
    (sweep,) = (out / "sweeps").iterdir()
    record = json.loads(sweep.read_text())
    assert len(record["cell_ids"]) == 4
    assert "dict_size=64,128" in record["command"]


def test_the_same_command_again_runs_nothing(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = swept
    before = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    done = run("-m", *GRID, f"results_dir={out}")
    assert done.returncode == 0
    assert "4 cells: 4 done; nothing to run" in done.stdout
    assert before == {path: path.read_bytes() for path in out.rglob("*.parquet")}


def test_one_cell_without_multirun_takes_the_same_path(
    swept: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out, _ = swept
    again = run("model=tiny", "dict_size=64", "top_k=4", "steps=30", f"results_dir={out}", cwd=tmp_path)
    assert "1 cell: 1 done" in again.stdout
    assert not list(tmp_path.iterdir())


def test_rank_and_query_answer_from_the_folder(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = swept
    ranked = analysis("rank", str(out))
    assert ranked.returncode == 0, ranked.stderr
    assert "no published baseline" in ranked.stdout.lower()
    queried = analysis("query", str(out), "select dict_size, top_k, fvu, l0 from runs order by fvu", "--json")
    rows = json.loads(queried.stdout)
    assert len(rows) == 4
    assert [row["fvu"] for row in rows] == sorted(row["fvu"] for row in rows)


def test_dry_run_plans_and_writes_nothing(tmp_path: Path) -> None:
    done = run("-m", *GRID, "results_dir=out", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0
    assert "4 cells: 4 new" in done.stdout
    assert "first, once: model tiny made, text docstrings tokenised" in done.stdout
    assert "tokens through the language model once" in done.stdout
    assert re.search(r"4 cells, about \d+ s, memory about \d\.\d GiB", done.stdout)
    assert not list(tmp_path.iterdir())


def test_plan_shows_duplicates_and_they_run_once(tmp_path: Path) -> None:
    done = run("-m", "model=tiny", "dict_size=64", "top_k=4,4", "dry_run=true", cwd=tmp_path)
    assert "1 new, 1 duplicate" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nonsense=3"], 2, "nonsense=3 is not an option; see --help"),
        (["-m", "nonsense=3,4"], 2, "nonsense=4 is not an option; see --help"),
        (["dict_size=abc"], 2, "dict_size=abc must be a whole number"),
        (["-m", "dict_size=64,abc"], 2, "dict_size=abc must be a whole number"),
        (["-m", "dict_size=64", "top_k=4,99"], 2, "top_k=99 exceeds dict_size=64; choose at most 64"),
        (["dict_size=64", "groups=[8,8,64]"], 2, "groups=[8, 8, 64] must increase"),
        (["steps=-1"], 2, "steps=-1 must be at least 1"),
        (["model=unknown"], 2, "model=unknown does not exist; choose one of gemma-2-2b"),
        (["hook_in=mlp_in"], 2, "hook_in=mlp_in has two meanings"),
        (["layer=3"], 2, "layer=3 does not exist: tiny has layers 0 to 2"),
        (["-m", "results_dir=a,b"], 2, "results_dir=a,b cannot be swept"),
        (["device=tpu"], 2, "device=tpu is not a device"),
        (["+dict_sise=3"], 2, "dict_sise=3 is not an option; did you mean dict_size? See --help"),
        (["hydra/launcher=basic"], 2, "choose hydra/launcher=local"),
        (["hydra/sweeper=basic"], 2, "choose hydra/sweeper=grid"),
        (["-m", "experiment=smoke,null"], 2, "experiment=smoke,null is no preset; choose one of improved, options"),
        (["schedule=3"], 2, "schedule=3 is no preset; choose one of base, improved, tuned"),
        (["~schedule"], 2, "lr is missing; leave ~schedule out"),
        (["lr=???"], 2, "lr is missing; give it a value"),
        (["hydra.launcher=null"], 2, "hydra.launcher=null leaves nothing to run jobs with"),
        (["--resolve"], 2, "can only be used in conjunction with --cfg"),
        (["-m", "seed=range(3,0)"], 2, "seed=range(3,0) stands for no value"),
        (["-m", "lr=glob(1*)"], 2, "lr=glob(1*) stands for no value"),
        (["-m", "lr=interval(1e-3,1e-2)"], 2, "lr=interval(1e-3,1e-2): a grid takes single values"),
        (["data=file", f"dataset_path={__file__}.jsonl"], 2, "is not a file"),
        (["results_dir=/dev/null/x"], 2, "results_dir=/dev/null/x cannot be used"),
        (["cache_dir=/dev/null/x"], 2, "cache_dir=/dev/null/x cannot be used"),
        (["text_column='[/x]'", "top_k=99"], 2, "top_k=99 exceeds"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    flag, rest = (["-m"], arguments[1:]) if arguments[0] == "-m" else ([], arguments)
    model = [] if rest[0].startswith("model=") else ["model=tiny"]
    small = [value for value in ("dict_size=64", "top_k=4") if not any(a.startswith(value[:6]) for a in rest)]
    done = run(*flag, *model, *small, *rest, cwd=tmp_path)
    text = " ".join(done.stderr.split())
    assert done.returncode == code
    assert message in text
    assert "Traceback" not in text
    assert "HYDRA_FULL_ERROR" not in text
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = run("model=tiny", "dict_size=64", "top_k=4", f"results_dir={tmp_path}")
    assert done.returncode == 2
    assert "holds files that are not results of a sweep" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "message", "code"), [("", "is empty", 2), (" \n ", "is empty", 2), ("just a line", "too short", 1)]
)
def test_text_that_does_not_do_fails_with_a_message(
    content: str, message: str, code: int, tmp_path: Path, cache: CacheFolder
) -> None:
    (tmp_path / "corpus.txt").write_text(content)
    options = ["data=file", f"dataset_path={tmp_path / 'corpus.txt'}", f"cache_dir={cache.root}"]
    done = run("model=tiny", "dict_size=64", "top_k=4", *options, f"results_dir={tmp_path / 'out'}")
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/runs/*"))


def test_a_damaged_checkpoint_is_a_message_with_the_fix(tmp_path: Path, cache: CacheFolder) -> None:
    command = ["experiment=smoke", f"cache_dir={cache.root}", f"results_dir={tmp_path}", "checkpoint_steps=7"]
    assert run(*command, "keep_checkpoints=true").returncode == 0
    (row,) = (tmp_path / "runs").iterdir()
    row.unlink()
    for path in tmp_path.glob("cells/*/checkpoints/*/state.safetensors"):
        path.write_bytes(b"junk")
    done = run(*command)
    assert done.returncode == 1
    assert "no checkpoint of cell" in done.stderr
    assert "delete" in done.stderr
    assert "Traceback" not in done.stderr


LONG = ("experiment=smoke", "steps=3000", "epochs=1", "checkpoint_steps=50", "keep_checkpoints=true")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_process_resumes_to_the_same_bytes(
    number: signal.Signals, tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    arguments = [*LONG, f"cache_dir={cache.root}", f"results_dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "sweep_runner.py"), *arguments]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under nohup, which these tests may run with
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, ignored)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("cells/*/checkpoints/step_*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        assert "To go on:" in errors
    assert not list((tmp_path / "runs").iterdir())
    planned = run(*arguments, "dry_run=true")
    assert "1 resume" in planned.stdout
    newest = max(tmp_path.glob("cells/*/checkpoints/step_*"))
    if number == signal.SIGINT:
        content = bytearray((newest / "state.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "state.safetensors").write_bytes(content)
    resumed = run(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    warned = f"warning: checkpoint {newest} is damaged" in "".join(resumed.stdout.split("\n"))
    assert warned == (number == signal.SIGINT)
    (config,) = tmp_path.glob("cells/*/config.json")
    same_bytes(unbroken, ResultsFolder(tmp_path), cell_from_json(config.read_text()))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder) -> ResultsFolder:
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(*LONG, f"cache_dir={cache.root}", f"results_dir={folder}").returncode == 0
    return ResultsFolder(folder)


def test_a_sweep_under_nohup_does_not_hear_its_terminal_end() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping("it stops") as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_nobody_reads_ends_no_sweep(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "sweep_runner.py"), "-m", *GRID, f"results_dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        assert (process.stderr.read(), process.wait(timeout=120)) == ("", 0)
    assert len(list((tmp_path / "runs").glob("*.parquet"))) == 4


def test_a_text_without_its_column_is_refused_with_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "a"}\n')
    done = run("model=tiny", "data=file", f"dataset_path={path}", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{path}, line 1: text_column=text is not a column; set text_column= to one of: body" in done.stderr


def test_help_explains_options_by_group() -> None:
    done = run("--help")
    assert done.returncode == 0
    for part in ("Usage:", "Examples", "Capacity", "Schedule", "Workflow", "dict_size=4608", "Exit codes"):
        assert part in done.stdout
