"""Pairs of decoder rows against brute force in float64, with coarse products in either precision."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sweep import chunks, similarity
from sweep.similarity import SIMILAR, decoder_similarity


@pytest.fixture(autouse=True, params=["float32", "bfloat16", "int8"])
def coarse(request: pytest.FixtureRequest, exact_integers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bfloat16", "int8"):
        monkeypatch.setattr(similarity, f"has_fast_{name}", lambda fast=request.param == name: fast)


def brute_cosines(W_dec: torch.Tensor) -> NDArray[np.float64]:
    rows = W_dec.double().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    cosines: NDArray[np.float64] = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines


def assert_similarity_is_exact(W_dec: torch.Tensor) -> None:
    cosines = brute_cosines(W_dec)
    assert not (abs(cosines - SIMILAR) < 1e-13).any(), "the test itself must be decided"
    result = decoder_similarity(W_dec)
    n = len(W_dec)
    assert result.n_similar_pairs == (cosines > SIMILAR).sum() // 2
    assert result.has_twin.tolist() == (cosines > SIMILAR).any(1).tolist()
    assert result.n_pairs == n * (n - 1) // 2
    assert result.nearest is not None
    assert result.nearest_cosine is not None
    assert (result.nearest != torch.arange(n)).all()
    np.testing.assert_allclose(result.nearest_cosine, cosines.max(1), atol=1e-6)
    np.testing.assert_allclose(result.nearest_cosine, cosines[np.arange(n), result.nearest], atol=1e-14)
    assert result.metrics()["mean_max_decoder_cosine"] == pytest.approx(cosines.max(1).mean(), abs=1e-6)


def near_the_line(n_pairs: int, d: int, seed: int) -> torch.Tensor:
    """Pairs whose cosine is within 1e-7 of 0.9, on both sides, of rows of very different norms."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(n_pairs, d))
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    other = rng.normal(size=(n_pairs, d))
    other -= (other * first).sum(1, keepdims=True) * first
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosine = SIMILAR + rng.uniform(-1e-7, 1e-7, size=(n_pairs, 1))
    second = cosine * first + np.sqrt(1 - cosine**2) * other
    rows = np.concatenate([first, second]) * np.exp(rng.uniform(-8, 8, size=(2 * n_pairs, 1)))
    return torch.from_numpy(rng.permutation(rows)).float()


@pytest.mark.parametrize("max_bytes", [400, 40_000, 16 << 20])
@pytest.mark.parametrize(("d", "seed"), [(3, 0), (64, 1), (640, 2)])
def test_similar_pairs_are_counted_exactly_near_the_line(
    monkeypatch: pytest.MonkeyPatch, max_bytes: int, d: int, seed: int
) -> None:
    monkeypatch.setattr(chunks, "MAX_BYTES", max_bytes)
    assert_similarity_is_exact(near_the_line(60, d, seed))


def test_near_the_line_float32_alone_would_miscount() -> None:
    W_dec = near_the_line(500, 640, 3)
    unit = torch.nn.functional.normalize(W_dec)
    in_float32 = ((unit @ unit.T).triu(1) > SIMILAR).sum()
    assert in_float32 != decoder_similarity(W_dec).n_similar_pairs


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([1, 300, 1 << 20]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_similarity_equals_brute_force(n: int, d: int, seed: int, max_bytes: int) -> None:
    W_dec = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    W_dec[n // 2] = W_dec[0] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MAX_BYTES", max_bytes)
        assert_similarity_is_exact(W_dec)


def test_identical_rows_are_all_twins() -> None:
    result = decoder_similarity(torch.ones(50, 8)).metrics()
    assert result["absorption_score"] == 1
    assert result["frac_latents_with_twin"] == 1
    assert result["mean_max_decoder_cosine"] == pytest.approx(1, abs=1e-15)


def test_opposite_rows_are_no_twins() -> None:
    result = decoder_similarity(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    assert result.n_similar_pairs == 0
    assert result.nearest is not None
    assert result.nearest.tolist() == [1, 0]
    assert result.metrics()["mean_max_decoder_cosine"] == pytest.approx(-1)


def test_zero_rows_are_similar_to_nothing() -> None:
    result = decoder_similarity(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    assert result.n_similar_pairs == 1
    assert result.has_twin.tolist() == [False, False, True, True]
    assert result.nearest_cosine is not None
    assert result.nearest_cosine.tolist() == pytest.approx([0, 0, 1, 1])
    assert result.columns()["nearest_latent"] == [1, 0, 3, 2]


def test_a_single_row_has_no_pairs() -> None:
    result = decoder_similarity(torch.ones(1, 3))
    assert result.metrics() == {
        "absorption_score": None,
        "n_decoder_pairs": 0,
        "n_similar_pairs": 0,
        "frac_latents_with_twin": 0,
        "mean_max_decoder_cosine": None,
    }
    assert result.columns() == {"nearest_latent": [None], "nearest_cosine": [None]}
