"""What came of cells: a table of results, a table of failures with their causes, and the exit code."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sweep.launch import console
from sweep.launch.console import Failure
from sweep.launch.local import KILLED
from sweep.launch.plan import Planned, is_locked
from sweep.paths import ResultsFolder
from sweep.results import read_row
from sweep.status import read_status

__all__ = ["DONE", "FAILED", "INTERRUPTED", "WRONG", "tell"]

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


@runtime_checkable
class Ended(Protocol):
    """Jobs that know how they ended."""

    def ending(self, cell_id: str) -> tuple[str, Path] | None:
        """Why a cell left neither row nor error, and where its job's words are."""


def tell(cells: Sequence[Planned], results: ResultsFolder, jobs: Ended | None = None) -> int:
    """Show results and failures; the exit code says whether every cell is done."""
    metrics: dict[str, dict[str, Any]] = {}
    failures: dict[str, list[Failure]] = {}
    for planned in cells:
        cell_id = planned.cell.cell_id
        if results.row("runs", cell_id).exists():
            metrics[cell_id] = read_row(results.row("runs", cell_id))
        else:
            reason, log = why_not_done(cell_id, results, jobs)
            failures.setdefault(reason, []).append((cell_id, log))
    console.show_results(cells, metrics)
    console.show_failures(failures)
    if metrics:
        console.out.print(f"ranked against baselines: python -m analysis rank {shlex.quote(str(results.root))}")
    return FAILED if failures else DONE


def why_not_done(cell_id: str, results: ResultsFolder, jobs: Ended | None) -> tuple[str, Path]:
    """Why a cell has no row, and where more is written."""
    folder = results.cell(cell_id)
    status = read_status(folder)
    ending = jobs and jobs.ending(cell_id)
    if is_locked(folder) and not status.job:
        return f"is being run by another process ({status.pid}); give the command again when it is done", folder.log
    if status.state in ("failed", "diverged"):
        return f"{status.state}: {status.error.get('message', '')}", folder.log
    return ending or (KILLED, folder.log)
