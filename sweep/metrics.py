"""Numbers from tensors: how well targets are predicted, how latents fire.

Three accumulators that one pass over the held-out tokens feeds. All sums are float64 or integers, every token is
reduced by itself, and means are removed before anything is squared: how rows are grouped into batches, or how far the
targets lie from zero, does not show. docs/metrics.md has each formula.

Undefined is None, everywhere: a ratio over targets that never vary.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sweep.chunks import pieces
from sweep.results import DEAD_AT_TOKENS

__all__ = [
    "Deviations",
    "LatentActivity",
    "Metrics",
    "Reconstruction",
    "TargetMoments",
    "l0_metrics",
    "ratio",
    "reconstruction_metrics",
]

Metrics = dict[str, float | int | None]

NEVER = torch.iinfo(torch.int64).max


def ratio(numerator: float | int, denominator: float | int) -> float | None:
    return numerator / denominator if denominator > 0 else None


@dataclass(frozen=True)
class Deviations:
    """Squared deviations of all targets of a site from their mean over all tokens."""

    n_tokens: int
    mean: Float[Tensor, " d_out"]
    per_sequence: Float[Tensor, " rows"]
    per_dimension: Float[Tensor, " d_out"]
    from_one_mean: float
    """The same sum, but from a single mean over tokens and dimensions."""

    @property
    def total(self) -> float:
        return float(self.per_sequence.sum())


class TargetMoments:
    """Means and squared deviations of the targets of one site, kept per sequence until the global mean is known.

    With row mean m_r, global mean m and T tokens a row, the deviations of a row from m are those from m_r plus
    T |m_r - m|^2: a sum of squares, so nothing cancels. Targets are taken relative to the first token, which makes
    the deviations of a constant dimension exactly zero.
    """

    def __init__(self, seq_tokens: int) -> None:
        self.seq_tokens = seq_tokens
        self._origin: Tensor | None = None
        self._means: list[Tensor] = []
        self._within_sequence: list[Tensor] = []
        self._within_dimension: list[Tensor] = []

    def update(self, target: Float[Tensor, "n d_out"]) -> None:
        """Add whole sequences: n is a multiple of `seq_tokens`."""
        rows = target.unflatten(0, (-1, self.seq_tokens))
        if self._origin is None:
            self._origin = rows[0, 0].double()
        within_dimension = torch.zeros_like(self._origin)
        for piece in pieces(len(rows), 8 * rows[0].numel()):
            shifted = rows[piece].double() - self._origin
            means = shifted.mean(1)
            squares = (shifted - means[:, None]).square_()
            self._means.append(means)
            self._within_sequence.append(squares.sum((1, 2)))
            within_dimension += squares.sum((0, 1))
        self._within_dimension.append(within_dimension)

    def deviations(self) -> Deviations:
        """The sums over everything seen so far."""
        assert self._origin is not None, "no targets yet"
        row_means = torch.cat(self._means)
        mean = row_means.mean(0)
        between = self.seq_tokens * (row_means - mean).square_()
        per_sequence = torch.cat(self._within_sequence) + between.sum(1)
        n_tokens = len(row_means) * self.seq_tokens
        spread = (self._origin + mean) - (self._origin + mean).mean()
        return Deviations(
            n_tokens=n_tokens,
            mean=(self._origin + mean).cpu(),
            per_sequence=per_sequence.cpu(),
            per_dimension=(torch.stack(self._within_dimension).sum(0) + between.sum(0)).cpu(),
            from_one_mean=float(per_sequence.sum() + n_tokens * spread.square().sum()),
        )


class Reconstruction:
    """Squared errors and cosines of predictions, per token and per dimension."""

    def __init__(self) -> None:
        self._squared_error: list[Tensor] = []
        self._cosine: list[Tensor] = []
        self._per_dimension: list[Tensor] = []

    def update(self, target: Float[Tensor, "n d_out"], prediction: Float[Tensor, "n d_out"]) -> None:
        """Add tokens in order."""
        for piece in pieces(len(target), 8 * target.shape[1]):
            t, p = target[piece].double(), prediction[piece].double()
            norms = torch.linalg.vector_norm(t, dim=1) * torch.linalg.vector_norm(p, dim=1)
            self._cosine.append(torch.where(norms > 0, (t * p).sum(1) / norms, 0.0))
            squares = (p - t).square_()
            self._squared_error.append(squares.sum(1))
            self._per_dimension.append(squares.sum(0))

    @property
    def squared_error(self) -> Float[Tensor, " n"]:
        """Summed over dimensions, for each token."""
        return torch.cat(self._squared_error).cpu()

    @property
    def squared_error_per_dimension(self) -> Float[Tensor, " d_out"]:
        """Summed over tokens, for each dimension."""
        return torch.stack(self._per_dimension).sum(0).cpu()

    @property
    def cosine(self) -> Float[Tensor, " n"]:
        """Of prediction and target, for each token; 0 where either is zero."""
        return torch.cat(self._cosine).cpu()


def reconstruction_metrics(reconstruction: Reconstruction, deviations: Deviations) -> Metrics:
    """The metrics of prediction.

    `fvu_per_dimension` leaves out dimensions that never vary; each of the three FVUs is None where nothing does.
    """
    total = float(reconstruction.squared_error.sum())
    n_tokens, d_out = deviations.n_tokens, len(deviations.per_dimension)
    varies = deviations.per_dimension > 0
    own_fvu = reconstruction.squared_error_per_dimension[varies] / deviations.per_dimension[varies]
    return {
        "fvu": ratio(total, deviations.total),
        "fvu_per_dimension": float(own_fvu.mean()) if len(own_fvu) else None,
        "fvu_scalar_variance": ratio(total, deviations.from_one_mean),
        "mse": total / (n_tokens * d_out),
        "cosine": float(reconstruction.cosine.mean()),
        "n_evaluated_tokens": n_tokens,
    }


class LatentActivity:
    """Which latents fire, how strongly, and when first. Active means not zero; latents are never negative."""

    def __init__(self, dict_size: int, device: torch.device) -> None:
        self.n_tokens = 0
        self._n_active = torch.zeros(dict_size, dtype=torch.int64, device=device)
        self._sum = torch.zeros(dict_size, dtype=torch.float64, device=device)
        self._max = torch.zeros(dict_size, dtype=torch.float64, device=device)
        self._first = torch.full((dict_size,), NEVER, device=device)
        self._l0: list[Tensor] = []

    def update(self, latents: Float[Tensor, "n dict_size"]) -> None:
        """Add tokens in order; n and dict_size stay below 2**24."""
        active = (latents != 0).float()  # sums of ones are exact in float32, and much faster than sums of bools
        n_active = active.sum(0).long()
        new = ((n_active > 0) & (self._first == NEVER)).nonzero().squeeze(1)
        if len(new):
            self._first[new] = self.n_tokens + active[:, new].argmax(0)
        self._l0.append(active.sum(1).long())
        self._n_active += n_active
        self._sum += latents.sum(0, dtype=torch.float64)
        self._max = torch.maximum(self._max, latents.amax(0).double())
        self.n_tokens += len(latents)

    @property
    def l0(self) -> Int[Tensor, " n"]:
        """Active latents of each token."""
        return torch.cat(self._l0).cpu()

    def metrics(self) -> Metrics:
        """Statistics of L0, and the dead fractions; None at token counts that were not reached."""
        first = self._first.cpu()
        dead: Metrics = {"dead_fraction": float((first == NEVER).double().mean())}
        for n in DEAD_AT_TOKENS:
            silent = float((first >= n).double().mean())
            dead[f"dead_fraction_{n}_tokens"] = silent if self.n_tokens >= n else None
        return {**l0_metrics(torch.bincount(self.l0)), **dead}

    def columns(self) -> dict[str, list[float | None]]:
        """Per latent: density, and mean and largest activation; None for a latent that never fires."""
        n_active, sums, largest = self._n_active.tolist(), self._sum.tolist(), self._max.tolist()
        return {
            "density": [n / self.n_tokens for n in n_active],
            "mean_activation": [total / n if n else None for total, n in zip(sums, n_active, strict=True)],
            "max_activation": [top if n else None for top, n in zip(largest, n_active, strict=True)],
        }


def l0_metrics(histogram: Int[Tensor, " bins"]) -> Metrics:
    """Mean, median and population standard deviation of L0, exactly: entry k counts the tokens with L0 k."""
    counts: list[int] = histogram.tolist()
    n = sum(counts)
    total = sum(k * count for k, count in enumerate(counts))
    squares = sum(k * k * count for k, count in enumerate(counts))
    below, middle = 0, []
    for k, count in enumerate(counts):
        middle += [k for rank in ((n - 1) // 2, n // 2) if below <= rank < below + count]
        below += count
    return {
        "l0": total / n,
        "l0_median": sum(middle) / 2,
        "l0_std": math.sqrt(n * squares - total * total) / n,
    }
