"""Entries of a sparse [batch, dict_size] matrix, and the sums and products that only touch those."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, Real
from torch import Tensor
from torch.nn.functional import embedding_bag

from sweep.chunks import consecutive

__all__ = [
    "Active",
    "aligned_product",
    "counted",
    "entries",
    "group_maxima",
    "in_columns",
    "k_largest",
    "kth_largest",
    "no_less",
    "places",
    "places_of_largest",
    "products",
    "sorting",
    "sums",
    "sums_in_columns",
    "token_and_column",
    "weighted_sums",
]

COLUMNS = 64
"""At once where rows are summed many times. All of 640 at once took two to five times as long."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says once that its CSR tensors are in beta
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([0])[:0], torch.tensor([0.0])[:0], (1, 1))


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
        return self.where(sorting(self.token))


def entries(start: int, values: Float[Tensor, "batch n"], where: Bool[Tensor, "batch n"]) -> Active:
    """Those entries of a block where the mask is true, in order; `start` is its first latent."""
    token, column = token_and_column(where)
    return Active(token, column + start, values[token, column])


def token_and_column(where: Bool[Tensor, "batch n"]) -> tuple[Int64[Tensor, " n_true"], Int64[Tensor, " n_true"]]:
    """Where the mask is true, by token."""
    flat = places(where.flatten())
    token = flat.div(where.shape[1], rounding_mode="floor")
    return token, flat - token * where.shape[1]


def places(mask: Bool[Tensor, " n"]) -> Int64[Tensor, " n_true"]:
    """Where a mask is true that rarely is: first where any of eight is, as looking at each takes long; by numpy, which
    takes half as long as `nonzero`."""
    flags = mask.numpy(force=True)
    whole = len(flags) // 8 * 8
    words = flags[:whole].view(np.int64)
    word = np.flatnonzero(words != 0)
    place = np.flatnonzero(words[word].view(np.bool_))
    found = (word[place >> 3] << 3) + (place & 7)
    found = np.concatenate([found, np.flatnonzero(flags[whole:]) + whole])
    return torch.from_numpy(found).to(mask.device)


def no_less(values: Float[Tensor, "*n"], least: float | Float[Tensor, "#*n"]) -> Bool[Tensor, "*n"]:
    """Which values are at least so large; what is no number is, so that it shows in the loss."""
    return (values < least).logical_not_()


def kth_largest(values: Float[Tensor, " n"], k: int) -> float:
    """What is no number counts as largest."""
    return float(k_largest(values, k)[0])


def k_largest(values: Real[Tensor, "*n m"], k: int) -> Real[Tensor, "*n k"]:
    """The `k` largest numbers of each row, the least of them first; what is no number counts as largest. numpy selects
    four to ten times as fast as `topk`."""
    n = values.shape[-1]
    return torch.from_numpy(np.partition(values.numpy(force=True), n - k)[..., n - k :]).to(values.device)


def places_of_largest(values: Float[Tensor, "n m"], k: int) -> Int64[Tensor, "n k"]:
    """The columns of the `k` largest numbers of each row, sorted; of equals any."""
    n_rows, n_columns = values.shape
    is_among = no_less(values, k_largest(values, k)[:, :1])
    found = places(is_among.flatten())
    if len(found) > n_rows * k:  # a row has equals or what is no number; none has fewer than k
        row = found.div(n_columns, rounding_mode="floor")
        crowded = (torch.bincount(row, minlength=n_rows) > k).nonzero().squeeze(1)
        chosen = values[crowded].topk(k, dim=1).indices
        is_among[crowded] = is_among.new_zeros(len(crowded), n_columns).scatter_(1, chosen, True)
        found = places(is_among.flatten())
    return found.view(n_rows, k) - torch.arange(n_rows, device=values.device).unsqueeze(1) * n_columns


def group_maxima(values: Real[Tensor, "n m"], n_groups: int) -> Real[Tensor, "n n_groups"]:
    """The largest of each of so many groups of columns, as many in each. The k-th largest of these is a bound that at
    least k columns reach, and not many more; columns that are left over are in no group."""
    size = values.shape[1] // n_groups
    return values[:, : n_groups * size].unflatten(1, (size, n_groups)).amax(dim=1)


def sorting(index: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """What sorts small numbers, in their order where they are equal; in 32 bits that takes half as long."""
    return index.int().argsort(stable=True)


def counted(index: Int64[Tensor, " n"], n_values: int) -> Int64[Tensor, " n_values_and_1"]:
    """Where each value starts in the sorted index, and the length."""
    starts = index.new_zeros(n_values + 1)
    torch.cumsum(torch.bincount(index, minlength=n_values), dim=0, out=starts[1:])
    return starts


def sums(values: Float[Tensor, " n"], starts: Int64[Tensor, " n_sums_and_1"]) -> Float[Tensor, " n_sums"]:
    """Those from one start to the next, each added up in order."""
    return torch.segment_reduce(values, "sum", offsets=starts)


def weighted_sums(
    rows: Float[Tensor, "m d"],
    index: Int[Tensor, " n"],
    starts: Int[Tensor, " n_sums"],
    weights: Float[Tensor, " n"],
) -> Float[Tensor, "n_sums d"]:
    """Sum i is that of rows[index] * weights over entries from starts[i] to starts[i + 1]."""
    return embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights)


def sums_in_columns(
    rows: Float[Tensor, "m d"],
    index: Int[Tensor, " n"],
    starts: Int[Tensor, " n_sums"],
    weights: Float[Tensor, " n"],
) -> Float[Tensor, "n_sums d"]:
    """Weighted sums, some columns at a time: rows stay in cache, worth the copies where each is summed often."""
    return torch.cat([weighted_sums(part, index, starts, weights) for _, part in in_columns(rows)], dim=1)


def in_columns(matrix: Float[Tensor, "m n"]) -> Iterator[tuple[slice, Float[Tensor, "m _"]]]:
    """Some columns at a time, contiguous."""
    for columns in consecutive(matrix.shape[1], COLUMNS):
        yield columns, matrix[:, columns].contiguous()


def products(
    left: Float[Tensor, "n_rows d"],
    right: Float[Tensor, "dict_size d"],
    starts: Int64[Tensor, " n_rows_and_1"],
    latent: Int64[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """left @ right.T at the entries of a sparse matrix in CSR form."""
    pattern = torch.sparse_csr_tensor(
        starts, latent, left.new_zeros(len(latent)), (len(left), len(right)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def aligned_product(left: Float[Tensor, "m d"], right: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """left @ right.T, in rows that begin where a cache line does: for an odd number of columns that takes two thirds
    of the time."""
    padded = left.new_empty(len(left), -(-len(right) // 16) * 16)
    return torch.mm(left, right.T, out=padded[:, : len(right)])
