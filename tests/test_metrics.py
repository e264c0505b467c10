"""The accumulators against ten-line float64 references."""

import numpy as np
import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep import chunks
from sweep.metrics import (
    LatentActivity,
    Metrics,
    Reconstruction,
    TargetMoments,
    l0_metrics,
    reconstruction_metrics,
)
from sweep.results import DEAD_AT_TOKENS

T = 7  # tokens of a sequence
CPU = torch.device("cpu")


def hard_targets(rows: int = 12, d_out: int = 9, seed: int = 0) -> torch.Tensor:
    """Targets with means a thousand times their spread, one heavy-tailed and one constant dimension."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(rows * T, d_out)) + 1e3 * rng.normal(size=d_out)
    target[:, 1] = rng.standard_t(1.2, size=rows * T) * 50
    target[:, 2] = 0.1
    return torch.from_numpy(target).float()


def noisy(target: torch.Tensor) -> torch.Tensor:
    return target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))


def accumulate(
    target: torch.Tensor, prediction: torch.Tensor, rows_per_batch: list[int]
) -> tuple[Reconstruction, TargetMoments]:
    reconstruction, moments = Reconstruction(), TargetMoments(T)
    sizes = [T * n for n in rows_per_batch]
    for t, p in zip(target.split(sizes), prediction.split(sizes), strict=True):
        reconstruction.update(t, p)
        moments.update(t)
    return reconstruction, moments


def numbers(target: torch.Tensor, prediction: torch.Tensor, rows_per_batch: list[int]) -> Metrics:
    reconstruction, moments = accumulate(target, prediction, rows_per_batch)
    return reconstruction_metrics(reconstruction, moments.deviations())


def reference(target: torch.Tensor, prediction: torch.Tensor) -> dict[str, float]:
    t, p = target.numpy().astype(np.longdouble), prediction.numpy().astype(np.longdouble)
    squares = (t - p) ** 2
    deviations = (t - t.mean(0)) ** 2
    varies = np.ptp(t, axis=0) > 0
    norms = np.sqrt((t**2).sum(1) * (p**2).sum(1))
    return {
        "fvu": float(squares.sum() / deviations.sum()),
        "fvu_per_dimension": float((squares.sum(0)[varies] / deviations.sum(0)[varies]).mean()),
        "fvu_scalar_variance": float(squares.mean() / t.var()),
        "mse": float(squares.mean()),
        "cosine": float(((t * p).sum(1) / norms).mean()),
        "n_evaluated_tokens": len(t),
    }


@pytest.mark.parametrize("seed", range(3))
def test_reconstruction_equals_the_reference_on_large_means_and_heavy_tails(seed: int) -> None:
    target = hard_targets(seed=seed)
    prediction = noisy(target)
    assert numbers(target, prediction, [3, 1, 8]) == pytest.approx(reference(target, prediction), rel=1e-12)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_reconstruction_does_not_depend_on_the_batches(rows_per_batch: list[int], seed: int) -> None:
    target = hard_targets(rows=sum(rows_per_batch), seed=seed)
    target[:T] *= 100  # a first sequence unlike the others
    prediction = noisy(target)
    whole = accumulate(target, prediction, [sum(rows_per_batch)])
    parts = accumulate(target, prediction, rows_per_batch)
    expected = reconstruction_metrics(whole[0], whole[1].deviations())
    assert reconstruction_metrics(parts[0], parts[1].deviations()) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        parts[1].deviations().per_sequence, whole[1].deviations().per_sequence, rtol=1e-12, atol=0
    )


def test_reconstruction_survives_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    target = hard_targets()
    expected = numbers(target, noisy(target), [12])
    monkeypatch.setattr(chunks, "MAX_BYTES", 1)
    assert numbers(target, noisy(target), [12]) == pytest.approx(expected, rel=1e-12)


def test_deviations_of_the_sequences_add_up_to_those_of_the_dimensions() -> None:
    target = hard_targets()
    moments = accumulate(target, target, [5, 7])[1].deviations()
    exact = target.double()
    per_token = (exact - exact.mean(0)).square().sum(1)
    torch.testing.assert_close(moments.per_sequence, per_token.view(-1, T).sum(1), rtol=1e-9, atol=0)
    assert moments.total == pytest.approx(float(moments.per_dimension.sum()), rel=1e-13)
    assert moments.per_dimension[2] == 0, "a constant dimension has no deviation at all"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_that_never_vary_have_no_fvu(dtype: torch.dtype) -> None:
    target = torch.tensor([0.1, 1.0, -7.3, 1e6], dtype=dtype).repeat(3 * T, 1)
    result = numbers(target, target + 1, [1, 2])
    assert result["fvu"] is None
    assert result["fvu_per_dimension"] is None
    assert result["fvu_scalar_variance"] > 0, "the means differ, and that is all this variance sees"
    assert result["mse"] == pytest.approx(1, rel=1e-6)
    assert numbers(target[:, :1], target[:, :1], [3])["fvu_scalar_variance"] is None


def test_cosine_of_a_zero_vector_is_zero() -> None:
    reconstruction = Reconstruction()
    reconstruction.update(
        torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0], [0, 0], [1, 1]])
    )
    assert reconstruction.cosine.tolist() == pytest.approx([1, 0, 0])


def sparse_latents(n: int, dict_size: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rate = rng.uniform(0, 0.3, size=dict_size) * (rng.uniform(size=dict_size) > 0.3)
    values = rng.exponential(size=(n, dict_size)) * (rng.uniform(size=(n, dict_size)) < rate)
    return torch.from_numpy(values).float()


def activity(latents: torch.Tensor, sizes: list[int]) -> LatentActivity:
    result = LatentActivity(latents.shape[1], CPU)
    for part in latents.split(sizes):
        result.update(part)
    return result


def test_activity_equals_the_reference() -> None:
    latents = sparse_latents(1500, 60)
    result = activity(latents, [1, 700, 799])
    x = latents.numpy().astype(np.float64)
    l0 = (x != 0).sum(1)
    assert_close(
        result.metrics(),
        {
            "l0": l0.mean(),
            "l0_median": np.median(l0),
            "l0_std": l0.std(),
            "dead_fraction": (x == 0).all(0).mean(),
            "dead_fraction_1000_tokens": (x[:1000] == 0).all(0).mean(),
            **{f"dead_fraction_{n}_tokens": None for n in DEAD_AT_TOKENS[1:]},
        },
        rel=1e-13,
    )
    columns = result.columns()
    assert columns["density"] == (x != 0).mean(0).tolist()
    alive = (x != 0).any(0)
    assert [v is not None for v in columns["mean_activation"]] == alive.tolist()
    means = x.sum(0)[alive] / (x != 0).sum(0)[alive]
    assert [v for v in columns["mean_activation"] if v is not None] == pytest.approx(means.tolist(), rel=1e-13)
    assert [v for v in columns["max_activation"] if v is not None] == x.max(0)[alive].tolist()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_activity_does_not_depend_on_the_chunks(sizes: list[int], seed: int) -> None:
    latents = sparse_latents(sum(sizes), 20, seed)
    parts, whole = activity(latents, sizes), activity(latents, [len(latents)])
    assert parts.metrics() == whole.metrics()
    assert parts.l0.tolist() == whole.l0.tolist()
    assert parts.columns()["max_activation"] == whole.columns()["max_activation"]
    for mean, expected in zip(parts.columns()["mean_activation"], whole.columns()["mean_activation"], strict=True):
        assert mean == (expected if expected is None else pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize(("token", "dead"), [(998, 0.5), (999, 0.5), (1000, 1.0)])
@pytest.mark.parametrize("chunk", [1000, 7, 1001])
def test_dead_fraction_counts_to_the_token(token: int, dead: float, chunk: int) -> None:
    latents = torch.zeros(1001, 2)
    latents[token, 1] = 0.5
    result = activity(latents, [chunk] * (1001 // chunk) + [1001 % chunk] * (1001 % chunk > 0)).metrics()
    assert result["dead_fraction_1000_tokens"] == dead
    assert result["dead_fraction"] == 0.5


def test_dead_fraction_is_unknown_below_its_token_count() -> None:
    assert activity(torch.ones(999, 2), [999]).metrics()["dead_fraction_1000_tokens"] is None
    assert activity(torch.ones(1000, 2), [1000]).metrics()["dead_fraction_1000_tokens"] == 0


@given(st.lists(st.integers(0, 30), min_size=1, max_size=50))
def test_l0_statistics_equal_numpys(values: list[int]) -> None:
    result = l0_metrics(torch.bincount(torch.tensor(values)))
    assert result["l0"] == pytest.approx(np.mean(values), rel=1e-14)
    assert result["l0_median"] == np.median(values)
    assert result["l0_std"] == pytest.approx(np.std(values), rel=1e-12, abs=1e-12)
