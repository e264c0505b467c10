"""What a cache folder holds, and how parts of it go: what `python -m sweep cache` does.

A job says that it uses an entry by a shared lock on `<entry>.used` beside it, whose time is that of the last use.
Whoever deletes takes that lock exclusively. Only files with names that this program gives are ever deleted.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from sweep.cached import site_folders
from sweep.locks import try_lock
from sweep.paths import CacheFolder
from sweep.revisions import read_object

__all__ = ["KINDS", "Entry", "clear", "entries", "in_use", "is_used"]

Kind = Literal["models", "tokens", "activations"]
KINDS: tuple[Kind, ...] = get_args(Kind)

OURS: dict[Kind, str] = {
    "models": r"(.*\.(json|safetensors|model|jinja)|merges\.txt|vocab\.txt)",
    "tokens": r"((train|calibration|heldout)\.npy|manifest\.json)",
    "activations": r"(about\.json|(train|calibration|heldout)_\d{6}\.safetensors)",
}
"""Names of the files of an entry; anything else in its folder was put there by somebody else and stays."""

MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A model, a token file, or the activations of one stream at one site."""

    kind: Kind
    path: Path
    what: str
    n_bytes: int
    last_used: float
    """Seconds since 1970."""

    @property
    def used(self) -> Path:
        """The lock of those that use it: all sites of a stream have one."""
        return used_mark(self.path.parent if self.kind == "activations" else self.path)


def used_mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.used")


@contextlib.contextmanager
def in_use(*folders: Path) -> Iterator[None]:
    """Keep folders of a cache from being cleared until the context ends; waits for a clearing that is under way.

    Where the cache cannot be written to, nobody can clear it, and nothing is locked.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            with contextlib.suppress(OSError):
                stack.enter_context(shared_lock(used_mark(folder)))
        yield


def shared_lock(path: Path) -> IO[bytes]:
    """A shared lock on a file that is still there once it is taken: whoever clears removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                os.utime(path)
                return file
        file.close()


def entries(cache: CacheFolder) -> list[Entry]:
    """Everything in a cache that this program made, by kind and path; anything else is passed over."""
    found = []
    for path in folders_in(cache.root / "models"):
        # made under a lock, whose file stays; a folder that somebody put there has none
        if path.with_name(f"{path.name}.lock").is_file() and (path / "config.json").is_file():
            found.append(entry("models", path, path.name.rpartition("-")[0]))
    for path in folders_in(cache.root / "tokens"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = read_object(path / "manifest.json", MAX_MANIFEST_BYTES)["identity"]
            n_tokens = sum(about["n_rows"].values()) * (about["seq_len"] - 1)
            found.append(entry("tokens", path, f"{about['dataset']} for {about['model']}, {n_tokens:,} tokens"))
    for site in site_folders(cache):
        if not any(path.is_symlink() for path in (site.path, site.path.parent)) and "summary" in site.about:
            found.append(entry("activations", site.path, str(site.about["summary"])))
    return found


def folders_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != ".")


def entry(kind: Kind, path: Path, what: str) -> Entry:
    stats = [file.stat() for file in files_of(kind, path)]
    last_used = max((stat.st_mtime for stat in stats), default=0.0)
    made = Entry(kind, path, what, sum(stat.st_size for stat in stats), last_used)
    with contextlib.suppress(FileNotFoundError):
        last_used = max(last_used, made.used.stat().st_mtime)
    return Entry(kind, path, what, made.n_bytes, last_used)


def files_of(kind: Kind, folder: Path) -> list[Path]:
    """The files in an entry's folder that are ours."""
    files = (path for path in folder.iterdir() if path.is_file() or path.is_symlink())
    return [path for path in files if re.fullmatch(OURS[kind], path.name) and not path.is_symlink()]


def is_used(each: Entry) -> bool:
    """Whether a job on a machine whose locks are seen here uses it."""
    if not each.used.exists():
        return False
    lock = try_lock(each.used)
    if lock is None:
        return True
    lock.close()
    return False


def clear(chosen: Collection[Entry]) -> tuple[int, list[Entry]]:
    """Delete entries, but for those in use; returns the bytes freed and the entries left.

    Raises:
        OSError: a file cannot be deleted.
    """
    freed, left = 0, []
    for each in chosen:
        lock = try_lock(each.used)
        if lock is None:
            left.append(each)
            continue
        with lock:
            for path in files_of(each.kind, each.path):
                freed += path.stat().st_size
                path.unlink()
            with contextlib.suppress(OSError):  # something of somebody else's is in it
                each.path.rmdir()
                if each.kind == "activations":
                    for stale in each.path.parent.glob("*_[0-9][0-9][0-9][0-9][0-9][0-9].lock"):
                        stale.unlink()
                    each.path.parent.rmdir()
            each.used.unlink()
    return freed, left


def unused_for(each: Entry, days: float) -> bool:
    """Whether it was last used longer ago than this."""
    return time.time() - each.last_used > days * 86_400
