"""SQL over the tables of a results folder."""

import contextlib
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import polars as pl

from analysis.tables import Loaded, load_table
from sweep.errors import ConfigError, first_line
from sweep.results import TABLES, polars_schema

__all__ = ["query", "tables_named", "where"]


def query(results: Path, sql: str) -> tuple[pl.DataFrame, list[Loaded]]:
    """The answer to one SQL statement, and the tables it was taken from; only those it names are read.

    Raises:
        ConfigError: polars does not understand the statement, or it is none that gives rows; the message lists
            tables and columns.
        ResultsError: `results` is not a results folder.
    """
    named = tables_named(sql)
    loaded = [load_table(results, table) for table in named]
    frames = {table: pl.LazyFrame(schema=polars_schema(table)) for table in TABLES}
    frames |= {part.table: part.frame for part in loaded}
    with _explained(named or TABLES):
        frame = pl.SQLContext(frames).execute(sql, eager=True)
    if not frame.width:
        raise ConfigError(f"SQL: {sql.strip()} gives no rows; nothing can be changed here, begin with select or with")
    return frame, loaded


def where(runs: pl.LazyFrame, condition: str) -> pl.LazyFrame:
    """The runs that satisfy a SQL condition, such as `dict_size = 4608 and lr < 0.01`.

    Raises:
        ConfigError: polars does not understand the condition; the message lists the columns.
    """
    with _explained(["runs"], condition):
        return runs.filter(pl.sql_expr(condition)).collect().lazy()


def tables_named(sql: str) -> list[str]:
    """Tables whose name occurs in the statement; one too many costs time, never a wrong answer."""
    words = set(re.findall(r"\w+", sql))
    return [table for table in TABLES if table in words]


@contextlib.contextmanager
def _explained(tables: Iterable[str], condition: str | None = None) -> Iterator[None]:
    """Turn polars' refusal into one line of its words, with the nearest name, and the names it could have had."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        problem, _, _ = first_line(error).partition("; valid columns:")
        if condition is not None:
            problem += f" in the condition {condition!r}"
        columns = {table: [column.name for column in TABLES[table]] for table in tables}
        known = [*itertools.chain.from_iterable(columns.values()), *TABLES]
        if near := [name for word in re.findall(r"""['"](\w+)['"]""", problem) for name in _near(word, known)]:
            problem += f"; did you mean {' or '.join(dict.fromkeys(near))}?"
        names = [f"{table}: {', '.join(part)}" for table, part in columns.items()]
        others = [table for table in TABLES if table not in columns]
        if others:
            names.append(f"more tables: {', '.join(others)} (python -m analysis schema)")
        raise ConfigError(f"SQL: {problem}", *names) from error


def _near(word: str, known: Sequence[str]) -> list[str]:
    return [] if word in known else difflib.get_close_matches(word, known, n=2)
