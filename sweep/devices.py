"""What a device is like to work with."""

import contextlib
import ctypes
from functools import cache

import torch
from torch import Tensor

from sweep.errors import SweepError

__all__ = ["pick_device", "reading_waits", "settle"]

VECTOR_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "exp", "expm1", "lgamma", "log", "log10", "log1p", "log2"),
    *("rsqrt", "sigmoid", "sin", "sqrt", "tan", "tanh"),
)
"""Of one tensor, which torch may leave to MKL."""


KEPT_BYTES = 256 << 20
"""Of freed memory, more than a step's temporaries take."""

MALLOPT = {-1: KEPT_BYTES, -3: 32 << 20}
"""glibc's M_TRIM_THRESHOLD, and M_MMAP_THRESHOLD, at its largest, which would follow from what is freed otherwise."""


def pick_device(device: str) -> str:
    """The device that an option names, ready to compute.

    Raises:
        SweepError: torch does not see it.
    """
    settle()
    keep_freed_memory()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SweepError(f"device={device}: torch sees no CUDA device; choose device=cpu or device=auto")
    return device


def reading_waits(tensor: Tensor) -> bool:
    """Whether reading a number of it, or of what has yet to be made of it, waits for all that its device has to do.

    A GPU works through a queue. Where the host waits in each step, the queue is empty at the beginning of the next.
    """
    return tensor.is_cuda


@cache
def settle() -> None:
    """Before anything is computed on the CPU: call each vector function once, on one thread.

    MKL chooses the kernel of a function when it is first called. Where two threads do so at once, one of them may get
    one of low accuracy for this call: in one process of 500 the first cosines were off by 1e-4, as those of a language
    model's rotary embedding, and everything after them (https://github.com/pytorch/pytorch/issues/188792).
    """
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in VECTOR_FUNCTIONS:
            getattr(torch, name)(number)


def keep_freed_memory() -> None:
    """Let glibc keep memory that a step frees for the next one, which needs as much; nothing in other C libraries.

    It would give it back to the kernel, which clears each page before it comes again: 4% to 9% of a step's time where
    latents are dead.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)
