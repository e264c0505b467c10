"""Fencing: the newest start of a cell writes, an earlier one that is still alive leaves."""

import json
import threading
from pathlib import Path

import pytest
from gangs import gang_cells, make_workflow, run_cells, same_bytes

from sweep import gang
from sweep.attempt import Attempt, began_in, slurm_job, whereabouts
from sweep.errors import Superseded
from sweep.locks import try_lock
from sweep.paths import CacheFolder, CellFolder, ResultsFolder, atomic_directory
from sweep.status import read_status


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder) -> ResultsFolder:
    return run_cells(gang_cells(), make_workflow(tmp_path_factory.mktemp("unbroken"), cache))


def test_the_newest_start_may_write(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    first = Attempt.begin(folder, "12_3")
    first.check()
    second = Attempt.begin(folder, "13")
    second.check()
    with pytest.raises(Superseded, match="started again by 13"):
        first.check()
    assert began_in(folder, "13")
    assert not began_in(folder, "12_3")
    assert not began_in(folder, "")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"7" * 10_000])
def test_a_damaged_token_stops_nobody(tmp_path: Path, content: bytes) -> None:
    attempt = Attempt.begin(CellFolder(tmp_path), "")
    (tmp_path / ".attempt").write_bytes(content)
    attempt.check()


def test_slurm_names_job_and_node() -> None:
    assert slurm_job({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
    assert slurm_job({"SLURM_JOB_ID": "15"}) == "15"
    assert slurm_job({}) == ""
    assert whereabouts({"SLURMD_NODENAME": "node7"}) == "node7"
    assert whereabouts({})


@pytest.mark.parametrize("at_step", [1, 10, 25])
def test_the_same_job_alive_twice_leaves_one_result(
    at_step: int,
    tmp_path: Path,
    cache: CacheFolder,
    unbroken: ResultsFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second start begins, and ends, while the first one holds the lock in the middle of a step."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(gang, "GHOST_SECONDS", 0.0)
    workflow, cells = make_workflow(tmp_path, cache), gang_cells()
    rows = {}

    def report(phase: str, done: int, _total: int, _unit: str) -> None:
        if phase == "train" and done == at_step and not rows:
            run_cells(cells, workflow)
            rows.update({path: path.read_bytes() for path in tmp_path.glob("runs/*")})

    results = run_cells(cells, workflow, report)
    assert len(rows) == len(cells)
    for cell in cells:
        same_bytes(unbroken, results, cell)
        status = read_status(results.cell(cell.cell_id))
        assert (status.state, status.job, status.attempts, status.failures) == ("done", "7", 2, 0)
        assert "has been started again by 7" in results.cell(cell.cell_id).log.read_text()
    assert rows == {path: path.read_bytes() for path in tmp_path.glob("runs/*")}  # the ghost added nothing


def test_a_cell_of_another_job_is_left_to_it(
    tmp_path: Path, cache: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    results, cell = ResultsFolder(tmp_path), gang_cells()[0]
    results.create()
    folder = results.cell(cell.cell_id)
    with try_lock(folder.lock) or pytest.fail("nobody else is here"):
        attempt = Attempt.begin(folder, "7")
        run_cells([cell], make_workflow(tmp_path, cache))
        attempt.check()
    assert read_status(folder).attempts == 0
    assert json.loads(folder.attempt.read_text())["job"] == "7"


def test_two_writers_of_one_folder_leave_one_whole_folder(tmp_path: Path) -> None:
    def write(text: str) -> None:
        for _ in range(100):
            with atomic_directory(tmp_path / "folder") as partial:
                for name in "ab":
                    (partial / name).write_text(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    contents = {path.name: path.read_text() for path in (tmp_path / "folder").iterdir()}
    assert contents.keys() == {"a", "b"}
    assert contents["a"] == contents["b"]
