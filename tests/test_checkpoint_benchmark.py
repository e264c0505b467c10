"""The benchmark of saving: its row holds what it says."""

from pathlib import Path

import pytest

from benchmarks.checkpoint import measure
from benchmarks.embedded import cell_of
from sweep.train import SAVING_SHARE


def test_a_stall_is_the_share_of_a_save_between_two(tmp_path: Path) -> None:
    cells = [cell_of(["experiment=smoke", f"seed={seed}"]) for seed in (0, 1)]
    row = measure(cells, tmp_path, n_steps=1, n_rounds=1, minutes=1e-9)
    assert (row["cells"], len(list(tmp_path.iterdir()))) == (2, 2)
    parameters = sum(cell.n_train_params for cell in cells)
    assert row["mib_of_a_save"] * 2**20 > 3 * 4 * parameters  # weights and two moments
    often = SAVING_SHARE / (1 + SAVING_SHARE)  # where saves come as often as they may
    assert row["stall"] == pytest.approx(often) or row["stall_s"] <= 0
