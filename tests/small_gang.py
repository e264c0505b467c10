"""A gang of two small cells, any file operation of which can be broken."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from disk import Death, Fault, faulty
from gangs import make_workflow, run_cells
from left_behind import cells_of, check_checkpoints, check_visible
from make import make_cell

from sweep.config import Cell
from sweep.errors import ResultsError
from sweep.leftovers import settle
from sweep.paths import CacheFolder, ResultsFolder


@dataclass
class SmallGang:
    """Two cells with two checkpoints each, and what they leave when nothing is done to them."""

    root: Path
    cache: CacheFolder
    reference: ResultsFolder
    n_operations: int

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.reference)

    def broken(self, at: int, fault: Fault) -> str:
        """Break one operation of a gang, run the gang again, and compare. How far the broken one came.

        Heartbeats come by the clock, so a gang may end before an operation that another one had.
        """
        folder = self.root / "broken"
        with faulty(folder, at, fault) as disk, contextlib.suppress(OSError, ResultsError, Death):
            self.run(folder)
        n_done = check_visible(folder, self.reference)
        check_checkpoints(folder)
        run = self.run(folder)
        assert check_visible(folder, self.reference) == len(self.cells), (at, fault, disk.done[at])
        assert not [path for path in run.root.rglob(".*") if path.suffix in (".tmp", ".old")], (at, fault)
        shutil.rmtree(folder)
        return f"{n_done} cells done before" if disk.hit else "not reached"

    def run(self, folder: Path) -> ResultsFolder:
        """As a launcher does it, which first brings to an end what was killed after its row."""
        workflow = make_workflow(folder, self.cache, checkpoint_steps=2)
        for cell in self.cells:
            settle(ResultsFolder(folder), cell.cell_id, keep_checkpoints=workflow.keep_checkpoints)
        return run_cells(self.cells, workflow)


@contextmanager
def small_gang(root: Path | None = None, cache: CacheFolder | None = None) -> Iterator[SmallGang]:
    """A gang to break operations of, best in memory: it writes and syncs the same few files over and over."""
    root = root or Path(tempfile.mkdtemp(prefix="faults.", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    cache = cache or CacheFolder(root / "cache")
    cells = [make_cell(steps=4, seed=seed) for seed in (0, 1)]
    with faulty(root / "reference", None) as disk:
        reference = run_cells(cells, make_workflow(root / "reference", cache, checkpoint_steps=2))
    yield SmallGang(root, cache, reference, len(disk.done))
    shutil.rmtree(root)
