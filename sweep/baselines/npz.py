"""Arrays of an .npz file from elsewhere: every claim it makes is checked before a byte is allocated.

A zip entry that is not stored as it is could unpack to any size, and an array's header may claim any shape. So
entries must be stored uncompressed, lie inside the file, and have exactly the bytes their header speaks of.
Nothing is unpickled.
"""

import math
import struct
import tokenize
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sweep.errors import BaselineError, first_line

__all__ = ["npz_shapes", "read_npz", "why_not_whole"]

MAX_HEADER_BYTES = 10_000
MAX_ENTRIES = 100

UNREADABLE = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError, KeyError, MemoryError,
    struct.error, tokenize.TokenError,
)  # fmt: skip
"""What zipfile and numpy raise on bytes that are not what they should be."""


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    n_bytes: int
    fortran_order: bool


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the float32 arrays in a file, after checking each against the size of the file.

    Raises:
        BaselineError: it is not an .npz file, not whole, or claims what it cannot hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _checked_header(archive, entry, path).shape for name, entry in _entries(archive, path)}
    except UNREADABLE as error:
        raise BaselineError(why_not_whole(path, error)) from error


def read_npz(path: Path) -> dict[str, NDArray[np.float32]]:
    """The arrays, checked as by `npz_shapes`; the zip's own checksums are compared on the way.

    Raises:
        BaselineError: as `npz_shapes`, or bytes that do not have their checksum.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name, entry in _entries(archive, path):
                header = _checked_header(archive, entry, path)
                with archive.open(entry) as file:
                    file.read(entry.file_size - header.n_bytes)
                    array = np.empty(header.shape[:: -1 if header.fortran_order else 1], np.dtype("<f4"))
                    if _read_into(file.read, array.reshape(-1).view(np.uint8)) != header.n_bytes or file.read(1):
                        raise EOFError(f"{name} is shorter than its header says")
                    arrays[name] = np.ascontiguousarray(array.T) if header.fortran_order else array
    except UNREADABLE as error:
        raise BaselineError(why_not_whole(path, error)) from error
    return arrays


def _entries(archive: zipfile.ZipFile, path: Path) -> list[tuple[str, zipfile.ZipInfo]]:
    """The entries, none of which claims more than the file has."""
    entries = archive.infolist()
    size = path.stat().st_size
    if len(entries) > MAX_ENTRIES:
        raise BaselineError(f"{path} has {len(entries)} arrays; that is no transcoder")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise BaselineError(f"{path}: {entry.filename} is compressed or encrypted; save it with numpy.savez")
        if entry.file_size != entry.compress_size or entry.file_size > size:
            raise BaselineError(
                f"{path}: {entry.filename} claims {entry.file_size:,} bytes, but the file has {size:,}; "
                "it is damaged or made to do harm"
            )
    if sum(entry.file_size for entry in entries) > size:
        raise BaselineError(f"{path}: its arrays claim more bytes than the {size:,} of the file; it is damaged")
    return [(entry.filename.removesuffix(".npy"), entry) for entry in entries]


def _checked_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> _Header:
    """Parse an array's header and hold shape times item size against the bytes that are there."""
    with archive.open(entry) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers written by Python 2
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            parsed = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_HEADER_BYTES)
        elif version == (2, 0):
            parsed = np.lib.format.read_array_header_2_0(file, max_header_size=MAX_HEADER_BYTES)
        else:
            raise ValueError(f"{entry.filename} has a header of version {version}")
        n_header = file.tell()
    shape, fortran_order, dtype = parsed
    if dtype != np.dtype("<f4"):
        raise BaselineError(f"{path}: {entry.filename} holds {dtype}; Gemma Scope's arrays are float32")
    n_bytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or n_bytes != entry.file_size - n_header:
        raise BaselineError(
            f"{path}: {entry.filename} claims the shape {shape}, {n_bytes:,} bytes, but has "
            f"{entry.file_size - n_header:,}; it is damaged or made to do harm"
        )
    return _Header(shape, n_bytes, fortran_order)


def _read_into(read: Callable[[int], bytes], buffer: NDArray[np.uint8]) -> int:
    """Fill the buffer piece by piece, so that no second copy of the array is held."""
    done = 0
    while done < len(buffer) and (piece := read(min(1 << 24, len(buffer) - done))):
        buffer[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    return done


def why_not_whole(path: Path, error: BaseException) -> str:
    """What a user should know about a file of weights that cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as problem:
        return f"{path} cannot be read ({problem.strerror or problem})"
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of Git LFS, not the weights; run git lfs pull there, or download the file"
    return f"{path} ({size:,} bytes) is not whole ({first_line(error)}); the download was cut short: download it again"
