"""The token file: a dataset, tokenised and packed once into rows of equal length.

1. A document belongs to train, calibration or held-out by the hash of its text, and by nothing else.
2. In each split the ids of the documents are chained, with a blank line between two of them.
3. The chain is cut into rows: BOS, then seq_len - 1 tokens. BOS is nowhere else in a row and is never counted.
4. Reading stops once all splits are full.

So a split at a larger budget begins with the rows it had at a smaller one, and no text is in two splits.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from sweep.config import Data, Model
from sweep.errors import DataError, TooShort
from sweep.locks import locked
from sweep.paths import CacheFolder, atomic_directory, remove_leftovers, write_json
from sweep.progress import Report
from sweep.revisions import read_json, sha256_of_file
from sweep.text import documents

__all__ = [
    "BUDGETS",
    "ROWS_PER_BLOCK",
    "TOKENS_VERSION",
    "Split",
    "TokenFile",
    "Tokenizer",
    "only_heldout",
    "prepare_tokens",
    "row_bytes",
    "row_counts",
    "split_of",
    "tokens_folder",
]

TOKENS_VERSION = 2
"""Part of the token file's key. Raise it when the same dataset comes to give other documents or other rows."""

TXT = ", and documents of a .txt file are what blank lines separate"

ROWS_PER_BLOCK = 16
"""Rows that go through the language model at once; train holds whole blocks."""

DOCUMENTS_PER_BATCH = 64
"""Documents given to the tokenizer at once. Changes nothing but speed, and how far is read beyond the end."""

MAX_MANIFEST_BYTES = 1 << 20

Split = Literal["train", "calibration", "heldout"]

BUDGETS: dict[Split, str] = {
    "train": "n_tokens",
    "calibration": "n_calibration_tokens",
    "heldout": "n_heldout_tokens",
}

log = logging.getLogger(__name__)


@runtime_checkable
class Tokenizer(Protocol):
    """What a tokenizer must do here."""

    @property
    def bos_token_id(self) -> int: ...

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """The ids of each text, without special tokens around it."""
        ...


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The rows of the three splits, memory-mapped and read-only. Equal hashes mean equal rows."""

    train: Int32[np.ndarray, "n_train seq_len"]
    calibration: Int32[np.ndarray, "n_calibration seq_len"]
    heldout: Int32[np.ndarray, "n_heldout seq_len"]
    hash: str
    heldout_hash: str


def row_counts(data: Data) -> dict[Split, int]:
    """Rows of each split: its budget over seq_len - 1 counted tokens, rounded up; train to whole blocks."""
    counts: dict[Split, int] = {}
    for split, key in BUDGETS.items():
        unit = rows_per_unit(split)
        counts[split] = -(-getattr(data, key) // ((data.seq_len - 1) * unit)) * unit
    return counts


def row_bytes(model: Model, data: Data) -> int:
    """Size of the activations of one row at one site."""
    itemsize = {"float32": 4, "bfloat16": 2}[data.activation_dtype]
    return (data.seq_len - 1) * (model.d_in + model.d_out) * itemsize


def rows_per_unit(split: Split) -> int:
    return ROWS_PER_BLOCK if split == "train" else 1


def split_of(document: str) -> Split:
    """The split of a document: eight tenths train, one tenth each calibration and held-out, by sha256 of its text."""
    tenth = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 10
    return "train" if tenth < 8 else "calibration" if tenth == 8 else "heldout"


def prepare_tokens(data: Data, model: Model, tokenizer: Tokenizer, cache: CacheFolder, report: Report) -> TokenFile:
    """Open the token file of a dataset, or build it first. Of several processes one builds and the others wait.

    Side effects: writes `cache.tokens(<key>)`; a damaged one is replaced, with a warning.

    Raises:
        DataError: the text is empty, unreadable, or too short for the budgets.
    """
    identity = identity_of(data, model)
    folder = tokens_folder(data, model, cache)
    with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged: looked at again under the lock
        return open_tokens(folder, identity)
    with locked(folder.parent / f"{folder.name}.lock"):
        try:
            return open_tokens(folder, identity)
        except (OSError, ValueError) as error:
            if folder.exists():
                log.warning("token file %s is damaged (%s): building it again", folder, error)
        remove_leftovers(folder.parent, folder.name)
        build_tokens(folder, data, tokenizer, identity, report)
        return open_tokens(folder, identity)


def tokens_folder(data: Data, model: Model, cache: CacheFolder) -> Path:
    """Where the token file of a dataset lies, or will."""
    digest = hashlib.sha256(json.dumps(identity_of(data, model), sort_keys=True, separators=(",", ":")).encode())
    return cache.tokens(digest.hexdigest()[:16])


def only_heldout(data: Data, n_rows: int) -> Data:
    """The same text with `n_rows` held-out rows and no others.

    Up to the budget of `data` they are its own held-out rows. What follows comes from documents it did not use: a
    document that is held out by its hash is in no other split, however far is read.
    """
    return replace(data, n_tokens=0, n_calibration_tokens=0, n_heldout_tokens=n_rows * (data.seq_len - 1))


def identity_of(data: Data, model: Model) -> dict[str, Any]:
    """Everything the rows depend on."""
    return {
        "dataset": data.dataset,
        "dataset_format": data.dataset_format,
        "dataset_revision": data.dataset_revision,
        "dataset_subset": data.dataset_subset,
        "dataset_split": data.dataset_split,
        "text_column": data.text_column,
        "model": model.model,
        "model_revision": model.model_revision,
        "seq_len": data.seq_len,
        "n_rows": row_counts(data),
        "tokens_version": TOKENS_VERSION,
    }


# opening


def open_tokens(folder: Path, identity: Mapping[str, Any]) -> TokenFile:
    """Memory-map a token file after comparing identity, sizes and hashes with its manifest.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or is of another identity.
    """
    manifest = read_json(folder / "manifest.json", MAX_MANIFEST_BYTES)
    if not isinstance(manifest, dict) or manifest.get("identity") != identity:
        raise ValueError("manifest.json does not describe this text")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(files.get(split), dict) for split in BUDGETS):
        raise ValueError("manifest.json lacks a split")
    arrays = {}
    for split, n_rows in identity["n_rows"].items():
        arrays[split] = open_rows(folder / f"{split}.npy", files[split], (n_rows, identity["seq_len"]))
    return TokenFile(
        **arrays,
        hash=hashlib.sha256("\n".join(files[split]["sha256"] for split in BUDGETS).encode()).hexdigest(),
        heldout_hash=files["heldout"]["sha256"],
    )


def open_rows(path: Path, entry: Mapping[str, Any], shape: tuple[int, int]) -> Int32[np.ndarray, "rows seq_len"]:
    if entry.get("shape") != list(shape):
        raise ValueError(f"manifest.json: {path.name} should have the shape {list(shape)}")
    if path.stat().st_size != entry.get("n_bytes") or sha256_of_file(path) != entry.get("sha256"):
        raise ValueError(f"{path.name} is not the file that was written")
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != np.int32:
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}")
    return array


# building


class RowWriter:
    """Chains the documents of one split and writes the chain as rows of an .npy file; memory does not grow with it."""

    def __init__(self, file: IO[bytes], shape: tuple[int, int], bos: int, separator: Sequence[int]) -> None:
        self.n_rows, self.seq_len = shape
        self.n_documents = 0
        self._file, self._bos, self._separator = file, bos, separator
        self.n_rows_written = 0
        self._rest = np.empty(0, np.int32)
        np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": shape})

    @property
    def full(self) -> bool:
        return self.n_rows_written == self.n_rows

    @property
    def n_tokens_needed(self) -> int:
        return self.n_rows * (self.seq_len - 1)

    @property
    def n_tokens(self) -> int:
        """Counted tokens so far, at most those needed."""
        return self.n_tokens_needed if self.full else self.n_rows_written * (self.seq_len - 1) + len(self._rest)

    def add(self, ids: Sequence[int]) -> None:
        """Append a document, or as much of it as still fits."""
        # Text can spell out BOS. Its activations are far from all others, so it is let in at position 0 alone.
        ids = [token for token in ids if token != self._bos]
        if self.full or not ids:
            return
        chain = np.array([*(self._separator if self.n_documents else ()), *ids], dtype=np.int32)
        chain = np.concatenate([self._rest, chain])
        width = self.seq_len - 1
        n_rows = min(len(chain) // width, self.n_rows - self.n_rows_written)
        rows = np.full((n_rows, self.seq_len), self._bos, dtype="<i4")
        rows[:, 1:] = chain[: n_rows * width].reshape(n_rows, width)
        self._file.write(rows.tobytes())
        self._rest = chain[n_rows * width :]
        self.n_rows_written += n_rows
        self.n_documents += 1


def build_tokens(folder: Path, data: Data, tokenizer: Tokenizer, identity: Mapping[str, Any], report: Report) -> None:
    """Write a token file and its manifest; the folder appears whole or not at all."""
    separator = tokenizer.encode_batch(["\n\n"])[0]
    with atomic_directory(folder) as partial:
        with contextlib.ExitStack() as files:
            writers: dict[Split, RowWriter] = {}
            for split, n_rows in row_counts(data).items():
                file = files.enter_context((partial / f"{split}.npy").open("wb"))
                writers[split] = RowWriter(file, (n_rows, data.seq_len), tokenizer.bos_token_id, separator)
            n_read = fill(writers, documents(data), tokenizer, report)
        if n_read == 0:
            raise DataError(f"dataset={data.dataset} is empty: it has no document with text")
        if not all(writer.full for writer in writers.values()):
            raise TooShort(too_short(data, writers, n_read), {split: w.n_rows_written for split, w in writers.items()})
        entries = {split: manifest_entry(partial / f"{split}.npy", writer) for split, writer in writers.items()}
        write_json(partial / "manifest.json", {"identity": identity, "files": entries})


def fill(writers: Mapping[Split, RowWriter], texts: Iterator[str], tokenizer: Tokenizer, report: Report) -> int:
    """Tokenise documents into their splits until all are full or the text ends; returns the documents read."""
    n_read, total = 0, sum(writer.n_tokens_needed for writer in writers.values())
    report("tokenise", 0, total, "tokens")
    while batch := list(islice(texts, DOCUMENTS_PER_BATCH)):
        n_read += len(batch)
        wanted = [(writer, text) for text in batch if not (writer := writers[split_of(text)]).full]
        encoded = tokenizer.encode_batch([text for _, text in wanted]) if wanted else ()
        for (writer, _), ids in zip(wanted, encoded, strict=True):
            writer.add(ids)
        report("tokenise", sum(writer.n_tokens for writer in writers.values()), total, "tokens")
        if all(writer.full for writer in writers.values()):
            break
    return n_read


def manifest_entry(path: Path, writer: RowWriter) -> dict[str, Any]:
    return {
        "shape": [writer.n_rows, writer.seq_len],
        "n_bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
        "n_documents": writer.n_documents,
    }


def too_short(data: Data, writers: Mapping[Split, RowWriter], n_read: int) -> str:
    """What each split got and needed, and the largest budgets that fit."""
    parts = []
    for split, writer in writers.items():
        unit = (writer.seq_len - 1) * rows_per_unit(split)
        fits = writer.n_tokens // unit * unit
        if writer.full:
            verdict = "enough"
        elif fits:
            verdict = f"choose at most {BUDGETS[split]}={fits}"
        else:
            verdict = f"less than the least possible {unit}"
        needed = f"{BUDGETS[split]}={getattr(data, BUDGETS[split])} needs {writer.n_tokens_needed}"
        parts.append(f"{split}: {needed} tokens and got {writer.n_tokens} ({verdict})")
    return (
        f"dataset={data.dataset} is too short: its {n_read} documents do not fill every split. {'; '.join(parts)}. "
        "A document goes to one split as a whole, by its hash: more text, more documents or a smaller seq_len= also "
        f"help{TXT if data.dataset.endswith('.txt') else ''}"
    )
