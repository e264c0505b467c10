"""What becomes of the cells of a job that died: none is lost, none runs for ever, one culprit costs one cell."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell

from sweep.failures import Failure
from sweep.launch.endings import Ending, divided, ending_of
from sweep.launch.jobs import Job
from sweep.launch.slurm import (
    Followed,
    SlurmJobs,
    Submission,
    follow,
    may_grow,
    memory_for,
    memory_had,
    ran_out,
    tell_memory,
)
from sweep.launch.slurm_options import SlurmOptions
from sweep.launch.squeue import Seen
from sweep.paths import LaunchFolder, ResultsFolder
from sweep.status import Status, read_status

CELLS = [make_cell(seed=seed) for seed in range(8)]
DEATHS: list[Failure] = ["killed", "crashed", "hung"]


def all_ended(job: Job, deadly: set[str], state: Failure, *, known: bool) -> tuple[set[str], set[str], int]:
    """Work a job off whose process dies at each deadly cell. Cells that ended well, cells given up, and starts."""
    done, lost, n_starts, waiting = set(), set(), 0, [job]
    while waiting:
        job = waiting.pop(0)
        n_starts += 1
        culprit = next((cell_id for cell_id in job.cell_ids if cell_id in deadly), None)
        if culprit is None:
            done |= set(job.cell_ids)
            continue
        again, given_up = divided(job, Ending(state, "", culprit if known else ""), job.cells)
        lost |= {cell.cell_id for cell in given_up}
        assert sorted(i for each in again for i in each.cell_ids) == sorted(
            set(job.cell_ids) - lost & set(job.cell_ids)
        )
        assert all(len(each.cells) < len(job.cells) or each.last_try > job.last_try for each in again)
        waiting += again
    return done, lost, n_starts


@given(st.integers(1, 8), st.sets(st.integers(0, 7)), st.sampled_from(DEATHS), st.booleans())
def test_the_others_end_well_whoever_is_deadly(n: int, deadly: set[int], state: Failure, known: bool) -> None:
    cells = CELLS[:n]
    bad = {cells[i].cell_id for i in deadly if i < n}
    done, lost, n_starts = all_ended(Job(tuple(cells), 1.0), bad, state, known=known)
    assert done == {cell.cell_id for cell in cells} - bad
    assert lost == bad
    assert n_starts <= 4 * n


def test_a_crash_is_not_tried_again_and_a_hang_is_once() -> None:
    job = Job(tuple(CELLS), 8.0)
    bad = {CELLS[3].cell_id}
    assert all_ended(job, bad, "crashed", known=True)[2] == 2
    assert all_ended(job, bad, "hung", known=True)[2] == 3


@pytest.mark.parametrize(
    ("code", "stacks", "printed", "state", "words"),
    [
        (-9, "", "", "killed", "by signal 9 (SIGKILL) (out of memory?)"),
        (-11, "", "Fatal Python error", "crashed", "by signal 11 (SIGSEGV)"),
        (-6, "", "", "crashed", "by signal 6 (SIGABRT)"),
        (-15, "", "", "killed", "by signal 15 (SIGTERM)"),
        (3, "", "", "crashed", "exited with code 3"),
        (1, "", "Traceback\nImportError: no such thing\n", "crashed", "exited with code 1: ImportError: no such thing"),
        (1, "Timeout!", "", "hung", "no sign of life"),
    ],
)
def test_ending_of_a_process(code: int, stacks: str, printed: str, state: Failure, words: str, tmp_path: Path) -> None:
    (tmp_path / "job_1.stacks").write_text(stacks)
    (tmp_path / "job_1.at").write_bytes(b"0123456789".ljust(64, b"\0"))
    (tmp_path / "job_1.err").write_text(printed)
    ending = ending_of(code, tmp_path / "job_1.json", tmp_path / "job_1.err")
    assert (ending.state, ending.cell_id) == (state, "0123456789")
    assert ending.message.startswith(words)


@pytest.mark.parametrize(
    ("seen", "stacks", "words"),
    [
        (None, "", "lost: Slurm job 12_0, unknown to Slurm"),
        (Seen("12_0", "name", "OUT_OF_MEMORY", "node1"), "", "out of memory: Slurm job 12_0"),
        (Seen("12_0", "name", "FAILED", "node1"), "Timeout!", "hung: no sign of life"),
    ],
)
def test_ending_of_a_job_in_slurm(seen: Seen | None, stacks: str, words: str, tmp_path: Path) -> None:
    submission = Submission(LaunchFolder(tmp_path), ((CELLS[0].cell_id,), (CELLS[1].cell_id,)), "12")
    tmp_path.joinpath("job_0.stacks").write_text(stacks)
    jobs = SlurmJobs(ResultsFolder(tmp_path), [CELLS[0].cell_id])
    jobs._jobs = [Followed(submission, 0, seen)]
    ending = jobs.ending(CELLS[0].cell_id)
    assert ending is not None
    assert ending[0].startswith(words)


@pytest.mark.parametrize("for_rows", [True, False])
def test_jobs_for_baselines_beside_finished_cells_are_followed(
    for_rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their cells have rows from the start; of other jobs that is the end."""
    results = ResultsFolder(tmp_path)
    results.create()
    results.row("runs", CELLS[0].cell_id).touch()
    root = results.slurm / "one"
    root.mkdir(parents=True)
    Submission(LaunchFolder(root), ((CELLS[0].cell_id,),), "12", for_rows).write()
    monkeypatch.setattr(
        "sweep.launch.slurm.ask", lambda names: [Seen("12", name, "RUNNING", "node1") for name in names]
    )
    assert [job.id for job in follow(results)] == ([] if for_rows else ["12"])


@pytest.mark.parametrize(("most", "given"), [(None, 32), (24, 24)])
def test_a_cell_whose_job_ran_out_of_memory_is_given_twice_as_much(most: float | None, given: float, tmp_path: Path):
    results = ResultsFolder(tmp_path)
    results.create()
    first, second = (cell.cell_id for cell in CELLS[:2])
    for cell_id in (first, second):
        results.cell(cell_id).root.mkdir()
        Status(state="running", attempts=1).write(results.cell(cell_id))
    folder = LaunchFolder(results.slurm / "submission")
    folder.root.mkdir(parents=True)
    submission = Submission(folder, ((first,), (second,)), "12", mem_gb=16)
    submission.write()
    states = ("OUT_OF_MEMORY", "CANCELLED")
    tell_memory([Followed(submission, i, Seen(f"12_{i}", "name", states[i])) for i in (0, 1)], results)
    assert read_status(results.cell(first)).state == "out_of_memory"
    assert read_status(results.cell(second)).state == "running"
    options, had = SlurmOptions(mem_gb=16, max_mem_gb=most), memory_had(results)
    assert memory_for((first, second), options, results, had) == given
    assert memory_for((second,), options, results, had) == 16
    assert memory_for((first,), SlurmOptions(), results, had) is None
    assert may_grow([first, second], options, results) == [first]
    assert may_grow([first], SlurmOptions(mem_gb=16, max_mem_gb=16), results) == []


def test_more_memory_is_no_help_to_a_gpu() -> None:
    assert not ran_out(Status(state="out_of_memory", error={"message": "CUDA out of memory. Tried to allocate"}))
    assert ran_out(Status(state="out_of_memory", error={"message": "can't allocate memory"}))
