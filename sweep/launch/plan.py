"""What a sweep will do, cell by cell and why, before anything is touched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sweep.config import Cell, StreamConfig
from sweep.errors import ConfigError
from sweep.failures import words
from sweep.locks import is_held
from sweep.options import Workflow, cell_from_options, not_an_option, option_fields, workflow_from_options
from sweep.paths import ResultsFolder
from sweep.results import has_row, read_row
from sweep.status import FAILED, Status, read_status

__all__ = ["Composed", "Plan", "Planned", "make_plan", "resolve"]

Composed = tuple[list[str], dict[str, Any] | str]
"""A cell as Hydra hands it over: its overrides, and its flat options or the reason why there are none."""

OPTION_NAMES = {name for _, name, _, _ in option_fields()}

Action = Literal["new", "resume", "retry", "baselines", "done", "diverged", "duplicate", "running", "left"]
"""`baselines`: the cell is done, and baselines are scored beside it."""


@dataclass(frozen=True)
class Planned:
    """One cell of the sweep and what will happen to it."""

    cell: Cell
    overrides: tuple[str, ...]
    action: Action
    reason: str

    @property
    def runs(self) -> bool:
        return self.action in ("new", "resume", "retry", "baselines")


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep in the order they were asked for."""

    workflow: Workflow
    cells: tuple[Planned, ...]

    @property
    def gangs(self) -> list[list[Cell]]:
        """The cells that will run, grouped by the stream they share."""
        by_stream: dict[StreamConfig, list[Cell]] = {}
        for planned in self.cells:
            if planned.runs:
                by_stream.setdefault(planned.cell.stream, []).append(planned.cell)
        return list(by_stream.values())

    @property
    def unique(self) -> list[Planned]:
        return [planned for planned in self.cells if planned.action != "duplicate"]

    @property
    def watched(self) -> list[Planned]:
        """The cells that will run, here or elsewhere."""
        return [planned for planned in self.unique if planned.runs or planned.action == "running"]

    @property
    def asked(self) -> list[Planned]:
        """The cells whose end tells how the sweep ended."""
        only_failed = self.workflow.retry == "failed"
        return [planned for planned in self.unique if planned.action != "left" or not only_failed]


def resolve(jobs: Sequence[Composed]) -> tuple[Workflow, list[tuple[tuple[str, ...], Cell]]]:
    """The workflow and the cells of a sweep.

    Raises:
        ConfigError: with the problems of all cells together.
    """
    cells, problems = [], []
    for overrides, options in jobs:
        try:
            if isinstance(options, str):
                raise ConfigError(options)
            if unknown := [key for key in options if key not in OPTION_NAMES]:
                raise ConfigError(*(not_an_option(key, options[key], OPTION_NAMES) for key in unknown))
            cells.append((tuple(overrides), cell_from_options(options)))
        except ConfigError as error:
            problems += [(problem, " ".join(overrides)) for problem in error.problems]
    complete = [options for _, options in jobs if isinstance(options, dict)]
    workflow = None
    try:
        problems += [(problem, "") for problem in _swept_workflow_keys(complete)]
        workflow = workflow_from_options(complete[0]) if complete else None
    except ConfigError as error:
        problems += [(problem, "") for problem in error.problems]
    if problems or workflow is None:
        raise ConfigError(*_grouped(problems, len(jobs)))
    return workflow, cells


def _swept_workflow_keys(options: Sequence[dict[str, Any]]) -> list[str]:
    problems = []
    for key in (f.name for f in fields(Workflow)):
        values = list(dict.fromkeys(str(cell.get(key)) for cell in options))
        if len(values) > 1:
            problems.append(f"{key}={','.join(values)} cannot be swept: it is not part of a cell; give it one value")
    return problems


def _grouped(problems: Sequence[tuple[str, str]], n_cells: int) -> list[str]:
    """Each problem once, with the cells that have it unless that is all of them."""
    by_problem: dict[str, list[str]] = {}
    for problem, cell in problems:
        by_problem.setdefault(problem, []).append(cell)
    return [
        problem if len(cells) == n_cells or not any(cells) else f"{problem}\n    in: " + "\n    in: ".join(cells)
        for problem, cells in by_problem.items()
    ]


def make_plan(
    workflow: Workflow,
    cells: Sequence[tuple[tuple[str, ...], Cell]],
    results: ResultsFolder,
    elsewhere: Mapping[str, str] | None = None,
) -> Plan:
    """Look every cell up in the results folder; writes nothing. `elsewhere` names jobs that run or wait, by cell."""
    planned: list[Planned] = []
    seen: set[str] = set()
    for overrides, cell in cells:
        if cell.cell_id in seen:
            action: Action = "duplicate"
            reason = "the same cell is in this sweep already"
        else:
            action, reason = chosen(workflow.retry, *look_up(cell, results, elsewhere or {}))
        seen.add(cell.cell_id)
        planned.append(Planned(cell, overrides, action, reason))
    return Plan(workflow, tuple(planned))


def chosen(retry: str, action: Action, reason: str) -> tuple[Action, str]:
    """What `retry=` makes of it: only the cells that failed before, or all but those.

    One that diverged would do so again, so it is run again only where asked for by name.
    """
    if action == "diverged":
        return ("retry", reason) if retry == "failed" else ("left", f"{reason}; retry=failed runs it again")
    if retry == "failed" and action in ("new", "resume"):
        return "left", "retry=failed runs only what failed before"
    if retry == "none" and action == "retry":
        return "left", f"retry=none; {reason}"
    return action, reason


def look_up(cell: Cell, results: ResultsFolder, elsewhere: Mapping[str, str]) -> tuple[Action, str]:
    """What the results folder says about a cell."""
    row, folder = results.row("runs", cell.cell_id), results.cell(cell.cell_id)
    status = read_status(folder)
    checkpoints = folder.checkpoint_steps()
    if row.exists():
        return of_row(row, status) if has_row(results, cell.cell_id) else ("retry", f"its row {row} is damaged")
    if cell.cell_id in elsewhere:
        return "running", elsewhere[cell.cell_id]
    if is_held(folder.lock):
        return "running", f"process {status.pid} is at it"
    if status.state in FAILED:
        message = status.error.get("message", "").partition("\n")[0]
        return "retry", f"{words(status.state)} before ({status.failures}): {message}"
    if checkpoints:
        return "resume", f"at step {checkpoints[-1]} of {cell.schedule.steps}"
    return "new", "started before, without a checkpoint" if status.attempts else ""


def of_row(row: Path, status: Status) -> tuple[Action, str]:
    """What a whole row says. The status spares opening it where it says done: it does so after the row alone."""
    if status.state != "done" and (found := read_row(row))["status"] == "diverged":
        return "diverged", f"diverged before: {found['failure']}"
    return "done", "its row is there"
