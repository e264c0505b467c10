"""The recipe benchmark: every recipe runs, starts and updates as it says, and is chosen on the calibration split."""

from pathlib import Path

import pytest
import torch
from make import make_cell

from benchmarks import recipe
from benchmarks.embedded import cell_of, prepare
from sweep.step.update import update_
from sweep.transcoder import Parameters

SMOKE = ("experiment=smoke", "lr=1e-2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", recipe.RECIPES)
def test_every_recipe_learns_from_the_same_batches(name: str, cache: Path) -> None:
    cell = cell_of([*recipe.RECIPES[name].options, *SMOKE])
    stream = prepare([cell], cache).stream
    row = recipe.measure(recipe.RECIPES[name], cell, stream)
    assert row["finite"]
    short = cell_of([*recipe.RECIPES[name].options, *SMOKE, "steps=2"])
    assert row["calibration_fvu"] < recipe.measure(recipe.RECIPES[name], short, stream)["calibration_fvu"]


def test_the_rate_is_chosen_on_calibration_and_never_from_a_run_that_diverged() -> None:
    rows = [
        {"lr": 1e-3, "finite": True, "calibration_fvu": 0.3, "fvu": 0.1},
        {"lr": 3e-3, "finite": True, "calibration_fvu": 0.2, "fvu": 0.4},
        {"lr": 1e-2, "finite": False},
    ]
    assert recipe.best_rate(rows) == 3e-3


def test_interval_is_students() -> None:
    assert recipe.interval([1.0, 2.0, 3.0]) == "2.0000 ± 2.4843"


def test_zero_decoder_predicts_nothing_and_tied_encoder_is_the_decoder_transposed() -> None:
    cell = make_cell()
    source, target = torch.randn(128, 32), torch.randn(128, 32)
    assert not recipe.from_zero_decoder(source, target, cell).params.W_dec.any()
    tied = recipe.from_tied(source, target, cell).params
    assert torch.equal(tied.W_enc, tied.W_dec.T)
    assert torch.allclose(tied.W_dec.norm(dim=1), torch.ones(64))


def test_free_adam_is_ours_where_no_row_is_constrained() -> None:
    source, target = torch.randn(128, 32), torch.randn(128, 32)
    ours, free = (recipe.from_data(source, target, make_cell()) for _ in range(2))
    gradients = ours.params.map(torch.randn_like)
    update_(ours, Parameters(*(tensor.clone() for tensor in gradients.tensors())), 1e-2, (0.9, 0.999))
    recipe.adam_free_(free, gradients, 1e-2, (0.9, 0.999))
    for name in ("W_enc", "b_enc", "b_dec"):
        assert torch.allclose(getattr(ours.params, name), getattr(free.params, name), atol=1e-6)
