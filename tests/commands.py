"""The programs: as a user starts them, and called in this process, which takes a second less."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner, Result

__all__ = ["GRID", "ROOT", "SMOKE", "analysis", "analysis_process", "broken", "sweep", "sweep_process", "sweep_runner"]

ROOT = Path(__file__).parents[1]

GRID = ("model=tiny", "dict_size=64,128", "top_k=4,8", "steps=30")
"""The README's tiny sweep."""

SMOKE = ("-m", "experiment=smoke", "n_causal_rows=0")
"""Without the language model: jobs start in half the time, and activations are cached."""


def sweep_runner(
    *arguments: str, cwd: Path = ROOT, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python sweep_runner.py`, to its end."""
    command = [sys.executable, str(ROOT / "sweep_runner.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )


def sweep(*words: object) -> Result:
    """`python -m sweep`, here."""
    from sweep.__main__ import app

    return CliRunner().invoke(app, [str(word) for word in words])


def sweep_process(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m sweep` in a process of its own, to its end."""
    command = [sys.executable, "-m", "sweep", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


def analysis(*words: object) -> Result:
    """`python -m analysis`, here."""
    from analysis.__main__ import app

    return CliRunner().invoke(app, [str(word) for word in words])


def analysis_process(*words: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m analysis`, or some code with these arguments, in a process of its own, to its end."""
    start = ["-c", code] if code else ["-m", "analysis"]
    command = [sys.executable, *start, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def broken(faults: str) -> dict[str, str]:
    """An environment in which steps break, as tests/broken says."""
    path = os.pathsep.join([str(ROOT / "tests" / "broken"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "BREAK": faults}
