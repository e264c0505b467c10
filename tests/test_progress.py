"""Pace and time left of phases that take turns."""

from typing import Any

import pytest

from sweep.progress import Progress, Snapshot


def test_a_fresh_progress_is_empty() -> None:
    assert Progress().snapshot == Snapshot()


def test_the_pace_of_a_phase_counts_its_own_time_only(clock: Any) -> None:
    progress = Progress()
    progress("language model", 0, 4000, "tokens")
    clock.now += 10
    progress("language model", 1000, 4000, "tokens")
    progress("train", 0, 40, "steps")
    for step in range(1, 11):
        clock.now += 2
        progress("train", step, 40, "steps")
    assert progress.snapshot == Snapshot("train", 10, 40, "steps", per_second=0.5, seconds_left=60 + 30)
    clock.now += 10
    progress("language model", 2000, 4000, "tokens")
    assert progress.snapshot.per_second == 100
    assert progress.snapshot.seconds_left == 60 + 20


def test_work_done_before_the_first_report_has_no_pace(clock: Any) -> None:
    progress = Progress()
    clock.now += 5
    progress("train", 500, 1000, "steps")
    assert (progress.snapshot.per_second, progress.snapshot.seconds_left) == (0.0, 0.0)
    clock.now += 1
    progress("train", 510, 1000, "steps")
    assert progress.snapshot.per_second == 10


def test_an_unknown_total_leaves_nothing_to_add(clock: Any) -> None:
    progress = Progress()
    progress("tokenise", 0, 0, "tokens")
    clock.now += 1
    progress("tokenise", 100, 0, "tokens")
    assert progress.snapshot.per_second == 100
    assert progress.snapshot.seconds_left == 0.0


def test_a_finished_phase_leaves_nothing(clock: Any) -> None:
    progress = Progress()
    progress("train", 0, 10, "steps")
    clock.now += 1
    progress("train", 10, 10, "steps")
    assert progress.snapshot.seconds_left == pytest.approx(0)
