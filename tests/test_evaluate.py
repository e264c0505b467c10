"""Trivial predictors through the real evaluation, and its contracts with the results' schema."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import torch
from closeness import assert_close
from make import make_site

from sweep import chunks
from sweep.config import Site
from sweep.errors import DataError
from sweep.evaluate import Evaluation, Predictor, evaluate
from sweep.language_model import Activations
from sweep.results import CAUSAL_COLUMNS, LATENTS, METRICS, SEQUENCES, write_table
from sweep.summary import summary, verdict

T = 11  # tokens of a sequence
SITE, OTHER = make_site(layer=1), make_site(layer=2)


@dataclass(frozen=True)
class Linear:
    """relu(source @ W_enc) @ W_dec + b_dec"""

    W_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor

    def encode(self, source: torch.Tensor) -> torch.Tensor:
        return (source @ self.W_enc).relu()

    def decode(self, latents: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        return latents @ self.W_dec + self.b_dec


def constant(value: torch.Tensor, d_in: int, dict_size: int = 6) -> Linear:
    """Predicts one vector whatever it reads; none of its latents fires."""
    d_out = len(value)
    return Linear(torch.zeros(d_in, dict_size).double(), torch.zeros(dict_size, d_out).double(), value.double())


def identity(d: int) -> Linear:
    """Predicts its source: one latent for each sign of each dimension."""
    eye = torch.eye(d, dtype=torch.float64)
    return Linear(torch.cat([eye, -eye], 1), torch.cat([eye, -eye]), torch.zeros(d, dtype=torch.float64))


def random_predictor(d_in: int, d_out: int, dict_size: int = 16, seed: int = 0) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((d_in, dict_size), (dict_size, d_out), (d_out,))
    return Linear(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def blocks(
    n_blocks: int = 4, rows: int = 3, d_in: int = 5, d_out: int = 5, seed: int = 0
) -> list[dict[Site, Activations]]:
    """Held-out blocks at two sites; targets have means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mean = 4 * torch.randn(d_out, generator=generator)

    def activations() -> Activations:
        source = torch.randn(rows * T, d_in, generator=generator)
        return Activations(source, torch.randn(rows * T, d_out, generator=generator) + mean)

    return [{SITE: activations(), OTHER: activations()} for _ in range(n_blocks)]


def targets(heldout: list[dict[Site, Activations]]) -> torch.Tensor:
    return torch.cat([block[SITE].target for block in heldout]).double()


def evaluate_one(predictor: Predictor, heldout: list[dict[Site, Activations]]) -> Evaluation:
    return evaluate({"cell": (SITE, predictor)}, heldout, T)["cell"]


def test_predicting_the_mean_has_fvu_one() -> None:
    heldout = blocks()
    result = evaluate_one(constant(targets(heldout).mean(0), 5), heldout).metrics
    assert result["fvu"] == pytest.approx(1, rel=1e-12)
    assert result["fvu_per_dimension"] == pytest.approx(1, rel=1e-12)


def test_one_variance_for_all_dimensions_flatters_the_mean() -> None:
    heldout = blocks()
    target = targets(heldout)
    result = evaluate_one(constant(target.mean(0), 5), heldout).metrics
    expected = (target - target.mean(0)).square().mean() / target.var(correction=0)
    assert result["fvu_scalar_variance"] == pytest.approx(float(expected), rel=1e-12)
    assert result["fvu_scalar_variance"] < 0.2


def test_predicting_the_mean_of_other_tokens_is_no_better_than_the_mean() -> None:
    training_mean = targets(blocks(seed=0)[:2]).mean(0)
    assert evaluate_one(constant(training_mean, 5), blocks(seed=0)[2:]).metrics["fvu"] > 1


def test_predicting_zero_is_worse_than_the_mean() -> None:
    heldout = blocks()
    result = evaluate_one(constant(torch.zeros(5), 5), heldout).metrics
    target = targets(heldout)
    assert result["fvu"] == pytest.approx(float(target.square().sum() / (target - target.mean(0)).square().sum()))
    assert result["fvu"] > 1
    assert result["cosine"] == 0
    assert result["l0"] == 0
    assert result["dead_fraction"] == 1


def test_predicting_the_target_is_perfect() -> None:
    heldout = [{SITE: Activations(block[SITE].target, block[SITE].target)} for block in blocks()]
    result = evaluate_one(identity(5), heldout).metrics
    assert result["fvu"] == 0
    assert result["fvu_per_dimension"] == 0
    assert result["fvu_scalar_variance"] == 0
    assert result["mse"] == 0
    assert result["cosine"] == pytest.approx(1, rel=1e-14)
    assert result["l0"] == 5
    assert result["l0_std"] == 0


def test_metrics_are_those_of_the_schema() -> None:
    result = evaluate_one(random_predictor(5, 5), blocks())
    assert set(result.metrics) | {"dead_fraction_training"} == {column.name for column in METRICS}
    known_in_training = {"cell_id", "group", "batches_since_fired"}
    assert set(result.latents[0]) | known_in_training == {column.name for column in LATENTS}
    assert set(result.sequences[0]) | {"cell_id"} == {column.name for column in SEQUENCES}


def test_the_documentation_defines_every_column() -> None:
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = {column.name for column in (*METRICS, *LATENTS, *SEQUENCES)} - {"cell_id"}
    assert {name for name in names if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("predictor", [random_predictor(5, 5), constant(torch.ones(5), 5, dict_size=1)])
def test_rows_fit_the_tables(tmp_path: Path, predictor: Linear) -> None:
    result = evaluate_one(predictor, blocks())
    for table, rows in (("latents", result.latents), ("sequences", result.sequences)):
        write_table(table, tmp_path / table, [{"cell_id": "x", **row} for row in rows])
        assert len(pl.read_parquet(tmp_path / table)) == len(rows)


def test_sequences_add_up_to_the_metrics() -> None:
    heldout = blocks()
    result = evaluate_one(random_predictor(5, 5), heldout)
    total = {
        name: sum(row[name] for row in result.sequences) for name in result.sequences[0] if name not in CAUSAL_COLUMNS
    }
    n_tokens = total["n_tokens"]
    assert n_tokens == result.metrics["n_evaluated_tokens"] == 4 * 3 * T
    assert total["sum_squared_error"] / total["sum_squared_deviation"] == pytest.approx(
        result.metrics["fvu"], rel=1e-13
    )
    assert total["sum_squared_error"] / (5 * n_tokens) == pytest.approx(result.metrics["mse"], rel=1e-13)
    assert total["sum_l0"] / n_tokens == pytest.approx(result.metrics["l0"], rel=1e-13)
    assert total["sum_cosine"] / n_tokens == pytest.approx(result.metrics["cosine"], rel=1e-13)


def test_sequences_are_in_the_order_of_the_blocks() -> None:
    heldout = blocks()
    predictor = random_predictor(5, 5)
    result = evaluate_one(predictor, heldout)
    third = heldout[1][SITE]
    source, target = third.source[:T].double(), third.target[:T].double()
    error = (predictor.decode(predictor.encode(source)) - target).square().sum()
    deviation = (target - targets(heldout).mean(0)).square().sum()
    row = result.sequences[3]
    assert row["sequence"] == 3
    assert row["sum_squared_error"] == pytest.approx(float(error), rel=1e-12)
    assert row["sum_squared_deviation"] == pytest.approx(float(deviation), rel=1e-10)
    assert row["sum_l0"] == (predictor.encode(source) > 0).sum()


def test_latents_have_the_norms_of_their_weights() -> None:
    predictor = random_predictor(5, 5)
    result = evaluate_one(predictor, blocks())
    assert [row["encoder_norm"] for row in result.latents] == pytest.approx(predictor.W_enc.norm(dim=0).tolist())
    assert [row["decoder_norm"] for row in result.latents] == pytest.approx(predictor.W_dec.norm(dim=1).tolist())
    assert sum(row["density"] for row in result.latents) == pytest.approx(result.metrics["l0"])


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = random_predictor(5, 5)
    whole = evaluate_one(predictor, blocks())
    monkeypatch.setattr(chunks, "MAX_BYTES", 4 * 16 * 7)  # 7 tokens of latents: chunks that straddle sequences
    parts = evaluate_one(predictor, blocks())
    assert_close(parts.metrics, whole.metrics, rel=1e-12)
    for row, expected in zip(parts.sequences, whole.sequences, strict=True):
        assert_close(row, expected, rel=1e-12)


def test_grouping_into_blocks_does_not_show() -> None:
    heldout = blocks()
    whole = {SITE: Activations(*(torch.cat([getattr(b[SITE], f) for b in heldout]) for f in ("source", "target")))}
    predictor = random_predictor(5, 5)
    expected = evaluate_one(predictor, heldout)
    result = evaluate_one(predictor, [whole])
    assert_close(result.metrics, expected.metrics, rel=1e-12)


def float32(predictor: Linear) -> Linear:
    return Linear(predictor.W_enc.float(), predictor.W_dec.float(), predictor.b_dec.float())


def test_a_gang_scores_as_its_members_do_alone() -> None:
    gang: dict[str, tuple[Site, Predictor]] = {
        "a": (SITE, float32(random_predictor(5, 5, 16, seed=1))),
        "b": (SITE, float32(random_predictor(5, 5, 300, seed=2))),
        "c": (OTHER, float32(random_predictor(5, 5, 16, seed=3))),
    }
    together = evaluate(gang, blocks(), T)
    for name, member in gang.items():
        assert evaluate({name: member}, blocks(), T)[name] == together[name], name


def test_each_predictor_is_scored_at_its_own_site() -> None:
    predictor = random_predictor(5, 5)
    swapped = [{SITE: block[OTHER], OTHER: block[SITE]} for block in blocks()]
    both = evaluate({"a": (SITE, predictor), "b": (OTHER, predictor)}, blocks(), T)
    crossed = evaluate({"a": (SITE, predictor), "b": (OTHER, predictor)}, swapped, T)
    assert both["a"] == crossed["b"]
    assert both["b"] == crossed["a"]
    assert both["a"].metrics["fvu"] != both["b"].metrics["fvu"]


def test_evaluation_reads_the_stream_once_and_changes_nothing() -> None:
    heldout = blocks()
    n_reads = 0

    def once() -> Iterator[dict[Site, Activations]]:
        nonlocal n_reads
        for block in heldout:
            n_reads += 1
            yield block

    predictor = random_predictor(5, 5)
    before = [t.clone() for t in (predictor.W_enc, predictor.W_dec, predictor.b_dec, targets(heldout))]
    evaluate({"a": (SITE, predictor), "b": (OTHER, predictor)}, once(), T)
    after = (predictor.W_enc, predictor.W_dec, predictor.b_dec, targets(heldout))
    assert n_reads == len(heldout)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_evaluation_takes_bfloat16_activations_and_differing_widths() -> None:
    heldout = [
        {site: Activations(*(x.bfloat16() for x in a)) for site, a in block.items()}
        for block in blocks(d_in=3, d_out=8)
    ]
    result = evaluate_one(float32(random_predictor(3, 8)), heldout).metrics
    as_float = [{site: Activations(*(x.float() for x in a)) for site, a in block.items()} for block in heldout]
    assert result == evaluate_one(float32(random_predictor(3, 8)), as_float).metrics


def test_evaluation_builds_no_graph() -> None:
    predictor = random_predictor(5, 5)
    predictor.W_enc.requires_grad_()
    assert evaluate_one(predictor, blocks()).metrics["fvu"] > 0
    assert predictor.W_enc.grad is None


def test_no_heldout_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="n_heldout_tokens"):
        evaluate({"cell": (SITE, identity(5))}, [], T)


def test_evaluation_reports_its_progress() -> None:
    seen: list[tuple[str, int, int, str]] = []
    evaluate({"cell": (SITE, identity(5))}, blocks(), T, lambda *args: seen.append(args), n_blocks=4)
    assert seen == [*(("evaluate", i + 1, 4, "blocks") for i in range(4)), ("compare decoder rows", 1, 1, "cells")]


@pytest.mark.parametrize(
    ("metric", "value", "word"),
    [
        ("fvu", 0.0999, "excellent"),
        ("fvu", 0.1, "moderate"),
        ("fvu", 0.3, "moderate"),
        ("fvu", 0.301, "poor"),
        ("dead_fraction", 0.0999, "excellent"),
        ("dead_fraction", 0.1, "some waste"),
        ("dead_fraction", 0.301, "poor"),
        ("absorption_score", 0.0099, "excellent"),
        ("absorption_score", 0.01, "good"),
        ("absorption_score", 0.05, "poor"),
        ("l0", 32.0, ""),
    ],
)
def test_verdict_follows_the_rules(metric: str, value: float, word: str) -> None:
    assert verdict(metric, value) == word


def test_summary_lines_up_and_shows_undefined_values() -> None:
    heldout = blocks()
    text = summary(evaluate_one(constant(targets(heldout).mean(0), 5, dict_size=1), heldout).metrics)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["fvu"] == ["1", "<", "0.1", "poor"]
    assert lines["absorption_score"] == ["n/a", "<", "0.01"]
    assert lines["n_evaluated_tokens"] == ["132"]
