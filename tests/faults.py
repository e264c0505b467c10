"""Break sweeps on purpose and hold what is left against sweeps that were left alone.

    python -m tests.faults kill --n 200
    python -m tests.faults preempt --cells 8 --times 8
    python -m tests.faults operations
    python -m tests.faults launchers --n 4 --cells 100

Every command ends with a table of what was broken where, and exits with 1 at the first byte that differs.
"""

import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
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
from disk import FAULTS, Death, Fault, faulty
from gangs import make_workflow, run_cells, same_bytes
from make import make_cell
from sweeps import Ended, Sweeper, sweep_command

from sweep.config import Cell, cell_from_json
from sweep.errors import ResultsError
from sweep.paths import CacheFolder, ResultsFolder
from sweep.results import seal_holds
from sweep.revisions import sha256_of_file
from sweep.status import read_status
from sweep.transcoder import load_transcoder

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
GANGS = (SEEDS, (1,), (2, 0))
"""The whole grid first; the others are gangs of some of its cells."""


@dataclass
class Bench:
    """A folder to break things in, the text of its sweeps, and the sweep that nothing was done to."""

    root: Path
    sweeper: Sweeper
    reference: ResultsFolder
    seconds: float

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
    start = time.monotonic()
    ended = run_command(sweeper, root, root / "reference", SEEDS)
    assert ended.code == 0, ended.printed
    yield Bench(root, sweeper, ResultsFolder(root / "reference"), time.monotonic() - start)
    shutil.rmtree(root)


def write_text(path: Path, n_words: int = 60_000) -> None:
    """Documents of made-up words, the same every time."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2_000)]
    lines = [" ".join(draw.choices(words, k=60)) for _ in range(n_words // 60)]
    path.write_text("\n\n".join(lines))


def cells_of(results: ResultsFolder) -> list[Cell]:
    return [cell_from_json(path.read_text()) for path in sorted(results.root.glob("cells/*/config.json"))]


def check_visible(found: Path, reference: ResultsFolder) -> int:
    """Assert that all there is under its final name is whole, and that finished cells are the reference's. How many."""
    results = ResultsFolder(found)
    for table in ("curves", "latents", "sequences", "runs"):
        for path in results.table(table).glob("[!.]*"):
            assert seal_holds(path.read_bytes()) is True, path
    for path in found.glob("cells/*/transcoder/config.json"):
        load_transcoder(path.parent)
    done = [cell for cell in cells_of(reference) if results.row("runs", cell.cell_id).exists()]
    for cell in done:
        same_bytes(reference, results, cell)
    return len(done)


@app.callback()
def main() -> None:
    """One command for each kind of fault."""


@app.command()
def kill(n: int = 200, seed: int = 0) -> None:
    """SIGKILL at random moments of the whole life of a sweep; the same command, or one of other gangs, until done."""
    with bench() as each:
        typer.echo(f"unbroken: {len(each.cells)} cells in {each.seconds:.1f} s")
        places = kill_at_random(each, n, seed)
        typer.echo(f"{n} kills, all cells byte-identical; killed in: {places.most_common()}")


def kill_at_random(each: Bench, n: int, seed: int, *, command: bool = True) -> "Counter[str]":
    """Where the kills hit. Every sweep is killed until it has survived, then held against the reference."""
    draw = random.Random(seed)
    places: Counter[str] = Counter()
    life = each.seconds if command else each.run(each.root / "life", command=False).seconds
    sweep = 0
    while places.total() < n:
        sweep += 1
        folder = each.root / f"sweep_{sweep}"
        while True:
            grid = draw.choice(GANGS) if places.total() < n else SEEDS
            after = draw.uniform(0, life) if places.total() < n else None
            ended = each.run(folder, grid, command=command, kill_after=after)
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
    typer.echo(f"{cells} cells preempted {times} times, all byte-identical; without the start-ups this took")
    for clock, (alone, preempted, start_ups) in {"wall": took.wall, "processor": took.processor}.items():
        ratio = (preempted - start_ups) / alone
        typer.echo(f"  {ratio:.2f}x: {preempted:.1f} s less {start_ups:.1f} s, alone {alone:.1f} s ({clock} time)")
    shutil.rmtree(root)


@dataclass
class Took:
    """Seconds of a sweep left alone, of the same one with its preemptions, and of those from each new start to its
    first step. A busy machine changes those of its clock, and hardly those of the processor."""

    wall: tuple[float, float, float]
    processor: tuple[float, float, float]


def preempt_at_random(root: Path, sweeper: Sweeper, n_cells: int, times: int, steps: int, seed: int) -> Took:
    """Each start is preempted some time into its share of the work; the last one is left alone."""
    draw = random.Random(seed)
    write_text(root / "text.txt")
    seeds = ",".join(map(str, range(n_cells)))

    def run(name: str, **how: Any) -> Ended:
        where = (f"dataset_path={root / 'text.txt'}", f"results_dir={root / name}", f"cache_dir={root / 'cache'}")
        training = [option for option in TRAINING if not option.startswith(("steps=", "checkpoint_steps="))]
        length = (f"steps={steps}", "checkpoint_steps=100", "keep_checkpoints=true", f"seed={seeds}")
        arguments = ["-m", "hydra/launcher=inline", *STREAM, *training, *length, *where]
        return sweeper(partial(sweep_command, arguments), root / f"{name}.printed", **how)

    run("first")  # fills the cache, so that both of the following find it
    alone = run("alone")
    assert alone.code == 0, alone.printed
    share = (alone.seconds - alone.start_up) / (times + 1)
    starts: list[Ended] = []
    for _ in range(times):
        ended = run("preempted", kill_after=alone.start_up + draw.uniform(0.1, 1) * share, by=signal.SIGTERM)
        # the signal may come before anything was begun, or after the last cell where this start was the quicker one
        assert ended.code in (130, -signal.SIGTERM, 0), ended.printed
        starts.append(ended)
    starts.append(run("preempted"))
    assert starts[-1].code == 0, starts[-1].printed
    reference, results = ResultsFolder(root / "alone"), ResultsFolder(root / "preempted")
    for cell in cells_of(reference):
        same_bytes(reference, results, cell)
    return Took(
        (alone.seconds, sum(each.seconds for each in starts), sum(each.start_up for each in starts[1:])),
        (alone.processor, sum(each.processor for each in starts), sum(each.processor_start_up for each in starts[1:])),
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
        return sweeper(work, root / f"{name}_{number}.printed", before=partial(set_clock, number - 1), **how)

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
    os.environ["CLOCK"] = str(days)
    broken = str(Path(__file__).parent / "broken")
    os.environ["PYTHONPATH"] = os.pathsep.join([broken, os.environ["PYTHONPATH"]])
    runpy.run_path(f"{broken}/sitecustomize.py")


def last_table(printed: str) -> str:
    """The results as a launcher shows them at its end."""
    lines = printed.splitlines()
    head = max(number for number, line in enumerate(lines) if line.startswith("cell ") and " fvu " in line)
    return "\n".join(line for line in lines[head:] if not line.startswith("ranked"))


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


@dataclass
class SmallGang:
    """Two cells with two checkpoints each, and what they leave when nothing is done to them."""

    root: Path
    cache: CacheFolder
    reference: ResultsFolder
    n_operations: int

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.reference)

    def broken(self, at: int, fault: Fault) -> str:
        """Break one operation of a gang, run the gang again, and compare. How far the broken one came.

        Heartbeats come by the clock, so a gang may end before an operation that another one had.
        """
        folder = self.root / "broken"
        with faulty(folder, at, fault) as disk, contextlib.suppress(OSError, ResultsError, Death):
            self.run(folder)
        n_done = check_visible(folder, self.reference)
        check_checkpoints(folder)
        run = self.run(folder)
        assert check_visible(folder, self.reference) == len(self.cells), (at, fault, disk.done[at])
        assert not [path for path in run.root.rglob(".*") if path.suffix in (".tmp", ".old")], (at, fault)
        shutil.rmtree(folder)
        return f"{n_done} cells done before" if disk.hit else "not reached"

    def run(self, folder: Path) -> ResultsFolder:
        return run_cells(self.cells, make_workflow(folder, self.cache, checkpoint_steps=2))


@contextmanager
def small_gang(root: Path | None = None, cache: CacheFolder | None = None) -> Iterator[SmallGang]:
    """A gang to break operations of, best in memory: it writes and syncs the same few files over and over."""
    root = root or Path(tempfile.mkdtemp(prefix="faults.", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    cache = cache or CacheFolder(root / "cache")
    cells = [make_cell(steps=4, seed=seed) for seed in (0, 1)]
    with faulty(root / "reference", None) as disk:
        reference = run_cells(cells, make_workflow(root / "reference", cache, checkpoint_steps=2))
    yield SmallGang(root, cache, reference, len(disk.done))
    shutil.rmtree(root)


def check_checkpoints(found: Path) -> None:
    """Assert that every checkpoint under its final name fits its manifest."""
    for path in found.glob("cells/*/checkpoints/step_*/"):
        manifest = json.loads((path / "manifest.json").read_text())
        assert {name: sha256_of_file(path / name) for name in manifest["sha256"]} == manifest["sha256"], path


if __name__ == "__main__":
    app()
