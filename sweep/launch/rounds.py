"""The rounds of a sweep: claim cells, run them, watch what is in other hands, and take over what is left of that.

1. Under the lock of the results folder: freeze the configs of the cells that nobody is at, and claim them (`claims`).
2. Run their jobs: here, in processes of their own, or in Slurm. A cell that another launcher or job is at is watched.
3. A cell that comes out of other hands without a row or an error has lost its launcher. Round again with those cells.

Jobs in Slurm outlive their launcher and need no claim: what Slurm itself says of them stands in its place.
"""

import hashlib
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from sweep.config import Cell, as_json
from sweep.errors import Interrupted, SweepError
from sweep.launch import console
from sweep.launch.beside import shortcomings
from sweep.launch.claims import Claim, Others, claimed
from sweep.launch.console import plural
from sweep.launch.endings import part
from sweep.launch.jobs import Job
from sweep.launch.local import Queue, run_local
from sweep.launch.machine import LocalOptions, Slot
from sweep.launch.outcome import DONE, INTERRUPTED, NOT_DONE, tell
from sweep.launch.plan import Plan, make_plan
from sweep.launch.slurm import SlurmJobs, follow, live_cells, may_grow, submit
from sweep.launch.slurm_options import SlurmOptions
from sweep.launch.squeue import SlurmSilent
from sweep.launch.watch import Jobs, Together, follow_to_the_end, watching
from sweep.leftovers import reopen, settle
from sweep.locks import locked, try_lock
from sweep.paths import LaunchFolder, ResultsFolder, remove_leftovers, write_atomic, write_json
from sweep.provenance import git_state
from sweep.secrets import without_secrets
from sweep.status import read_status

__all__ = ["Venue", "freeze", "run_rounds"]

Stop = Callable[[], bool]

STOP = "stopping after this step; once more to stop at once"
LEAVE = "the jobs go on without this program; once more to leave at once"

FOLLOW = """the jobs are in Slurm's hands. From any node:
    python -m sweep status {results}     where they are
    python -m sweep watch {results}      follow them
    python -m sweep cancel {results}     save and end them
    python -m sweep collect {results}    results and failures"""


@dataclass(frozen=True)
class Venue:
    """Where a sweep runs."""

    results: ResultsFolder
    slots: Sequence[Slot]
    options: LocalOptions | SlurmOptions

    def in_slurm(self, say: Callable[[str], None]) -> dict[str, str]:
        """Cells that a job in Slurm is at or will be, and which.

        Raises:
            SlurmSilent: Slurm cannot be asked, and jobs shall go there.
        """
        try:
            return live_cells(follow(self.results))
        except SlurmSilent as silence:
            if isinstance(self.options, SlurmOptions):
                raise
            say(f"{self.results.slurm} tells of jobs in Slurm that cannot be asked about: {silence}")
            return {}

    def in_other_hands(self) -> dict[str, str]:
        """Cells that another launcher, or a job in Slurm, is at or will be, and which.

        Raises:
            SlurmSilent: as above.
        """
        return claimed(self.results) | self.in_slurm(console.problem)


@dataclass(frozen=True)
class Round:
    """A plan under the lock: the jobs of the cells that nobody was at, and the cells that others are at."""

    plan: Plan
    jobs: Sequence[Job]
    folder: LaunchFolder
    others: Others
    in_slurm: frozenset[str]
    failures: Mapping[str, int]
    """How often each cell of the jobs had failed before."""

    @property
    def left(self) -> list[tuple[tuple[str, ...], Cell]]:
        """What other launchers left. What jobs in Slurm left is told, and goes on when the command is given again."""
        return self._cells(self.others.left - self.in_slurm - set(self.failures))

    def short_of_memory(self, options: SlurmOptions, results: ResultsFolder) -> list[tuple[tuple[str, ...], Cell]]:
        """Cells that ran out of memory in Slurm this time and may be given more."""
        failed = [each for each, n in self.failures.items() if read_status(results.cell(each)).failures > n]
        return self._cells(may_grow(failed, options, results))

    def _cells(self, cell_ids: Collection[str]) -> list[tuple[tuple[str, ...], Cell]]:
        return [(planned.overrides, planned.cell) for planned in self.plan.watched if planned.cell.cell_id in cell_ids]


def run_rounds(first: Plan, jobs: Sequence[Job], venue: Venue, divide: Callable[[Plan], Sequence[Job]]) -> int:
    """Do what a plan says and tell what came of it; the exit code. `divide` makes the jobs of later rounds."""
    results, options = venue.results, venue.options
    sweep_id = begin(first, results)
    plan, followed = first, list[Jobs]()
    with ExitStack() as folders:
        try:
            with stopping(STOP if isinstance(options, LocalOptions) else LEAVE) as stop:
                while plan.watched:
                    each = claim(plan, jobs, venue, sweep_id, folders)
                    if isinstance(options, LocalOptions):
                        followed.append(run_here(each, results, venue.slots, options, stop))
                    else:
                        complete = send_out(each, options, results)
                        if not plan.workflow.wait:
                            console.out.print(FOLLOW.format(results=shlex.quote(str(results.root))))
                            return DONE if complete else NOT_DONE
                        followed.append(follow_in_slurm(each, results, stop))
                    left = each.left
                    if left:
                        console.out.print(f"{plural(len(left), 'cell')} left by another launcher:")
                    if isinstance(options, SlurmOptions) and (short := each.short_of_memory(options, results)):
                        console.out.print(f"{plural(len(short), 'cell')} ran out of memory, and may have more:")
                        left += short
                    if not left:
                        break
                    plan = make_plan(first.workflow, left, results, venue.in_other_hands())
                    jobs = divide(plan)
        except (Interrupted, KeyboardInterrupt) as stopped:
            if isinstance(options, SlurmOptions):
                console.out.print(FOLLOW.format(results=shlex.quote(str(results.root))))
                return INTERRUPTED
            saved = isinstance(stopped, Interrupted) and first.workflow.saves
            what = "what was running is saved" if saved else "cells go on from their last checkpoint"
            console.problem(f"interrupted; {what}. To go on:\n    {command()}")
            return INTERRUPTED
        code = tell(first.asked, results, Together(*followed))
        missing, remarks = shortcomings(first, results) if followed else ([], [])
        for remark in remarks:
            console.problem(f"warning: {remark}")
        if missing:
            console.problem(
                f"baselines not scored: {', '.join(missing)}; the logs of the cells at their layer tell why"
            )
        return NOT_DONE if missing else code


def begin(plan: Plan, results: ResultsFolder) -> str:
    """Write the sweep's file; returns the sweep's id.

    Side effects: finished cells whose commit was killed after their row come to their end.
    """
    with locked(results.lock):
        remove_leftovers(results.sweeps)
        sweep_id = record(plan, results)
    for planned in plan.cells:
        if planned.action in ("done", "baselines"):
            settle(results, planned.cell.cell_id, keep_checkpoints=plan.workflow.keep_checkpoints)
    return sweep_id


def claim(plan: Plan, jobs: Sequence[Job], venue: Venue, sweep_id: str, folders: ExitStack) -> Round:
    """Freeze the configs of the cells that nobody is at, and claim them; a launcher may have come first.

    Side effects: with retry=failed those of them that had diverged lose their row.

    Raises:
        SlurmSilent: Slurm cannot be asked, and jobs shall go there.
    """
    results = venue.results
    with locked(results.lock):
        in_slurm = venue.in_slurm(lambda _: None)
        taken = claimed(results) | in_slurm
        free = [part(job, [cell for cell in job.cells if cell.cell_id not in taken]) for job in jobs]
        free = [job for job in free if job.cells]
        for cell in (cell for job in free for cell in job.cells):
            freeze(cell, results)
            if plan.workflow.retry == "failed":
                reopen(results, cell.cell_id)
        folder = folders.enter_context(launch_folder(results, sweep_id))
        mine = {cell_id for job in free for cell_id in job.cell_ids}
        if isinstance(venue.options, SlurmOptions):
            mine = set()  # a job of ours that Slurm forgets may work on, and is told by its lock like another's
        elif mine:
            Claim.of(mine, results).write(folder)
    others = Others(results, [planned.cell.cell_id for planned in plan.watched if planned.cell.cell_id not in mine])
    for each in others.claims:
        console.out.print(f"{plural(len(each.starts), 'cell')} elsewhere, in {each.words}: watched here")
    failures = {cell_id: read_status(results.cell(cell_id)).failures for job in free for cell_id in job.cell_ids}
    return Round(plan, free, folder, others, frozenset(in_slurm), failures)


def run_here(each: Round, results: ResultsFolder, slots: Sequence[Slot], options: LocalOptions, stop: Stop) -> Jobs:
    """Work the jobs off on this machine; then wait for the cells that others are at.

    Raises:
        Interrupted: `stop` became true; the cells are saved.
        KeyboardInterrupt: asked to end at once; the jobs are killed.
    """
    queue = Queue(each.jobs, slots, each.plan.workflow, each.folder, console.problem)
    in_slurm = each.in_slurm & {planned.cell.cell_id for planned in each.plan.watched}
    jobs = Together(queue, *([SlurmJobs(results, in_slurm)] if in_slurm else []), each.others)
    jobs.refresh()
    ours = each.folder.claim  # goes with our jobs: what they left is told, and no two launchers wait for each other
    if options.backend == "inline":
        run_inline(queue, each.plan, stop)
        ours.unlink(missing_ok=True)
        jobs.refresh()
        if jobs.over:
            return jobs

    def look(_: Queue) -> None:
        jobs.refresh()
        watch(jobs)

    with watching(each.plan.watched, results) as watch:
        run_local(queue, stop, look)
        ours.unlink(missing_ok=True)
        follow_to_the_end(jobs, watch, stop)
    return jobs


def run_inline(queue: Queue, plan: Plan, stop: Stop) -> None:
    """In this process, one job after the other."""
    with console.progress() as report:
        while queue.waiting:
            report("start", 0, 0, "")
            from sweep import job

            _, each = queue.waiting.popleft()
            job.run_gang(each.cell_ids, plan.workflow, report, stop)


def send_out(each: Round, options: SlurmOptions, results: ResultsFolder) -> bool:
    """Submit the jobs; whether all of them went out.

    Raises:
        SweepError: none did.
    """
    sent, problem = submit(each.jobs, each.plan.workflow, options, results) if each.jobs else ([], "")
    for submission in sent:
        memory = "" if submission.mem_gb is None else f", {submission.mem_gb:g} GB each"
        console.out.print(f"submitted {plural(len(submission.jobs), 'job')} as Slurm job {submission.slurm_id}{memory}")
    if problem and not sent:
        raise SweepError(problem)
    if problem:
        console.problem(f"the rest was not submitted; give the command again later. {problem}")
    return not problem


def follow_in_slurm(each: Round, results: ResultsFolder, stop: Stop) -> Jobs:
    """Watch what went to Slurm, now and before, and the cells that others are at, until nothing is left.

    Raises:
        Interrupted: `stop` became true; the jobs go on.
    """
    cell_ids = [planned.cell.cell_id for planned in each.plan.watched]
    followed = SlurmJobs(results, cell_ids)
    jobs = Together(followed, each.others)
    with watching(each.plan.watched, results) as watch:
        follow_to_the_end(jobs, watch, stop)
    followed.tell_memory()
    return jobs


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


ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stopping(words: str) -> Iterator[Stop]:
    """SIGINT, SIGTERM and the end of the terminal ask for a stop at the next step; a second SIGINT ends the process."""
    asked = False

    def ask(signum: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        console.problem(words)

    heard = [number for number in ASKING if signal.getsignal(number) != signal.SIG_IGN]  # nohup has SIGHUP ignored
    before = {number: signal.signal(number, ask) for number in heard}
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
            "command": without_secrets(command()),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cell_ids": cell_ids,
            "git_sha": git_sha,
            "git_dirty": git_dirty,
        },
    )
    return sweep_id


def freeze(cell: Cell, results: ResultsFolder) -> None:
    """Write the cell's config, and remove what a killed launcher left of one; the caller holds the folder's lock."""
    folder = results.cell(cell.cell_id)
    folder.root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.root, folder.config.name)
    write_atomic(folder.config, as_json(cell).encode())
