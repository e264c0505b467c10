"""Tables of a results folder as polars frames: what is whole is loaded, what is not is named and left out.

The files of a table are those of committed cells: the ones with a file in `runs/`. Few are read one by one, many
through a compact cache.
"""

import os
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from analysis.cache import Stamp, compacted
from analysis.files import Outcome, read_files
from sweep.errors import ConfigError, ResultsError
from sweep.paths import OPTIONAL_TABLES, ResultsFolder
from sweep.results import TABLES

__all__ = ["LeftOut", "Loaded", "load_table", "open_results", "what_to_run"]

CACHED_FROM = 500
"""Files from which on a table is cached: fewer are read in a third of a second."""


@dataclass(frozen=True)
class LeftOut:
    """A file that is not in the frame, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"left out {self.path}: {self.reason}"


@dataclass(frozen=True)
class Loaded:
    """A table, its columns and types those of `sweep.results`, and what is not in it."""

    table: str
    frame: pl.LazyFrame
    n_files: int
    left_out: tuple[LeftOut, ...]
    unknown_columns: Mapping[str, int]
    """Columns the schema lacks, and in how many files each was found."""
    n_uncommitted: int
    """Files of cells without a file in `runs/`: they are still running, or were cut short."""
    n_missing: int
    """Finished cells without a file here: somebody deleted it."""

    @property
    def warnings(self) -> list[str]:
        """One line for each thing a reader of the numbers should know."""
        lines = [str(file) for file in self.left_out]
        if self.n_missing:
            lines.append(f"{self.n_missing} finished cell{'s' * (self.n_missing > 1)} without a file in {self.table}/")
        lines += [
            f"ignored column {name} of {n} {self.table} file{'s' * (n > 1)}: this version does not know it"
            for name, n in self.unknown_columns.items()
        ]
        return lines


def what_to_run(folder: Path) -> str:
    """The command that fills a results folder with a small sweep."""
    return (
        "python sweep_runner.py -m model=tiny dict_size=64,128 top_k=4,8 steps=30 "
        f"results_dir={shlex.quote(str(folder))}"
    )


def open_results(path: Path) -> ResultsFolder:
    """The results folder at `path`; an empty folder is one without results yet.

    Raises:
        ResultsError: it does not exist, cannot be listed, or holds something else.
    """
    results = ResultsFolder(path)
    if not path.exists():
        raise ResultsError(f"{path} does not exist; name a results folder, or make one:\n  {what_to_run(path)}")
    try:
        results.check()
    except (ResultsError, OSError) as error:
        raise ResultsError(f"{path} is not a results folder; name the results_dir of a sweep") from error
    return results


def load_table(results: Path, table: str, cells: Collection[str] | None = None) -> Loaded:
    """One table of a results folder, a row order that depends on the cell ids alone.

    Args:
        results: the results folder.
        table: runs, curves, latents, sequences or contexts.
        cells: take only these cells; None takes all.

    Raises:
        ResultsError: `results` is not a results folder. Damaged files in it never raise.
        ConfigError: there is no such table.

    Side effects: past CACHED_FROM files, `cache/analysis/<table>.parquet` is brought up to date.
    """
    if table not in TABLES:
        raise ConfigError(f"table {table} does not exist; choose one of {', '.join(TABLES)}")
    folder = open_results(results)
    committed = _stamps(folder.table("runs"))
    present = committed if table == "runs" else _stamps(folder.table(table))
    wanted = committed.keys() if cells is None else committed.keys() & {f"{cell}.parquet" for cell in cells}
    stamps = {name: stamp for name, stamp in present.items() if name in wanted}
    outcomes: Mapping[str, Outcome]
    if len(stamps) < CACHED_FROM:
        part = read_files([folder.table(table) / name for name in sorted(stamps)], table)
        frame, outcomes = part.frame.lazy(), part.outcomes
    else:
        compact = compacted(folder.compact(table), folder.table(table), table, stamps)
        frame, outcomes = compact.frame, compact.outcomes
    left_out = tuple(
        LeftOut(folder.table(table) / name, outcome.reason) for name, outcome in outcomes.items() if outcome.reason
    )
    unknown = Counter(column for outcome in outcomes.values() for column in outcome.unknown_columns)
    return Loaded(
        table,
        frame,
        n_files=len(outcomes) - len(left_out),
        left_out=left_out,
        unknown_columns=dict(sorted(unknown.items())),
        n_uncommitted=len(present.keys() - committed.keys()),
        n_missing=0 if table in OPTIONAL_TABLES else len(wanted - present.keys()),
    )


def _stamps(folder: Path) -> dict[str, Stamp]:
    """Parquet files with size and ctime; hidden ones are being written."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.name.endswith(".parquet") and not entry.name.startswith(".")]
    found: dict[str, Stamp] = {}
    for entry in sorted(files, key=lambda entry: entry.name):
        try:
            facts = entry.stat()
        except OSError:
            facts = os.stat_result((0,) * 10)  # a dangling link; reading it will say so
        found[entry.name] = (facts.st_size, facts.st_ctime_ns)
    return found
