"""How answers look: tables for people, JSON and CSV for programs. Everything on stdout goes through `write`."""

import csv
import io
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sweep import stdout

__all__ = ["as_csv", "as_json", "as_markdown", "as_table", "as_text", "plain", "readable", "write"]

UNLIMITED = 100_000
"""Columns of a file or a pipe: nothing is folded there."""


def write(chunks: Iterable[str]) -> None:
    """Write to stdout; a reader that had enough (`| head`) ends the program quietly."""
    try:
        for chunk in chunks:
            sys.stdout.write(chunk)
        sys.stdout.flush()
    except BrokenPipeError:
        stdout.silence()
        raise SystemExit(0) from None


def as_json(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A list of records, one per line; what JSON cannot say (NaN, infinity) is null."""
    separator = "[\n"
    for record in records:
        yield separator + json.dumps(plain(record), allow_nan=False, default=str)
        separator = ",\n"
    yield "\n]\n" if separator == ",\n" else "[]\n"


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """A header and one line per row, numbers in full; null is empty, a list is written as in JSON."""
    for row in itertools.chain([columns], rows):
        line = io.StringIO()
        cells = [json.dumps(plain(v), default=str) if isinstance(v, list | dict) else v for v in row]
        csv.writer(line, lineterminator="\n").writerow(cells)
        yield line.getvalue()


def as_markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; a bar inside a field is escaped."""
    for row in itertools.chain([columns, ["---"] * len(columns)], rows):
        yield f"| {' | '.join(value.replace('|', chr(92) + '|') for value in row)} |\n"


def plain(value: Any) -> Any:
    """The value with null for numbers that JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def readable(value: Any) -> str:
    """A value for people: four significant digits, lists without spaces, control characters made visible."""
    if value is None:
        return "-"
    if isinstance(value, float):
        text = f"{value:.4g}"
        return f"{value:.0f}" if "e" in text and 1 <= abs(value) < 1e9 else text
    if isinstance(value, list):
        return f"[{','.join(readable(item) for item in value)}]"
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def _console() -> Console:
    width = None if sys.stdout.isatty() else UNLIMITED
    return Console(width=width, markup=False, highlight=False, emoji=False)


def as_text(*lines: str, style: str | None = None) -> str:
    """Lines for people, folded at the width of the terminal."""
    console = _console()
    with console.capture() as capture:
        for line in lines:
            console.print(line, style=style)
    return capture.get()


def as_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for people; long names break at an underscore where the terminal is too narrow."""
    console = _console()
    table = _table(columns, rows)
    if Measurement.get(console, console.options.update(max_width=UNLIMITED), table).maximum > console.width:
        table = _table([_broken(name) for name in columns], rows, gap=1)
    with console.capture() as capture:
        console.print(table)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], gap: int = 2) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, gap - 1))
    for i, name in enumerate(columns):
        numeric = all(isinstance(row[i], int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(readable(value) for value in row))
    return table


def _broken(name: str) -> str:
    """The name in two lines, cut at the underscore nearest to its middle."""
    cuts = [i + 1 for i, letter in enumerate(name) if letter == "_"]
    if len(name) < 9 or not cuts:
        return name
    cut = min(cuts, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:cut]}\n{name[cut:]}"
