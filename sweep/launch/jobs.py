"""From gangs to jobs: each gang stays one job where it fits, and is divided where memory or idle slots ask for it.

Dividing a gang costs a process and its language model more, and changes no number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sweep.config import Cell
from sweep.launch.machine import Slot

__all__ = ["Job", "divide"]

Cells = Sequence[Cell]


@dataclass(frozen=True)
class Job:
    """Cells that train together in one process. Should it die in its `last_try`, nothing is tried any more."""

    cells: tuple[Cell, ...]
    memory_bytes: float
    last_try: bool = False

    @property
    def cell_ids(self) -> list[str]:
        return [cell.cell_id for cell in self.cells]


def divide(
    gangs: Sequence[Cells],
    slots: Sequence[Slot],
    memory: Callable[[Cells], float],
    work: Callable[[Cell], float],
) -> list[Job]:
    """The jobs of a sweep, the longest first.

    `memory` tells the bytes cells need together, `work` how long one trains relative to the others. A gang is cut into
    the fewest parts that fit the smallest slot; then the longest parts are cut until no slot is idle.
    """
    room = min((slot.memory_bytes for slot in slots if slot.memory_bytes is not None), default=float("inf"))
    n_parts = [fewest_parts(gang, room, memory, work) for gang in gangs]
    parts = [balanced(gang, n, work) for gang, n in zip(gangs, n_parts, strict=True)]

    def longest(index: int) -> float:
        return max(sum(map(work, part)) for part in parts[index])

    while sum(map(len, parts)) < len(slots):
        divisible = [index for index, gang in enumerate(gangs) if len(parts[index]) < len(gang)]
        if not divisible:
            break
        index = max(divisible, key=longest)
        parts[index] = balanced(gangs[index], len(parts[index]) + 1, work)
    jobs = [Job(tuple(part), memory(part)) for gang in parts for part in gang]
    return sorted(jobs, key=lambda job: -sum(map(work, job.cells)))


def fewest_parts(gang: Cells, room: float, memory: Callable[[Cells], float], work: Callable[[Cell], float]) -> int:
    """How many parts a gang must be cut into so that each fits; a cell alone may still be too large."""
    fits = (n for n in range(1, len(gang)) if all(memory(part) <= room for part in balanced(gang, n, work)))
    return next(fits, len(gang))


def balanced(gang: Cells, n_parts: int, work: Callable[[Cell], float]) -> list[list[Cell]]:
    """Parts of about equal work: the longest cell first, each to the part that has least. Order is kept inside."""
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    loads = [0.0] * n_parts
    for index in sorted(range(len(gang)), key=lambda i: -work(gang[i])):
        lightest = loads.index(min(loads))
        parts[lightest].append(index)
        loads[lightest] += work(gang[index])
    return [[gang[index] for index in sorted(part)] for part in parts]
