"""A contender of the step benchmark, in a process of its own: it makes a state, then takes one step when it is told.

Requests are lines on standard input, answers are JSON lines in the file descriptor that ANSWERS names, where nothing
that a library prints gets in between. Torch and the standard library are all this needs, so it runs in the
environments of peers too.

    {a case}  ->  {"ready": true, "version": ...}
    step      ->  {"seconds": ...}
    encoder   ->  {"encoder_fraction": ...}     one more step, watched
    memory    ->  {"peak_mb": ...}
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contest import Case

__all__ = ["SILENT", "Make", "Step", "dead_latents", "serve"]

N_BATCHES = 4
"""Batches that steps take in turn."""

SILENT = -10.0
"""Bias of a latent that must not fire, in standard deviations of its pre-latent."""


PRODUCTS = ("aten.mm", "aten.addmm", "aten._int_mm")
"""Operations that multiply whole matrices."""

Step = Callable[[Tensor, Tensor], None]
"""One whole training step on source and target [batch, d]: forward, backward, update."""

Make = Callable[[Case], Step]


def serve(make: Make, version: str = "") -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(int(os.environ["ANSWERS"]), "w")

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    asked = json.loads(sys.stdin.readline())
    case = Case(**asked | {"groups": tuple(asked["groups"])})
    torch.set_num_threads(case.threads)
    small = replace(
        case, d=64, dict_size=512, top_k=8, batch=256, groups=tuple(512 * n // case.dict_size for n in case.groups)
    )
    with EncoderTime(small):  # libraries take their own memory and time now
        make(small)(*made_up(small)[0])
    batches = made_up(case)
    memory = Memory(case.device)
    step = make(case)
    answer(ready=True, version=version)
    for i, line in enumerate(sys.stdin):
        batch = batches[i % N_BATCHES]
        match line.strip():
            case "step":
                answer(seconds=timed(lambda batch=batch: step(*batch), case.device))
            case "encoder":
                with EncoderTime(case) as encoder:
                    seconds = timed(lambda batch=batch: step(*batch), case.device)
                answer(encoder_fraction=encoder.seconds / seconds)
            case "memory":
                answer(peak_mb=memory.peak_mb())


def made_up(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Random sources and targets with unit mean square, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(N_BATCHES, 2, case.batch, case.d, generator=generator)
    return [(source, target) for source, target in drawn.to(case.device)]


def dead_latents(case: Case) -> Tensor:
    """The indices of the latents that count as dead, scattered over the width."""
    order = torch.randperm(case.dict_size, generator=torch.Generator().manual_seed(1))
    return order[: round(case.dead_fraction * case.dict_size)].sort().values.to(case.device)


def timed(work: Callable[[], None], device: str) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class EncoderTime(TorchDispatchMode):
    """Seconds in the products that make pre-latents: the first of a step, by tokens or by latents, until there are
    tokens x dict_size of them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.seconds = 0.0
        self.n_missing = case.batch * case.dict_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func.overloadpacket) not in PRODUCTS or self.n_missing <= 0:
            return func(*args, **(kwargs or {}))
        wait(self.case.device)
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        wait(self.case.device)
        if out.shape[1] != self.case.d:  # no reconstruction
            self.seconds += time.perf_counter() - started
            self.n_missing -= out.numel()
        return out


class Memory:
    """The most memory that training took: state, gradients and temporaries, in MiB, without libraries and batches.

    On the CPU it is resident memory of the process, on CUDA what torch allocated.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            self._before = resident("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def peak_mb(self) -> float:
        peak = resident("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        return max(peak - self._before, 0) / 2**20


def resident(key: str) -> int:
    """Bytes of resident memory as Linux tells them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))
