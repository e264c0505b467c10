"""What an error counts as."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from sweep.errors import Diverged, ModelError
from sweep.failures import Failure, kind


def real_lack_of_memory() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Diverged("nan"), "diverged"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (OSError(errno.EIO, "Input/output error"), "failed"),
        (ModelError("out of memory is a book"), "failed"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "failed"),
    ],
)
def test_kind_of_an_error(error: Exception, expected: Failure) -> None:
    assert kind(error) == expected


def test_kind_of_what_torch_says_on_the_cpu() -> None:
    assert kind(real_lack_of_memory()) == "out_of_memory"


def test_kind_looks_at_the_cause() -> None:
    error = ModelError("cannot be loaded")
    error.__cause__ = real_lack_of_memory()
    assert kind(error) == "out_of_memory"
