"""What a job's process runs: `run` with a path in the local queue, `run_in_slurm` by submitit.

A light module: a signal that arrives while torch is still being imported finds its handler in place.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from sweep.errors import Interrupted
from sweep.launch.machine import Slot, usable_cores
from sweep.launch.squeue import SlurmSilent, slurm
from sweep.locks import is_held
from sweep.options import Workflow
from sweep.paths import LaunchFolder, ResultsFolder, write_atomic, write_json
from sweep.pulse import Pulse
from sweep.status import read_status

__all__ = ["describe", "run", "run_in_slurm"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

POLL_SECONDS = 0.5
"""How often a job looks whether its launcher lives, and whether it wants a stop."""

GRACE_SECONDS = 120.0
"""How long saving and stopping may take: a checkpoint of several gigabytes on a slow disk."""

MAX_STALLED = 3
"""Runs of one Slurm job without a step, one after the other, after which it does not go back into the queue."""

ASK_TRIES = 12
ASK_AGAIN_SECONDS = 5.0
"""How often and when a stopping job asks a controller again that does not answer."""


def describe(path: Path, cell_ids: Sequence[str], workflow: Workflow, slot: Slot | None) -> None:
    """Write what a job reads; Slurm gives its jobs no slot of ours.

    A pinned GPU is the only one its process sees, whatever its number here.
    """
    if slot is not None and slot.gpu is not None and workflow.device != "auto":
        workflow = replace(workflow, device="cuda")
    write_json(path, {"cell_ids": list(cell_ids), "workflow": asdict(workflow), "slot": slot and asdict(slot)})


def run(path: str) -> None:
    """Run the gang that a job file of the local queue describes; errors end in the status of its cells.

    Side effects: sets the threads and the GPU of this process, and takes SIGTERM and SIGUSR2 as a wish to stop.
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    slot, workflow = Slot(**job["slot"]), Workflow(**job["workflow"])
    stop, folder = stop_on_signals(), LaunchFolder(Path(path).parent)
    threading.Thread(target=obey, args=(folder, stop), daemon=True).start()
    os.environ |= environment(slot)
    with Pulse(Path(path), 60 * workflow.hang_minutes) as pulse, contextlib.suppress(Interrupted):
        from sweep.job import run_gang

        if not must_stop(folder):  # else another launcher may have taken the cells over meanwhile
            run_gang(job["cell_ids"], workflow, pulse.report, stop.is_set, pulse.at)


def run_in_slurm(path: str) -> None:
    """Run the gang that a job file describes; if told to stop before its end, save and go back into the queue.

    Slurm warns with SIGUSR2 before the time limit and, where it is set up so, before a preemption; else with SIGTERM,
    which it also sends to what is cancelled. Which one it was, Slurm itself says.

    Side effects: sets the threads of this process, and takes SIGTERM and SIGUSR2 as a wish to stop.
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    workflow = Workflow(**job["workflow"])
    stop = stop_on_signals()
    os.environ |= threads(min(usable_cores(), int(os.environ.get("SLURM_CPUS_PER_TASK") or usable_cores())))
    results = ResultsFolder(Path(workflow.results_dir))
    folders = [results.cell(cell_id) for cell_id in job["cell_ids"]]
    steps = [read_status(folder).step for folder in folders]
    try:
        with Pulse(Path(path), 60 * workflow.hang_minutes) as pulse:
            from sweep.job import run_gang

            run_gang(job["cell_ids"], workflow, pulse.report, stop.is_set, pulse.at)
    except Interrupted:  # the cells are saved and say so
        advanced = [read_status(folder).step for folder in folders] != steps
        come_back(Path(path).with_suffix(".stalled"), advanced)


def come_back(stalled: Path, advanced: bool) -> None:
    """Put this Slurm job back into the queue, unless Slurm has ended it: then it is cancelled, or back there already.

    A job that took no step in several runs one after the other stays out: it would never end.
    """
    n_stalled = 0 if advanced else 1 + (int(stalled.read_text()) if stalled.exists() else 0)
    write_atomic(stalled, str(n_stalled).encode())
    if n_stalled > MAX_STALLED:
        sys.exit(f"no step in {n_stalled} runs of this job, so it does not go back; raise hydra.launcher.timeout_min")
    job_id = os.environ["SLURM_JOB_ID"]
    for _ in range(ASK_TRIES):
        try:
            if slurm("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T").split() == ["RUNNING"]:
                slurm("scontrol", "requeue", job_id)
        except SlurmSilent as silence:
            print(silence, file=sys.stderr)
            time.sleep(ASK_AGAIN_SECONDS)
        else:
            return


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGUSR2 set from now on."""
    stop = threading.Event()

    def ask(_signum: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    return stop


def environment(slot: Slot) -> dict[str, str]:
    """What must be set before torch is imported."""
    return threads(slot.n_threads) | {"CUDA_VISIBLE_DEVICES": slot.gpu or ""}


def threads(n: int) -> dict[str, str]:
    return {name: str(n) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def obey(folder: LaunchFolder, stop: threading.Event) -> None:
    """Set `stop` once the launcher asks for it or is dead; end the process if what follows takes too long."""
    while not must_stop(folder):
        time.sleep(POLL_SECONDS)
    stop.set()
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def must_stop(folder: LaunchFolder) -> bool:
    """Whether the launcher wants its jobs to stop, or is dead."""
    return folder.stop.exists() or not is_held(folder.lock)


if __name__ == "__main__":
    run(sys.argv[1])
