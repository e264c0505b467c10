"""What a job's process runs: submitit imports this module in it and calls `run` with a path.

A light module: a signal that arrives while torch is still being imported finds its handler in place.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from sweep.errors import Interrupted
from sweep.launch.machine import Slot
from sweep.options import Workflow
from sweep.paths import LaunchFolder, try_lock, write_json
from sweep.progress import silent

__all__ = ["describe", "run"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

POLL_SECONDS = 0.5
"""How often a job looks whether its launcher lives, and whether it wants a stop."""

GRACE_SECONDS = 120.0
"""How long saving and stopping may take: a checkpoint of several gigabytes on a slow disk."""


def describe(path: Path, cell_ids: Sequence[str], workflow: Workflow, slot: Slot) -> None:
    """Write what `run` reads. A pinned GPU is the only one its process sees, whatever its number here."""
    if slot.gpu is not None and workflow.device != "auto":
        workflow = replace(workflow, device="cuda")
    write_json(path, {"cell_ids": list(cell_ids), "workflow": asdict(workflow), "slot": asdict(slot)})


def run(path: str) -> None:
    """Run the gang that a job file describes; errors end in the status of its cells.

    Side effects: sets the threads and the GPU of this process, and takes SIGTERM and SIGUSR2 as a wish to stop.
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    slot, workflow = Slot(**job["slot"]), Workflow(**job["workflow"])
    stop = threading.Event()

    def ask(_signum: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    threading.Thread(target=obey, args=(LaunchFolder(Path(path).parent), stop), daemon=True).start()
    os.environ |= environment(slot)
    from sweep.job import run_gang

    with contextlib.suppress(Interrupted):  # the cells are saved and say so
        run_gang(job["cell_ids"], workflow, silent, stop.is_set)


def environment(slot: Slot) -> dict[str, str]:
    """What must be set before torch is imported."""
    threads = {name: str(slot.n_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return threads | {"CUDA_VISIBLE_DEVICES": slot.gpu or ""}


def obey(folder: LaunchFolder, stop: threading.Event) -> None:
    """Set `stop` once the launcher asks for it or is dead; end the process if what follows takes too long."""
    while not folder.stop.exists():
        if lock := try_lock(folder.lock, shared=True):
            lock.close()
            break
        time.sleep(POLL_SECONDS)
    stop.set()
    time.sleep(GRACE_SECONDS)
    os._exit(1)
