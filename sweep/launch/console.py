"""How a sweep speaks: plan, progress with an ETA, results. A table on a terminal, plain lines elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as BarDisplay
from rich.table import Column, Table

from sweep import stdout
from sweep.cache import Entry
from sweep.config import StreamConfig
from sweep.launch.cost import Cost
from sweep.launch.jobs import Job
from sweep.launch.machine import Slot
from sweep.launch.plan import Plan, Planned
from sweep.progress import Progress, Report, Snapshot

__all__ = [
    "duration",
    "line",
    "out",
    "plural",
    "problem",
    "progress",
    "readable",
    "show_cost",
    "show_entries",
    "show_failures",
    "show_jobs",
    "show_plan",
    "show_prepared",
    "show_results",
    "show_streams",
    "size",
    "tally",
    "varied",
]

LINE_SECONDS = 10.0
"""Without a terminal a phase speaks at its start and then every this many seconds."""


class Output(Console):
    """Standard output. A sweep goes on where nobody reads it any more: status files tell the rest."""

    def on_broken_pipe(self) -> None:
        stdout.silence()


out = Output(
    highlight=False, markup=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160
)
err = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)

MAX_SHOWN = 8

Failure = tuple[str, Path]
"""A cell that is not done, and where to read more."""

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
    """What happens to each cell and why."""
    columns = varied(plan.cells)
    table = Table("cell", *columns, "plan", "why", box=None, pad_edge=False)
    for planned in plan.cells:
        flat = planned.cell.flat()
        table.add_row(planned.cell.cell_id, *(readable(flat[name]) for name in columns), planned.action, planned.reason)
    out.print(table)
    summary = tally(planned.action for planned in plan.cells)
    out.print(f"{plural(len(plan.cells), 'cell')}: {summary}{'' if plan.gangs else '; nothing to run'}")


def show_streams(streams: Sequence[tuple[StreamConfig, Cost]]) -> None:
    """For each stream what of model, text and activations is there, and what is made once."""
    for stream, cost in streams[:MAX_SHOWN]:
        model, text = stream.model.model, stream.data.dataset
        verb = {"package": "converted", "hub": "downloaded"}.get(stream.model.model_format, "made")
        missing = [] if cost.has_model else [f"model {model} {verb}"]
        missing += [f"text {text} tokenised"] if cost.tokenised_tokens else []
        out.print(f"first, once: {', '.join(missing)}" if missing else f"model {model} and tokens of {text}: there")
        out.print(f"activations: {activations(cost)}")
    if len(streams) > MAX_SHOWN:
        out.print(f"and {plural(len(streams) - MAX_SHOWN, 'more stream')}")


def activations(cost: Cost) -> str:
    """Where a stream's activations come from."""
    if not cost.language_model_tokens:
        return "cached"
    tokens = f"{cost.language_model_tokens:,} tokens through the language model"
    if not cost.keeps:
        return f"{tokens}, again in each epoch and job: they need more than cache_gib="
    return f"{tokens} once" + (f", {cost.cached_tokens:,} cached" if cost.cached_tokens else "")


def show_jobs(jobs: Sequence[Job], slots: Sequence[Slot], seconds: Sequence[float] | None) -> None:
    """How the cells are divided among processes, and about how much time and memory each takes."""
    for number, job in enumerate(jobs[:MAX_SHOWN], 1):
        name = f"job {number}: " if len(jobs) > 1 else ""
        lasts = "" if seconds is None else f"about {duration(seconds[number - 1])}, "
        out.print(f"{name}{plural(len(job.cells), 'cell')}, {lasts}memory about {size(job.memory_bytes)}")
    if len(jobs) > MAX_SHOWN:
        out.print(f"and {plural(len(jobs) - MAX_SHOWN, 'more job')}")
    if jobs:
        where = ", ".join(f"GPU {slot.gpu}" for slot in slots if slot.gpu is not None) or "CPU"
        total = f": about {duration(in_turn(seconds, len(slots)))} in all" if seconds and len(jobs) > 1 else ""
        out.print(f"{plural(len(slots), 'slot')} ({where}), {plural(slots[0].n_threads, 'thread')} each{total}")
    for slot in slots:
        room = slot.memory_bytes
        if room is not None and any(job.memory_bytes > room for job in jobs):
            problem(
                f"a job may need more memory than its slot has ({size(room)}); choose a smaller dict_size or "
                "batch_size, or set hydra.launcher.memory_gib= if you know better"
            )
            break


def in_turn(seconds: Sequence[float], n_slots: int) -> float:
    """When the last job ends if each slot takes the next one as soon as it is free."""
    ends = [0.0] * n_slots
    for each in seconds:
        first = ends.index(min(ends))
        ends[first] += each
    return max(ends)


def show_cost(costs: Sequence[Cost], flops_per_second: float | None) -> None:
    """The arithmetic behind the plan, job by job."""
    for index, cost in enumerate(costs, 1):
        out.print(
            f"job {index}: language model {cost.language_model_flops / 1e12:,.3g} TFLOP, training "
            f"{cost.training_flops / 1e12:,.3g} TFLOP of encoder products, evaluation "
            f"{cost.evaluation_flops / 1e12:,.3g} TFLOP, disk about {size(cost.disk_bytes)}"
        )
    if flops_per_second is None:
        out.print("(time is not estimated for GPUs)")
    else:
        out.print(f"(time at {flops_per_second / 1e9:,.0f} GFLOP/s, measured here; other load makes it longer)")


def show_results(cells: Sequence[Planned], metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """The finished cells of the sweep, lowest FVU first."""
    done = [planned for planned in cells if planned.cell.cell_id in metrics]
    if not done:
        return
    columns = varied(cells)
    went_back = [planned for planned in done if metrics[planned.cell.cell_id].get("rollbacks")]
    shown = (*SCORES, *(("lr_factor",) if went_back else ()))
    table = Table("cell", *columns, *shown, box=None, pad_edge=False)
    for planned in sorted(done, key=lambda p: sort_key(metrics[p.cell.cell_id].get("fvu"))):
        flat, scores = planned.cell.flat(), metrics[planned.cell.cell_id]
        table.add_row(
            planned.cell.cell_id,
            *(readable(flat[name]) for name in columns),
            *(readable(scores.get(name)) for name in shown),
        )
    out.print(table)
    if went_back:
        out.print(
            f"lr_factor: {plural(len(went_back), 'cell')} went back to an earlier step with a lower lr, because the "
            "loss was no longer a number"
        )


def sort_key(value: float | None) -> float:
    return float("inf") if value is None else value


def show_failures(failures: Mapping[str, Sequence[Failure]]) -> None:
    """Each reason once, with the cells it stopped and where to read more."""
    for reason, stopped in failures.items():
        cell_ids, (log, *_) = zip(*stopped, strict=True)
        problem(f"{plural(len(stopped), 'cell')} ({', '.join(cell_ids)}) {reason}\n    more in {log}")


def show_prepared(prepared: Sequence[tuple[str, str, bool, int, Path]]) -> None:
    """Each (kind, what, was there before, bytes, folder), and one sentence on all of them."""
    table = Table("kind", "what", "state", "size", Column("where", overflow="fold"), box=None, pad_edge=False)
    for kind, what, was_there, n_bytes, folder in prepared:
        table.add_row(kind, what, "there" if was_there else "made", size(n_bytes), str(folder))
    out.print(table)
    n_made = sum(not was_there for _, _, was_there, _, _ in prepared)
    out.print(f"{plural(n_made, 'thing')} made, {len(prepared) - n_made} there already" if n_made else "all is there")


def show_entries(found: Sequence[tuple[Entry, bool]]) -> None:
    """What a cache holds, whether a job uses it, and the total."""
    table = Table("kind", "what", "size", "last used", "where", box=None, pad_edge=False)
    for each, used in found:
        when = "in use" if used else time.strftime("%Y-%m-%d %H:%M", time.localtime(each.last_used))
        where = each.path.name if each.kind != "activations" else f"{each.path.parent.name}/{each.path.name}"
        table.add_row(each.kind, each.what, size(each.n_bytes), when, where)
    out.print(table)
    out.print(f"{len(found)} in all, {size(sum(each.n_bytes for each, _ in found))}")


def tally(words: Iterable[str]) -> str:
    """How often each comes: `3 pending (Priority), 1 killed`."""
    return ", ".join(f"{n} {word}" for word, n in Counter(words).items())


def plural(n: int, word: str, ending: str = "s") -> str:
    return f"{n} {word}{ending if n != 1 else ''}"


def readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def size(n_bytes: float) -> str:
    if n_bytes < 2**20:
        return f"{n_bytes / 2**10:.0f} KiB"
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def line(at: Snapshot) -> str:
    """Such as `train: 120 of 762 steps, 3.1/s, 3 min left`."""
    if not at.unit:
        return f"{at.phase} ..."
    text = f"{at.phase}: {at.done:,}" + (f" of {at.total:,}" if at.total else "") + f" {at.unit}"
    if at.per_second:
        text += f", {at.per_second:,.3g}/s"
    if at.seconds_left:
        text += f", {duration(at.seconds_left)} left"
    return text


@contextmanager
def progress() -> Iterator[Report]:
    """A report that draws bars on a terminal and prints a line now and then elsewhere."""
    if not out.is_terminal:
        yield PlainLines()
        return
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[about]}", markup=False),
        TimeElapsedColumn(),
        console=out,
    )
    with bars:
        yield bars.report


class Bars(BarDisplay):
    """One bar per phase."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        super().__init__(*columns, console=console)
        self._progress = Progress()
        self._tasks_of: dict[str, TaskID] = {}

    def report(self, phase: str, done: int, total: int, unit: str) -> None:
        self._progress(phase, done, total, unit)
        at = self._progress.snapshot
        if phase not in self._tasks_of:
            self._tasks_of[phase] = self.add_task(phase, about="", total=total or None)
        left = f", {duration(at.seconds_left)} left" if at.seconds_left else ""
        about = f"{unit} ({at.per_second:,.3g}/s{left})" if at.per_second else unit
        self.update(self._tasks_of[phase], completed=done, total=total or None, about=about)


class PlainLines:
    """A line when a phase begins and ends, and every LINE_SECONDS in between."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._spoke: dict[str, float] = {}

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        self._progress(phase, done, total, unit)
        now = time.monotonic()
        if phase in self._spoke and done != total and now - self._spoke[phase] < LINE_SECONDS:
            return
        self._spoke[phase] = now
        out.print(line(self._progress.snapshot))
