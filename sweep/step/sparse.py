"""The sparse step: time and memory go with the active latents, but for the encoder's product.

1. Encode in blocks of latents, keep the active latents (`sweep.step.active`).
2. Decode: each token has one row per nested group, the sum of its active latents' decoder rows; the prefixes'
   reconstructions are the running sum of the groups. Dead latents reconstruct the residual (`sweep.step.revive`).
3. The loss gives the gradient of every row; running sums the other way give that of the groups.
4. The gradient of a latent is the product of its row's gradient and its decoder row, for active entries only; sorted by
   latent, as each decoder row is then read once.
5. The same entries give both weight gradients as weighted sums of rows, a range of latents at a time, so that gradients
   are used for the update while they are in cache.

The numbers are those of `sweep.step.loss`, which defines what is minimised, up to rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sweep.chunks import consecutive
from sweep.config import Capacity, Revival
from sweep.state import TrainState
from sweep.step.active import encode, next_guess
from sweep.step.entries import Active, counted, products, sorting, sums, weighted_sums
from sweep.step.loss import Loss, aux_weight, mean_squares
from sweep.step.revive import DeadGradients
from sweep.step.update import update_latents_, update_shared_
from sweep.transcoder import Parameters

__all__ = ["Gradients", "gradients", "learn_"]

BLOCK_WEIGHTS = 1 << 19
"""Encoder weights updated at once: so many that a block's many small operations do not count, and still few enough for
cache, with decoder, gradients and moments."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of a batch; those of the weights are made for a range of latents at a time.

    `row`, `token`, `value` and `d_value` belong to the active entries, sorted by latent; those of latent i are
    `starts[i]` to `starts[i + 1]`. `dead` is what the dead learn from the residual.
    """

    source: Float[Tensor, "batch d_in"]
    d_rows: Float[Tensor, "n_rows d_out"]
    row: Int64[Tensor, " n"]
    token: Int64[Tensor, " n"]
    value: Float[Tensor, " n"]
    d_value: Float[Tensor, " n"]
    starts: Int64[Tensor, " dict_size_and_1"]
    b_enc: Float[Tensor, " dict_size"]
    b_dec: Float[Tensor, " d_out"]
    W_skip: Float[Tensor, "d_in d_out"] | None
    dead: DeadGradients | None

    def latents(self, latents: slice) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """With respect to the weights of consecutive latents: encoder, then decoder, a row for each latent."""
        starts = self.starts[latents.start : latents.stop + 1]
        first, last = int(starts[0]), int(starts[-1])
        offsets = starts[:-1] - first
        entries = slice(first, last)
        encoder = weighted_sums(self.source, self.token[entries], offsets, self.d_value[entries])
        decoder = weighted_sums(self.d_rows, self.row[entries], offsets, self.value[entries])
        if self.dead is not None:
            self.dead.add_to(latents, encoder, decoder)
        return encoder, decoder

    def parameters(self) -> Parameters:
        """All at once, which is as much memory as the weights take."""
        encoder, decoder = self.latents(slice(0, len(self.b_enc)))
        return Parameters(encoder.T, self.b_enc, decoder, self.b_dec, self.W_skip)


def learn_(
    state: TrainState,
    source: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    capacity: Capacity,
    revival: Revival,
    dead: Bool[Tensor, " dict_size"],
    lr: float,
    betas: tuple[float, ...],
) -> Loss:
    """Change the parameters and moments by one step on scaled source and target."""
    loss, grads, state.guess = gradients(state.params, source, target, capacity, revival, dead, state.guess)
    n_latents = max(BLOCK_WEIGHTS // source.shape[1], 1)
    for latents in consecutive(capacity.dict_size, n_latents):
        encoder, decoder = grads.latents(latents)
        update_latents_(state, latents, encoder, grads.b_enc[latents], decoder, lr, betas)
    update_shared_(state, grads.b_dec, grads.W_skip, lr, betas)
    return loss


@torch.no_grad()
def gradients(
    params: Parameters,
    source: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    capacity: Capacity,
    revival: Revival,
    dead: Bool[Tensor, " dict_size"],
    guess: float = 0.0,
) -> tuple[Loss, Gradients, float]:
    """The loss and its gradients; and the next batch's `guess`, see `sweep.step.active.encode`."""
    to_revive = (dead & (revival.aux_penalty > 0)).nonzero().squeeze(1)
    active, revived = encode(params, source, capacity, guess, to_revive, revival.top_k_aux)

    batch, n_groups = len(source), len(capacity.groups)
    row = rows_of(active, capacity)
    fired = torch.zeros_like(params.b_enc, dtype=torch.bool).index_fill_(0, active.latent, True)
    starts = counted(row, batch * n_groups)

    rows = weighted_sums(params.W_dec, active.latent, starts[:-1], active.value)
    errors = rows.view(batch, n_groups, -1)
    errors[:, 0] += params.b_dec
    if params.W_skip is not None:
        errors[:, 0] += source @ params.W_skip
    add_earlier_(errors)
    errors -= target.unsqueeze(1)
    prefixes, shares = mean_squares(errors), errors.new_tensor(capacity.shares)
    total, aux, of_dead = prefixes @ shares, None, None
    b_enc = torch.zeros_like(params.b_enc)
    if revived is not None:
        weight = float(aux_weight(dead, revival))
        aux, of_dead = revived.learn(params.W_dec, source, errors[:, -1], weight)
        total = total + weight * aux
        b_enc[to_revive] = of_dead.bias
    add_later_(errors, shares * (2 / target.numel()))

    order = sorting(active.latent)
    row, latent_starts = row[order], counted(active.latent, capacity.dict_size)
    d_value = products(params.W_dec, rows, latent_starts, row)
    grads = Gradients(
        source=source,
        d_rows=rows,
        row=row,
        token=active.token[order],
        value=active.value[order],
        d_value=d_value,
        starts=latent_starts,
        b_enc=b_enc.add_(sums(d_value, latent_starts)),
        b_dec=errors[:, 0].sum(dim=0),
        W_skip=None if params.W_skip is None else source.T @ errors[:, 0],
        dead=of_dead,
    )
    n_active = torch.tensor(len(active.value))
    return Loss(total, list(prefixes), aux, n_active, fired), grads, next_guess(active.value)


def rows_of(active: Active, capacity: Capacity) -> Int64[Tensor, " n"]:
    """The row each entry is added to: a token has one for every nested group."""
    ends = torch.tensor(capacity.groups, device=active.latent.device)
    return active.token * len(capacity.groups) + torch.bucketize(active.latent, ends, right=True)


def add_earlier_(rows: Float[Tensor, "n n_groups d"]) -> None:
    """Turn what each group adds into what each prefix is, in place; four times as fast as `cumsum`."""
    for group in range(1, rows.shape[1]):
        rows[:, group] += rows[:, group - 1]


def add_later_(errors: Float[Tensor, "n n_groups d"], weights: Float[Tensor, " n_groups"]) -> None:
    """Weigh each prefix, then sum for each group over those that it is part of, in place."""
    errors *= weights.unsqueeze(1)
    for group in reversed(range(errors.shape[1] - 1)):
        errors[:, group] += errors[:, group + 1]
