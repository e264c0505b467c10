"""Contenders that take one step each in turn, so that whatever else the machine does hits all of them alike.

Each is a process of its own: it may live in an environment of its own, and its peak of memory is its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from typing import Any

from sweep.checkout import ROOT

__all__ = ["ROOT", "Case", "Contender", "Failed", "Measured", "contest"]


@dataclass(frozen=True)
class Case:
    """What a contender is asked to do; `groups` are cumulative ends, a single one is no nesting."""

    d: int
    dict_size: int
    top_k: int
    batch: int
    groups: tuple[int, ...]
    dead_fraction: float
    device: str
    threads: int

    def __str__(self) -> str:
        dead = f", {self.dead_fraction:.0%} dead" if self.dead_fraction else ""
        return f"d {self.d}, {'nested' if len(self.groups) > 1 else 'plain'}{dead}"


@dataclass(frozen=True)
class Contender:
    """A name, and the command of a process that speaks as `benchmarks.worker` says."""

    impl: str
    command: tuple[str, ...]
    case: Case


@dataclass(frozen=True)
class Measured:
    """A contender's seconds in each round, and what else it told."""

    contender: Contender
    seconds: list[float]
    encoder_fraction: float
    peak_mb: float
    version: str


class Failed(Exception):
    """A contender gave no answer; with the last line it wrote."""


class Process:
    """A contender that runs."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.seconds: list[float] = []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        read, write = os.pipe()
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(contender.case.threads), "ANSWERS": str(write)}
        self._process = subprocess.Popen(
            contender.command,
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=(write,),
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        os.close(write)
        self._answers = os.fdopen(read)

    def warm_up(self) -> None:
        """Make the state and take two steps, the second one watched."""
        self.version = self._ask(json.dumps(asdict(self.contender.case)))["version"]
        self._ask("step")
        self.encoder_fraction = self._ask("encoder")["encoder_fraction"]

    def step(self) -> None:
        self.seconds.append(self._ask("step")["seconds"])

    def measured(self) -> Measured:
        peak_mb = self._ask("memory")["peak_mb"]
        return Measured(self.contender, self.seconds, self.encoder_fraction, peak_mb, self.version)

    def close(self) -> None:
        """End it and wait until it has ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._answers.close()
        self._errors.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        answer = ""
        with suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)
            answer = self._answers.readline()
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            told = self._errors.read().strip().splitlines()
            raise Failed(told[-1] if told else f"it ended with exit code {code}")
        found: dict[str, Any] = json.loads(answer)
        return found


def contest(contenders: Sequence[Contender], rounds: int) -> list[Measured]:
    """What each contender took, in the order given; one that fails at the start is named and left out."""
    with ExitStack() as stack:
        running = []
        for process in [stack.enter_context(closing(Process(contender))) for contender in contenders]:
            try:
                process.warm_up()
                running.append(process)
            except Failed as failure:
                name, case = process.contender.impl, process.contender.case
                print(f"{name} ({case}) is left out: {failure}", file=sys.stderr, flush=True)
        for i in range(rounds):
            first = i % len(running)
            for process in (*running[first:], *running[:first]):
                process.step()
        return [process.measured() for process in running]
