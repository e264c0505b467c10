"""Backend `slurm`: jobs go out as arrays through submitit, and go on whether or not anybody watches.

1. A submission is one array. Its record, with a name nobody else has, lies on disk before sbatch is called.
2. squeue, asked by name, says which jobs live; `status.json` and the rows say how the cells fared. A job that Slurm no
   longer knows and that left no row is lost: the next run submits its cells again.
3. A job that is told to stop saves, and goes back into the queue itself (`payload.run_in_slurm`).

submitit's own idea of a job's state needs sacct, and its `result()` waits for ever on a job that left no pickle:
neither is used.
"""

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sweep.errors import SweepError
from sweep.launch import payload
from sweep.launch.claims import claimed
from sweep.launch.endings import Ending, record
from sweep.launch.jobs import Job
from sweep.launch.slurm_options import SlurmOptions
from sweep.launch.squeue import Seen, SlurmSilent, ask, slurm
from sweep.locks import is_held, locked
from sweep.options import Workflow
from sweep.paths import LaunchFolder, ResultsFolder, write_json
from sweep.pulse import stacks_of
from sweep.revisions import read_object
from sweep.status import FAILED, Status, read_status

__all__ = ["Followed", "SlurmJobs", "Submission", "follow", "live_cells", "may_grow", "sbatch_script", "submit"]

ASK_SECONDS = 10.0
"""How often Slurm is asked while somebody watches; its controller serves a whole cluster."""

DEFAULT_ARRAY_SIZE = 1001
"""Slurm's own, where it does not tell."""

MAX_RECORD_BYTES = 16 << 20
KEPT_VARIABLES = ("SLURM_CONF",)


@dataclass(frozen=True)
class Submission:
    """One array, or one job: its folder, and the cells of each element. `slurm_id` is empty until sbatch answered.

    `for_rows`: whether its end can be told by the rows of its cells, none of which was finished when it went out.
    `mem_gb` is the memory of each job, null where it was left to the cluster.
    """

    folder: LaunchFolder
    jobs: tuple[tuple[str, ...], ...]
    slurm_id: str = ""
    for_rows: bool = True
    mem_gb: float | None = None

    @property
    def name(self) -> str:
        return f"transcoders-{self.folder.root.name}"

    def job_id(self, index: int) -> str:
        return f"{self.slurm_id}_{index}" if len(self.jobs) > 1 else self.slurm_id

    def write(self) -> None:
        values = {"jobs": [list(cells) for cells in self.jobs], "slurm_id": self.slurm_id, "for_rows": self.for_rows}
        write_json(self.folder.submission, {**values, "mem_gb": self.mem_gb})

    @classmethod
    def read(cls, root: Path) -> "Submission | None":
        """The record in a folder; None where there is none, or it cannot be read."""
        folder = LaunchFolder(root)
        try:
            found = read_object(folder.submission, MAX_RECORD_BYTES)
            jobs = tuple(tuple(str(cell_id) for cell_id in cells) for cells in found["jobs"])
            memory, for_rows = found.get("mem_gb"), bool(found.get("for_rows", True))
            return cls(folder, jobs, str(found["slurm_id"]), for_rows, None if memory is None else float(memory))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Followed:
    """One job of a submission, and what Slurm last said of it: nothing once it has forgotten it."""

    submission: Submission
    index: int
    seen: Seen | None

    @property
    def cell_ids(self) -> tuple[str, ...]:
        return self.submission.jobs[self.index]

    @property
    def id(self) -> str:
        return self.submission.job_id(self.index) if self.seen is None else self.seen.id

    @property
    def live(self) -> bool:
        return self.seen is not None and self.seen.live

    @property
    def words(self) -> str:
        """Such as `Slurm job 12_3, 16 GB, running on node1`."""
        memory = "" if self.submission.mem_gb is None else f", {self.submission.mem_gb:g} GB"
        return f"Slurm job {self.id}{memory}, {'unknown to Slurm' if self.seen is None else self.seen.words}"

    @property
    def log(self) -> Path:
        """What the job printed, errors included."""
        return self.submission.folder.submitit / f"{self.id}_0_log.err"


def follow(results: ResultsFolder, *, finished: bool = False) -> list[Followed]:
    """Every job submitted for a results folder that is not known to be over, the oldest submission first.

    Those whose cells all have rows are `finished`: nobody need ask Slurm about them, unless to clear them away.

    Raises:
        SlurmSilent: there are such jobs and Slurm cannot be asked.
    """
    roots = [root for root in results.slurm.glob("*/") if not LaunchFolder(root).over.exists()]
    submissions = [Submission.read(root) for root in sorted(roots, key=lambda root: root.stat().st_mtime)]
    known = [each for each in submissions if each and (finished or not (each.for_rows and has_rows(each, results)))]
    seen = {(each.name, each.index): each for each in ask([submission.name for submission in known])}
    return [
        Followed(submission, index, seen.get((submission.name, index)))
        for submission in known
        for index in range(len(submission.jobs))
    ]


def has_rows(submission: Submission, results: ResultsFolder) -> bool:
    """Whether every cell of it is finished."""
    return all(results.row("runs", cell_id).exists() for cells in submission.jobs for cell_id in cells)


def live_cells(followed: Sequence[Followed]) -> dict[str, str]:
    """For each cell in a job that runs, waits or may come back: which job, in words."""
    return {cell_id: job.words for job in followed if job.live for cell_id in job.cell_ids}


def submit(
    jobs: Sequence[Job], workflow: Workflow, options: SlurmOptions, results: ResultsFolder
) -> tuple[list[Submission], str]:
    """Send the jobs out, in as many arrays as Slurm's limit asks for. Returns what went out and why the rest did not.

    Cells that another launcher has sent out meanwhile are left to it. Paths become absolute: a job may start elsewhere.

    Side effects: folders under `results.slurm`; those of submissions that ended well go.
    """
    size = min(options.max_array_size or DEFAULT_ARRAY_SIZE, largest_array())
    workflow = replace(
        workflow,
        results_dir=str(Path(workflow.results_dir).absolute()),
        cache_dir=str(Path(workflow.cache_dir).absolute()),
    )
    sent: list[Submission] = []
    results.slurm.mkdir(exist_ok=True)
    with locked(results.lock):
        followed = follow(results, finished=True)
        tell_memory(followed, results)
        had = memory_had(results)
        tidy(followed, results)
        taken = claimed(results) | live_cells(followed)
        parts = [tuple(cell_id for cell_id in job.cell_ids if cell_id not in taken) for job in jobs]
        by_memory: dict[float | None, list[tuple[str, ...]]] = {}
        for part in filter(None, parts):
            by_memory.setdefault(memory_for(part, options, results, had), []).append(part)
        arrays = [
            (memory, alike[begin : begin + size])
            for memory, alike in by_memory.items()
            for begin in range(0, len(alike), size)
        ]
        for memory, alike in arrays:
            after = sent[-1].slurm_id if sent and options.array_parallelism else None
            try:
                sent.append(send(alike, workflow, options, results, after, memory))
            except SweepError as error:
                return sent, str(error)
    return sent, ""


def send(
    jobs: Sequence[tuple[str, ...]],
    workflow: Workflow,
    options: SlurmOptions,
    results: ResultsFolder,
    after: str | None,
    mem_gb: float | None,
) -> Submission:
    """One array. `after` is the one whose end it waits for, so that `array_parallelism` holds for all together.

    Raises:
        SweepError: Slurm did not take it, in its words.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    root = Path(tempfile.mkdtemp(dir=results.slurm, prefix="")).absolute()
    for_rows = not any(results.row("runs", cell_id).exists() for cells in jobs for cell_id in cells)
    submission = Submission(LaunchFolder(root), tuple(jobs), for_rows=for_rows, mem_gb=mem_gb)
    for index, cell_ids in enumerate(jobs):
        payload.describe(submission.folder.job(index), cell_ids, workflow, None)
    submission.write()
    said = io.StringIO()
    try:
        with outside_of_a_job(), contextlib.redirect_stderr(said):
            executor = submitit.SlurmExecutor(submission.folder.submitit, python=options.command)
            parameters = options.sbatch(submission.name, mem_gb) | {"wckey": None}
            executor.update_parameters(**parameters, **({"dependency": f"afterany:{after}"} if after else {}))
            paths = [str(submission.folder.job(index)) for index in range(len(jobs))]
            started: list[Any] = executor.map_array(payload.run_in_slurm, paths)
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        shutil.rmtree(root)
        raise SweepError(f"sbatch: {error or said.getvalue()}") from error
    submission = replace(submission, slurm_id=str(started[0].job_id).partition("_")[0])
    submission.write()
    return submission


def memory_had(results: ResultsFolder) -> dict[str, float]:
    """The most memory, in GB, that each cell has had in a job whose folder is still there."""
    had: dict[str, float] = {}
    for submission in filter(None, map(Submission.read, results.slurm.glob("*/"))):
        for cell_id in (cell_id for cells in submission.jobs for cell_id in cells):
            had[cell_id] = max(had.get(cell_id, 0.0), submission.mem_gb or 0.0)
    return had


def memory_for(
    cell_ids: Sequence[str], options: SlurmOptions, results: ResultsFolder, had: Mapping[str, float]
) -> float | None:
    """What to ask for a job, in GB: for cells that ran out of memory twice what they had, up to the limit."""
    if options.mem_gb is None or options.most_memory is None:
        return None
    short = [2 * had[each] for each in cell_ids if each in had and ran_out(read_status(results.cell(each)))]
    return min(max([options.mem_gb, *short]), max(options.mem_gb, options.most_memory))


def ran_out(status: Status) -> bool:
    """Whether a cell ended for want of main memory; that of a GPU does not grow with what Slurm is asked for."""
    return status.state == "out_of_memory" and "CUDA" not in status.error.get("message", "")


def may_grow(cell_ids: Collection[str], options: SlurmOptions, results: ResultsFolder) -> list[str]:
    """Those of the cells that ran out of memory and may be given more."""
    had = memory_had(results)
    return [
        each
        for each in cell_ids
        if options.most_memory is not None
        and 0 < had.get(each, 0.0) < options.most_memory
        and ran_out(read_status(results.cell(each)))
    ]


def tell_memory(followed: Sequence[Followed], results: ResultsFolder) -> None:
    """Write into the statuses of cells whose job Slurm killed for its memory that it did."""
    newest = {cell_id: job for job in followed for cell_id in job.cell_ids}
    for cell_id, job in newest.items():
        if job.seen is None or job.seen.state != "OUT_OF_MEMORY" or results.row("runs", cell_id).exists():
            continue
        if read_status(results.cell(cell_id)).state not in FAILED:
            record(Ending("out_of_memory", job.words), cell_id, results, blamed=True)


def sbatch_script(n_jobs: int, options: SlurmOptions, results: ResultsFolder) -> str:
    """The script of the first array, as it would go out."""
    from submitit.slurm import slurm as script

    size = min(n_jobs, options.max_array_size or DEFAULT_ARRAY_SIZE)
    folder = (results.slurm / "SUBMISSION" / "submitit").absolute()
    parameters: dict[str, Any] = options.sbatch("transcoders-SUBMISSION") | {"wckey": None}
    if size > 1:
        parameters["map_count"] = size
    command = f"{options.command} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return script._make_sbatch_string(command=command, folder=folder, **parameters)


def largest_array() -> int:
    """Elements one array may have on this cluster."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.MULTILINE)
    return max(int(found[1]), 1) if found else DEFAULT_ARRAY_SIZE


@contextlib.contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Hide the variables of the job that a launcher may itself run in: sbatch would take them for wishes."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("SLURM_") and name not in KEPT_VARIABLES:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def tidy(followed: Sequence[Followed], results: ResultsFolder) -> None:
    """Submissions without a live job are asked about no more; those whose cells all have rows go."""
    for root, group in itertools.groupby(followed, key=lambda job: job.submission.folder.root):
        jobs = list(group)
        if any(job.live for job in jobs):
            continue
        if has_rows(jobs[0].submission, results):
            shutil.rmtree(root, ignore_errors=True)
        else:
            LaunchFolder(root).over.touch()


class SlurmJobs:
    """What the watcher and the final table need to know of the jobs of some cells. Ask it to `refresh`."""

    def __init__(self, results: ResultsFolder, cell_ids: Collection[str]) -> None:
        self._results = results
        self._cell_ids = frozenset(cell_ids)
        self._asked = -ASK_SECONDS
        self._jobs: list[Followed] = []
        self.silent = ""
        """Why Slurm did not answer last time; empty when it did. What it said before stands."""

    def refresh(self, *, now: bool = False) -> None:
        """Ask Slurm, unless it was asked just now."""
        if not now and time.monotonic() - self._asked < ASK_SECONDS:
            return
        self._asked = time.monotonic()
        try:
            jobs = follow(self._results)
        except SlurmSilent as error:
            self.silent = str(error)
        else:
            self.silent = ""
            listed = {job.submission.name for job in jobs}
            gone = [job for job in self._jobs if job.submission.name not in listed]
            jobs = [replace(job, seen=None) if job.live else job for job in gone] + jobs
            self._jobs = [job for job in jobs if self._cell_ids & set(job.cell_ids)]

    def tell_memory(self) -> None:
        """Write into the statuses of cells whose job Slurm killed for its memory that it did."""
        tell_memory(self._jobs, self._results)

    @property
    def live(self) -> list[Followed]:
        return [job for job in self._jobs if job.live]

    @property
    def over(self) -> bool:
        return not self.live and not self.silent

    @property
    def words(self) -> Mapping[str, str]:
        """Cells whose job is not running, with what it waits for."""
        idle = [job for job in self.live if job.seen and job.seen.state not in ("RUNNING", "COMPLETING")]
        return {cell_id: job.seen.words for job in idle if job.seen for cell_id in job.cell_ids}

    @property
    def at_work(self) -> list[tuple[str, Sequence[str]]]:
        return [(job.id, job.cell_ids) for job in self.live if job.seen and job.seen.state == "RUNNING"]

    @property
    def n_jobs(self) -> int:
        return len(self._jobs)

    def of(self, cell_id: str) -> Followed | None:
        """The job a cell was last in."""
        return next((job for job in reversed(self._jobs) if cell_id in job.cell_ids), None)

    def is_news(self, cell_id: str, status: Status) -> bool:
        """Whether a status is of the cell's present job, and not from before."""
        job = self.of(cell_id)
        return job is None or not job.live or status.job == job.id

    def ending(self, cell_id: str) -> tuple[str, Path] | None:
        """Why a cell that left no row has none, as far as its job tells."""
        job = self.of(cell_id)
        if job is None:
            return None
        if job.live:
            return f"in {job.words}; python -m sweep watch follows it", job.log
        if is_held(self._results.cell(cell_id).lock):
            return f"in {job.words}, and at work; python -m sweep watch follows it", job.log
        file = job.submission.folder.job(job.index)
        if stacks_of(file):
            words = f"hung: no sign of life for hang_minutes; its threads' stacks are in {file.parent}"
            return f"{words}; give the command again to go on", job.log
        if job.seen is not None and job.seen.state == "OUT_OF_MEMORY":
            fix = "give the command again with more hydra.launcher.mem_gb=, or jobs= for smaller gangs"
            return f"out of memory: {job.words}; {fix}", job.log
        return f"lost: {job.words}; give the command again to go on", job.log
