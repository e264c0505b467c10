"""What came of cells: a table of results, a table of failures with their causes, and the exit code."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from sweep.failures import words
from sweep.launch import console
from sweep.launch.console import Failure
from sweep.launch.local import KILLED
from sweep.launch.plan import Planned
from sweep.locks import is_held
from sweep.paths import ResultsFolder
from sweep.results import read_row
from sweep.status import FAILED, read_status

__all__ = ["DONE", "INTERRUPTED", "NOT_DONE", "WRONG", "tell"]

DONE, NOT_DONE, WRONG, INTERRUPTED = 0, 1, 2, 130


@runtime_checkable
class Ended(Protocol):
    """Jobs that know how they ended."""

    def ending(self, cell_id: str) -> tuple[str, Path] | None:
        """Why a cell left neither row nor error, and where its job's words are."""


def tell(cells: Sequence[Planned], results: ResultsFolder, jobs: Ended | None = None) -> int:
    """Show results and failures; the exit code says whether every cell is done."""
    cell_ids = [planned.cell.cell_id for planned in cells]
    paths = {cell_id: results.row("runs", cell_id) for cell_id in cell_ids}
    rows = {cell_id: read_row(path) for cell_id, path in paths.items() if path.exists()}
    metrics = {cell_id: row for cell_id, row in rows.items() if row["status"] == "done"}
    failures = causes([cell_id for cell_id in cell_ids if cell_id not in metrics], results, jobs)
    console.show_results(cells, metrics)
    console.show_failures(failures)
    if metrics:
        console.out.print(f"ranked against baselines: python -m analysis rank {shlex.quote(str(results.root))}")
    return NOT_DONE if failures else DONE


def causes(cell_ids: Sequence[str], results: ResultsFolder, jobs: Ended | None) -> dict[str, list[Failure]]:
    """Each reason why cells are not done, with those cells and where more is written."""
    found: dict[str, list[Failure]] = {}
    for cell_id in cell_ids:
        reason, log = why_not_done(cell_id, results, jobs)
        found.setdefault(reason, []).append((cell_id, log))
    return found


def why_not_done(cell_id: str, results: ResultsFolder, jobs: Ended | None) -> tuple[str, Path]:
    """Why a cell has no row, and where more is written."""
    folder = results.cell(cell_id)
    status = read_status(folder)
    ending = jobs and jobs.ending(cell_id)
    if is_held(folder.lock) and not status.job:
        return f"is being run by another process ({status.pid}); give the command again when it is done", folder.log
    if status.state in FAILED:
        return f"{words(status.state)}: {status.error.get('message', '')}", folder.log
    if status.state == "killed":
        return f"was killed {status.error.get('message', '')}; give the command again to go on", folder.log
    return ending or (KILLED, folder.log)
