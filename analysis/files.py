"""Parquet files of one table: what is whole is read, what is not is named and left out.

1. A file must have the sha256 it was sealed with.
2. Sealed files that carry the same fingerprint of their columns are decoded together, by polars: a tenth of the
   time that one after the other takes.
3. All others, and every file of a batch in which anything is odd, are read alone, by pyarrow: damaged bytes raise
   there, while they can end the process in polars.
4. A file must belong to the cell its name says, in types that fit the schema. Columns it lacks are null, columns
   the schema lacks are dropped and named.
"""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from polars.datatypes import DataType, DataTypeClass

from sweep.errors import first_line
from sweep.results import columns_of, polars_schema, seal_holds

__all__ = ["Outcome", "Part", "read_files"]

UNREADABLE = (
    pa.ArrowException,
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    OSError,
    ValueError,
    MemoryError,
)
"""What the two libraries raise on damaged bytes; polars' panic is no Exception."""


MOST_VALUES, VALUES_PER_BYTE = 10_000_000, 16
"""More than any table of ours holds in so many bytes: one value repeated a billion times is a file of a few bytes."""


@dataclass(frozen=True)
class Outcome:
    """What became of a file: why it is left out, and its columns that the schema lacks."""

    reason: str | None = None
    unknown_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """The rows of some files, in the order of the files, and what became of each by name."""

    frame: pl.DataFrame
    outcomes: Mapping[str, Outcome]


class _UnusableError(Exception):
    """The reason a file is left out."""


def read_files(paths: Sequence[Path], table: str) -> Part:
    """The rows of all usable files, in exactly the columns and types of the table. Damaged files never raise."""
    frames: dict[str, pl.DataFrame] = {}
    outcomes: dict[str, Outcome] = {}
    alike: dict[bytes, dict[str, bytes]] = defaultdict(dict)
    alone: dict[str, bytes] = {}
    for path in paths:
        try:
            content, kind = _checked(path)
        except _UnusableError as reason:
            outcomes[path.name] = Outcome(str(reason))
            continue
        (alone if kind is None else alike[kind])[path.name] = content
    order = [pl.DataFrame(schema=polars_schema(table))]
    for files in alike.values():
        if together := _read_together(files, table):
            frame, unknown = together
            order.append(frame)
            outcomes |= {name: Outcome(unknown_columns=unknown) for name in files}
        else:
            alone |= files
    for name, content in alone.items():
        try:
            frame = _read_alone(content)
            frames[name] = _conform(frame, table, cell_id=Path(name).stem)
            outcomes[name] = Outcome(unknown_columns=_unknown(frame.schema, table))
        except _UnusableError as reason:
            outcomes[name] = Outcome(str(reason))
    order += frames.values()
    whole = pl.concat(order)
    if len(order) > 2:
        whole = whole.sort("cell_id", maintain_order=True)
    return Part(whole, {path.name: outcomes[path.name] for path in paths})


def _checked(path: Path) -> tuple[bytes, bytes | None]:
    """The bytes of a file that may well be one of ours, and the fingerprint of its columns if a seal vouches for it."""
    try:
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise _UnusableError(f"it cannot be read ({first_line(error)})") from error
    if not content:
        raise _UnusableError("it is empty (0 bytes)")
    if not content.startswith(b"PAR1"):
        raise _UnusableError("it is not a Parquet file")
    if not content.endswith(b"PAR1"):
        raise _UnusableError("it is truncated: the end of the Parquet file is missing")
    sealed = seal_holds(content)
    if sealed is False:
        raise _UnusableError("it is damaged: its bytes do not have the sha256 it was sealed with")
    return content, columns_of(content) if sealed else None


def _read_together(files: Mapping[str, bytes], table: str) -> tuple[pl.DataFrame, tuple[str, ...]] | None:
    """Files with the same columns as one frame, and what the schema lacks; None where anything is odd about one."""
    try:
        schema = pl.read_parquet_schema(io.BytesIO(next(iter(files.values()))))
        whole = pl.scan_parquet(list(files.values()), schema=schema).collect()
        frame = _fitted(whole, table)
    except (*UNREADABLE, _UnusableError):
        return None
    owners = frame["cell_id"].rle().struct.field("value").to_list()
    with_rows = set(owners)
    without_rows = {name for name in files if Path(name).stem not in with_rows}  # as most tables of a diverged cell
    if owners != [Path(name).stem for name in files if name not in without_rows]:
        return None
    if any(_n_rows(files[name]) for name in without_rows) or (table == "runs" and frame.height != len(files)):
        return None
    return frame, _unknown(schema, table)


def _n_rows(content: bytes) -> int:
    """What the footer of a sealed file says."""
    return int(pq.ParquetFile(pa.BufferReader(content)).metadata.num_rows)


def _read_alone(content: bytes) -> pl.DataFrame:
    """Decode one file fully, page checksums included where it has them."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        n_values = sum(
            file.metadata.row_group(group).column(column).num_values
            for group in range(file.metadata.num_row_groups)
            for column in range(file.metadata.num_columns)
        )
        if n_values > MOST_VALUES + VALUES_PER_BYTE * len(content):
            raise _UnusableError(f"it claims {n_values:,} values in {len(content):,} bytes")
        table = file.read(use_threads=False)
        table.validate(full=True)
        return pl.DataFrame(pl.from_arrow(table.replace_schema_metadata(None)))
    except UNREADABLE as error:
        raise _UnusableError(f"it is damaged ({first_line(error)})") from error


def _conform(frame: pl.DataFrame, table: str, *, cell_id: str) -> pl.DataFrame:
    """The frame in the table's schema, if it is that of the cell."""
    fitted = _fitted(frame, table)
    if others := set(frame["cell_id"].unique()) - {cell_id}:
        raise _UnusableError(f"it holds cell {sorted(map(str, others))[0]}, not the cell of its name")
    if table == "runs" and frame.height != 1:
        raise _UnusableError(f"it holds {frame.height} rows, not the one of a finished cell")
    return fitted


def _fitted(frame: pl.DataFrame, table: str) -> pl.DataFrame:
    """The frame with exactly the columns and types of the table's schema."""
    schema = polars_schema(table)
    if frame.schema.get("cell_id") != pl.String:
        raise _UnusableError(f"it has another schema than {table}: no column cell_id of text")
    for name, dtype in frame.schema.items():
        if name in schema and not _fits(dtype, schema[name]):
            raise _UnusableError(f"it has another schema than {table}: column {name} is {dtype}, not {schema[name]}")
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


def _unknown(columns: Iterable[str], table: str) -> tuple[str, ...]:
    return tuple(sorted(set(columns) - set(polars_schema(table))))
