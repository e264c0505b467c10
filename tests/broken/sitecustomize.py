"""Breaks training steps on purpose, in every Python process that finds this folder on its path.

BREAK=crash@0.001@7,nan@0.002@3 breaks step 7 of cells with lr=0.001, and so on. A fault with @<file> at its end happens
once: the file tells that it has. CLOCK=-1 sets the clock back by a day, CLOCK=1 forward.
"""

import ctypes
import errno
import importlib.machinery
import os
import signal
import sys
import time
from types import ModuleType


def crash() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


def hang() -> None:
    time.sleep(1e6)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def memory() -> None:
    sys.modules["torch"].empty(1 << 55)


def disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def error() -> None:
    raise ValueError("broken on purpose")


def token() -> None:
    raise ValueError(f"refused: {os.environ['HF_TOKEN']}")


FAULTS = {
    "crash": crash,
    "exit": leave,
    "hang": hang,
    "kill": kill,
    "memory": memory,
    "disk": disk,
    "error": error,
    "token": token,
}


def due(once: list) -> bool:
    try:
        return not once or bool(os.close(os.open(once[0], os.O_CREAT | os.O_EXCL)) or True)
    except FileExistsError:
        return False


class Breaker(importlib.machinery.PathFinder):
    """Loads `sweep.train` as it is and puts the faults in front of its step."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "sweep.train":
            return None
        spec = super().find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            module.train_step_ = broken(module.train_step_)

        spec.loader.exec_module = exec_module
        return spec


def broken(step):
    def train_step_(state, source, target, capacity, schedule, revival):
        for fault in os.environ["BREAK"].split(","):
            name, lr, at, *once = fault.split("@")
            if float(lr) == schedule.lr and int(at) == state.step and due(once):
                if name == "nan":
                    source = source * float("nan")  # a copy: the others of the gang read the same batch
                else:
                    FAULTS[name]()
        return step(state, source, target, capacity, schedule, revival)

    return train_step_


if os.environ.get("BREAK"):
    sys.meta_path.insert(0, Breaker)

if days := float(os.environ.get("CLOCK", "0")):
    right = time.time
    time.time = lambda: right() + 86_400 * days
