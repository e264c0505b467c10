"""A saved transcoder beside Google's of the same layer, on the same rows: what `python -m sweep compare` does.

1. Names and headers of Google's files are checked against the language model before it is loaded.
2. All transcoders are scored in one pass over the same held-out rows, each reading its own hook.
3. Ours is placed against theirs at its own L0 (analysis/frontier.py); across L0s there is no winner.
4. What the two were given is told: tokens, width, what they read, a linear map beside the latents, which weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.frontier import Placement, Sums, frontier, place
from sweep.baselines.family import choose, scan
from sweep.baselines.gemma_scope import Baseline, load_baseline, suspicions
from sweep.baselines.header import check
from sweep.config import Cell
from sweep.devices import pick_device
from sweep.errors import ConfigError
from sweep.evaluate import Evaluation
from sweep.metrics import Metrics
from sweep.paths import CacheFolder, write_json
from sweep.progress import Report
from sweep.saved import Saved
from sweep.score import causal_rows_of, row_before, score_on_rows
from sweep.summary import aligned, shown
from sweep.tokens import row_counts

__all__ = ["Compared", "compare", "text", "write"]

OURS = "ours"
SHOWN = ("l0", "fvu", "cosine", "dead_fraction", "absorption_score", "frac_latents_with_twin")
CAUSAL = ("ce_recovered_zero", "kl")
"""Shown where the language model ran with predictions in it."""
GOOGLE_TOKENS = "4 billion"
"""What Gemma Scope was trained on by its authors' report; that of Gemma Scope 2 is not known here."""


@dataclass(frozen=True)
class Compared:
    """Metrics of ours and of each of Google's, and where ours stands among them."""

    facts: dict[str, Any]
    ours: Metrics
    google: dict[str, dict[str, Any]]
    placement: Placement
    on_frontier: list[str]
    budget: dict[str, dict[str, Any]]
    sentence: str


def compare(
    saved: Saved,
    google_dir: Path,
    width: str | None,
    l0: str,
    n_rows: int | None,
    cache: CacheFolder,
    device: str,
    report: Report,
    n_causal_rows: int | None = None,
) -> Compared:
    """Score `saved` and the transcoders in `google_dir` on the first `n_rows` held-out rows (None: its sweep's).

    The language model runs with predictions in it on the first `n_causal_rows` of them (None: as many as in its sweep).

    Raises:
        SweepError: there is nothing to compare with, a file is damaged or of another model, the text has fewer rows.
    """
    cell = saved.cell
    if cell.site.hook_out != "mlp_out":
        raise ConfigError(f"{saved.name} predicts {cell.site.hook_out}, Google's predict mlp_out: nothing to compare")
    d_in, d_out = cell.model.d_in, cell.model.d_out
    entries = choose(scan(google_dir), cell.site.layer, width, l0, str(google_dir))
    for entry in entries:
        check(entry, cell.site.layer, d_in, d_out)
    device = pick_device(device)
    baselines = [load_baseline(entry, cell.site.layer, d_in, d_out, device) for entry in entries]
    predictors = {OURS: (cell.site, saved.load(device))} | {b.name: (b.site, b.transcoder) for b in baselines}
    n_rows = n_rows or row_counts(cell.data)["heldout"]
    if n_causal_rows is None:
        n_causal_rows = causal_rows_of(row_before(saved), cell)
    scores, on = score_on_rows(predictors, cell, n_rows, n_causal_rows, cache, device, report)
    placement, on_frontier = _placed(scores[OURS], {b.name: scores[b.name] for b in baselines})
    return Compared(
        facts={**saved.facts(), "google_dir": str(google_dir), **on},
        ours=scores[OURS].metrics,
        google={b.name: _google(b, scores[b.name]) for b in baselines},
        placement=placement,
        on_frontier=on_frontier,
        budget={OURS: _our_budget(saved)} | {b.name: _their_budget(b, cell) for b in baselines},
        sentence=_sentence(placement, scores[OURS].metrics, [scores[name].metrics for name in on_frontier]),
    )


def _google(baseline: Baseline, evaluation: Evaluation) -> dict[str, Any]:
    remarks = suspicions(baseline, float(evaluation.metrics["l0"] or 0), evaluation.source_norm)
    about = {"hook_in": baseline.site.hook_in, "hook_out": baseline.site.hook_out, "file_hash": baseline.file_hash}
    return {**about, "baseline_l0": baseline.l0, "remarks": remarks, **evaluation.metrics}


def _placed(ours: Evaluation, theirs: Mapping[str, Evaluation]) -> tuple[Placement, list[str]]:
    """Where ours stands, and the names on the frontier, sparsest first."""
    edge = _sums(list(theirs.values()))
    chosen = frontier(edge.l0.sum(1), edge.loss.sum(1))
    if not len(chosen):
        return Placement(None, None, None, None, False, None), []
    (placement,) = place(_sums([ours]), edge).placements
    return placement, [list(theirs)[i] for i in chosen]


def _sums(evaluations: list[Evaluation]) -> Sums:
    def column(name: str, rows: list[dict[str, Any]]) -> list[float]:
        return [float(row[name]) for row in rows]

    loss, l0 = (np.array([column(name, e.sequences) for e in evaluations]) for name in ("sum_squared_error", "sum_l0"))
    return Sums(loss, l0, np.array(column("n_tokens", evaluations[0].sequences)))


def _our_budget(saved: Saved) -> dict[str, Any]:
    cell = saved.cell
    return {
        "training_tokens": saved.n_training_tokens,
        "width": cell.capacity.dict_size,
        "hook_in": cell.site.hook_in,
        "linear_map": "yes" if cell.capacity.skip else "no",
        "weights": cell.model.model_repo or cell.model.model,
    }


def _their_budget(baseline: Baseline, cell: Cell) -> dict[str, Any]:
    """`weights` says so where they are not those ours was trained and all were scored on."""
    first = baseline.site.hook_in == "norm_unit"
    same = cell.model.model_repo in (baseline.trained_on, baseline.trained_on.removesuffix("-pt"))
    same = same and cell.model.model_format == "hub"
    return {
        "training_tokens": GOOGLE_TOKENS if first else None,
        "width": baseline.transcoder.W_enc.shape[1],
        "hook_in": baseline.site.hook_in,
        "linear_map": "no" if baseline.transcoder.W_skip is None else "yes",
        "weights": baseline.trained_on + ("" if same else " (other weights)"),
    }


def _sentence(at: Placement, ours: Metrics, edge: list[Metrics]) -> str:
    """The verdict in words; never a winner across different L0."""
    l0s = ", ".join(shown(metrics["l0"]) for metrics in edge)
    here = f"ours at L0 {shown(ours['l0'])}, Google's at {l0s}"
    if at.ratio is None or at.extrapolated:
        words = {
            "dominates": "ours is sparser and its FVU lower: it dominates",
            "dominated": "ours is denser and its FVU higher: it is dominated",
        }
        return f"{words.get(at.verdict or '', 'not comparable at these L0s')} ({here})"
    interval = "" if at.low is None or at.high is None else f", 95% {at.low:.4g} to {at.high:.4g}"
    verdict = at.verdict or "no verdict: too few sequences"
    matched = "" if at.matched_l0 is None else f"; Google's has our FVU at L0 {at.matched_l0:.4g}"
    return f"{verdict} at equal L0: FVU {at.ratio:.4g} times Google's{interval}{matched} ({here})"


def text(compared: Compared) -> str:
    """The tables and the verdict."""
    facts = compared.facts
    names = [*SHOWN, *(CAUSAL if compared.ours["n_causal_tokens"] else ())]
    lines = [("", *names), (OURS, *(shown(compared.ours[name]) for name in names))]
    lines += [(name, *(shown(metrics[name]) for name in names)) for name, metrics in compared.google.items()]
    keys = ("training_tokens", "width", "hook_in", "linear_map", "weights")
    budget: list[tuple[str, ...]] = [("budget", *keys)]
    for name, given in compared.budget.items():
        values = [f"{value:,}" if isinstance(value, int) else value or "not known" for value in map(given.get, keys)]
        budget.append((name, *values))
    remarks = [f"{name}: {remark}" for name, metrics in compared.google.items() for remark in metrics["remarks"]]
    return (
        f"{facts['name']}: {facts['model']} layer {facts['layer']}, {facts['n_rows']:,} held-out rows of "
        f"{facts['dataset']} ({compared.ours['n_evaluated_tokens']:,} tokens), the same for all\n\n"
        + aligned(lines, right=range(1, 1 + len(names)))
        + "\n"
        + aligned(budget, right=(1, 2))
        + "\n"
        + "".join(f"warning: {remark}\n" for remark in remarks)
        + f"verdict: {compared.sentence}\n"
    )


def write(compared: Compared, folder: Path) -> None:
    """Write `comparison.json`, `ours_metrics.json` and `google_metrics.json`, each whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "ours_metrics.json", {**compared.facts, **compared.ours})
    write_json(folder / "google_metrics.json", compared.google)
    write_json(
        folder / "comparison.json",
        {
            **compared.facts,
            "verdict": compared.placement.verdict,
            "summary": compared.sentence,
            "fvu_at_equal_l0": asdict(compared.placement),
            "frontier": compared.on_frontier,
            "budget": compared.budget,
        },
    )
