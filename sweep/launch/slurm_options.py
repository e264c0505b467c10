"""Options of hydra/launcher=slurm, and what they ask of Slurm."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sweep.checkout import ROOT
from sweep.errors import ConfigError
from sweep.launch.machine import Slot

__all__ = ["SlurmOptions"]


IGNORE_EARLY_SIGNALS = 'bash -c \'trap "" USR2 TERM; exec "$@"\' sweep'
"""Until our handlers stand, a signal would end the job for good. An ignored one costs nothing: Slurm kills a cancelled
job, and requeues a preempted one, a little later anyway."""

RESERVED = ("array", "output", "error", "job-name", "requeue", "signal", "open-mode", "ntasks", "nodes")
"""What the launcher itself says to sbatch."""

GROWTH = 4
"""How many times its memory a job may be given where `max_mem_gb` does not say."""


@dataclass
class SlurmOptions:
    """One job per gang of cells; `jobs` asks for more. Hydra checks the types.

    `memory_gib` is what one job may plan with on its GPU, null for no limit; `mem_gb` is asked of Slurm, and again
    twice as much, up to `max_mem_gb`, for cells that ran out of it.
    """

    _target_: str = "hydra_plugins.sweep_launcher.SweepLauncher"
    backend: str = "slurm"
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    gpus_per_node: int | None = None
    gres: str | None = None
    cpus_per_task: int = 4
    mem_gb: float | None = None
    max_mem_gb: float | None = None
    timeout_min: int = 240
    signal_delay_s: int = 120
    jobs: int | None = None
    memory_gib: float | None = None
    array_parallelism: int | None = None
    max_array_size: int | None = None
    setup: list[str] = field(default_factory=list)
    python: str | None = None
    additional_parameters: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises:
        ConfigError: with every option that is out of range.
        """
        if problems := tuple(self.problems()):
            raise ConfigError(*problems)

    def problems(self) -> Iterator[str]:
        names = ("cpus_per_task", "timeout_min", "jobs", "array_parallelism", "max_array_size")
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                yield f"hydra.launcher.{name}={value} must be at least 1"
        for name in ("mem_gb", "max_mem_gb", "memory_gib"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                yield f"hydra.launcher.{name}={value} must be a positive number, or null"
        if self.max_mem_gb is not None and (self.mem_gb is None or self.max_mem_gb < self.mem_gb):
            yield f"hydra.launcher.max_mem_gb={self.max_mem_gb} needs a mem_gb= that is no larger"
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            yield f"hydra.launcher.gpus_per_node={self.gpus_per_node} must be at least 0"
        if self.gres is not None and self.gpus_per_node:
            yield f"hydra.launcher.gres={self.gres} and gpus_per_node={self.gpus_per_node} both ask for GPUs; give one"
        if not 0 < self.signal_delay_s < 60 * self.timeout_min:
            yield (
                f"hydra.launcher.signal_delay_s={self.signal_delay_s} must be at least 1 and less than "
                f"timeout_min={self.timeout_min} minutes"
            )
        for name in self.additional_parameters:
            if name.replace("_", "-") in RESERVED:
                yield f"hydra.launcher.additional_parameters.{name} is set by the launcher; leave it out"

    def slots(self) -> list[Slot]:
        """Room for as many jobs as asked for; gangs are divided until each has one."""
        n_bytes = None if self.memory_gib is None else self.memory_gib * 2**30
        if n_bytes is None and self.mem_gb is not None and not (self.gpus_per_node or self.gres):
            n_bytes = self.mem_gb * 2**30
        return [Slot(None, self.cpus_per_task, n_bytes)] * (self.jobs or 1)

    @property
    def command(self) -> str:
        """How a job starts Python."""
        return f"{IGNORE_EARLY_SIGNALS} {self.python or sys.executable}"

    @property
    def most_memory(self) -> float | None:
        """Up to which the memory of a job may grow, in GB; null where the cluster chooses it."""
        return self.max_mem_gb or (None if self.mem_gb is None else GROWTH * self.mem_gb)

    def sbatch(self, name: str, mem_gb: float | None = None) -> dict[str, Any]:
        """What submitit passes on to sbatch, by its names for that; `mem_gb` in place of the usual memory."""
        mem_gb = mem_gb or self.mem_gb
        optional = {
            "partition": self.partition,
            "qos": self.qos,
            "account": self.account,
            "constraint": self.constraint,
            "gres": self.gres,
            "gpus_per_node": self.gpus_per_node or None,
            "mem": None if mem_gb is None else f"{math.ceil(mem_gb * 1024)}M",
            "array_parallelism": self.array_parallelism,
        }
        return {key: value for key, value in optional.items() if value is not None} | {
            "job_name": name,
            "nodes": 1,
            "ntasks_per_node": 1,
            "time": self.timeout_min,
            "cpus_per_task": self.cpus_per_task,
            "signal_delay_s": self.signal_delay_s,
            "setup": [f'export PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"', *self.setup],
            "srun_args": [f"--cpus-per-task={self.cpus_per_task}"],  # since Slurm 22.05 srun does not inherit it
            "additional_parameters": {"requeue": True, **self.additional_parameters},
        }
