"""How gangs become jobs: they fit, no slot idles, no cell is lost, and nothing is divided without need."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from make import make_cell

from sweep.config import Cell
from sweep.launch.jobs import divide
from sweep.launch.machine import Slot

CELLS = [make_cell(seed=seed) for seed in range(12)]


def slots(n: int, memory_bytes: float | None = None) -> list[Slot]:
    return [Slot(None, 1, memory_bytes)] * n


def size_of(cells: Sequence[Cell]) -> float:
    """A base and one unit for each cell."""
    return 1.0 + len(cells)


def one(_: Cell) -> float:
    return 1.0


def counts(gangs: list[list[Cell]], room: list[Slot]) -> list[int]:
    return [len(job.cells) for job in divide(gangs, room, size_of, one)]


def test_a_gang_that_fits_one_slot_is_one_job() -> None:
    assert counts([CELLS[:8]], slots(1)) == [8]
    assert counts([CELLS[:8]], slots(1, memory_bytes=9)) == [8]


def test_a_gang_is_cut_into_the_fewest_parts_that_fit() -> None:
    assert counts([CELLS[:8]], slots(1, memory_bytes=8.9)) == [4, 4]
    assert counts([CELLS[:8]], slots(1, memory_bytes=4)) == [3, 3, 2]


def test_a_cell_that_fits_nowhere_still_runs_alone() -> None:
    assert counts([CELLS[:3]], slots(1, memory_bytes=0.5)) == [1, 1, 1]


def test_idle_slots_divide_the_longest_job() -> None:
    assert counts([CELLS[:8]], slots(4)) == [2, 2, 2, 2]
    assert counts([CELLS[:6], CELLS[6:8]], slots(3)) == [3, 3, 2]
    assert counts([CELLS[:2]], slots(8)) == [1, 1]


def test_parts_are_balanced_by_work_and_the_longest_starts_first() -> None:
    work = {cell.cell_id: float(weight) for cell, weight in zip(CELLS, (1, 1, 1, 9, 1, 1), strict=False)}
    jobs = divide([CELLS[:6]], slots(2), size_of, lambda cell: work[cell.cell_id])
    assert [list(job.cells) for job in jobs] == [[CELLS[3]], [*CELLS[:3], *CELLS[4:6]]]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    n_slots=st.integers(1, 6),
    room=st.floats(2, 12),
    works=st.lists(st.floats(0.1, 100), min_size=12, max_size=12),
)
def test_every_cell_is_in_one_job_that_fits(sizes: list[int], n_slots: int, room: float, works: list[float]) -> None:
    rest = iter(CELLS)
    gangs = [[next(rest) for _ in range(size)] for size in sizes]
    work = {cell.cell_id: value for cell, value in zip(CELLS, works, strict=True)}
    jobs = divide(gangs, slots(n_slots, room), size_of, lambda cell: work[cell.cell_id])
    assert sorted(cell_id for job in jobs for cell_id in job.cell_ids) == sorted(
        cell.cell_id for gang in gangs for cell in gang
    )
    for job in jobs:
        (gang,) = [gang for gang in gangs if job.cells[0] in gang]
        assert [cell for cell in gang if cell in job.cells] == list(job.cells)
        assert job.memory_bytes == size_of(job.cells) <= room
    assert len(jobs) >= min(n_slots, sum(sizes))
