"""What this machine offers a sweep: slots, each with a GPU of its own or a share of the cores.

CUDA_VISIBLE_DEVICES of the parent is respected, with numbers, UUIDs or MIG instances in it, and each job gets one entry
of it. Nothing here imports torch: GPUs are those that nvidia-smi lists.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from sweep.errors import ConfigError

__all__ = ["Gpu", "LocalOptions", "Slot", "find_slots", "visible_gpus"]

USABLE = 0.9
"""Share of free memory that jobs may plan with."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The memory limit of a container, which the machine's own figures do not show."""

LISTED_GPU = re.compile(r"^GPU (\d+): .*\(UUID: (GPU-[^)]+)\)\n?((?:^\s+MIG .*\n?)*)", re.MULTILINE)
"""A GPU as `nvidia-smi -L` lists it: number, UUID, and the indented lines of its MIG instances."""


@dataclass
class LocalOptions:
    """Options of hydra/launcher=local and =inline, as hydra.launcher.<name>=<value>; Hydra checks their types.

    `slots` is how many jobs run at once: null for one per visible GPU, else one with all cores. `memory_gib` is what
    one job may plan with: null for its share of what is free.
    """

    _target_: str = "hydra_plugins.sweep_launcher.SweepLauncher"
    backend: str = "local"
    slots: int | None = None
    memory_gib: float | None = None

    def problems(self) -> Iterator[str]:
        if self.slots is not None and self.slots < 1:
            yield f"hydra.launcher.slots={self.slots} must be at least 1, or null"
        if self.memory_gib is not None and not 0 < self.memory_gib < float("inf"):
            yield f"hydra.launcher.memory_gib={self.memory_gib} must be a positive number, or null"


@dataclass(frozen=True)
class Gpu:
    """One entry for CUDA_VISIBLE_DEVICES, and its memory where nvidia-smi tells it."""

    token: str
    memory_bytes: float | None

    def planned_bytes(self, n_jobs: int) -> float | None:
        """What each of `n_jobs` on it may plan with."""
        return None if self.memory_bytes is None else USABLE * self.memory_bytes / n_jobs


@dataclass(frozen=True)
class Slot:
    """Room for one job at a time. Without a GPU it runs on the CPU. `memory_bytes` is None where it is unknown."""

    gpu: str | None
    n_threads: int
    memory_bytes: float | None


def find_slots(device: str, options: LocalOptions) -> list[Slot]:
    """One slot per visible GPU, else one with all cores; `options.slots` shares what is there among that many.

    Raises:
        ConfigError: an option is out of range, or `device` asks for a GPU that is not visible.
    """
    if problems := tuple(options.problems()):
        raise ConfigError(*problems)
    gpus = [] if device == "cpu" else visible_gpus()
    if device.startswith("cuda"):
        gpus = asked_for(device, gpus)
    count = options.slots or len(gpus) or 1
    n_threads = max(usable_cores() // count, 1)
    asked = None if options.memory_gib is None else options.memory_gib * 2**30
    if not gpus:
        return [Slot(None, n_threads, asked or free_memory() / count)] * count
    n_sharing = -(-count // len(gpus))
    chosen = [gpus[index % len(gpus)] for index in range(count)]
    return [Slot(gpu.token, n_threads, asked or gpu.planned_bytes(n_sharing)) for gpu in chosen]


def asked_for(device: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that device=cuda or device=cuda:<n> means."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "nvidia-smi lists none" if mask is None else f"CUDA_VISIBLE_DEVICES={mask}"
    _, _, index = device.partition(":")
    if not gpus or (index and int(index) >= len(gpus)):
        raise ConfigError(f"device={device}: {len(gpus)} GPUs are visible ({seen}); choose device=cpu or device=auto")
    return [gpus[int(index)]] if index else list(gpus)


def usable_cores() -> int:
    """Cores this process may use, or OMP_NUM_THREADS where that is fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def free_memory() -> float:
    """Bytes that new processes may plan with, in this container or on this machine."""
    available = float(psutil.virtual_memory().available)
    try:
        limit = CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        limit = ""
    return USABLE * (min(available, float(limit)) if limit.isdigit() else available)


def visible_gpus() -> list[Gpu]:
    """The GPUs a CUDA program started here would see, in its order."""
    installed = installed_gpus()
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None or not installed:
        return [gpu for _, gpu in installed]
    physical = list(dict.fromkeys(number for number, _ in installed))
    seen: list[Gpu] = []
    for token in filter(None, (part.strip() for part in mask.split(","))):
        if token.isdigit() and int(token) in physical:
            seen.append(Gpu(token, next(gpu.memory_bytes for number, gpu in installed if number == int(token))))
        elif found := [gpu for _, gpu in installed if gpu.token.startswith(token)]:
            seen.append(Gpu(token, found[0].memory_bytes))
        elif token.startswith("MIG-"):
            seen.append(Gpu(token, None))
        else:
            break  # CUDA ignores an entry it does not know, and all that follow
    return seen


def installed_gpus() -> list[tuple[int, Gpu]]:
    """Number and UUID of each GPU; of one cut into MIG instances, the instances, which is what a program can use."""
    sizes = nvidia_smi("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
    memory = {uuid: float(mib) * 2**20 for uuid, mib in re.findall(r"^(GPU-\S+), (\d+)", sizes, re.MULTILINE)}
    gpus: list[tuple[int, Gpu]] = []
    for number, uuid, instances in LISTED_GPU.findall(nvidia_smi("-L")):
        parts = [(int(number), Gpu(part, None)) for part in re.findall(r"\(UUID: (MIG-[^)]+)\)", instances)]
        gpus += parts or [(int(number), Gpu(uuid, memory.get(uuid)))]
    return gpus


def nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; nothing where there is none."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
