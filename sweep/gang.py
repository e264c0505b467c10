"""A gang: the cells that train in lockstep, and the one place where an error costs a cell its place.

A cell that fails leaves with class, message and traceback in its status; the others go on.
"""

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from sweep.attempt import Attempt, began_in, slurm_job, whereabouts
from sweep.config import Cell, Site, StreamConfig
from sweep.errors import CheckpointError, Superseded, SweepError
from sweep.evaluate import Evaluation
from sweep.failures import kind
from sweep.leftovers import tidy_cell
from sweep.locks import try_lock
from sweep.paths import CellFolder, ResultsFolder
from sweep.progress import Snapshot
from sweep.results import has_row, read_row
from sweep.saved import read_cell
from sweep.secrets import without_secrets
from sweep.status import Status, read_status
from sweep.train import Run
from sweep.transcoder import Transcoder

__all__ = ["Gang", "Member", "join"]

HEARTBEAT_SECONDS = 2.0
LOCK_TRIES = 5
MAX_NOTES, MAX_NOTE_CHARACTERS = 8, 500
GHOST_SECONDS = 60.0
"""How long a job waits for its own ghost on a lost node to leave. It may hang there for ever; it cannot write."""

log = logging.getLogger(__name__)


@dataclass
class Member:
    """A cell of the gang while it is in it."""

    cell: Cell
    folder: CellFolder
    status: Status
    attempt: Attempt
    run: Run | None = None
    transcoder: Transcoder | None = None
    evaluation: Evaluation | None = None
    last_beat: float = 0.0
    finished: bool = False
    """Its row is there; it is here for the baselines of its layer."""

    @property
    def log(self) -> "logging.LoggerAdapter[logging.Logger]":
        """Speaks in this cell's log only."""
        return logging.LoggerAdapter(log, {"cell_id": self.cell.cell_id})

    def set_status(self, *, durable: bool = True, **values: Any) -> None:
        """Replace the cell's status.

        Raises:
            Superseded: the cell has been started again elsewhere.
        """
        self.attempt.check()
        self.status = self.status.changed(**values)
        self.status.write(self.folder, durable=durable)
        self.last_beat = time.monotonic()

    def beat(self, progress: Snapshot) -> None:
        """Say what the gang is at and how far the cell is, at most every HEARTBEAT_SECONDS."""
        if time.monotonic() - self.last_beat <= HEARTBEAT_SECONDS:
            return
        with contextlib.suppress(OSError):  # a full disk may be empty again when there is something to save
            self.set_status(durable=False, progress=progress, **({} if self.run is None else self.run.standing()))


@dataclass
class Gang:
    """The members still in it, and the one place where an error costs a member its place.

    `at` is told whose work follows, and an empty name when it is done. `finished` are there for baselines alone: their
    logs and statuses tell how that goes.
    """

    members: list[Member]
    at: Callable[[str], None]
    finished: list[Member] = field(default_factory=list)

    @property
    def stream(self) -> StreamConfig:
        return (*self.members, *self.finished)[0].cell.stream

    @property
    def sites(self) -> list[Site]:
        return list(dict.fromkeys(member.cell.site for member in self.members))

    @property
    def steps(self) -> int:
        """Steps of the longest member."""
        return max((member.cell.schedule.steps for member in self.members), default=0)

    def guard(self, member: Member, action: Callable[[], None]) -> bool:
        """Run the action; on any error record class, message and traceback, and let the member go."""
        if member not in self.members:
            return False
        self.at(member.cell.cell_id)
        try:
            action()
        except Exception as error:
            self.fail(member, error)
            return False
        finally:
            self.at("")
        return True

    def beat(self, progress: Snapshot) -> None:
        self.guard_all(lambda member: member.beat(progress))
        for member in self.finished:
            with contextlib.suppress(Superseded):
                member.beat(progress)

    def guard_all(self, action: Callable[[Member], None]) -> None:
        for member in list(self.members):
            self.guard(member, lambda member=member: action(member))  # type: ignore[misc]

    def fail(self, member: Member, error: Exception) -> None:
        """Let the member go, with the error in its status, unless the status is another's by now."""
        if member not in self.members:  # superseded while its action ran on
            return
        self.members.remove(member)
        if isinstance(error, Superseded):
            member.log.info("left: %s", error)
            return
        told = described(error)
        member.log.info("failed: %s", error if isinstance(error, SweepError) else told["traceback"])
        try:
            member.set_status(
                state=kind(error),
                failures=member.status.failures + 1,
                **({} if member.run is None else member.run.standing()),
                error=told,
            )
        except Superseded:
            pass
        except OSError as unwritten:
            log.error("cell %s %s, and its status cannot be written: %s", member.cell.cell_id, kind(error), unwritten)

    def fail_all(self, error: Exception) -> None:
        for member in list(self.members):
            self.fail(member, error)
        for member in self.finished:
            member.log.error("no baselines: %s", error, exc_info=not isinstance(error, SweepError) and error)


def described(error: Exception) -> dict[str, str]:
    """An error as a status holds it."""
    trace = "".join(traceback.format_exception(error))
    return {
        "class": type(error).__name__,
        "message": without_secrets(str(error)),
        "traceback": without_secrets(trace),
    }


def join(
    cell_ids: Sequence[str], results: ResultsFolder, stack: contextlib.ExitStack, *, finished_too: bool = False
) -> Iterator[Member]:
    """The cells that are to do and nobody else is at, each locked and with its log open until the stack closes.

    A cell may have been finished by another launcher after this one looked; it comes too if `finished_too`.
    """
    job = slurm_job(os.environ)
    for cell_id in cell_ids:
        folder = results.cell(cell_id)
        lock = lock_patiently(folder.lock)
        if lock is not None:
            stack.enter_context(lock)
        elif not began_in(folder, job):
            log.warning("cell %s is being run by another process; leaving it to that one", cell_id)
            continue
        if finished := has_row(results, cell_id):
            log.info("cell %s is finished already", cell_id)
            if not finished_too or lock is None or read_row(results.row("runs", cell_id))["status"] != "done":
                continue
        if lock is not None:
            tidy_cell(results, cell_id)
        attempt = Attempt.begin(folder, job)
        if lock is None:
            wait_for_ghost(folder.lock, stack)
        stack.enter_context(logging_to(folder.log, cell_id))
        status = read_status(folder)
        try:
            cell = read_cell(folder)
        except CheckpointError as error:  # somebody changed the file after a launcher wrote it
            log.error("cell %s is left out: %s", cell_id, error)
            ended = {"state": "failed", "attempts": status.attempts + 1, "failures": status.failures + 1}
            status.changed(**ended, error=described(error)).write(folder)
            continue
        member = Member(cell, folder, status, attempt, finished=finished)
        member.set_status(
            state="running",
            steps=member.cell.schedule.steps,
            attempts=status.attempts + 1,
            error={},
            notes=(),
            progress=Snapshot(),
            host=whereabouts(os.environ),
            pid=os.getpid(),
            job=job,
        )
        stack.enter_context(noting(member))
        if finished:
            stack.callback(say_done, member)
        yield member


def say_done(member: Member) -> None:
    """The status of a finished cell is what it was; should this not come to pass, the next launcher sees to it."""
    with contextlib.suppress(OSError, Superseded):
        member.set_status(state="done", progress=Snapshot())


def lock_patiently(path: Path, tries: int = LOCK_TRIES) -> IO[bytes] | None:
    """The lock of a cell; a few tries, as another process may just be looking whether it is taken."""
    for _ in range(tries):
        if lock := try_lock(path):
            return lock
        time.sleep(0.1)
    return None


def wait_for_ghost(path: Path, stack: contextlib.ExitStack) -> None:
    """Take the lock once an earlier start of this very job has seen that it is superseded, or go on without."""
    if lock := lock_patiently(path, round(GHOST_SECONDS / 0.1)):
        stack.enter_context(lock)


class Notes(logging.Handler):
    """Puts warnings into the status of a cell, to be written with its next heartbeat."""

    def __init__(self, member: Member) -> None:
        super().__init__(logging.WARNING)
        self.member = member

    def emit(self, record: logging.LogRecord) -> None:
        status, note = self.member.status, without_secrets(record.getMessage())[:MAX_NOTE_CHARACTERS]
        if note not in status.notes and len(status.notes) < MAX_NOTES:
            self.member.status = replace(status, notes=(*status.notes, note))


@contextlib.contextmanager
def noting(member: Member) -> Iterator[None]:
    """Tell whoever watches the cell what the package warns of, but for what speaks of another cell."""
    handler, logger = Notes(member), logging.getLogger("sweep")
    handler.addFilter(lambda record: getattr(record, "cell_id", member.cell.cell_id) == member.cell.cell_id)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class Discreet(logging.Formatter):
    """Leaves secrets out, of tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


@contextlib.contextmanager
def logging_to(path: Path, cell_id: str) -> Iterator[None]:
    """Append what the package logs to a file, but for what speaks of another cell."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.addFilter(lambda record: getattr(record, "cell_id", cell_id) == cell_id)
    handler.setFormatter(Discreet("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("sweep")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
