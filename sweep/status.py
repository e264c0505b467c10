"""What a cell's job says about itself: `status.json`, replaced atomically, the truth about a run."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from sweep.paths import CellFolder, write_json

__all__ = ["State", "Status", "read_status"]

State = Literal["new", "running", "interrupted", "failed", "diverged", "done"]
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Status:
    """State of one cell. `attempts` counts starts, `failures` only ends by an error: a kill is not a failure."""

    state: State = "new"
    step: int = 0
    steps: int = 0
    attempts: int = 0
    failures: int = 0
    error: dict[str, str] = field(default_factory=dict)
    host: str = ""
    pid: int = 0
    updated_at: float = 0.0

    def changed(self, **values: Any) -> "Status":
        return replace(self, **values, updated_at=time.time())

    def is_sound(self) -> bool:
        """Whether every field has the type it should: the file may have been damaged or written by a stranger."""
        counts = (self.step, self.steps, self.attempts, self.failures, self.pid)
        return (
            self.state in get_args(State)
            and all(type(count) is int for count in counts)
            and isinstance(self.error, dict)
            and all(isinstance(text, str) for text in (*self.error.values(), self.host))
        )

    def write(self, folder: CellFolder) -> None:
        write_json(folder.status, asdict(self))


def read_status(folder: CellFolder) -> Status:
    """The cell's status; a fresh one when there is none, or when it cannot be read."""
    try:
        if folder.status.stat().st_size > MAX_BYTES:
            return Status()
        status = Status(**json.loads(folder.status.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Status()
    return status if status.is_sound() else Status()
