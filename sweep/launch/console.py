"""How a sweep speaks: plan, progress with an ETA, results. A table on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sweep.launch.cost import Cost
from sweep.launch.plan import Plan, Planned
from sweep.paths import ResultsFolder
from sweep.progress import Report

__all__ = ["out", "problem", "progress", "show_cost", "show_failures", "show_plan", "show_results"]

LINE_SECONDS = 10.0
"""Without a terminal a phase speaks at its start and then every this many seconds."""

PAUSE_SECONDS = 20.0
"""A phase that was silent for longer was waiting for another one."""

out = Console(
    highlight=False, markup=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160
)
err = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)

SCORES = ("fvu", "l0", "dead_fraction", "absorption_score")


def problem(message: str) -> None:
    err.print(message, style="red")


def varied(cells: Sequence[Planned]) -> list[str]:
    """The options that differ between cells, in the order they were typed; resolved values decide."""
    flats = [planned.cell.flat() for planned in cells]
    names = [name for name in flats[0] if any(flat[name] != flats[0][name] for flat in flats)]
    derived = {"groups", "warmup_steps", "min_lr", "steps"}
    typed = {override.partition("=")[0] for planned in cells for override in planned.overrides}
    facts = {"model_format", "model_repo", "model_revision", "n_layers", "d_in", "d_out", "n_body_params"}
    kept = [name for name in names if name in typed or name not in derived | facts]
    return kept or ["dict_size", "top_k"]


def show_plan(plan: Plan) -> None:
    columns = varied(plan.cells)
    table = Table("cell", *columns, "plan", "why", box=None, pad_edge=False)
    for planned in plan.cells:
        flat = planned.cell.flat()
        table.add_row(planned.cell.cell_id, *(readable(flat[name]) for name in columns), planned.action, planned.reason)
    out.print(table)
    counts: dict[str, int] = {}
    for planned in plan.cells:
        counts[planned.action] = counts.get(planned.action, 0) + 1
    n_gangs = len(plan.gangs)
    passes = plural(n_gangs, "language-model pass", "es") if n_gangs else "nothing to run"
    summary = ", ".join(f"{n} {action}" for action, n in counts.items())
    out.print(f"{plural(len(plan.cells), 'cell')}: {summary}; {passes}")


def show_cost(costs: Sequence[Cost], flops_per_second: float) -> None:
    for index, cost in enumerate(costs, 1):
        out.print(
            f"pass {index}: {cost.language_model_tokens:,} tokens through the language model "
            f"({cost.language_model_flops / 1e12:,.3g} TFLOP), training {cost.training_flops / 1e12:,.3g} TFLOP, "
            f"memory up to {size(cost.memory_bytes)}, disk up to {size(cost.disk_bytes)}, "
            f"about {duration(cost.seconds(flops_per_second))}"
        )
    out.print(f"(time at {flops_per_second / 1e9:,.0f} GFLOP/s, measured here; caches that are filled make it shorter)")


def show_results(cells: Sequence[Planned], metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """The finished cells of the sweep, lowest FVU first."""
    done = [planned for planned in cells if planned.cell.cell_id in metrics]
    if not done:
        return
    columns = varied(cells)
    table = Table("cell", *columns, *SCORES, box=None, pad_edge=False)
    for planned in sorted(done, key=lambda p: sort_key(metrics[p.cell.cell_id].get("fvu"))):
        flat, scores = planned.cell.flat(), metrics[planned.cell.cell_id]
        table.add_row(
            planned.cell.cell_id,
            *(readable(flat[name]) for name in columns),
            *(readable(scores.get(name)) for name in SCORES),
        )
    out.print(table)


def sort_key(value: float | None) -> float:
    return float("inf") if value is None else value


def show_failures(failures: Mapping[str, Sequence[str]], results: ResultsFolder) -> None:
    """Each reason once, with the cells it stopped and where to read more."""
    for reason, cell_ids in failures.items():
        cells = f"{plural(len(cell_ids), 'cell')} ({', '.join(cell_ids)})"
        problem(f"{cells} {reason}\n    more in {results.cell(cell_ids[0]).log}")


def plural(n: int, word: str, ending: str = "s") -> str:
    return f"{n} {word}{ending if n != 1 else ''}"


def readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress() -> Iterator[Report]:
    """A report that draws bars on a terminal and prints a line now and then elsewhere."""
    if not out.is_terminal:
        yield PlainLines()
        return
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} {task.fields[pace]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=out,
    )
    with bars:
        yield Bars(bars)


class Bars:
    """One bar per phase."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.paces: dict[str, Pace] = {}

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        if phase not in self.tasks:
            self.tasks[phase] = self.bars.add_task(phase, unit=unit, pace="", total=total or None)
            self.paces[phase] = Pace(done)
        pace = self.paces[phase].reached(done)
        text = f"({pace:,.3g}/s)" if pace else ""
        self.bars.update(self.tasks[phase], completed=done, total=total or None, pace=text)


class PlainLines:
    """Lines such as `train: 120 of 762 steps, 3.1/s, 3 min left`."""

    def __init__(self) -> None:
        self.paces: dict[str, Pace] = {}
        self.spoke: dict[str, float] = {}

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        first = phase not in self.paces
        pace = self.paces.setdefault(phase, Pace(done)).reached(done)
        if not first and done != total and now - self.spoke[phase] < LINE_SECONDS:
            return
        self.spoke[phase] = now
        out.print(self.line(phase, done, total, unit, pace))

    @staticmethod
    def line(phase: str, done: int, total: int, unit: str, pace: float) -> str:
        if not unit:
            return f"{phase} ..."
        text = f"{phase}: {done:,}" + (f" of {total:,}" if total else "") + f" {unit}"
        if pace:
            text += f", {pace:,.3g}/s"
            if 0 < done < total:
                text += f", {duration((total - done) / pace)} left"
        return text


class Pace:
    """Units a second while a phase is at work: phases take turns, and pauses between two reports do not count."""

    def __init__(self, done: int) -> None:
        self.first = self.done = done
        self.seconds = 0.0
        self.last = time.monotonic()

    def reached(self, done: int) -> float:
        """Take note of a report; the pace so far, 0.0 while it is unknown."""
        now = time.monotonic()
        if now - self.last > PAUSE_SECONDS:
            self.first += done - self.done  # what came after the pause took an unknown time
        else:
            self.seconds += now - self.last
        self.done, self.last = done, now
        return (done - self.first) / self.seconds if self.seconds > 0 and done > self.first else 0.0
