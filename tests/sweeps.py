"""Sweeps in forked processes: everything is imported once, so a run costs a second and can be killed anywhere.

The child does what `python sweep_runner.py <arguments>` does after its imports, or only what a job does. A fork server
does the forking, because the process of a test has threads.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Literal

import psutil

__all__ = ["PLACES", "Ended", "Sweeper", "sweep_command"]

ROOT = Path(__file__).parents[1]
PRELOAD = [
    "sweep_runner", "sweep.job", "sweep.launch.launch", "sweeps", "transformers.models.gemma2.modeling_gemma2",
    "transformer_lens.model_bridge", "transformer_lens.model_bridge.bridge", "rich.table", "rich.progress",
]  # fmt: skip

PLACES: dict[str, tuple[str, ...]] = {
    "step": ("sweep.train.train_step_",),
    "save": ("sweep.checkpoint.save",),
    "harvest": ("sweep.language_model.LanguageModel.harvest",),
    "prepare": ("sweep.job.prepare",),
    "finish": ("sweep.job.finish",),
    "evaluation": ("sweep.job.evaluate",),
    "commit": ("sweep.job.commit",),
    "rename": ("os.replace", "os.rename"),
}
"""The parts of a run's life, and the functions that are them. Inner ones win: a rename in a save counts as a rename."""

STEP = list(PLACES).index("step")


@dataclass
class Ended:
    """How a run ended: its exit code, negative for a signal, where it was, what it printed, and after how many of its
    seconds it took its first step.

    The same in seconds of the processor, which a busy machine changes little; and how many steps its cells took in all.
    """

    code: int
    place: str
    seconds: float
    printed: str = field(repr=False)
    start_up: float
    processor: float
    processor_start_up: float
    n_steps: int


class Sweeper:
    """Runs sweeps in forks of a process that has imported everything."""

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        tests = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def __call__(
        self,
        work: Callable[[], None],
        printed: Path,
        kill_after: float | None = None,
        before: Callable[[], None] | None = None,
        timeout: float = 300,
        by: int = signal.SIGKILL,
        clock: Literal["wall", "processor", "steps"] = "wall",
    ) -> Ended:
        """Do the work; kill it after so many seconds, or send it another signal and wait for its end; `before` is
        called first, in its process.

        On a busy machine seconds of the processor, and steps, hit the same parts of a run's life as on an idle one.
        """
        place: Synchronized[int] = self._context.Value("b", -1)
        ready = self._context.Event()
        processor = self._context.Array("d", 3)
        process = self._context.Process(target=child, args=(work, printed, before, place, ready, processor))
        process.start()
        ready.wait(timeout)
        start, seconds, used, first_step = time.monotonic(), 0.0, 0.0, 0.0
        while process.is_alive() and seconds < timeout:
            passed = {"wall": seconds, "processor": used, "steps": processor[2]}[clock]
            if kill_after is not None and passed >= kill_after:
                break
            process.join(0.01)
            seconds = time.monotonic() - start
            with contextlib.suppress(psutil.Error):
                used = max(used, sum(psutil.Process(process.pid).cpu_times()[:2]))
            if not first_step and place.value == STEP:
                first_step = seconds
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, by)
            process.join(timeout)
        seconds = time.monotonic() - start
        assert process.exitcode is not None
        names = [*PLACES, "between"]
        text = printed.read_text() if printed.exists() else ""
        return Ended(
            process.exitcode,
            names[place.value],
            seconds,
            text,
            first_step or seconds,
            processor[0] or used,
            processor[1] or processor[0] or used,
            int(processor[2]),
        )


def child(
    work: Callable[[], None],
    printed: Path,
    before: Callable[[], None] | None,
    place: Any,
    ready: Any,
    processor: Any,
) -> None:
    """What the forked process does. In `processor` it leaves its seconds at the end, those at its first step, and how
    many steps it took."""
    with printed.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    mark_places(place, processor)
    if before is not None:
        before()
    ready.set()
    try:
        work()
    finally:
        processor[0] = time.process_time()


def sweep_command(arguments: Sequence[str]) -> None:
    """`python sweep_runner.py <arguments>`; ends in SystemExit."""
    program = str(ROOT / "sweep_runner.py")
    sys.argv = [program, *arguments]
    os.chdir(ROOT)
    runpy.run_path(program, run_name="__main__")


def mark_places(place: Any, processor: Any) -> None:
    """Let the shared value say at any moment which of PLACES this process is in."""
    for number, names in enumerate(PLACES.values()):
        for name in names:
            module, _, attribute = name.rpartition(".")
            owner = resolve(module)
            setattr(owner, attribute, marked(getattr(owner, attribute), number, place, processor))


def resolve(name: str) -> Any:
    found: Any = sys.modules.get(name)
    if found is None:
        module, _, attribute = name.rpartition(".")
        found = getattr(sys.modules[module], attribute)
    return found


def marked(function: Callable[..., Any], number: int, place: Any, processor: Any) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        before, place.value = place.value, number
        if number == STEP:
            processor[1] = processor[1] or time.process_time()
            processor[2] += 1
        try:
            return function(*arguments, **options)
        finally:
            with contextlib.suppress(Exception):
                place.value = before

    return call
