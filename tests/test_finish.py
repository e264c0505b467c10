"""The fitted threshold gives the asked number of latents, exactly and streaming."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell

from sweep import finish as module
from sweep.finish import finish, fit_threshold
from sweep.initialise import initial_state
from sweep.language_model import Activations
from sweep.transcoder import Parameters, pre_latents

CHUNK = 128


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Many small chunks, so that the bound is raised on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", CHUNK)
        yield


def params(width: int, seed: int) -> Parameters:
    g = torch.Generator().manual_seed(seed)
    return Parameters(
        torch.randn(6, width, generator=g), torch.randn(width, generator=g), torch.randn(width, 5), torch.randn(5)
    )


@given(st.integers(1, 40), st.integers(1, 8), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 50))
def test_fit_threshold_is_the_pooled_quantile(width: int, top_k: int, sizes: list[int], seed: int) -> None:
    rows = max(CHUNK // width, 1)
    p, sources = params(width, seed), [torch.randn(size, 6) for size in sizes]
    threshold = fit_threshold(p, sources, sum(sizes), top_k)
    pre = torch.cat([pre_latents(p, chunk) for source in sources for chunk in source.split(rows)]).flatten()
    n_wanted = top_k * sum(sizes)
    n_active = int((pre > threshold).sum())
    assert threshold >= 0
    assert n_active == min(n_wanted, int((pre > 0).sum()))


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    source = torch.randn(400, 32, generator=g) * 3
    return source, source @ torch.randn(32, 32, generator=g)


def test_finish_fits_batch_top_k_and_leaves_top_k_alone() -> None:
    source, target = make_data()
    for activation in ("batch_top_k", "top_k"):
        cell = make_cell(activation=activation)
        state = initial_state(source, target, cell.capacity, seed=0)
        split = [Activations(source[:200], target[:200]), Activations(source[200:], target[200:])]
        transcoder = finish(state, cell, split)
        latents = transcoder.encode(source)
        assert (transcoder.threshold is None) == (activation == "top_k")
        assert float((latents > 0).sum(dim=1).float().mean()) == 4.0


def test_activations_in_bfloat16_are_rounded_once() -> None:
    """As they come; not again when they are scaled, which training does in float32."""
    source, target = make_data()
    source[:, 0] *= 30
    rounded = Activations(source.bfloat16(), target.bfloat16())
    cell = make_cell()
    state = initial_state(*(tensor.float() for tensor in rounded), cell.capacity, seed=0)
    as_float32 = finish(state, cell, [Activations(*(tensor.float() for tensor in rounded))])
    assert as_float32.threshold is not None
    assert torch.equal(finish(state, cell, [rounded]).threshold, as_float32.threshold)


def test_what_is_saved_predicts_as_training_does_in_raw_units() -> None:
    source, target = make_data()
    cell = make_cell(skip=True)
    state = initial_state(source, target, cell.capacity, seed=0)
    assert state.params.W_skip is not None and state.params.W_skip.eq(0).all()
    p = state.params.map(lambda tensor: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    state.params = p
    transcoder = finish(state, cell, [Activations(source, target)])
    scaled = source * state.source_scale
    pre = scaled @ p.W_enc + p.b_enc
    least = pre.flatten().topk(1601).values[-1]
    kept = torch.where(pre > least, pre, 0)
    wanted = (kept @ p.W_dec + p.b_dec + scaled @ p.W_skip) / state.target_scale
    found = transcoder.decode(transcoder.encode(source), source)
    clear = ((pre - least).abs() > 1e-5 * least).all(dim=1)  # what lies at the threshold may fall to either side
    assert clear.sum() >= len(source) - 2
    torch.testing.assert_close(found[clear], wanted[clear], rtol=1e-3, atol=1e-3)


def test_finish_changes_nothing_in_the_state() -> None:
    source, target = make_data()
    cell = make_cell()
    state = initial_state(source, target, cell.capacity, seed=0)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    transcoder = finish(state, cell, [Activations(source, target)])
    transcoder.W_dec.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
