"""The command line of what is done beside a sweep: `python -m sweep --help`. Heavy imports wait for a command.

A command is a function here that checks what was typed and calls the module where the work belongs.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweep.errors import ConfigError, SweepError
from sweep.paths import CacheFolder, ResultsFolder

if TYPE_CHECKING:
    from sweep.saved import Saved

app = typer.Typer(
    help="What is done beside a sweep. To train transcoders: python sweep_runner.py --help",
    epilog="Exit codes: 0 done, 1 a cell is not done, 2 a request that cannot be answered, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},  # --batch_size is --batch-size
)


def rows_asked(batches: int | None, batch_size: int | None) -> int | None:
    """Held-out rows to score; None for those of the sweep.

    Raises:
        ConfigError: a batch size without a number of batches.
    """
    if batch_size is not None and batches is None:
        raise ConfigError(f"--batch_size {batch_size} says how long a batch is; say how many with --batches")
    return None if batches is None else batches * (batch_size or 8)


def opened(
    checkpoint: Path,
    layer: int | None,
    overrides: Sequence[str] | None,
    device: str,
    output_dir: Path | None,
    cache_dir: Path | None,
) -> "tuple[Saved, CacheFolder]":
    """The transcoder to score and the cache to use; all that was typed is checked before the work.

    Raises:
        SweepError: it is wrong, or the transcoder is not there.
    """
    from sweep.launch.elsewhere import open_checkpoint
    from sweep.options import device_problems
    from sweep.saved import check_output

    if problems := list(device_problems(device)):
        raise ConfigError(*problems)
    saved = open_checkpoint(checkpoint, layer, overrides or ())
    if output_dir is not None:
        check_output(output_dir)
    cache = CacheFolder(cache_dir or saved.default_cache)
    cache.check()
    return saved, cache


@app.command(name="evaluate")
def evaluate_command(
    checkpoint: Annotated[
        Path, typer.Option(help="results/cells/<cell_id>, its transcoder folder, or a folder with an old torch file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="Of a torch file: model=, data=, top_k=, ...")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="The layer you expect; any other than its own is refused.")] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Batches of rows; default: the rows of its sweep.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows in a batch; default 8.")] = None,
    causal_rows: Annotated[
        int | None,
        typer.Option(min=0, help="Rows the model runs on with predictions in it; default: as in its sweep."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
    output_dir: Annotated[Path | None, typer.Option(help="Write metrics.json and summary.txt there.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another cell, scored on the same rows to compare.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Default: the results folder's, or ./results/cache.")] = None,
) -> None:
    """Score a transcoder afresh on held-out rows: each metric with its target and a verdict.

    Rows come in order from the held-out split. More than the sweep had come from documents it did not use.

    A state dict of W_enc, W_dec, b_enc and b_dec that another program saved with torch is scored too; what the
    config.json beside it does not tell is given as for a sweep.

    \b
    Examples:
      python -m sweep evaluate --checkpoint results/cells/<cell_id>
      python -m sweep evaluate --checkpoint results/cells/<cell_id> --batches 100 --batch_size 8 --output_dir out
      python -m sweep evaluate --checkpoint results/cells/<cell_id> --against results/cells/<other>
      python -m sweep evaluate --checkpoint old --layer 12 model=gemma-3-270m top_k=32
    """
    with refusals():
        from sweep.launch import console
        from sweep.saved import open_saved

        n_rows = rows_asked(batches, batch_size)
        other = None if against is None else open_saved(against)
        saved, cache = opened(checkpoint, layer, overrides, device, output_dir, cache_dir)
        with console.progress() as report:
            report("start", 0, 0, "")
            from sweep.score import score, text, write

            scored = score(saved, other, n_rows, cache, device, report, causal_rows)
        if output_dir is not None:
            write(scored, output_dir)
        print(text(scored), end="")


@app.command(name="compare")
def compare_command(
    ours_checkpoint: Annotated[
        Path, typer.Option(help="results/cells/<cell_id>, its transcoder folder, or a folder with an old torch file.")
    ],
    google_dir: Annotated[Path, typer.Option(help="A folder in Google's layout: a family, or one transcoder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="Of a torch file: model=, data=, top_k=, ...")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="The layer you expect; any other than its own is refused.")] = None,
    width: Annotated[str | None, typer.Option(help="As in Google's folders, such as 16k; default: all there.")] = None,
    l0: Annotated[str, typer.Option(help="all, lowest, nearest:<number>, or an L0 that is there.")] = "all",
    batches: Annotated[int | None, typer.Option(min=1, help="Batches of rows; default: the rows of its sweep.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows in a batch; default 8.")] = None,
    causal_rows: Annotated[
        int | None,
        typer.Option(min=0, help="Rows the model runs on with predictions in it; default: as in its sweep."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
    output_dir: Annotated[Path | None, typer.Option(help="Write comparison.json and both metrics there.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Default: the results folder's, or ./results/cache.")] = None,
) -> None:
    """Ours beside Google's on the same held-out rows: both sides' metrics, and a verdict at equal L0 only.

    \b
    Examples:
      python -m sweep compare --ours_checkpoint results/cells/<cell_id> --google_dir ./gemma_scope_2b_transcoders
      python -m sweep compare --ours_checkpoint results/cells/<cell_id> --google_dir ./gemma_scope_2b_transcoders \
        --layer 17 --batches 1000 --device cuda:0 --output_dir out/
      python -m sweep compare --ours_checkpoint old --google_dir ./gemma_scope_2b_transcoders --layer 17 top_k=96
    """
    with refusals():
        import re

        from sweep.launch import console
        from sweep.options import L0_CHOICE

        n_rows = rows_asked(batches, batch_size)
        if not re.fullmatch(L0_CHOICE, l0):
            raise ConfigError(f"--l0 {l0} is no L0; choose all, lowest, nearest:<number> or a number")
        saved, cache = opened(ours_checkpoint, layer, overrides, device, output_dir, cache_dir)
        with console.progress() as report:
            report("start", 0, 0, "")
            from sweep.compare import compare, text, write

            compared = compare(saved, google_dir, width, l0, n_rows, cache, device, report, causal_rows)
        if output_dir is not None:
            write(compared, output_dir)
        print(text(compared), end="")


@app.command(name="prepare")
def prepare_command(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="As for sweep_runner.py, grids included.")
    ] = None,
    multirun: Annotated[bool, typer.Option("--multirun", "-m", help="Changes nothing: a sweep's may be kept.")] = False,
) -> None:
    """Fetch and convert the models and tokenise the texts of a sweep, and nothing else.

    For clusters whose compute nodes have no network: prepare where there is one, then give the sweep the same
    overrides. Given again, it finds everything there.

    \b
    Examples:
      python -m sweep prepare dict_size=4608,9216 top_k=32,64
      python -m sweep prepare model=gemma-2-2b data=fineweb-edu cache_dir=/shared/cache
    """
    with refusals():
        from sweep.launch import console
        from sweep.launch.compose import cells_of
        from sweep.paths import CacheFolder

        workflow, cells = cells_of(overrides or ())
        if workflow.dry_run:
            raise ConfigError("dry_run=true: prepare makes things; python sweep_runner.py dry_run=true shows the plan")
        cache = CacheFolder(Path(workflow.cache_dir))
        cache.check()
        with console.progress() as report:
            report("start", 0, 0, "")
            from sweep.prepare import prepare

            prepared = prepare(cells, cache, report)
        console.show_prepared([(p.kind, p.what, p.was_there, p.n_bytes, p.folder) for p in prepared])


Results = Annotated[Path, typer.Argument(help="The results_dir of a sweep.")]


@app.command(name="status")
def status_command(results: Results) -> None:
    """Where every cell is: one table, from its files and from Slurm.

    \b
    Example:
      python -m sweep status results
    """
    with refusals():
        from sweep.launch import folder

        raise typer.Exit(folder.status(ResultsFolder(results)))


@app.command(name="watch")
def watch_command(results: Results) -> None:
    """Follow the jobs in Slurm until none is left, then tell results and failures. Ctrl-C leaves them running.

    \b
    Example:
      python -m sweep watch results
    """
    with refusals():
        from sweep.launch import folder

        raise typer.Exit(folder.watch(ResultsFolder(results)))


@app.command(name="collect")
def collect_command(results: Results) -> None:
    """Results and failures so far; exit code 0 once every cell is done.

    \b
    Example:
      python -m sweep collect results
    """
    with refusals():
        from sweep.launch import folder

        raise typer.Exit(folder.collect(ResultsFolder(results)))


@app.command(name="cancel")
def cancel_command(results: Results) -> None:
    """End the jobs in Slurm; those that run save first, and the same sweep command goes on from there.

    \b
    Example:
      python -m sweep cancel results
    """
    with refusals():
        from sweep.launch import folder

        raise typer.Exit(folder.cancel(ResultsFolder(results)))


cache_app = typer.Typer(help="What the cache holds, and clearing it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")

Folder = Annotated[Path, typer.Argument(help="A results folder, whose cache/ is meant, or a cache_dir.")]


def cache_of(folder: Path) -> CacheFolder:
    """The cache that a folder is or has."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; name a results folder or a cache_dir")
    return CacheFolder(folder / "cache" if (folder / "cache").is_dir() else folder)


@cache_app.command(name="list")
def cache_list_command(folder: Folder = Path("results")) -> None:
    """Models, tokens and activations: what they are, their size, when they were last used, and the total.

    \b
    Examples:
      python -m sweep cache list results
      python -m sweep cache list /shared/cache
    """
    with refusals():
        from sweep.cache import entries, is_used
        from sweep.launch import console

        console.show_entries([(each, is_used(each)) for each in entries(cache_of(folder))])


@cache_app.command(name="clear")
def cache_clear_command(
    folder: Folder = Path("results"),
    kind: Annotated[list[str] | None, typer.Option(help="models, tokens or activations; default all three.")] = None,
    unused_days: Annotated[float, typer.Option(min=0, help="Only what was not used for so many days.")] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete from the cache; a sweep that needs it again makes it again. What a running job uses stays.

    Files that this program did not make are never deleted. Jobs on other machines are seen only where the disk shares
    locks between machines.

    \b
    Examples:
      python -m sweep cache clear results --kind activations
      python -m sweep cache clear results --unused_days 30 --yes
    """
    with refusals():
        from sweep.cache import KINDS, clear, entries, is_used, unused_for
        from sweep.launch import console

        if unknown := set(kind or ()) - set(KINDS):
            raise ConfigError(f"--kind {min(unknown)} is not a kind; choose one of {', '.join(KINDS)}")
        everything = entries(cache_of(folder))
        chosen = [each for each in everything if each.kind in (kind or KINDS) and unused_for(each, unused_days)]
        if not chosen:
            print("nothing to delete")
            return
        console.show_entries([(each, is_used(each)) for each in chosen])
        if not yes and not sys.stdin.isatty():
            raise ConfigError("deleting asks first, and there is no terminal; give --yes")
        if not yes and not typer.confirm("delete these?"):
            return
        freed, left = clear(chosen)
        print(f"freed {console.size(freed)}" + (f"; {len(left)} in use and left alone" if left else ""))


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What a user or the machine can cause ends with its message on stderr and exit code 2; Ctrl-C with 130."""
    try:
        yield
    except SweepError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    except OSError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from stop


if __name__ == "__main__":
    app(prog_name="python -m sweep")
