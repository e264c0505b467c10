"""What Slurm says of jobs, from squeue alone: many clusters keep no accounts, and sacct is nothing without them.

Jobs are found by name. A name is chosen before sbatch is called, so a launcher that dies in between loses no job, and
a cluster that begins to count its jobs at 1 again gives no answer about a stranger's.
"""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from sweep.errors import SweepError

__all__ = ["Seen", "SlurmSilent", "ask", "scancel", "slurm"]

ENDED = frozenset(["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"])
"""States from which a job does not come back. NODE_FAIL and PREEMPTED are not among them: it is often requeued."""

TIMEOUT_SECONDS = 60.0
FORMAT = "%i|%j|%T|%N|%r"
IDS_AT_ONCE = 500


class SlurmSilent(SweepError):
    """Slurm cannot be asked from here, or does not answer. That says nothing about the jobs."""


@dataclass(frozen=True)
class Seen:
    """A job, or an element of an array, as squeue shows it."""

    id: str
    name: str
    state: str
    nodes: str = ""
    reason: str = ""

    @property
    def index(self) -> int:
        """The place in its array; 0 for a job that is none."""
        return int(self.id.partition("_")[2] or 0)

    @property
    def live(self) -> bool:
        """Whether it runs, waits, or may come back."""
        return self.state not in ENDED

    @property
    def words(self) -> str:
        """Such as `pending (Priority)` or `running on node1`."""
        if self.nodes:
            return f"{self.state.lower()} on {self.nodes}"
        return self.state.lower() + (f" ({self.reason})" if self.reason not in ("", "None") else "")


def ask(names: Sequence[str]) -> list[Seen]:
    """The jobs of these names that Slurm still knows; it forgets ended ones after some minutes.

    Raises:
        SlurmSilent: squeue is not here, or the controller does not answer.
    """
    if not names:
        return []
    flags = ["--all", "--array", "--noheader", "--states=all", f"--name={','.join(names)}", f"--format={FORMAT}"]
    return [Seen(*line.split("|", 4)) for line in slurm("squeue", *flags).splitlines() if line.count("|") >= 4]


def scancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended meanwhile do not matter.

    Raises:
        SlurmSilent: scancel is not here, or the controller does not answer.
    """
    for begin in range(0, len(ids), IDS_AT_ONCE):
        slurm("scancel", "--quiet", *ids[begin : begin + IDS_AT_ONCE])


def slurm(*command: str) -> str:
    """What a Slurm command prints.

    Raises:
        SlurmSilent: it is not here, or it failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError as error:
        raise SlurmSilent(f"{command[0]} is not on PATH; use a node of the cluster from which jobs go out") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise SlurmSilent(f"{command[0]}: {error}") from error
    if done.returncode:
        raise SlurmSilent(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
