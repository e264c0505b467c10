"""What a cell's job says about itself: `status.json`, replaced atomically, the truth about a run."""

import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from sweep.failures import Failure
from sweep.paths import CellFolder, write_json
from sweep.progress import Snapshot
from sweep.revisions import read_object

__all__ = ["FAILED", "SCORES", "State", "Status", "read_status"]

State = Literal["new", "running", "interrupted", "done"] | Failure
STATES = ("new", "running", "interrupted", "done", *get_args(Failure))

FAILED: tuple[State, ...] = ("failed", "diverged", "out_of_memory", "disk_full", "crashed", "hung")
"""Ends by an error. A kill is none: it says nothing about the cell."""

MAX_BYTES = 1 << 20

SCORES = ("fvu", "l0", "dead_fraction")
"""What a status tells of how good a cell is."""


@dataclass(frozen=True)
class Status:
    """State of one cell. `attempts` counts starts, `failures` only ends by an error: a kill is not a failure.

    `job` is the id of its Slurm job, where it runs in one. `progress` is what its gang is at. The scores are those of
    the last point on the training curve, on a training batch by the training rule, until the cell is done; then they
    are the held-out ones. `notes` are the warnings of this start, for whoever watches.
    """

    state: State = "new"
    step: int = 0
    steps: int = 0
    rollbacks: int = 0
    attempts: int = 0
    failures: int = 0
    error: dict[str, str] = field(default_factory=dict)
    host: str = ""
    pid: int = 0
    job: str = ""
    updated_at: float = 0.0
    progress: Snapshot = field(default_factory=Snapshot)
    fvu: float | None = None
    l0: float | None = None
    dead_fraction: float | None = None
    notes: tuple[str, ...] | list[str] = ()

    def changed(self, **values: Any) -> "Status":
        return replace(self, **values, updated_at=time.time())

    def is_sound(self) -> bool:
        """Whether every field has the type it should: the file may have been damaged or written by a stranger."""
        counts = (self.step, self.steps, self.rollbacks, self.attempts, self.failures, self.pid, self.progress.done)
        numbers = (self.updated_at, self.progress.per_second, self.progress.seconds_left)
        texts = (*self.error.values(), *self.notes, self.host, self.job, self.progress.phase, self.progress.unit)
        scores = (self.fvu, self.l0, self.dead_fraction)
        return (
            self.state in STATES
            and all(type(count) is int for count in (*counts, self.progress.total))
            and all(type(number) in (int, float) for number in (*numbers, *(s for s in scores if s is not None)))
            and all(isinstance(text, str) for text in texts)
        )

    def write(self, folder: CellFolder, *, durable: bool = True) -> None:
        """Replace the file. One that is not `durable` may be lost with the machine: good enough for a heartbeat."""
        write_json(folder.status, asdict(self), durable=durable)


def read_status(folder: CellFolder) -> Status:
    """The cell's status; a fresh one when there is none, or when it cannot be read."""
    try:
        stored = read_object(folder.status, MAX_BYTES)
        known = {f.name: stored[f.name] for f in fields(Status) if f.name in stored}  # older versions had fewer
        status = Status(**known | {"progress": Snapshot(**known.get("progress", {}))})
        return status if status.is_sound() else Status()
    except (OSError, ValueError, TypeError, AttributeError):
        return Status()
