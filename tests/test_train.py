"""A run whose loss stops being a number goes back with a lower learning rate; whatever else happens, to the same bytes.

The fault: a step at a learning rate above LIMIT leaves weights and loss without a number, as an overflow would.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from gangs import make_workflow, run_cells, same_bytes
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell
from states import make_state

from sweep import checkpoint, devices, train
from sweep.errors import Interrupted
from sweep.paths import CacheFolder, CellFolder, ResultsFolder
from sweep.results import METRICS, TABLES, read_row
from sweep.state import TrainState
from sweep.status import read_status
from sweep.step.step import StepReport, train_step_

LIMIT = 6e-3
HEALTHY, ONCE, TWICE, NEVER = (make_cell(lr=lr, steps=40, warmup_steps=20) for lr in (5e-3, 1e-2, 2e-2, 4e-2))
CELLS = [HEALTHY, ONCE, TWICE, NEVER]


class Killed(BaseException):
    """The end of a process, as far as the code that runs in it can tell."""


def break_steps(patch: pytest.MonkeyPatch) -> None:
    def faulty(state: TrainState, *arguments: Any) -> StepReport:
        report = train_step_(state, *arguments)
        if report.lr <= LIMIT:
            return report
        state.params.W_enc.fill_(torch.nan)
        return replace(report, loss=replace(report.loss, total=report.loss.total * torch.nan))

    patch.setattr(train, "train_step_", faulty)


@pytest.fixture(autouse=True)
def fault(monkeypatch: pytest.MonkeyPatch) -> None:
    break_steps(monkeypatch)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder) -> ResultsFolder:
    with pytest.MonkeyPatch.context() as patch:
        break_steps(patch)
        return run_cells(CELLS, make_workflow(tmp_path_factory.mktemp("unbroken"), cache))


def rates(results: ResultsFolder, cell_id: str) -> dict[int, float]:
    """The learning rate of each step."""
    curve = pl.read_parquet(results.row("curves", cell_id)).filter(pl.col("metric") == "lr")
    return dict(zip(curve["step"].to_list(), curve["value"].to_list(), strict=True))


def test_a_run_goes_back_once_to_the_end_of_a_stage_then_to_the_start(unbroken: ResultsFolder) -> None:
    found = pl.read_parquet(sorted(unbroken.table("runs").glob("*.parquet"))).sort("lr").filter(status="done")
    assert found["rollbacks"].to_list() == [0, 1, 2]
    assert found["lr_factor"].to_list() == [1.0, 0.5, 0.25]
    healthy, once, twice = (rates(unbroken, cell.cell_id) for cell in (HEALTHY, ONCE, TWICE))
    for step in range(40):  # the last two fail first in steps 12 and 6, so go back to 10 and 4
        assert once[step] == pytest.approx(healthy[step] * (2 if step < 10 else 1))
        assert twice[step] == pytest.approx(healthy[step] * (2 if step < 4 else 1))


def test_a_run_that_fails_a_third_time_has_diverged(unbroken: ResultsFolder) -> None:
    status = read_status(unbroken.cell(NEVER.cell_id))
    assert (status.state, status.rollbacks, status.failures) == ("diverged", 2, 1)
    assert "lowered 2 times already; try a lower lr" in status.error["message"]
    row = read_row(unbroken.row("runs", NEVER.cell_id))
    assert (row["status"], row["failure"]) == ("diverged", status.error["message"])
    assert (row["rollbacks"], row["lr_factor"], row["lr"], row["seed"]) == (2, 0.25, 4e-2, NEVER.seed)
    assert all(row[column.name] is None for column in METRICS)
    assert min(rates(unbroken, NEVER.cell_id)) == 0
    assert not pl.read_parquet(unbroken.row("latents", NEVER.cell_id)).height


def same_failure(one: ResultsFolder, other: ResultsFolder) -> None:
    """Assert that the cell that diverged left the same row and the same curve."""
    volatile = [column.name for column in TABLES["runs"] if column.volatile]
    rows = [pl.read_parquet(found.row("runs", NEVER.cell_id)).drop(volatile) for found in (one, other)]
    assert rows[0].equals(rows[1])
    curves = [found.row("curves", NEVER.cell_id).read_bytes() for found in (one, other)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("index", range(3))
def test_the_gang_changes_no_byte_of_it(
    unbroken: ResultsFolder, index: int, tmp_path: Path, cache: CacheFolder
) -> None:
    same_bytes(unbroken, run_cells([CELLS[index]], make_workflow(tmp_path, cache)), CELLS[index])


def test_looking_at_losses_late_changes_no_byte_of_it(
    tmp_path: Path, cache: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_read: list[int] = []

    def first_not_finite(run: train.Run) -> int | None:
        n_read.append(len(run.unread))
        return looked(run)

    looked = train.Run._first_not_finite
    monkeypatch.setattr(train.Run, "_first_not_finite", first_not_finite)
    monkeypatch.setattr(train, "N_CURVE_POINTS", 5)
    found = []
    for waits in (False, True):
        monkeypatch.setattr(devices, "reading_waits", lambda tensor, waits=waits: waits)
        workflow = make_workflow(tmp_path / str(waits), cache, checkpoint_steps=7)
        found.append(run_cells([TWICE, NEVER], workflow))
        assert (max(n_read) > 1) == waits
    same_bytes(*found, TWICE)
    same_failure(*found)


def test_a_state_with_a_loss_that_is_not_finite_is_not_saved() -> None:
    state = make_state(0)
    saved: list[TrainState] = []
    run = train.Run(ONCE, state, saved.append, lambda step: state, 0)
    for losses, n_saved in (([], 1), ([1.0, 2.0], 2), ([1.0, math.inf, 2.0], 2)):
        run.unread = {step: (torch.tensor(loss), 1e-3) for step, loss in enumerate(losses)}
        run.checkpoint()
        assert len(saved) == n_saved


@pytest.mark.parametrize("checkpoint_steps", [1, 100])
def test_checkpoints_change_no_byte_of_it(
    unbroken: ResultsFolder, checkpoint_steps: int, tmp_path: Path, cache: CacheFolder
) -> None:
    results = run_cells([ONCE, TWICE], make_workflow(tmp_path, cache, checkpoint_steps=checkpoint_steps))
    for cell in (ONCE, TWICE):
        same_bytes(unbroken, results, cell)


def test_saves_by_the_clock_change_no_byte_of_it(
    unbroken: ResultsFolder, tmp_path: Path, cache: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVING_SHARE", 1e9)
    saved: list[tuple[str, int]] = []

    def save(state: TrainState, folder: CellFolder, *about: Any) -> None:
        saved.append((folder.root.name, state.step))
        checkpoint_save(state, folder, *about)

    checkpoint_save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    workflow = make_workflow(tmp_path, cache, checkpoint_steps=0, checkpoint_minutes=1e-9)
    results = run_cells([HEALTHY, TWICE], workflow)
    for cell in (HEALTHY, TWICE):
        same_bytes(unbroken, results, cell)
        assert {step for name, step in saved if name == cell.cell_id} >= set(range(4, 41))


@pytest.mark.parametrize("minutes", [0.0, 1e6])
def test_without_a_save_due_only_the_last_step_is_saved(tmp_path: Path, cache: CacheFolder, minutes: float) -> None:
    workflow = make_workflow(tmp_path, cache, checkpoint_steps=0, checkpoint_minutes=minutes)
    folder = run_cells([HEALTHY], workflow).cell(HEALTHY.cell_id)
    assert folder.checkpoint_steps() == ([40] if minutes else [])


class Clock:
    """A clock that goes only when told."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def saves_of(minutes: float, hours: float, save_seconds: float, step_seconds: float = 10.0) -> list[float]:
    """Seconds from the start at which a clock has a training save that takes so long."""
    now = Clock()
    clock, begun, saves = train.SaveClock(minutes, now), now(), []
    while now() - begun < 3600 * hours:
        now.seconds += step_seconds
        if clock.due():
            saves.append(now() - begun)
            with clock.saving():
                now.seconds += save_seconds
    return saves


def test_the_clock_has_a_save_due_every_so_many_minutes() -> None:
    assert saves_of(minutes=5, hours=0.5, save_seconds=0) == [300, 600, 900, 1200, 1500, 1800]
    assert saves_of(minutes=0, hours=0.5, save_seconds=0) == []


@given(minutes=st.floats(0.1, 60), save_seconds=st.floats(0, 600))
def test_saves_by_the_clock_take_a_small_share_of_the_time(minutes: float, save_seconds: float) -> None:
    saves = saves_of(minutes, hours=24, save_seconds=save_seconds)
    for n, begin in enumerate(saves):
        assert n * save_seconds <= train.SAVING_SHARE * begin * (1 + 1e-9)
    seldom = max(60 * minutes, save_seconds / train.SAVING_SHARE)
    assert len(saves) >= 24 * 3600 // (seldom + save_seconds + 10)


def test_a_save_of_another_cause_puts_the_next_one_off() -> None:
    now = Clock()
    clock = train.SaveClock(1, now)
    now.seconds += 59
    with clock.saving():
        pass
    now.seconds += 59
    assert not clock.due()
    now.seconds += 1
    assert clock.due()


@pytest.mark.parametrize("after", [9, 14, 30])
def test_stops_before_and_after_change_no_byte_of_it(
    unbroken: ResultsFolder, after: int, tmp_path: Path, cache: CacheFolder
) -> None:
    """`after` counts the steps of the gang, those it takes again included."""
    n_steps = 0

    def report(phase: str, _done: int, _total: int, _unit: str) -> None:
        nonlocal n_steps
        n_steps += phase == "train"

    with pytest.raises(Interrupted):
        run_cells(CELLS, make_workflow(tmp_path, cache), report, stop=lambda: n_steps >= after)
    results = run_cells(CELLS, make_workflow(tmp_path, cache))
    for cell in CELLS[:3]:
        same_bytes(unbroken, results, cell)
    assert read_status(results.cell(NEVER.cell_id)).state == "diverged"
    same_failure(unbroken, results)


@pytest.mark.parametrize("n_survived", [0, 1, 3])
def test_a_kill_while_it_goes_back_changes_no_byte_of_it(
    unbroken: ResultsFolder, n_survived: int, tmp_path: Path, cache: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_done = 0

    def dying(action: Callable[..., None]) -> Callable[..., None]:
        def act(*arguments: Any) -> None:
            nonlocal n_done
            if n_done == n_survived:
                raise Killed
            n_done += 1
            action(*arguments)

        return act

    workflow = make_workflow(tmp_path, cache, checkpoint_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_directory", dying(checkpoint.remove_directory))
        with pytest.raises(Killed):
            run_cells([TWICE], workflow)
    same_bytes(unbroken, run_cells([TWICE], workflow), TWICE)


def test_checkpoints_of_a_run_hold_one_it_can_go_back_to(tmp_path: Path, cache: CacheFolder) -> None:
    """200 steps are stages of 10: the last two of 181 to 199 are too young, if step 199 fails."""
    cell = make_cell(lr=1e-3, steps=200)
    seen: list[list[int]] = []

    def report(phase: str, done: int, _total: int, _unit: str) -> None:
        if phase == "train" and done == 199:
            seen.append(ResultsFolder(tmp_path).cell(cell.cell_id).checkpoint_steps())

    run_cells([cell], make_workflow(tmp_path, cache, checkpoint_steps=1), report)
    assert seen == [[190, 198, 199]]
