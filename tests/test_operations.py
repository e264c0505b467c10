"""Saves and commits whose n-th file operation goes wrong, for every n: what is visible is whole.

`python -m tests.faults operations` does the same to whole runs.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from disk import FAULTS, Death, Disk, Fault, faulty
from gangs import gang_cells, make_workflow, run_cells, same_bytes
from make import make_cell
from states import CELL, INPUTS, equal, make_state

from sweep import checkpoint, job
from sweep.attempt import Attempt
from sweep.commit import Workplace, commit
from sweep.gang import Member
from sweep.leftovers import tidy_cell
from sweep.options import Workflow
from sweep.paths import CacheFolder, ResultsFolder, write_atomic
from sweep.results import has_row
from sweep.status import read_status


@contextmanager
def broken(root: Path, at: int | None, fault: Fault) -> Iterator[Disk]:
    """As `faulty`, for a block that ends in whatever went wrong."""
    with faulty(root, at, fault) as disk:
        try:
            yield disk
        except (OSError, Death):
            assert disk.hit


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.suffix in (".tmp", ".old")]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_is_the_old_or_the_new_one(fault: Fault, ram: Path) -> None:
    path = ram / "file"
    write_atomic(path, b"old one")
    with broken(ram, None, fault) as unbroken:
        write_atomic(path, b"new one")
    assert [name.split()[0] for name in unbroken.done] == ["open", "write", "fsync", "rename", "fsync"]
    until = 2 if fault == "full" else 4  # a full disk still syncs and renames
    for at in range(len(unbroken.done)):
        write_atomic(path, b"old one")
        with broken(ram, at, fault):
            write_atomic(path, b"new one")
        assert path.read_bytes() == (b"old one" if at < until else b"new one")
        assert bool(leftovers(ram)) == (fault == "death" and 0 < at < 4)
        for dead in leftovers(ram):
            dead.unlink()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_of_a_save_may_go_wrong(fault: Fault, ram: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = ResultsFolder(ram / "before")
    folder = results.cell(CELL.cell_id)
    for step in (10, 20):
        checkpoint.save(make_state(step), folder, CELL, INPUTS)
    shutil.copytree(results.root, ram / "after")
    after = ResultsFolder(ram / "after").cell(CELL.cell_id)
    with faulty(ram, None) as unbroken:
        checkpoint.save(make_state(30), after, CELL, INPUTS)
    assert len(unbroken.done) > 15
    for at in range(len(unbroken.done)):
        shutil.copytree(results.root, ram / f"{at}")
        found = ResultsFolder(ram / f"{at}")
        folder = found.cell(CELL.cell_id)
        with broken(ram, at, fault):
            checkpoint.save(make_state(30), folder, CELL, INPUTS)
        loaded = checkpoint.load_latest(folder, CELL, INPUTS, "cpu")
        assert loaded is not None
        assert loaded.step in (20, 30)
        assert equal(loaded, make_state(loaded.step))
        assert loaded.step == folder.checkpoint_steps()[-1]
        tidy_cell(found, CELL.cell_id)
        checkpoint.save(make_state(30), folder, CELL, INPUTS)
        assert contents(found.root) == contents(ram / "after")
    assert not caplog.records  # no checkpoint was ever found damaged


@dataclass
class Finished:
    """Cells that are trained and scored but not committed, and the place in which that was done."""

    members: list[Member]
    place: Workplace
    workflow: Workflow
    committed: ResultsFolder

    def commit(self, root: Path, at: int | None = None, fault: Fault = "EIO") -> Disk:
        """Commit the first cell below `root`, as its gang would, while an operation goes wrong."""
        results = ResultsFolder(root)
        results.create()
        folder = results.cell(self.members[0].cell.cell_id)
        if not folder.root.exists():
            shutil.copytree(self.committed.cell(folder.root.name).checkpoints, folder.checkpoints)
        with broken(root, at, fault) as disk:
            member = replace(self.members[0], folder=folder, attempt=Attempt.begin(folder, ""))
            commit(member, results, self.place, self.workflow)
        return disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder) -> Finished:
    members: list[Member] = []
    places: list[Workplace] = []

    def caught(member: Member, results: ResultsFolder, place: Workplace, workflow: Workflow) -> None:
        members.append(member)
        places.append(place)
        commit(member, results, place, workflow)

    workflow = make_workflow(tmp_path_factory.mktemp("finished"), cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "commit", caught)
        results = run_cells(gang_cells()[:1], workflow)
    return Finished(members, places[0], workflow, results)


@pytest.mark.parametrize("fault", ["EIO", "full", "death"])
def test_every_operation_of_a_commit_may_go_wrong(fault: Fault, finished: Finished, ram: Path) -> None:
    cell = finished.members[0].cell
    unbroken = finished.commit(ram / "unbroken")
    assert len(unbroken.done) > 40
    for at in range(len(unbroken.done)):
        root = ram / f"{at}"
        disk = finished.commit(root, at, fault)
        results = ResultsFolder(root)
        visible = has_row(results, cell.cell_id)
        assert visible == results.row("runs", cell.cell_id).exists()
        if visible:
            same_bytes(finished.committed, results, cell)
        else:
            assert f"rename runs/{cell.cell_id}.parquet" not in disk.done[:at]
            assert read_status(results.cell(cell.cell_id)).state != "done"
        tidy_cell(results, cell.cell_id)
        finished.commit(root)
        same_bytes(finished.committed, results, cell)
        assert not leftovers(root)
        shutil.rmtree(root)


def test_the_disk_counts_and_breaks_what_it_is_told_to(ram: Path) -> None:
    """The tests above would notice a write that is not atomic."""
    (ram / "inside").mkdir()
    with broken(ram / "inside", 1, "ENOSPC") as disk:
        (ram / "outside").write_bytes(b"whole")
        (ram / "inside" / "file").write_bytes(b"half of it")
    assert disk.done == ["open file", "write file"]
    assert (ram / "outside").read_bytes() == b"whole"
    assert (ram / "inside" / "file").read_bytes() == b"half "


def test_a_member_whose_files_fail_costs_the_others_nothing(tmp_path: Path, cache: CacheFolder) -> None:
    cells = [make_cell(steps=4, seed=seed) for seed in (0, 1)]
    reference = run_cells(cells, make_workflow(tmp_path / "reference", cache, checkpoint_steps=2))
    root = tmp_path / "broken"
    results = ResultsFolder(root)
    results.create()
    results.cell(cells[0].cell_id).checkpoints.mkdir(parents=True)
    results.cell(cells[0].cell_id).checkpoint(2).write_text("a file where a folder should come")
    run_cells(cells, make_workflow(root, cache, checkpoint_steps=2))
    assert read_status(results.cell(cells[0].cell_id)).state == "failed"
    same_bytes(reference, results, cells[1])
