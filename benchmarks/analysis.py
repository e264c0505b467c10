"""How long a results folder takes to load, and to become a page: `python -m benchmarks.analysis`.

1. Make a folder of finished runs: each file sealed as a sweep leaves it, options and metrics made up.
2. Cold: no compact cache, and the operating system asked to forget the files. Warm: the cache is there.
3. Each load is a process of its own; the time is that of `load_table(...).frame.collect()`, imports told apart. The
   fastest is shown, since whatever else a machine does only adds, and the processor's seconds beside it.
4. A page: the same folder with curves and latents, as `python -m analysis report` would write it.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sweep.paths import ResultsFolder
from sweep.results import METRICS, OPTIONS, parquet_bytes

LOAD = """
import analysis.tables
def work(folder):
    loaded = analysis.tables.load_table(folder, "runs")
    rows = loaded.frame.collect().height
    assert not loaded.warnings, loaded.warnings
    return {"rows": rows}
"""
PAGE = """
from analysis.report.page import Request, report
def work(folder):
    html, remarks = report(folder, Request())
    assert not remarks, remarks
    return {"megabytes": len(html.encode()) / 1e6}
"""
MEASURE = """
import json, sys, time
from pathlib import Path
start = time.perf_counter()
{work}
imported, cpu = time.perf_counter(), time.process_time()
found = work(Path(sys.argv[1]))
seconds = {{"s": time.perf_counter() - imported, "cpu_s": time.process_time() - cpu, "imports_s": imported - start}}
print(json.dumps({{**found, **seconds}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1_000, 10_000], help="sizes of the folders")
    parser.add_argument("--page", type=int, default=1_000, help="runs of the page; 0 makes none")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is done; the fastest is shown")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--folder", type=Path, help="where to make the folders (default: a temporary one)")
    asked = parser.parse_args()
    rows = []
    print(f"{'runs':>7}  {'kind':4}  {'s':>7}  {'cpu_s':>7}  {'imports_s':>9}")
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        works = [(n, kind, LOAD) for n in asked.runs for kind in ("cold", "warm")]
        works += [(asked.page, "page", PAGE)] if asked.page else []
        for n, kind, work in works:
            folder = Path(scratch) / f"{n}{kind == 'page'}"
            if not folder.exists():
                make_sweep(folder, n, ("runs", "curves", "latents") if kind == "page" else ("runs",))
            found = (measured(work, folder, cold=kind == "cold") for _ in range(asked.repeats))
            row = {"runs": n, "kind": kind, **min(found, key=lambda one: one["s"])}
            rows.append(row)
            size = f"  {row['megabytes']:.1f} MB" if kind == "page" else ""
            print(f"{n:7,}  {kind}  {row['s']:7.3f}  {row['cpu_s']:7.3f}  {row['imports_s']:9.3f}{size}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


def make_sweep(folder: Path, n: int, tables: Sequence[str]) -> None:
    """`n` committed cells; not synced one by one, which is what takes a sweep's time."""
    results = ResultsFolder(folder)
    results.create()
    for table in tables:
        for cell_id, row in itertools.islice(made_up(), n):
            rows = [row] if table == "runs" else PARTS[table](row)
            content = parquet_bytes(table, [{"cell_id": cell_id, **part} for part in rows])
            results.row(table, cell_id).write_bytes(content)
    grid = (f"{name}={','.join(map(str, values))}" for name, values in GRID.items())
    command = f"python sweep_runner.py -m {' '.join(grid)}"
    about = {
        "sweep_id": "made",
        "command": command,
        "cell_ids": [cell_id for cell_id, _ in itertools.islice(made_up(), n)],
    }
    results.sweep("made").write_text(json.dumps({**about, "started_at": "2026-01-01T00:00:00+00:00"}))
    os.sync()


GRID: dict[str, Sequence[Any]] = {
    "seed": range(20),
    "n_batches_to_dead": (20, 30),
    "aux_penalty": (0.03125, 0.125),
    "dict_size": (2304, 4608, 9216, 18432, 36864),
    "top_k": (16, 32, 64, 96, 128),
    "lr": (1e-3, 2e-3, 3e-3, 5e-3, 1e-2),
}
"""What the made-up sweep varies, the last fastest; as many seeds as its size asks for."""


def made_up() -> Iterator[tuple[str, dict[str, Any]]]:
    """Cell ids and rows of a sweep whose metrics follow its options, the same every time."""
    draw = random.Random(0)
    blank: dict[str, Any] = {
        **{"int64": 1, "float64": 0.5, "string": "as it is", "bool": True},
        **{"list[int64]": [576, 1152, 2304, 3456, 4608], "list[float64]": [0.9, 0.999]},
    }
    options = {column.name: blank[column.dtype] for column in OPTIONS}
    options |= {"model": "made-up", "layer": 12, "hook_in": "norm_out", "hook_out": "mlp_out", "steps": 508}
    for i, values in enumerate(itertools.product(*GRID.values())):
        row = {**options, **dict(zip(GRID, values, strict=True))}
        row["groups"] = [row["dict_size"] * part // 8 for part in (1, 2, 4, 6, 8)]
        metrics = {column.name: blank[column.dtype] for column in METRICS}
        fvu = 3 * row["dict_size"] ** -0.2 * row["top_k"] ** -0.2
        fvu *= 1 + 0.1 * math.log2(row["lr"] / 3e-3) ** 2 + 0.01 * draw.gauss(0, 1)
        metrics |= {"fvu": fvu, "fvu_per_dimension": fvu * 1.4, "l0": row["top_k"] * draw.uniform(0.98, 1.02)}
        metrics |= {"dead_fraction": 0.3 * draw.random(), "absorption_score": 1e-6 * draw.random()}
        about = {"kind": "cell", "status": "done", "config": json.dumps(row), "schema_version": 1}
        hashes = {name: name[0] * 64 for name in ("tokens_hash", "heldout_hash", "model_hash")}
        yield f"{i:010x}", {**about, **hashes, **row, **metrics}


def curves_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for step in range(0, 508, 4):
        for metric, at_the_end in (("loss", 1.2), ("fvu", 1.0), ("l0", row["l0"]), ("n_dead", 300.0), ("lr", 1.0)):
            yield {"step": step, "metric": metric, "value": at_the_end * row["fvu"] * (1 + 20 / (step + 10))}


def latents_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    draw = random.Random(row["dict_size"])
    for latent in range(576):
        density = min(1.0, row["top_k"] / row["dict_size"] * draw.lognormvariate(0, 1.5))
        yield {"latent": latent, "group": 0, "density": density, "nearest_cosine": min(1, draw.gauss(0.3, 0.1))}


PARTS = {"curves": curves_of, "latents": latents_of}


def measured(work: str, folder: Path, *, cold: bool) -> dict[str, float]:
    """Do it once, in a process of its own."""
    if cold:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for path in (folder / "runs").iterdir():
            forget(path)
    program = MEASURE.format(work=work)
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
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
