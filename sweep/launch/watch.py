"""What a person sees while jobs run: a live table on a terminal, a line now and then elsewhere.

Everything shown is read from the cells' `status.json`; nothing is asked of a job.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from rich.live import Live
from rich.table import Table

from sweep.config import Cell
from sweep.errors import Interrupted
from sweep.failures import words as words_for
from sweep.launch import console
from sweep.launch.console import duration, out, plural, readable, tally, varied
from sweep.launch.plan import Planned
from sweep.paths import ResultsFolder
from sweep.progress import Snapshot
from sweep.status import FAILED, Status, read_status

__all__ = ["Jobs", "Row", "Together", "Watcher", "follow_to_the_end", "watching"]

REFRESH_SECONDS = 1.0
LINE_SECONDS = 10.0
POLL_SECONDS = 0.5
ENDED = ("done", "interrupted", "killed", *FAILED)


@runtime_checkable
class Jobs(Protocol):
    """What the watcher must know of jobs, wherever they run."""

    @property
    def silent(self) -> str:
        """Why nothing is known of them just now; empty when something is."""

    def refresh(self) -> None:
        """Look again what they are at, unless that was done just now."""

    @property
    def over(self) -> bool:
        """Whether none runs or waits any more."""

    @property
    def words(self) -> Mapping[str, str]:
        """For each cell whose job does not run yet: why, in a word or two."""

    @property
    def at_work(self) -> Sequence[tuple[str, Sequence[str]]]:
        """Name and cells of each job that runs."""

    @property
    def n_jobs(self) -> int:
        """Jobs in all, those that are over included."""

    def is_news(self, cell_id: str, status: Status) -> bool:
        """Whether a status is of the present job of a cell, and not from before."""

    def ending(self, cell_id: str) -> tuple[str, Path] | None:
        """Why a cell left neither row nor error, and where its job's words are, as far as they know."""


class Together:
    """Jobs of several kinds as one."""

    def __init__(self, *parts: Jobs) -> None:
        self._parts = parts

    @property
    def silent(self) -> str:
        return next((part.silent for part in self._parts if part.silent), "")

    def refresh(self) -> None:
        for part in self._parts:
            part.refresh()

    @property
    def over(self) -> bool:
        return all(part.over for part in self._parts)

    @property
    def words(self) -> Mapping[str, str]:
        return {cell_id: words for part in self._parts for cell_id, words in part.words.items()}

    @property
    def at_work(self) -> Sequence[tuple[str, Sequence[str]]]:
        return [job for part in self._parts for job in part.at_work]

    @property
    def n_jobs(self) -> int:
        return sum(part.n_jobs for part in self._parts)

    def is_news(self, cell_id: str, status: Status) -> bool:
        return all(part.is_news(cell_id, status) for part in self._parts)

    def ending(self, cell_id: str) -> tuple[str, Path] | None:
        return next(filter(None, (part.ending(cell_id) for part in self._parts)), None)


@dataclass(frozen=True)
class Row:
    """A cell as the watcher knows it: `word` is its state, or what its job is at."""

    cell: Cell
    word: str
    status: Status

    def saying(self, word: str) -> "Row":
        return replace(self, word=word)

    @property
    def texts(self) -> list[str]:
        """State, step, tokens per second, time left, FVU, L0 and dead fraction."""
        status, progress = self.status, self.status.progress
        at_work = status.state == "running"
        pace = tokens_per_second(progress, self.cell.schedule.batch_size) if at_work else 0.0
        return [
            self.word,
            f"{status.step:,}/{self.cell.schedule.steps:,}" if status.attempts else "",
            f"{pace:,.0f}" if pace else "",
            duration(progress.seconds_left) if at_work and progress.seconds_left else "",
            *("" if score is None else readable(score) for score in (status.fvu, status.l0, status.dead_fraction)),
        ]


def tokens_per_second(progress: Snapshot, batch_size: int) -> float:
    """The pace in tokens; 0 for phases that count something else."""
    return progress.per_second * {"tokens": 1, "steps": batch_size}.get(progress.unit, 0)


class Watcher:
    """Reads the cells' statuses when called, at most once a second, and shows what is new."""

    def __init__(self, cells: Sequence[Planned], results: ResultsFolder, live: Live | None = None) -> None:
        self._cells = cells
        self._results = results
        self._live = live
        self._looked = self._spoke = 0.0
        self._told: set[tuple[str, int]] = set()
        self._phases: dict[str, str] = {}
        self._waiting = ""
        self._noted: set[str] = set()

    def __call__(self, jobs: Jobs) -> None:
        now = time.monotonic()
        if now - self._looked < REFRESH_SECONDS and not jobs.over:
            return
        self._looked = now
        rows = self.rows(jobs)
        self._note(rows)
        if self._live is not None:
            self._live.update(self.table(rows))
        else:
            self._speak(jobs, rows, now)

    def rows(self, jobs: Jobs) -> dict[str, Row]:
        """Every cell that was to run, by id. A status from before its job is no news."""
        words = jobs.words
        rows = {}
        for planned in self._cells:
            cell = planned.cell
            status = read_status(self._results.cell(cell.cell_id))
            if not jobs.is_news(cell.cell_id, status):
                status = replace(
                    status, state="new", progress=Snapshot(), notes=(), fvu=None, l0=None, dead_fraction=None
                )
            word = status.progress.phase if status.state in ("running", "new") else words_for(status.state)
            if status.rollbacks and status.state == "running":
                word += f" (went back: {status.rollbacks})"
            rows[cell.cell_id] = Row(cell, words.get(cell.cell_id) or word or "starting", status)
        return rows

    def table(self, rows: dict[str, Row], room: int | None = None) -> Table:
        """As many cells as there is room for, by default on the terminal, those at work first."""
        columns = varied(self._cells)
        table = Table("cell", *columns, "state", "step", "tokens/s", "left", "fvu", "l0", "dead", box=None)
        urgent = sorted(rows.values(), key=lambda row: (row.status.state != "running", row.status.state == "new"))
        room = max(out.height - 4, 4) if room is None else room
        for row in urgent[:room]:
            flat = row.cell.flat()
            table.add_row(row.cell.cell_id, *(readable(flat[name]) for name in columns), *row.texts)
        if hidden := urgent[room:]:
            table.add_row(f"and {len(hidden)} more:", tally(row.word for row in hidden))
        return table

    def _note(self, rows: dict[str, Row]) -> None:
        """Each warning of a job once; on a terminal it stays above the table."""
        for note in dict.fromkeys(note for row in rows.values() for note in row.status.notes):
            if note not in self._noted:
                self._noted.add(note)
                out.print(f"warning: {note}")

    def _speak(self, jobs: Jobs, rows: dict[str, Row], now: float) -> None:
        """Cells that ended, each job's new phase, and every LINE_SECONDS how far each job is and who waits for what."""
        for cell_id, row in rows.items():
            if row.status.state in ENDED and (cell_id, row.status.attempts) not in self._told:
                self._told.add((cell_id, row.status.attempts))
                out.print(ending(row))
        due = now - self._spoke > LINE_SECONDS
        for name, cell_ids in jobs.at_work:
            members = [rows[cell_id].status for cell_id in cell_ids if cell_id in rows]
            going_on = [status for status in members if status.state not in ENDED]
            if not going_on:
                continue
            latest = max(going_on, key=lambda status: status.updated_at)
            progress = latest.progress if latest.progress.phase else Snapshot("start")
            if due or self._phases.get(name) != progress.phase:
                self._phases[name] = progress.phase
                label = f"job {name}, {plural(len(cell_ids), 'cell')}: " if jobs.n_jobs > 1 else ""
                out.print(label + console.line(progress))
                self._spoke = now
        if due and (waiting := tally(jobs.words.values())) != self._waiting:
            self._waiting, self._spoke = waiting, now
            if waiting:
                out.print(f"not yet at work: {waiting}")


def ending(row: Row) -> str:
    """How a cell ended, in a line."""
    status = row.status
    if status.state != "done":
        reason = status.error.get("message", "").partition("\n")[0]
        return f"cell {row.cell.cell_id} {words_for(status.state)} at step {status.step}" + (
            f": {reason}" if reason else ""
        )
    scores = [("fvu", status.fvu), ("l0", status.l0), ("dead", status.dead_fraction)]
    known = ", ".join(f"{name} {readable(value)}" for name, value in scores if value is not None)
    return f"cell {row.cell.cell_id} done: {known}"


@contextmanager
def watching(cells: Sequence[Planned], results: ResultsFolder) -> Iterator[Watcher]:
    """A watcher for the cells that run."""
    if not out.is_terminal:
        yield Watcher(cells, results)
        return
    with Live(console=out, transient=True, refresh_per_second=2) as live:
        yield Watcher(cells, results, live)


def follow_to_the_end(jobs: Jobs, watch: Watcher, stop: Callable[[], bool] = lambda: False) -> None:
    """Show the cells until none of their jobs lives; a controller of Slurm that does not answer is waited for.

    Raises:
        Interrupted: `stop` became true; the jobs go on.
    """
    silence = ""
    jobs.refresh()
    while not jobs.over:
        if stop():
            raise Interrupted
        if jobs.silent and jobs.silent != silence:
            console.problem(f"waiting for Slurm to answer: {jobs.silent}")
        silence = jobs.silent
        watch(jobs)
        time.sleep(POLL_SECONDS)
        jobs.refresh()
    watch(jobs)
