"""Bounds by products of rounded factors: they hold, and what is found by them is what the exact values of all say."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sweep import chunks, processor
from sweep.config import Capacity
from sweep.processor import has_fast_bfloat16, has_fast_int8, int8_product
from sweep.step import active, bounds, screen, shortlist
from sweep.step.active import encode, encode_above
from sweep.step.bfloat16 import BFloat16Bounds
from sweep.step.bounds import Bounds
from sweep.step.entries import Active, products
from sweep.step.int8 import Int8Bounds, spread
from sweep.step.revive import among_dead
from sweep.transcoder import Parameters, select

BATCH, WIDTH = 32, 100
NONE = torch.zeros(0, dtype=torch.int64)


def make(
    seed: int, spread: float, mean: float, bias: float, whole_numbers: bool, d_in: int = 24
) -> tuple[Parameters, Tensor]:
    """Weights and sources; dimensions, latents and tokens differ in size by up to e to the `spread`."""
    g = torch.Generator().manual_seed(seed)

    def sizes(n: int) -> Tensor:
        return ((torch.rand(n, generator=g) - 0.5) * spread).exp()

    weights = torch.randn(WIDTH, d_in, generator=g) * sizes(d_in) * sizes(WIDTH).unsqueeze(1)
    source = torch.randn(BATCH, d_in, generator=g) * sizes(d_in) * sizes(BATCH).unsqueeze(1) + mean * sizes(d_in)
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
    d_in=st.sampled_from([24, 2, 3]),  # in few dimensions errors come near their bounds
)


KINDS = (BFloat16Bounds, Int8Bounds)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def small_and_exact(exact_integers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of seven latents, which divide nothing; of the dead at once five tokens where six latents are, one where
    nearly all are."""
    monkeypatch.setattr(chunks, "MAX_BYTES", 5 * 6 * 4)
    for kind in KINDS:
        monkeypatch.setattr(kind, "block_bytes", 7 * kind.element_bytes * BATCH)


def exactly(params: Parameters, source: Tensor) -> Tensor:
    """All pre-latents, computed as those of chosen entries are."""
    starts, latents = torch.arange(BATCH + 1) * WIDTH, torch.arange(WIDTH).repeat(BATCH)
    return products(source, params.W_enc.T, starts, latents).view(BATCH, WIDTH) + params.b_enc


def searched_by(kind: type[Bounds]) -> Callable[[pytest.MonkeyPatch], None]:
    """Look among these bounds, never among all pre-latents, however many are left."""

    def prepare(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(screen, "fitting", lambda source, share: kind)
        patch.setattr(bounds, "MOST_CANDIDATES", 1)
        patch.setattr(active, "searched", None)
        patch.setattr(active, "pre_latents_in_blocks", None)

    return prepare


@each_kind
@made
@settings(max_examples=60, deadline=None)
def test_no_large_pre_latent_is_missed(
    kind: type[Bounds], seed: int, spread: float, mean: float, bias: float, whole_numbers: bool, d_in: int
) -> None:
    params, source = make(seed, spread, mean, bias, whole_numbers, d_in)
    exact, own = source.double() @ params.W_enc.double() + params.b_enc.double(), exactly(params, source)
    scale = source.norm(dim=1).unsqueeze(1) * params.W_enc.norm(dim=0) + params.b_enc.abs()
    assert ((own - exact).abs() <= 1e-5 * scale).all()
    ranked = exact.flatten().sort(descending=True).values
    for least in (1e-30, *(float(ranked[rank].clamp_min(1e-30)) for rank in (0, 5, 50, 200, 500, 800, 1200))):
        looked = kind(params, source)
        parts = []
        for block in looked.blocks():
            weights = params.W_enc.T[block] * looked.stretch
            token, column = looked.candidates(weights, params.b_enc[block], least)
            seen = torch.zeros(BATCH, len(weights), dtype=torch.bool).index_put((token, column), torch.tensor(True))
            assert seen[exact[:, block] >= least].all()
            assert (token * WIDTH + column).diff().gt(0).all()
            parts.append(looked.at_least(block, least))
        assert looked.hold
        found = Active.join(parts)
        dense = torch.zeros(BATCH, WIDTH).index_put((found.token, found.latent), found.value)
        assert torch.equal(dense, torch.where(own >= least, own, 0))


@pytest.mark.parametrize(("kind", "width"), [(BFloat16Bounds, 48), (Int8Bounds, 24)])
def test_bounds_hold_where_all_errors_add_up(kind: type[Bounds], width: int) -> None:
    """Each element but the largest is rounded down by a quarter, and multiplied by the same: so errors are as Cauchy
    and Schwarz say, which those of random numbers are far from."""
    d_in, n = 24, 48
    uneven = torch.randint(64, 127, (n, d_in), generator=torch.Generator().manual_seed(0)) + 0.24
    uneven[torch.arange(n), torch.arange(n) % d_in] = 127.0
    for half, weights in ((uneven, torch.ones(n, d_in)), (torch.ones(n, d_in), uneven)):
        source = torch.cat([half, -half])  # without a mean
        params = Parameters(weights.T, torch.zeros(n), torch.zeros(n, 1), torch.zeros(1))
        exact = source.double() @ weights.T.double()
        for least in exact[exact > 0].unique().tolist():
            seen = torch.zeros(2 * n, n, dtype=torch.bool)
            looked = kind(params, source)
            seen[looked.candidates(weights * looked.stretch, params.b_enc, least)] = True
            assert seen[exact >= least].all()
            assert not seen[exact < least - width].any()


@pytest.mark.parametrize(("kind", "most"), [(BFloat16Bounds, 1.5), (Int8Bounds, 4)])
def test_few_are_looked_at_in_vain(kind: type[Bounds], most: float) -> None:
    """Also where two dimensions are a hundred times as large as the others."""
    g = torch.Generator().manual_seed(0)
    for size in (1.0, 100.0):
        source, weights = torch.randn(BATCH, 512, generator=g), torch.randn(WIDTH, 512, generator=g)
        source[:, :2] *= size
        weights[:, :2] /= size
        params = Parameters(weights.T, torch.randn(WIDTH, generator=g), torch.zeros(WIDTH, 1), torch.zeros(1))
        least = float(exactly(params, source).flatten().sort().values[-BATCH])
        looked = kind(params, source)
        assert sum(len(looked.at_least(block, least).value) for block in looked.blocks()) == BATCH
        assert BATCH <= looked.n_candidates < most * BATCH


@pytest.mark.parametrize("length", [1.0, 1.25])
@made
@settings(max_examples=60, deadline=None)
def test_the_largest_of_each_token_by_bounds_are_those_of_all_values(
    length: float, seed: int, spread: float, mean: float, bias: float, whole_numbers: bool, d_in: int
) -> None:
    params, source = make(seed, spread, mean, bias, whole_numbers, d_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortlist, "LENGTH", length)  # 1: a token whose bounds are in another order gets all its values
        patch.setattr(shortlist, "BLOCK_BYTES", 5 * 2 * 51)
        patch.setattr(shortlist, "TOKENS", 7)
        for among in (torch.arange(WIDTH), torch.arange(0, WIDTH, 2), torch.tensor([3, 50, 99])):
            exact = (source.double() @ params.W_enc.double() + params.b_enc.double())[:, among]
            off = 1e-5 * (source.norm(dim=1) * params.W_enc.norm(dim=0).max() + params.b_enc.abs().max()).unsqueeze(1)
            for k in (1, 3):
                found = shortlist.largest_by_bounds(BFloat16Bounds(params, source), among, k)
                assert found is not None
                place, value = found
                assert bool((place.diff(dim=1) > 0).all())
                assert bool(((value - exact.gather(1, place)).abs() <= off).all())
                wanted = exact.topk(k, dim=1).values
                assert bool(((value.sort(dim=1, descending=True).values - wanted).abs() <= off).all())


def test_few_tokens_get_all_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    rows, source = torch.randn(2000, 64, generator=g), torch.randn(50, 64, generator=g)
    params = Parameters(rows.T, torch.full((2000,), -10.0), rows, torch.zeros(64))
    n_exact: list[int] = []

    def product(left: Tensor, right: Tensor) -> Tensor:
        n_exact.append(len(left))
        return left @ right.T

    monkeypatch.setattr(shortlist, "aligned_product", product)
    everything = torch.arange(2000)
    assert shortlist.largest_by_bounds(BFloat16Bounds(params, source), everything, 60) is not None
    assert sum(n_exact) <= 2
    params.W_enc[0, 0] = torch.nan
    assert shortlist.largest_by_bounds(BFloat16Bounds(params, source), everything, 60) is None


@each_kind
@made
@settings(max_examples=60, deadline=None)
def test_the_largest_of_a_batch_are_those_of_all_exact_values(
    kind: type[Bounds], seed: int, spread: float, mean: float, bias: float, whole_numbers: bool, d_in: int
) -> None:
    params, source = make(seed, spread, mean, bias, whole_numbers, d_in)
    some = torch.tensor([0, 7, 8, 9, 50, WIDTH - 1])
    for dead in (NONE, some, torch.arange(1, WIDTH)):
        pre = exactly(params, source)
        pre[:, dead] = torch.addmm(params.b_enc[dead], source, params.W_enc.T[dead].T)
        # among the dead apart, as it rounds by how many tokens come at once
        of_dead, _ = among_dead(params, source, dead, 1, kind(params, source), -torch.inf)
        scale = source.norm(dim=1)[of_dead.token] * params.W_enc.norm(dim=0)[of_dead.latent]
        scale = scale + params.b_enc[of_dead.latent].abs()
        assert ((of_dead.value - pre[of_dead.token, of_dead.latent]).abs() <= 1e-5 * scale).all()
        pre[of_dead.token, of_dead.latent] = of_dead.value
        assert len(of_dead.value) == BATCH * len(dead)
        for top_k, guess in ((1, 0.0), (5, 0.0), (5, 1e9), (WIDTH, 0.0)):
            cap = Capacity(WIDTH, top_k, "batch_top_k", (WIDTH,))
            wanted = select(pre, cap)
            for start in (guess, float(wanted[wanted > 0].min())):
                with pytest.MonkeyPatch.context() as patch:
                    searched_by(kind)(patch)
                    found = encode(params, source, cap, start, dead, 1)[0]
                place = found.token * WIDTH + found.latent
                assert place.diff().gt(0).all()
                sparse = torch.zeros(BATCH, WIDTH).index_put((found.token, found.latent), found.value)
                assert torch.equal(sparse, wanted)


@each_kind
@made
@settings(max_examples=30, deadline=None)
def test_entries_above_a_threshold_are_those_of_all_exact_values(
    kind: type[Bounds], seed: int, spread: float, mean: float, bias: float, whole_numbers: bool, d_in: int
) -> None:
    params, source = make(seed, spread, mean, bias, whole_numbers, d_in)
    pre = exactly(params, source)
    ranked = pre.flatten().sort().values
    for threshold in (0.0, float(ranked[-50].clamp_min(0)), float(ranked[-1])):
        with pytest.MonkeyPatch.context() as patch:
            searched_by(kind)(patch)
            found = encode_above(params, source, threshold, 1)
        assert torch.equal(found.token * WIDTH + found.latent, (pre > threshold).flatten().nonzero().squeeze(1))
        assert torch.equal(found.value, pre[pre > threshold])


@each_kind
def test_where_bounds_tell_nothing_apart_exact_values_do(kind: type[Bounds], monkeypatch: pytest.MonkeyPatch) -> None:
    params, source = make(0, 0.0, 0.0, 1.0, False)
    params.W_enc[0] = 0.0
    source[:, 0] = 1e6 * torch.randn(BATCH, generator=torch.Generator().manual_seed(1))
    cap = Capacity(WIDTH, 2, "batch_top_k", (WIDTH,))
    pre = source @ params.W_enc + params.b_enc
    wanted = select(pre, cap)
    least = float(wanted[wanted > 0].min())
    monkeypatch.setattr(screen, "fitting", lambda source, share: kind)
    for start in (0.0, least):
        assert active.screened(kind(params, source), 2 * BATCH, start, lambda least: None) is None
        found, _ = encode(params, source, cap, start, NONE, 1)
        assert torch.equal(found.token * WIDTH + found.latent, wanted.flatten().nonzero().squeeze(1))
    above = encode_above(params, source, least, 2)
    assert torch.equal(above.token * WIDTH + above.latent, (pre > least).flatten().nonzero().squeeze(1))


@each_kind
def test_what_is_no_number_has_no_bounds(kind: type[Bounds]) -> None:
    for value in (torch.nan, torch.inf, -torch.inf, torch.finfo(torch.float32).max):  # the last: rounded up, infinite
        for where in ("W_enc", "b_enc", "source"):
            params, source = make(0, 2.0, 0.0, 1.0, False)
            tensor = source if where == "source" else getattr(params, where)
            tensor[..., 3] = value
            looked = kind(params, source)
            for block in looked.blocks():
                looked.at_least(block, 1e-30)
            assert not looked.hold
            assert not looked.serve


def test_numbers_are_spread_over_columns() -> None:
    values = torch.tensor([-129.0, -1, 0, 1, 5, 600])
    for n_columns in (1, 2, 7):
        parts = spread(values, n_columns)
        assert torch.equal(parts.sum(dim=1), values)
        assert (parts.amax(dim=1) - parts.amin(dim=1)).max() <= 1


def test_products_of_integers_are_exact() -> None:
    if not has_fast_int8():
        pytest.skip("this processor has no instruction for them")
    g = torch.Generator().manual_seed(0)
    for m, n, d in itertools.product((1, 7, 33, 64), (1, 5, 96), (1, 2, 3, 17, 64, 664)):
        left, right = (torch.randint(-127, 128, (size, d), generator=g, dtype=torch.int8) for size in (m, n))
        out = torch.empty(m, n, dtype=torch.int32)
        assert torch.equal(int8_product(left, right, out), left.int() @ right.int().T)


def test_where_all_are_dead_there_is_nothing_to_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    params, source = make(0, 0.0, 0.0, 1.0, False)
    cap, dead = Capacity(WIDTH, 2, "batch_top_k", (WIDTH,)), torch.arange(WIDTH)
    monkeypatch.setattr(screen, "fitting", lambda source, share: Int8Bounds)
    found, revived = encode(params, source, cap, 0.0, dead, 1)
    pre = source @ params.W_enc + params.b_enc
    assert torch.equal(found.token * WIDTH + found.latent, select(pre, cap).flatten().nonzero().squeeze(1))
    assert revived is not None
    assert torch.equal(revived.place.squeeze(1), pre.argmax(dim=1))


def test_processor_and_sizes_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    source, share = torch.zeros(screen.FEWEST_TOKENS, 1), screen.LARGEST_SHARE
    for of_bfloat16, of_int8, wanted in (
        (True, True, BFloat16Bounds),
        (True, False, BFloat16Bounds),
        (False, True, Int8Bounds),
        (False, False, None),
    ):
        monkeypatch.setattr(screen, "has_fast_bfloat16", lambda fast=of_bfloat16: fast)
        monkeypatch.setattr(screen, "has_fast_int8", lambda fast=of_int8: fast)
        assert screen.fitting(source, share) is wanted
        assert screen.fitting(source.double(), share) is None
        assert screen.fitting(source.to("meta"), share) is None
        assert screen.fitting(source[1:], share) is (None if wanted is Int8Bounds else wanted)
        assert screen.fitting(source, 1.01 * share) is (None if wanted is Int8Bounds else wanted)


@pytest.mark.parametrize(
    ("name", "units", "bfloat16", "int8"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C", {"avx512_bf16", "amx_bf16", "avx512_vnni"}, True, True),
        ("Intel(R) Xeon(R) Platinum 8380H", {"avx512_bf16", "avx512_vnni"}, False, True),
        ("Intel(R) Core(TM) i7-1260P", {"avx_vnni"}, False, True),
        ("AMD EPYC", {"avx512_bf16", "avx512_vnni"}, True, True),
        ("AMD EPYC", set(), False, False),
    ],
)
def test_what_processors_are_fast_at(
    name: str, units: set[str], bfloat16: bool, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ("avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "amx_int8")
    told = {"cpu_name": name} | {unit: unit in units for unit in known}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    product = torch.tensor([[-256 * 127**2]])
    monkeypatch.setattr(processor, "int8_product", lambda left, right, out: product)
    assert has_fast_bfloat16.__wrapped__() is bfloat16
    assert has_fast_int8.__wrapped__() is int8
    product += 1
    assert not has_fast_int8.__wrapped__(), "not exact"


def test_a_torch_that_tells_nothing_of_the_processor_is_taken_for_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_fast_bfloat16.__wrapped__() is False
    assert has_fast_int8.__wrapped__() is False
