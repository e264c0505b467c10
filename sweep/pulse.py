"""The pulse of a job: what it is at, for whoever finds it dead; and its end, if nothing moves any more.

Both work from outside of Python: the cell's name lies in memory shared with a file, which outlives any death of the
process, and the clock that ends a job without a pulse is a thread of C that needs no lock of the interpreter.
"""

import faulthandler
import mmap
import time
from pathlib import Path
from types import TracebackType

__all__ = ["Pulse", "at_work_on", "stacks_of"]

LENGTH = 64
BEAT_SECONDS = 1.0
MAX_STACKS = 1 << 16


def cell_file(job: Path) -> Path:
    """Beside a job's file: the cell it is at."""
    return job.with_suffix(".at")


def stacks_file(job: Path) -> Path:
    """Beside a job's file: where its threads stood when it was ended for want of a pulse; empty while it has one."""
    return job.with_suffix(".stacks")


class Pulse:
    """Of the process of one job, from `with` to its end. A job without a sign of life for `hang_seconds` (0: never)
    writes the stacks of all its threads and exits."""

    def __init__(self, job: Path, hang_seconds: float) -> None:
        self._hang_seconds = hang_seconds
        self._beaten = -BEAT_SECONDS
        with cell_file(job).open("w+b") as file:
            file.write(bytes(LENGTH))
            file.flush()
            self._cell = mmap.mmap(file.fileno(), LENGTH)
        self._stacks = stacks_file(job).open("w")

    def __enter__(self) -> "Pulse":
        faulthandler.enable()
        self.beat()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()

    def at(self, cell_id: str) -> None:
        """What follows is the work of this cell; of none in particular, if empty."""
        self._cell[:] = cell_id.encode()[:LENGTH].ljust(LENGTH, b"\0")
        self.beat()

    def report(self, phase: str, done: int, total: int, unit: str) -> None:
        """Progress in any phase is a sign of life."""
        self.beat()

    def beat(self) -> None:
        now = time.monotonic()
        if self._hang_seconds and now - self._beaten >= min(BEAT_SECONDS, self._hang_seconds / 10):
            self._beaten = now
            faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=self._stacks)


def at_work_on(job: Path) -> str:
    """The cell a job was at when it ended; empty when it was at none in particular."""
    try:
        return cell_file(job).read_bytes()[:LENGTH].rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""


def stacks_of(job: Path) -> str:
    """Where the threads of a job without a pulse stood; empty when it did not end for want of one."""
    try:
        with stacks_file(job).open("rb") as file:
            return file.read(MAX_STACKS).decode(errors="replace")
    except OSError:
        return ""
