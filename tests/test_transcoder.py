"""Selection rules, folding of the scales, and the saved transcoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell

from sweep.errors import CheckpointError
from sweep.transcoder import (
    Parameters,
    Transcoder,
    fold,
    load_transcoder,
    pre_latents,
    save_transcoder,
    select,
    select_batch_top_k,
    select_top_k,
)


def random_params(d_in: int = 6, width: int = 20, d_out: int = 5) -> Parameters:
    g = torch.Generator().manual_seed(0)
    shapes = ((d_in, width), (width,), (width, d_out), (d_out,))
    return Parameters(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))


@given(st.integers(1, 12), st.integers(1, 20), st.data())
def test_selections_keep_the_largest_positive_entries(n: int, width: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, width))
    pre = torch.randn(n, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    for latents, pool in ((select_top_k(pre, top_k), 1), (select_batch_top_k(pre, top_k), n)):
        kept = latents > 0
        assert torch.equal(latents[kept], pre[kept])
        assert latents[~kept].eq(0).all()
        rows_kept, rows_pre = kept.view(-1, pool * width), pre.view(-1, pool * width)
        for row_kept, row in zip(rows_kept, rows_pre, strict=True):
            assert int(row_kept.sum()) == min(top_k * pool, int((row > 0).sum()))
            dropped = row[~row_kept & (row > 0)]
            assert not len(dropped) or dropped.max() <= row[row_kept].min()


def test_select_follows_the_activation() -> None:
    pre = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, -1.0]])
    per_token = select(pre, make_cell(dict_size=3, groups=[3], top_k=1, activation="top_k").capacity)
    per_batch = select(pre, make_cell(dict_size=3, groups=[3], top_k=1).capacity)
    assert torch.equal(per_token, torch.tensor([[5.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))
    assert torch.equal(per_batch, torch.tensor([[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_fold_gives_the_same_function_in_raw_units(threshold: float | None) -> None:
    params, capacity = random_params(), make_cell(dict_size=20, groups=[20], top_k=3).capacity
    raw = torch.randn(30, 6, dtype=torch.float64) * 40
    source_scale, target_scale = 0.025, 3.5
    pre = pre_latents(params, raw * source_scale)
    latents = select_top_k(pre, 3) if threshold is None else torch.where(pre > threshold, pre, 0)
    scaled_prediction = latents @ params.W_dec + params.b_dec
    folded = fold(params, capacity, source_scale, target_scale, threshold)
    found = folded.encode(raw)
    torch.testing.assert_close(found, latents / target_scale)
    assert torch.equal(found > 0, latents > 0)
    torch.testing.assert_close(folded.decode(found), scaled_prediction / target_scale)
    assert torch.equal(folded.W_dec, params.W_dec)


def small_transcoder(threshold: float | None = 0.5) -> Transcoder:
    params = random_params().map(lambda tensor: tensor.float())
    return fold(params, make_cell(dict_size=20, groups=[20], top_k=3).capacity, 1.0, 1.0, threshold)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_saved_transcoder_loads_bit_for_bit(tmp_path: Path, threshold: float | None) -> None:
    transcoder = small_transcoder(threshold)
    save_transcoder(tmp_path, transcoder, {"layer": 3})
    loaded = load_transcoder(tmp_path)
    source = torch.randn(9, 6)
    assert torch.equal(loaded.decode(loaded.encode(source)), transcoder.decode(transcoder.encode(source)))
    assert json.loads((tmp_path / "config.json").read_text())["layer"] == 3


def edit(name: str, change: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        edit("config.json", lambda content: content[: len(content) // 2]),
        edit("config.json", lambda content: b"[]"),
        edit("config.json", lambda content: content.replace(b'"sparse-transcoder"', b'"other"')),
        edit("config.json", lambda content: content.replace(b'"dict_size": 20', b'"dict_size": 21')),
        edit("config.json", lambda content: content.replace(b'"d_out": 5', b'"d_out": null')),
        edit("transcoder.safetensors", lambda content: content[: len(content) // 2]),
        edit("transcoder.safetensors", lambda content: b"\xff" * 64),
        edit("transcoder.safetensors", lambda content: b""),
        lambda folder: (folder / "transcoder.safetensors").unlink(),
        lambda folder: (folder / "config.json").unlink(),
    ],
)
def test_a_damaged_or_foreign_transcoder_is_refused(tmp_path: Path, damage: Any) -> None:
    save_transcoder(tmp_path, small_transcoder(), {})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_transcoder(tmp_path)
