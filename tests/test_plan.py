"""The plan: what happens to each cell and why, and the problems of all cells at once."""

from pathlib import Path
from typing import Any

import pytest
from gangs import make_workflow, run_cells
from make import NO_BASELINES, make_cell, make_options

from sweep.config import Cell
from sweep.errors import ConfigError, Interrupted
from sweep.launch.plan import Plan, make_plan, resolve
from sweep.launch.rounds import freeze
from sweep.locks import try_lock
from sweep.paths import CacheFolder, ResultsFolder
from sweep.progress import silent
from sweep.status import Status

WORKFLOW: dict[str, Any] = {
    "results_dir": "out", "cache_dir": "out/cache", "cache_gib": 1.0, "dry_run": False,
    "checkpoint_steps": 10, "checkpoint_minutes": 0.0, "keep_checkpoints": False,
    "n_contexts": 0, "n_causal_rows": 0, "device": "cpu", "hang_minutes": 0.0,
    "retry": "all", "wait": True, **NO_BASELINES,
}  # fmt: skip


def job(*overrides: str, **values: Any) -> tuple[list[str], dict[str, Any]]:
    workflow = {key: values.pop(key, value) for key, value in WORKFLOW.items()}
    return list(overrides), make_options(**values) | workflow


def plan_of(results: ResultsFolder, *cells: Cell) -> Plan:
    workflow, _ = resolve([job()])
    return make_plan(workflow, [((), cell) for cell in cells], results)


def actions(results: ResultsFolder, *cells: Cell) -> list[str]:
    return [planned.action for planned in plan_of(results, *cells).cells]


@pytest.fixture
def results(tmp_path: Path) -> ResultsFolder:
    folder = ResultsFolder(tmp_path / "out")
    folder.create()
    return folder


def test_resolve_lists_the_problems_of_all_cells_together() -> None:
    jobs = [job("top_k=4"), job("top_k=100", top_k=100), job("layer=7", layer=7, lr=-1.0), (["x=y"], "x is unknown")]
    with pytest.raises(ConfigError) as caught:
        resolve(jobs)
    text = str(caught.value)
    for part in (
        "top_k=100 exceeds dict_size=64",
        "in: top_k=100",
        "layer=7 does not exist",
        "lr=-1.0",
        "x is unknown",
    ):
        assert part in text


def test_resolve_says_a_problem_of_all_cells_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([job("seed=0", layer=9), job("seed=1", layer=9, seed=1)])
    assert str(caught.value) == "layer=9 does not exist: tiny has layers 0 to 2"


def test_resolve_refuses_a_swept_workflow_key() -> None:
    with pytest.raises(ConfigError, match="results_dir=a,b cannot be swept"):
        resolve([job(results_dir="a"), job(results_dir="b")])


def test_plan_finds_new_and_duplicate_cells(results: ResultsFolder) -> None:
    assert actions(results, make_cell(), make_cell(seed=1), make_cell()) == ["new", "new", "duplicate"]


def test_plan_groups_cells_by_stream(results: ResultsFolder) -> None:
    plan = plan_of(results, make_cell(), make_cell(layer=2), make_cell(batch_size=32), make_cell(seed=1), make_cell())
    assert [len(gang) for gang in plan.gangs] == [3, 1]


def test_plan_finds_done_and_damaged_rows(results: ResultsFolder, cache: CacheFolder) -> None:
    cell = make_cell()
    run_cells([cell], make_workflow(results.root, cache))
    assert actions(results, cell) == ["done"]
    row = results.row("runs", cell.cell_id)
    content = bytearray(row.read_bytes())
    content[len(content) // 2] ^= 1
    row.write_bytes(content)
    (planned,) = plan_of(results, cell).cells
    assert (planned.action, planned.runs) == ("retry", True)
    assert "is damaged" in planned.reason


def test_plan_finds_the_step_of_an_interrupted_cell(results: ResultsFolder, cache: CacheFolder) -> None:
    cell, steps = make_cell(), iter(range(1000))
    with pytest.raises(Interrupted):
        run_cells([cell], make_workflow(results.root, cache), silent, stop=lambda: next(steps) > 10)
    (planned,) = plan_of(results, cell).cells
    assert planned.action == "resume"
    step = results.cell(cell.cell_id).checkpoint_steps()[-1]
    assert planned.reason == f"at step {step} of 30"


def test_plan_finds_failed_and_running_cells(results: ResultsFolder) -> None:
    failed, running = make_cell(), make_cell(seed=1)
    for cell in (failed, running):
        freeze(cell, results)
    Status(state="failed", failures=2, error={"message": "no disk\nmore"}).write(results.cell(failed.cell_id))
    lock = try_lock(results.cell(running.cell_id).lock)
    assert lock is not None
    with lock:
        first, second = plan_of(results, failed, running).cells
    assert (first.action, first.reason) == ("retry", "failed before (2): no disk")
    assert (second.action, second.runs) == ("running", False)


def test_plan_writes_nothing(tmp_path: Path) -> None:
    plan_of(ResultsFolder(tmp_path / "none"), make_cell())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"state": "failed", "error": null}', '{"state": "failed", "failures": "x"}', '{"state": "odd"}'],
)
def test_a_damaged_status_counts_as_none(results: ResultsFolder, content: str) -> None:
    cell = make_cell()
    freeze(cell, results)
    results.cell(cell.cell_id).status.write_text(content)
    assert actions(results, cell) == ["new"]
