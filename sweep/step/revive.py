"""The dead latents that reconstruct the residual, and what they learn from it (`sweep.step.loss` says what that is).

All that is computed stays among the dead: their rows are few, so they stay in cache. Where a good share of the dead
takes part in each token, products of whole matrices are faster than sums over entries.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sweep.step.entries import aligned_product, counted, products, sorting, weighted_sums

__all__ = ["DeadGradients", "Revived", "revived"]

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

    n_dead: int
    place: Int64[Tensor, "batch k"]
    value: Float[Tensor, "batch k"]

    @property
    def is_dense(self) -> bool:
        return self.place.shape[1] >= DENSE_SHARE * self.n_dead

    def reconstruction(self, decoder: Float[Tensor, "n_dead d_out"]) -> Float[Tensor, "batch d_out"]:
        """From the decoder rows of the dead."""
        if self.is_dense:
            return self._matrix(self.value) @ decoder
        return weighted_sums(decoder, self.place.flatten(), self._starts[:-1], self.value.flatten())

    def gradients(
        self,
        dead: Int64[Tensor, " n_dead"],
        decoder: Float[Tensor, "n_dead d_out"],
        source: Float[Tensor, "batch d_in"],
        d_reconstruction: Float[Tensor, "batch d_out"],
    ) -> DeadGradients:
        """What the gradient of the reconstruction gives the dead."""
        if self.is_dense:
            d_matrix = self._matrix(aligned_product(d_reconstruction, decoder).gather(1, self.place))
            d_decoder = self._matrix(self.value).T @ d_reconstruction
            return DeadGradients(dead, d_matrix.T @ source, d_matrix.sum(dim=0), d_decoder)
        place = self.place.flatten()
        d_value = products(d_reconstruction, decoder, self._starts, place)
        order, starts = sorting(place), counted(place, self.n_dead)[:-1]
        token = order.div(self.place.shape[1], rounding_mode="floor")
        encoder = weighted_sums(source, token, starts, d_value[order])
        d_decoder = weighted_sums(d_reconstruction, token, starts, self.value.flatten()[order])
        return DeadGradients(dead, encoder, d_value.new_zeros(self.n_dead).index_add_(0, place, d_value), d_decoder)

    def _matrix(self, values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch n_dead"]:
        """Values at these places, zeros elsewhere."""
        return values.new_zeros(len(values), self.n_dead).scatter_(1, self.place, values)

    @property
    def _starts(self) -> Int64[Tensor, " batch_and_1"]:
        """Where each token's entries start, and how many there are."""
        k = self.place.shape[1]
        return torch.arange(0, self.place.numel() + 1, k, device=self.place.device)


def revived(dead_pre: Float[Tensor, "batch n_dead"], top_k_aux: int) -> Revived | None:
    """The `top_k_aux` largest pre-latents of each token, if any latent is dead; negative ones, too."""
    n_dead = dead_pre.shape[1]
    if n_dead == 0:
        return None
    value, place = dead_pre.topk(min(top_k_aux, n_dead), dim=1, sorted=False)
    return Revived(n_dead, place, value)
