"""Errors planted one at a time in how Google's transcoders are read; each moves a score that is known beforehand.

The table of docs/gemma_scope.md, with the numbers of this test: pytest -s tests/test_planted.py
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gemma_scope import random_arrays, reference_prediction, write_first, write_second
from make import make_site
from test_beside import D, fvu, hugging_face, lookup
from torch import Tensor

from sweep.baselines.family import scan
from sweep.baselines.gemma_scope import Baseline, load_baseline
from sweep.evaluate import evaluate
from sweep.language_model import Activations, LanguageModel
from sweep.paths import CacheFolder

TOLERANCE = 1e-4
"""Of 1 + FVU, between what is measured and what must come out."""

ROWS = torch.randint(4, 260, (8, 32), generator=torch.Generator().manual_seed(3))
ROWS[:, 0] = 2


@dataclass(frozen=True)
class Known:
    """A transcoder in Google's layout, and the FVU that must come out."""

    baseline: Baseline
    fvu: float


@pytest.fixture(scope="module")
def known(tiny_folder: Path, cache: CacheFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Known]:
    truth = hugging_face(tiny_folder, ROWS.numpy())
    target, gain = truth["target"], np.median(truth["norm_out"] / truth["norm_unit"], 0)
    square, second = random_arrays(D, D, D), random_arrays(D, 80, D, seed=2, skip=True)
    root = tmp_path_factory.mktemp("planted")
    folders = {
        "mlp": write_first(root / "a", lookup(truth["norm_unit"], target, np.ones(D))),
        "random": write_first(root / "b", square),
        "mlp of the second": write_second(root / "c", lookup(truth["norm_unit"], target, gain)),
        "random of the second": write_second(root / "d", second),
    }
    must = {
        "mlp": 0.0,
        "random": fvu(reference_prediction(square, truth["norm_unit"])[1], target),
        "mlp of the second": 0.0,
        "random of the second": fvu(reference_prediction(second, truth["norm_out"])[1], target),
    }
    return {name: Known(load_baseline(scan(folder)[0], 1, D, D), must[name]) for name, folder in folders.items()}


def measured(model: LanguageModel, baseline: Baseline, *, bos: bool = False) -> float:
    """The FVU on ROWS; `bos` lets position 0 in."""
    if bos:
        seen: dict[str, Tensor] = {}
        hooks = [(name, lambda x, hook, name=name: seen.update({name: x})) for name in baseline.site.hook_names]
        with torch.no_grad():
            model._bridge.run_with_hooks(ROWS, return_type=None, fwd_hooks=hooks)
        block = {baseline.site: Activations(*(seen[name].flatten(0, 1) for name in baseline.site.hook_names))}
    else:
        block = model.harvest(ROWS, [baseline.site])
    score = evaluate({"it": (baseline.site, baseline.transcoder)}, [block], 32 if bos else 31)["it"]
    return float(score.metrics["fvu"] or 0)


def off(found: float, must: float) -> float:
    return abs(found - must) / (1 + must)


def reads(hook: str) -> Callable[[Baseline], Baseline]:
    return lambda baseline: replace(baseline, site=make_site(1, hook))


def with_weights(**change: Callable[[Baseline], Tensor]) -> Callable[[Baseline], Baseline]:
    def planted(baseline: Baseline) -> Baseline:
        new = {name: value(baseline) for name, value in change.items()}
        return replace(baseline, transcoder=replace(baseline.transcoder, **new))

    return planted


ERRORS: dict[str, tuple[str, Callable[[Baseline], Baseline]]] = {
    "reads what the MLP reads instead of x / rms(x)": ("random", reads("norm_out")),
    "reads the residual instead of x / rms(x)": ("mlp", reads("resid_mid")),
    "forgets the norm's gain": ("random of the second", reads("norm_unit")),
    "W_enc transposed": ("random", with_weights(W_enc=lambda b: b.transcoder.W_enc.T.contiguous())),
    "W_dec transposed": ("random", with_weights(W_dec=lambda b: b.transcoder.W_dec.T.contiguous())),
    "no threshold": ("mlp", with_weights(threshold=lambda b: torch.zeros_like(b.transcoder.b_enc))),
    "b_dec subtracted from the input": (
        "random",
        with_weights(b_enc=lambda b: b.transcoder.b_enc - b.transcoder.b_dec @ b.transcoder.W_enc),
    ),
    "the skip forgotten": ("random of the second", lambda b: replace(b, transcoder=replace(b.transcoder, W_skip=None))),
    "predicts the MLP's output before the norm that follows it": (
        "mlp of the second",
        lambda b: replace(b, site=make_site(1, b.site.hook_in, "blocks.1.mlp.hook_out")),
    ),
}


def test_nothing_planted_gives_what_must_come_out(known: dict[str, Known], language_model: LanguageModel) -> None:
    assert all(off(measured(language_model, one.baseline), one.fvu) < TOLERANCE for one in known.values())


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_seen(known: dict[str, Known], language_model: LanguageModel, error: str) -> None:
    name, plant = ERRORS[error]
    found = measured(language_model, plant(known[name].baseline))
    print(f"| {error} | {name} | {known[name].fvu:.3f} | {found:.3f} |")
    assert off(found, known[name].fvu) > 10 * TOLERANCE


def test_bos_let_in_is_seen(known: dict[str, Known], language_model: LanguageModel) -> None:
    one = known["mlp"]
    found = measured(language_model, one.baseline, bos=True)
    print(f"| position 0 (BOS) let in | mlp | {one.fvu:.3f} | {found:.3f} |")
    assert off(found, one.fvu) > 10 * TOLERANCE
