"""What a device is like to work with."""

from torch import Tensor

__all__ = ["reading_waits"]


def reading_waits(tensor: Tensor) -> bool:
    """Whether reading a number of it, or of what has yet to be made of it, waits for all that its device has to do.

    A GPU works through a queue. Where the host waits in each step, the queue is empty at the beginning of the next.
    """
    return tensor.is_cuda
