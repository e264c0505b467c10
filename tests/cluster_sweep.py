"""A sweep command on the throw-away cluster, where it stands, and the processes of its jobs."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from cluster import Cluster
from commands import ROOT
from gangs import same_bytes

from sweep.config import cell_from_json
from sweep.paths import CacheFolder, CellFolder, ResultsFolder
from sweep.status import Status, read_status

__all__ = ["ClusterSweep", "job_processes", "was_sent"]

SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=20")
LIMIT_SECONDS = 200


class ClusterSweep:
    """A sweep command for the cluster, with a results folder of its own."""

    def __init__(self, cluster: Cluster, root: Path, cache: CacheFolder, *arguments: str) -> None:
        self.cluster = cluster
        self.root = root
        self.environment = os.environ | cluster.environment
        script = str(ROOT / "sweep_runner.py")
        self.command = [sys.executable, script, *arguments, *SLURM, f"cache_dir={cache.root}", f"results_dir={root}"]

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        return self._to_the_end([*self.command, *more])

    def start(self, *more: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen([*self.command, *more], env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def ask(self, command: str) -> subprocess.CompletedProcess[str]:
        return self._to_the_end([sys.executable, "-m", "sweep", command, str(self.root)])

    def submit(self) -> None:
        done = self.run("wait=false")
        assert done.returncode == 0, done.stderr

    def finish(self) -> str:
        """Give the command, as a user would, until it ends; every cell must be done."""
        done = self.run()
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def folders(self) -> list[CellFolder]:
        return [CellFolder(path) for path in sorted(self.root.glob("cells/*"))]

    @property
    def statuses(self) -> list[Status]:
        return [read_status(folder) for folder in self.folders]

    def is_training(self) -> bool:
        return any(folder.checkpoint_steps() for folder in self.folders)

    def wait_for_training(self) -> None:
        self.cluster.wait_until(self.is_training, "a checkpoint")

    def _to_the_end(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        limit = LIMIT_SECONDS
        try:
            return subprocess.run(
                words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired as error:
            found = [f"{words} takes more than {limit} s", str(error.stdout), str(error.stderr)]
            found += [f"{folder.root.name}: {read_status(folder)}" for folder in self.folders]
            raise AssertionError("\n".join([*found, self.cluster.describe()])) from None

    def same_as(self, unbroken: ResultsFolder) -> None:
        for folder in self.folders:
            same_bytes(unbroken, ResultsFolder(self.root), cell_from_json(folder.config.read_text()))


def job_processes(cluster: Cluster, node: str = "") -> list[psutil.Process]:
    """The Python processes of jobs, without the srun that starts each."""

    def is_job(process: psutil.Process) -> bool:
        try:
            return "submitit.core._submit" in process.cmdline() and "srun" not in process.name()
        except psutil.NoSuchProcess:  # it ended after it was listed
            return False

    return [process for process in cluster.processes(node) if is_job(process)]


def was_sent(process: psutil.Process, number: int) -> bool:
    """Whether a signal waits for a process that is held up; or it has left, if Slurm woke it for that."""
    try:
        told = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    fields = dict(line.split(":", 1) for line in told.splitlines())
    return any(int(fields[name], 16) >> (number - 1) & 1 for name in ("SigPnd", "ShdPnd"))
