"""The first state: a pure function of window, capacity and seed, in scaled units."""

import pytest
import torch
from make import make_cell

from sweep.initialise import initial_state, least_squares_scale, sample_pairs, unit_mean_square_scale, write_rates
from sweep.transcoder import pre_latents, select


def make_window(n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    source = torch.randn(n, 16, generator=g) * 0.2 + 1
    return source, torch.tanh(source @ torch.randn(16, 12, generator=g)) * 90 + 30


def test_scales_give_unit_mean_square() -> None:
    source, target = make_window()
    state = initial_state(source, target, make_cell(dict_size=64).capacity, seed=0)
    assert float((source * state.source_scale).square().mean()) == pytest.approx(1, rel=1e-5)
    assert float((target * state.target_scale).square().mean()) == pytest.approx(1, rel=1e-5)
    assert unit_mean_square_scale(torch.zeros(3, 4)) == 1.0


def test_rates_follow_the_spread_of_each_dimension_up_to_one() -> None:
    spread = torch.tensor([0.0, 0.1, 1.0, 2.0])
    target = torch.randn(999, 4, generator=torch.Generator().manual_seed(0))
    target = (target - target.mean(0)) / target.std(0, correction=0) * spread + 50
    typical = float(spread.square().mean().sqrt())
    torch.testing.assert_close(
        write_rates(target), torch.tensor([0.0, 0.1 / typical, 1.0 / typical, 1.0]), rtol=1e-4, atol=1e-6
    )
    assert write_rates(torch.full((9, 3), 7.0)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("fitted", [True, False])
def test_steps_are_fitted_to_the_window_where_asked_for(fitted: bool) -> None:
    source, target = make_window()
    cell = make_cell(dict_size=64, rate_by_spread=fitted, centre_source=fitted)
    state = initial_state(source, target, cell.capacity, seed=0, schedule=cell.schedule)
    assert (state.write_rates is not None) == (state.source_mean is not None) == fitted
    if fitted:
        torch.testing.assert_close(state.write_rates, write_rates(target))
        torch.testing.assert_close(state.source_mean, source.mean(dim=0) * state.source_scale)


def test_initial_state_is_reproducible_and_depends_on_the_seed() -> None:
    source, target = make_window()
    capacity = make_cell(dict_size=64).capacity
    first, again, other = (initial_state(source, target, capacity, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True))
    assert not torch.equal(first.params.W_enc, other.params.W_enc)


def test_decoder_rows_start_at_unit_norm_and_distinct() -> None:
    source, target = make_window(n=50)
    params = initial_state(source, target, make_cell(dict_size=128).capacity, seed=0).params
    torch.testing.assert_close(params.W_dec.norm(dim=1), torch.ones(128))
    cosines = params.W_dec @ params.W_dec.T - torch.eye(128)
    assert float(cosines.max()) < 1 - 1e-5


def test_encoder_scale_is_the_least_squares_one() -> None:
    source, target = make_window()
    cell = make_cell(dict_size=64)
    state = initial_state(source, target, cell.capacity, seed=0)
    x, y = source * state.source_scale, target * state.target_scale
    assert least_squares_scale(state.params, x, y, cell.capacity) == pytest.approx(1, rel=1e-4)

    def error(scale: float) -> float:
        latents = select(pre_latents(state.params, x), cell.capacity) * scale
        return float((latents @ state.params.W_dec + state.params.b_dec - y).square().sum())

    assert error(1.0) < error(1.05)
    assert error(1.0) < error(0.95)


def test_sample_pairs_uses_each_token_once_a_round() -> None:
    first, second = sample_pairs(10, 25, torch.Generator().manual_seed(0))
    assert sorted(first[:10].tolist()) == list(range(10))
    assert sorted(first[10:20].tolist()) == list(range(10))
    assert second[:10].eq(-1).all()
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    assert len(set(pairs)) == 25
    assert all(a != b for a, b in pairs)
