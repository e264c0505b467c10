"""The flow of a sweep: resolve, plan, divide into jobs, run, tell."""

import hashlib
import logging
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from sweep.config import Cell, as_json
from sweep.errors import ConfigError, Interrupted, SweepError
from sweep.launch import console
from sweep.launch.beside import with_baselines
from sweep.launch.console import Failure
from sweep.launch.cost import gang_cost, machine_flops, training_flops
from sweep.launch.jobs import Job, divide
from sweep.launch.local import Queue, run_local
from sweep.launch.machine import LocalOptions, Slot, find_slots
from sweep.launch.plan import Composed, Plan, is_locked, make_plan, resolve
from sweep.launch.watch import watching
from sweep.paths import LaunchFolder, ResultsFolder, check_writable, locked, try_lock, write_atomic, write_json
from sweep.progress import silent
from sweep.provenance import git_state
from sweep.results import read_row
from sweep.status import read_status

__all__ = ["launch"]

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def launch(composed: Sequence[Composed], options: LocalOptions) -> int:
    """Run a sweep; returns the exit code of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("sweep").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
    try:
        workflow, cells = resolve(composed)
        workflow = with_baselines(workflow, [cell for _, cell in cells], silent)
        slots = find_slots(workflow.device, options)
        results = ResultsFolder(Path(workflow.results_dir))
        results.check()
        plan = make_plan(workflow, cells, results)
        jobs = divide(
            plan.gangs, slots, lambda cells: gang_cost(cells, workflow.cache_gib).memory_bytes, training_flops
        )
        console.show_plan(plan, len(jobs))
        console.show_jobs(jobs, slots)
        if workflow.dry_run:
            if jobs:
                console.show_cost([gang_cost(job.cells, workflow.cache_gib) for job in jobs], machine_flops())
            return DONE
        cache = Path(workflow.cache_dir)
        if results.root not in cache.parents:
            check_cache(cache)
        results.create()
        return execute(plan, jobs, slots, results, BACKENDS[options.backend])
    except SweepError as error:
        console.problem(str(error))
        return WRONG
    except OSError as error:
        console.problem(f"{type(error).__name__}: {error}")
        return WRONG


Stop = Callable[[], bool]
Backend = Callable[[Queue, Plan, ResultsFolder, Stop], None]


def execute(plan: Plan, jobs: Sequence[Job], slots: Sequence[Slot], results: ResultsFolder, run: Backend) -> int:
    """Freeze the configs, run the jobs and show what came of them."""
    sweep_id = record(plan, results)
    if not jobs:
        return tell(plan, results)
    for job in jobs:
        for cell in job.cells:
            freeze(cell, results)
    with launch_folder(results, sweep_id) as folder:
        queue = Queue(jobs, slots, plan.workflow, folder)
        try:
            with stopping() as stop:
                run(queue, plan, results, stop)
        except (Interrupted, KeyboardInterrupt) as stop:
            saved = isinstance(stop, Interrupted) and plan.workflow.checkpoint_steps
            what = "what was running is saved" if saved else "cells go on from their last checkpoint"
            console.problem(f"interrupted; {what}. To go on:\n    {command()}")
            return INTERRUPTED
        return tell(plan, results, queue)


def run_here(queue: Queue, plan: Plan, _results: ResultsFolder, stop: Stop) -> None:
    """Backend `inline`: in this process, one job after the other."""
    with console.progress() as report:
        report("start", 0, 0, "")
        from sweep import job

        for _, each in queue.waiting:
            job.run_gang(each.cell_ids, plan.workflow, report, stop)


def run_watched(queue: Queue, plan: Plan, results: ResultsFolder, stop: Stop) -> None:
    """Backend `local`: jobs in processes of their own, and a live view of their cells."""
    with watching([planned for planned in plan.cells if planned.runs], results) as watch:
        run_local(queue, stop, watch)


BACKENDS: dict[str, Backend] = {"inline": run_here, "local": run_watched}


@contextmanager
def launch_folder(results: ResultsFolder, sweep_id: str) -> Iterator[LaunchFolder]:
    """A folder for this launcher and its jobs, locked while it lives. It stays if it holds what a job printed.

    Side effects: those of dead launchers of the same sweep go.
    """
    for stale in results.sweeps.glob(f"{sweep_id}.*/"):
        if lock := try_lock(LaunchFolder(stale).lock):
            shutil.rmtree(stale)
            lock.close()
    folder = LaunchFolder(Path(tempfile.mkdtemp(prefix=f"{sweep_id}.", dir=results.sweeps)))
    with locked(folder.lock):
        yield folder
    if not any(log.stat().st_size for log in folder.submitit.glob("*.err")):
        shutil.rmtree(folder.root)


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a stop at the next step; a second SIGINT ends the process at once."""
    asked = False

    def ask(signum: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        console.problem("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command() -> str:
    return shlex.join(["python", *sys.argv])


def record(plan: Plan, results: ResultsFolder) -> str:
    """Write the sweep's own file: its command line and its cells. The same sweep again replaces it. Returns its id."""
    cell_ids = [planned.cell.cell_id for planned in plan.unique]
    sweep_id = hashlib.sha256(" ".join(cell_ids).encode()).hexdigest()[:10]
    git_sha, git_dirty = git_state()
    write_json(
        results.sweep(sweep_id),
        {
            "sweep_id": sweep_id,
            "command": command(),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cell_ids": cell_ids,
            "git_sha": git_sha,
            "git_dirty": git_dirty,
        },
    )
    return sweep_id


def freeze(cell: Cell, results: ResultsFolder) -> None:
    folder = results.cell(cell.cell_id)
    folder.root.mkdir(parents=True, exist_ok=True)
    write_atomic(folder.config, as_json(cell).encode())


def tell(plan: Plan, results: ResultsFolder, queue: Queue | None = None) -> int:
    """Show results and failures; the exit code says whether every cell is done."""
    metrics: dict[str, dict[str, Any]] = {}
    failures: dict[str, list[Failure]] = {}
    for planned in plan.unique:
        cell_id = planned.cell.cell_id
        if results.row("runs", cell_id).exists():
            metrics[cell_id] = read_row(results.row("runs", cell_id))
        else:
            reason, log = why_not_done(cell_id, results, queue)
            failures.setdefault(reason, []).append((cell_id, log))
    console.show_results(plan.unique, metrics)
    console.show_failures(failures)
    if metrics:
        console.out.print(f"ranked against baselines: python -m analysis rank {shlex.quote(str(results.root))}")
    return FAILED if failures else DONE


def why_not_done(cell_id: str, results: ResultsFolder, queue: Queue | None) -> tuple[str, Path]:
    """Why a cell has no row, and where more is written."""
    folder = results.cell(cell_id)
    status = read_status(folder)
    if is_locked(folder):
        return f"is being run by another process ({status.pid}); give the command again when it is done", folder.log
    if status.state in ("failed", "diverged"):
        return f"{status.state}: {status.error.get('message', '')}", folder.log
    printed = None if queue is None else queue.printed(cell_id)
    return "was killed: its process ended without a word; give the command again to go on", printed or folder.log


def check_cache(folder: Path) -> None:
    """Make the cache folder, or say why it cannot be.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise ConfigError(f"cache_dir={folder} cannot be used ({error}); choose another folder") from error
