"""Break sweeps on purpose and hold what is left against sweeps that were left alone.

    python -m tests.faults kill --n 200
    python -m tests.faults preempt --cells 8 --times 8
    python -m tests.faults operations
    python -m tests.faults launchers --n 4 --cells 100
    python -m tests.faults cells --n 100

Every command ends with a table of what was broken where, and exits with 1 at the first byte that differs.
"""

import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import typer
from disk import FAULTS
from gangs import make_workflow, run_cells, same_bytes
from left_behind import cells_of, check_visible
from small_gang import small_gang
from sweeps import Ended, Sweeper, sweep_command

from sweep.config import Cell
from sweep.paths import CacheFolder, ResultsFolder
from sweep.status import read_status

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

STREAM = ("model=tiny", "data=file", "seq_len=32", "n_tokens=2048", "n_calibration_tokens=512", "n_heldout_tokens=512")
TRAINING = (
    "batch_size=64",
    "top_k=4",
    "top_k_aux=16",
    "n_batches_to_dead=5",
    "steps=24",
    "dict_size=64",
    "checkpoint_steps=5",
)
SEEDS = (0, 1, 2)
BROKEN = Path(__file__).parent / "broken"
GANGS = (SEEDS, (1,), (2, 0))
"""The whole grid first; the others are gangs of some of its cells."""


@dataclass
class Bench:
    """A folder to break things in, the text of its sweeps, and the sweep that nothing was done to."""

    root: Path
    sweeper: Sweeper
    reference: ResultsFolder
    life: float
    """Seconds of the processor that it took."""

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.reference)

    def run(self, folder: Path, grid: Sequence[int] = SEEDS, *, command: bool = True, **how: Any) -> Ended:
        """Run the cells of these seeds: by the command, or only their job."""
        if command:
            return run_command(self.sweeper, self.root, folder, grid, **how)
        cells = [cell for seed in grid for cell in self.cells if cell.seed == seed]
        return self.sweeper(partial(run_job, cells, self.root, folder), self.root / f"{folder.name}.printed", **how)


def run_command(sweeper: Sweeper, root: Path, folder: Path, grid: Sequence[int], **how: Any) -> Ended:
    seeds = ",".join(map(str, grid))
    where = (f"dataset_path={root / 'text.txt'}", f"results_dir={folder}", "keep_checkpoints=true")
    arguments = ["-m", "hydra/launcher=inline", *STREAM, *TRAINING, f"seed={seeds}", *where]
    return sweeper(partial(sweep_command, arguments), root / f"{folder.name}.printed", **how)


def run_job(cells: list[Cell], root: Path, folder: Path) -> None:
    """What the process of a job does, on models and tokens that are there already."""
    cache = CacheFolder(root / "reference" / "cache")
    run_cells(cells, make_workflow(folder, cache, checkpoint_steps=5, cache_gib=0.0, n_causal_rows=8))


@contextmanager
def bench(root: Path | None = None) -> Iterator[Bench]:
    """A bench in a scratch folder, which stays when something went wrong."""
    root = root or Path(tempfile.mkdtemp(prefix="faults."))
    write_text(root / "text.txt")
    sweeper = Sweeper()
    ended = run_command(sweeper, root, root / "reference", SEEDS)
    assert ended.code == 0, ended.printed
    yield Bench(root, sweeper, ResultsFolder(root / "reference"), ended.processor)
    shutil.rmtree(root)


def write_text(path: Path, n_words: int = 60_000) -> None:
    """Documents of made-up words, the same every time."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2_000)]
    lines = [" ".join(draw.choices(words, k=60)) for _ in range(n_words // 60)]
    path.write_text("\n\n".join(lines))


@app.callback()
def main() -> None:
    """One command for each kind of fault."""


@app.command()
def kill(n: int = 200, seed: int = 0) -> None:
    """SIGKILL at random moments of the whole life of a sweep; the same command, or one of other gangs, until done."""
    with bench() as each:
        typer.echo(f"unbroken: {len(each.cells)} cells in {each.life:.1f} s of the processor")
        places = kill_at_random(each, n, seed)
        typer.echo(f"{n} kills, all cells byte-identical; killed in: {places.most_common()}")


def kill_at_random(each: Bench, n: int, seed: int, *, command: bool = True) -> "Counter[str]":
    """Where the kills hit. Every sweep is killed until it has survived, then held against the reference."""
    draw = random.Random(seed)
    places: Counter[str] = Counter()
    life = each.life if command else each.run(each.root / "life", command=False).processor
    sweep = 0
    while places.total() < n:
        sweep += 1
        folder = each.root / f"sweep_{sweep}"
        while True:
            grid = draw.choice(GANGS) if places.total() < n else SEEDS
            after = draw.uniform(0, life) if places.total() < n else None
            ended = each.run(folder, grid, command=command, kill_after=after, clock="processor")
            assert ended.code in (0, -9), ended.printed
            n_done = check_visible(folder, each.reference)
            if ended.code == -9:
                places[ended.place] += 1
            elif grid == SEEDS:
                break
        assert n_done == len(each.cells)
        shutil.rmtree(folder)
    return places


@app.command()
def preempt(cells: int = 8, times: int = 8, steps: int = 1500, seed: int = 0) -> None:
    """SIGTERM at random moments of a sweep, and the same command again each time, as a scheduler would."""
    root = Path(tempfile.mkdtemp(prefix="faults."))
    took = preempt_at_random(root, Sweeper(), cells, times, steps, seed)
    typer.echo(
        f"{cells} cells preempted {times} times, all byte-identical; steps {took.steps}, alone {took.alone_steps}"
    )
    for clock, (alone, preempted, start_ups) in {"wall": took.wall, "processor": took.processor}.items():
        ratio = (preempted - start_ups) / alone
        typer.echo(f"  {ratio:.2f}x: {preempted:.1f} s less {start_ups:.1f} s, alone {alone:.1f} s ({clock} time)")
    shutil.rmtree(root)


@dataclass
class Took:
    """Seconds of a sweep left alone, of the same one with its preemptions, and of those from each new start to its
    first step. A busy machine changes those of its clock, and those of the processor less; it changes no steps."""

    wall: tuple[float, float, float]
    processor: tuple[float, float, float]
    alone_steps: int
    steps: int


def preempt_at_random(root: Path, sweeper: Sweeper, n_cells: int, times: int, steps: int, seed: int) -> Took:
    """Each start is preempted some time into its share of the steps; the last one is left alone."""
    draw = random.Random(seed)
    write_text(root / "text.txt")
    seeds = ",".join(map(str, range(n_cells)))

    def run(name: str, **how: Any) -> Ended:
        where = (f"dataset_path={root / 'text.txt'}", f"results_dir={root / name}", f"cache_dir={root / 'cache'}")
        training = [option for option in TRAINING if not option.startswith(("steps=", "checkpoint_steps="))]
        length = (f"steps={steps}", "checkpoint_steps=100", "keep_checkpoints=true", f"seed={seeds}")
        arguments = ["-m", "hydra/launcher=inline", *STREAM, *training, *length, *where]
        ended = sweeper(partial(sweep_command, arguments), root / f"{name}.printed", timeout=3600, **how)
        assert ended.code == (130 if how else 0), ended.printed
        return ended

    first = run("alone")  # fills the cache, so its start-up is longer than that of the others
    share = n_cells * steps / (times + 1)
    starts = [
        run("preempted", kill_after=draw.uniform(0.1, 1) * share, by=signal.SIGTERM, clock="steps")
        for _ in range(times)
    ]
    starts.append(run("preempted"))
    last = run("again")
    reference = ResultsFolder(root / "alone")
    for cell in cells_of(reference):
        same_bytes(reference, ResultsFolder(root / "preempted"), cell)
    return Took(
        (
            (first.seconds - first.start_up + last.seconds - last.start_up) / 2 + last.start_up,
            sum(each.seconds for each in starts),
            sum(each.start_up for each in starts[1:]),
        ),
        (
            (first.processor - first.processor_start_up + last.processor - last.processor_start_up) / 2
            + last.processor_start_up,
            sum(each.processor for each in starts),
            sum(each.processor_start_up for each in starts[1:]),
        ),
        first.n_steps,
        sum(each.n_steps for each in starts),
    )


@app.command()
def launchers(n: int = 4, cells: int = 100, kills: int = 2, steps: int = 400, seed: int = 0) -> None:
    """Several launchers on one folder, their clocks days apart; each is killed so many times, and started again."""
    root = Path(tempfile.mkdtemp(prefix="faults."))
    sweeper = Sweeper()
    for n_kills in (0, kills):
        starts = share_a_folder(root / f"{n_kills}_kills", sweeper, n, cells, n_kills, steps, seed, backend="local")
        typer.echo(f"{n} launchers, each killed {n_kills} times: {cells} cells, all byte-identical; starts {starts}")
    shutil.rmtree(root)


def share_a_folder(
    root: Path, sweeper: Sweeper, n: int, n_cells: int, n_kills: int, steps: int, seed: int, backend: str
) -> dict[int, int]:
    """How many cells were started how often. All launchers end well and with the same table."""
    root.mkdir(exist_ok=True)
    write_text(root / "text.txt")
    seeds = ",".join(map(str, range(n_cells)))
    training = [option for option in TRAINING if not option.startswith("steps=")]

    def run(name: str, launcher: str, number: int, **how: Any) -> Ended:
        where = (f"dataset_path={root / 'text.txt'}", f"results_dir={root / name}", f"cache_dir={root / 'cache'}")
        arguments = [f"hydra/launcher={launcher}", f"seed={seeds}", f"steps={steps}", "keep_checkpoints=true", *where]
        work = partial(sweep_command, ["-m", *STREAM, *training, *arguments])
        printed = root / f"{name}_{number}.printed"
        return sweeper(work, printed, timeout=3600, before=partial(set_clock, number - 1), **how)

    def until_it_ends(number: int) -> str:
        """What the last start printed."""
        draw = random.Random(f"{seed} {number}")
        for _ in range(n_kills):
            run("shared", backend, number, kill_after=draw.uniform(0, alone.seconds))
            (root / f"shared_{number}.printed").unlink()
        ended = run("shared", backend, number)
        assert ended.code == 0, ended.printed
        return ended.printed

    alone = run("alone", "inline", 1)
    assert alone.code == 0, alone.printed
    with ThreadPoolExecutor(n) as pool:
        printed = list(pool.map(until_it_ends, range(n)))
    assert {last_table(each) for each in printed} == {last_table(alone.printed)}
    reference, results = ResultsFolder(root / "alone"), ResultsFolder(root / "shared")
    for cell in cells_of(reference):
        same_bytes(reference, results, cell)
    starts = Counter(read_status(results.cell(cell.cell_id)).attempts for cell in cells_of(reference))
    assert max(starts) <= 1 + n * n_kills
    return dict(starts)


def set_clock(days: int) -> None:
    """Of this process and all that it starts."""
    break_in(CLOCK=str(days))
    runpy.run_path(str(BROKEN / "sitecustomize.py"))


def break_in(**variables: str) -> None:
    """Let all that this process starts find tests/broken, with these variables of the environment."""
    os.environ |= variables
    os.environ["PYTHONPATH"] = os.pathsep.join([str(BROKEN), os.environ["PYTHONPATH"]])


def last_table(printed: str) -> str:
    """The results as a launcher shows them at its end."""
    lines = printed.splitlines()
    head = max(number for number, line in enumerate(lines) if line.startswith("cell ") and " fvu " in line)
    return "\n".join(line for line in lines[head:] if not line.startswith("ranked"))


WAYS = {
    "error": ("failed", "failed: broken on purpose"),
    "memory": ("out_of_memory", "out of memory: "),
    "crash": ("crashed", "crashed: by signal 11 (SIGSEGV)"),
    "exit": ("crashed", "crashed: exited with code 3"),
    "hang": ("hung", "hung: no sign of life for hang_minutes"),
    "nan": ("diverged", "diverged: the loss of step "),
}
"""How a step of a cell may break (tests/broken), and what its status and the last table say of it then."""


@app.command()
def cells(n: int = 100, steps: int = 12, hang_minutes: float = 1.0) -> None:
    """One cell of so many breaks, in each way in turn: the others do not notice, and it is well once it is mended."""
    root = Path(tempfile.mkdtemp(prefix="faults."))
    for way, told in break_one_cell(root, Sweeper(), n, steps, hang_minutes):
        typer.echo(f"{way}: {n - 1} of {n} cells byte-identical, then all with retry=failed; told: {told}")
    shutil.rmtree(root)


def break_one_cell(
    root: Path, sweeper: Sweeper, n_cells: int, steps: int, hang_minutes: float
) -> Iterator[tuple[str, str]]:
    """Each way of WAYS, and what the last table says of the cell that broke."""
    write_text(root / "text.txt")
    rates = [f"{100 + number}e-5" for number in range(n_cells)]
    training = [option for option in TRAINING if not option.startswith("steps=")]

    def run(name: str, launcher: str, *more: str, **how: Any) -> Ended:
        where = (f"dataset_path={root / 'text.txt'}", f"results_dir={root / name}", f"cache_dir={root / 'cache'}")
        grid = (f"lr={','.join(rates)}", f"steps={steps}", "keep_checkpoints=true", f"hydra/launcher={launcher}")
        work = partial(sweep_command, ["-m", *STREAM, *training, *grid, *where, *more])
        return sweeper(work, root / f"{name}.printed", timeout=3600, **how)

    alone = run("alone", "inline")
    assert alone.code == 0, alone.printed
    reference = ResultsFolder(root / "alone")
    for way, (state, words) in WAYS.items():
        hang = f"hang_minutes={hang_minutes if way == 'hang' else 0}"
        fault = partial(break_in, BREAK=f"{way}@{rates[n_cells // 2]}@{steps // 2}")
        ended = run(way, "local", "hydra.launcher.slots=1", hang, before=fault)
        assert ended.code == 1, ended.printed
        results = ResultsFolder(root / way)
        for cell in cells_of(reference):
            if cell.schedule.lr != float(rates[n_cells // 2]):
                same_bytes(reference, results, cell)
                continue
            assert read_status(results.cell(cell.cell_id)).state == state
            assert results.row("runs", cell.cell_id).exists() == (state == "diverged")
            told = next(line for line in ended.printed.splitlines() if line.startswith(f"1 cell ({cell.cell_id})"))
            asked = sweeper(partial(status_command, results.root), root / f"{way}.status")
            assert words in told and words in asked.printed, (told, asked.printed)
        again = run(way, "local", "retry=failed")
        assert again.code == 0, again.printed
        for cell in cells_of(reference):
            same_bytes(reference, results, cell)
        yield way, told


def status_command(results: Path) -> None:
    """`python -m sweep status <results>`; ends in SystemExit."""
    sys.argv = ["sweep", "status", str(results)]
    runpy.run_module("sweep", run_name="__main__")


@app.command()
def operations(every: int = 1, first: int = 0) -> None:
    """Let each file operation of a gang fail, or be the last before a death; then the same again, unbroken.

    `every` takes one in so many of them, from `first` on.
    """
    with small_gang() as gang:
        n = gang.n_operations
        typer.echo(f"unbroken: {n} operations of {len(gang.cells)} cells")
        breaks = [(at, fault) for at in range(first, n, every) for fault in FAULTS]
        outcomes = Counter(gang.broken(at, fault) for at, fault in breaks)
        typer.echo(f"{len(breaks)} broken operations, all cells byte-identical in the end; {outcomes.most_common()}")


if __name__ == "__main__":
    app()
