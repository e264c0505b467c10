"""Tables of a results folder as polars frames: what is whole is loaded, what is not is named and left out.

1. The files of a table are those of committed cells: the ones with a file in `runs/`.
2. Each must have the sha256 it was sealed with, and is read by itself, by pyarrow: damaged bytes raise there,
   while they can end the process in polars.
3. It must belong to the cell its name says, in types that fit the schema.
4. Columns it lacks are null, columns the schema lacks are dropped and counted.
"""

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from polars.datatypes import DataType, DataTypeClass

from sweep.errors import ResultsError
from sweep.paths import ResultsFolder
from sweep.results import polars_schema, seal_holds

__all__ = ["LeftOut", "Loaded", "first_line", "load_table", "open_results", "what_to_run"]

UNREADABLE = (
    pa.ArrowException,
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    OSError,
    ValueError,
    MemoryError,
)
"""What the two libraries raise on damaged bytes; polars' panic is no Exception."""


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


class _UnusableError(Exception):
    """The reason a file is left out."""


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


def load_table(results: Path, table: str) -> Loaded:
    """One table of a results folder, a row order that depends on the cell ids alone.

    Args:
        results: the results folder.
        table: runs, curves, latents or sequences.

    Raises:
        ResultsError: `results` is not a results folder. Damaged files in it never raise.
    """
    folder = open_results(results)
    committed = {path.name for path in _files(folder.table("runs"))}
    frames: list[pl.DataFrame] = [pl.DataFrame(schema=polars_schema(table))]
    left_out: list[LeftOut] = []
    unknown: Counter[str] = Counter()
    n_uncommitted = 0
    files = _files(folder.table(table))
    n_missing = len(committed - {path.name for path in files})
    for path in files:
        if path.name not in committed:
            n_uncommitted += 1
            continue
        try:
            frame = _read(path)
            frames.append(_conform(frame, table, cell_id=path.stem))
        except _UnusableError as reason:
            left_out.append(LeftOut(path, str(reason)))
            continue
        unknown.update(name for name in frame.columns if name not in frames[0].columns)
    whole = pl.concat(frames, rechunk=True)
    known = dict(sorted(unknown.items()))
    return Loaded(table, whole.lazy(), len(frames) - 1, tuple(left_out), known, n_uncommitted, n_missing)


def _files(folder: Path) -> list[Path]:
    """Parquet files by name; hidden ones are being written."""
    return [path for path in sorted(folder.glob("*.parquet")) if not path.name.startswith(".")]


def _read(path: Path) -> pl.DataFrame:
    """Decode one file fully, page checksums included where it has them."""
    try:
        content = path.read_bytes()
        if not content:
            raise _UnusableError("it is empty (0 bytes)")
        if not content.startswith(b"PAR1"):
            raise _UnusableError("it is not a Parquet file")
        if not content.endswith(b"PAR1"):
            raise _UnusableError("it is truncated: the end of the Parquet file is missing")
        if seal_holds(content) is False:
            raise _UnusableError("it is damaged: its bytes do not have the sha256 it was sealed with")
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read(use_threads=False)
        table.validate(full=True)
        return pl.DataFrame(pl.from_arrow(table.replace_schema_metadata(None)))
    except UNREADABLE as error:
        raise _UnusableError(f"it is damaged ({first_line(error)})") from error


def _conform(frame: pl.DataFrame, table: str, *, cell_id: str) -> pl.DataFrame:
    """The frame with exactly the columns and types of the table's schema."""
    schema = polars_schema(table)
    if frame.schema.get("cell_id") != pl.String:
        raise _UnusableError(f"it has another schema than {table}: no column cell_id of text")
    for name, dtype in frame.schema.items():
        if name in schema and not _fits(dtype, schema[name]):
            raise _UnusableError(f"it has another schema than {table}: column {name} is {dtype}, not {schema[name]}")
    if others := set(frame["cell_id"].unique()) - {cell_id}:
        raise _UnusableError(f"it holds cell {sorted(map(str, others))[0]}, not the cell of its name")
    if table == "runs" and frame.height != 1:
        raise _UnusableError(f"it holds {frame.height} rows, not the one of a finished cell")
    columns = [
        (pl.col(name) if name in frame.columns else pl.lit(None).alias(name)).cast(dtype)
        for name, dtype in schema.items()
    ]
    try:
        return frame.select(columns)
    except pl.exceptions.PolarsError as error:
        raise _UnusableError(f"it has values outside the schema of {table} ({first_line(error)})") from error


def _fits(dtype: DataType | DataTypeClass, wanted: DataType | DataTypeClass) -> bool:
    """Whether a column of an older file can be read as what the schema asks for, nothing lost."""
    if isinstance(dtype, pl.List) and isinstance(wanted, pl.List):
        return _fits(dtype.inner, wanted.inner)
    if dtype in (pl.Null, wanted):
        return True
    return (dtype.is_integer() and wanted.is_numeric()) or (dtype.is_float() and wanted.is_float())


def first_line(error: BaseException) -> str:
    """What went wrong without the traces libraries append."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
