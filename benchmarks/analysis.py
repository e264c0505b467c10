"""How long a results folder takes to load: `python -m benchmarks.analysis` (1,000 and 10,000 runs, cold and warm).

1. Make a folder of finished runs: each file sealed as a sweep leaves it, options and metrics made up.
2. Cold: no compact cache, and the operating system asked to forget the files. Warm: the cache is there.
3. Each load is a process of its own; the time is that of `load_table(...).frame.collect()`, imports told apart.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweep.paths import ResultsFolder
from sweep.results import METRICS, OPTIONS, parquet_bytes

MEASURE = """
import json, sys, time
from pathlib import Path
start = time.perf_counter()
import analysis.tables
imported = time.perf_counter()
loaded = analysis.tables.load_table(Path(sys.argv[1]), "runs")
height = loaded.frame.collect().height
assert not loaded.warnings, loaded.warnings
print(json.dumps({"rows": height, "imports_s": imported - start, "load_s": time.perf_counter() - imported}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1_000, 10_000], help="sizes of the folders")
    parser.add_argument("--repeats", type=int, default=3, help="loads of each kind; the median is shown")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--folder", type=Path, help="where to make the folders (default: a temporary one)")
    asked = parser.parse_args()
    rows = []
    print(f"{'runs':>7}  {'kind':4}  {'load_s':>7}  {'imports_s':>9}")
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        for n in asked.runs:
            folder = Path(scratch) / str(n)
            make_runs(folder, n)
            for kind in ("cold", "warm"):
                found = sorted((load(folder, cold=kind == "cold") for _ in range(asked.repeats)), key=load_seconds)
                row = {"runs": n, "kind": kind, **found[len(found) // 2]}
                rows.append(row)
                print(f"{n:7,}  {kind:4}  {row['load_s']:7.3f}  {row['imports_s']:9.3f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


def load_seconds(row: dict[str, float]) -> float:
    return row["load_s"]


def make_runs(folder: Path, n: int) -> None:
    """`n` committed runs; not synced one by one, which is what takes a sweep's time."""
    results = ResultsFolder(folder)
    results.create()
    for cell_id, row in itertools.islice(made_up(), n):
        results.row("runs", cell_id).write_bytes(parquet_bytes("runs", [{"cell_id": cell_id, **row}]))
    os.sync()


def made_up() -> Iterator[tuple[str, dict[str, Any]]]:
    """Cell ids and rows without end, the same every time."""
    draw = random.Random(0)
    values: dict[str, Any] = {
        "int64": lambda: draw.randrange(100_000),
        "float64": draw.random,
        "string": lambda: draw.choice(["gemma-3-270m", "linear", "docstrings"]),
        "bool": lambda: True,
        "list[int64]": lambda: [576, 1152, 2304, 3456, 4608],
        "list[float64]": lambda: [0.9, 0.999],
    }
    for i in itertools.count():
        row = {column.name: values[column.dtype]() for column in (*OPTIONS, *METRICS)}
        yield f"{i:010x}", {"kind": "cell", "status": "done", "config": json.dumps(row), **row}


def load(folder: Path, *, cold: bool) -> dict[str, float]:
    """Load once, in a process of its own."""
    if cold:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for path in (folder / "runs").iterdir():
            forget(path)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def forget(path: Path) -> None:
    """Ask the operating system to drop a file from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
