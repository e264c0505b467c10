"""What `python -m tests.faults` does at length, in small."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk import FAULTS
from faults import (
    WAYS,
    Bench,
    bench,
    break_one_cell,
    kill_at_random,
    preempt_at_random,
    share_a_folder,
)
from left_behind import check_visible
from small_gang import small_gang

from sweep.paths import CacheFolder


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench with the sweep that nothing was done to."""
    with bench(tmp_path_factory.mktemp("faults")) as made:
        yield made


def test_sweeps_killed_at_random_moments_end_in_the_same_bytes(each: Bench) -> None:
    places = kill_at_random(each, n=20, seed=1, command=False)
    assert places.total() == 20
    assert len(places) > 1


def test_a_sweep_preempted_at_random_moments_ends_in_the_same_bytes(each: Bench, tmp_path: Path) -> None:
    """The comparison is in the function: it stops at the first byte that differs. No step is taken twice."""
    took = preempt_at_random(tmp_path, each.sweeper, n_cells=2, times=2, steps=300, seed=3)
    assert took.steps == took.alone_steps == 600


@pytest.mark.parametrize("n_kills", [0, 1])
def test_launchers_share_a_folder(n_kills: int, each: Bench, tmp_path: Path) -> None:
    """Two, with clocks a day apart; each is killed so many times. The comparisons are in the function."""
    starts = share_a_folder(tmp_path, each.sweeper, 2, 3, n_kills, steps=60, seed=4, backend="inline")
    assert n_kills or starts == {1: 3}


@pytest.mark.slow
def test_a_cell_that_breaks_in_any_way_costs_the_others_nothing(each: Bench, tmp_path: Path) -> None:
    """The comparisons are in the function."""
    told = dict(break_one_cell(tmp_path, each.sweeper, n_cells=10, steps=12, hang_minutes=1))
    assert told.keys() == WAYS.keys()


def test_gangs_with_a_broken_operation_end_in_the_same_bytes(ram: Path, cache: CacheFolder) -> None:
    draw = random.Random(2)
    with small_gang(ram, cache) as gang:
        assert gang.n_operations > 150
        for fault in (*FAULTS, *FAULTS):
            gang.broken(draw.randrange(gang.n_operations), fault)


def test_the_check_sees_a_torn_file(each: Bench, tmp_path: Path) -> None:
    """The tests above would notice: the same check fails on a row with one byte missing."""
    (tmp_path / "runs").mkdir()
    row = next(each.reference.table("runs").glob("*.parquet"))
    (tmp_path / "runs" / row.name).write_bytes(row.read_bytes()[:-1])
    with pytest.raises(AssertionError):
        check_visible(tmp_path, each.reference)
