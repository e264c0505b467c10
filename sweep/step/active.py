"""Which latents are active, without ever holding batch x dict_size.

The encoder runs over a few latents at a time, for all tokens: so each of its weights is read once. Of each piece only
entries that may still be among the largest are kept, so what stays is a few numbers per active latent, and the
pre-latents of the dead. The result is exact: the entries that `sweep.transcoder.select` leaves, in the same order, with
the same rule for equals.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sweep.config import Capacity
from sweep.transcoder import Parameters, largest

__all__ = ["BLOCK_BYTES", "Active", "Revived", "encode"]

BLOCK_BYTES = {"batch_top_k": 4 << 20, "top_k": 16 << 20}
"""Pre-latents held at once: they stay in cache while they are searched. The more latents, the better the bound of the
first block of top-k, which has no guess to start from."""

MIN_BLOCK = 256
"""Latents at once at least, however large the batch."""

MARGIN = 0.9
"""Where batch top-k starts its search, as a share of the last batch's threshold."""

GROUP_SIZE = 16
"""Latents that share a maximum in the search of top-k."""


@dataclass(frozen=True)
class Active:
    """Entries of a sparse [batch, dict_size] matrix."""

    token: Int64[Tensor, " n"]
    latent: Int64[Tensor, " n"]
    value: Float[Tensor, " n"]

    @classmethod
    def join(cls, parts: list["Active"]) -> "Active":
        columns = zip(*((part.token, part.latent, part.value) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def where(self, chosen: Tensor) -> "Active":
        """The chosen entries, by mask or index."""
        return Active(self.token[chosen], self.latent[chosen], self.value[chosen])

    def by_token(self) -> "Active":
        """Ordered by token; those of a token stay in the order they have."""
        return self.where(self.token.argsort(stable=True))


@dataclass(frozen=True)
class Revived:
    """The largest pre-latents among the dead latents, of each token: places in the list of the dead, and values."""

    place: Int64[Tensor, "batch k"]
    value: Float[Tensor, "batch k"]

    def entries(self, dead: Int64[Tensor, " n_dead"]) -> Active:
        batch, k = self.place.shape
        token = torch.arange(batch, device=dead.device).repeat_interleave(k)
        return Active(token, dead[self.place.flatten()], self.value.flatten())

    def matrix(self, n_dead: int, values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch n_dead"]:
        """Values at these places, zeros elsewhere."""
        return values.new_zeros(len(values), n_dead).scatter_(1, self.place, values)


@torch.no_grad()
def encode(
    params: Parameters,
    source: Float[Tensor, "batch d_in"],
    capacity: Capacity,
    threshold: float,
    dead: Int64[Tensor, " n_dead"],
    top_k_aux: int,
) -> tuple[Active, Revived | None]:
    """The active latents, by latent within each token; and of the `dead` ones the `top_k_aux` largest of each token,
    negative ones too.

    `threshold` is a guess of the smallest active latent of a batch top-k: it decides how long this takes, not what
    comes out.
    """
    n_bytes = BLOCK_BYTES[capacity.activation]
    search: BatchTopK | TopK
    if capacity.activation == "batch_top_k":
        search = BatchTopK(capacity.top_k * len(source), MARGIN * threshold)
    else:
        search = TopK(capacity.top_k)
    dead_pre = []
    for latents, pre in pre_latents_in_blocks(params, source, n_bytes):
        search.add(latents.start, pre)
        if len(dead):
            first, last = torch.searchsorted(dead, dead.new_tensor([latents.start, latents.stop])).tolist()
            dead_pre.append(pre.index_select(1, dead[first:last] - latents.start))
    if isinstance(search, BatchTopK) and search.missed_some:  # the guess was too high
        search = BatchTopK(search.n_wanted, 0.0)
        for latents, pre in pre_latents_in_blocks(params, source, n_bytes):
            search.add(latents.start, pre)
    if not dead_pre:
        return search.active(), None
    values, places = torch.cat(dead_pre, dim=1).topk(min(top_k_aux, len(dead)), dim=1, sorted=False)
    return search.active(), Revived(places, values)


def pre_latents_in_blocks(
    params: Parameters, source: Float[Tensor, "batch d_in"], n_bytes: int
) -> Iterator[tuple[slice, Float[Tensor, "batch n"]]]:
    """Consecutive latents, and the pre-latents of all tokens in memory that the next block overwrites."""
    batch, width = len(source), params.b_enc.numel()
    size = min(max(n_bytes // (batch * source.element_size()), MIN_BLOCK), width)
    buffer = source.new_empty(batch * size)
    for start in range(0, width, size):
        latents = slice(start, min(start + size, width))
        out = buffer[: batch * (latents.stop - start)].view(batch, -1)
        yield latents, torch.addmm(params.b_enc[latents], source, params.W_enc[:, latents], out=out)


class BatchTopK:
    """Collects the `n_wanted` largest positive entries of a batch that comes in blocks of latents.

    What is less than `bound` is not kept. It rises when more is kept than is needed, and only a guess that it starts
    from can be wrong.
    """

    def __init__(self, n_wanted: int, guess: float) -> None:
        self.n_wanted = n_wanted
        self.guess = guess if guess > 0 else 0.0  # also where it is no number
        self.bound = self.guess
        self._kept: list[Active] = []
        self._n_kept = 0

    def add(self, start: int, pre: Float[Tensor, "batch n"]) -> None:
        self.bound = max(self.bound, torch.finfo(pre.dtype).tiny)
        self._keep(entries(start, pre, (pre < self.bound).logical_not_()))
        if self._n_kept > 2 * self.n_wanted:
            kept = Active.join(self._kept)
            self._kept, self._n_kept = [], 0
            self.bound = max(self.bound, float(kept.value.topk(self.n_wanted, sorted=False).values.min()))
            self._keep(kept.where((kept.value < self.bound).logical_not_()))  # all equals: the order is not known yet

    def _keep(self, part: Active) -> None:
        self._kept.append(part)
        self._n_kept += len(part.value)

    @property
    def missed_some(self) -> bool:
        return self._n_kept < self.n_wanted and self.guess > 0

    def active(self) -> Active:
        """The largest of what was added."""
        kept = Active.join(self._kept).by_token()
        return kept.where(largest(kept.value.unsqueeze(0), self.n_wanted).squeeze(0))


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
        size = pre.shape[1] // n_groups
        self._maxima.append(pre[:, : n_groups * size].unflatten(1, (size, n_groups)).amax(dim=1))
        maxima = torch.cat(self._maxima, dim=1)
        bound = pre.new_zeros(len(pre), 1)
        if maxima.shape[1] >= self.k:
            maxima = maxima.topk(self.k, dim=1, sorted=False).values
            bound = maxima.amin(dim=1, keepdim=True)
        self._maxima = [maxima]
        self._kept.append(entries(start, pre, (pre < bound.clamp_min(torch.finfo(pre.dtype).tiny)).logical_not_()))

    def active(self) -> Active:
        """The largest of what was added."""
        kept = Active.join(self._kept).by_token()
        place = torch.arange(len(kept.token), device=kept.token.device) - torch.searchsorted(kept.token, kept.token)
        shape = (int(kept.token[-1]) + 1, int(place.max()) + 1) if len(place) else (0, 0)
        padded = kept.value.new_zeros(shape).index_put_((kept.token, place), kept.value)
        return kept.where(largest(padded, self.k)[kept.token, place])


def entries(start: int, pre: Float[Tensor, "batch n"], where: Tensor) -> Active:
    """Those entries of a block where the mask is true, in order; `start` is its first latent."""
    flat = where.flatten().nonzero().squeeze(1)
    token = flat.div(pre.shape[1], rounding_mode="floor")
    return Active(token, flat - token * pre.shape[1] + start, pre.flatten()[flat])
