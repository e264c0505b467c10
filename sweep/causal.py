"""What a transcoder is worth to the language model: its cross-entropy with a prediction in the activation's place.

For some rows at a time:

1. A clean pass through the layers: what every transcoder reads, and what enters the layer that it predicts in.
2. For each hook that is predicted: passes from that layer on with zero there, and with the mean of the targets.
3. For each transcoder: a pass from that layer on with its prediction there.
4. For some words at a time: the logits of all these passes, held against the clean ones. Nothing holds those of a whole
   vocabulary.

Position 0 keeps its own activation, as it is in no other metric. A token counts where its own activation is replaced
and the next token is in the row, so positions 1 to seq_len - 2. Everything is in nats; sums are float64.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sweep.blocks import HarvestedBlocks
from sweep.chunks import consecutive, pieces
from sweep.config import Site
from sweep.language_model import Forward, LanguageModel
from sweep.metrics import Metrics
from sweep.progress import Report, silent
from sweep.recovered import SUMS, causal_metrics

__all__ = ["CausalRows", "Effect", "Guard", "causal_effects", "simply"]

TOKENS_AT_ONCE = 1024
"""In a pass, where one row is not longer: a product with a vocabulary's weights is then worth reading them."""

LOGIT_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
"""Size of the logits compared at once, those of some words for all tokens of a pass: they stay in a processor's cache,
while a GPU waits for its host between small products."""

Key = str | tuple[str, str]
"""Of a pass: a transcoder's name, or a hook and what it is ablated with."""

Predict = Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens d_out"]]

Guard = Callable[[str, Callable[[], None]], bool]
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
        return causal_metrics(
            self.n_tokens * len(self.clean), {name: float(getattr(self, name).sum()) for name in SUMS}
        )

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
    guard: Guard = simply,
) -> dict[str, Effect]:
    """Run the language model with each prediction in its activation's place.

    `guard` does what concerns one transcoder alone; where it returns False, that one is left out from then on.

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
    hooks = {name for site in sites for name in site.hook_names}
    layers = {int(name.split(".")[1]) for name in targets}
    sums: dict[str, dict[str, list[Tensor]]] = {name: {key: [] for key in SUMS} for name in predictors}

    def splice(name: str, forward: Forward, passes: dict[Key, Pass]) -> None:
        site, predict = predictors[name]
        source, target = site.hook_names
        passes[name] = Pass(on.model.rerun(forward, target, predict(forward.activations[source])), forward.rows)

    for part in consecutive(n_rows, max(TOKENS_AT_ONCE // seq_len, 1)):
        forward = on.model.run(on.rows[part], hooks, layers)
        passes: dict[Key, Pass] = {}
        for hook, mean in targets.items():
            for kind, value in (("zero", torch.zeros_like(mean)), ("mean", mean)):
                passes[hook, kind] = Pass(on.model.rerun(forward, hook, value.unsqueeze(0)), forward.rows)
        for name in list(sums):
            if not guard(name, partial(splice, name, forward, passes)):
                del sums[name]
        clean = Pass(forward.leaving, forward.rows)
        for words in pieces(on.model.vocabulary, 4 * len(clean.leaving), LOGIT_BYTES[on.model.device.type]):
            compare(clean, passes.values(), words, partial(on.model.logits, forward))
            report("splice", part.start + (part.stop - part.start) * words.stop // on.model.vocabulary, n_rows, "rows")
        for name, of_cell in sums.items():
            hook, spliced = predictors[name][0].hook_names[1], passes[name]
            entropies = (one.cross_entropy() for one in (clean, spliced, passes[hook, "zero"], passes[hook, "mean"]))
            for key, found in zip(SUMS, (*entropies, spliced.divergence(clean)), strict=True):
                of_cell[key].append(found)
    return {
        name: Effect(seq_len - 2, **{key: torch.cat(parts).cpu() for key, parts in of_cell.items()})
        for name, of_cell in sums.items()
    }


class Pass:
    """The tokens that count in a pass of the language model, and what their logits add up to, some words at a time.

    Sums are updated in place: small tensors made between large ones would keep the allocator from using those again.
    """

    def __init__(self, leaving: Float[Tensor, "rows seq d_model"], rows: Int[Tensor, "rows seq"]) -> None:
        self.leaving = leaving[:, 1:-1].flatten(0, 1)
        self._n_rows, self._next = len(rows), rows[:, 2:].flatten()
        self._of_next, self.lost = (self.leaving.new_zeros(len(self.leaving), dtype=torch.float64) for _ in range(2))
        self.total = torch.full_like(self.lost, -torch.inf)
        """The logarithm of the sum of all exponentials so far."""

    def add(self, words: slice, logits: Float[Tensor, "tokens words"]) -> None:
        torch.logaddexp(self.total, logits.logsumexp(1).double(), out=self.total)
        here = (words.start <= self._next) & (self._next < words.stop)
        column = torch.where(here, self._next - words.start, 0).unsqueeze(1)
        self._of_next += torch.where(here, logits.gather(1, column).squeeze(1).double(), 0)

    def cross_entropy(self) -> Float64[Tensor, " rows"]:
        """Summed over the tokens of each row."""
        return self._per_row(self.total - self._of_next)

    def divergence(self, clean: "Pass") -> Float64[Tensor, " rows"]:
        """KL(clean || this), summed over the tokens of each row.

        What the logit of a word lost, on average over the clean probabilities, and what the logarithm of the total
        gained: so nothing large cancels.
        """
        return self._per_row(self.lost + (self.total - clean.total))

    def _per_row(self, values: Float64[Tensor, " tokens"]) -> Float64[Tensor, " rows"]:
        return values.view(self._n_rows, -1).sum(1)


def compare(clean: Pass, passes: Iterable[Pass], words: slice, logits: Callable[[Tensor, slice], Tensor]) -> None:
    """Give every pass the logits of some more words, in float32."""
    expected = logits(clean.leaving, words).float()
    among_these = expected.softmax(1)
    before = clean.total.clone()
    clean.add(words, expected)
    share = 1 - (before - clean.total).exp()  # of the clean probability so far, what these words have
    for one in passes:
        found = logits(one.leaving, words).float()
        one.add(words, found)
        one.lost.lerp_(torch.linalg.vecdot(among_these, expected - found).double(), share)
