"""Backend `local`: a queue of jobs over the slots of this machine, each job a process of its own.

submitit starts the processes; it has no queue, no pinning by UUID and no way to stop gently, so those are here.
Whether a job is over is known from its process, how its cells fared from their `status.json`; submitit's pickles are
never read.
"""

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from sweep.errors import Interrupted
from sweep.launch import payload
from sweep.launch.jobs import Job
from sweep.launch.machine import Slot
from sweep.options import Workflow
from sweep.paths import LaunchFolder, ResultsFolder
from sweep.status import Status, read_status

if TYPE_CHECKING:
    import subprocess

    import submitit

__all__ = ["Queue", "Running", "run_local"]

POLL_SECONDS = 0.2
FOREVER_MINUTES = 60 * 24 * 365 * 10
"""submitit kills a local job after two minutes unless told otherwise."""

ROOT = Path(__file__).resolve().parents[2]

KILLED = "was killed: its process ended without a word; give the command again to go on"

Watch = Callable[["Queue"], None]


@dataclass
class Running:
    """A job at work in a slot."""

    number: int
    job: Job
    slot: Slot
    process: "subprocess.Popen[bytes]"

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

    def __init__(self, jobs: Sequence[Job], slots: Sequence[Slot], workflow: Workflow, folder: LaunchFolder) -> None:
        self.waiting = deque(enumerate(jobs, 1))
        self.running: list[Running] = []
        self.ended: list[Running] = []
        results = ResultsFolder(Path(workflow.results_dir))
        ids = (cell_id for job in jobs for cell_id in job.cell_ids)
        self._starts_before = {cell_id: read_status(results.cell(cell_id)).attempts for cell_id in ids}
        self._free = list(slots)
        self._workflow = workflow
        self._folder = folder
        self._executor: submitit.LocalExecutor | None = None

    def fill(self) -> None:
        """Start waiting jobs in free slots."""
        while self.waiting and self._free:
            number, job = self.waiting.popleft()
            slot = self._free.pop(0)
            self.running.append(Running(number, job, slot, self._start(number, job, slot)))

    def ask_to_stop(self) -> None:
        """Every job saves and ends at its next step; one that is still starting ends before its first."""
        self._folder.stop.touch()

    def reap(self) -> None:
        """Take the jobs out whose process has ended."""
        for running in [each for each in self.running if each.over]:
            self.running.remove(running)
            self.ended.append(running)
            self._free.append(running.slot)

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
        return KILLED, self._folder.submitit / f"{jobs[-1].process.pid}_0_log.err"

    def _start(self, number: int, job: Job, slot: Slot) -> "subprocess.Popen[bytes]":
        if self._executor is None:
            import submitit

            self._executor = submitit.LocalExecutor(self._folder.submitit)
            self._executor.update_parameters(timeout_min=FOREVER_MINUTES)
        path = self._folder.job(number)
        payload.describe(path, job.cell_ids, self._workflow, slot)
        with start_environment(slot):
            started: Any = self._executor.submit(payload.run, str(path))
        process: subprocess.Popen[bytes] = started._process
        return process


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
