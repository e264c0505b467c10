"""The schema of every Parquet table as data, and the one way to write a table.

A new metric is a new `Column` here. Writers cast to the schema, readers pass it on, `docs/metrics.md` and
`python -m analysis query` speak of the same names.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from sweep.config import SLICES, Cell
from sweep.options import option_fields
from sweep.paths import OPTIONAL_TABLES, ResultsFolder, write_atomic

if TYPE_CHECKING:
    import polars

__all__ = [
    "BLANK_SEAL",
    "CAUSAL_COLUMNS",
    "CAUSAL_METRICS",
    "DEAD_AT_TOKENS",
    "METRICS",
    "TABLES",
    "Column",
    "columns_of",
    "fingerprint",
    "has_row",
    "parquet_bytes",
    "polars_schema",
    "read_row",
    "seal_holds",
    "sealed",
    "write_run",
    "write_table",
]

Dtype = Literal["int64", "float64", "string", "bool", "list[int64]", "list[float64]", "list[string]"]

DEAD_AT_TOKENS = (1_000, 10_000, 100_000, 1_000_000)
"""Held-out token counts at which the dead fraction is also reported: it falls as one looks longer."""


@dataclass(frozen=True)
class Column:
    """One column: its name, type, meaning and, for numbers, unit ("1" where there is none)."""

    name: str
    dtype: Dtype
    doc: str
    volatile: bool = False
    """It differs between identical runs."""
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    """For metrics one can rank by."""


def _dtype(hint: Any) -> Dtype:
    """The column type of an option's Python type."""
    if get_origin(hint) is Literal:
        return "string"
    arguments = [a for a in get_args(hint) if a not in (type(None), Ellipsis)]
    if get_origin(hint) is tuple:
        return "list[int64]" if arguments[0] is int else "list[float64]"
    scalar = arguments[0] if arguments else hint
    dtypes: dict[Any, Dtype] = {int: "int64", float: "float64", bool: "bool", str: "string"}
    return dtypes[scalar]


CELL_ID = Column("cell_id", "string", "identity of the cell: hash of every scientific option")

OPTIONS = tuple(
    Column(name, _dtype(hint), metadata["doc"], name in ("model_path", "dataset_path"), metadata["unit"])
    for kind, name, hint, metadata in option_fields()
    if kind in (*SLICES.values(), Cell)
)

CAUSAL = (
    Column("ce_clean", "float64", "cross-entropy of the language model as it is", unit="nats per token"),
    Column("ce_spliced", "float64", "cross-entropy with predictions spliced in", unit="nats per token", better="lower"),
    Column("ce_ablated_zero", "float64", "cross-entropy with zero there", unit="nats per token"),
    Column("ce_ablated_mean", "float64", "cross-entropy with the held-out mean there", unit="nats per token"),
    Column("ce_recovered_zero", "float64", "harm of zero that predictions undo", unit="1", better="higher"),
    Column("ce_recovered_mean", "float64", "harm of the mean that predictions undo", unit="1", better="higher"),
    Column("kl", "float64", "KL of next tokens with predictions from without", unit="nats per token", better="lower"),
    Column("n_causal_tokens", "int64", "tokens these are taken over; null if none were asked for", unit="tokens"),
)
CAUSAL_METRICS = tuple(column.name for column in CAUSAL)
"""Metrics for which the language model runs with predictions in it; all null where `n_causal_rows` is 0."""

METRICS = (
    Column(
        "fvu",
        "float64",
        "fraction of variance unexplained: squared error over squared deviation from the mean",
        unit="1",
        better="lower",
    ),
    Column("fvu_per_dimension", "float64", "mean of the output dimensions' own FVUs", unit="1", better="lower"),
    Column(
        "fvu_scalar_variance",
        "float64",
        "older definition with one variance over all elements; flattering",
        unit="1",
        better="lower",
    ),
    Column(
        "mse",
        "float64",
        "mean squared error per token and output dimension, in the model's own units",
        unit="squared target units",
        better="lower",
    ),
    Column(
        "cosine", "float64", "mean over tokens of the cosine between prediction and target", unit="1", better="higher"
    ),
    Column("l0", "float64", "active latents per token, mean", unit="latents", better="lower"),
    Column("l0_median", "float64", "active latents per token, median", unit="latents", better="lower"),
    Column("l0_std", "float64", "active latents per token, standard deviation", unit="latents"),
    Column("dead_fraction", "float64", "latents that fire on no held-out token", unit="1", better="lower"),
    *(
        Column(
            f"dead_fraction_{n}_tokens",
            "float64",
            f"latents silent on the first {n:,} held-out tokens; null if fewer",
            unit="1",
            better="lower",
        )
        for n in DEAD_AT_TOKENS
    ),
    Column(
        "dead_fraction_training",
        "float64",
        "latents dead by the training counter at the last step",
        unit="1",
        better="lower",
    ),
    Column(
        "absorption_score",
        "float64",
        "decoder redundancy: fraction of decoder pairs with cosine above 0.9, exact",
        unit="1",
        better="lower",
    ),
    Column("n_decoder_pairs", "int64", "pairs of decoder rows compared", unit="pairs"),
    Column("n_similar_pairs", "int64", "pairs of decoder rows with cosine above 0.9", unit="pairs", better="lower"),
    Column(
        "frac_latents_with_twin",
        "float64",
        "latents with at least one other decoder row at cosine above 0.9",
        unit="1",
        better="lower",
    ),
    Column(
        "mean_max_decoder_cosine",
        "float64",
        "mean over latents of the largest cosine with another decoder row",
        unit="1",
        better="lower",
    ),
    Column("n_evaluated_tokens", "int64", "held-out tokens the metrics are taken over", unit="tokens"),
    *CAUSAL,
)

RUNS = (
    CELL_ID,
    Column("kind", "string", "cell, or baseline"),
    Column("status", "string", "done; or diverged: its loss stopped being a number, so it has no metrics"),
    Column("failure", "string", "why a cell that diverged did; null for those that are done"),
    Column("schema_version", "int64", "version of the identity and of this schema", unit="1"),
    *OPTIONS,
    *METRICS,
    Column("baseline", "string", "which published transcoder a baseline is; null for cells"),
    Column("baseline_hash", "string", "sha256 of its weights"),
    Column("baseline_l0", "float64", "the L0 its authors measured", unit="latents"),
    Column("baseline_model", "string", "the language model it was trained on"),
    Column("remarks", "string", "what looks wrong about a baseline, such as an L0 far from its authors'"),
    Column("final_loss", "float64", "training loss of the last step", unit="1"),
    Column("rollbacks", "int64", "times it went back because its loss was no number", unit="1"),
    Column("lr_factor", "float64", "what lr was multiplied by in the end: a half for each rollback", unit="1"),
    Column(
        "threshold",
        "float64",
        "fitted inference threshold, in units of the latents; null for top_k",
        unit="target units",
    ),
    Column(
        "source_scale",
        "float64",
        "factor that gave sources unit mean square in training; folded into the weights",
        unit="1 / source units",
    ),
    Column(
        "target_scale",
        "float64",
        "factor that gave targets unit mean square in training; folded into the weights",
        unit="1 / target units",
    ),
    Column("tokens_hash", "string", "sha256 of the token file"),
    Column("heldout_hash", "string", "sha256 of its held-out rows"),
    Column("model_hash", "string", "sha256 of the language model's weights"),
    Column("config", "string", "the options that make up cell_id, as JSON"),
    Column("n_language_model_tokens", "int64", "tokens run for activations of the whole gang", True, unit="tokens"),
    Column("gang_size", "int64", "cells that trained on the same pass", True, unit="cells"),
    Column("attempts", "int64", "runs it took to finish the cell", True, unit="runs"),
    Column("seconds", "float64", "wall time of the last attempt, shared by the gang", True, unit="seconds"),
    Column(
        "training_tokens_per_second",
        "float64",
        "training tokens of the last attempt over `seconds`; null if it took no step",
        True,
        unit="tokens / second",
    ),
    Column("host", "string", "machine", True),
    Column("device", "string", "device it trained on", True),
    Column("n_threads", "int64", "CPU threads of torch", True, unit="threads"),
    Column("versions", "string", "versions of Python and the main packages, as JSON", True),
    Column("git_sha", "string", "commit of the code, empty outside a checkout", True),
    Column("git_dirty", "bool", "the checkout had uncommitted changes", True),
    Column("finished_at", "string", "UTC time of the commit", True),
)

CURVES = (
    CELL_ID,
    Column("step", "int64", "training step, from 0", unit="steps"),
    Column("metric", "string", "loss, loss_<prefix>, aux_loss, fvu, l0, n_dead, lr"),
    Column("value", "float64", "its value in that step", unit="that of its metric"),
)

LATENTS = (
    CELL_ID,
    Column("latent", "int64", "index of the latent", unit="1"),
    Column("group", "int64", "innermost nested prefix that holds it, from 0", unit="1"),
    Column("density", "float64", "fraction of held-out tokens on which it fires", unit="1"),
    Column("mean_activation", "float64", "mean value where it fires; null if it never does", unit="target units"),
    Column("max_activation", "float64", "largest value; null if it never fires", unit="target units"),
    Column("encoder_norm", "float64", "Euclidean norm of its encoder column", unit="target units / source units"),
    Column("decoder_norm", "float64", "Euclidean norm of its decoder row", unit="1"),
    Column("nearest_latent", "int64", "latent with the most similar decoder row", unit="1"),
    Column("nearest_cosine", "float64", "cosine of the two decoder rows", unit="1"),
    Column("batches_since_fired", "int64", "training batches since it last fired", unit="batches"),
)

CAUSAL_SEQUENCES = (
    Column("n_causal_tokens", "int64", "tokens of the row in the sums below; null if it was not run", unit="tokens"),
    Column("sum_ce_clean", "float64", "cross-entropy of the language model as it is", unit="nats"),
    Column("sum_ce_spliced", "float64", "cross-entropy with predictions spliced in", unit="nats"),
    Column("sum_ce_ablated_zero", "float64", "cross-entropy with zero there", unit="nats"),
    Column("sum_ce_ablated_mean", "float64", "cross-entropy with the held-out mean there", unit="nats"),
    Column("sum_kl", "float64", "KL divergence with predictions from without", unit="nats"),
)
CAUSAL_COLUMNS = tuple(column.name for column in CAUSAL_SEQUENCES)

SEQUENCES = (
    CELL_ID,
    Column("sequence", "int64", "held-out row", unit="1"),
    Column("n_tokens", "int64", "tokens of the row that count", unit="tokens"),
    Column("sum_squared_error", "float64", "summed over tokens and output dimensions", unit="squared target units"),
    Column(
        "sum_squared_deviation",
        "float64",
        "of the targets from their mean over all held-out tokens",
        unit="squared target units",
    ),
    Column("sum_l0", "float64", "active latents, summed over tokens", unit="latents"),
    Column("sum_cosine", "float64", "cosine of prediction and target, summed over tokens", unit="1"),
    *CAUSAL_SEQUENCES,
)

CONTEXTS = (
    CELL_ID,
    Column("latent", "int64", "index of the latent", unit="1"),
    Column("place", "int64", "place among the contexts of the latent, from 0: the largest activation", unit="1"),
    Column("sequence", "int64", "held-out row it is from", unit="1"),
    Column("position", "int64", "token of the row with the largest activation, from 0, BOS not counted", unit="tokens"),
    Column("start", "int64", "token of the row with which `tokens` begins", unit="tokens"),
    Column("activation", "float64", "the largest activation", unit="target units"),
    Column("tokens", "list[string]", "text of each token around it"),
    Column("activations", "list[float64]", "value of the latent at each of these tokens", unit="target units"),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "runs": RUNS,
    "curves": CURVES,
    "latents": LATENTS,
    "sequences": SEQUENCES,
    "contexts": CONTEXTS,
}


def polars_schema(table: str) -> "polars.Schema":
    """The table's schema in polars' types."""
    import polars as pl

    dtypes: dict[Dtype, Any] = {
        "int64": pl.Int64,
        "float64": pl.Float64,
        "string": pl.String,
        "bool": pl.Boolean,
        "list[int64]": pl.List(pl.Int64),
        "list[float64]": pl.List(pl.Float64),
        "list[string]": pl.List(pl.String),
    }
    return pl.Schema({column.name: dtypes[column.dtype] for column in TABLES[table]})


def write_table(table: str, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as Parquet, cast to the table's schema, atomically. Columns a row lacks are null.

    Raises:
        KeyError: a row has a column the schema does not know.
    """
    write_atomic(path, parquet_bytes(table, rows))


def parquet_bytes(table: str, rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A Parquet file of the table's schema, sealed, as `write_table` leaves it.

    Raises:
        KeyError: a row has a column the schema does not know.
    """
    import polars as pl

    schema = polars_schema(table)
    rows = list(rows)
    if unknown := {name for row in rows for name in row} - set(schema):
        raise KeyError(f"not in the schema of {table}: {', '.join(sorted(unknown))}")
    frame = pl.DataFrame({name: [row.get(name) for row in rows] for name in schema}, schema=schema, strict=True)
    buffer = io.BytesIO()
    metadata = {"columns": COLUMNS.decode() + fingerprint(table), "seal": BLANK_SEAL.decode()}
    compression: Literal["uncompressed", "zstd"] = "uncompressed" if table == "runs" else "zstd"  # one row: no gain
    frame.write_parquet(buffer, compression=compression, statistics=False, metadata=metadata)
    return sealed(buffer.getvalue())


COLUMNS = b"sha256 of its column names and types: "


def fingerprint(table: str) -> str:
    """Hash of the names and types of a table's columns: files that carry the same one can be read as one."""
    return hashlib.sha256(json.dumps([(c.name, c.dtype) for c in TABLES[table]]).encode()).hexdigest()


def columns_of(parquet: bytes) -> bytes | None:
    """The fingerprint of its columns that a file carries; None for one without."""
    place = parquet.rfind(COLUMNS) + len(COLUMNS)
    return None if place < len(COLUMNS) else parquet[place : place + 64]


SEAL = b"sha256 of this file with its digits as 0: "
BLANK_SEAL = SEAL + b"0" * 64


def sealed(parquet: bytes) -> bytes:
    """The file with its own sha256 in its metadata, since Parquet readers do not notice a flipped bit."""
    place = parquet.rindex(BLANK_SEAL) + len(SEAL)
    return parquet[:place] + hashlib.sha256(parquet).hexdigest().encode() + parquet[place + 64 :]


def seal_holds(parquet: bytes) -> bool | None:
    """Whether a file has the bytes it was written with; None for one without a seal."""
    place = parquet.rfind(SEAL) + len(SEAL)
    if place < len(SEAL):
        return None
    whole = memoryview(parquet)
    digest = hashlib.sha256(whole[:place])
    digest.update(b"0" * 64)
    digest.update(whole[place + 64 :])
    return digest.hexdigest().encode() == parquet[place : place + 64]


def has_row(results: ResultsFolder, cell_id: str) -> bool:
    """Whether a cell is finished: its row in `runs` is there, with the bytes it was written with."""
    try:
        return seal_holds(results.row("runs", cell_id).read_bytes()) is True
    except FileNotFoundError:
        return False


def read_row(path: Path) -> dict[str, Any]:
    """The only row of a file in `runs`."""
    import polars as pl

    return pl.read_parquet(path).row(0, named=True)


def write_run(results: ResultsFolder, cell_id: str, tables: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Commit a finished cell: the row in `runs` goes last, and its rename is the commit."""
    for table in ("contexts", "curves", "latents", "sequences", "runs"):
        rows = [{"cell_id": cell_id, **row} for row in tables.get(table, ())]
        if table in OPTIONAL_TABLES:
            if not rows:
                continue
            results.table(table).mkdir(exist_ok=True)
        write_table(table, results.row(table, cell_id), rows)
