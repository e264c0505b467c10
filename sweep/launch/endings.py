"""How the process of a job ended, and what becomes of the cells it left unfinished.

1. Cells that ended by themselves, with a row or an error, are not asked about.
2. The exit code, the stacks of a job without a pulse and the cell it was at say what happened, and to whom.
3. A job that died is divided: the cell it died at alone, or in halves where that is not known; the others go on. What
   cannot be divided is tried once more where that can help: after a kill or a hang, not after a crash.

Every job made here is smaller than the one it comes from, or the last try of one cell: so there is an end.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sweep.config import Cell
from sweep.failures import Failure
from sweep.launch.jobs import Job
from sweep.locks import try_lock
from sweep.paths import ResultsFolder
from sweep.pulse import at_work_on, stacks_of
from sweep.status import FAILED, State, read_status

__all__ = ["Ending", "divided", "ending_of", "halves", "part", "record"]

FAULTS = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGSYS")
TAIL_BYTES = 1 << 12


@dataclass(frozen=True)
class Ending:
    """What ended a process: the kind of failure, in words, and the cell it was at, if any in particular."""

    state: Failure
    message: str
    cell_id: str = ""
    stacks: str = ""


def ending_of(code: int, job: Path, printed: Path) -> Ending:
    """Read off the exit code (negative: a signal), what the job left beside its file, and its last words."""
    at, stacks = at_work_on(job), stacks_of(job)
    if stacks:
        return Ending(
            "hung", f"no sign of life for hang_minutes; its threads' stacks are in {printed.parent}", at, stacks
        )
    if code < 0:
        name = signal_name(-code)
        if name in FAULTS:
            return Ending("crashed", f"by signal {-code} ({name})", at, tail(printed))
        guess = " (out of memory?)" if name == "SIGKILL" else ""
        return Ending("killed", f"by signal {-code} ({name}){guess}", at)
    last = tail(printed).strip().rpartition("\n")[2]
    return Ending("crashed", f"exited with code {code}" + (f": {last}" if last else ""), at, tail(printed))


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a signal without a name"


def tail(path: Path) -> str:
    """The end of what a job printed."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def divided(job: Job, ending: Ending, left: Sequence[Cell]) -> tuple[list[Job], list[Cell]]:
    """The jobs in which the cells that a dead job left unfinished go on, and those that do not."""
    culprits = [cell for cell in left if cell.cell_id == ending.cell_id and ending.state in ("crashed", "hung")]
    others = [cell for cell in left if cell not in culprits]
    if culprits:
        again = [part(job, others)] if others else []
        if ending.state == "hung" and not job.last_try:
            return [*again, replace(part(job, culprits), last_try=True)], []
        return again, culprits
    if len(left) > 1:
        return halves(job, left), []
    if ending.state == "crashed" or job.last_try:
        return [], list(left)
    return [replace(part(job, left), last_try=True)], []


def halves(job: Job, cells: Sequence[Cell]) -> list[Job]:
    middle = len(cells) // 2
    return [part(job, cells[:middle]), part(job, cells[middle:])]


def part(job: Job, cells: Sequence[Cell]) -> Job:
    return Job(tuple(cells), job.memory_bytes * len(cells) / len(job.cells))


def record(ending: Ending, cell_id: str, results: ResultsFolder, *, blamed: bool) -> None:
    """Write into a cell's status how its process ended, unless somebody is at the cell again."""
    folder = results.cell(cell_id)
    if (lock := try_lock(folder.lock)) is None:
        return
    with lock:
        status = read_status(folder)
        state: State = ending.state if blamed else "interrupted"
        error = {"class": ending.state, "message": ending.message, "traceback": ending.stacks}
        status.changed(state=state, error=error, failures=status.failures + (state in FAILED)).write(folder)
