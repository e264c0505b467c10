"""The local queue as a user meets it: slots, kills, Ctrl-C at a terminal, a dead launcher. Real processes."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from commands import ROOT, SMOKE, broken
from commands import sweep_runner as run
from gangs import same_bytes

from sweep.config import cell_from_json
from sweep.locks import try_lock
from sweep.paths import CacheFolder, ResultsFolder
from sweep.results import read_row
from sweep.status import Status, read_status

LONG = (*SMOKE, "seed=0,1", "steps=3000", "epochs=1", "checkpoint_steps=50", "keep_checkpoints=true")


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def statuses(root: Path) -> list[Status]:
    results = ResultsFolder(root)
    return [read_status(results.cell(path.name)) for path in sorted(root.glob("cells/*"))]


def n_training(root: Path) -> int:
    """Cells that have a checkpoint and are at work."""
    return len({path.parent for path in root.glob("cells/*/checkpoints/step_*")})


def jobs_of(root: Path) -> list[psutil.Process]:
    """The processes that work on the cells, as their statuses name them."""
    return [psutil.Process(pid) for pid in {status.pid for status in statuses(root) if status.state == "running"}]


def started(root: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "sweep_runner.py"), *arguments, f"results_dir={root}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def unlocked(root: Path) -> bool:
    """Whether nobody works on any cell."""
    locks = [try_lock(path / ".lock") for path in root.glob("cells/*")]
    for lock in locks:
        if lock:
            lock.close()
    return all(locks)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder) -> ResultsFolder:
    """The two cells in one job, never stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(*LONG, f"cache_dir={cache.root}", f"results_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "1 slot (CPU)" in done.stdout
    return ResultsFolder(folder)


def finish_and_compare(root: Path, cache: CacheFolder, unbroken: ResultsFolder) -> str:
    done = run(*LONG, f"cache_dir={cache.root}", f"results_dir={root}")
    assert done.returncode == 0, done.stderr
    for path in root.glob("cells/*/config.json"):
        same_bytes(unbroken, ResultsFolder(root), cell_from_json(path.read_text()))
    return done.stdout


def test_two_slots_run_two_jobs_at_once_and_end_in_the_same_bytes(
    tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    process = started(tmp_path, *LONG, f"cache_dir={cache.root}", "hydra.launcher.slots=2")
    wait_for(lambda: n_training(tmp_path) == 2)
    assert len(jobs_of(tmp_path)) == 2
    assert all(job.environ()["OMP_NUM_THREADS"] == "1" for job in jobs_of(tmp_path))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "job 2: 1 cell" in output
    assert "2 slots (CPU), 1 thread each" in output
    assert not list(tmp_path.glob("sweeps/*/"))
    for path in tmp_path.glob("cells/*/config.json"):
        same_bytes(unbroken, ResultsFolder(tmp_path), cell_from_json(path.read_text()))


def test_a_killed_job_is_tried_once_more_and_then_resumed_by_the_next_run(
    tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    process = started(tmp_path, *LONG, f"cache_dir={cache.root}", "hydra.launcher.slots=2")
    wait_for(lambda: n_training(tmp_path) == 2)
    first = jobs_of(tmp_path)[0]
    first.kill()
    wait_for(lambda: any(status.attempts == 2 and status.state == "running" for status in statuses(tmp_path)))
    (again,) = {status.pid for status in statuses(tmp_path) if status.attempts == 2}
    psutil.Process(again).kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "killed by signal 9 (SIGKILL) (out of memory?)" in errors
    assert "cells that go on: 1 in job 3" in errors
    assert "1 cell" in errors
    assert "was killed by signal 9" in errors
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert sorted(status.failures for status in statuses(tmp_path)) == [0, 0]
    assert "1 resume" in finish_and_compare(tmp_path, cache, unbroken)


class AtTerminal:
    """A sweep in the foreground of a terminal of its own, where Ctrl-C reaches every process it starts."""

    def __init__(self, root: Path, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / "sweep_runner.py"), *arguments, f"results_dir={root}"]
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, command)
        os.set_blocking(self.terminal, False)
        self.code: int | None = None
        self.shown = ""

    def press(self, key: bytes) -> None:
        os.write(self.terminal, key)

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait, and read all the while what the terminal shows, so that the program never blocks on it."""

        def holds() -> bool:
            with contextlib.suppress(OSError):  # nothing new, or nobody there to write
                self.shown += os.read(self.terminal, 1 << 16).decode(errors="replace")
            return condition()

        wait_for(holds, seconds)

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not self.over():
                psutil.Process(self.pid).kill()
                os.waitpid(self.pid, 0)
        os.close(self.terminal)


def test_ctrl_c_saves_every_job_and_tells_how_to_go_on(
    tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    with contextlib.closing(
        AtTerminal(tmp_path, *LONG, f"cache_dir={cache.root}", "hydra.launcher.slots=2")
    ) as program:
        program.wait_for(lambda: n_training(tmp_path) == 2)
        program.press(b"\x03")
        program.wait_for(program.over, 60)
        assert program.code == 130
        assert "tokens/s" in program.shown  # the live table
        assert "stopping after this step" in program.shown
        assert "interrupted; what was running is saved. To go on:" in program.shown
        assert "Traceback" not in program.shown
    for cell in tmp_path.glob("cells/*"):
        status = read_status(ResultsFolder(tmp_path).cell(cell.name))
        assert status.state == "interrupted"
        assert (cell / "checkpoints" / f"step_{status.step:08d}" / "manifest.json").exists()
    assert unlocked(tmp_path)
    assert "2 resume" in finish_and_compare(tmp_path, cache, unbroken)


def test_ctrl_c_twice_kills(tmp_path: Path, cache: CacheFolder) -> None:
    with contextlib.closing(AtTerminal(tmp_path, *LONG, f"cache_dir={cache.root}")) as program:
        program.wait_for(lambda: n_training(tmp_path) == 2)
        (job,) = jobs_of(tmp_path)
        job.suspend()  # a job that does not react
        program.press(b"\x03")
        program.wait_for(lambda: "once more to stop at once" in program.shown, 10)
        assert not program.over()
        program.press(b"\x03")
        program.wait_for(program.over, 10)
        assert program.code == 130
        assert "cells go on from their last checkpoint" in program.shown
    assert not job.is_running() or job.status() == psutil.STATUS_ZOMBIE
    assert unlocked(tmp_path)


def test_no_job_outlives_its_launcher_and_a_second_one_takes_over(
    tmp_path: Path, cache: CacheFolder, unbroken: ResultsFolder
) -> None:
    first = started(tmp_path, *LONG, f"cache_dir={cache.root}")
    wait_for(lambda: n_training(tmp_path) == 2)
    second = started(tmp_path, *LONG, f"cache_dir={cache.root}")
    family = psutil.Process(first.pid).children(recursive=True)
    assert family
    assert second.stdout is not None
    shown = ""
    while "2 cells elsewhere, in process " not in shown:
        shown += second.stdout.readline()
    assert "2 cells: 2 running; nothing to run" in shown
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert "2 cells left by another launcher:" in output
    assert "2 resume" in output  # the jobs of the first one saved before they went
    assert {status.attempts for status in statuses(tmp_path)} == {2}
    assert not list(tmp_path.glob("sweeps/*/"))
    for path in tmp_path.glob("cells/*/config.json"):
        same_bytes(unbroken, ResultsFolder(tmp_path), cell_from_json(path.read_text()))


def test_a_failing_cell_leaves_the_others_and_is_told(tmp_path: Path, cache: CacheFolder) -> None:
    grid = ("-m", "experiment=smoke", "lr=1e-3,1e30", "steps=60", "hydra.launcher.slots=1")
    done = run(*grid, f"cache_dir={cache.root}", f"results_dir={tmp_path}")
    assert done.returncode == 1
    assert {read_row(row)["status"] for row in (tmp_path / "runs").iterdir()} == {"done", "diverged"}
    assert "diverged" in done.stderr
    assert "more in" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_gang_of_ten_breaks_in_three_ways_and_the_others_end_in_the_same_bytes(
    tmp_path: Path, cache: CacheFolder
) -> None:
    """An error, a lack of memory and a crash; only the lack of memory is tried again, alone."""
    rates = [f"{rate}e-4" for rate in range(10, 20)]
    grid = (*SMOKE, f"lr={','.join(rates)}", "steps=60", "hydra.launcher.slots=1")
    grid = (*grid, f"cache_dir={cache.root}", "keep_checkpoints=true", "checkpoint_steps=20")
    whole = run(*grid, f"results_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    faults = "error@12e-4@5,memory@14e-4@9,crash@16e-4@30"
    done = run(*grid, f"results_dir={tmp_path / 'out'}", environment=broken(faults))
    assert done.returncode == 1
    unbroken, results = ResultsFolder(tmp_path / "whole"), ResultsFolder(tmp_path / "out")
    cells = [cell_from_json(path.read_text()) for path in results.root.glob("cells/*/config.json")]
    bad = {12e-4: "failed", 14e-4: "out_of_memory", 16e-4: "crashed"}
    for cell in cells:
        status = read_status(results.cell(cell.cell_id))
        assert status.state == bad.get(cell.schedule.lr, "done")
        if cell.schedule.lr in bad:
            assert not results.row("runs", cell.cell_id).exists()
            assert status.attempts == (2 if status.state == "out_of_memory" else 1)
        else:
            same_bytes(unbroken, results, cell)
    for words in ("failed: broken on purpose", "out of memory: ", "crashed: by signal 11 (SIGSEGV)"):
        assert words in done.stderr
    assert "7 in job 2, 1 in job 3" in done.stderr or "1 in job 2, 7 in job 3" in done.stderr
    told = subprocess.run(
        [sys.executable, "-m", "sweep", "status", str(results.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "crashed: by signal 11 (SIGSEGV)" in told.stdout + told.stderr
    again = run(*grid, f"results_dir={results.root}", "retry=failed")
    assert again.returncode == 0, again.stderr
    assert "3 retry" in again.stdout
    for cell in cells:
        same_bytes(unbroken, results, cell)


def test_wrong_launcher_options_are_refused_in_plain_words(tmp_path: Path) -> None:
    for option, message in (
        ("hydra.launcher.slots=0", "hydra.launcher.slots=0 must be at least 1"),
        ("hydra.launcher.slots=many", "many"),
        ("hydra.launcher.slotz=2", "slotz"),
    ):
        done = run("experiment=smoke", option, f"results_dir={tmp_path / 'out'}")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_status_tells_what_a_job_is_at(unbroken: ResultsFolder) -> None:
    for status in statuses(unbroken.root):
        assert status.state == "done"
        assert status.step == 3000
        row = json.loads(next(unbroken.root.glob("cells/*/metrics.json")).read_text())
        assert status.fvu is not None
        assert status.l0 is not None
        assert row["fvu"] > 0
