"""The learning rate: warm-up, decay, and an end at min_lr."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell

from sweep.config import Schedule
from sweep.schedule import learning_rate, n_refit_batches
from sweep.tokens import row_counts


def schedule(decay: str = "linear", steps: int = 100, warmup: int = 10, min_lr: float = 1e-5) -> Schedule:
    return make_cell(lr=1e-2, steps=steps, warmup_steps=warmup, min_lr=min_lr, decay=decay).schedule


def test_learning_rate_warms_up_linearly_to_the_peak() -> None:
    rates = [learning_rate(step, schedule()) for step in range(10)]
    assert rates == pytest.approx([1e-3 * (step + 1) for step in range(10)])
    assert rates[-1] == 1e-2


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_learning_rate_ends_exactly_at_min_lr(decay: str) -> None:
    assert learning_rate(99, schedule(decay)) == 1e-5
    assert learning_rate(98, schedule(decay)) > 1e-5


def test_learning_rate_matches_its_formulas_halfway() -> None:
    halfway = schedule(steps=101, warmup=1, min_lr=0.0)
    assert learning_rate(50, halfway) == pytest.approx(0.5e-2)
    assert learning_rate(25, schedule("cosine", 101, 1, 0.0)) == pytest.approx(1e-2 * 0.853553, rel=1e-5)


def test_learning_rate_constant_never_decays() -> None:
    assert learning_rate(99, schedule("constant", min_lr=1e-5)) == 1e-2


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, schedule(warmup=0)) == 1e-2


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(1, 50), st.data(), st.floats(0, 1e-2))
def test_learning_rate_stays_in_bounds_and_falls_after_warmup(
    decay: str, steps: int, data: st.DataObject, min_lr: float
) -> None:
    warmup = data.draw(st.integers(0, steps if decay == "constant" else steps - 1))
    rates = [learning_rate(step, schedule(decay, steps, warmup, min_lr)) for step in range(steps)]
    assert all(0 < rate <= 1e-2 * (1 + 1e-12) or rate == min_lr for rate in rates)
    if decay != "constant" and steps > 1:
        assert rates[-1] == min_lr
    after = rates[max(warmup - 1, 0) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))


def test_the_sample_is_no_more_than_training_saw_an_epoch_or_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(**options: Any) -> int:
        return n_refit_batches(make_cell(**{"refit_iterations": 1, **options}))

    cell = make_cell()
    epoch = row_counts(cell.data)["train"] * (cell.data.seq_len - 1) // cell.schedule.batch_size
    assert size(refit_iterations=0) == 0
    assert size(steps=3) == 3
    assert size(steps=10 * epoch) == epoch
    monkeypatch.setattr("sweep.schedule.SAMPLE_BYTES", 2 * 4 * 64 * (cell.model.d_in + cell.model.d_out))
    assert size(steps=10 * epoch) == 2
    monkeypatch.setattr("sweep.schedule.SAMPLE_BYTES", 1)
    assert size(steps=10 * epoch) == 1
