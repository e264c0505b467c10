"""What killed processes leave behind goes at the next start, and nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest
from gangs import gang_cells, make_workflow, run_cells
from make import make_cell, write_cell

from sweep.leftovers import settle
from sweep.locks import try_lock
from sweep.paths import CacheFolder, ResultsFolder
from sweep.results import has_row
from sweep.status import read_status


def test_has_row_wants_every_byte(tmp_path: Path) -> None:
    write_cell(tmp_path, "aa")
    results = ResultsFolder(tmp_path)
    assert has_row(results, "aa")
    assert not has_row(results, "bb")
    row = results.row("runs", "aa")
    row.write_bytes(row.read_bytes()[:-1])
    assert not has_row(results, "aa")


def test_a_start_removes_half_written_files_of_its_cells_only(tmp_path: Path, cache: CacheFolder) -> None:
    cell, other = gang_cells()[:2]
    results = ResultsFolder(tmp_path)
    results.create()
    (own, foreign) = (results.cell(each.cell_id) for each in (cell, other))
    dead = [
        own.root / ".config.json.x.tmp",  # by the launcher
        own.root / ".status.json.x.tmp",
        own.checkpoints / ".step_00000010.x.tmp",
        own.checkpoints / ".step_00000010.y.old",
        own.transcoder / ".config.json.x.tmp",
        results.table("runs") / f".{cell.cell_id}.parquet.x.tmp",
        results.table("latents") / f".{cell.cell_id}.parquet.x.tmp",
    ]
    alive = [
        foreign.root / ".status.json.x.tmp",
        results.table("runs") / f".{other.cell_id}.parquet.x.tmp",
    ]
    for path in (*dead, *alive):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    run_cells([cell], make_workflow(tmp_path, cache))
    assert not [path for path in dead if path.exists()]
    assert all(path.exists() for path in alive)


@pytest.mark.parametrize("keep", [False, True])
def test_a_commit_killed_after_the_row_comes_to_its_end(tmp_path: Path, cache: CacheFolder, keep: bool) -> None:
    cell = gang_cells()[0]
    results = run_cells([cell], make_workflow(tmp_path, cache))
    folder = results.cell(cell.cell_id)
    done = read_status(folder)
    done.changed(state="running", step=20, fvu=0.9).write(folder)
    settle(results, cell.cell_id, keep_checkpoints=keep)
    status = read_status(folder)
    assert replace(status, updated_at=done.updated_at) == done
    assert folder.checkpoints.exists() == keep


def test_settle_leaves_alone_what_is_not_finished_or_in_other_hands(tmp_path: Path, cache: CacheFolder) -> None:
    cell = gang_cells()[0]
    results = run_cells([cell], make_workflow(tmp_path, cache))
    folder = results.cell(cell.cell_id)
    settle(results, cell.cell_id, keep_checkpoints=False)
    assert folder.checkpoints.exists()  # of a cell that was brought to its end: somebody kept them
    read_status(folder).changed(state="running").write(folder)
    with try_lock(folder.lock) or pytest.fail("nobody else is here"):
        settle(results, cell.cell_id, keep_checkpoints=False)
        assert read_status(folder).state == "running"
    results.row("runs", cell.cell_id).unlink()
    settle(results, cell.cell_id, keep_checkpoints=False)
    assert read_status(folder).state == "running"
    settle(results, make_cell(seed=7).cell_id, keep_checkpoints=False)
