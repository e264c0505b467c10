"""The dead latents that reconstruct the residual, and what they learn from it (`sweep.step.loss` says what that is).

Sums over their entries are apart from those over active ones: the rows of few latents stay in cache. Where a good share
of the dead takes part in each token, products of whole matrices are faster still.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sweep.chunks import pieces
from sweep.step.bfloat16 import BFloat16Bounds
from sweep.step.bounds import Bounds
from sweep.step.entries import (
    Active,
    aligned_product,
    counted,
    entries,
    no_less,
    places_of_largest,
    products,
    sorting,
    sums,
    sums_in_columns,
)
from sweep.step.loss import mean_squares
from sweep.step.shortlist import SHORT, largest_by_bounds
from sweep.transcoder import Parameters

__all__ = ["DeadGradients", "Revived", "among_dead"]

DENSE_SHARE = 0.25
"""From this share of the dead latents in use, products of whole matrices are faster."""


@dataclass(frozen=True)
class DeadGradients:
    """Gradients of the dead latents' weights and biases, a row for each; `latent` is sorted."""

    latent: Int64[Tensor, " n_dead"]
    encoder: Float[Tensor, "n_dead d_in"]
    bias: Float[Tensor, " n_dead"]
    decoder: Float[Tensor, "n_dead d_out"]

    def add_to(self, latents: slice, encoder: Float[Tensor, "n d_in"], decoder: Float[Tensor, "n d_out"]) -> None:
        """Add the rows of those among consecutive latents, in place."""
        first, last = torch.searchsorted(self.latent, self.latent.new_tensor([latents.start, latents.stop])).tolist()
        index = self.latent[first:last] - latents.start
        encoder.index_add_(0, index, self.encoder[first:last])
        decoder.index_add_(0, index, self.decoder[first:last])


@dataclass(frozen=True)
class Revived:
    """The largest pre-latents among the dead latents, of each token: places in the list of the dead, and values."""

    dead: Int64[Tensor, " n_dead"]
    place: Int64[Tensor, "batch k"]
    value: Float[Tensor, "batch k"]

    @classmethod
    def of(cls, dead: Int64[Tensor, " n_dead"], dead_pre: Float[Tensor, "batch n_dead"], top_k_aux: int) -> "Revived":
        """The `top_k_aux` largest pre-latents of each token; negative ones, too."""
        place = places_of_largest(dead_pre, min(top_k_aux, len(dead)))
        return cls(dead, place, dead_pre.gather(1, place))

    def no_less(self, least: float) -> Active:
        """Those that are at least so large, by token."""
        found = entries(0, self.value, no_less(self.value, least))
        return Active(found.token, self.dead[self.place[found.token, found.latent]], found.value)

    @property
    def is_dense(self) -> bool:
        return self.place.shape[1] >= DENSE_SHARE * len(self.dead)

    def learn(
        self,
        W_dec: Float[Tensor, "dict_size d_out"],
        source: Float[Tensor, "batch d_in"],
        errors: Float[Tensor, "batch d_out"],
        weight: float,
    ) -> tuple[Float[Tensor, ""], DeadGradients]:
        """The mean square of what the dead leave of the errors of the full reconstruction, and `weight` times its
        gradients."""
        rows = W_dec[self.dead]
        left = self.reconstruction(rows)
        left += errors
        aux = mean_squares(left.unsqueeze(1))[0]
        left *= 2 * weight / left.numel()
        return aux, self.gradients(rows, source, left)

    def reconstruction(self, rows: Float[Tensor, "n_dead d_out"]) -> Float[Tensor, "batch d_out"]:
        """From the decoder rows of the dead."""
        if self.is_dense:
            return self._matrix(self.value) @ rows
        starts = torch.arange(0, self.place.numel(), self.place.shape[1], device=self.place.device)
        return sums_in_columns(rows, self.place.flatten(), starts, self.value.flatten())

    def gradients(
        self,
        rows: Float[Tensor, "n_dead d_out"],
        source: Float[Tensor, "batch d_in"],
        d_reconstruction: Float[Tensor, "batch d_out"],
    ) -> DeadGradients:
        """What the gradient of the reconstruction gives the dead."""
        if self.is_dense:
            d_value = aligned_product(d_reconstruction, rows).gather(1, self.place)
            d_matrix, d_decoder = self._matrix(d_value), self._matrix(self.value).T @ d_reconstruction
            return DeadGradients(self.dead, d_matrix.T @ source, d_matrix.sum(dim=0), d_decoder)
        place, n_dead = self.place.flatten(), len(self.dead)
        order, starts = sorting(place), counted(place, n_dead)
        token = order.div(self.place.shape[1], rounding_mode="floor")
        d_value = products(rows, d_reconstruction, starts, token)
        encoder = sums_in_columns(source, token, starts[:-1], d_value)
        d_decoder = sums_in_columns(d_reconstruction, token, starts[:-1], self.value.flatten()[order])
        return DeadGradients(self.dead, encoder, sums(d_value, starts), d_decoder)

    def _matrix(self, values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch n_dead"]:
        """Values at these places, zeros elsewhere."""
        return values.new_zeros(len(values), len(self.dead)).scatter_(1, self.place, values)


def among_dead(
    params: Parameters,
    source: Float[Tensor, "batch d_in"],
    dead: Int64[Tensor, " n_dead"],
    top_k_aux: int,
    bounds: Bounds,
    least: float,
) -> tuple[Active, Revived | None]:
    """The entries of the dead that are no less than `least`, and the `top_k_aux` largest of each token.

    `bounds` are those of the batch. Some tokens at a time, so that pre-latents stay in cache.
    """
    nothing = Active(dead[:0], dead[:0], params.b_enc[:0])
    if len(dead) == 0:
        return nothing, None
    if (
        top_k_aux <= SHORT * len(dead)
        and isinstance(bounds, BFloat16Bounds)
        and (listed := largest_by_bounds(bounds, dead, top_k_aux))
    ):
        revived = Revived(dead, *listed)
        if float(revived.value.amin(dim=1).max()) < least:  # else a token may have more of them
            return revived.no_less(least), revived
    weights, bias = params.W_enc.T[dead], params.b_enc[dead]
    awake, parts = [nothing], []
    for tokens in pieces(len(source), 4 * len(dead)):
        pre = aligned_product(source[tokens], weights).add_(bias)
        parts.append(Revived.of(dead, pre, top_k_aux))
        if not float(parts[-1].value.max()) < least:
            found = entries(0, pre, no_less(pre, least))
            awake.append(Active(found.token + tokens.start, dead[found.latent], found.value))
    place, value = torch.cat([part.place for part in parts]), torch.cat([part.value for part in parts])
    return Active.join(awake), Revived(dead, place, value)
