"""The flow of a sweep: resolve, plan, run, tell."""

import hashlib
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from sweep.config import Cell, as_json
from sweep.errors import ConfigError, Interrupted, SweepError
from sweep.launch import console
from sweep.launch.cost import gang_cost, machine_flops
from sweep.launch.plan import Job, Plan, is_locked, make_plan, resolve
from sweep.options import Workflow
from sweep.paths import ResultsFolder, check_writable, write_atomic, write_json
from sweep.progress import Report
from sweep.provenance import git_state
from sweep.status import read_status

__all__ = ["launch"]

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130

RunGang = Callable[[Sequence[str], Workflow, Report, Callable[[], bool]], None]


def launch(jobs: Sequence[Job], backend: str) -> int:
    """Run a sweep through the named backend; returns the exit code of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("sweep").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
    try:
        workflow, cells = resolve(jobs)
        results = ResultsFolder(Path(workflow.results_dir))
        results.check()
        plan = make_plan(workflow, cells, results)
        console.show_plan(plan)
        if workflow.dry_run:
            if plan.gangs:
                costs = [gang_cost(gang, workflow.cache_gib) for gang in plan.gangs]
                console.show_cost(costs, machine_flops())
            return DONE
        cache = Path(workflow.cache_dir)
        if results.root not in cache.parents:
            check_cache(cache)
        results.create()
        return execute(plan, results, BACKENDS[backend])
    except SweepError as error:
        console.problem(str(error))
        return WRONG
    except OSError as error:
        console.problem(f"{type(error).__name__}: {error}")
        return WRONG


def execute(plan: Plan, results: ResultsFolder, run: RunGang) -> int:
    """Freeze the configs, run the gangs one after the other and show what came of them."""
    record(plan, results)
    for gang in plan.gangs:
        for cell in gang:
            freeze(cell, results)
    try:
        with stopping() as stop, console.progress() as report:
            for gang in plan.gangs:
                run([cell.cell_id for cell in gang], plan.workflow, report, stop)
    except (Interrupted, KeyboardInterrupt) as stop:
        saved = isinstance(stop, Interrupted) and plan.workflow.checkpoint_steps
        what = "what was running is saved" if saved else "cells go on from their last checkpoint"
        console.problem(f"interrupted; {what}. To go on:\n    {command()}")
        return INTERRUPTED
    return tell(plan, results)


def run_inline(cell_ids: Sequence[str], workflow: Workflow, report: Report, stop: Callable[[], bool]) -> None:
    """Backend `inline`: in this process."""
    report("start", 0, 0, "")
    from sweep import job

    job.run_gang(cell_ids, workflow, report, stop)


BACKENDS: dict[str, RunGang] = {"inline": run_inline}


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


def record(plan: Plan, results: ResultsFolder) -> None:
    """Write the sweep's own file: its command line and its cells. The same sweep again replaces it."""
    cell_ids = [planned.cell.cell_id for planned in plan.unique]
    sweep_id = hashlib.sha256(" ".join(cell_ids).encode()).hexdigest()[:10]
    git_sha, git_dirty = git_state()
    write_json(
        results.sweeps / f"{sweep_id}.json",
        {
            "sweep_id": sweep_id,
            "command": command(),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cell_ids": cell_ids,
            "git_sha": git_sha,
            "git_dirty": git_dirty,
        },
    )


def freeze(cell: Cell, results: ResultsFolder) -> None:
    folder = results.cell(cell.cell_id)
    folder.root.mkdir(parents=True, exist_ok=True)
    write_atomic(folder.config, as_json(cell).encode())


def tell(plan: Plan, results: ResultsFolder) -> int:
    """Show results and failures; the exit code says whether every cell is done."""
    metrics: dict[str, dict[str, Any]] = {}
    failures: dict[str, list[str]] = {}
    for planned in plan.unique:
        cell_id = planned.cell.cell_id
        folder = results.cell(cell_id)
        if results.row("runs", cell_id).exists():
            metrics[cell_id] = read_row(results.row("runs", cell_id))
            continue
        status = read_status(folder)
        if is_locked(folder):
            reason = f"is being run by another process ({status.pid}); give the command again when it is done"
        else:
            reason = f"{status.state}: {status.error.get('message', 'ended without a word')}"
        failures.setdefault(reason, []).append(cell_id)
    console.show_results(plan.unique, metrics)
    console.show_failures(failures, results)
    if metrics:
        console.out.print(f"ranked against baselines: python -m analysis rank {shlex.quote(str(results.root))}")
    return FAILED if failures else DONE


def read_row(path: Path) -> dict[str, Any]:
    """The row of a finished cell."""
    import polars as pl

    return pl.read_parquet(path).row(0, named=True)


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
