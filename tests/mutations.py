"""Damage and malice for files, drawn from a seed: `from mutations import attack, changed_bytes`.

`attack` runs a reader on many changed files under limits of memory and processor time.
"""

import contextlib
import io
import json
import random
import re
import resource
import signal
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.errors import SweepError
from sweep.results import SEAL

__all__ = [
    "attack",
    "changed_bytes",
    "changed_header",
    "changed_npz",
    "changed_parquet",
    "changed_text",
    "changed_words",
    "limits",
    "told",
    "tree",
]

CASE_SECONDS = 5.0
"""Processor time after which reading a file of a few kilobytes counts as hanging."""

MEMORY_BYTES = 1 << 30
"""What reading such files may take beyond what the process has."""

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"),
    float("-inf"), float("nan"), "", " ", "0", "x" * 300, "../../up", "/abs/olute", "a\0b", "\x1b[2J", "²", "\ud800",
    "[/bold]", "a,b", "{x}", "${x}", "%s", [], [[]], [1], [-1, 2**62], ["a"], [None], [float("nan")], {}, {"": {}},
    {"a": [1]}, [[[[]]]],
)  # fmt: skip
"""Values of every type and of every kind that has broken a reader somewhere."""


VALUES = (
    "", " ", "null", "true", "0", "-1", "1e400", "nan", "-inf", "9" * 30, "9" * 400, "0x10", "1_0", "[]", "[1,2]",
    "{}", "{a:1}", "../../up", "/", "/dev/null", "/proc/self/environ", "x" * 300, "x/" * 200, "~", "'a b'", "'", '"',
    "\\", "²", "é", "\x1b[2J", "${seed}", "${oc.env:NOBODY}", "${nothing:1}", "${", "range(0,10**9)",
    "range(1,1000000000)", "range(0,1,0)", "range(0.0,1e9,1e-9)", "choice()", "choice(1,a,null)", "interval(0,1)",
    "glob(*)", "1,2,3", "1,,2", "a=b", "_target_", "sort(3,1)", "shuffle(range(0,3))", "float(1)", "[[[[[[1]]]]]]",
    "nearest:1e9", "cuda:99", "blocks.1.mlp.hook_in", "blocks.99999999999.a.b", "*", "?", "%s", "\n",
)  # fmt: skip
"""What a person, or a program in a hurry, may type for any option."""


def changed_bytes(random: random.Random, content: bytes) -> bytes:
    """A file with one to four changes: bits, bytes, numbers, spans that go, come or come twice, an end too early."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) + 1)
        span = random.choice((1, 2, 4, 8, 64))
        match random.randrange(8):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                changed[at : at + 1] = random.randbytes(1)
            case 2:
                changed[at : at + span] = random.choice((b"\0", b"\xff")) * span
            case 3:
                number = random.choice((2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
                changed[at : at + 8] = number.to_bytes(8, random.choice(("little", "big")))
            case 4:
                del changed[at : at + span]
            case 5:
                changed[at:at] = random.randbytes(span)
            case 6:
                changed[at:at] = changed[at : at + span]
            case _ if random.random() < 0.3:
                del changed[at:]
    return bytes(changed)


def changed_json(random: random.Random, value: Any) -> Any:
    """A copy of parsed JSON with one to three values replaced, gone, renamed or added."""
    changed = deepcopy(value)
    for _ in range(random.randint(1, 3)):
        found = list(places(changed))
        if not found or random.random() < 0.02:
            changed = deepcopy(random.choice(HOSTILE))
            continue
        holder, key = random.choice(found)
        if random.random() < 0.75:
            holder[key] = deepcopy(random.choice(HOSTILE))
        elif isinstance(holder, dict):
            held = holder.pop(key)
            if random.random() < 0.3:
                holder[random.choice((key.upper(), f"{key}2", "", "__class__", "_target_"))] = held
        else:
            del holder[key]
    return changed


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in parsed JSON."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed_text(random: random.Random, content: bytes) -> bytes:
    """A JSON file whose values are changed, or its bytes, or one that nests beyond any parser."""
    draw = random.random()
    if draw < 0.7:
        return json.dumps(changed_json(random, json.loads(content))).encode()
    if draw < 0.72:
        return content.replace(b":", b": " + b"[" * 100_000, 1)
    return changed_bytes(random, content)


def changed_header(random: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header is changed and has its right length, or any of whose bytes are."""
    if random.random() < 0.4:
        return changed_bytes(random, content)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(changed_json(random, json.loads(content[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def changed_npz(random: random.Random, content: bytes) -> bytes:
    """An .npz file whose bytes are changed, or the headers, names and packing of its arrays, checksums made to fit."""
    if random.random() < 0.5:
        return changed_bytes(random, content)
    whole = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(whole, "w") as new:
        victim = random.choice(old.namelist())
        for known in old.namelist():
            name, array, packing = known, old.read(known), zipfile.ZIP_STORED
            if known == victim:
                match random.randrange(5):
                    case 0:
                        shape = ", ".join(str(random.choice((0, 1, -1, 16, 32, 2**31, 2**62))) for _ in range(2))
                        array = re.sub(rb"\(.*?\)", f"({shape})".encode(), array, count=1)
                    case 1:
                        array = array.replace(b"<f4", random.choice((b"<f8", b"|O8", b"|S9", b">f4", b"<U9")), 1)
                    case 2:
                        array = changed_bytes(random, array[:128]) + array[128:]
                    case 3:
                        name = random.choice(("../up.npy", "/abs.npy", "x" * 300, "a\\b.npy", "threshold"))
                    case _:
                        packing = zipfile.ZIP_DEFLATED
            new.writestr(name, array, packing)
    return whole.getvalue()


def changed_parquet(random: random.Random, content: bytes) -> bytes:
    """A Parquet file without its seal, so that it is decoded, whose bytes are changed, or its columns."""
    unsealed = content.replace(SEAL, b"?" * len(SEAL))
    if random.random() < 0.7:
        return changed_bytes(random, unsealed)
    table = pq.read_table(pa.BufferReader(content))
    for _ in range(random.randint(1, 3)):
        n = len(table)
        column = random.choice((
            pa.nulls(n), pa.array(["x" * 300] * n), pa.array([2**63 - 1] * n), pa.array([float("nan")] * n),
            pa.array([[[1]]] * n), pa.array([{"a": 1}] * n), pa.array([b"\xff\0"] * n), pa.array(["../up"] * n),
            pa.array([True] * n), pa.array([None, *["a"] * n][:n]), pa.array([[None]] * n),
            pa.array([2**64 - 1] * n, pa.uint64()),
        ))  # fmt: skip
        if not table.num_columns:
            break
        where = random.randrange(table.num_columns)
        match random.randrange(4):
            case 0:
                table = table.remove_column(where)
            case 1:
                table = random.choice((table.slice(0, 0), pa.concat_tables([table] * 100)))
            case 2:
                table = table.append_column(random.choice(("a", "", "cell_id", "../up")), column)
            case _:
                table = table.set_column(where, table.column_names[where], column)
    whole = io.BytesIO()
    pq.write_table(table, whole, compression=random.choice(("none", "snappy", "zstd", "gzip", "lz4")))
    return whole.getvalue()


def changed_words(random: random.Random, words: Sequence[str]) -> list[str]:
    """Overrides as on a command line, one to three of them with other values, or with other bytes."""
    chosen = random.sample(words, random.randint(1, 3))
    for index, word in enumerate(chosen):
        if random.random() < 0.3:
            continue
        key, _, value = word.partition("=")
        if random.random() < 0.65:
            value = random.choice(VALUES)
        else:
            value = changed_bytes(random, value.encode()).decode("utf-8", "replace")
        prefix = random.choice(("", "", "", "", "", "+", "++", "~"))
        chosen[index] = f"{prefix}{key}={value}".replace("\0", "")  # which a command line cannot hold
    return chosen


Change = Callable[[random.Random, bytes], bytes]


def attack(n: int, path: Path, change: Change, read: Callable[[], Any], names: str = "") -> int:
    """Change a file `n` times and read it; returns how often it was refused. Afterwards the file is as it was.

    Reading must end, in little memory, with something or with a SweepError that names the file, or says `names`.
    """
    content, refused = path.read_bytes(), 0
    with told() as broken:
        for seed in range(n):
            path.write_bytes(change(random.Random(f"{path.name} {seed}"), content))
            try:
                with limits():
                    read()
            except SweepError as error:
                refused += 1
                if (names or path.name) not in str(error):
                    broken(f"a message without the file's name: {error}", f"{path.name} {seed}")
            except Exception as error:
                broken(error, f"{path.name} {seed}")
            finally:
                path.write_bytes(content)
    return refused


@contextlib.contextmanager
def told() -> Iterator[Callable[[Exception | str, str], None]]:
    """Collects what went wrong and in which case, one case of each kind, and fails with all of it at the end."""
    found: dict[str, str] = {}

    def broken(what: Exception | str, case: str) -> None:
        if isinstance(what, Exception):
            where = traceback.extract_tb(what.__traceback__)[-1]
            found[f"{where.name}, line {where.lineno}, {type(what).__name__}"] = f"{case}: {str(what)[:200]}"
        else:
            found[what] = case

    yield broken
    assert not found, "\n".join(f"{what}: {case}" for what, case in found.items())


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """End what takes too much memory or processor time by an error."""

    def too_long(_signum: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {CASE_SECONDS} s of processor time")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGVTALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, CASE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder: names, kinds, sizes, times of change, and where links lead."""
    found = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        link = str(path.readlink()) if path.is_symlink() else ""
        found[str(path.relative_to(root))] = (facts.st_mode, facts.st_size, facts.st_mtime_ns, link)
    return found
