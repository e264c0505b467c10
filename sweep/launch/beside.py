"""The baselines a sweep asks for, found and checked before anything runs; what is missing is downloaded here."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from sweep.baselines.header import check, check_shapes
from sweep.baselines.hub import REPOSITORIES, download
from sweep.baselines.wanted import is_scored, layers_beside, rows_beside, wanted
from sweep.config import Cell
from sweep.errors import BaselineError, ConfigError
from sweep.launch.cost import Beside
from sweep.launch.plan import Plan
from sweep.options import Workflow
from sweep.paths import ResultsFolder
from sweep.progress import Report
from sweep.results import has_row, read_row

__all__ = ["baselines_of", "shortcomings", "with_baselines", "with_done_cells"]


def with_baselines(workflow: Workflow, cells: Sequence[Cell], report: Report) -> Workflow:
    """The workflow with `baselines_dir` set to a local folder that has what the cells' layers need.

    Raises:
        ConfigError: baselines are asked for where there can be none.
        BaselineError: they are not there, not whole, or of another model.
    """
    if workflow.baselines == "none":
        return workflow
    beside = [cell for cell in cells if cell.site.hook_out == "mlp_out"]
    if not beside:
        raise ConfigError(f"baselines={workflow.baselines} predict mlp_out; set hook_out=mlp_out or baselines=none")
    models = {cell.model.model: cell.model for cell in beside}
    if len(models) > 1:
        raise ConfigError(f"baselines={workflow.baselines} stand beside one model, not {', '.join(models)}")
    ((name, model),) = models.items()
    layers = sorted({cell.site.layer for cell in beside})
    if workflow.baselines_dir is None:
        if name not in REPOSITORIES:
            raise ConfigError(
                f"baselines={workflow.baselines}: there are none for model={name}; choose one of "
                f"{', '.join(REPOSITORIES)}, or set baselines_dir= to a folder in Google's layout"
            )
        if workflow.dry_run:
            return workflow
        choice = (workflow.baselines_width, workflow.baselines_l0, workflow.baselines_revision)
        workflow = replace(workflow, baselines_dir=str(download(REPOSITORIES[name], layers, *choice, report)))
    assert workflow.baselines_dir is not None
    found = replace(workflow, baselines_dir=str(Path(workflow.baselines_dir).expanduser().resolve()))
    try:
        for layer in layers:
            for each in wanted(found, layer):
                check(each.entry, layer, model.d_in, model.d_out)
    except BaselineError as error:
        raise BaselineError(f"baselines_dir={workflow.baselines_dir}: {error}") from error
    return found


def with_done_cells(plan: Plan, results: ResultsFolder, elsewhere: Collection[str] = ()) -> Plan:
    """The plan in which baselines are also scored at the layers of finished cells: one of each layer goes along.

    `elsewhere` are cells of jobs that run or wait.

    Raises:
        BaselineError: they changed since they were checked.
    """
    if not asks_for_baselines(plan):
        return plan
    going = [planned.cell for planned in plan.cells if planned.runs or planned.cell.cell_id in elsewhere]
    served = {(cell.stream, cell.site.layer) for cell in going}
    cells = list(plan.cells)
    for i, planned in enumerate(plan.cells):
        cell, place = planned.cell, (planned.cell.stream, planned.cell.site.layer)
        if planned.action == "done" and place not in served:
            served.add(place)
            rows = rows_beside(cell, plan.workflow, results)
            if n_missing := sum(not is_scored(row_id, plan.workflow, cell.stream, results) for row_id in rows):
                reason = f"its row is there, {n_missing} of the baselines of layer {cell.site.layer} are not"
                cells[i] = replace(planned, action="baselines", reason=reason)
    return replace(plan, cells=tuple(cells))


def shortcomings(plan: Plan, results: ResultsFolder) -> tuple[list[str], list[str]]:
    """Of the baselines that a sweep asked for beside cells that are done: the names of those without a row, and what
    looks wrong about others.
    """
    missing: dict[str, None] = {}
    remarks: dict[str, None] = {}
    if not asks_for_baselines(plan):
        return [], []
    done = {(p.cell.stream, p.cell.site.layer): p.cell for p in plan.cells if has_row(results, p.cell.cell_id)}
    for cell in done.values():
        try:
            rows = rows_beside(cell, plan.workflow, results)
        except BaselineError as error:
            missing[str(error)] = None
            continue
        for row_id, each in rows.items():
            if not is_scored(row_id, plan.workflow, cell.stream, results):
                missing[each.entry.name] = None
            elif remark := read_row(results.row("runs", row_id))["remarks"]:
                remarks[f"baseline {each.entry.name}: {remark}"] = None
    return list(missing), list(remarks)


def asks_for_baselines(plan: Plan) -> bool:
    """Whether finished cells matter: nothing is looked up in a sweep that asks for none."""
    return plan.workflow.baselines != "none" and plan.workflow.retry != "failed"


def baselines_of(workflow: Workflow, cells: Sequence[Cell]) -> list[Beside]:
    """What a checked workflow scores beside the cells; nothing where the baselines are not on this machine yet.

    Raises:
        BaselineError: they changed since they were checked.
    """
    models = {cell.site.layer: cell.model for cell in cells if layers_beside([cell.site])}
    found = []
    for layer, model in sorted(models.items()):
        for each in wanted(workflow, layer):
            (width,) = check_shapes(each.entry, model.d_in, model.d_out)["b_enc"]
            found.append(Beside(each.site, width))
    return found
