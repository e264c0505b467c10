"""Damage and malice for files, drawn from a seed: `from mutations import attack, changed_bytes, changed_json`.

`attack` runs a reader on many changed files under limits of memory and processor time.
"""

import contextlib
import json
import random
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

from sweep.errors import SweepError

__all__ = ["attack", "changed_bytes", "changed_header", "changed_json", "limits", "tree"]

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


Change = Callable[[random.Random, bytes], bytes]


def attack(n: int, path: Path, change: Change, read: Callable[[], Any], names: str = "") -> int:
    """Change a file `n` times and read it; returns how often it was refused. Afterwards the file is as it was.

    Reading must end, in little memory, with something or with a SweepError that names the file, or says `names`.
    """
    content = path.read_bytes()
    refused, broken = 0, dict[str, str]()
    for seed in range(n):
        path.write_bytes(change(random.Random(f"{path.name} {seed}"), content))
        try:
            with limits():
                read()
        except SweepError as error:
            refused += 1
            if (names or path.name) not in str(error):
                broken[f"a message without the file's name: {error}"] = f"seed {seed}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            broken[f"{where.name}, line {where.lineno}: {type(error).__name__}: {str(error)[:200]}"] = f"seed {seed}"
        finally:
            path.write_bytes(content)
    assert not broken, "\n".join(f"{path.name}, {seed}: {what}" for what, seed in broken.items())
    return refused


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
