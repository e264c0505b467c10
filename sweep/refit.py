"""After the last step: decoder, bias and linear map in closed form, for the latents as they are.

Which latents are active, and how strongly, depends on the encoder alone. With that given the loss of the nested
prefixes is a quadratic function of everything after it, and Adam stops some way above its minimum. So it is solved as
in the method of optimal directions (Engan et al. 1999), on the first batches of the training stream. What all tokens
share, the linear map and the bias, is eliminated; decoder rows follow by conjugate gradients from the trained ones. A
latent is active in a few hundred tokens and has more weights than that, so its row is held to the trained one by a
prior: ridge regression, centred there, with the calibration split's loss for the variance of noise. Iterations end
where that loss has stopped falling.

A matrix of `weights` holds, row by row, the decoder of each latent, then what all tokens share.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sweep.chunks import consecutive
from sweep.config import Capacity
from sweep.language_model import Activations
from sweep.step.active import encode, encode_above
from sweep.step.entries import Active, counted, in_columns, sorting, sums_in_columns, weighted_sums
from sweep.step.sparse import add_earlier_, add_later_, rows_of
from sweep.transcoder import Parameters

__all__ = ["refit"]

CHUNK_TOKENS = 4096
"""Tokens at once: enough that sums over latents are long, few enough that what is decoded stays small."""

PRIOR_VARIANCE = 14.0
"""Of a decoder weight about its trained value, as a multiple of the mean square of all."""

WORTHWHILE = 1e-3
"""An iteration that lowers the calibration split's loss by a smaller share of it is the last."""

DAMPING = 1e-5
"""What is added to each second moment, as a share of it: more than it may be off by in float32."""

Weights = Float[Tensor, "n_rows d_out"]
"""For all or some dimensions of the target."""


@torch.no_grad()
def refit(
    params: Parameters,
    capacity: Capacity,
    threshold: float | None,
    sample: Activations,
    calibration: Activations,
    n_iterations: int,
    tick: Callable[[int], None] = lambda done: None,
) -> Parameters:
    """The parameters with decoder, bias and linear map fitted to the scaled activations of a sample.

    `threshold` is that of inference, None where each token has its own `top_k`. `tick` is told how many iterations are
    done, every few seconds.
    """
    designs = []
    for design in in_chunks(params, capacity, threshold, sample):
        designs.append(design)
        tick(0)
    judges = list(in_chunks(params, capacity, threshold, calibration))
    columns, trained = zip(*in_columns(stacked(params)), strict=True)
    best, least = trained, loss(judges, trained, columns)
    noise, spread = least / calibration.target.numel(), PRIOR_VARIANCE * float(params.W_dec.square().mean())
    normal = Normal.of(designs, capacity, prior=noise / spread if spread else 0.0)
    for done, weights in enumerate(islice(iterates(normal, columns, trained), n_iterations), 1):
        tick(done)
        before, found = least, loss(judges, weights, columns)
        if found < least:
            best, least = weights, found
        if not least < (1 - WORTHWHILE) * before:
            break
    tick(n_iterations)
    return unstacked(torch.cat(best, dim=1), params)


def loss(designs: Sequence["Design"], weights: Sequence[Weights], columns: Sequence[slice]) -> float:
    """What is minimised but for the prior, over the tokens of all designs."""
    return sum(design.loss(*part) for design in designs for part in zip(weights, columns, strict=True))


def iterates(normal: "Normal", columns: Sequence[slice], trained: Sequence[Weights]) -> Iterator[tuple[Weights, ...]]:
    """The weights after each iteration, without end."""
    fits = [Fit(normal, *part) for part in zip(columns, trained, strict=True)]
    while True:
        for fit in fits:
            fit.advance()
        yield tuple(fit.weights for fit in fits)


class Fit:
    """Conjugate gradients for some dimensions of the target, each of which is a problem of its own."""

    def __init__(self, normal: "Normal", columns: slice, trained: Weights) -> None:
        self._normal, self._trained = normal, trained
        residual = torch.zeros_like(trained)
        for design in normal.designs:
            design.add_back(design.errors(trained, columns), residual)
        of_latents, of_shared = residual.tensor_split([len(normal.power)])
        self._whitened = whitened(normal.root, of_shared)
        self._residual = of_latents.addmm_(normal.explained.T, self._whitened, alpha=-1)
        self._change = torch.zeros_like(of_latents)
        self._direction = self._residual / normal.power
        self._power = (self._residual * self._direction).sum(dim=0)

    def advance(self) -> None:
        """One iteration."""
        curved = self._normal.times(self._direction)
        length = ratio(self._power, (self._direction * curved).sum(dim=0))
        self._change += length * self._direction
        self._residual -= length * curved
        towards = self._residual / self._normal.power
        before, self._power = self._power, (self._residual * towards).sum(dim=0)
        self._direction = towards + ratio(self._power, before) * self._direction

    @property
    def weights(self) -> Weights:
        """Of latents as far as they have come, and with them the best of what tokens share."""
        shared = unwhitened(self._normal.root, self._whitened - self._normal.explained @ self._change)
        return self._trained + torch.cat([self._change, shared])


@dataclass(frozen=True)
class Design:
    """Some tokens: their active latents, what they share, and what shall come out.

    The active latents stand in it twice, sorted by the row they are added to, token * n_groups + group, and by latent;
    in 32 bits, as those of the whole sample are held.
    """

    target: Float[Tensor, "n d_out"]
    shared: Float[Tensor, "n n_shared"]
    """The source if there is a linear map, and a column of ones for the bias."""
    shares: Float[Tensor, " n_groups"]
    """Of the loss, of each prefix."""
    latent: Int[Tensor, " n_active"]
    value: Float[Tensor, " n_active"]
    row_starts: Int[Tensor, " n_rows"]
    row: Int[Tensor, " n_active"]
    value_by_latent: Float[Tensor, " n_active"]
    latent_starts: Int[Tensor, " dict_size"]

    @classmethod
    def of(cls, active: Active, source: Tensor, target: Tensor, capacity: Capacity) -> "Design":
        n_tokens, n_groups = len(source), len(capacity.groups)
        row = rows_of(active, capacity)
        order = sorting(active.latent)
        ones = source.new_ones(n_tokens, 1)
        return cls(
            target=target,
            shared=torch.cat([source, ones], dim=1) if capacity.skip else ones,
            shares=source.new_tensor(capacity.shares),
            latent=active.latent.int(),
            value=active.value,
            row_starts=counted(row, n_tokens * n_groups)[:-1].int(),
            row=row[order].int(),
            value_by_latent=active.value[order],
            latent_starts=counted(active.latent, capacity.dict_size)[:-1].int(),
        )

    def decoded(self, latents: Weights) -> Float[Tensor, "n n_groups d_out"]:
        """What the latents of each prefix add up to."""
        rows = weighted_sums(latents, self.latent, self.row_starts, self.value)
        prefixes = rows.view(len(self.target), len(self.shares), -1)
        add_earlier_(prefixes)
        return prefixes

    def errors(self, weights: Weights, columns: slice) -> Float[Tensor, "n n_groups d_out"]:
        """Of the weights of these columns of the target."""
        n_latents = len(self.latent_starts)
        left = self.target[:, columns] - self.shared @ weights[n_latents:]
        return self.decoded(weights[:n_latents]).neg_().add_(left.unsqueeze(1))

    def loss(self, weights: Weights, columns: slice) -> float:
        """What is minimised, summed over tokens and these columns."""
        of_tokens = torch.linalg.vector_norm(self.errors(weights, columns), dim=2).double()
        return float(of_tokens.square().sum(dim=0) @ self.shares.double())

    def add_back(self, errors: Float[Tensor, "n n_groups d_out"], weights: Weights) -> None:
        """Add to all weights what they contributed to, times the errors of it; `errors` is used up."""
        n_latents = len(self.latent_starts)
        self.add_to_latents(errors, weights[:n_latents])
        weights[n_latents:].addmm_(self.shared.T, errors[:, 0])

    def add_to_latents(self, errors: Float[Tensor, "n n_groups d_out"], latents: Weights) -> None:
        """Only those of latents; `errors` then holds the weighted sum of the prefixes each group is part of."""
        add_later_(errors, self.shares)
        latents += weighted_sums(errors.flatten(0, 1), self.row, self.latent_starts, self.value_by_latent)


@dataclass(frozen=True)
class Normal:
    """The quadratic function's matrix, once what tokens share is solved for: a function of the latents' rows alone.

    With A the block of latents, C that of latents and what is shared, and M = L L^T (Cholesky) that of what is shared,
    it is A - C M^-1 C^T, the Schur complement: the latents without what the source and a constant explain of them
    (Frisch and Waugh 1933). A is only ever applied.
    """

    designs: Sequence[Design]
    explained: Float[Tensor, "n_shared dict_size"]
    """L^-1 C^T."""
    root: Float64[Tensor, "n_shared n_shared"]
    """L."""
    held: Float[Tensor, "dict_size 1"]
    """What prior and damping add to the diagonal. At the trained weights, where fits begin, they have no gradient."""
    power: Float[Tensor, "dict_size 1"]
    """The diagonal, by which residuals are divided: the preconditioner."""

    @classmethod
    def of(cls, designs: Sequence[Design], capacity: Capacity, prior: float) -> "Normal":
        first = designs[0]
        power = first.value.new_zeros(capacity.dict_size)
        crossed = first.value.new_zeros(capacity.dict_size, first.shared.shape[1])
        moments = first.value.new_zeros(2 * first.shared.shape[1:], dtype=torch.float64)
        for design in designs:
            power.index_add_(0, design.latent, design.value.square())
            token = design.row // len(design.shares)
            crossed += sums_in_columns(design.shared, token, design.latent_starts, design.value_by_latent)
            moments += design.shared.T @ design.shared
        weight = power.new_zeros(capacity.dict_size)
        for end, share in zip(capacity.groups, capacity.shares, strict=True):
            weight[:end] += share
        power *= weight
        crossed *= weight.unsqueeze(1)
        root = damped_root(moments)
        explained = torch.cat([whitened(root, part) for _, part in in_columns(crossed.T)], dim=1)
        held = (DAMPING * power + prior).clamp_min(torch.finfo(power.dtype).tiny)
        left = (power - explained.square().sum(dim=0)).clamp_min(0) + held
        return cls(designs, explained, root, held.unsqueeze(1), left.unsqueeze(1))

    def times(self, latents: Weights) -> Weights:
        product = latents * self.held
        product.addmm_(self.explained.T, self.explained @ latents, alpha=-1)
        for design in self.designs:
            design.add_to_latents(design.decoded(latents), product)
        return product


def damped_root(moments: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """The Cholesky factor, where directions in which sources do not vary have some power, too."""
    damping = (DAMPING * moments.diagonal()).clamp_min(torch.finfo(moments.dtype).tiny)
    root: Tensor = torch.linalg.cholesky(moments + damping.diag())
    return root


def whitened(root: Float64[Tensor, "n n"], shared: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """L^-1 times it."""
    quotient: Tensor = torch.linalg.solve_triangular(root, shared.double(), upper=False)
    return quotient.to(shared)


def unwhitened(root: Float64[Tensor, "n n"], shared: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """L^-T times it: of a whitened residual, the change of weights that leaves none of it."""
    quotient: Tensor = torch.linalg.solve_triangular(root.T, shared.double(), upper=True)
    return quotient.to(shared)


def in_chunks(
    params: Parameters, capacity: Capacity, threshold: float | None, activations: Activations
) -> Iterator[Design]:
    for chunk in consecutive(len(activations.source), CHUNK_TOKENS):
        source, target = (tensor[chunk] for tensor in activations)
        yield Design.of(at_inference(params, capacity, threshold, source), source, target, capacity)


def at_inference(
    params: Parameters, capacity: Capacity, threshold: float | None, source: Float[Tensor, "n d_in"]
) -> Active:
    """The active latents as a saved transcoder has them, by token."""
    if threshold is None:
        no_dead = torch.empty(0, dtype=torch.int64, device=source.device)
        return encode(params, source, capacity, 0.0, no_dead, 1)[0]
    return encode_above(params, source, threshold, capacity.top_k)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / b, 0)


def stacked(params: Parameters) -> Weights:
    middle = [] if params.W_skip is None else [params.W_skip]
    return torch.cat([params.W_dec, *middle, params.b_dec.unsqueeze(0)])


def unstacked(weights: Weights, params: Parameters) -> Parameters:
    n_latents = len(params.W_dec)
    skip = None if params.W_skip is None else weights[n_latents:-1]
    return replace(params, W_dec=weights[:n_latents], b_dec=weights[-1], W_skip=skip)
