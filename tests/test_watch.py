"""What the watcher shows, from statuses on disk."""

import io
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gangs import make_workflow
from make import make_cell
from rich.console import Console

from sweep.launch import watch
from sweep.launch.jobs import Job
from sweep.launch.local import Queue, Running
from sweep.launch.machine import Slot
from sweep.launch.plan import Planned
from sweep.launch.watch import Watcher
from sweep.paths import CacheFolder, LaunchFolder, ResultsFolder
from sweep.progress import Snapshot
from sweep.status import Status, read_status

CELLS = [make_cell(top_k=top_k) for top_k in (2, 4, 8)]
PLANNED = [Planned(cell, (f"top_k={cell.capacity.top_k}",), "new", "") for cell in CELLS]
TRAINING = Snapshot("train", 10, 30, "steps", per_second=2.0, seconds_left=95.0)


@pytest.fixture
def results(tmp_path: Path) -> ResultsFolder:
    folder = ResultsFolder(tmp_path)
    folder.create()
    for cell in CELLS:
        folder.cell(cell.cell_id).root.mkdir()
    return folder


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    """The first two cells run, the third waits."""
    jobs = [Job(tuple(CELLS[:2]), 0.0), Job((CELLS[2],), 0.0)]
    slot = Slot(None, 1, None)
    made = Queue(jobs, [slot], make_workflow(tmp_path, CacheFolder(tmp_path / "cache")), LaunchFolder(tmp_path))
    number, job = made.waiting.popleft()
    with subprocess.Popen(["true"]) as process:
        made.running.append(Running(number, job, slot, process))
    return made


def say(results: ResultsFolder, index: int, **values: Any) -> None:
    Status().changed(steps=30, attempts=1, **values).write(results.cell(CELLS[index].cell_id))


def test_rows_tell_waiting_starting_running_and_done(results: ResultsFolder, queue: Queue) -> None:
    watcher = Watcher(PLANNED, results)
    assert [row.word for row in watcher.rows(queue).values()] == ["starting", "starting", "waiting"]
    say(results, 0, state="running", step=10, progress=TRAINING, fvu=0.51234, l0=2.01, dead_fraction=0.25)
    say(results, 1, state="done", step=30, fvu=0.25, l0=4.0, dead_fraction=0.0)
    rows = [row.texts for row in watcher.rows(queue).values()]
    assert rows == [
        ["train", "10/30", "128", "2 min", "0.5123", "2.01", "0.25"],
        ["done", "30/30", "", "", "0.25", "4", "0"],
        ["waiting", "", "", "", "", "", ""],
    ]


def test_a_status_from_before_the_launch_is_no_news(results: ResultsFolder, request: pytest.FixtureRequest) -> None:
    say(results, 0, state="failed", step=7, error={"message": "old trouble"}, fvu=0.9)
    say(results, 2, state="interrupted", step=9)
    queue = request.getfixturevalue("queue")
    rows = list(Watcher(PLANNED, results).rows(queue).values())
    assert [row.word for row in rows] == ["starting", "starting", "waiting"]
    assert rows[0].texts[4] == ""


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_off_by_a_day_changes_nothing(days: int, results: ResultsFolder, queue: Queue) -> None:
    """Of the job, against the launcher's; before and after the launch."""
    folder = results.cell(CELLS[0].cell_id)
    before = Status().changed(state="failed", attempts=3)
    replace(before, updated_at=before.updated_at + days * 86_400).write(folder)
    again = Queue([Job((CELLS[0],), 0.0)], [], make_workflow(results.root, CacheFolder(results.root)), queue._folder)
    assert not again.is_news(CELLS[0].cell_id, read_status(folder))
    now = before.changed(state="running", attempts=4)
    replace(now, updated_at=now.updated_at + days * 86_400).write(folder)
    assert again.is_news(CELLS[0].cell_id, read_status(folder))


def test_lines_tell_phases_once_and_ends_once(
    results: ResultsFolder, queue: Queue, capsys: pytest.CaptureFixture[str], clock: Any
) -> None:
    watcher = Watcher(PLANNED, results)
    for index in (0, 1):
        say(results, index, state="running", step=10, progress=TRAINING)
    for _ in range(5):
        clock.now += 2
        watcher(queue)
    say(results, 1, state="diverged", step=12, error={"message": "the loss is nan\nmore"})
    clock.now += 2
    watcher(queue)
    clock.now += 2
    watcher(queue)
    assert capsys.readouterr().out.splitlines() == [
        "job 1, 2 cells: train: 10 of 30 steps, 2/s, 2 min left",
        "not yet at work: 1 waiting",
        f"cell {CELLS[1].cell_id} diverged at step 12: the loss is nan",
        "job 1, 2 cells: train: 10 of 30 steps, 2/s, 2 min left",
    ]


@pytest.mark.parametrize("height", [40, 12])
def test_the_table_fits_the_terminal_and_counts_the_rest(
    height: int, results: ResultsFolder, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [Planned(make_cell(seed=seed), (), "new", "") for seed in range(1, 21)]
    text = io.StringIO()
    terminal = Console(file=text, width=140, height=height, force_terminal=True)
    monkeypatch.setattr(watch, "out", terminal)
    watcher = Watcher([*many, *PLANNED], results)
    say(results, 0, state="running", step=10, progress=TRAINING)
    terminal.print(watcher.table(watcher.rows(queue)))
    lines = text.getvalue().splitlines()
    assert len(lines) == (24 if height == 40 else 10)
    assert CELLS[0].cell_id in lines[1]  # those at work come first
    assert ("and 15 more:" in lines[-1]) == (height == 12)


def test_warnings_of_jobs_are_told_once(
    results: ResultsFolder, queue: Queue, capsys: pytest.CaptureFixture[str], clock: Any
) -> None:
    watcher = Watcher(PLANNED, results)
    for _ in range(2):
        for index in (0, 1):
            say(results, index, state="running", step=10, progress=TRAINING, notes=("no room for the cache",))
        clock.now += 2
        watcher(queue)
    assert capsys.readouterr().out.splitlines().count("warning: no room for the cache") == 1
