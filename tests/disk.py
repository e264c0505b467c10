"""A disk whose n-th operation goes wrong, for what this very process does below one folder.

Operations are: open for writing, write, fsync, rename, mkdir, unlink, rmdir. What can go wrong:

    EIO, ENOSPC   this one operation fails; of a write half has reached the disk
    full          no file is opened or made, and nothing is written, from then on
    death         the process ends: nothing that runs afterwards, clean-up included, reaches the disk
"""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

__all__ = ["FAULTS", "Death", "Disk", "Fault", "faulty"]

Fault = Literal["EIO", "ENOSPC", "full", "death"]
FAULTS: tuple[Fault, ...] = ("EIO", "ENOSPC", "full", "death")
NEEDS_ROOM = ("open", "write", "mkdir")


class Death(BaseException):
    """The process has died here. Like a real death it passes every `except Exception`."""


@dataclass
class Disk:
    """What was done so far, and where it goes wrong: at operation number `at`, from 0; None nowhere."""

    root: Path
    at: int | None
    fault: Fault
    done: list[str] = field(default_factory=list)

    @property
    def hit(self) -> bool:
        return self.at is not None and len(self.done) > self.at

    def operate(self, kind: str, path: Path) -> None:
        """Count one operation, and let it go wrong if it is the one.

        Raises:
            OSError, Death: it is, or one before it has left the disk full or the process dead.
        """
        if not path.is_relative_to(self.root):
            return
        if self.hit and self.fault == "death":
            raise Death
        self.done.append(f"{kind} {path.relative_to(self.root)}")
        if not self.hit:
            return
        first = len(self.done) - 1 == self.at
        if first and self.fault == "death":
            raise Death
        if (first and self.fault != "full") or (self.fault == "full" and kind in NEEDS_ROOM):
            number = errno.EIO if self.fault == "EIO" else errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path))


class Written:
    """A file opened for writing, each of whose writes is an operation."""

    def __init__(self, file: Any, path: Path, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, content: bytes) -> int:
        dead = self._disk.hit
        try:
            self._disk.operate("write", self._path)
        except BaseException:
            if not dead:
                self._file.write(memoryview(content)[: len(content) // 2])
            raise
        return self._file.write(content)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def path_of(name: Any, dir_fd: int | None = None) -> Path:
    """The path of a name, or of an open file."""
    if isinstance(name, int):
        return Path(f"/proc/self/fd/{name}").readlink()
    folder = Path.cwd() if dir_fd is None else path_of(dir_fd)
    return folder / os.fspath(name)


@contextmanager
def faulty(root: Path, at: int | None, fault: Fault = "EIO") -> Iterator[Disk]:
    """Let operation number `at` below `root` go wrong while the context lasts."""
    from sweep import checkpoint

    disk = Disk(root, at, fault)
    open_file, open_descriptor, save_file = io.open, os.open, checkpoint.save_file

    def opened(name: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return open_file(name, mode, *arguments, **options)
        path = path_of(name)
        if not isinstance(name, int):  # else counted when its descriptor was made
            disk.operate("open", path)
        file = open_file(name, mode, *arguments, **options)
        return Written(file, path, disk) if "b" in mode and disk.root in path.parents else file

    def descriptor(name: Any, flags: int, *arguments: Any, dir_fd: int | None = None, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            disk.operate("open", path_of(name, dir_fd))
        return open_descriptor(name, flags, *arguments, dir_fd=dir_fd, **options)

    def saved(tensors: Any, path: Path) -> None:
        """safetensors writes by itself: one operation here, which may leave half of a file."""
        dead = disk.hit
        try:
            disk.operate("write", path)
        except BaseException:
            if not dead:
                save_file(tensors, path)
                os.truncate(path, path.stat().st_size // 2)
            raise
        save_file(tensors, path)

    def counted(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(name: Any, *arguments: Any, **options: Any) -> Any:
            there = arguments[0] if kind == "rename" else name
            disk.operate(kind, path_of(there, options.get("dir_fd")))
            return real(name, *arguments, **options)

        return call

    with ExitStack() as stack:
        for owner, name, replacement in (
            (io, "open", opened),
            (builtins, "open", opened),
            (os, "open", descriptor),
            (checkpoint, "save_file", saved),
            (os, "fsync", counted("fsync", os.fsync)),
            (os, "replace", counted("rename", os.replace)),
            (os, "rename", counted("rename", os.rename)),
            (os, "mkdir", counted("mkdir", os.mkdir)),
            (os, "unlink", counted("unlink", os.unlink)),
            (os, "remove", counted("unlink", os.remove)),
            (os, "rmdir", counted("rmdir", os.rmdir)),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        yield disk
