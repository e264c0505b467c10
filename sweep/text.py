"""The documents of a dataset, one by one, always in the same order.

Three kinds: `docstrings` of pinned packages (there on every machine, no download), a local `file`, a dataset on
the `hub`. Everything is lazy: whoever stops early has read, parsed and downloaded little more than was used.
"""

import ast
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweep.config import Data
from sweep.errors import DataError, first_line
from sweep.revisions import DOCSTRING_PACKAGES, docstrings_revision, sha256_of_file

__all__ = ["documents"]

MIN_DOCSTRING_CHARACTERS = 200
"""Docstrings must be longer: shorter ones are names said again."""

MAX_REPEATED_CHARACTERS = 20
"""Lines up to this long may come again: headings, brackets, `Returns:`."""

PARQUET_ROWS = 1024
"""Rows of a Parquet file decoded at a time."""

HUB_TIMEOUT_SECONDS = 5
"""How long the hub may take to answer the first question."""

OFFLINE = "or use the text that needs no network: data=docstrings"


def documents(data: Data) -> Iterator[str]:
    """The non-empty documents of a dataset in a fixed order; lone surrogates, which no encoding has, become `?`.

    Raises:
        DataError: while iterating: the text is missing, unreadable, or not the revision the cell names.
    """
    for text in SOURCES[data.dataset_format](data):
        if text.strip():
            yield text.encode("utf-8", errors="replace").decode("utf-8")


# docstrings


def docstring_documents(data: Data) -> Iterator[str]:
    """Docstrings of DOCSTRING_PACKAGES, each long line once; files come in hash order, so any prefix is a mixture."""
    try:
        installed = docstrings_revision()
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"dataset={data.dataset} reads the package {error.name}, which is not installed") from error
    if installed != data.dataset_revision:
        raise DataError(
            f"dataset={data.dataset} is read from installed packages, and their versions changed since this cell was "
            f"planned (dataset_revision={data.dataset_revision[:12]}, now {installed[:12]}); start the sweep again, "
            "or install the versions of constraints.txt"
        )
    seen: set[bytes] = set()
    for path in docstring_files():
        for text in docstrings_in(path):
            fresh = without_known_lines(text, seen)
            if len(fresh) > MIN_DOCSTRING_CHARACTERS:
                yield fresh


def without_known_lines(text: str, seen: set[bytes]) -> str:
    """The text without the long lines that an earlier one had; adds its own to `seen`.

    Libraries repeat the same argument descriptions in hundreds of docstrings. Left in, a quarter of the held-out
    13-grams of tokens stood in the training split too, and held-out metrics would be flattered.
    """
    kept = []
    for line in text.split("\n"):
        digest = hashlib.sha256(line.strip().encode("utf-8", errors="replace")).digest()[:8]
        known = digest in seen and len(line.strip()) > MAX_REPEATED_CHARACTERS
        seen.add(digest)
        if not known:
            kept.append(line)
    return "\n".join(kept)


def docstring_files() -> list[Path]:
    """The *.py files that the packages' own records list, sorted by the sha256 of `<package>/<relative path>`."""
    found: dict[str, Path] = {}
    for package in DOCSTRING_PACKAGES:
        for file in importlib.metadata.files(package) or ():
            if file.suffix == ".py" and ".." not in file.parts:
                name = f"{package}/{file.as_posix()}"
                found[hashlib.sha256(name.encode()).hexdigest()] = Path(str(file.locate()))
    return [path for _, path in sorted(found.items())]


def docstrings_in(path: Path) -> Iterator[str]:
    """Long docstrings of a module, its classes and functions. A file that is gone or no Python has none."""
    try:
        source = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # the parser's ways to give up
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text and len(text) > MIN_DOCSTRING_CHARACTERS:
                yield text


# local files


def file_documents(data: Data) -> Iterator[str]:
    """The documents of a .txt, .jsonl or .parquet file, after a check that it is still the file that was planned."""
    if data.dataset_path is None:
        raise DataError(f"dataset_path=null: {data.dataset} is a file; set dataset_path=<.txt, .jsonl or .parquet>")
    path = Path(data.dataset_path)
    with reading(path):
        if sha256_of_file(path) != data.dataset_revision:
            raise DataError(f"dataset_path={path} changed since this cell was planned; start the sweep again")
        yield from FILE_KINDS[path.suffix](path, data.text_column)


def check_beginning(data: Data) -> None:
    """Read the first document of a local file; what else there is comes without a look.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if data.dataset_format != "file" or data.dataset_path is None:
        return
    path = Path(data.dataset_path)
    with reading(path):
        if next(FILE_KINDS[path.suffix](path, data.text_column), None) is None:
            raise DataError(f"dataset_path={path} is empty: it holds no document; name a file with text")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """An OSError becomes a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"dataset_path={path} cannot be read: {error}") from error


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Lines without their ends, each with its place for messages; an undecodable one is a DataError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"dataset_path={path}, line {number}"
            try:
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def paragraphs(path: Path, _column: str) -> Iterator[str]:
    """Blocks of a text file, separated by blank lines."""
    block: list[str] = []
    for _, line in lines_of(path):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def json_lines(path: Path, column: str) -> Iterator[str]:
    """The text column of each line of a JSON Lines file; blank lines are passed over."""
    for place, line in lines_of(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error}); each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise DataError(f'{place}: not a JSON object; each line must look like {{"{column}": "..."}}')
        yield text_in(record, column, place)


def parquet_rows(path: Path, column: str) -> Iterator[str]:
    """The text column of a Parquet file, decoded a few rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"dataset_path={path}: {missing_column(column, names)}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    yield text_in({column: value.as_py()}, column, f"dataset_path={path}, row {row}")
    except UnicodeDecodeError as error:
        raise DataError(f"dataset_path={path}, row {row}: not UTF-8 ({error.reason})") from error
    except (pa.ArrowException, OSError) as error:  # damaged headers are either
        raise DataError(f"dataset_path={path}: not a readable Parquet file ({error})") from error


def text_in(record: Mapping[str, Any], column: str, place: str) -> str:
    """The text of one record.

    Raises:
        DataError: no such column, or something else than text in it.
    """
    if column not in record:
        raise DataError(f"{place}: {missing_column(column, record)}")
    if not isinstance(text := record[column], str):
        raise DataError(
            f"{place}: text_column={column} holds {type(text).__name__}, not text; "
            "name another column with text_column=, or drop such rows"
        )
    return text


def missing_column(column: str, names: Any) -> str:
    there = ", ".join(map(str, names)) or "none"
    return f"text_column={column} is not a column; set text_column= to one of: {there}"


# the hub


def hub_documents(data: Data) -> Iterator[str]:
    """The text column of a dataset on the Hugging Face hub, streamed; asks the hub for the revision first."""
    import datasets  # type: ignore[import-untyped]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, by version

    name, subset = data.dataset, data.dataset_subset
    try:
        # Without this question, an offline machine waits for half a minute of retries.
        HfApi().dataset_info(name, revision=data.dataset_revision, timeout=HUB_TIMEOUT_SECONDS)
        rows = datasets.load_dataset(
            name, subset, split=data.dataset_split, revision=data.dataset_revision, streaming=True
        )
        for row, record in enumerate(rows, 1):
            yield text_in(record, data.text_column, f"dataset={name}, row {row}")
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        raise DataError(
            f"dataset={name} (dataset_subset={subset}, dataset_split={data.dataset_split}, dataset_revision="
            f"{data.dataset_revision}) cannot be read from the hub: {reason}. Check these names, the network, and "
            f"HF_TOKEN for gated datasets; {OFFLINE}"
        ) from error


FILE_KINDS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": paragraphs,
    ".jsonl": json_lines,
    ".parquet": parquet_rows,
}

SOURCES: dict[str, Callable[[Data], Iterator[str]]] = {
    "docstrings": docstring_documents,
    "file": file_documents,
    "hub": hub_documents,
}
