"""Fencing: each start of a cell takes a new token, and only the newest start may write.

A kernel lock keeps two processes of one host apart, and those of several hosts where the file system carries it. Slurm
can run the same job twice at once: a node it has lost goes on computing while the job starts again elsewhere. Then the
later start writes its token, and the earlier one finds out before its next write and leaves.
"""

import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sweep.errors import Superseded
from sweep.paths import CellFolder, write_json
from sweep.revisions import read_object

__all__ = ["Attempt", "slurm_job", "whereabouts"]

MAX_BYTES = 1 << 12


@dataclass(frozen=True)
class Attempt:
    """One start of a cell."""

    folder: CellFolder
    token: str

    @classmethod
    def begin(cls, folder: CellFolder, job: str) -> "Attempt":
        """Take over: whoever began before may no longer write."""
        attempt = cls(folder, uuid.uuid4().hex)
        write_json(folder.attempt, {"token": attempt.token, "job": job})
        return attempt

    def check(self) -> None:
        """Do nothing, as long as this is the newest start.

        Raises:
            Superseded: the cell has been started again since.
        """
        if (found := newest(self.folder)).get("token", self.token) != self.token:
            raise Superseded(f"cell {self.folder.root.name} has been started again by {found.get('job') or 'another'}")


def newest(folder: CellFolder) -> dict[str, Any]:
    """Token and job of the newest start; empty when there was none or its file is damaged."""
    try:
        return read_object(folder.attempt, MAX_BYTES)
    except (OSError, ValueError):
        return {}


def began_in(folder: CellFolder, job: str) -> bool:
    """Whether the newest start was by this very Slurm job, so that whoever is still at it is its own ghost."""
    return bool(job) and newest(folder).get("job") == job


def slurm_job(environment: Mapping[str, str]) -> str:
    """The id of the Slurm job this process belongs to, such as `12_3`; empty outside of one."""
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return environment.get("SLURM_JOB_ID", "")


def whereabouts(environment: Mapping[str, str]) -> str:
    """The name of this machine, as Slurm calls it where it does."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()
