"""The tokens that excite each latent most, kept while a held-out pass goes by.

1. Latents arrive in chunks; a sequence is looked at once it is whole.
2. A sequence gives a latent one context: around its largest value there, so that one text cannot fill the list.
3. Each latent keeps its `n` largest, the earlier sequence first among equals. Memory: dict_size * n * WINDOW floats.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["BEFORE", "WINDOW", "TopContexts"]

BEFORE = 20
"""Tokens of a context before its peak, as far as the sequence has them."""

WINDOW = 32
"""Tokens of a context."""


class TopContexts:
    """The `n` contexts with the largest values of each latent."""

    def __init__(self, dict_size: int, seq_tokens: int, n: int, device: torch.device) -> None:
        self.seq_tokens = seq_tokens
        self.window = min(WINDOW, seq_tokens)
        self.n = n
        self._value = torch.zeros(dict_size, n, device=device)
        self._sequence = torch.zeros(dict_size, n, dtype=torch.int64, device=device)
        self._peak = torch.zeros(dict_size, n, dtype=torch.int64, device=device)
        self._around = torch.zeros(dict_size, n, self.window, device=device)
        self._rest: list[Tensor] = []
        self._n_rest = 0
        self._n_sequences = 0

    def update(self, latents: Float[Tensor, "n dict_size"]) -> None:
        """Add tokens in order; chunks may end inside a sequence."""
        self._rest.append(latents.float())
        self._n_rest += len(latents)
        if self._n_rest < self.seq_tokens:
            return
        chunk = torch.cat(self._rest) if len(self._rest) > 1 else self._rest[0]
        n_whole = self._n_rest // self.seq_tokens
        self._add(chunk[: n_whole * self.seq_tokens].unflatten(0, (n_whole, self.seq_tokens)))
        self._n_rest -= n_whole * self.seq_tokens
        self._rest = [chunk[n_whole * self.seq_tokens :].clone()]

    def _add(self, sequences: Float[Tensor, "m seq_tokens dict_size"]) -> None:
        """Whole sequences: take in those of their contexts that are among the largest so far."""
        value, peak = sequences.max(1)
        number = torch.arange(len(sequences), device=value.device) + self._n_sequences
        self._n_sequences += len(sequences)
        changed = (value.amax(0) > self._value[:, -1]).nonzero().squeeze(1)
        if not len(changed):
            return
        value, peak = value[:, changed].T, peak[:, changed].T
        values = torch.cat([self._value[changed], value], 1)
        best, order = (part[:, : self.n] for part in values.sort(dim=1, descending=True, stable=True))
        self._value[changed] = best
        peaks = torch.cat([self._peak[changed], peak], 1)
        self._peak[changed] = peaks.gather(1, order)
        numbers = torch.cat([self._sequence[changed], number.expand(len(changed), -1)], 1)
        self._sequence[changed] = numbers.gather(1, order)
        around = self._around[changed].gather(1, order.clamp(max=self.n - 1)[..., None].expand(-1, -1, self.window))
        row, place = (order >= self.n).nonzero(as_tuple=True)
        if len(row):
            new = order[row, place] - self.n
            tokens = self.start(peak[row, new])[:, None] + torch.arange(self.window, device=value.device)
            around[row, place] = sequences[new[:, None], tokens, changed[row][:, None]]
        self._around[changed] = around

    def start(self, peak: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """The first token of the contexts with these peaks."""
        return (peak - BEFORE).clamp(0, self.seq_tokens - self.window)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each context, by latent, the largest first; names as in sweep/results.py, and `start`."""
        latent, place = (self._value > 0).nonzero(as_tuple=True)
        peak = self._peak[latent, place]
        columns = {
            "latent": latent.tolist(),
            "place": place.tolist(),
            "sequence": self._sequence[latent, place].tolist(),
            "position": peak.tolist(),
            "start": self.start(peak).tolist(),
            "activation": self._value[latent, place].tolist(),
            "activations": self._around[latent, place].tolist(),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
