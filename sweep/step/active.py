"""Which latents are active, without ever holding batch x dict_size.

The encoder runs over a few latents at a time, for all tokens: so each of its weights is read once. Of each piece only
entries that may still be among the largest are kept, so what stays is a few numbers per active latent, and the
pre-latents of the dead. The result is exact: the entries that `sweep.transcoder.select` leaves, in the same order, with
the same rule for equals. Batch top-k searches among bounds first, where those take less time than pre-latents
(`sweep.step.screen`).
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sweep.chunks import consecutive
from sweep.config import Capacity
from sweep.step import screen
from sweep.step.bounds import Bounds
from sweep.step.entries import Active, entries, group_maxima, k_largest, kth_largest, no_less, places, sorting
from sweep.step.revive import Revived, among_dead
from sweep.transcoder import Parameters, largest

__all__ = ["BLOCK_BYTES", "encode", "encode_above", "next_guess"]

BLOCK_BYTES = {"batch_top_k": 4 << 20, "top_k": 16 << 20}
"""Pre-latents held at once: they stay in cache while they are searched. The more latents, the better the bound of the
first block of top-k, which has no guess to start from."""

MIN_BLOCK = 256
"""Latents at once at least, however large the batch."""

FROM_TOP = 0.85
"""A search starts as far below the last batch's smallest active latent as that is below the one at this share of their
ranks: so it finds about a sixth more than it needs, and the next batch may have fewer."""

TINY = torch.finfo(torch.float32).tiny
"""What is less counts as zero."""

GROUP_SIZE = 16
"""Latents that share a maximum in the search of top-k."""


@torch.no_grad()
def encode(
    params: Parameters,
    source: Float[Tensor, "batch d_in"],
    capacity: Capacity,
    guess: float,
    dead: Int64[Tensor, " n_dead"],
    top_k_aux: int,
) -> tuple[Active, Revived | None]:
    """The active latents, by latent within each token; and of the `dead` ones the `top_k_aux` largest of each token,
    negative ones too.

    `guess` is a value that the active latents of a batch top-k may exceed: it decides how long this takes, not what
    comes out.
    """
    n_wanted = capacity.top_k * len(source)
    n_alive = capacity.dict_size - len(dead)
    is_of_batch = capacity.activation == "batch_top_k"
    if is_of_batch and n_alive and (fitting := screen.fitting(source, capacity.top_k / n_alive)):
        bounds = fitting(params, source, among=all_but(dead, capacity.dict_size) if len(dead) else None)
        of_dead = partial(among_dead, params, source, dead, top_k_aux, bounds)
        for start in [guess, 0.0] if guess > 0 else [0.0]:
            if found := screened(bounds, n_wanted, start, of_dead):
                return found
            if not bounds.serve:
                break
    search = BatchTopK(n_wanted, guess) if is_of_batch else TopK(capacity.top_k)
    dead_pre = searched(search, params, source, BLOCK_BYTES[capacity.activation], dead)
    if isinstance(search, BatchTopK) and search.missed_some:
        search = BatchTopK(n_wanted, 0.0)
        searched(search, params, source, BLOCK_BYTES[capacity.activation], dead[:0])
    return search.active(), Revived.of(dead, dead_pre, top_k_aux) if len(dead) else None


def next_guess(values: Float[Tensor, " n_active"]) -> float:
    """From the active latents of a batch top-k, what those of the next one may exceed: a straight line through two
    ranks."""
    if not len(values):
        return 0.0
    smallest, above = float(values.min()), kth_largest(values, math.ceil(FROM_TOP * len(values)))
    return max(smallest - (above - smallest), 0.0)


@torch.no_grad()
def encode_above(params: Parameters, source: Float[Tensor, "n d_in"], threshold: float, top_k: int) -> Active:
    """The entries above a threshold that is not negative, by token; about `top_k` of each are expected."""
    if fitting := screen.fitting(source, top_k / params.b_enc.numel()):
        found = at_least(fitting(params, source), max(threshold, TINY))
        if found:
            return found.where(places(found.value > threshold)).by_token()
    blocks = pre_latents_in_blocks(params, source, BLOCK_BYTES["batch_top_k"])
    return Active.join([entries(latents.start, pre, pre > threshold) for latents, pre in blocks]).by_token()


def at_least(bounds: Bounds, least: float) -> Active | None:
    """All entries that are no less than that; None where bounds do not serve."""
    parts = []
    for block in bounds.blocks():
        parts.append(bounds.at_least(block, least))
        if not bounds.serve:
            return None
    return Active.join(parts)


def all_but(latents: Int64[Tensor, " n"], width: int) -> Int64[Tensor, " m"]:
    """The other latents."""
    return torch.ones(width, dtype=torch.bool).index_fill_(0, latents, False).nonzero().squeeze(1)


def screened(
    bounds: Bounds, n_wanted: int, guess: float, of_dead: Callable[[float], tuple[Active, Revived | None]]
) -> tuple[Active, Revived | None] | None:
    """The `n_wanted` largest positive entries of a batch, among those with bounds and those of the dead; None where
    the guess was too high or bounds do not serve."""
    search = BatchTopK(n_wanted, guess)
    for block in bounds.blocks():
        search.keep(bounds.at_least(block, search.bound))
        if not bounds.serve:
            return None
    awake, revived = of_dead(search.bound)
    search.keep(awake)
    if search.missed_some:
        return None
    found = search.kept if len(awake.value) == 0 else search.kept.where(sorting(search.kept.latent))
    return of_batch(found, n_wanted), revived


def searched(
    search: "BatchTopK | TopK",
    params: Parameters,
    source: Float[Tensor, "batch d_in"],
    n_bytes: int,
    dead: Int64[Tensor, " n_dead"],
) -> Float[Tensor, "batch n_dead"]:
    """Give all pre-latents to a search; those of the dead come back."""
    dead_pre = [source.new_empty(len(source), 0)]
    for latents, pre in pre_latents_in_blocks(params, source, n_bytes):
        search.add(latents.start, pre)
        if len(dead):
            first, last = torch.searchsorted(dead, dead.new_tensor([latents.start, latents.stop])).tolist()
            dead_pre.append(pre.index_select(1, dead[first:last] - latents.start))
    return torch.cat(dead_pre, dim=1)


def pre_latents_in_blocks(
    params: Parameters, source: Float[Tensor, "batch d_in"], n_bytes: int
) -> Iterator[tuple[slice, Float[Tensor, "batch n"]]]:
    """Consecutive latents, and the pre-latents of all tokens in memory that the next block overwrites."""
    batch, width = len(source), params.b_enc.numel()
    size = min(max(n_bytes // (batch * source.element_size()), MIN_BLOCK), width)
    buffer = source.new_empty(batch * size)
    for latents in consecutive(width, size):
        out = buffer[: batch * (latents.stop - latents.start)].view(batch, -1)
        yield latents, torch.addmm(params.b_enc[latents], source, params.W_enc[:, latents], out=out)


class BatchTopK:
    """Collects the `n_wanted` largest positive entries of a batch that comes in blocks of latents.

    What is less than `bound` is not kept. It rises when more is kept than is needed, and only a guess that it starts
    from can be wrong.
    """

    def __init__(self, n_wanted: int, guess: float) -> None:
        self.n_wanted = n_wanted
        self.guess = guess if guess > 0 else 0.0  # also where it is no number
        self.bound = max(self.guess, TINY)
        self._kept: list[Active] = []
        self._n_kept = 0

    def add(self, start: int, pre: Float[Tensor, "batch n"]) -> None:
        self.keep(entries(start, pre, no_less(pre, self.bound)))

    def keep(self, part: Active) -> None:
        """Add entries that were found to be no less than the bound."""
        self._kept.append(part)
        self._n_kept += len(part.value)
        if self._n_kept > 2 * self.n_wanted:
            self._prune()

    def _prune(self) -> None:
        kept = self.kept
        self.bound = max(self.bound, kth_largest(kept.value, self.n_wanted))
        kept = kept.where(places(no_less(kept.value, self.bound)))  # all equals: the order is not known yet
        self._kept, self._n_kept = [kept], len(kept.value)

    @property
    def missed_some(self) -> bool:
        """Whether the guess was too high."""
        return self._n_kept < self.n_wanted and self.guess > 0

    @property
    def kept(self) -> Active:
        """What may be among the largest, in the order it came in."""
        return Active.join(self._kept)

    def active(self) -> Active:
        """The largest of what was added."""
        return of_batch(self.kept, self.n_wanted)


def of_batch(found: Active, n: int) -> Active:
    """The `n` largest positive entries, by token; of equals the first."""
    least = kth_largest(found.value, n) if len(found.value) > n else 0.0
    found = found.where(places(no_less(found.value, max(least, TINY)))).by_token()
    if len(found.value) <= n:
        return found
    return found.where(largest(found.value.unsqueeze(0), n).squeeze(0))


class TopK:
    """Collects the `k` largest positive entries of each token of a batch that comes in blocks of latents.

    Latents share maxima in groups, any k groups hold k different latents, so the k-th largest maximum so far is a
    bound that few entries reach.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._maxima: list[Tensor] = []
        self._kept: list[Active] = []

    def add(self, start: int, pre: Float[Tensor, "batch n"]) -> None:
        n_groups = max(pre.shape[1] // GROUP_SIZE, min(self.k, pre.shape[1]))
        self._maxima.append(group_maxima(pre, n_groups))
        maxima = torch.cat(self._maxima, dim=1)
        bound = pre.new_zeros(len(pre), 1)
        if maxima.shape[1] >= self.k:
            maxima = k_largest(maxima, self.k)
            bound = maxima[:, :1]
        self._maxima = [maxima]
        self._kept.append(entries(start, pre, no_less(pre, bound.clamp_min(TINY))))

    def active(self) -> Active:
        """The largest of what was added."""
        kept = Active.join(self._kept).by_token()
        place = torch.arange(len(kept.token), device=kept.token.device) - torch.searchsorted(kept.token, kept.token)
        shape = (int(kept.token[-1]) + 1, int(place.max()) + 1) if len(place) else (0, 0)
        padded = kept.value.new_zeros(shape).index_put_((kept.token, place), kept.value)
        return kept.where(largest(padded, self.k)[kept.token, place])
