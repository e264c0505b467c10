"""Every file name a sweep owns, and the only ways a file comes to be: whole or not at all."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sweep.errors import ConfigError, ResultsError
from sweep.locks import locked

__all__ = [
    "OPTIONAL_TABLES",
    "CacheFolder",
    "CellFolder",
    "LaunchFolder",
    "ResultsFolder",
    "atomic_directory",
    "remove_directory",
    "remove_leftovers",
    "write_atomic",
    "write_json",
]

OPTIONAL_TABLES = ("contexts",)
"""Tables that a finished cell may lack."""

TEMPORARY = (".tmp", ".old")
"""How the names of half-written files and of folders that make room end."""

TABLES = ("runs", "curves", "latents", "sequences", *OPTIONAL_TABLES)
OURS = {*TABLES, "cells", "sweeps", "slurm", "cache"}
MARK = "Results of sparse transcoder sweeps (format 1)"
ABOUT = f"""{MARK}

runs/       one Parquet row per finished cell; a row here is the commit of the run
curves/     training curves: step, metric, value
latents/    one row per latent
sequences/  sums per held-out sequence
contexts/   what excites each latent most, where n_contexts= asked for it
cells/      one folder per cell: config, status, log, checkpoints, the transcoder
sweeps/     one JSON file per sweep: its command and its cells
slurm/      what was sent to Slurm, and what its jobs printed
cache/      models, tokens and activations; can be deleted, will be rebuilt

Read it:  python -m analysis rank <this folder>
          python -m analysis query <this folder> "select * from runs"
"""


@dataclass(frozen=True)
class CellFolder:
    """Names inside `cells/<cell_id>/`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.txt"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def attempt(self) -> Path:
        """Which start of the cell is the newest."""
        return self.root / ".attempt"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def transcoder(self) -> Path:
        return self.root / "transcoder"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint folder, oldest first; half-written ones have other names."""
        if not self.checkpoints.is_dir():
            return []
        names = (path.name for path in self.checkpoints.iterdir() if path.is_dir())
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{8,18}", name))


@dataclass(frozen=True)
class LaunchFolder:
    """Names inside `sweeps/<sweep_id>.<random>/` and `slurm/<random>/`: what launcher and jobs tell each other."""

    root: Path

    @property
    def lock(self) -> Path:
        """Held by the launcher: a job that can take it has no launcher any more."""
        return self.root / ".lock"

    @property
    def claim(self) -> Path:
        """Which cells the launcher is at, as long as it holds the lock."""
        return self.root / "claim.json"

    @property
    def stop(self) -> Path:
        """There once jobs shall save and end."""
        return self.root / "stop"

    def job(self, number: int) -> Path:
        """What job `number` is to do."""
        return self.root / f"job_{number}.json"

    def printed(self, number: int) -> Path:
        """What job `number` of the local queue printed."""
        return self.root / f"job_{number}.err"

    @property
    def submission(self) -> Path:
        """Which cells went to Slurm in which job."""
        return self.root / "submission.json"

    @property
    def over(self) -> Path:
        """There once none of a submission's jobs lives any more."""
        return self.root / "over"

    @property
    def submitit(self) -> Path:
        """Submitit's own folder: its pickles, and what jobs print."""
        return self.root / "submitit"


@dataclass(frozen=True)
class ResultsFolder:
    """Names inside `results_dir`."""

    root: Path

    @property
    def sweeps(self) -> Path:
        return self.root / "sweeps"

    @property
    def slurm(self) -> Path:
        """A launch folder for every array of jobs sent to Slurm."""
        return self.root / "slurm"

    def sweep(self, sweep_id: str) -> Path:
        return self.sweeps / f"{sweep_id}.json"

    @property
    def about(self) -> Path:
        return self.root / "README.txt"

    @property
    def lock(self) -> Path:
        """Held by a launcher while it writes what launchers write: this folder's mark, sweeps, configs of cells."""
        return self.root / ".lock"

    def table(self, table: str) -> Path:
        return self.root / table

    def row(self, table: str, cell_id: str) -> Path:
        return self.root / table / f"{cell_id}.parquet"

    def scoring(self, row_id: str) -> Path:
        """Locked by the job that scores a baseline."""
        return self.root / "runs" / f".{row_id}.lock"

    def compact(self, table: str) -> Path:
        """All files of a table as one, made by the analysis; can be deleted."""
        return self.root / "cache" / "analysis" / f"{table}.parquet"

    def cell(self, cell_id: str) -> CellFolder:
        return CellFolder(self.root / "cells" / cell_id)

    def check(self) -> None:
        """Refuse a folder that holds something else; a new or empty one will do. Writes nothing.

        Raises:
            ResultsError: it is a file, or a folder with content that is not ours.
        """
        fix = "choose an empty or a new folder with results_dir="
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise ResultsError(f"results_dir={self.root} is a file; {fix}")
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise ResultsError(f"results_dir={self.root} cannot be read; {fix}")
        names = {path.name for path in self.root.iterdir() if not path.name.startswith(".")}
        if names <= {"cache"} or ("runs" in names and names <= OURS):  # tables may be copied without the mark
            return
        try:
            with self.about.open(encoding="utf-8") as file:
                ours = file.readline().strip() == MARK
        except (OSError, UnicodeDecodeError):
            ours = False
        if not ours:
            raise ResultsError(f"results_dir={self.root} holds files that are not results of a sweep; {fix}")

    def check_links(self, cell_ids: Iterable[str]) -> None:
        """Raise a ResultsError for a link that leads out of the folder where cells are written, as a folder from
        elsewhere may hold. A `cache` may lie elsewhere: it is shared between folders."""
        root = os.path.realpath(self.root)
        ours = (self.about, self.lock, self.sweeps, self.slurm, *map(self.table, (*TABLES, "cells")))
        cells = [self.cell(cell_id) for cell_id in cell_ids]  # their other files are replaced as a whole, links and all
        theirs = ((c.root, c.log, c.lock, c.transcoder, c.checkpoints, *c.checkpoints.glob("*")) for c in cells)
        for path in (*ours, *chain.from_iterable(theirs)):
            if path.is_symlink() and not os.path.realpath(path).startswith(f"{root}/"):
                raise ResultsError(
                    f"{path} is a link out of the results folder, and nothing is written there; remove it"
                )

    def create(self) -> None:
        """Make the folder if it is not there yet; the mark comes first, so that a kill leaves nothing foreign."""
        self.check()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self.lock):
                remove_leftovers(self.root)
                if not self.about.exists():
                    write_atomic(self.about, ABOUT.encode())
            for name in (*(table for table in TABLES if table not in OPTIONAL_TABLES), "cells", "sweeps"):
                self.table(name).mkdir(exist_ok=True)
                check_writable(self.table(name))
        except OSError as error:
            raise ResultsError(f"results_dir={self.root} cannot be used ({error}); choose another folder") from error


@dataclass(frozen=True)
class CacheFolder:
    """Names inside `cache_dir`; everything here can be deleted and is rebuilt."""

    root: Path

    def model(self, name: str, revision: str) -> Path:
        return self.root / "models" / f"{name}-{revision[:12]}"

    def tokens(self, key: str) -> Path:
        return self.root / "tokens" / key

    def activations(self, key: str) -> Path:
        return self.root / "activations" / key

    def check(self) -> None:
        """Make the folder, or say why it cannot be.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            check_writable(self.root)
        except OSError as error:
            raise ConfigError(f"cache_dir={self.root} cannot be used ({error}); choose another folder") from error


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader, a crash or a full disk sees the old content or the new, never a part.

    One that is not `durable` may be lost if the machine, not the process, dies in the next seconds.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def write_json(path: Path, value: Any, *, durable: bool = True, indent: int | None = 2) -> None:
    text = json.dumps(value, indent=indent, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, text.encode(), durable=durable)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` on success and vanishes on failure; an older `path` goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        os.chmod(partial, 0o755)
        yield partial
        for file in sorted(partial.rglob("*")):
            sync(file)
        sync_directory(partial)
        replace_directory(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(path.parent)


def replace_directory(new: Path, path: Path) -> None:
    """Give a folder its name. An older one steps aside in one rename; another process may just be doing the same."""
    while True:
        try:
            os.rename(new, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        remove_directory(path)


def remove_directory(path: Path) -> None:
    """Make a folder vanish in one rename, and then from the disk; nothing happens if it is not there."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
    shutil.rmtree(aside)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed writers of `name`, or of anything in the folder, left under temporary names.

    The caller holds the lock under which `name` is written, so that whoever wrote them is dead.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.suffix in TEMPORARY and path.name.startswith(f".{name}." if name else "."):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise an OSError for a folder that takes no file, so that it says so before the work. Leaves nothing there."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
