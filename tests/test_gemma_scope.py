"""Google's weights as transcoders of ours: the same numbers as the published definition, and refusals."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gemma_scope import Arrays, random_arrays, reference_prediction, write_first, write_second

from sweep.baselines.family import entry_of, scan
from sweep.baselines.gemma_scope import Baseline, load_baseline, suspicions
from sweep.baselines.header import check_shapes
from sweep.errors import BaselineError
from sweep.transcoder import load_transcoder, save_transcoder

D_IN, WIDTH, D_OUT = 6, 20, 5


def load(folder: Path, layer: int = 1, d_in: int = D_IN, d_out: int = D_OUT) -> Baseline:
    (entry,) = scan(folder)
    return load_baseline(entry, layer, d_in, d_out)


def source(n: int = 50) -> torch.Tensor:
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(0))
    return x / x.square().mean(1, keepdim=True).sqrt()


def assert_predicts_as_defined(baseline: Baseline, arrays: Arrays) -> None:
    x = source()
    latents = baseline.transcoder.encode(x)
    expected_latents, expected = reference_prediction(arrays, x.numpy())
    assert (latents > 0).any()
    assert ((latents > 0).numpy() == (expected_latents > 0)).all()
    np.testing.assert_allclose(latents, expected_latents, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(baseline.transcoder.decode(latents, x), expected, rtol=1e-5, atol=1e-5)


def test_gemma_scope_predicts_as_defined(tmp_path: Path) -> None:
    arrays = random_arrays(D_IN, WIDTH, D_OUT)
    baseline = load(write_first(tmp_path, arrays, l0=112))
    assert_predicts_as_defined(baseline, arrays)
    assert baseline.site.hook_names == ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    assert (baseline.name, baseline.l0) == ("layer_1/width_16k/average_l0_112", 112)
    assert baseline.trained_on == "google/gemma-2-2b"


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_predicts_as_defined(tmp_path: Path, skip: bool) -> None:
    arrays = random_arrays(D_IN, WIDTH, D_OUT, skip=skip)
    baseline = load(write_second(tmp_path, arrays, l0=23))
    assert_predicts_as_defined(baseline, arrays)
    assert baseline.site.hook_names == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    assert (baseline.transcoder.W_skip is not None) == skip
    assert (baseline.l0, baseline.trained_on) == (23, "google/gemma-3-270m-pt")


def test_gemma_scope_2_in_half_precision_is_read_in_float32(tmp_path: Path) -> None:
    arrays = random_arrays(D_IN, WIDTH, D_OUT)
    folder = write_second(tmp_path, {name: array.astype(np.float16) for name, array in arrays.items()})
    transcoder = load(folder).transcoder
    assert transcoder.W_enc.dtype == torch.float32
    np.testing.assert_allclose(transcoder.W_enc, arrays["W_enc"], rtol=1e-3)


def test_a_threshold_below_zero_lets_no_negative_latent_through(tmp_path: Path) -> None:
    arrays = random_arrays(D_IN, WIDTH, D_OUT)
    arrays["threshold"] -= 2
    assert (arrays["threshold"] < 0).any()
    assert_predicts_as_defined(load(write_first(tmp_path, arrays)), arrays)


def test_a_transcoder_with_a_skip_is_saved_with_it_and_will_not_decode_without_its_source(tmp_path: Path) -> None:
    transcoder = load(write_second(tmp_path / "scope", random_arrays(D_IN, WIDTH, D_OUT, skip=True))).transcoder
    save_transcoder(tmp_path / "saved", transcoder, {})
    loaded, x = load_transcoder(tmp_path / "saved"), source()
    latents = loaded.encode(x)
    assert torch.equal(loaded.decode(latents, x), transcoder.decode(latents, x))
    with pytest.raises(AssertionError, match="latents and source"):
        loaded.decode(latents)


def test_equal_files_have_equal_hashes(tmp_path: Path) -> None:
    one, other = random_arrays(D_IN, WIDTH, D_OUT), random_arrays(D_IN, WIDTH, D_OUT, seed=1)
    hashes = [load(write_first(tmp_path / str(i), arrays)).file_hash for i, arrays in enumerate((one, one, other))]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("d_in", "d_out", "message"),
    [
        (2304, D_OUT, r"W_enc has the shape \(6, 20\).*has \(2304, 20\): it belongs to another model"),
        (D_IN, 2304, r"W_dec has the shape \(20, 5\).*has \(20, 2304\)"),
    ],
)
def test_shapes_of_another_model_are_refused(tmp_path: Path, d_in: int, d_out: int, message: str) -> None:
    arrays = random_arrays(D_IN, WIDTH, D_OUT)
    for folder in (write_first(tmp_path, arrays), write_second(tmp_path, arrays)):
        with pytest.raises(BaselineError, match=message):
            load(folder, d_in=d_in, d_out=d_out)


def change(name: str, array: Any) -> Any:
    return lambda arrays: {**arrays, name: np.asarray(array, np.float32)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("W_enc", np.zeros((WIDTH, D_IN))), "W_enc has the shape"),
        (change("W_dec", np.zeros((D_OUT, WIDTH))), "W_dec has the shape"),
        (change("b_enc", np.zeros((WIDTH, 1))), "has the shape"),
        (change("threshold", np.zeros(WIDTH + 1)), "threshold has the shape"),
        (change("threshold", 0.5), "threshold has the shape"),
        (change("W_enc", np.full((D_IN, WIDTH), np.nan)), "not finite"),
        (lambda arrays: {k: v for k, v in arrays.items() if k != "threshold"}, "has no threshold"),
        (lambda arrays: {"weights": arrays["W_enc"]}, "has no W_enc, b_enc, W_dec, b_dec, threshold"),
    ],
)
def test_weights_that_are_no_transcoder_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    folder = write_first(tmp_path, edit(random_arrays(D_IN, WIDTH, D_OUT)))
    with pytest.raises(BaselineError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hf_hook_point_in": "model.layers.2.pre_feedforward_layernorm.output"}, "hf_hook_point_in is model.layers.2"),
        ({"hf_hook_point_in": "model.layers.1.output"}, "hf_hook_point_in is model.layers.1.output"),
        ({"hf_hook_point_out": "model.layers.1.mlp.output"}, "hf_hook_point_out is model.layers.1.mlp.output"),
        ({"hf_hook_point_out": None}, "hf_hook_point_out is None"),
        ({"architecture": "topk"}, "architecture is topk"),
    ],
)
def test_gemma_scope_2_of_another_kind_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = write_second(tmp_path, random_arrays(D_IN, WIDTH, D_OUT), **config)
    with pytest.raises(BaselineError, match=message):
        load(folder)


@pytest.mark.parametrize("size", [0, 7, 100, 1000])
def test_a_download_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    arrays = random_arrays(D_IN, WIDTH, D_OUT)
    for folder in (write_first(tmp_path, arrays), write_second(tmp_path, arrays)):
        path = scan(folder)[0].params
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(BaselineError, match=rf"{path} \({size:,} bytes\) is not whole .*download it again"):
            load(folder)


def test_missing_weights_and_a_missing_config_are_told(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match=r"params.npz is missing"):
        check_shapes(entry_of(tmp_path), D_IN, D_OUT)
    folder = write_second(tmp_path, random_arrays(D_IN, WIDTH, D_OUT))
    (folder / "config.json").unlink()
    with pytest.raises(BaselineError, match=r"config.json cannot be read"):
        load(folder)


def test_suspicions_speak_up_about_norms_and_l0_that_are_far_off(tmp_path: Path) -> None:
    baseline = load(write_first(tmp_path, random_arrays(D_IN, WIDTH, D_OUT), l0=8))
    norm = math.sqrt(D_IN)
    assert suspicions(baseline, 9.0, norm) == []
    assert "measured L0 3, its authors' is 8" in suspicions(baseline, 3.0, norm)[0]
    assert "measured L0 20, its authors' is 8" in suspicions(baseline, 20.0, norm)[0]
    assert "it read the wrong hook" in suspicions(baseline, 8.0, 1.2 * norm)[0]
    other = load(write_second(tmp_path, random_arrays(D_IN, WIDTH, D_OUT), l0=8))
    assert suspicions(other, 8.0, 1.2 * norm) == []  # the norm's weight is in it
