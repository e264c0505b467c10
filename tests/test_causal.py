"""The language model with predictions in it: trivial predictors, and a forward with plain torch hooks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from gangs import make_workflow, run_cells, same_bytes
from make import make_cell, make_site
from torch import Tensor

from sweep import causal
from sweep.causal import CausalRows, Effect, causal_effects
from sweep.config import Site
from sweep.errors import Interrupted, ModelError
from sweep.language_model import LanguageModel
from sweep.model_files import quiet_transformers
from sweep.paths import CacheFolder
from sweep.results import CAUSAL_METRICS

SITE = make_site()
SITES = [make_site(layer, hook_in) for layer in (0, 1, 2) for hook_in in ("norm_out", "norm_unit", "resid_mid")]
Predict = Callable[[Tensor], Tensor]


def make_rows(n_rows: int = 6, seq: int = 12) -> Tensor:
    rows = torch.randint(4, 260, (n_rows, seq), generator=torch.Generator().manual_seed(7))
    rows[:, 0] = 2
    return rows


ROWS = make_rows()


@pytest.fixture(scope="module")
def mean(language_model: LanguageModel) -> Tensor:
    """Of the targets of SITE."""
    return language_model.harvest(ROWS, [SITE])[SITE].target.double().mean(0)


def linear(seed: int) -> Predict:
    """Nothing like the MLP, but it depends on what is read."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) / 6
    return lambda source: source @ weight


def effect_of(model: LanguageModel, predict: Predict, mean: Tensor, site: Site = SITE, rows: Tensor = ROWS) -> Effect:
    return causal_effects({"cell": (site, predict)}, {site: mean}, CausalRows(model, rows))["cell"]


class Naive:
    """Hugging Face's model with a hook of torch's own, in which transformer_lens has no part."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        with quiet_transformers():
            self.network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

    def log_probs(self, layer: int, hook_in: str = "", predict: Predict | None = None) -> Tensor:
        """[rows, seq, vocabulary], in float64; at positions from 1 on the MLP's output is what `predict` says."""
        block = self.network.model.layers[layer]
        read: dict[str, Tensor] = {}

        def reads(module: Any, inputs: Any, output: Tensor) -> None:
            x = inputs[0]
            unit = x / (x.pow(2).mean(-1, keepdim=True) + self.network.config.rms_norm_eps).sqrt()
            read.update(resid_mid=x, norm_unit=unit, norm_out=output)

        def writes(module: Any, inputs: Any, output: Tensor) -> Tensor:
            if predict is None:
                return output
            return torch.cat([output[:, :1], predict(read[hook_in])[:, 1:].to(output)], 1)

        hooks = [
            block.pre_feedforward_layernorm.register_forward_hook(reads),
            block.post_feedforward_layernorm.register_forward_hook(writes),
        ]
        with torch.no_grad():
            logits = self.network(ROWS).logits.double()
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def naive(tiny_folder: Path) -> Naive:
    return Naive(tiny_folder)


@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site.hook_in}-{site.layer}")
def test_sums_are_those_of_a_naive_forward(
    naive: Naive, language_model: LanguageModel, mean: Tensor, site: Site
) -> None:
    found = effect_of(language_model, linear(site.layer), mean, site)
    clean = naive.log_probs(site.layer)
    spliced = naive.log_probs(site.layer, site.hook_in, linear(site.layer))
    zero = naive.log_probs(site.layer, site.hook_in, torch.zeros_like)
    ablated_mean = naive.log_probs(site.layer, site.hook_in, mean.expand_as)
    following = ROWS[:, 2:, None]

    def surprise(log_probs: Tensor) -> Tensor:
        return -log_probs[:, 1:-1].gather(-1, following).sum((1, 2))

    kl = (clean.exp() * (clean - spliced))[:, 1:-1].sum((1, 2))
    expected = (surprise(clean), surprise(spliced), surprise(zero), surprise(ablated_mean), kl)
    for name, value in zip(causal.SUMS, expected, strict=True):
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-5, atol=1e-5)
    assert (kl > 0.01).all()


def test_the_true_output_is_worth_everything(language_model: LanguageModel) -> None:
    recovered = []
    for layer in (0, 1, 2):
        perfect = Site(layer, "mlp_out", "mlp_out")  # it reads what it predicts
        target = language_model.harvest(ROWS, [perfect])[perfect].target
        found = effect_of(language_model, lambda source: source, target.mean(0), perfect)
        assert torch.equal(found.spliced, found.clean)
        assert not found.kl.any()
        metrics = found.metrics()
        recovered += [metrics[f"ce_recovered_{name}"] for name in ("zero", "mean")]
    assert set(recovered) - {None} == {1.0}  # not every ablation harms a random model


def test_zero_and_the_mean_are_the_ablations(language_model: LanguageModel, mean: Tensor) -> None:
    zero = effect_of(language_model, torch.zeros_like, mean)
    constant = effect_of(language_model, mean.expand_as, mean)
    assert torch.equal(zero.spliced, zero.ablated_zero)
    assert torch.equal(constant.spliced, constant.ablated_mean)
    assert not torch.equal(zero.spliced, constant.spliced)
    assert (zero.kl > 0).all() and (constant.kl > 0).all()


def test_recovered_is_the_harm_undone_and_none_where_there_is_none() -> None:
    def effect(clean: float, spliced: float, zero: float, mean: float) -> Effect:
        return Effect(
            2, *(torch.tensor([value, value], dtype=torch.float64) for value in (clean, spliced, zero, mean, 1))
        )

    metrics = effect(6, 7, 10, 8).metrics()
    assert (metrics["ce_clean"], metrics["ce_spliced"], metrics["kl"], metrics["n_causal_tokens"]) == (3, 3.5, 0.5, 4)
    assert (metrics["ce_recovered_zero"], metrics["ce_recovered_mean"]) == (0.75, 0.5)
    harmless = effect(6, 7, 5, 6).metrics()
    assert harmless["ce_recovered_zero"] is harmless["ce_recovered_mean"] is None


def test_the_prediction_at_bos_is_never_used(language_model: LanguageModel, mean: Tensor) -> None:
    n_read: list[int] = []

    def predict(source: Tensor) -> Tensor:
        n_read.append(len(source))
        return linear(0)(source)

    effect_of(language_model, predict, mean)
    assert n_read == [6 * 11]
    forward = language_model.run(ROWS, [], [1])
    rerun = language_model.rerun(forward, SITE.hook_names[1], torch.zeros(1, 32))
    assert torch.equal(rerun[:, 0], forward.leaving[:, 0])
    assert not torch.isclose(rerun[:, 1:], forward.leaving[:, 1:]).all(-1).any()


def test_a_rerun_runs_only_the_layers_from_its_own_on(language_model: LanguageModel) -> None:
    ran: list[int] = []
    layers = [block.original_component.mlp for block in language_model._bridge.blocks]
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index)) for index, layer in enumerate(layers)
    ]
    forward = language_model.run(ROWS, [], [0, 2])
    assert ran == [0, 1, 2]
    for layer in (2, 0):
        ran.clear()
        name = make_site(layer).hook_names[1]
        language_model.rerun(forward, name, torch.zeros(1, 32))
        assert ran == list(range(layer, 3))
    for hook in hooks:
        hook.remove()
    assert torch.equal(language_model.run(ROWS, [], []).leaving, forward.leaving)  # nothing is left behind


def test_company_and_the_size_of_pieces_do_not_show(
    language_model: LanguageModel, mean: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = {str(i): (site, linear(i)) for i, site in enumerate(SITES)}
    on = CausalRows(language_model, ROWS)
    together = causal_effects(gang, dict.fromkeys(SITES, mean), on)
    monkeypatch.setattr(causal, "TOKENS_AT_ONCE", 4 * 12)  # four rows, then two
    monkeypatch.setitem(causal.LOGIT_BYTES, "cpu", 4 * 4 * 10 * 100)  # a hundred of 260 words
    for name, (site, predict) in gang.items():
        alone = causal_effects({name: (site, predict)}, {site: mean}, on)[name]
        for key in causal.SUMS:
            torch.testing.assert_close(getattr(alone, key), getattr(together[name], key), rtol=1e-6, atol=1e-6)
    monkeypatch.undo()
    alone = causal_effects({"4": gang["4"]}, {SITES[4]: mean}, on)["4"]
    assert all(torch.equal(getattr(alone, key), getattr(together["4"], key)) for key in causal.SUMS)


def test_rows_too_short_to_predict_anything_have_no_effect(language_model: LanguageModel, mean: Tensor) -> None:
    assert causal_effects({"cell": (SITE, linear(0))}, {SITE: mean}, CausalRows(language_model, ROWS[:, :2])) == {}


def test_a_hook_that_is_not_there_is_told(language_model: LanguageModel, mean: Tensor) -> None:
    with pytest.raises(ModelError, match=r"no activation blocks\.1\.nothing; near that MLP there are"):
        effect_of(language_model, linear(0), mean, replace(SITE, hook_in="blocks.1.nothing"))


def test_a_sweep_writes_what_a_row_is_worth_and_resumes_to_the_same_bytes(cache: CacheFolder, tmp_path: Path) -> None:
    cell, other = make_cell(steps=4), make_cell(steps=4, layer=2, hook_in="norm_unit")
    gang = run_cells([cell, other], make_workflow(tmp_path / "gang", cache, n_causal_rows=7))
    calls = iter(range(10_000))
    workflow = make_workflow(tmp_path / "alone", cache, n_causal_rows=7)

    def in_the_middle(phase: str, done: int, total: int, unit: str) -> None:
        if phase == "splice" and next(calls) == 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_cells([cell], workflow, in_the_middle)
    same_bytes(gang, run_cells([cell], workflow), cell)
    for each in (cell, other):
        row = pl.read_parquet(gang.row("runs", each.cell_id)).row(0, named=True)
        sequences = pl.read_parquet(gang.row("sequences", each.cell_id))
        assert None not in [
            row[name] for name in ("ce_clean", "ce_spliced", "ce_ablated_zero", "ce_ablated_mean", "kl")
        ]
        assert row["n_causal_tokens"] == sequences["n_causal_tokens"].sum() == 7 * 30
        assert row["ce_spliced"] == pytest.approx(sequences["sum_ce_spliced"].sum() / (7 * 30), rel=1e-12)
        assert sequences["sum_kl"].is_null().to_list() == [False] * 7 + [True] * (len(sequences) - 7)
        assert "ce_spliced" in gang.cell(each.cell_id).summary.read_text()


def test_no_rows_asked_for_leaves_the_columns_null(cache: CacheFolder, tmp_path: Path) -> None:
    results = run_cells([make_cell(steps=2)], make_workflow(tmp_path, cache, n_causal_rows=0))
    row = pl.read_parquet(results.row("runs", make_cell(steps=2).cell_id)).row(0, named=True)
    assert all(row[name] is None for name in CAUSAL_METRICS)
    assert "ce_" not in results.cell(make_cell(steps=2).cell_id).summary.read_text()
