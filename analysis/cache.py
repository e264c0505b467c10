"""All files of a table as one, `cache/analysis/<table>.parquet`: made where there are many, rebuilt when it must be.

It remembers of each file its size, when it was last touched, and what became of it, so only files that changed since
are read again. It is sealed as they are, and can be deleted at any time.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.files import Outcome, read_files
from sweep.paths import write_atomic
from sweep.results import BLANK_SEAL, fingerprint, seal_holds, sealed

__all__ = ["Compact", "Stamp", "compacted"]

FORMAT = 1
"""Raise it when the same files would come to be read differently."""

BATCH_FILES = 1000
BATCH_BYTES = 64 << 20
"""What is decoded at once while the cache is made."""

Stamp = tuple[int, int]
"""Size of a file and its ctime in nanoseconds, which any change of the file moves."""


@dataclass(frozen=True)
class Compact:
    """The rows of all files of a table in the order of their names, with the stamp and outcome of each."""

    frame: pl.LazyFrame
    stamps: Mapping[str, Stamp]
    outcomes: Mapping[str, Outcome]


def compacted(cache: Path, folder: Path, table: str, stamps: Mapping[str, Stamp]) -> Compact:
    """The files of `folder` that `stamps` names, from the cache as far as it knows them.

    Side effects: the cache is written where it was not up to date and the folder takes it.
    """
    old = _read(cache, table)
    if old and old.stamps == stamps:
        return old
    content = _compact(folder, table, stamps, old)
    with contextlib.suppress(OSError):  # without a cache the next reader takes as long
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, content, durable=False)
    new = _decoded(content, table)
    assert new is not None
    return new


def _read(cache: Path, table: str) -> Compact | None:
    """The cache; None where it is missing, damaged or made by another version."""
    try:
        return _decoded(cache.read_bytes(), table)
    except (OSError, MemoryError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException, RecursionError):
        return None


def _decoded(content: bytes, table: str) -> Compact | None:
    if not seal_holds(content):
        return None
    about = json.loads(pq.read_metadata(pa.BufferReader(content)).metadata.get(b"files", b"{}"))
    if about.get("version") != _version(table):
        return None
    stamps = {name: (size, ctime) for name, (size, ctime) in about["stamps"].items()}
    outcomes = {name: Outcome(o["reason"], tuple(o["unknown_columns"])) for name, o in about["odd"].items()}
    usual = Outcome()
    return Compact(pl.scan_parquet(content), stamps, {name: outcomes.get(name, usual) for name in stamps})


def _version(table: str) -> list[str | int]:
    return [FORMAT, fingerprint(table)]


def _compact(folder: Path, table: str, stamps: Mapping[str, Stamp], old: Compact | None) -> bytes:
    """The bytes of the cache, made a batch of files at a time."""
    outcomes: dict[str, Outcome] = {}
    buffer = io.BytesIO()
    schema = read_files([], table).frame.to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    with pq.ParquetWriter(buffer, schema, compression="zstd", compression_level=1, write_statistics=False) as writer:
        for names in _batches(stamps):
            known = [name for name in names if old and old.stamps.get(name) == stamps[name]]
            part = read_files([folder / name for name in names if name not in set(known)], table)
            frame = part.frame
            if old and known:
                mine = pl.col("cell_id").is_in([Path(name).stem for name in known])
                frame = pl.concat([old.frame.filter(mine).collect(), frame]).sort("cell_id", maintain_order=True)
                outcomes |= {name: old.outcomes[name] for name in known}
            outcomes |= part.outcomes
            writer.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()))
        odd = {name: asdict(outcome) for name, outcome in outcomes.items() if outcome != Outcome()}
        about = {"version": _version(table), "stamps": stamps, "odd": odd}
        writer.add_key_value_metadata({"files": json.dumps(about), "seal": BLANK_SEAL.decode()})
    return sealed(buffer.getvalue())


def _batches(stamps: Mapping[str, Stamp]) -> Iterator[list[str]]:
    """Names in order, cut where a batch would hold too many files or bytes."""
    batch: list[str] = []
    n_bytes = 0
    for name in sorted(stamps):
        if batch and (len(batch) == BATCH_FILES or n_bytes + stamps[name][0] > BATCH_BYTES):
            yield batch
            batch, n_bytes = [], 0
        batch.append(name)
        n_bytes += stamps[name][0]
    if batch:
        yield batch
