"""Torch files of other programs: the numbers of our own saved transcoder, nothing run, and every refusal."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import sweep as run
from foreign_files import CONFIG, OVERRIDES, Evil, weights, write
from make import make_cell

from sweep.errors import CheckpointError, ConfigError
from sweep.foreign import ForeignTranscoder, options_in
from sweep.launch.elsewhere import open_checkpoint
from sweep.paths import CacheFolder
from sweep.progress import silent
from sweep.saved import Saved
from sweep.score import score
from sweep.transcoder import Transcoder, save_transcoder


def turned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {name: state[name].T.contiguous() for name in ("W_enc", "W_dec")}


@pytest.mark.parametrize("change", [dict, turned, lambda state: {"state_dict": state}])
@pytest.mark.parametrize("name", ["ae.pt", "model.pth", "weights.bin"])
def test_it_scores_as_the_same_weights_saved_by_us(change: Any, name: str, cache: CacheFolder, tmp_path: Path) -> None:
    old = open_checkpoint(write(tmp_path / "old", change(weights()), name=name), 1, OVERRIDES)
    cell = make_cell()
    save_transcoder(tmp_path / "ours", Transcoder(**weights(), activation="top_k", top_k=4, threshold=None), {})
    ours = Saved(tmp_path / "ours", cell, None)
    assert old.cell.data == cell.data
    found, expected = (score(each, None, None, cache, "cpu", silent).metrics for each in (old, ours))
    assert found == expected


def test_the_command_scores_it(cache: CacheFolder, tmp_path: Path) -> None:
    folder = write(tmp_path / "old", weights(), {"activation": "topk"})
    done = run("evaluate", "--checkpoint", folder, "--layer", 1, "--cache_dir", cache.root, "--device", "cpu",
               "--batches", 1, "model=tiny", "top_k=4", "seq_len=32")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "\nold: tiny layer 1, norm_out -> mlp_out\n8 held-out rows of docstrings" in done.stdout


def test_a_malicious_pickle_does_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "old", {**weights(), "extra": Evil(tmp_path / "harm")})
    refused = run("evaluate", "--checkpoint", folder, "--layer", 1)
    assert refused.exit_code == 2
    assert "nothing in it was run" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "harm").exists()
    torch.load(folder / "transcoder.pt", weights_only=False)  # it would have done harm
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_dec": None}, "a transcoder has W_enc, b_enc, W_dec, b_dec"),
        ({"log_scale": torch.zeros(1)}, "nothing else is understood"),
        ({"W_enc": torch.zeros(32, 63)}, "does not fit with 64 latents"),
        ({"W_dec": torch.zeros(64)}, "does not fit with 64 latents"),
        ({"W_enc": torch.zeros(64, 64)}, "lies either way"),
        ({"W_enc": torch.full((32, 64), torch.nan)}, "not finite"),
        ({"W_enc": torch.zeros(32, 64, dtype=torch.int64)}, "not real"),
        ({"W_enc": torch.zeros(1).expand(10**6, 10**6)}, "more than the file holds"),
        ({"threshold": torch.zeros(3)}, "not one per latent"),
        ({"threshold": torch.tensor([torch.nan])}, "not one per latent"),
    ],
)
def test_tensors_that_do_not_fit_are_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in (weights() | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        ForeignTranscoder(write(tmp_path / "old", state) / "transcoder.pt")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 100])
def test_bytes_that_are_no_torch_file_are_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not whole, or was saved by a very old torch"):
        ForeignTranscoder(tmp_path / "x.pt")


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(CheckpointError, match="claims more than the file holds"):
        ForeignTranscoder(tmp_path / "x.pt")


def test_a_threshold_decides_what_is_active(tmp_path: Path) -> None:
    state = weights() | {"threshold": torch.tensor(0.5)}
    found = ForeignTranscoder(write(tmp_path / "old", state) / "transcoder.pt").transcoder("batch_top_k", 4, "cpu")
    source = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    pre = source @ state["W_enc"] + state["b_enc"]
    torch.testing.assert_close(found.encode(source), torch.where(pre > 0.5, pre, 0))


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (CONFIG | {"activation": "gated"}, (), "activation gated is not understood"),
        (CONFIG | {"normalize_activations": "layer_norm"}, (), "changes the numbers and is not understood"),
        (CONFIG | {"layer": 2}, (), "contradicts itself: layer=2, hook_layer=1"),
        (CONFIG | {"k": "many"}, (), "k='many' is not understood"),
        (CONFIG | {"model_name": "a b,c"}, (), "model_name='a b,c' is not understood"),
        (CONFIG | {"d_sae": 63}, (), "config.json says dict_size=63, W_enc 64"),
        (CONFIG | {"model_name": "some/other"}, (), "model some/other is not a preset"),
        (CONFIG, ("layer=2",), "says that it is of layer 1"),
        (CONFIG, ("seed=1,2",), "is a grid"),
        ({"k": 4}, (), "does not say of which layer it is; give --layer"),
        ({"layer": 1}, (), "does not say how many latents are active; give top_k="),
    ],
)
def test_what_is_not_understood_is_told(
    config: dict[str, Any], words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "old", weights(), config)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_checkpoint(folder, None, words)


def test_batch_top_k_without_a_threshold_is_refused_until_told_how(tmp_path: Path) -> None:
    folder = write(tmp_path / "old", weights(), CONFIG | {"activation": "batchtopk"})
    with pytest.raises(CheckpointError, match="give activation=top_k"):
        open_checkpoint(folder, None, ()).load("cpu")
    assert open_checkpoint(folder, None, ["activation=top_k"]).load("cpu").activation == "top_k"


def test_another_width_than_the_models_is_told(tmp_path: Path) -> None:
    saved = open_checkpoint(write(tmp_path / "old", weights(d_in=48)), None, ())
    with pytest.raises(CheckpointError, match=r"reads and predicts \(48, 32\) numbers per token; tiny has \(32, 32\)"):
        saved.load("cpu")


def test_settings_under_other_names_are_ours(tmp_path: Path) -> None:
    told = options_in(CONFIG | {"d_sae": 64, "hook_name_out": "mlp_out"}, tmp_path)
    assert told == {
        "model": "tiny", "layer": 1, "top_k": 4, "activation": "top_k", "dict_size": 64, "hook_out": "mlp_out",
    }  # fmt: skip
