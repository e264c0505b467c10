"""The benchmark of sharing: its parts say what they should on the tiny model."""

from pathlib import Path

import pytest

from benchmarks import sweep

TINY = ["experiment=smoke", "epochs=1", "steps=4"]


def test_three_layers_cost_one_pass(tmp_path: Path) -> None:
    row = sweep.layers(TINY, tmp_path, 1)
    assert row["tokens_of_three_layers"] == row["tokens_of_one_layer"] > 0


def test_the_cache_is_read_and_parts_of_a_run_are_timed(tmp_path: Path) -> None:
    assert sweep.cache_speed(TINY, tmp_path, 1)["tokens_per_second"] > 0
    of_pass, of_steps = sweep.parts_of_a_run(TINY, tmp_path)
    assert min(*of_pass, *of_steps) > 0


@pytest.mark.slow
def test_a_gang_is_held_against_separate_runs(tmp_path: Path) -> None:
    row = sweep.grid(TINY, tmp_path, 2)
    for kind in ("", "cpu_"):
        assert row[f"{kind}separate_over_gang"] == row[f"{kind}separate_s"] / row[f"{kind}gang_s"] > 0


@pytest.mark.slow
def test_a_gang_is_held_against_its_parts(tmp_path: Path) -> None:
    row = sweep.parts(TINY, tmp_path / "cache", 2)
    for kind in ("", "cpu_"):
        own = row[f"{kind}pass_s"] + 2 * row[f"{kind}steps_of_a_cell_s"]
        assert row[f"{kind}gang_over_pass_and_steps"] == row[f"{kind}gang_s"] / own > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
