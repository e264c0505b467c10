"""What a transcoder is worth to the language model: its cross-entropy with a prediction in the activation's place.

For each piece of the rows:

1. A clean pass: logits, what every transcoder reads, and what enters the layer that it predicts in.
2. For each hook that is predicted: passes from that layer on with zero there, and with the mean of the targets.
3. For each transcoder: a pass from that layer on with its prediction there.

Position 0 keeps its own activation, as it is in no other metric. A token counts where its own activation is replaced
and the next token is in the row, so positions 1 to seq_len - 2. Everything is in nats; sums are float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sweep.blocks import HarvestedBlocks
from sweep.config import Site
from sweep.language_model import Forward, LanguageModel
from sweep.metrics import Metrics, ratio
from sweep.progress import Report, silent
from sweep.slices import consecutive, pieces
from sweep.tokens import ROWS_PER_BLOCK

__all__ = ["Attempt", "CausalRows", "Effect", "causal_effects", "simply"]

SUMS = {
    "clean": "sum_ce_clean",
    "spliced": "sum_ce_spliced",
    "ablated_zero": "sum_ce_ablated_zero",
    "ablated_mean": "sum_ce_ablated_mean",
    "kl": "sum_kl",
}
"""The sums of an effect, and their columns in the table of sequences."""

MAX_LOGIT_BYTES = 128 << 20
"""Size of the logits held at once, where one row fits."""

PIECE_BYTES = 2 << 20
"""Size of the logits compared at once, those of some words for all tokens: they stay in cache."""

Predict = Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens d_out"]]

Attempt = Callable[[str, Callable[[], None]], bool]
"""Does what concerns the transcoder of a name alone, and tells whether it went well."""


def simply(_: str, action: Callable[[], None]) -> bool:
    action()
    return True


@dataclass(frozen=True)
class CausalRows:
    """Held-out rows and the language model they go through; BOS is at position 0."""

    model: LanguageModel
    rows: Int[Tensor, "rows seq"]

    @classmethod
    def first(cls, n_rows: int, blocks: HarvestedBlocks) -> "CausalRows | None":
        """The first held-out rows; None if none are asked for. The model is loaded now if no block needed it yet."""
        if n_rows == 0:
            return None
        return cls(blocks.language_model(), torch.from_numpy(blocks.tokens.heldout[:n_rows].astype("int64")))


@dataclass(frozen=True)
class Effect:
    """Sums over the counted tokens of each row, for one transcoder."""

    n_tokens: int
    """Counted tokens of a row."""
    clean: Float[Tensor, " rows"]
    spliced: Float[Tensor, " rows"]
    ablated_zero: Float[Tensor, " rows"]
    ablated_mean: Float[Tensor, " rows"]
    kl: Float[Tensor, " rows"]

    def metrics(self) -> Metrics:
        """Means over tokens, and what of the harm of an ablation is undone; None where an ablation does no harm."""
        n_tokens = self.n_tokens * len(self.clean)
        clean, spliced, zero, mean, kl = (float(getattr(self, name).sum()) / n_tokens for name in SUMS)
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_ablated_zero": zero,
            "ce_ablated_mean": mean,
            "ce_recovered_zero": ratio(zero - spliced, zero - clean),
            "ce_recovered_mean": ratio(mean - spliced, mean - clean),
            "kl": kl,
            "n_causal_tokens": n_tokens,
        }

    def columns(self, n_rows: int) -> dict[str, list[float | int | None]]:
        """Per held-out row, of which the first were run; None for the others."""
        rest = [None] * (n_rows - len(self.clean))
        return {
            "n_causal_tokens": [*[self.n_tokens] * len(self.clean), *rest],
            **{column: [*getattr(self, name).tolist(), *rest] for name, column in SUMS.items()},
        }


@torch.no_grad()
def causal_effects(
    predictors: Mapping[str, tuple[Site, Predict]],
    means: Mapping[Site, Float[Tensor, " d_out"]],
    on: CausalRows,
    report: Report = silent,
    attempt: Attempt = simply,
) -> dict[str, Effect]:
    """Run the language model with each prediction in its activation's place.

    `attempt` does what concerns one transcoder alone; where it returns False, that one is left out from then on.

    What one transcoder scores does not depend on which others are there. Rows without a token that counts have no
    effect: the result is empty.

    Args:
        means: of the targets of each site, over the held-out tokens.

    Raises:
        ModelError: the language model has no such hook.
    """
    n_rows, seq_len = on.rows.shape
    if seq_len < 3:
        return {}
    sites = [site for site, _ in predictors.values()]
    targets = {site.hook_names[1]: means[site] for site in sites}
    names = {name for site in sites for name in site.hook_names}
    layers = {int(name.split(".")[1]) for name in targets}
    sums: dict[str, dict[str, list[Tensor]]] = {name: {key: [] for key in SUMS} for name in predictors}

    def splice(name: str, forward: Forward, clean: Clean, ablated: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        site, predict = predictors[name]
        source, target = site.hook_names
        spliced, kl = clean.against(on.model.rerun(forward, target, predict(forward.activations[source])))
        for key, value in zip(SUMS, (clean.cross_entropy, spliced, *ablated[target], kl), strict=True):
            sums[name][key].append(value)

    step = min(max(MAX_LOGIT_BYTES // (4 * seq_len * on.model.vocabulary), 1), ROWS_PER_BLOCK)
    for part in consecutive(n_rows, step):
        forward = on.model.run(on.rows[part], names, layers)
        clean = Clean(forward)
        ablated: dict[str, tuple[Tensor, Tensor]] = {}
        for hook, mean in targets.items():
            zero = clean.against(on.model.rerun(forward, hook, torch.zeros_like(mean[None])))
            ablated[hook] = (zero[0], clean.against(on.model.rerun(forward, hook, mean[None]))[0])
        for name in list(sums):
            if not attempt(name, partial(splice, name, forward, clean, ablated)):
                del sums[name]
            report("splice", part.stop, n_rows, "rows")
    return {
        name: Effect(seq_len - 2, **{key: torch.cat(parts).cpu() for key, parts in parts_of.items()})
        for name, parts_of in sums.items()
    }


class Clean:
    """The logits of the clean pass, against which those of other passes are held, some words at a time."""

    def __init__(self, forward: Forward) -> None:
        self._next = forward.rows[:, 2:].flatten()
        self._n_rows = len(forward.rows)
        self._logits = counted(forward.logits)
        self._words = list(pieces(self._logits.shape[1], 4 * len(self._logits), PIECE_BYTES))
        self._total = log_total([self._logits[:, words].logsumexp(1) for words in self._words])
        self.cross_entropy = self._per_row(self._total - self._of_next(self._logits))

    def against(self, logits: Float[Tensor, "rows seq vocabulary"]) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of each row: the cross-entropy of these logits, and KL(clean || these).

        What each word's logit lost, on average over the clean probabilities, and what the logarithm of the total
        gained: so nothing large cancels.
        """
        theirs = counted(logits)
        lost, totals = [], []
        for words in self._words:
            clean, spliced = self._logits[:, words], theirs[:, words]
            probability = (clean - self._total.unsqueeze(1).to(clean)).exp_()
            lost.append(torch.linalg.vecdot(probability, clean - spliced).double())
            totals.append(spliced.logsumexp(1))
        total = log_total(totals)
        divergence = torch.stack(lost).sum(0) + total - self._total
        return self._per_row(total - self._of_next(theirs)), self._per_row(divergence)

    def _of_next(self, logits: Float[Tensor, "tokens vocabulary"]) -> Float64[Tensor, " tokens"]:
        return logits.gather(1, self._next.unsqueeze(1)).squeeze(1).double()

    def _per_row(self, values: Float64[Tensor, " tokens"]) -> Float64[Tensor, " rows"]:
        return values.view(self._n_rows, -1).sum(1)


def log_total(parts: list[Float[Tensor, " tokens"]]) -> Float64[Tensor, " tokens"]:
    """The logarithm of the sum of what the parts are logarithms of."""
    return torch.stack(parts).double().logsumexp(0)


def counted(logits: Float[Tensor, "rows seq vocabulary"]) -> Float[Tensor, "tokens vocabulary"]:
    """The logits of the tokens that count, in float32."""
    return logits[:, 1:-1].flatten(0, 1).float()
