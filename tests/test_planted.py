"""Errors planted one at a time in how Google's transcoders are read; each moves a score that is known beforehand.

The table of docs/gemma_scope.md, whose lines it prints and is held to: pytest -s tests/test_planted.py
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gemma_scope import random_arrays, reference_prediction, write_first, write_second
from known_answers import D, fvu, hugging_face, lookup
from make import make_site
from torch import Tensor

from sweep.baselines.family import scan
from sweep.baselines.gemma_scope import Baseline, load_baseline
from sweep.evaluate import evaluate
from sweep.language_model import Activations, LanguageModel
from sweep.paths import CacheFolder

TOLERANCE = 1e-4
"""Of 1 + FVU, between what is measured and what must come out."""

PAGE = (Path(__file__).parents[1] / "docs" / "gemma_scope.md").read_text(encoding="utf-8")
LINES = re.findall(r"^(\| .* \| .*) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.replace("`", ""), re.MULTILINE)
"""Of its table of planted errors: error and weights, the FVU that must come out, the FVU that does."""

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
        "equal to the MLP": write_first(root / "a", lookup(truth["norm_unit"], target, np.ones(D))),
        "random, square": write_first(root / "b", square),
        "equal to the MLP, Gemma Scope 2": write_second(root / "c", lookup(truth["norm_unit"], target, gain)),
        "random, Gemma Scope 2 with a skip": write_second(root / "d", second),
    }
    must = {
        "equal to the MLP": 0.0,
        "random, square": fvu(reference_prediction(square, truth["norm_unit"])[1], target),
        "equal to the MLP, Gemma Scope 2": 0.0,
        "random, Gemma Scope 2 with a skip": fvu(reference_prediction(second, truth["norm_out"])[1], target),
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


def see(error: str, weights: str, must: float, found: float) -> None:
    """The error shows, as the page tells."""
    line = f"| {error} | {weights} | {must:.3f} | {found:.3f} |"
    print(f"\n{line}")
    assert off(found, must) > 10 * TOLERANCE
    told = {words: [float(number) for number in numbers] for words, *numbers in LINES}
    assert told[line.partition(f" | {must:.3f}")[0]] == pytest.approx([must, found], rel=0.01, abs=1e-3)


def reads(hook: str) -> Callable[[Baseline], Baseline]:
    return lambda baseline: replace(baseline, site=make_site(1, hook))


def with_weights(**change: Callable[[Baseline], Tensor]) -> Callable[[Baseline], Baseline]:
    def planted(baseline: Baseline) -> Baseline:
        new = {name: value(baseline) for name, value in change.items()}
        return replace(baseline, transcoder=replace(baseline.transcoder, **new))

    return planted


ERRORS: dict[str, tuple[str, Callable[[Baseline], Baseline]]] = {
    "reads what the MLP reads instead of x / rms(x)": ("random, square", reads("norm_out")),
    "reads the residual instead of x / rms(x)": ("equal to the MLP", reads("resid_mid")),
    "forgets the norm's gain": ("random, Gemma Scope 2 with a skip", reads("norm_unit")),
    "W_enc transposed": ("random, square", with_weights(W_enc=lambda b: b.transcoder.W_enc.T.contiguous())),
    "W_dec transposed": ("random, square", with_weights(W_dec=lambda b: b.transcoder.W_dec.T.contiguous())),
    "no threshold": ("equal to the MLP", with_weights(threshold=lambda b: torch.zeros_like(b.transcoder.b_enc))),
    "b_dec subtracted from the input": (
        "random, square",
        with_weights(b_enc=lambda b: b.transcoder.b_enc - b.transcoder.b_dec @ b.transcoder.W_enc),
    ),
    "the skip forgotten": (
        "random, Gemma Scope 2 with a skip",
        lambda b: replace(b, transcoder=replace(b.transcoder, W_skip=None)),
    ),
    "predicts the MLP's output before the norm that follows it": (
        "equal to the MLP, Gemma Scope 2",
        lambda b: replace(b, site=make_site(1, b.site.hook_in, "blocks.1.mlp.hook_out")),
    ),
}


def test_nothing_planted_gives_what_must_come_out(known: dict[str, Known], language_model: LanguageModel) -> None:
    assert all(off(measured(language_model, one.baseline), one.fvu) < TOLERANCE for one in known.values())


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_seen(known: dict[str, Known], language_model: LanguageModel, error: str) -> None:
    name, plant = ERRORS[error]
    found = measured(language_model, plant(known[name].baseline))
    see(error, name, known[name].fvu, found)


def test_bos_let_in_is_seen(known: dict[str, Known], language_model: LanguageModel) -> None:
    one = known["equal to the MLP"]
    found = measured(language_model, one.baseline, bos=True)
    see("position 0 (BOS) let in", "equal to the MLP", one.fvu, found)


def test_the_page_has_the_lines_of_these_cases_alone() -> None:
    told = {words.removeprefix("| ").partition(" | ")[0] for words, *_ in LINES}
    assert told == {*ERRORS, "position 0 (BOS) let in"}
