"""Which latents are active, without ever holding batch x dict_size.

The encoder runs over a few tokens at a time. Of each piece only entries that may still be among the largest are kept,
so what stays is a few numbers per active latent. The result is exact: the entries that `sweep.transcoder.select`
leaves, in the same order, with the same rule for equals.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sweep.config import Capacity
from sweep.transcoder import Parameters, largest

__all__ = ["Active", "Revived", "encode"]

CHUNK_BYTES = 16 << 20
"""Pre-latents held at once."""

MARGIN = 0.9
"""Where batch top-k starts its search, as a share of the last batch's threshold."""

GROUP_SIZE = 16
"""Latents that share a maximum in the search of top-k."""


@dataclass(frozen=True)
class Active:
    """Entries of a sparse [batch, dict_size] matrix, ordered by token."""

    token: Int64[Tensor, " n"]
    latent: Int64[Tensor, " n"]
    value: Float[Tensor, " n"]

    @classmethod
    def join(cls, parts: list["Active"]) -> "Active":
        columns = zip(*((part.token, part.latent, part.value) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


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
    found, revived = [], []
    batch_top_k = BatchTopK(capacity.top_k * len(source), MARGIN * threshold)
    for start, pre in pre_latents_in_chunks(params, source):
        if capacity.activation == "batch_top_k":
            batch_top_k.add(start, pre)
        else:
            found.append(top_k(start, pre, capacity.top_k))
        if len(dead):
            revived.append(pre.index_select(1, dead).topk(min(top_k_aux, len(dead)), dim=1, sorted=False))
    if capacity.activation == "batch_top_k":
        if batch_top_k.missed_some:  # the guess was too high
            batch_top_k = BatchTopK(batch_top_k.n_wanted, 0.0)
            for start, pre in pre_latents_in_chunks(params, source):
                batch_top_k.add(start, pre)
        found.append(batch_top_k.active())
    if not revived:
        return Active.join(found), None
    values, places = zip(*revived, strict=True)
    return Active.join(found), Revived(torch.cat(places), torch.cat(values))


def pre_latents_in_chunks(
    params: Parameters, source: Float[Tensor, "batch d_in"]
) -> Iterator[tuple[int, Float[Tensor, "n dict_size"]]]:
    """The first token of each chunk and its pre-latents, which the next chunk overwrites."""
    width = params.b_enc.numel()
    n_rows = max(CHUNK_BYTES // (width * source.element_size()), 1)
    buffer = source.new_empty(min(n_rows, len(source)), width)
    for start in range(0, len(source), n_rows):
        chunk = source[start : start + n_rows]
        yield start, torch.addmm(params.b_enc, chunk, params.W_enc, out=buffer[: len(chunk)])


class BatchTopK:
    """Collects the `n_wanted` largest positive entries of a batch that comes in chunks.

    `bound` is what an entry must exceed to be kept. It rises when more is kept than is needed, and only a guess that
    it starts from can be wrong.
    """

    def __init__(self, n_wanted: int, guess: float) -> None:
        self.n_wanted = n_wanted
        self.guess = guess if guess > 0 else 0.0  # also where it is no number
        self.bound = self.guess
        self._kept: list[Active] = []
        self._n_kept = 0

    def add(self, start: int, pre: Float[Tensor, "n dict_size"]) -> None:
        self._keep(entries(start, pre, (pre <= self.bound).logical_not_()))
        if self._n_kept > 2 * self.n_wanted:
            kept = self.active()
            self._kept, self._n_kept = [], 0
            self._keep(kept)
            self.bound = float(kept.value.min())

    def _keep(self, part: Active) -> None:
        self._kept.append(part)
        self._n_kept += len(part.value)

    @property
    def missed_some(self) -> bool:
        return self._n_kept < self.n_wanted and self.guess > 0

    def active(self) -> Active:
        """The largest of what was added."""
        kept = Active.join(self._kept)
        chosen = largest(kept.value.unsqueeze(0), self.n_wanted).squeeze(0)
        return Active(kept.token[chosen], kept.latent[chosen], kept.value[chosen])


def top_k(start: int, pre: Float[Tensor, "n dict_size"], k: int) -> Active:
    """The `k` largest positive entries of each token.

    Latents share maxima in groups, any k groups hold k different latents, so the k-th largest maximum is a bound
    that few entries reach.
    """
    n_groups = max(pre.shape[1] // GROUP_SIZE, min(k, pre.shape[1]))
    size = pre.shape[1] // n_groups
    maxima = pre[:, : n_groups * size].unflatten(1, (size, n_groups)).amax(dim=1)
    bound = maxima.topk(min(k, n_groups), dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    found = entries(start, pre, (pre < bound).logical_not_())
    token = found.token - start
    starts = torch.searchsorted(token, torch.arange(len(pre), device=pre.device))
    place = torch.arange(len(token), device=pre.device) - starts[token]
    padded = pre.new_zeros(len(pre), int(place.max()) + 1)
    padded[token, place] = found.value
    chosen = largest(padded, k)[token, place]
    return Active(found.token[chosen], found.latent[chosen], found.value[chosen])


def entries(start: int, pre: Float[Tensor, "n dict_size"], where: Tensor) -> Active:
    """Those entries of a chunk where the mask is true, in order."""
    flat = where.flatten().nonzero().squeeze(1)
    row = flat.div(pre.shape[1], rounding_mode="floor")
    return Active(row + start, flat - row * pre.shape[1], pre.flatten()[flat])
