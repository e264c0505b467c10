"""What dead writers leave behind, removed under the lock they wrote under.

A killed process leaves half-written files under temporary names, which nobody reads. One killed between the row of a
cell and the end of its commit leaves a status that does not say so, and checkpoints nobody needs any more.
"""

import shutil

from sweep.locks import try_lock
from sweep.paths import ResultsFolder, remove_leftovers
from sweep.progress import Snapshot
from sweep.results import TABLES, has_row, read_row
from sweep.status import SCORES, read_status

__all__ = ["reopen", "settle", "tidy_cell"]


def tidy_cell(results: ResultsFolder, cell_id: str) -> None:
    """Remove the half-written files of a cell; the caller holds its lock.

    Its config is left out: launchers write that one, under a lock of theirs.
    """
    folder = results.cell(cell_id)
    for path in (folder.status, folder.attempt, folder.metrics, folder.summary):
        remove_leftovers(folder.root, path.name)
    for inner in (folder.checkpoints, folder.transcoder):
        remove_leftovers(inner)
    for table in TABLES:
        remove_leftovers(results.table(table), results.row(table, cell_id).name)


def settle(results: ResultsFolder, cell_id: str, *, keep_checkpoints: bool) -> None:
    """Bring the commit of a cell to its end that was killed after its row, unless somebody is just at it.

    Side effects: its status says done, half-written files go, and its checkpoints unless they are kept.
    """
    folder = results.cell(cell_id)
    if read_status(folder).state == "done" or not folder.root.is_dir() or (lock := try_lock(folder.lock)) is None:
        return
    with lock:
        status = read_status(folder)
        if status.state == "done" or not has_row(results, cell_id):
            return
        row = read_row(results.row("runs", cell_id))
        scores = {name: row[name] for name in SCORES}
        status.changed(state="done", step=row["steps"], progress=Snapshot(), error={}, **scores).write(folder)
        tidy_cell(results, cell_id)
        if not keep_checkpoints:
            shutil.rmtree(folder.checkpoints, ignore_errors=True)


def reopen(results: ResultsFolder, cell_id: str) -> None:
    """Let a cell that diverged be run again, from its first step; others stay as they are.

    Side effects: its row and its checkpoints go.
    """
    row, folder = results.row("runs", cell_id), results.cell(cell_id)
    if has_row(results, cell_id) and read_row(row)["status"] == "diverged":
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        row.unlink()
