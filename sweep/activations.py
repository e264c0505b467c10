"""The activation stream: batch i is a pure function of (config, i).

1. Blocks: ROWS_PER_BLOCK rows of the token file go through the language model at once, for a set of sites.
2. Epochs: each reads all blocks, in a permutation of its own.
3. Windows: BLOCKS_PER_WINDOW consecutive blocks of an epoch are shuffled token by token, the same at every site.
4. Batches: the windows, end to end, cut into `batch_size` tokens. Nothing is dropped; a batch may span windows.

So resuming needs no buffer, cells of a gang see what they would see alone, and a cache is only a faster way to
the same numbers.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from sweep.config import Site, StreamConfig
from sweep.epochs import BLOCKS_PER_WINDOW, Epochs
from sweep.language_model import Activations

__all__ = ["ActivationStream", "Batch", "Blocks", "Demand", "Read", "permutation"]

Batch = dict[Site, Activations]

Read = tuple[str, int]
"""A split and the number of a block in it."""


@runtime_checkable
class Blocks(Protocol):
    """Where activations come from: the language model, or a cache in front of it."""

    def read(self, split: str, blocks: Sequence[int], sites: Collection[Site]) -> list[Batch]:
        """Blocks of a split at each site, in the order asked for; rows in order, BOS dropped."""
        ...

    def count(self, split: str) -> int:
        """Blocks of a split."""
        ...


class ActivationStream:
    """The batches of one stream at a set of sites."""

    def __init__(self, config: StreamConfig, blocks: Blocks, sites: Collection[Site]) -> None:
        self.config = config
        self.blocks = blocks
        self.sites = tuple(sites)
        self.epochs = Epochs(blocks.count("train"), config.data.seq_len)
        self._held: Window | None = None
        self._buffers: Batch = {}

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """Batches `start` to `stop - 1` with their numbers."""
        return ((i, self.batch(i)) for i in range(start, stop))

    def batch(self, i: int) -> Batch:
        """Batch `i` at every site; does not depend on what was read before."""
        begin, end = i * self.config.batch_size, (i + 1) * self.config.batch_size
        pieces = []
        while begin < end:
            number, offset = self.epochs.locate(begin)
            window = self._window(number)
            take = window.order[offset : offset + end - begin]
            pieces.append({site: select_tokens(window.batch[site], take) for site in self.sites})
            begin += len(take)
        return {site: concatenate([piece[site] for piece in pieces]) for site in self.sites}

    def first_window(self) -> Batch:
        """The tokens of the first window in block order: what scales and initial parameters are read off.

        The next window overwrites them.
        """
        return self._window(0).batch

    def split(self, split: str, also: Collection[Site] = ()) -> Iterator[Batch]:
        """The blocks of the calibration or held-out split, in order; `also` at sites that no batch is asked for."""
        sites = tuple(dict.fromkeys((*self.sites, *also)))
        return (self.blocks.read(split, [block], sites)[0] for block in range(self.blocks.count(split)))

    def demand(self, n_batches: int, n_again: int = 0) -> "Demand":
        """What the first `n_batches` batches, the first `n_again` once more, calibration and evaluation ask of the
        blocks."""
        n_tokens, n_tokens_again = (n * self.config.batch_size for n in (n_batches, n_again))
        n_reads = self.epochs.n_reads(n_tokens) + self.epochs.n_reads(n_tokens_again)
        first_epoch = range(min(self.epochs.n_windows(n_tokens), self.epochs.windows_per_epoch))
        train = [("train", block) for window in first_epoch for block in self._blocks_of(window)]
        others = [(split, block) for split in ("calibration", "heldout") for block in range(self.blocks.count(split))]
        return Demand(frozenset([*train, *others]), n_reads + len(others))

    def _window(self, number: int) -> "Window":
        """Window `number`, counted over all epochs. The last one read is kept."""
        if self._held is None or self._held.number != number:
            self._held = None
            blocks = self.blocks.read("train", self._blocks_of(number), self.sites)
            batch = {site: self._gathered(site, [block[site] for block in blocks]) for site in self.sites}
            order = torch.from_numpy(self._order(number)).to(batch[self.sites[0]].source.device)
            self._held = Window(number, order, batch)
        return self._held

    def _gathered(self, site: Site, parts: list[Activations]) -> Activations:
        """The parts end to end, in memory kept from window to window: fresh pages cost more than the copy."""
        if site not in self._buffers:
            n_tokens = min(self.epochs.window_tokens, self.epochs.epoch_tokens)
            self._buffers[site] = Activations(*(tensor.new_empty(n_tokens, tensor.shape[1]) for tensor in parts[0]))
        n_tokens = sum(len(part.source) for part in parts)
        window = Activations(*(buffer[:n_tokens] for buffer in self._buffers[site]))
        torch.cat([part.source for part in parts], out=window.source)
        torch.cat([part.target for part in parts], out=window.target)
        return window

    def _blocks_of(self, window: int) -> list[int]:
        epoch, index = divmod(window, self.epochs.windows_per_epoch)
        order = permutation(self.epochs.n_blocks, self.config.data.data_seed, epoch, 0)
        return [int(block) for block in order[index * BLOCKS_PER_WINDOW : (index + 1) * BLOCKS_PER_WINDOW]]

    def _order(self, window: int) -> NDArray[np.int64]:
        epoch, index = divmod(window, self.epochs.windows_per_epoch)
        n_tokens = len(self._blocks_of(window)) * self.epochs.block_tokens
        return permutation(n_tokens, self.config.data.data_seed, epoch, index + 1)


@dataclass(frozen=True)
class Demand:
    """The distinct blocks a run reads, and how often it reads one: every epoch asks for all of them again."""

    blocks: frozenset[Read]
    n_reads: int


@dataclass(frozen=True)
class Window:
    """The tokens of some blocks in block order, and the order in which batches take them."""

    number: int
    order: Int64[Tensor, " tokens"]
    batch: Batch


def permutation(n: int, seed: int, epoch: int, part: int) -> NDArray[np.int64]:
    """A permutation of range(n) from a counter-based generator: part 0 orders blocks, part w + 1 window w.

    Sorting raw Philox output (whose stream numpy guarantees) keeps the order the same in every release.
    """
    keys = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, part]).random_raw(n)
    return np.argsort(keys, kind="stable")


def select_tokens(activations: Activations, index: Int64[Tensor, " tokens"]) -> Activations:
    return Activations(activations.source[index], activations.target[index])


def concatenate(parts: list[Activations]) -> Activations:
    if len(parts) == 1:
        return parts[0]
    return Activations(torch.cat([part.source for part in parts]), torch.cat([part.target for part in parts]))
