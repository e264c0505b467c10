"""How long a training step takes, ours and others': `python -m benchmarks.step --quick --json step.json`.

1. Every contender is a process of its own that makes its state, then takes a step when it is told. Two steps warm up;
   the second is watched for the share of the encoder's product: encoder_fraction.
2. Rounds: one step of each contender after the other, so that noise hits all alike. Numbers are medians over rounds.
3. ratio is a contender's seconds over those of `sparse` with the same groups and dead_fraction in the same round;
   floor_fraction the floor's seconds over the contender's. The floor is the encoder's product of the whole batch.
4. peak_mb is what training takes at most, in MiB: state, gradients and temporaries, without libraries and batches.

Data is random: it decides nothing but which latents fire. Dead latents are held down by their bias. Peers live in
environments of their own (`python -m benchmarks.peers build`); one that is missing is named.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # python benchmarks/step.py is the same as python -m benchmarks.step

from benchmarks.contest import Case, Contender, Measured, contest
from benchmarks.peers import FOLDER, PEERS, python

OURS = ("sparse", "reference", "matryoshka_sae")

QUICK = (640, 18432, 96, 2048)
SHAPES = (QUICK, (2304, 18432, 96, 2048))
"""d, dict_size, top_k, batch."""

VARIANTS = ("plain", "nested", "nested+0.1", "nested+0.5")
"""Nesting, and the share of dead latents."""

NESTED = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, three rounds, no dead latents of peers")
    parser.add_argument("--shapes", nargs="+", type=shape, help="d x dict_size x top_k x batch, as 640x18432x96x2048")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="plain or nested, + the share of dead")
    parser.add_argument("--impls", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS], help="who takes part")
    parser.add_argument("--peers", type=Path, default=FOLDER, help="environments of peers, default: %(default)s")
    parser.add_argument("--rounds", type=int, help="steps of each contender (default 7, with --quick 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contender")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    asked = parser.parse_args()
    missing = [name for name in asked.impls if name in PEERS and not python(asked.peers, PEERS[name]).exists()]
    for name in missing:
        print(f"{name} is missing: python -m benchmarks.peers build {name}", flush=True)
    impls = {name: command(name, asked.peers) for name in asked.impls if name not in missing}
    rows: list[Row] = []
    for one in asked.shapes or ([QUICK] if asked.quick else SHAPES):
        found = contenders(one, asked.variants, impls, asked.device, asked.threads)
        taking_part = [each for each in found if fits(each, quick=asked.quick)]
        measured = contest(taking_part, asked.rounds or (3 if asked.quick else 7))
        print("\n".join([*table(rows_of(measured)), *costs(measured), ""]), flush=True)
        rows += rows_of(measured)
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=2) + "\n")


def shape(text: str) -> tuple[int, ...]:
    d, dict_size, top_k, batch = (int(part) for part in text.split("x"))
    return d, dict_size, top_k, batch


def command(impl: str, peers: Path) -> tuple[str, ...]:
    """What starts an implementation."""
    if impl in PEERS:
        return str(python(peers, PEERS[impl])), "-m", PEERS[impl].module
    return sys.executable, "-m", "benchmarks.contenders", impl


def fits(contender: Contender, *, quick: bool) -> bool:
    """Whether an implementation can do this, and may: a quick run shows peers without dead latents only."""
    peer, case = PEERS.get(contender.impl), contender.case
    return peer is None or ((peer.nested or len(case.groups) == 1) and not (quick and case.dead_fraction))


def contenders(
    shape: Sequence[int], variants: Iterable[str], impls: Mapping[str, tuple[str, ...]], device: str, threads: int
) -> Iterator[Contender]:
    """The floor, and every implementation on every variant."""
    for variant in ("floor", *variants):
        nesting, _, dead = variant.partition("+")
        groups = [int(shape[1] * part) for part in (NESTED if nesting == "nested" else (1.0,))]
        case = Case(*shape, tuple(groups), float(dead or 0), device, threads)
        commands = {"floor": command("floor", FOLDER)} if variant == "floor" else impls
        for impl, words in commands.items():
            yield Contender(impl, words, case)


def rows_of(measured: Sequence[Measured]) -> list[Row]:
    """What is written to the file, for contenders of one shape."""
    floor = next(one for one in measured if one.contender.impl == "floor")
    sparse = {one.contender.case: one for one in measured if one.contender.impl == "sparse"}
    rows = []
    for one in measured:
        rival = sparse.get(one.contender.case)
        row: Row = {"impl": one.contender.impl, **asdict(one.contender.case)}
        row |= {"seconds": median(one.seconds), "ratio": None if rival is None else ratio(one, rival)}
        row |= {"peak_mb": one.peak_mb, "encoder_fraction": one.encoder_fraction, "floor_fraction": ratio(floor, one)}
        rows.append({**row, "rounds": len(one.seconds), "version": one.version})
    return rows


def ratio(one: Measured, other: Measured) -> float:
    """The median over rounds of one's seconds over the other's."""
    return median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


def table(rows: Sequence[Row]) -> Iterator[str]:
    first = rows[0]
    names = ("dict_size", "top_k", "batch", "device", "threads", "rounds")
    yield f"d {first['d']}, " + ", ".join(f"{name} {first[name]}" for name in names)
    titles = f"{'groups':>6} {'dead':>5} {'seconds':>8} {'ratio':>6} {'peak_mb':>8} {'encoder':>8} {'floor':>6}"
    yield f"{'impl':22} {titles}"
    for row in rows:
        shown = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        yield (
            f"{row['impl']:22} {len(row['groups']):6} {row['dead_fraction']:5.0%} {row['seconds']:8.3f} {shown:>6} "
            f"{row['peak_mb']:8.0f} {row['encoder_fraction']:8.0%} {row['floor_fraction']:6.0%}"
        )


def costs(measured: Sequence[Measured]) -> Iterator[str]:
    """What nesting and dead latents add to each implementation's step."""
    of = {
        (one.contender.impl, len(one.contender.case.groups) > 1, one.contender.case.dead_fraction): one
        for one in measured
    }
    for (impl, nested, dead), one in of.items():
        if nested and not dead and (plain := of.get((impl, False, 0.0))):
            yield f"{impl}: nesting adds {ratio(one, plain) - 1:.0%}"
        if dead and (alive := of.get((impl, nested, 0.0))):
            yield f"{impl}: the auxiliary loss adds {ratio(one, alive) - 1:.0%} at {dead:.0%} dead"


if __name__ == "__main__":
    main()
