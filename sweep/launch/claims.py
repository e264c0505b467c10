"""Claims: which launcher is at which cells, so that several launchers share a results folder.

1. Under the lock of the results folder a launcher claims those of its cells that are in nobody else's hands.
2. A claim lives while its launcher holds the lock of its own folder. The kernel lets go of that one when the process
   ends, whatever ends it, on this machine or, where the file system carries locks, on another one. No clock is asked.
3. A cell is in other hands while a living claim names it, or a process has its lock. Then it is watched.
4. Once it no longer is, it has a row, or an error since it was claimed, or it was left and may be claimed again.
"""

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sweep.attempt import whereabouts
from sweep.locks import is_held
from sweep.paths import LaunchFolder, ResultsFolder, write_json
from sweep.revisions import read_object
from sweep.status import FAILED, Status, read_status

__all__ = ["Claim", "Others", "claimed", "living_claims"]

LOOK_SECONDS = 1.0
MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Claim:
    """The cells of a launcher, each with the number of times it had been started before."""

    starts: Mapping[str, int]
    host: str = field(default_factory=lambda: whereabouts(os.environ))
    pid: int = field(default_factory=os.getpid)

    @property
    def words(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def of(cls, cell_ids: Collection[str], results: ResultsFolder) -> "Claim":
        """A claim of this process; nobody hears of it before it is written."""
        return cls({cell_id: read_status(results.cell(cell_id)).attempts for cell_id in cell_ids})

    def among(self, cell_ids: Collection[str]) -> "Claim":
        """The claim, of these cells only."""
        return replace(self, starts={cell_id: self.starts[cell_id] for cell_id in cell_ids if cell_id in self.starts})

    def write(self, folder: LaunchFolder) -> None:
        """Make the claim known; the caller holds the folder's lock, and that of the results folder."""
        write_json(folder.claim, {"starts": dict(self.starts), "host": self.host, "pid": self.pid})

    @classmethod
    def read(cls, path: Path) -> "Claim | None":
        """The claim in a file; None where there is none, or it cannot be read."""
        try:
            found = read_object(path, MAX_BYTES)
            starts = {str(cell_id): int(n) for cell_id, n in found["starts"].items()}
            return cls(starts, str(found["host"]), int(found["pid"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def living_claims(results: ResultsFolder) -> list[Claim]:
    """The claims of all launchers that live."""
    folders = [LaunchFolder(path.parent) for path in sorted(results.sweeps.glob("*/claim.json"))]
    claims = [Claim.read(folder.claim) for folder in folders if is_held(folder.lock)]
    return [claim for claim in claims if claim is not None]


def claimed(results: ResultsFolder) -> dict[str, str]:
    """The cells that living launchers have claimed, and who."""
    return {cell_id: claim.words for claim in living_claims(results) for cell_id in claim.starts}


class Others:
    """Those of some cells that are in other hands, as jobs to watch. Ask it to `refresh`."""

    silent = ""

    def __init__(self, results: ResultsFolder, cell_ids: Collection[str]) -> None:
        self._results = results
        self._cell_ids = list(cell_ids)
        self.claims: list[Claim] = []
        """Of these cells, by launchers that live."""
        self._locked: list[str] = []
        self._starts: dict[str, int] = {}
        self._looked = -LOOK_SECONDS
        self.refresh()

    def refresh(self) -> None:
        """Look for claims and locks, unless that was done just now."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        unfinished = [cell_id for cell_id in self._cell_ids if not self._results.row("runs", cell_id).exists()]
        claims = [claim.among(unfinished) for claim in living_claims(self._results)]
        self.claims = [claim for claim in claims if claim.starts]
        self._locked = [cell_id for cell_id in unfinished if is_held(self._results.cell(cell_id).lock)]
        for claim in self.claims:
            self._starts |= claim.starts

    @property
    def over(self) -> bool:
        return not self.claims and not self._locked

    @property
    def words(self) -> Mapping[str, str]:
        """What each cell is at, and that it is so elsewhere. A job in Slurm speaks for itself."""
        found = {}
        for cell_id in dict.fromkeys([*(cell_id for claim in self.claims for cell_id in claim.starts), *self._locked]):
            status = read_status(self._results.cell(cell_id))
            if not self.is_news(cell_id, status):
                found[cell_id] = "waiting elsewhere"
            elif status.state == "running" and not status.job:
                found[cell_id] = f"{status.progress.phase or 'starting'} elsewhere"
        return found

    @property
    def at_work(self) -> Sequence[tuple[str, Sequence[str]]]:
        return [(f"of {claim.words}", list(claim.starts)) for claim in self.claims]

    @property
    def n_jobs(self) -> int:
        return len(self.claims)

    def is_news(self, cell_id: str, status: Status) -> bool:
        """Whether the cell has been started since it was claimed."""
        return status.attempts > self._starts.get(cell_id, -1)

    def ending(self, cell_id: str) -> tuple[str, Path] | None:
        """In whose hands a cell is that has neither row nor error, if in anybody's."""
        at = next((claim.words for claim in self.claims if cell_id in claim.starts), None)
        words = f"is left to {at}; python -m sweep watch follows it"
        return None if at is None else (words, self._results.cell(cell_id).log)

    @property
    def left(self) -> set[str]:
        """Cells in nobody's hands without row or new error: whoever had them died, or was stopped."""
        claimed = {cell_id for claim in self.claims for cell_id in claim.starts}
        return {cell_id for cell_id in self._cell_ids if cell_id not in claimed and not self._settled(cell_id)}

    def _settled(self, cell_id: str) -> bool:
        if self._results.row("runs", cell_id).exists() or cell_id in self._locked:
            return True
        status = read_status(self._results.cell(cell_id))
        return status.state in (*FAILED, "killed") and self.is_news(cell_id, status)
