"""What is told of a cell that diverged: it has a row, no metrics and no place in a ranking, and is not run again."""

from dataclasses import replace
from pathlib import Path

import pytest
from gangs import make_workflow, run_cells
from make import make_cell

from analysis.rank import rank
from analysis.tables import load_table
from sweep.launch import folder
from sweep.launch.outcome import DONE, NOT_DONE, tell
from sweep.launch.plan import Plan, make_plan
from sweep.leftovers import reopen
from sweep.options import Workflow
from sweep.paths import CacheFolder, ResultsFolder
from sweep.results import has_row, read_row
from sweep.status import read_status

HEALTHY, DIVERGED = make_cell(steps=10), make_cell(steps=10, lr=1e30)
CAUSE = "lowered 2 times already; try a lower lr"


@pytest.fixture
def workflow(tmp_path: Path, cache: CacheFolder) -> Workflow:
    return make_workflow(tmp_path / "out", cache, checkpoint_steps=5)


@pytest.fixture
def results(workflow: Workflow) -> ResultsFolder:
    return run_cells([HEALTHY, DIVERGED], workflow)


def plan_of(workflow: Workflow, results: ResultsFolder, retry: str) -> Plan:
    asked = replace(workflow, retry=retry)
    return make_plan(asked, [((), cell) for cell in (HEALTHY, DIVERGED)], results)


def test_a_diverged_cell_is_told_of_and_not_run_again(
    workflow: Workflow, results: ResultsFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for retry in ("all", "none"):
        plan = plan_of(workflow, results, retry)
        assert [planned.action for planned in plan.cells] == ["done", "left"]
        assert f"{CAUSE}; retry=failed runs it again" in plan.cells[1].reason
        assert tell(plan.asked, results) == NOT_DONE
        printed = capsys.readouterr()
        assert HEALTHY.cell_id in printed.out
        assert DIVERGED.cell_id not in printed.out
        assert f"1 cell ({DIVERGED.cell_id}) diverged: " in printed.err
        assert CAUSE in printed.err
    assert folder.status(results) == DONE
    printed = capsys.readouterr()
    assert "diverged" in next(line for line in printed.out.splitlines() if DIVERGED.cell_id in line)
    assert f"1 cell ({DIVERGED.cell_id}) diverged: " in printed.err


def test_a_diverged_cell_is_left_out_of_the_ranking_with_the_cause(results: ResultsFolder) -> None:
    for table in ("curves", "latents", "sequences"):
        assert not load_table(results.root, table).warnings
    (group,) = rank(load_table(results.root, "runs").frame.collect())
    assert [row["cell_id"] for row in group.rows] == [HEALTHY.cell_id]
    ((cell_id, reason),) = group.left_out
    assert cell_id == DIVERGED.cell_id
    assert reason.startswith("it diverged: ")
    assert reason.endswith(CAUSE)


def test_retry_failed_runs_a_diverged_cell_from_its_first_step(workflow: Workflow, results: ResultsFolder) -> None:
    before = read_row(results.row("runs", DIVERGED.cell_id))
    assert [planned.action for planned in plan_of(workflow, results, "failed").cells] == ["done", "retry"]
    for cell in (HEALTHY, DIVERGED):
        reopen(results, cell.cell_id)
    assert [has_row(results, cell.cell_id) for cell in (HEALTHY, DIVERGED)] == [True, False]
    assert not results.cell(DIVERGED.cell_id).checkpoint_steps()
    run_cells([HEALTHY, DIVERGED], workflow)
    again = read_row(results.row("runs", DIVERGED.cell_id))
    assert (again["attempts"], again["failure"]) == (2, before["failure"])
    assert read_status(results.cell(DIVERGED.cell_id)).failures == 2


def test_the_row_of_a_diverged_cell_counts_where_its_status_is_lost(workflow: Workflow, results: ResultsFolder) -> None:
    results.cell(DIVERGED.cell_id).status.unlink()
    assert [planned.action for planned in plan_of(workflow, results, "all").cells] == ["done", "left"]


def test_a_diverged_cell_whose_row_could_not_be_written_diverges_again(
    workflow: Workflow, results: ResultsFolder
) -> None:
    """As after a death between status and row: it ends in the same row, from its last checkpoint."""
    row = results.row("runs", DIVERGED.cell_id)
    before = read_row(row)
    row.unlink()
    assert [planned.action for planned in plan_of(workflow, results, "all").cells] == ["done", "retry"]
    run_cells([DIVERGED], workflow)
    assert read_row(row)["failure"] == before["failure"]
