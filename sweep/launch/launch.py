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

from sweep.cached import Cached, Processor
from sweep.config import Cell, StreamConfig, as_json
from sweep.errors import ConfigError, Interrupted, SweepError
from sweep.launch import console
from sweep.launch.beside import baselines_of, with_baselines
from sweep.launch.console import plural
from sweep.launch.cost import Cost, Setting, gang_cost, machine_flops, training_flops
from sweep.launch.jobs import Job, divide
from sweep.launch.local import Queue, run_local
from sweep.launch.machine import LocalOptions, Slot, find_slots
from sweep.launch.outcome import DONE, INTERRUPTED, NOT_DONE, WRONG, tell
from sweep.launch.plan import Composed, Plan, make_plan, resolve
from sweep.launch.slurm import SlurmJobs, follow, live_cells, sbatch_script, submit
from sweep.launch.slurm_options import SlurmOptions
from sweep.launch.squeue import SlurmSilent
from sweep.launch.watch import watch_slurm, watching
from sweep.leftovers import settle
from sweep.options import Workflow
from sweep.paths import (
    CacheFolder,
    LaunchFolder,
    ResultsFolder,
    check_writable,
    locked,
    remove_leftovers,
    try_lock,
    write_atomic,
    write_json,
)
from sweep.progress import silent
from sweep.provenance import git_state

__all__ = ["launch"]


def launch(composed: Sequence[Composed], options: LocalOptions | SlurmOptions) -> int:
    """Run a sweep; returns the exit code of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("sweep").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
    try:
        workflow, cells = resolve(composed)
        workflow = with_baselines(workflow, [cell for _, cell in cells], silent)
        slots = room_for(workflow, options)
        results = ResultsFolder(Path(workflow.results_dir))
        results.check()
        plan = make_plan(workflow, cells, results, in_slurm(results, options))
        setting = setting_of(plan, slots, options)
        jobs = divide(plan.gangs, slots, lambda cells: gang_cost(cells, setting).memory_bytes, training_flops)
        costs = [gang_cost(job.cells, setting) for job in jobs]
        rate = machine_flops() if jobs and not setting.processor.gpu else None
        console.show_plan(plan)
        console.show_streams([(gang[0].stream, gang_cost(gang, setting)) for gang in plan.gangs])
        console.show_jobs(jobs, slots, None if rate is None else times(jobs, costs, rate / len(slots)))
        if workflow.dry_run:
            if jobs:
                console.show_cost(costs, rate)
            if jobs and isinstance(options, SlurmOptions):
                console.out.print(sbatch_script(len(jobs), options, results))
            return DONE
        cache = Path(workflow.cache_dir)
        if results.root not in cache.parents:
            check_cache(cache)
        results.create()
        if isinstance(options, SlurmOptions):
            return execute_in_slurm(plan, jobs, options, results)
        return execute(plan, jobs, slots, results, BACKENDS[options.backend])
    except SweepError as error:
        console.problem(str(error))
        return WRONG
    except OSError as error:
        console.problem(f"{type(error).__name__}: {error}")
        return WRONG


def setting_of(plan: Plan, slots: Sequence[Slot], options: LocalOptions | SlurmOptions) -> Setting:
    """Where the jobs will run and what they find there.

    Raises:
        BaselineError: a baseline changed since it was checked.
    """
    workflow = plan.workflow
    gpu = slots[0].gpu is not None
    if isinstance(options, SlurmOptions):
        gpu = workflow.device != "cpu" and bool(options.gpus_per_node or options.gres)
    return Setting(
        cached=Cached.look(CacheFolder(Path(workflow.cache_dir))),
        processor=Processor(gpu, slots[0].n_threads),
        cache_gib=workflow.cache_gib,
        n_causal_rows=workflow.n_causal_rows,
        beside=baselines_of(workflow, [planned.cell for planned in plan.cells if planned.runs]),
    )


def times(jobs: Sequence[Job], costs: Sequence[Cost], rate: float) -> list[float]:
    """About how many seconds each job takes; the first one of a stream makes what the others read."""
    seen: set[StreamConfig] = set()
    seconds = []
    for job, cost in zip(jobs, costs, strict=True):
        stream = job.cells[0].stream
        seconds.append(cost.seconds(rate, shared=stream in seen))
        seen.add(stream)
    return seconds


def room_for(workflow: Workflow, options: LocalOptions | SlurmOptions) -> list[Slot]:
    """What jobs may plan with.

    Raises:
        ConfigError: an option of the launcher is out of range.
    """
    if isinstance(options, SlurmOptions):
        options.check()
        return options.slots()
    if not workflow.wait:
        raise ConfigError(
            "wait=false needs jobs that outlive their launcher; choose hydra/launcher=slurm, or wait=true"
        )
    return find_slots(workflow.device, options)


def in_slurm(results: ResultsFolder, options: LocalOptions | SlurmOptions) -> dict[str, str]:
    """Cells that a job in Slurm is at or will be, and which.

    Raises:
        SlurmSilent: Slurm cannot be asked, and jobs shall go there.
    """
    try:
        return live_cells(follow(results))
    except SlurmSilent as silence:
        if isinstance(options, SlurmOptions):
            raise
        console.problem(f"{results.slurm} tells of jobs in Slurm that cannot be asked about: {silence}")
        return {}


Stop = Callable[[], bool]
Backend = Callable[[Queue, Plan, ResultsFolder, Stop], None]


def execute(plan: Plan, jobs: Sequence[Job], slots: Sequence[Slot], results: ResultsFolder, run: Backend) -> int:
    """Freeze the configs, run the jobs and show what came of them."""
    sweep_id = begin(plan, jobs, results)
    if not jobs:
        return tell(plan.asked, results)
    with launch_folder(results, sweep_id) as folder:
        queue = Queue(jobs, slots, plan.workflow, folder, console.problem)
        try:
            with stopping() as stop:
                run(queue, plan, results, stop)
        except (Interrupted, KeyboardInterrupt) as stop:
            saved = isinstance(stop, Interrupted) and plan.workflow.saves
            what = "what was running is saved" if saved else "cells go on from their last checkpoint"
            console.problem(f"interrupted; {what}. To go on:\n    {command()}")
            return INTERRUPTED
        return tell(plan.asked, results, queue)


def execute_in_slurm(plan: Plan, jobs: Sequence[Job], options: SlurmOptions, results: ResultsFolder) -> int:
    """Submit what is to run and, unless told not to wait, watch it and what ran already until nothing is left."""
    begin(plan, jobs, results)
    sent, problem = submit(jobs, plan.workflow, options, results) if jobs else ([], "")
    for submission in sent:
        console.out.print(f"submitted {plural(len(submission.jobs), 'job')} as Slurm job {submission.slurm_id}")
    if problem and not sent:
        raise SweepError(problem)
    if problem:
        console.problem(f"the rest was not submitted; give the command again later. {problem}")
    if not plan.workflow.wait:
        console.out.print(FOLLOW.format(results=shlex.quote(str(results.root))))
        return NOT_DONE if problem else DONE
    cells = [planned for planned in plan.unique if planned.runs or planned.action == "running"]
    followed = SlurmJobs(results, [planned.cell.cell_id for planned in cells])
    try:
        with stopping("the jobs go on without this program; once more to leave at once") as stop:
            watch_slurm(followed, cells, results, stop)
    except (Interrupted, KeyboardInterrupt):
        console.out.print(FOLLOW.format(results=shlex.quote(str(results.root))))
        return INTERRUPTED
    return tell(plan.asked, results, followed)


FOLLOW = """the jobs are in Slurm's hands. From any node:
    python -m sweep status {results}     where they are
    python -m sweep watch {results}      follow them
    python -m sweep cancel {results}     save and end them
    python -m sweep collect {results}    results and failures"""


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
    if not any(log.stat().st_size for log in folder.root.glob("*.err")):
        shutil.rmtree(folder.root)


def begin(plan: Plan, jobs: Sequence[Job], results: ResultsFolder) -> str:
    """Write the sweep's file and freeze the configs of what is to run; returns the sweep's id.

    Side effects: finished cells whose commit was killed after their row come to their end.
    """
    with locked(results.lock):
        remove_leftovers(results.sweeps)
        sweep_id = record(plan, results)
        for job in jobs:
            for cell in job.cells:
                remove_leftovers(results.cell(cell.cell_id).root, results.cell(cell.cell_id).config.name)
                freeze(cell, results)
    for planned in plan.cells:
        if planned.action == "done":
            settle(results, planned.cell.cell_id, keep_checkpoints=plan.workflow.keep_checkpoints)
    return sweep_id


@contextmanager
def stopping(words: str = "stopping after this step; once more to stop at once") -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a stop at the next step; a second SIGINT ends the process at once."""
    asked = False

    def ask(signum: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        console.problem(words)

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
