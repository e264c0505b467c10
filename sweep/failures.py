"""Kinds of failure, as a status and a person name them: what an error says about its cause."""

import errno
from collections.abc import Iterator
from typing import Literal

from sweep.errors import Diverged

__all__ = ["Failure", "kind", "words"]

Failure = Literal["failed", "diverged", "out_of_memory", "disk_full", "crashed", "hung", "killed"]
"""`failed` is any other exception; `crashed` a process that ended by itself, by a fault or an exit code."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_WORDS = ("No space left on device", "Disk quota exceeded")
"""What libraries say that hide the number of the error."""

MEMORY_WORDS = ("can't allocate memory", "out of memory", "Cannot allocate memory")
"""torch says it of the CPU in a plain RuntimeError."""


def kind(error: BaseException) -> Failure:
    """What an exception counts as; what it came from is looked at too."""
    for each in causes(error):
        number, text = getattr(each, "errno", None), str(each)
        if isinstance(each, Diverged):
            return "diverged"
        if number in DISK_FULL or any(words in text for words in DISK_FULL_WORDS):
            return "disk_full"
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError" or number == errno.ENOMEM:
            return "out_of_memory"
        if isinstance(each, RuntimeError) and any(words in text for words in MEMORY_WORDS):
            return "out_of_memory"
    return "failed"


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def words(state: str) -> str:
    """A state as a person reads it."""
    return state.replace("_", " ")
