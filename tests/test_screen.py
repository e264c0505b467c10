"""Bounds by products in bfloat16: they hold, and what is found by them is what the exact values of everything say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sweep import chunks
from sweep.bfloat16 import has_fast_bfloat16
from sweep.config import Capacity
from sweep.step import active, screen
from sweep.step.active import encode, encode_above
from sweep.step.entries import Active
from sweep.step.revive import among_dead
from sweep.step.screen import Screen
from sweep.transcoder import Parameters, select

BATCH, D_IN, WIDTH = 32, 24, 100
NONE = torch.zeros(0, dtype=torch.int64)


def make(seed: int, spread: float, mean: float, bias: float, whole_numbers: bool) -> tuple[Parameters, Tensor]:
    """Weights and sources; dimensions, latents and tokens differ in size by up to e to the `spread`."""
    g = torch.Generator().manual_seed(seed)

    def sizes(n: int) -> Tensor:
        return ((torch.rand(n, generator=g) - 0.5) * spread).exp()

    weights = torch.randn(WIDTH, D_IN, generator=g) * sizes(D_IN) * sizes(WIDTH).unsqueeze(1)
    source = torch.randn(BATCH, D_IN, generator=g) * sizes(D_IN) * sizes(BATCH).unsqueeze(1) + mean * sizes(D_IN)
    biases = torch.randn(WIDTH, generator=g) * bias
    if whole_numbers:
        weights, source, biases = weights.round(), source.round(), biases.round()
    params = Parameters(weights.T, biases, torch.zeros(WIDTH, 1), torch.zeros(1))
    return params, source


made = given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 2.0, 20.0]),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    bias=st.sampled_from([0.0, 1.0, 1e3]),
    whole_numbers=st.booleans(),
)


@pytest.fixture(autouse=True)
def few_tokens_of_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: five where six latents are dead, one where nearly all are."""
    monkeypatch.setattr(chunks, "MAX_BYTES", 5 * 6 * 4)


def everything(bounds: Screen) -> Active:
    """Every entry whose bound is positive, by way of blocks that divide nothing."""
    return Active.join([bounds.above(latents, block, 1e-30) for latents, block in bounds.blocks(7 * 2 * BATCH)])


def exactly(params: Parameters, source: Tensor) -> Tensor:
    """All pre-latents, computed as those of chosen entries are."""
    token = torch.arange(BATCH).repeat_interleave(WIDTH)
    every = Screen(params, source).exact(Active(token, torch.arange(WIDTH).repeat(BATCH), token.float()))
    return torch.empty(BATCH, WIDTH).index_put((every.token, every.latent), every.value)


@made
@settings(max_examples=60, deadline=None)
def test_pre_latents_lie_between_their_bounds(
    seed: int, spread: float, mean: float, bias: float, whole_numbers: bool
) -> None:
    params, source = make(seed, spread, mean, bias, whole_numbers)
    bounds = Screen(params, source)
    exact = source.double() @ params.W_enc.double() + params.b_enc.double()
    found = everything(bounds)
    at = found.token, found.latent
    assert bounds.hold
    assert (exact[at] <= found.value.double()).all()
    assert (exact[at] >= bounds.below(found).double()).all()
    missing = torch.ones_like(exact, dtype=torch.bool).index_put(at, torch.tensor(False))
    assert (exact[missing] < 1e-30).all()
    own = bounds.exact(found)
    scale = source.norm(dim=1)[own.token] * params.W_enc.norm(dim=0)[own.latent] + params.b_enc[own.latent].abs()
    assert ((own.value - exact[own.token, own.latent]).abs() <= 1e-5 * scale).all()


@made
@settings(max_examples=60, deadline=None)
def test_the_largest_of_a_batch_are_those_of_all_exact_values(
    seed: int, spread: float, mean: float, bias: float, whole_numbers: bool
) -> None:
    params, source = make(seed, spread, mean, bias, whole_numbers)
    some = torch.tensor([0, 7, 8, 9, 50, WIDTH - 1])
    for dead in (NONE, some, torch.arange(1, WIDTH)):
        pre = exactly(params, source)
        pre[:, dead] = torch.addmm(params.b_enc[dead], source, params.W_enc.T[dead].T)
        of_dead, _ = among_dead(params, source, dead, 1, -torch.inf)  # rounds by how many tokens come at once
        scale = source.norm(dim=1)[of_dead.token] * params.W_enc.norm(dim=0)[of_dead.latent]
        scale = scale + params.b_enc[of_dead.latent].abs()
        assert ((of_dead.value - pre[of_dead.token, of_dead.latent]).abs() <= 1e-5 * scale).all()
        pre[of_dead.token, of_dead.latent] = of_dead.value
        assert len(of_dead.value) == BATCH * len(dead)
        for top_k, guess in ((1, 0.0), (5, 0.0), (5, 1e9), (WIDTH, 0.0)):
            cap = Capacity(WIDTH, top_k, "batch_top_k", (WIDTH,))
            wanted = select(pre, cap)
            for threshold in (guess, float(wanted[wanted > 0].min())):
                found = searched_among_bounds(params, source, cap, threshold, dead)
                place = found.token * WIDTH + found.latent
                assert place.diff().gt(0).all()
                sparse = torch.zeros(BATCH, WIDTH).index_put((found.token, found.latent), found.value)
                assert torch.equal(sparse, wanted)


@made
@settings(max_examples=30, deadline=None)
def test_entries_above_a_threshold_are_those_of_all_exact_values(
    seed: int, spread: float, mean: float, bias: float, whole_numbers: bool
) -> None:
    params, source = make(seed, spread, mean, bias, whole_numbers)
    pre = exactly(params, source)
    ranked = pre.flatten().sort().values
    for threshold in (0.0, float(ranked[-50].clamp_min(0)), float(ranked[-1])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(screen, "pays", lambda source: True)
            patch.setattr(active, "pre_latents_in_blocks", None)
            found = encode_above(params, source, threshold)
        assert torch.equal(found.token * WIDTH + found.latent, (pre > threshold).flatten().nonzero().squeeze(1))
        assert torch.equal(found.value, pre[pre > threshold])


def test_where_bounds_tell_nothing_apart_exact_values_do(monkeypatch: pytest.MonkeyPatch) -> None:
    params, source = make(0, 0.0, 0.0, 1.0, False)
    params.W_enc[0] = 0.0
    source[:, 0] = 1e6 * torch.randn(BATCH, generator=torch.Generator().manual_seed(1))
    cap = Capacity(WIDTH, 2, "batch_top_k", (WIDTH,))
    monkeypatch.setattr(active, "BLOCK_BYTES", {"batch_top_k": 7 * 4 * BATCH})
    wanted = select(source @ params.W_enc + params.b_enc, cap)
    for threshold in (0.0, float(wanted[wanted > 0].min())):
        monkeypatch.setattr(screen, "pays", lambda source: True)
        assert active.screened(Screen(params, source), 2 * BATCH, threshold, lambda least: None) is None
        found, _ = encode(params, source, cap, threshold, NONE, 1)
        assert torch.equal(found.token * WIDTH + found.latent, wanted.flatten().nonzero().squeeze(1))


def searched_among_bounds(params: Parameters, source: Tensor, cap: Capacity, threshold: float, dead: Tensor) -> Active:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "pays", lambda source: True)
        patch.setattr(active, "BLOCK_BYTES", {"batch_top_k": 7 * 2 * BATCH})
        patch.setattr(active, "MOST_KEPT", WIDTH)
        patch.setattr(active, "searched", None)  # the exact search
        return encode(params, source, cap, threshold, dead, 1)[0]


def test_what_is_no_number_has_no_bounds() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for where in ("W_enc", "b_enc", "source"):
            params, source = make(0, 2.0, 0.0, 1.0, False)
            tensor = source if where == "source" else getattr(params, where)
            tensor[..., 3] = value
            bounds = Screen(params, source)
            everything(bounds)
            assert not bounds.hold


def test_where_all_are_dead_there_is_nothing_to_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    params, source = make(0, 0.0, 0.0, 1.0, False)
    cap, dead = Capacity(WIDTH, 2, "batch_top_k", (WIDTH,)), torch.arange(WIDTH)
    monkeypatch.setattr(screen, "pays", lambda source: True)
    found, revived = encode(params, source, cap, 0.0, dead, 1)
    pre = source @ params.W_enc + params.b_enc
    assert torch.equal(found.token * WIDTH + found.latent, select(pre, cap).flatten().nonzero().squeeze(1))
    assert revived is not None
    assert torch.equal(revived.place.squeeze(1), pre.argmax(dim=1))


def test_it_is_the_processor_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.zeros(1, 1)
    for fast in (True, False):
        monkeypatch.setattr(screen, "has_fast_bfloat16", lambda fast=fast: fast)
        assert screen.pays(source) is fast
        assert not screen.pays(source.double())
        assert not screen.pays(source.to("meta"))


@pytest.mark.parametrize(
    ("name", "units", "fast"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C", {"avx512_bf16", "amx_bf16"}, True),
        ("Intel(R) Xeon(R) Platinum 8380H", {"avx512_bf16"}, False),
        ("AMD EPYC", {"avx512_bf16"}, True),
        ("AMD EPYC", set(), False),
    ],
)
def test_which_processors_are_fast_at_bfloat16(
    name: str, units: set[str], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"cpu_name": name} | {unit: unit in units for unit in ("avx512_bf16", "amx_bf16")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert has_fast_bfloat16.__wrapped__() is fast


def test_a_torch_that_tells_nothing_of_the_processor_is_taken_for_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_fast_bfloat16.__wrapped__() is False
