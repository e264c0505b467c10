"""The first numbers of a process are those of every other."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gangs import make_workflow, run_cells
from make import make_cell

from sweep import devices, language_model
from sweep.config import Model
from sweep.language_model import load_language_model
from sweep.paths import CacheFolder

FORKS = """
import os, sys
import torch
from sweep import devices

def first_call(name):
    torch.set_num_threads(2)
    torch.ones(256, 256) @ torch.ones(256, 256)  # threads are there
    devices.settle()
    numbers = torch.linspace(0.01, 0.9, 1 << 15)
    function = getattr(torch, name)
    return torch.equal(function(numbers), function(numbers))

for i in range(int(sys.argv[1])):
    child = os.fork()  # torch is imported and has computed nothing
    if not child:
        os._exit(0 if first_call(devices.VECTOR_FUNCTIONS[i % len(devices.VECTOR_FUNCTIONS)]) else 1)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"fork {i} differs")
"""


AGAIN = """
import ctypes, resource, sys
from sweep import devices

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "job":
    devices.pick_device("cpu")
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    temporaries = [libc.malloc(20 << 20) for _ in range(10)]
    for place in temporaries:
        libc.memset(place, 1, 20 << 20)
    for place in reversed(temporaries):
        libc.free(place)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_a_job_gets_freed_memory_again() -> None:
    """Ten times 20 MiB: without the setting the kernel clears them each time."""

    def cleared(process: str) -> int:
        done = subprocess.run([sys.executable, "-c", AGAIN, process], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert cleared("job") < 10 << 20
    assert cleared("other") > 100 << 20


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available() or not hasattr(os, "fork"), reason="MKL and fork only")
def test_first_calls_on_two_threads_are_exact() -> None:
    """Without `settle` one process of 500 differs."""
    done = subprocess.run([sys.executable, "-c", FORKS, "3000"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_jobs_and_language_models_settle_first(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, tiny_folder: Path, cache: CacheFolder, tmp_path: Path
) -> None:
    settled: list[str] = []
    monkeypatch.setattr(devices, "settle", lambda: settled.append("job"))
    monkeypatch.setattr(language_model, "settle", lambda: settled.append("language model"))
    load_language_model(tiny, tiny_folder, "cpu")
    assert settled == ["language model"]
    run_cells([make_cell(steps=1)], make_workflow(tmp_path, cache))
    assert settled[1] == "job"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_vector_function_is_there_for_both_widths(dtype: torch.dtype) -> None:
    for name in devices.VECTOR_FUNCTIONS:
        assert getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype)).isfinite()
