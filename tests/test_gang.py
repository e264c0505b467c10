"""A gang is its cells run alone, on one pass; a stopped or killed run ends in the bytes of an unbroken one."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from gangs import gang_cells, make_workflow, run_cells, same_bytes
from make import make_cell

from sweep.config import as_json
from sweep.errors import Interrupted
from sweep.job import run_gang
from sweep.launch.rounds import freeze
from sweep.locks import try_lock
from sweep.paths import CacheFolder, ResultsFolder
from sweep.progress import silent
from sweep.results import read_row
from sweep.status import read_status
from sweep.tokens import row_counts


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder) -> ResultsFolder:
    """The gang, run once without an interruption and without cached activations."""
    workflow = make_workflow(tmp_path_factory.mktemp("unbroken"), cache, cache_gib=0.0)
    return run_cells(gang_cells(), workflow)


def runs(results: ResultsFolder) -> pl.DataFrame:
    return pl.read_parquet(sorted(results.table("runs").glob("*.parquet")))


@pytest.mark.parametrize("index", range(4))
def test_gang_is_bit_identical_to_solo_runs(
    unbroken: ResultsFolder, index: int, tmp_path: Path, cache: CacheFolder
) -> None:
    cell = gang_cells()[index]
    solo = run_cells([cell], make_workflow(tmp_path, cache))
    same_bytes(unbroken, solo, cell)


def test_gang_revives_dead_latents_in_that_comparison(unbroken: ResultsFolder) -> None:
    curve = pl.read_parquet(unbroken.row("curves", gang_cells()[3].cell_id))
    assert curve.filter(pl.col("metric") == "n_dead")["value"].max() > 0
    assert curve.filter(pl.col("metric") == "aux_loss").height > 0


def test_gang_costs_one_language_model_pass(unbroken: ResultsFolder) -> None:
    rows = row_counts(gang_cells()[0].data)
    n_tokens = runs(unbroken)["n_language_model_tokens"].unique().to_list()
    longest = max(cell.schedule.steps for cell in gang_cells())
    epochs = -(-longest * 64 // (rows["train"] * 31))
    assert epochs == 2
    refitted_on = rows["train"]  # read again, as nothing is kept here
    assert n_tokens == [(epochs * rows["train"] + refitted_on + rows["calibration"] + rows["heldout"]) * 32]
    assert runs(unbroken)["gang_size"].unique().to_list() == [4]


def test_cache_changes_cost_and_no_byte(unbroken: ResultsFolder, tmp_path: Path, cache: CacheFolder) -> None:
    fresh = CacheFolder(tmp_path / "cache")
    first = run_cells(gang_cells(), make_workflow(tmp_path / "a", fresh))
    again = run_cells(gang_cells(), make_workflow(tmp_path / "b", fresh))
    for cell in gang_cells():
        same_bytes(unbroken, first, cell)
        same_bytes(unbroken, again, cell)
    rows = row_counts(gang_cells()[0].data)
    assert runs(first)["n_language_model_tokens"].unique().to_list() == [sum(rows.values()) * 32]
    assert runs(again)["n_language_model_tokens"].unique().to_list() == [0]


def test_damaged_cache_is_harvested_again(unbroken: ResultsFolder, tmp_path: Path) -> None:
    fresh = CacheFolder(tmp_path / "cache")
    run_cells(gang_cells()[:1], make_workflow(tmp_path / "a", fresh))
    blocks = sorted(fresh.root.glob("activations/*/*/*.safetensors"))
    blocks[0].write_bytes(blocks[0].read_bytes()[:100])
    blocks[1].write_bytes(b"")
    again = run_cells(gang_cells()[:1], make_workflow(tmp_path / "b", fresh))
    same_bytes(unbroken, again, gang_cells()[0])


@pytest.mark.parametrize("stop_at", [1, 17, 30, 44])
def test_a_stopped_gang_resumes_to_the_same_bytes(
    unbroken: ResultsFolder, stop_at: int, tmp_path: Path, cache: CacheFolder
) -> None:
    workflow = make_workflow(tmp_path, cache)
    reached = 0

    def report(phase: str, done: int, total: int, unit: str) -> None:
        nonlocal reached
        reached = max(reached, done) if phase == "train" else reached

    with pytest.raises(Interrupted):
        run_cells(gang_cells(), workflow, report, stop=lambda: reached >= stop_at)
    results = ResultsFolder(tmp_path)
    statuses = [read_status(results.cell(cell.cell_id)) for cell in gang_cells()]
    assert {status.state for status in statuses} == {"interrupted"}
    assert [s.step for s in statuses] == [min(stop_at, cell.schedule.steps) for cell in gang_cells()]
    assert not list(results.table("runs").iterdir())
    run_cells(gang_cells(), workflow)
    for cell in gang_cells():
        same_bytes(unbroken, results, cell)
        assert read_status(results.cell(cell.cell_id)).attempts == 2
        row = pl.read_parquet(results.row("runs", cell.cell_id)).row(0, named=True)
        if n_steps := max(cell.schedule.steps - stop_at, 0):  # the pace is that of the last attempt alone
            n_tokens = row["training_tokens_per_second"] * row["seconds"]
            assert n_tokens == pytest.approx(n_steps * cell.schedule.batch_size)
        else:
            assert row["training_tokens_per_second"] is None


def test_a_gang_of_cells_at_different_steps_ends_in_the_same_bytes(
    unbroken: ResultsFolder, tmp_path: Path, cache: CacheFolder
) -> None:
    workflow = make_workflow(tmp_path, cache)
    steps = 0

    def report(phase: str, done: int, total: int, unit: str) -> None:
        nonlocal steps
        steps = done if phase == "train" else steps

    with pytest.raises(Interrupted):
        run_cells(gang_cells()[:2], workflow, report, stop=lambda: steps >= 13)
    results = run_cells(gang_cells(), workflow)
    for cell in gang_cells():
        same_bytes(unbroken, results, cell)


def test_damage_to_the_last_checkpoint_of_a_member_costs_steps_and_no_byte(
    unbroken: ResultsFolder, tmp_path: Path, cache: CacheFolder
) -> None:
    workflow, cells = make_workflow(tmp_path, cache), gang_cells()[1::-1]
    reached = 0

    def report(phase: str, done: int, total: int, unit: str) -> None:
        nonlocal reached
        reached = done if phase == "train" else reached

    with pytest.raises(Interrupted):
        run_cells(cells, workflow, report, stop=lambda: reached >= 27)
    results = ResultsFolder(tmp_path)
    damaged = results.cell(cells[0].cell_id).checkpoint(27) / "state.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(Interrupted):  # it goes on from step 20, and what is damaged does not count among the last two
        run_cells(cells, workflow, report, stop=lambda: reached == 21)
    assert [results.cell(cell.cell_id).checkpoint_steps() for cell in cells] == [[20, 21], [20, 27]]
    notes = [" ".join(read_status(results.cell(cell.cell_id)).notes) for cell in cells]
    assert f"checkpoint {damaged.parent} is damaged" in notes[0]
    assert "is damaged" not in notes[1]
    run_cells(cells, workflow)
    for cell in cells:
        same_bytes(unbroken, results, cell)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from gangs import gang_cells, make_workflow, run_cells
from sweep.paths import CacheFolder

def report(phase, done, total, unit):
    if phase == {phase!r} and done >= {at}:
        os.kill(os.getpid(), signal.SIGKILL)

run_cells(gang_cells(), make_workflow(Path({root!r}), CacheFolder(Path({cache!r}))), report)
"""


@pytest.mark.parametrize(("phase", "at"), [("train", 26), ("fit decoders", 3), ("fit thresholds", 2)])
def test_a_killed_gang_resumes_to_the_same_bytes(
    unbroken: ResultsFolder, phase: str, at: int, tmp_path: Path, cache: CacheFolder
) -> None:
    tests = str(Path(__file__).parent)
    script = KILLED.format(tests=tests, phase=phase, at=at, root=str(tmp_path), cache=str(cache.root))
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(tests).parent, check=False, timeout=120)
    assert killed.returncode == -9
    results = ResultsFolder(tmp_path)
    before = [results.cell(cell.cell_id).checkpoint_steps() for cell in gang_cells()]
    assert all(before)
    assert not list(results.table("runs").iterdir())
    run_cells(gang_cells(), make_workflow(tmp_path, cache))
    for cell in gang_cells():
        same_bytes(unbroken, results, cell)


def test_a_failing_cell_leaves_the_gang_and_the_others_go_on(
    unbroken: ResultsFolder, tmp_path: Path, cache: CacheFolder
) -> None:
    diverging = make_cell(lr=1e30, seed=9)
    results = run_cells([gang_cells()[0], diverging], make_workflow(tmp_path, cache))
    same_bytes(unbroken, results, gang_cells()[0])
    status = read_status(results.cell(diverging.cell_id))
    assert status.state == "diverged"
    assert status.failures == 1
    assert "try a lower lr" in status.error["message"]
    assert "Traceback" in status.error["traceback"]
    assert read_row(results.row("runs", diverging.cell_id))["status"] == "diverged"


def test_a_cell_somebody_else_is_at_is_left_alone(tmp_path: Path, cache: CacheFolder) -> None:
    cell = gang_cells()[0]
    ResultsFolder(tmp_path).create()
    folder = ResultsFolder(tmp_path).cell(cell.cell_id)
    lock = try_lock(folder.lock)
    assert lock is not None
    results = run_cells([cell], make_workflow(tmp_path, cache))
    lock.close()
    assert not results.row("runs", cell.cell_id).exists()
    assert not folder.status.exists()


def test_a_cell_finished_since_it_was_planned_is_not_run_again(
    unbroken: ResultsFolder, tmp_path: Path, cache: CacheFolder
) -> None:
    workflow = make_workflow(tmp_path, cache)
    results = run_cells(gang_cells()[:1], workflow)
    status = results.cell(gang_cells()[0].cell_id).status
    before = status.read_bytes()
    run_cells(gang_cells()[:2], workflow)
    assert status.read_bytes() == before
    for cell in gang_cells()[:2]:
        same_bytes(unbroken, results, cell)
        assert read_status(results.cell(cell.cell_id)).attempts == 1


def test_a_cell_whose_row_is_damaged_is_run_again(unbroken: ResultsFolder, tmp_path: Path, cache: CacheFolder) -> None:
    workflow, cell = make_workflow(tmp_path, cache), gang_cells()[0]
    row = run_cells([cell], workflow).row("runs", cell.cell_id)
    row.write_bytes(row.read_bytes()[:-1])
    same_bytes(unbroken, run_cells([cell], workflow), cell)


def test_checkpoints_go_when_the_run_is_committed(tmp_path: Path, cache: CacheFolder) -> None:
    cell = gang_cells()[0]
    results = run_cells([cell], make_workflow(tmp_path, cache, keep_checkpoints=False))
    assert results.row("runs", cell.cell_id).exists()
    assert not results.cell(cell.cell_id).checkpoints.exists()


def test_each_log_speaks_of_its_own_cell(unbroken: ResultsFolder) -> None:
    for cell in gang_cells():
        lines = unbroken.cell(cell.cell_id).log.read_text().splitlines()
        assert sum(f"start at step 0 of {cell.schedule.steps}" in line for line in lines) == 1
        assert sum("done: fvu" in line for line in lines) == 1


def test_threshold_gives_the_asked_l0_on_held_out_rows(tmp_path: Path, cache: CacheFolder) -> None:
    tokens = {"n_calibration_tokens": 8192, "n_heldout_tokens": 8192}
    cells = [make_cell(top_k=top_k, dict_size=dict_size, **tokens) for top_k, dict_size in ((4, 64), (8, 128))]
    rows = runs(run_cells(cells, make_workflow(tmp_path, cache)))
    assert rows.height == 2
    for row in rows.iter_rows(named=True):
        assert row["l0"] == pytest.approx(row["top_k"], rel=0.1)
        assert row["threshold"] > 0


def test_a_cell_whose_hook_the_model_lacks_leaves_before_the_first_step(
    unbroken: ResultsFolder, tmp_path: Path
) -> None:
    lacking = make_cell(hook_in="blocks.1.mlp.hook_nonsense")
    fresh = CacheFolder(tmp_path / "cache")
    results = run_cells([lacking, gang_cells()[0]], make_workflow(tmp_path / "out", fresh))
    same_bytes(unbroken, results, gang_cells()[0])
    status = read_status(results.cell(lacking.cell_id))
    assert (status.state, status.error["class"]) == ("failed", "ModelError")
    assert "hook_in=blocks.1.mlp.hook_nonsense" in status.error["message"]


def test_an_error_before_training_ends_in_every_status(tmp_path: Path, cache: CacheFolder) -> None:
    (tmp_path / "short.txt").write_text("too short")
    cells = [make_cell(dataset_path=str(tmp_path / "short.txt"), seed=seed) for seed in (0, 1)]
    results = run_cells(cells, make_workflow(tmp_path / "out", cache))
    for cell in cells:
        status = read_status(results.cell(cell.cell_id))
        assert (status.state, status.error["class"]) == ("failed", "TooShort")
    assert not list(results.table("runs").iterdir())


def test_weights_that_overflow_in_the_last_step_are_a_divergence(tmp_path: Path, cache: CacheFolder) -> None:
    cell = make_cell(steps=1, lr=1e300)
    results = run_cells([cell], make_workflow(tmp_path, cache))
    assert read_status(results.cell(cell.cell_id)).state == "diverged"
    assert results.cell(cell.cell_id).checkpoint_steps() == [0]
    assert not results.cell(cell.cell_id).transcoder.exists()


@pytest.mark.parametrize(("facts", "message"), [({"d_in": 16}, "d_in=16"), ({"n_layers": 9}, "n_layers=9")])
def test_wrong_facts_about_the_model_are_refused_with_a_warm_cache(
    unbroken: ResultsFolder, facts: dict[str, int], message: str, tmp_path: Path, cache: CacheFolder
) -> None:
    run_cells(gang_cells()[:1], make_workflow(tmp_path / "warm", cache))
    results = run_cells([make_cell(**facts)], make_workflow(tmp_path / "out", cache))
    (status,) = [read_status(results.cell(path.name)) for path in (results.root / "cells").iterdir()]
    assert status.state == "failed"
    assert message in status.error["message"]


def test_a_warning_stands_in_the_status_of_every_cell(cache: CacheFolder, tmp_path: Path) -> None:
    cells = [make_cell(steps=1, seed=seed) for seed in (1, 2)]
    results = run_cells(cells, make_workflow(tmp_path, cache, cache_gib=0.0))
    for cell in cells:
        (note,) = read_status(results.cell(cell.cell_id)).notes
        assert "are not cached: more than cache_gib=0" in note


@pytest.mark.parametrize("content", [b"{}", b"", b"another cell"])
def test_a_config_that_was_changed_costs_its_cell_alone(
    unbroken: ResultsFolder, content: bytes, tmp_path: Path, cache: CacheFolder
) -> None:
    cells = gang_cells()[:2]
    results = ResultsFolder(tmp_path)
    results.create()
    for cell in cells:
        freeze(cell, results)
    config = results.cell(cells[0].cell_id).config
    config.write_bytes(as_json(make_cell(seed=7)).encode() if content == b"another cell" else content)
    run_gang([cell.cell_id for cell in cells], make_workflow(tmp_path, cache), silent, lambda: False)
    status = read_status(results.cell(cells[0].cell_id))
    assert (status.state, status.attempts, status.failures) == ("failed", 1, 1)
    assert str(config) in status.error["message"]
    same_bytes(unbroken, results, cells[1])
