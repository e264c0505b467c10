"""The command line of the analysis, `python -m analysis --help`. Heavy imports wait for a command."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweep.errors import SweepError

if TYPE_CHECKING:
    import polars as pl

    from analysis.tables import Loaded

app = typer.Typer(
    help="Rank, compare and query the results of sweeps. Reads Parquet only; data goes to stdout, remarks to stderr.",
    epilog="Exit codes: 0 done (also for a folder without results yet), 2 a request that cannot be answered.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="A list of records on stdout, full precision, NaN as null.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="CSV on stdout, full precision.")]


@app.command(name="rank")
def rank_command(
    results: Annotated[Path, typer.Argument(help="The results_dir of a sweep.")] = Path("results"),
    where: Annotated[str | None, typer.Option(help="Only cells that satisfy this SQL condition.")] = None,
    by: Annotated[str, typer.Option(help="The metric that orders the rows.")] = "fvu",
    frontier: Annotated[str | None, typer.Option(help="Only baselines that satisfy this SQL condition.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Show the best N rows of each group.")] = None,
    json: AsJson = False,
    csv: AsCsv = False,
) -> None:
    """Cells of the same model, layer, target and held-out rows, best first, each against the baselines at its own L0.

    Where the group has baselines (baselines=gemma_scope), rows are ordered by the ratio of their FVU to that of the
    baselines' frontier at the same L0, with its 95% interval over held-out sequences; ties are called ties. Without
    baselines, and by other metrics, by the metric itself. Seeds of a cell are one row: the mean, and its 95% interval.
    A * marks the Pareto front of L0 and FVU among the runs chosen, a = what is not told from the first. What was left
    out is named.

    \b
    Examples:
      python -m analysis rank results
      python -m analysis rank results --where "dict_size = 4608 and lr < 0.01" --top 5
      python -m analysis rank results --frontier "dict_size = 16384"
      python -m analysis rank results --by fvu_per_dimension --where "dead_fraction < 0.1"
      python -m analysis rank results --json | jq '.[] | select(.fvu_verdict == "better") | .cell_id'
    """
    with refusals():
        one_format(json, csv)
        import polars as pl

        from analysis import query, show
        from analysis.common_rows import sequences_of
        from analysis.rank import FIELDS, rank, records
        from analysis.rank_table import rank_text
        from analysis.tables import load_table

        loaded = load_table(results, "runs")
        remark(loaded.warnings)
        everything = loaded.frame.collect()
        is_baseline = pl.col("kind") == "baseline"
        cells, baselines = everything.filter(~is_baseline), everything.filter(is_baseline)
        chosen = cells if where is None else query.where(cells.lazy(), where).collect()
        edge = baselines if frontier is None else query.where(baselines.lazy(), frontier).collect()
        wanted = pl.concat([chosen, edge])
        groups = [group for group in rank(wanted, by, sequences_of(results, wanted)) if group.rows or group.left_out]
        if not groups:
            remark(nothing_yet(results, loaded) or [f"no run satisfies {where}" if cells.height else "no cell yet"])
        elif n_dropped := cells.height - chosen.height:
            remark([f"left out {n_dropped} of {cells.height} runs: they do not satisfy {where}"])
        if n_dropped := baselines.height - edge.height:
            remark([f"left out {n_dropped} of {baselines.height} baselines: they do not satisfy {frontier}"])
        if json or csv:
            remark(f"left out {cell_id}: {reason}" for group in groups for cell_id, reason in group.left_out)
        found = records(groups, top)
        if json:
            show.write(show.as_json(found))
        elif csv:
            show.write(show.as_csv(FIELDS, (list(record.values()) for record in found)))
        else:
            show.write(rank_text(group, top) for group in groups)


@app.command(name="effects")
def effects_command(
    results: Annotated[Path, typer.Argument(help="The results_dir of a sweep.")] = Path("results"),
    where: Annotated[str | None, typer.Option(help="Only runs that satisfy this SQL condition.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Metrics shown in the terminal, with commas.")] = None,
    json: AsJson = False,
    csv: AsCsv = False,
) -> None:
    """What each swept option did to each metric, over runs that are equal in everything else.

    Options A, B and C (presets capacity, schedule and revival, from base or tuned to improved) are recognised by
    their values, however they were typed. --json and --csv have every metric.

    \b
    Examples:
      python -m analysis effects results
      python -m analysis effects results --where "seed < 2" --metrics fvu,l0
      python -m analysis effects results --json | jq '.[] | select(.metric == "fvu")'
    """
    with refusals():
        one_format(json, csv)
        from dataclasses import asdict

        import polars as pl

        from analysis import query, show
        from analysis.common_rows import sequences_of
        from analysis.effects import FIELDS, effects
        from analysis.effects_table import SHOWN, effects_text
        from analysis.tables import load_table

        shown = metrics_named(metrics) if metrics else SHOWN
        loaded = load_table(results, "runs")
        remark(loaded.warnings)
        runs = loaded.frame if where is None else query.where(loaded.frame, where)
        cells = runs.filter(pl.col("kind") == "cell").collect()
        groups = effects(cells, sequences_of(results, cells))
        if not groups:
            remark(nothing_yet(results, loaded) or [f"no run satisfies {where}"])
        found = [{**group.key, **asdict(effect)} for group in groups for effect in group.effects]
        if json:
            show.write(show.as_json(found))
        elif csv:
            show.write(show.as_csv(FIELDS, ([record[name] for name in FIELDS] for record in found)))
        else:
            show.write(effects_text(group, shown) for group in groups)


@app.command(name="query")
def query_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[RESULTS] SQL",
            help="The results_dir of a sweep (default: results), and one statement in polars' SQL.",
            show_default=False,
        ),
    ],
    limit: Annotated[int, typer.Option(min=0, help="Rows shown in the terminal; 0 shows all.")] = 100,
    json: AsJson = False,
    csv: AsCsv = False,
    parquet: Annotated[Path | None, typer.Option(help="Write the answer to this Parquet file.")] = None,
) -> None:
    """SQL over the tables runs, curves, latents and sequences; `schema` lists their columns.

    \b
    Examples:
      python -m analysis query results "select dict_size, top_k, fvu, l0 from runs order by fvu"
      python -m analysis query results "select top_k, avg(fvu) as fvu from runs group by top_k" --csv
      python -m analysis query "select * from curves where metric = 'loss' and step % 10 = 0" --json
      python -m analysis query "select * from latents where density > 0.1" --parquet dense.parquet
    """
    with refusals():
        one_format(json, csv, parquet is not None)
        folder, statement = folder_and_sql(words)
        from analysis import show
        from analysis.query import query
        from analysis.tables import load_table

        frame, loaded = query(folder, statement)
        for part in loaded:
            remark(part.warnings)
        if not any(part.n_files for part in loaded):
            remark(nothing_yet(folder, load_table(folder, "runs")))
        if parquet:
            if parquet.resolve().is_relative_to(folder.resolve()):
                raise typer.BadParameter(f"--parquet {parquet} lies in the results folder; write it elsewhere")
            write_parquet(frame, parquet)
        elif json:
            show.write(show.as_json(frame.iter_rows(named=True)))
        elif csv:
            show.write(show.as_csv(frame.columns, frame.iter_rows()))
        else:
            shown = frame.head(limit) if limit else frame
            show.write([show.as_table(frame.columns, shown.rows())])
            if n_more := frame.height - shown.height:
                show.write([f"{n_more} more of {frame.height} rows: --limit 0 shows all, --csv and --json never cut\n"])


@app.command(name="report")
def report_command(
    results: Annotated[Path, typer.Argument(help="The results_dir of a sweep.")] = Path("results"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
    where: Annotated[str | None, typer.Option(help="Only runs that satisfy this SQL condition.")] = None,
    latents: Annotated[str | None, typer.Option(help="Show the latents of this cell: its id, or best.")] = None,
    latent: Annotated[str | None, typer.Option(help="Latents to show first, by number, with commas.")] = None,
) -> None:
    """One HTML page that opens offline: the best cell, FVU against L0, effects, curves, latents, every run.

    With --latents it begins with what excites the latents of a cell, where its sweep had n_contexts=20.

    \b
    Examples:
      python -m analysis report results
      python -m analysis report results --where "dict_size = 4608" --output small.html
      python -m analysis report results --latents best --latent 5,17
    """
    with refusals():
        from analysis.report.page import Request, report

        numbers = latents_named(latent) if latent else []
        if numbers and latents is None:
            raise typer.BadParameter("--latent needs --latents: a cell, or best")
        html, remarks = report(results, Request(where, latents, numbers))
        remark(remarks)
        write_whole(html.encode(), output, "--output")
        remark([f"{output}: {len(html.encode()) / 1e6:.1f} MB, opens in any browser"])


@app.command(name="schema")
def schema_command(
    table: Annotated[str | None, typer.Argument(help="One table; all of them if left out.")] = None,
    json: AsJson = False,
    csv: AsCsv = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables in Markdown: docs/schema.md.")] = False,
) -> None:
    """The columns of each table: type, unit and meaning.

    \b
    Examples:
      python -m analysis schema
      python -m analysis schema runs --json
    """
    with refusals():
        one_format(json, csv, markdown)
        from analysis import show
        from sweep.errors import ConfigError
        from sweep.results import TABLES

        if table is not None and table not in TABLES:
            raise ConfigError(f"table {table} does not exist; choose one of {', '.join(TABLES)}")
        columns = ("table", "column", "type", "unit", "volatile", "meaning")
        tables = TABLES if table is None else {table: TABLES[table]}
        rows = [(name, c.name, c.dtype, c.unit, c.volatile, c.doc) for name, part in tables.items() for c in part]
        if json:
            show.write(show.as_json(dict(zip(columns, row, strict=True)) for row in rows))
        elif csv:
            show.write(show.as_csv(columns, rows))
        else:
            headings = ("column", "type", "unit", "meaning")
            for name, part in tables.items():
                lines = [(c.name, c.dtype, c.unit, c.doc + " (volatile)" * c.volatile) for c in part]
                if markdown:
                    show.write([f"## {name}\n\n", *show.as_markdown(headings, lines), "\n"])
                else:
                    show.write([show.as_text(name, style="bold"), show.as_table(headings, lines), "\n"])
            show.write(["unit 1: a number without one; volatile: differs between identical runs\n"])


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What a user can cause ends with its message on stderr and exit code 2."""
    try:
        yield
    except SweepError as error:
        remark([str(error)])
        raise typer.Exit(2) from error


def one_format(*asked: bool) -> None:
    if sum(asked) > 1:
        raise typer.BadParameter("choose one format, not both")


def write_parquet(frame: "pl.DataFrame", path: Path) -> None:
    """The answer as a file, whole or not at all.

    Raises:
        ResultsError: the file cannot be written.
    """
    import io

    content = io.BytesIO()
    frame.write_parquet(content)
    write_whole(content.getvalue(), path, "--parquet")
    remark([f"{frame.height:,} rows in {path}"])


def write_whole(content: bytes, path: Path, option: str) -> None:
    """A file that a user named, whole or not at all.

    Raises:
        ResultsError: it cannot be written.
    """
    from sweep.errors import ResultsError
    from sweep.paths import write_atomic

    try:
        write_atomic(path, content)
    except OSError as error:
        why = error.strerror or error
        raise ResultsError(f"{option} {path} cannot be written ({why}); choose another place") from error


def latents_named(words: str) -> list[int]:
    """Numbers of latents, separated by commas."""
    from sweep.errors import ConfigError

    try:
        return [int(word) for word in words.split(",")]
    except ValueError as error:
        raise ConfigError(f"--latent {words}: give whole numbers with commas, such as 5,17") from error


def metrics_named(words: str) -> list[str]:
    """Names of metrics, separated by commas."""
    from sweep.errors import ConfigError
    from sweep.results import METRICS

    names, known = words.split(","), [column.name for column in METRICS]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--metrics {unknown[0]}: no such metric; choose from {', '.join(known)}")
    return names


def folder_and_sql(words: list[str]) -> tuple[Path, str]:
    """The two arguments of `query`, of which the first may be left out."""
    if len(words) > 2:
        raise typer.BadParameter("give at most a results folder and one statement; put the statement in quotes")
    if len(words) == 1 and Path(words[0]).is_dir():
        raise typer.BadParameter(f'no SQL after {words[0]}; try "select cell_id, fvu, l0 from runs"')
    return Path(words[0] if len(words) == 2 else "results"), words[-1]


def remark(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def nothing_yet(folder: Path, runs: "Loaded") -> list[str]:
    """What to say about a folder from which no run could be read; nothing if there are some."""
    from analysis.tables import what_to_run

    if runs.n_files:
        return []
    if runs.left_out:
        return [f"{folder} has no readable run: all {len(runs.left_out)} files are left out"]
    return [f"{folder} has no finished run yet; this makes four:", f"  {what_to_run(folder)}"]


if __name__ == "__main__":
    app()
