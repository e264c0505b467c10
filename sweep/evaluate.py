"""Held-out evaluation: one pass over the blocks scores every transcoder of a gang.

    block -> targets of each site -> TargetMoments                             once per site
          -> sources, in chunks -> encode -> LatentActivity -> decode          once per transcoder
          -> targets and predictions -> Reconstruction
    then, on some rows: predictions in the language model's own activation's place -> cross-entropies, see causal.py

Nothing is changed by being looked at, and what one transcoder scores does not depend on which others are there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sweep.causal import CausalRows, Effect, Guard, causal_effects, simply
from sweep.chunks import pieces
from sweep.config import Site
from sweep.contexts import TopContexts
from sweep.errors import DataError
from sweep.language_model import Activations
from sweep.metrics import (
    Deviations,
    LatentActivity,
    Metrics,
    Reconstruction,
    TargetMoments,
    reconstruction_metrics,
)
from sweep.progress import Report, silent
from sweep.results import CAUSAL_COLUMNS, CAUSAL_METRICS
from sweep.similarity import DecoderSimilarity, decoder_similarity

__all__ = ["Evaluation", "Predictor", "evaluate"]


@runtime_checkable
class Predictor(Protocol):
    """What evaluation needs of a transcoder; a trivial predictor will do."""

    @property
    def W_enc(self) -> Float[Tensor, "d_in dict_size"]: ...  # noqa: N802

    @property
    def W_dec(self) -> Float[Tensor, "dict_size d_out"]: ...  # noqa: N802

    def encode(self, source: Float[Tensor, "n d_in"]) -> Float[Tensor, "n dict_size"]: ...

    def decode(
        self, latents: Float[Tensor, "n dict_size"], source: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]: ...


@dataclass(frozen=True)
class Evaluation:
    """What is known of one transcoder after a pass over the held-out tokens; names as in sweep/results.py.

    `metrics` has every name of METRICS but dead_fraction_training; `latents` and `sequences` are rows of those
    tables without cell_id and, for latents, without group and batches_since_fired, which training knows.
    """

    metrics: Metrics
    source_norm: float
    """Mean Euclidean norm of what the transcoder read."""
    latents: list[dict[str, Any]]
    sequences: list[dict[str, Any]]
    contexts: list[dict[str, Any]] = field(default_factory=list)
    """What excites each latent most, as TopContexts gives it; empty where none were asked for."""


@torch.no_grad()
def evaluate(
    predictors: Mapping[str, tuple[Site, Predictor]],
    heldout: Iterable[Mapping[Site, Activations]],
    seq_tokens: int,
    report: Report = silent,
    n_blocks: int = 0,
    n_contexts: int = 0,
    guard: Guard = simply,
    causal: CausalRows | None = None,
) -> dict[str, Evaluation]:
    """Score every predictor on the held-out blocks, in one pass.

    `guard` does what concerns one predictor alone; where it returns False, that one is left out from then on.

    `heldout` yields blocks of whole sequences of `seq_tokens` tokens each, BOS dropped; `n_blocks` is how many will
    come, for the report. Of each latent the `n_contexts` contexts that excite it most are kept. `causal` holds the
    first of these rows, on which the language model runs with each prediction in its activation's place; without it
    those metrics are None.

    Raises:
        DataError: there is no block.
    """
    moments = {site: TargetMoments(seq_tokens) for site, _ in predictors.values()}
    scores = {name: Score(site, predictor, seq_tokens, n_contexts) for name, (site, predictor) in predictors.items()}
    n_done = 0
    for n_done, block in enumerate(heldout, 1):
        for site, moment in moments.items():
            moment.update(block[site].target)
        for name, score in list(scores.items()):
            if not guard(name, partial(score.update, block[score.site])):
                del scores[name]
        report("evaluate", n_done, n_blocks, "blocks")
    if not n_done:
        raise DataError("the held-out split has no row; raise n_heldout_tokens= or give more text")
    deviations = {site: moment.deviations() for site, moment in moments.items()}
    effects: dict[str, Effect] = {}
    if causal is not None:
        means = {site: each.mean for site, each in deviations.items()}
        predict = {name: (score.site, score.predict) for name, score in scores.items()}
        effects = causal_effects(predict, means, causal, report, guard)
    evaluations: dict[str, Evaluation] = {}

    def conclude(name: str, score: Score) -> None:
        evaluations[name] = score.evaluation(deviations[score.site], seq_tokens, effects.get(name))

    for name, score in scores.items():
        guard(name, partial(conclude, name, score))
        report("compare decoder rows", len(evaluations), len(scores), "cells")
    return evaluations


class Score:
    """The sums of one predictor."""

    def __init__(self, site: Site, predictor: Predictor, seq_tokens: int, n_contexts: int) -> None:
        self.site = site
        self.predictor = predictor
        self.dict_size = predictor.W_enc.shape[1]
        self.reconstruction = Reconstruction()
        self.activity = LatentActivity(self.dict_size, predictor.W_enc.device)
        self.source_norms = 0.0
        device = predictor.W_enc.device
        self.contexts = TopContexts(self.dict_size, seq_tokens, n_contexts, device) if n_contexts else None

    def update(self, activations: Activations) -> None:
        """Add a block, a chunk of tokens at a time, so that the latents of a chunk stay small."""
        source, target = activations.source, activations.target
        for chunk in pieces(len(source), 4 * self.dict_size):
            read = source[chunk].to(self.predictor.W_enc)
            latents = self.predictor.encode(read)
            self.source_norms += float(torch.linalg.vector_norm(read.double(), dim=1).sum())
            self.activity.update(latents)
            if self.contexts:
                self.contexts.update(latents)
            self.reconstruction.update(target[chunk], self.predictor.decode(latents, read).to(target.device))

    def predict(self, source: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """The prediction alone; nothing is added up."""
        parts = (source[chunk].to(self.predictor.W_enc) for chunk in pieces(len(source), 4 * self.dict_size))
        return torch.cat([self.predictor.decode(self.predictor.encode(part), part) for part in parts])

    def evaluation(self, deviations: Deviations, seq_tokens: int, effect: Effect | None) -> Evaluation:
        similarity = decoder_similarity(self.predictor.W_dec)
        return Evaluation(
            metrics={
                **reconstruction_metrics(self.reconstruction, deviations),
                **self.activity.metrics(),
                **similarity.metrics(),
                **(effect.metrics() if effect else dict.fromkeys(CAUSAL_METRICS)),
            },
            source_norm=self.source_norms / deviations.n_tokens,
            latents=self._latents(similarity),
            sequences=self._sequences(deviations, seq_tokens, effect),
            contexts=self.contexts.rows() if self.contexts else [],
        )

    def _latents(self, similarity: DecoderSimilarity) -> list[dict[str, Any]]:
        W_enc, W_dec = self.predictor.W_enc, self.predictor.W_dec
        return as_rows(
            {
                "latent": list(range(self.dict_size)),
                **self.activity.columns(),
                "encoder_norm": torch.linalg.vector_norm(W_enc, dim=0, dtype=torch.float64).tolist(),
                "decoder_norm": torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.float64).tolist(),
                **similarity.columns(),
            }
        )

    def _sequences(self, deviations: Deviations, seq_tokens: int, effect: Effect | None) -> list[dict[str, Any]]:
        n_rows = len(deviations.per_sequence)

        def per_sequence(values: Tensor) -> list[float]:
            sums: list[float] = values.view(n_rows, seq_tokens).double().sum(1).tolist()
            return sums

        return as_rows(
            {
                "sequence": list(range(n_rows)),
                "n_tokens": [seq_tokens] * n_rows,
                "sum_squared_error": per_sequence(self.reconstruction.squared_error),
                "sum_squared_deviation": deviations.per_sequence.tolist(),
                "sum_l0": per_sequence(self.activity.l0),
                "sum_cosine": per_sequence(self.reconstruction.cosine),
                **(effect.columns(n_rows) if effect else {name: [None] * n_rows for name in CAUSAL_COLUMNS}),
            }
        )


def as_rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
