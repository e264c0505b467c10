"""The sparse step against the dense reference in float64, at sizes where blocks are ragged and guesses are wrong."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sweep.config import Capacity, Revival, Schedule
from sweep.state import TrainState
from sweep.step import active, reference, screen, sparse
from sweep.step import bounds as step_bounds
from sweep.step.active import BatchTopK, encode, next_guess
from sweep.step.bfloat16 import BFloat16Bounds
from sweep.step.bounds import Bounds
from sweep.step.entries import Active
from sweep.step.int8 import Int8Bounds
from sweep.step.step import train_step_
from sweep.transcoder import Parameters, pre_latents, select

D_IN, D_OUT, WIDTH, BATCH, TOP_K = 12, 10, 200, 50, 6
GROUPS = (25, 50, 100, 150, WIDTH)
SCHEDULE = Schedule(3e-3, 100, BATCH, 0, "constant", 3e-3, (0.9, 0.999), "float32")
NONE = torch.zeros(0, dtype=torch.int64)
NO_LATENT = torch.zeros(WIDTH, dtype=torch.bool)

each_rule = pytest.mark.parametrize("activation", ["batch_top_k", "top_k"])
each_search = pytest.mark.parametrize(
    ("activation", "bounds"),
    [("batch_top_k", None), ("batch_top_k", BFloat16Bounds), ("batch_top_k", Int8Bounds), ("top_k", None)],
    ids=["", "bfloat16", "int8", "top_k"],
)
each_skip = pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
each_nesting = pytest.mark.parametrize("groups", [(WIDTH,), GROUPS], ids=["plain", "nested"])


@pytest.fixture(autouse=True)
def ragged_blocks(exact_integers: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 28 latents to encode, of eleven to update: neither divides the sizes here."""
    monkeypatch.setattr(active, "BLOCK_BYTES", dict.fromkeys(active.BLOCK_BYTES, 28 * BATCH * 8))
    monkeypatch.setattr(active, "MIN_BLOCK", 1)
    for kind in (BFloat16Bounds, Int8Bounds):
        monkeypatch.setattr(kind, "block_bytes", 28 * BATCH * kind.element_bytes)
    monkeypatch.setattr(step_bounds, "MOST_CANDIDATES", 1)
    monkeypatch.setattr(sparse, "BLOCK_WEIGHTS", 11 * D_IN)
    return


def capacity(activation: str = "batch_top_k", groups: tuple[int, ...] = GROUPS, top_k: int = TOP_K) -> Capacity:
    """With unequal weights of the prefixes."""
    return Capacity(WIDTH, top_k, activation, groups, prefix_weight=0.3)  # type: ignore[arg-type]


def make_params(
    seed: int = 0, whole_numbers: bool = False, dtype: torch.dtype = torch.float64, skip: bool = False
) -> Parameters:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(WIDTH, D_OUT, generator=g, dtype=dtype)
    params = Parameters(
        torch.randn(D_IN, WIDTH, generator=g, dtype=dtype),
        torch.randn(WIDTH, generator=g, dtype=dtype) / 10,
        rows / rows.norm(dim=1, keepdim=True),
        torch.randn(D_OUT, generator=g, dtype=dtype) / 10,
    )
    if whole_numbers:
        params.W_enc.round_()
        params.b_enc.zero_()
    if skip:
        params.W_skip = torch.randn(D_IN, D_OUT, generator=g, dtype=dtype) / 4
    return params


def make_batch(seed: int = 1, whole_numbers: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    source = torch.randn(BATCH, D_IN, generator=g, dtype=dtype)
    target = torch.randn(BATCH, D_OUT, generator=g, dtype=dtype)
    return (source.round() if whole_numbers else source), target


def dense(entries: Active) -> Tensor:
    matrix = torch.zeros(BATCH, WIDTH, dtype=entries.value.dtype)
    return matrix.index_put((entries.token, entries.latent), entries.value)


def assert_same(found: Parameters, wanted: Parameters) -> None:
    for (name, a), (_, b) in zip(found.items(), wanted.items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@each_rule
@each_nesting
@pytest.mark.parametrize("n_dead", [0, 3, 30, 60], ids=["no aux", "few dead", "multiplied out", "more dead"])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@each_skip
def test_gradients_equal_those_of_autograd(
    activation: str, groups: tuple[int, ...], n_dead: int, ties: bool, skip: bool
) -> None:
    params, batch = make_params(whole_numbers=ties, skip=skip), make_batch(whole_numbers=ties)
    dead = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))[:n_dead].sort().values
    revival = Revival(0.25 if n_dead else 0.0, 8, 5)
    counted = torch.zeros(WIDTH, dtype=torch.bool).index_fill_(0, dead, True)
    wanted_loss, wanted = reference.gradients(params, *batch, capacity(activation, groups), revival, counted)
    loss, grads, _ = sparse.gradients(params, *batch, capacity(activation, groups), revival, counted)
    _, revived = encode(params, batch[0], capacity(activation, groups), 0.0, dead, revival.top_k_aux)
    assert (None if revived is None else revived.is_dense) == {0: None, 3: True, 30: True, 60: False}[n_dead]
    torch.testing.assert_close(loss.total, wanted_loss.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack(loss.prefixes), torch.stack(wanted_loss.prefixes), rtol=1e-12, atol=0)
    assert (loss.aux is None) == (wanted_loss.aux is None) == (n_dead == 0)
    assert loss.n_active == wanted_loss.n_active
    assert torch.equal(loss.fired, wanted_loss.fired)
    assert_same(grads.parameters(), wanted)


@each_rule
@each_nesting
@pytest.mark.parametrize(("aux_penalty", "silent"), [(0.0, 40), (0.5, 20), (0.5, 60)])
@each_skip
def test_consecutive_steps_equal_those_of_the_reference(
    activation: str, groups: tuple[int, ...], aux_penalty: float, silent: int, skip: bool
) -> None:
    params = make_params(skip=skip)
    params.b_enc[20 : 20 + silent] = -100.0  # never fire: dead from the third step on
    revival, cap = Revival(aux_penalty, 8, 2), capacity(activation, groups)
    rates = torch.linspace(0.1, 1, params.b_dec.numel(), dtype=params.b_dec.dtype)
    mean = torch.linspace(-1, 1, params.W_enc.shape[0], dtype=params.b_dec.dtype)
    ours, theirs = (
        replace(TrainState.initial(params.map(torch.clone), 0.5, 2.0), write_rates=rates, source_mean=mean)
        for _ in range(2)
    )
    n_dead = []
    for seed in range(8):
        batch = make_batch(seed)
        got = train_step_(ours, *batch, cap, SCHEDULE, revival, sparse.learn_)
        want = train_step_(theirs, *batch, cap, SCHEDULE, revival, reference.learn_)
        assert got.values() == pytest.approx(want.values(), rel=1e-9)
        n_dead.append(int(got.n_dead))
    assert_same(ours.params, theirs.params)
    assert_same(ours.first_moments, theirs.first_moments)
    assert_same(ours.second_moments, theirs.second_moments)
    assert torch.equal(ours.batches_since_fired, theirs.batches_since_fired)
    assert min(n_dead[:2]) == 0 and min(n_dead[2:]) > revival.top_k_aux


@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(1, WIDTH),
    guess=st.sampled_from([0.0, 0.5, 3.0, 1e9, float("nan")]),
    activation=st.sampled_from(["batch_top_k", "top_k"]),
    whole_numbers=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_encode_finds_what_select_leaves(
    seed: int, top_k: int, guess: float, activation: str, whole_numbers: bool
) -> None:
    params, (source, _) = make_params(seed, whole_numbers), make_batch(seed + 1, whole_numbers)
    cap = capacity(activation, top_k=top_k)
    found, revived = encode(params, source, cap, guess, NONE, 1)
    assert revived is None
    wanted = select(pre_latents(params, source), cap)
    assert torch.equal(dense(found) > 0, wanted > 0)
    torch.testing.assert_close(dense(found), wanted, rtol=1e-12, atol=1e-12)  # products round by the block
    place = found.token * WIDTH + found.latent
    assert place.diff().gt(0).all()
    assert found.value.gt(0).all()


def test_batch_top_k_holds_at_most_twice_what_it_needs_and_a_block() -> None:
    pre = torch.rand(BATCH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    search = BatchTopK(n_wanted=100, guess=0.0)
    for start in range(WIDTH):
        search.add(start, pre[:, start : start + 1])
        assert search._n_kept <= 2 * 100 + BATCH
    assert torch.equal(search.active().value.sort().values, pre.flatten().sort().values[-100:])


def test_the_next_batch_is_searched_from_where_a_few_more_would_have_been_found() -> None:
    assert next_guess(torch.empty(0)) == 0
    assert next_guess(torch.full((40,), 0.5)) == 0.5
    assert next_guess(torch.arange(100.0, 200.0)) == 100 - (115 - 100)
    assert next_guess(torch.arange(1.0, 101.0)) == 0, "never negative"
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    for n_active in (1 << 12, 1 << 16):
        n_found = int((values >= next_guess(values[:n_active])).count_nonzero())
        assert 1.1 < n_found / n_active < 1.25


@each_search
def test_weights_that_are_no_numbers_show_in_the_loss(
    activation: str, bounds: type[Bounds] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "fitting", lambda source, share: bounds)
    for where in (slice(None), slice(3, 4)):
        params = make_params(dtype=torch.float32)
        params.W_enc[:, where] = torch.nan
        batch = make_batch(dtype=torch.float32)
        loss, _, _ = sparse.gradients(params, *batch, capacity(activation), Revival(0.0, 8, 5), NO_LATENT)
        assert not loss.total.isfinite()


@each_rule
def test_a_batch_without_an_active_latent_has_gradients(activation: str) -> None:
    params, batch = make_params(), make_batch()
    params.b_enc.fill_(-100.0)
    arguments = (params, *batch, capacity(activation), Revival(0.0, 8, 5), NO_LATENT)
    loss, grads, guess = sparse.gradients(*arguments)
    assert (loss.n_active, guess) == (0, 0.0)
    assert_same(grads.parameters(), reference.gradients(*arguments)[1])


class LargestTensor(TorchDispatchMode):
    """The most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [out] if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else []
        sizes = (tensor.numel() for tensor in tensors if isinstance(tensor, Tensor) and tensor.layout == torch.strided)
        self.numel = max([self.numel, *sizes])
        return out


@each_search
def test_training_never_holds_batch_times_dict_size(
    activation: str, bounds: type[Bounds] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "fitting", lambda source, share: bounds)
    monkeypatch.setattr(active, "BLOCK_BYTES", {activation: 28 * BATCH * 4})
    params = make_params(dtype=torch.float32)
    params.b_enc[20:80] = -100.0
    state, cap, revival = TrainState.initial(params, 1.0, 1.0), capacity(activation, top_k=4), Revival(0.5, 8, 3)
    for seed in range(4):
        with LargestTensor() as largest:
            report = train_step_(state, *make_batch(seed, dtype=torch.float32), cap, SCHEDULE, revival)
        assert largest.numel < BATCH * WIDTH / 2
    assert report.n_dead >= 60
    with LargestTensor() as largest:  # the spy sees what it should
        train_step_(state, *make_batch(dtype=torch.float32), cap, SCHEDULE, revival, reference.learn_)
    assert largest.numel >= BATCH * WIDTH


@each_search
def test_steps_are_the_same_bits_for_any_number_of_threads(
    activation: str, bounds: type[Bounds] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is multiplied out, as the library may cut those sums by threads."""
    monkeypatch.undo()
    monkeypatch.setattr(screen, "fitting", lambda source, share: bounds)
    width, batch, d = 4096, 512, 96
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(width, d, generator=g)
    params = Parameters(torch.randn(d, width, generator=g), torch.zeros(width), rows, torch.zeros(d))
    cap = Capacity(width, 16, activation, (512, width))  # type: ignore[arg-type]
    revival = Revival(0.5, 24, 9)
    source, target = torch.randn(batch, d, generator=g), torch.randn(batch, d, generator=g)
    states, losses = [], []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            state = TrainState.initial(params.map(torch.clone), 1.0, 1.0)
            state.batches_since_fired[:1000] = 99
            steps = [train_step_(state, source, target, cap, SCHEDULE, revival, sparse.learn_) for _ in range(3)]
            losses.append([float(step.loss.total) for step in steps])
            states.append(state)
    finally:
        torch.set_num_threads(threads)
    for state, loss in zip(states[1:], losses[1:], strict=True):
        assert loss == losses[0]
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor, states[0].tensors()[name]), name


@pytest.mark.parametrize("bounds", [None, BFloat16Bounds, Int8Bounds], ids=["", "bfloat16", "int8"])
def test_the_guess_changes_no_bit(bounds: type[Bounds] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "fitting", lambda source, share: bounds)
    params, batch = make_params(dtype=torch.float32), make_batch(dtype=torch.float32)
    results = []
    for guess in (0.0, 2.0, 1e9):
        state = replace(TrainState.initial(params.map(torch.clone), 1.0, 1.0), guess=guess)
        train_step_(state, *batch, capacity(), SCHEDULE, Revival(0.0, 8, 5), sparse.learn_)
        results.append(state)
    for state in results[1:]:
        assert state.guess == results[0].guess > 0
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor, results[0].tensors()[name])
