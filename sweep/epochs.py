"""Where a token of the training stream stands: the epoch reads all blocks, some of them at a time, as a window."""

from dataclasses import dataclass

from sweep.tokens import ROWS_PER_BLOCK

__all__ = ["BLOCKS_PER_WINDOW", "Epochs"]

BLOCKS_PER_WINDOW = 8
"""Blocks that are shuffled together: 128 sequences mix well and 16k tokens fit any memory."""


@dataclass(frozen=True)
class Epochs:
    """Endlessly many, of so many blocks of rows of `seq_len` tokens, the first of which (BOS) is dropped."""

    n_blocks: int
    seq_len: int

    @property
    def block_tokens(self) -> int:
        return ROWS_PER_BLOCK * (self.seq_len - 1)

    @property
    def window_tokens(self) -> int:
        """Of every window but the last of an epoch, which may have fewer blocks."""
        return BLOCKS_PER_WINDOW * self.block_tokens

    @property
    def epoch_tokens(self) -> int:
        return self.n_blocks * self.block_tokens

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.n_blocks // BLOCKS_PER_WINDOW)

    def locate(self, position: int) -> tuple[int, int]:
        """The window that holds a position, counted over all epochs, and the offset in it."""
        epoch, inside = divmod(position, self.epoch_tokens)
        window, offset = divmod(inside, self.window_tokens)
        return epoch * self.windows_per_epoch + window, offset

    def n_windows(self, n_tokens: int) -> int:
        """How many the first tokens come from."""
        return self.locate(n_tokens - 1)[0] + 1 if n_tokens else 0

    def n_reads(self, n_tokens: int) -> int:
        """How many times a block is read for the first tokens; within an epoch each is another one."""
        epochs, windows = divmod(self.n_windows(n_tokens), self.windows_per_epoch)
        return epochs * self.n_blocks + min(windows * BLOCKS_PER_WINDOW, self.n_blocks)
