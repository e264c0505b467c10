"""What a dead process leaves behind to tell what it was at, and the end of one that hangs. Real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from sweep.pulse import at_work_on, stacks_of

JOB = """
import ctypes, os, signal, sys, time
from pathlib import Path
from sweep.pulse import Pulse

def loop():
    while True:
        pass

with Pulse(Path(sys.argv[1]), {seconds}) as pulse:
    pulse.at("0123456789")
    {then}
"""


def left_by(job: Path, then: str, seconds: float = 0) -> int:
    """The exit code of a process with a pulse."""
    done = subprocess.run([sys.executable, "-c", JOB.format(then=then, seconds=seconds), str(job)], check=False)
    return done.returncode


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", "ctypes.string_at(0)", "os._exit(3)"])
def test_the_cell_outlives_every_death(death: str, tmp_path: Path) -> None:
    assert left_by(tmp_path / "job_1.json", death) != 0
    assert at_work_on(tmp_path / "job_1.json") == "0123456789"
    assert stacks_of(tmp_path / "job_1.json") == ""


@pytest.mark.parametrize("hang", ["time.sleep(600)", "loop()", "ctypes.PyDLL(None).sleep(600)"])
def test_a_hang_ends_with_its_stacks(hang: str, tmp_path: Path) -> None:
    """The last one holds the interpreter's lock, so that no thread of Python could run."""
    assert left_by(tmp_path / "job_1.json", hang, seconds=0.5) == 1
    assert 'File "<string>"' in stacks_of(tmp_path / "job_1.json")


@pytest.mark.parametrize("sign", ["pulse.at('')", "pulse.report('train', 1, 2, 'steps')"])
def test_signs_of_life_put_the_end_off(sign: str, tmp_path: Path) -> None:
    alive = f"[({sign}, time.sleep(0.2)) for _ in range(20)]"
    assert left_by(tmp_path / "job_1.json", alive, seconds=2) == 0
    assert stacks_of(tmp_path / "job_1.json") == ""


def test_nothing_is_known_of_a_job_that_never_started(tmp_path: Path) -> None:
    assert at_work_on(tmp_path / "job_1.json") == stacks_of(tmp_path / "job_1.json") == ""
