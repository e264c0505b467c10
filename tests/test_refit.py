"""Decoder, bias and linear map in closed form, against references that hold every latent of every token."""

from dataclasses import replace
from itertools import chain, islice, pairwise
from typing import Any

import pytest
import torch
from make import make_cell
from torch import Tensor

from sweep import refit as module
from sweep.config import Capacity
from sweep.finish import finish
from sweep.initialise import initial_state
from sweep.language_model import Activations
from sweep.refit import Normal, in_chunks, iterates, loss, refit, stacked, unstacked
from sweep.step import active
from sweep.step.entries import in_columns
from sweep.step.loss import transcoder_loss
from sweep.transcoder import Parameters, select

N, D_IN, D_OUT = 300, 7, 5


@pytest.fixture(autouse=True)
def small_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 70)
    monkeypatch.setattr(module, "DAMPING", 0.0)  # moments are exact in float64
    monkeypatch.setattr(active, "MIN_BLOCK", 7)
    for rule in active.BLOCK_BYTES:
        monkeypatch.setitem(active.BLOCK_BYTES, rule, 2000)


def case(**options: Any) -> tuple[Parameters, Capacity, Activations, float | None]:
    """Random weights and activations in float64, and the threshold at which the activation rule is inference's."""
    g = torch.Generator().manual_seed(0)
    capacity = make_cell(dict_size=24, top_k=3, group_fractions=[0.25, 0.5, 1.0], **options).capacity
    shapes = {"W_enc": (D_IN, 24), "b_enc": (24,), "W_dec": (24, D_OUT), "b_dec": (D_OUT,)}
    if capacity.skip:
        shapes["W_skip"] = (D_IN, D_OUT)
    params = Parameters(**{name: torch.randn(s, generator=g, dtype=torch.float64) for name, s in shapes.items()})
    params.b_enc[5] = -1e3  # never active
    source = torch.randn(N, D_IN, generator=g, dtype=torch.float64) + 1
    target = source @ torch.randn(D_IN, D_OUT, generator=g, dtype=torch.float64).tanh()
    target += torch.randn(N, D_OUT, generator=g, dtype=torch.float64) / 2
    threshold = None
    if capacity.activation == "batch_top_k":
        chosen = select(source @ params.W_enc + params.b_enc, capacity)
        threshold = float(chosen[chosen > 0].min()) - 1e-9
    return params, capacity, Activations(source, target), threshold


def design(params: Parameters, capacity: Capacity, data: Activations) -> tuple[Tensor, Tensor]:
    """The same least squares with every prefix's latents written out."""
    latents = select(data.source @ params.W_enc + params.b_enc, capacity)
    shared = [data.source] if capacity.skip else []
    prefixes = [torch.where(torch.arange(24) < end, latents, 0) for end in capacity.groups]
    rows = [torch.cat([prefix, *shared, torch.ones(N, 1, dtype=torch.float64)], dim=1) for prefix in prefixes]
    roots = torch.tensor(capacity.shares, dtype=torch.float64).sqrt().repeat_interleave(N).unsqueeze(1)
    return torch.cat(rows) * roots, data.target.repeat(len(rows), 1) * roots


def with_prior(params: Parameters, x: Tensor, y: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """And rows that hold each latent to its weights."""
    held = prior**0.5 * torch.eye(24, x.shape[1], dtype=torch.float64)
    return torch.cat([x, held]), torch.cat([y, prior**0.5 * params.W_dec])


def prior_of(params: Parameters, x: Tensor, y: Tensor) -> float:
    """The variance of noise over that of weights."""
    noise = float((x @ stacked(params) - y).square().sum()) / (N * D_OUT)
    return noise / (module.PRIOR_VARIANCE * float(params.W_dec.square().mean()))


def fitted(
    params: Parameters, capacity: Capacity, threshold: float | None, data: Activations, n: int, prior: float
) -> Parameters:
    """After n iterations, whatever they do to other tokens."""
    normal = Normal.of(list(in_chunks(params, capacity, threshold, data)), capacity, prior)
    columns, trained = zip(*in_columns(stacked(params)), strict=True)
    weights = next(islice(chain([trained], iterates(normal, columns, trained)), n, None))
    return unstacked(torch.cat(weights, dim=1), params)


CASES = [
    {"activation": activation, "skip": skip, "prefix_weight": weight}
    for activation in ("batch_top_k", "top_k")
    for skip in (True, False)
    for weight in (1.0, 0.3)
]


@pytest.mark.parametrize("options", CASES)
def test_many_iterations_end_at_the_least_squares(options: dict[str, Any]) -> None:
    params, capacity, data, threshold = case(**options)
    x, y = design(params, capacity, data)
    prior = prior_of(params, x, y)
    wanted = torch.linalg.lstsq(*with_prior(params, x, y, prior), driver="gelsd").solution
    found = fitted(params, capacity, threshold, data, 200, prior)
    torch.testing.assert_close(x @ stacked(found), x @ wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.W_dec[5], params.W_dec[5])
    assert torch.equal(found.W_enc, params.W_enc)


@pytest.mark.parametrize("options", CASES)
def test_there_without_a_prior_the_training_loss_has_no_gradient_left(options: dict[str, Any]) -> None:
    params, capacity, data, threshold = case(**options)
    cell = make_cell()

    def gradients(params: Parameters) -> list[Tensor]:
        leaves = params.map(lambda tensor: tensor.clone().requires_grad_(True))
        total = transcoder_loss(
            leaves, *data, capacity, cell.revival, torch.zeros_like(params.b_enc, dtype=torch.bool)
        ).total
        behind = [tensor for name, tensor in leaves.items() if not name.endswith("enc")]
        return list(torch.autograd.grad(total, behind))

    assert all(float(g.abs().max()) > 1e-2 for g in gradients(params))
    found = fitted(params, capacity, threshold, data, 200, prior=0.0)
    assert all(float(g.abs().max()) < 1e-6 for g in gradients(found))


def test_each_iteration_lowers_the_loss() -> None:
    params, capacity, data, threshold = case(skip=True)
    x, y = design(params, capacity, data)
    prior = prior_of(params, x, y)
    held, wanted = with_prior(params, x, y, prior)
    each = [fitted(params, capacity, threshold, data, n, prior) for n in range(5)]
    losses = [float((held @ stacked(found) - wanted).square().sum()) for found in each]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5


@pytest.mark.parametrize("options", CASES)
def test_what_tokens_share_is_always_the_best_for_the_latents(options: dict[str, Any]) -> None:
    params, capacity, data, threshold = case(**options)
    x, y = design(params, capacity, data)
    for n in (1, 2):
        left = y - x @ stacked(fitted(params, capacity, threshold, data, n, prior=2.0))
        gradient = x[:, 24:].T @ left
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0, 1000.0])
def test_sources_and_latents_that_repeat_each_other_do_no_harm(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # in float32, with what damps there
    params, capacity, data, _ = case(skip=True, activation="batch_top_k")
    params, source = params.map(lambda tensor: tensor.float()), data.source.float()
    source[:, 1], source[:, 2], source[:, 3] = source[:, 0], 0.0, offset + source[:, 4]
    params.W_enc[:, :2], params.b_enc[:2] = 0.0, 100.0
    params.W_enc[4, :2] = 1.0  # two equal latents, always active
    designs = list(in_chunks(params, capacity, 0.0, Activations(source, data.target.float())))
    columns, trained = zip(*in_columns(stacked(params)), strict=True)
    fits = iterates(Normal.of(designs, capacity, 0.0), columns, trained)
    losses = [loss(designs, weights, columns) for weights in islice(fits, 10)]
    assert losses[-1] < 1e-3 * loss(designs, trained, columns)
    assert losses[-1] < 1.01 * min(losses)


@pytest.mark.parametrize("options", CASES)
def test_the_prior_is_that_of_the_noise_on_calibration_and_each_iteration_is_told(options: dict[str, Any]) -> None:
    params, capacity, data, threshold = case(**options)
    told: list[int] = []
    found = refit(params, capacity, threshold, data, data, 3, told.append)
    expected = fitted(params, capacity, threshold, data, 3, prior_of(params, *design(params, capacity, data)))
    torch.testing.assert_close(stacked(found), stacked(expected), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(stacked(found), stacked(fitted(params, capacity, threshold, data, 3, 0.0)), rtol=1e-4)
    assert [n for n in told if n] == [1, 2, 3, 3]


def test_fitted_to_few_tokens_it_predicts_others_better_by_the_prior() -> None:
    params, capacity, data, threshold = case(skip=False)
    few, others = (Activations(*(tensor[part] for tensor in data)) for part in (slice(20), slice(20, None)))
    trained = fitted(params, capacity, threshold, others, 200, prior=0.0)
    x, y = design(trained, capacity, data)

    def error(prior: float) -> float:
        found = fitted(trained, capacity, threshold, few, 200, prior)
        return float((x @ stacked(found) - y).view(-1, N, D_OUT)[:, 20:].square().sum())

    assert error(prior_of(trained, x, y)) < 0.97 * error(0.0)


def test_it_stops_where_calibration_gets_no_better() -> None:
    params, capacity, data, threshold = case(skip=True)
    x, _ = design(params, capacity, data)
    as_trained = Activations(data.source, (x @ stacked(params))[-N:] / capacity.shares[-1] ** 0.5)
    unnested = replace(capacity, groups=(24,))
    found = refit(params, unnested, threshold, data, as_trained, 50)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), params.tensors(), strict=True))


def test_it_stops_where_an_iteration_gains_little() -> None:
    params, capacity, data, threshold = case(skip=True)
    x, y = design(params, capacity, data)
    told: list[int] = []
    found = refit(params, capacity, threshold, data, data, 50, told.append)
    last = told[-2]
    each = [fitted(params, capacity, threshold, data, n, prior_of(params, x, y)) for n in range(last + 1)]
    losses = [float((x @ stacked(one) - y).square().sum()) for one in each]
    gains = [1 - after / before for before, after in pairwise(losses)]
    assert 1 < last < 20 and told[-1] == 50
    assert gains[-1] < module.WORTHWHILE <= min(gains[:-1])
    torch.testing.assert_close(stacked(found), stacked(each[-1] if gains[-1] > 0 else each[-2]), rtol=1e-9, atol=1e-9)


def test_a_finished_cell_is_fitted_where_its_schedule_asks_for_it() -> None:
    g = torch.Generator().manual_seed(0)
    source = torch.randn(400, 32, generator=g) * 3
    data = Activations(source, (source @ torch.randn(32, 32, generator=g)).relu() * 20)
    cell = make_cell(skip=True, refit_iterations=5)
    state = initial_state(*data, cell.capacity, seed=0)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}

    def error(sample: list[Activations]) -> float:
        transcoder = finish(state, cell, [data], sample)
        return float((transcoder.decode(transcoder.encode(source), source) - data.target).square().mean())

    assert error([data]) < 0.8 * error([])
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
