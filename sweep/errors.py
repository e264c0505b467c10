"""The exception tree: everything a user can cause, one line each.

SweepError
├── ConfigError          a key, its value and the fix; may hold the problems of many cells
├── ResultsError         a results folder or a file in it is not ours, or not whole
│   └── CheckpointError  a checkpoint is damaged or belongs to another cell
├── DataError            text that is empty or changed under our feet
│   └── TooShort         text that does not fill every split
├── ModelError           a language model that cannot be loaded, or lacks the hook or layer
├── BaselineError        somebody else's transcoder that is not there, not whole, or of another model
├── Diverged             the training loss of a cell stopped being a number
└── Superseded           a cell has been started again elsewhere, and this start may no longer write

Interrupted              not an error: somebody asked the job to stop, and it has saved its cells
"""

from collections.abc import Mapping

__all__ = [
    "BaselineError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Diverged",
    "Interrupted",
    "ModelError",
    "ResultsError",
    "Superseded",
    "SweepError",
    "TooShort",
    "first_line",
]


class SweepError(Exception):
    """Root: its message is written for the user and is shown without a traceback."""


class ConfigError(SweepError):
    """One or more problems in the options of a cell, each naming key, value and fix."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ResultsError(SweepError):
    """A results folder or one of its files is not ours, or not whole."""


class CheckpointError(ResultsError):
    """A checkpoint is damaged or belongs to another cell."""


class DataError(SweepError):
    """The text is empty, too short for the budget, or not the one a run began with."""


class TooShort(DataError):
    """The text does not fill every split; `n_rows` says how many rows of each it fills."""

    def __init__(self, message: str, n_rows: Mapping[str, int]) -> None:
        super().__init__(message)
        self.n_rows = n_rows


class ModelError(SweepError):
    """The language model cannot be loaded, or has no such layer or hook."""


class BaselineError(SweepError):
    """Somebody else's transcoder is not there, not whole, or of another model."""


class Diverged(SweepError):
    """The training loss of a cell is no longer finite."""


class Superseded(SweepError):
    """The cell has been started again elsewhere; what this start does is no longer wanted."""


class Interrupted(BaseException):
    """Somebody asked the job to stop. Like KeyboardInterrupt it passes every `except Exception`."""


def first_line(error: BaseException) -> str:
    """What somebody else's error says, without the traces libraries append; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
