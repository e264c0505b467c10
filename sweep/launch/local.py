"""Backend `local`: a queue of jobs over the slots of this machine, each job a process of its own.

Whether a job is over, and how it ended, is known from its process, how its cells fared from their `status.json`. Cells
that a dead job left unfinished go on in smaller jobs (`endings`). submitit has no queue for a machine of its own, no
pinning by UUID, no way to stop gently, and drops exit codes: it is not used here.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from sweep.checkout import ROOT
from sweep.config import Cell
from sweep.errors import Interrupted
from sweep.launch import payload
from sweep.launch.endings import divided, ending_of, halves, part, record
from sweep.launch.jobs import Job
from sweep.launch.machine import Slot
from sweep.locks import is_held
from sweep.options import Workflow
from sweep.paths import LaunchFolder, ResultsFolder
from sweep.results import has_row
from sweep.status import Status, read_status

__all__ = ["Queue", "Running", "run_local"]

POLL_SECONDS = 0.2

KILLED = "was killed: its process ended without a word; give the command again to go on"

Watch = Callable[["Queue"], None]


@dataclass
class Running:
    """A job at work in a slot."""

    number: int
    job: Job
    slot: Slot
    process: "subprocess.Popen[bytes]"
    before: Mapping[str, Status] = field(default_factory=dict)
    """What its cells said before it started."""

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            controller = psutil.Process(self.process.pid)
            for process in (controller, *controller.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


class Queue:
    """The jobs that wait, run and are over."""

    silent = ""

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Sequence[Slot],
        workflow: Workflow,
        folder: LaunchFolder,
        say: Callable[[str], None] = print,
    ) -> None:
        self.waiting = deque(enumerate(jobs, 1))
        self.running: list[Running] = []
        self.ended: list[Running] = []
        self._results = ResultsFolder(Path(workflow.results_dir))
        ids = (cell_id for job in jobs for cell_id in job.cell_ids)
        self._starts_before = {cell_id: read_status(self._results.cell(cell_id)).attempts for cell_id in ids}
        self._free = list(slots)
        self._workflow = workflow
        self._folder = folder
        self._say = say
        self._stopping = False

    def fill(self) -> None:
        """Start waiting jobs in free slots."""
        while self.waiting and self._free:
            number, job = self.waiting.popleft()
            slot = self._free.pop(0)
            before = {cell_id: read_status(self._results.cell(cell_id)) for cell_id in job.cell_ids}
            self.running.append(Running(number, job, slot, self._start(number, job, slot), before))

    def ask_to_stop(self) -> None:
        """Every job saves and ends at its next step; one that is still starting ends before its first."""
        self._stopping = True
        self._folder.stop.touch()

    def reap(self) -> None:
        """Take the jobs out whose process has ended; what they left unfinished goes on in new ones."""
        for running in [each for each in self.running if each.over]:
            self.running.remove(running)
            self.ended.append(running)
            self._free.append(running.slot)
            if not self._stopping:
                self._go_on(running)

    def refresh(self) -> None:
        """Nothing to look for: the queue knows its processes."""

    @property
    def over(self) -> bool:
        return not self.running and not self.waiting

    @property
    def words(self) -> Mapping[str, str]:
        return {cell_id: "waiting" for _, job in self.waiting for cell_id in job.cell_ids}

    @property
    def at_work(self) -> list[tuple[str, Sequence[str]]]:
        return [(str(running.number), running.job.cell_ids) for running in self.running]

    @property
    def n_jobs(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.ended)

    def is_news(self, cell_id: str, status: Status) -> bool:
        """Whether the cell has been started since: clocks are not asked, they may be wrong or set meanwhile."""
        return status.attempts > self._starts_before.get(cell_id, 0)

    def ending(self, cell_id: str) -> tuple[str, Path] | None:
        """Why a cell left neither row nor error, and what its process printed, if it has ended."""
        jobs = [running for running in self.ended if cell_id in running.job.cell_ids]
        if not jobs:
            return None
        return KILLED, self._folder.printed(jobs[-1].number)

    def _start(self, number: int, job: Job, slot: Slot) -> "subprocess.Popen[bytes]":
        path = self._folder.job(number)
        payload.describe(path, job.cell_ids, self._workflow, slot)
        command = [sys.executable, "-u", "-m", payload.__name__, str(path)]
        with start_environment(slot), self._folder.printed(number).open("wb") as printed:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=printed)

    def _go_on(self, running: Running) -> None:
        """Give what a job left unfinished to new jobs, where that can help, and say so in the cells' statuses."""
        left = Left(running, self._results)
        again, why = [], []
        if left.interrupted and (left.advanced or not running.job.last_try):
            again.append(replace(part(running.job, left.interrupted), last_try=not left.advanced))
            why.append("was asked to stop")
        if left.short_of_memory:
            again += smaller(running.job, left.short_of_memory)
            why.append("ran out of memory")
        if left.died:
            code = running.process.returncode
            ending = ending_of(code, self._folder.job(running.number), self._folder.printed(running.number))
            jobs, given_up = divided(running.job, ending, left.died)
            again += jobs
            why.append(f"{ending.state} {ending.message}" + (f", at cell {ending.cell_id}" if ending.cell_id else ""))
            for cell in left.died:
                blamed = cell in given_up or cell.cell_id == ending.cell_id
                record(ending, cell.cell_id, self._results, blamed=blamed)
        if not why:
            return
        numbers = range(self.n_jobs + 1, self.n_jobs + 1 + len(again))
        self.waiting.extend(zip(numbers, again, strict=True))
        on = ", ".join(f"{len(job.cells)} in job {number}" for number, job in zip(numbers, again, strict=True))
        self._say(f"job {running.number} {' and '.join(why)}; cells that go on: {on or 'none'}")


class Left:
    """The cells of an ended job that have neither a row nor an error of their own, by what came in their way."""

    def __init__(self, running: Running, results: ResultsFolder) -> None:
        self.interrupted: list[Cell] = []
        self.short_of_memory: list[Cell] = []
        self.died: list[Cell] = []
        self.advanced = False
        """Whether an interrupted one has taken steps."""
        for cell in running.job.cells:
            if has_row(results, cell.cell_id) or is_held(results.cell(cell.cell_id).lock):
                continue
            before, status = running.before[cell.cell_id], read_status(results.cell(cell.cell_id))
            state = status.state if status.attempts > before.attempts else "new"
            if state == "interrupted":
                self.interrupted.append(cell)
                self.advanced |= status.step > before.step
            elif state == "out_of_memory":
                self.short_of_memory.append(cell)
            elif state in ("new", "running") and running.process.returncode != 0:
                self.died.append(cell)


def smaller(job: Job, cells: Sequence[Cell]) -> list[Job]:
    """Jobs for cells that ran out of memory: without the others, or else in halves; none for a cell that was alone."""
    if len(cells) < len(job.cells):
        return [part(job, cells)]
    return halves(job, cells) if len(cells) > 1 else []


@contextlib.contextmanager
def start_environment(slot: Slot) -> Iterator[None]:
    """What a started process must inherit: its share of the machine, where our code is, and no ear for Ctrl-C.

    A terminal sends Ctrl-C and its own end to every process. Only the launcher shall act on them, and tell its jobs.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before = dict(os.environ)
    os.environ.update(payload.environment(slot), PYTHONPATH=path)
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        os.environ.clear()
        os.environ.update(before)


def run_local(queue: Queue, stop: Callable[[], bool], watch: Watch) -> None:
    """Work the queue off. `stop` is polled: once true, nothing more starts and every job saves and ends.

    Raises:
        Interrupted: `stop` became true; the cells are saved.
        KeyboardInterrupt: asked to end at once; the jobs are killed.
    """
    asked = False
    try:
        while queue.running or (queue.waiting and not stop()):
            if not stop():
                queue.fill()
            elif not asked:
                asked = True
                queue.ask_to_stop()
            watch(queue)
            time.sleep(POLL_SECONDS)
            queue.reap()
        watch(queue)
    except BaseException:
        for running in queue.running:
            running.kill()
        raise
    if asked or stop():
        raise Interrupted
