"""The training step against a naive model in float64: values, gradients, updates."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from make import make_cell
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sweep import devices
from sweep.config import Capacity, Revival
from sweep.state import TrainState
from sweep.step import screen
from sweep.step.reference import gradients
from sweep.step.step import train_step_
from sweep.step.update import BIAS_RATE, update_
from sweep.transcoder import Parameters

D_IN, D_OUT, WIDTH, BATCH = 12, 10, 40, 16


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> Parameters:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(WIDTH, D_OUT, generator=g, dtype=dtype)
    return Parameters(
        torch.randn(D_IN, WIDTH, generator=g, dtype=dtype) / D_IN**0.5,
        torch.randn(WIDTH, generator=g, dtype=dtype) / 10,
        rows / rows.norm(dim=1, keepdim=True),
        torch.randn(D_OUT, generator=g, dtype=dtype) / 10,
    )


def make_batch(dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, D_IN, generator=g, dtype=dtype), torch.randn(BATCH, D_OUT, generator=g, dtype=dtype)


def capacity(
    activation: str = "batch_top_k", groups: tuple[int, ...] = (5, 10, 20, 30, 40), prefix_weight: float = 1.0
) -> Capacity:
    return Capacity(WIDTH, 4, activation, groups, prefix_weight=prefix_weight)  # type: ignore[arg-type]


def only(latents: Iterable[int]) -> Tensor:
    """True for these latents."""
    return torch.zeros(WIDTH, dtype=torch.bool).index_fill_(0, torch.tensor([*latents], dtype=torch.int64), True)


def naive_loss(p: Parameters, x: Tensor, y: Tensor, c: Capacity, r: Revival, dead: list[int]) -> Tensor:
    """The same loss with Python loops and masks instead of topk, scatter and slices."""
    pre = x @ p.W_enc + p.b_enc
    z = pre.clamp_min(0)
    if c.activation == "batch_top_k":
        keep = z >= z.flatten().sort(descending=True).values[c.top_k * len(x) - 1]
    else:
        keep = z >= z.sort(dim=1, descending=True).values[:, c.top_k - 1 : c.top_k]
    z = z * keep
    linear = p.b_dec if p.W_skip is None else x @ p.W_skip + p.b_dec
    weights = {n: 1.0 if n == WIDTH else c.prefix_weight for n in c.groups}
    errors = {n: (((z[:, :n] @ p.W_dec[:n] + linear) - y) ** 2).mean() for n in c.groups}
    total = sum(weights[n] * errors[n] for n in c.groups) / sum(weights.values())
    if dead:
        e = (y - (z @ p.W_dec + linear)).detach()
        k = min(r.top_k_aux, len(dead))
        order = [sorted(dead, key=lambda j, i=i: -float(pre.detach()[i, j]))[:k] for i in range(len(x))]
        guess = torch.stack([sum(pre[i, j] * p.W_dec[j] for j in order[i]) for i in range(len(x))])
        total = total + r.aux_penalty * min(len(dead) / r.top_k_aux, 1) * ((guess - e) ** 2).mean()
    return total


@pytest.mark.parametrize("activation", ["batch_top_k", "top_k"])
@pytest.mark.parametrize(("groups", "weight"), [((40,), 0.3), ((5, 10, 20, 30, 40), 1.0), ((5, 20, 40), 0.3)])
@pytest.mark.parametrize("dead", [[], [3, 17, 39], list(range(10, 22))])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("waits", [False, True], ids=["", "without asking"])
def test_gradients_match_a_naive_model(
    activation: str,
    groups: tuple[int, ...],
    weight: float,
    dead: list[int],
    skip: bool,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "reading_waits", lambda tensor: waits)
    params, (x, y) = make_params(), make_batch()
    if skip:
        params.W_skip = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    cap, revival = capacity(activation, groups, weight), Revival(0.25, 6, 5)
    loss, grads = gradients(params, x, y, cap, revival, only(dead))
    leaves = params.map(lambda t: t.clone().requires_grad_())
    expected = naive_loss(leaves, x, y, cap, revival, dead)
    torch.testing.assert_close(loss.total, expected.detach(), rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, leaves.tensors())
    for found, want in zip(grads.tensors(), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-14)


def test_gradients_match_finite_differences() -> None:
    params, (x, y) = make_params(), make_batch()
    cap, revival, none = capacity(), Revival(0.25, 6, 5), only([])
    _, grads = gradients(params, x, y, cap, revival, none)
    for name, tensor in params.items():
        first, found = tensor.flatten()[:1], getattr(grads, name).flatten()[0]  # a view: what is added changes the loss
        losses = []
        for change in (-1e-6, 2e-6):
            first += change
            losses.append(float(gradients(params, x, y, cap, revival, none)[0].total))
        first -= 1e-6
        assert (losses[1] - losses[0]) / 2e-6 == pytest.approx(float(found), rel=1e-4, abs=1e-9)


def test_small_prefixes_get_gradient_of_their_own() -> None:
    params, (x, y) = make_params(), make_batch()
    none = only([])
    _, nested = gradients(params, x, y, capacity(), Revival(0.0, 6, 5), none)
    _, plain = gradients(params, x, y, capacity(groups=(40,)), Revival(0.0, 6, 5), none)
    assert not torch.allclose(nested.W_dec[:5], plain.W_dec[:5])
    # the last group is in one prefix of five, so its gradient is a fifth of what it gets without nesting
    torch.testing.assert_close(nested.W_dec[30:] * 5, plain.W_dec[30:])
    torch.testing.assert_close(nested.W_enc[:, 30:] * 5, plain.W_enc[:, 30:])


def test_aux_reaches_dead_latents_and_no_other_parameter() -> None:
    params, (x, y) = make_params(), make_batch()
    dead = only([1, 7, 33])
    params.b_enc[dead] = -100.0  # dead for the main loss: only the raw pre-latents can reach them
    without = gradients(params, x, y, capacity(), Revival(0.0, 2, 5), dead)[1]
    with_aux = gradients(params, x, y, capacity(), Revival(0.5, 2, 5), dead)[1]
    change = {name: getattr(with_aux, name) - getattr(without, name) for name, _ in params.items()}
    alive = ~dead
    for by_latent in (change["W_enc"].T, change["b_enc"][:, None], change["W_dec"]):
        assert by_latent[alive].eq(0).all()
        assert by_latent[dead].ne(0).any(dim=1).all()
    assert change["b_dec"].eq(0).all()


def test_aux_weight_grows_with_the_number_of_dead_latents() -> None:
    params, (x, y) = make_params(), make_batch()
    revival = Revival(1.0, 8, 5)
    for n_dead in (2, 8, 20):
        dead = only(range(n_dead))
        loss, _ = gradients(params, x, y, capacity(), revival, dead)
        assert loss.aux is not None
        main = torch.stack(loss.prefixes).mean()
        torch.testing.assert_close(loss.total, main + min(n_dead / 8, 1) * loss.aux)


def make_state(dtype: torch.dtype) -> TrainState:
    return TrainState.initial(make_params().map(lambda tensor: tensor.to(dtype)), 1.0, 1.0)


def step_cell(**overrides: Any) -> Any:
    return make_cell(**{"dict_size": WIDTH, "groups": [5, 10, 20, 30, 40], "lr": 1e-2, "steps": 50, **overrides})


def test_update_is_adam_on_the_tangent_of_unit_rows() -> None:
    state = make_state(torch.float64)
    expected = state.params.map(torch.clone)
    leaves = [tensor.requires_grad_() for tensor in expected.tensors()]
    adam = torch.optim.Adam(leaves, lr=0.05, betas=(0.8, 0.95), eps=1e-8)
    for i in range(4):
        g = torch.Generator().manual_seed(i)
        grads = state.params.map(lambda t, g=g: torch.randn(t.shape, generator=g, dtype=t.dtype))
        for leaf, grad in zip(leaves, grads.tensors(), strict=True):
            leaf.grad = grad.clone()
        rows = expected.W_dec.detach()
        expected.W_dec.grad -= (expected.W_dec.grad * rows).sum(1, keepdim=True) * rows
        adam.step()
        with torch.no_grad():
            expected.W_dec /= expected.W_dec.norm(dim=1, keepdim=True)
        update_(state, grads, 0.05, (0.8, 0.95))
        state.step += 1
    for found, want in zip(state.params.tensors(), leaves, strict=True):
        torch.testing.assert_close(found, want.detach(), rtol=1e-9, atol=1e-12)


def test_what_writes_a_dimension_moves_by_that_dimensions_share_of_a_step() -> None:
    params = make_params()
    params.W_skip = torch.zeros(D_IN, D_OUT, dtype=torch.float64)
    rates = torch.linspace(0, 1, D_OUT, dtype=torch.float64)
    even, uneven = (
        replace(TrainState.initial(params.map(torch.clone), 1.0, 1.0), write_rates=each) for each in (None, rates)
    )
    g = torch.Generator().manual_seed(0)
    grads = params.map(lambda t: torch.randn(t.shape, generator=g, dtype=t.dtype))
    for state in (even, uneven):
        update_(state, grads.map(torch.clone), 0.05, (0.8, 0.95))
    for name, start in params.items():
        full, found = (getattr(state.params, name) - start for state in (even, uneven))
        if name in ("b_dec", "W_skip"):
            torch.testing.assert_close(found, full * rates)
        elif name != "W_dec":
            assert torch.equal(found, full)
    tangent = grads.W_dec - (grads.W_dec * params.W_dec).sum(dim=1, keepdim=True) * params.W_dec
    rows = params.W_dec - 0.05 * rates * tangent.sign()  # Adam's first step
    torch.testing.assert_close(uneven.params.W_dec, rows / rows.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_biases_of_latents_that_turn_about_a_mean_learn_faster() -> None:
    params = make_params()
    plain, about = (TrainState.initial(params.map(torch.clone), 1.0, 1.0) for _ in range(2))
    about.source_mean = torch.zeros(D_IN, dtype=torch.float64)
    grads = params.map(torch.ones_like)
    for state in (plain, about):
        update_(state, grads.map(torch.clone), 0.05, (0.8, 0.95))
    torch.testing.assert_close(about.params.b_enc - params.b_enc, BIAS_RATE * (plain.params.b_enc - params.b_enc))
    assert torch.equal(about.params.W_enc, plain.params.W_enc)


@pytest.mark.parametrize("skip", [False, True])
def test_learning_about_a_mean_is_learning_from_centred_sources(skip: bool) -> None:
    params, mean = make_params(), torch.linspace(-2, 3, D_IN, dtype=torch.float64)
    if skip:
        params.W_skip = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    centred = TrainState.initial(params.map(torch.clone), 1.0, 1.0)
    centred.params.b_enc += mean @ params.W_enc
    if params.W_skip is not None:
        centred.params.b_dec += mean @ params.W_skip
    about = replace(TrainState.initial(params, 1.0, 1.0), source_mean=mean)
    centred.source_mean = torch.zeros_like(mean)
    cell = step_cell(n_batches_to_dead=2, skip=skip)
    for i in range(6):
        x, y = make_batch(seed=i)
        slices = (cell.capacity, cell.schedule, cell.revival)
        want = train_step_(centred, x, y, *slices)
        found = train_step_(about, x + mean, y, *slices)
        torch.testing.assert_close(found.loss.total, want.loss.total)
    assert found.n_dead > 0
    at_zero, at_mean = about.params, centred.params
    torch.testing.assert_close(at_zero.b_enc + mean @ at_zero.W_enc, at_mean.b_enc)
    b_dec = at_zero.b_dec if at_zero.W_skip is None else at_zero.b_dec + mean @ at_zero.W_skip
    torch.testing.assert_close(b_dec, at_mean.b_dec)
    for name in ("W_enc", "W_dec", *(["W_skip"] if skip else [])):
        torch.testing.assert_close(getattr(at_zero, name), getattr(at_mean, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_train_step_learns_and_keeps_rows_unit(dtype: torch.dtype) -> None:
    state, cell = make_state(dtype), step_cell()
    x, y = make_batch(dtype)
    losses = [float(train_step_(state, x, y, cell.capacity, cell.schedule, cell.revival).loss.total) for _ in range(50)]
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == 50
    assert state.params.W_dec.dtype == dtype
    torch.testing.assert_close(state.params.W_dec.norm(dim=1), torch.ones(WIDTH, dtype=dtype))


def test_train_step_in_fp32_follows_float64() -> None:
    cell = step_cell(aux_penalty=0.0)
    states = {dtype: make_state(dtype) for dtype in (torch.float32, torch.float64)}
    for i in range(5):
        x, y = make_batch(seed=i)
        for dtype, state in states.items():
            train_step_(state, x.to(dtype), y.to(dtype), cell.capacity, cell.schedule, cell.revival)
    torch.testing.assert_close(
        states[torch.float32].params.W_dec.double(), states[torch.float64].params.W_dec, rtol=1e-3, atol=1e-4
    )


def test_train_step_counts_batches_since_a_latent_fired() -> None:
    state, cell = make_state(torch.float32), step_cell(n_batches_to_dead=3, aux_penalty=0.0, lr=1e-9)
    state.params.b_enc[:10] = -1e6
    for expected in (0, 0, 0, 10):
        report = train_step_(
            state, *make_batch(torch.float32, seed=expected), cell.capacity, cell.schedule, cell.revival
        )
        assert report.n_dead >= expected
    assert state.batches_since_fired[:10].eq(4).all()
    assert report.loss.fired.any()
    assert state.batches_since_fired[report.loss.fired].eq(0).all()


def test_train_step_scales_source_and_target() -> None:
    cell = step_cell()
    plain, scaled = make_state(torch.float64), make_state(torch.float64)
    scaled.source_scale, scaled.target_scale = 0.25, 4.0
    x, y = make_batch()
    train_step_(plain, x, y, cell.capacity, cell.schedule, cell.revival)
    train_step_(scaled, x * 4.0, y / 4.0, cell.capacity, cell.schedule, cell.revival)
    for found, want in zip(scaled.params.tensors(), plain.params.tensors(), strict=True):
        assert torch.equal(found, want)


class Products(TorchDispatchMode):
    """The dtypes of both factors of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {factor.dtype for factor in args[-2:]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["batch_top_k", "top_k"])
def test_bfloat16_rounds_products_and_nothing_that_is_kept(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "fitting", lambda source, share: None)
    cells = [
        step_cell(step_dtype=dtype, activation=activation, n_batches_to_dead=2) for dtype in ("float32", "bfloat16")
    ]
    states, losses = [], []
    for cell in cells:
        state = make_state(torch.float32)
        state.params.b_enc[:6] = -100.0  # dead from the third step on
        with Products() as products:
            steps = [
                train_step_(state, *make_batch(torch.float32, seed), cell.capacity, cell.schedule, cell.revival)
                for seed in range(5)
            ]
        assert products.dtypes <= {getattr(torch, cell.schedule.step_dtype)}
        losses.append([float(step.loss.total) for step in steps])
        states.append(state)
        assert {tensor.dtype for tensor in [*state.params.tensors(), *state.first_moments.tensors()]} == {torch.float32}
        assert steps[-1].loss.total.dtype == torch.float32
        assert steps[-1].n_dead >= 6
    assert products.dtypes == {torch.bfloat16}
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


class Copies(TorchDispatchMode):
    """No operation reads tensors of two devices, nor writes to another one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        assert len(devices) <= 1, f"{func} copies"
        return result


@pytest.mark.parametrize("activation", ["batch_top_k", "top_k"])
def test_on_a_gpu_the_host_waits_for_nothing(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device "meta" have no numbers, so whatever asked for one would fail."""
    monkeypatch.setattr(devices, "reading_waits", lambda tensor: True)
    cell = step_cell(activation=activation)
    params = make_params(torch.float32)
    params.W_skip = torch.zeros(D_IN, D_OUT)
    state = TrainState.initial(params.map(lambda tensor: tensor.to("meta")), 1.0, 1.0)
    state.source_mean, state.write_rates = (torch.zeros(n, device="meta") for n in (D_IN, D_OUT))
    batch = [tensor.to("meta") for tensor in make_batch(torch.float32)]
    with Copies():
        report = train_step_(state, *batch, cell.capacity, cell.schedule, cell.revival)
    with pytest.raises(RuntimeError, match="meta"):
        float(report.loss.total)
    assert state.step == 1
