"""Where a token stands, against a list of every token in the order it is read."""

from itertools import islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from sweep.epochs import BLOCKS_PER_WINDOW, Epochs
from sweep.tokens import ROWS_PER_BLOCK


def written_out(epochs: Epochs, n_tokens: int) -> list[tuple[int, int, int]]:
    """Of each token: its window, its offset in it, and how many blocks were read up to the end of that window."""
    tokens: list[tuple[int, int, int]] = []
    n_reads, window = 0, 0
    while len(tokens) < n_tokens:
        for first in range(0, epochs.n_blocks, BLOCKS_PER_WINDOW):
            n_blocks = min(BLOCKS_PER_WINDOW, epochs.n_blocks - first)
            n_reads += n_blocks
            n_inside = n_blocks * ROWS_PER_BLOCK * (epochs.seq_len - 1)
            tokens += [(window, offset, n_reads) for offset in range(n_inside)]
            window += 1
    return tokens


@given(n_blocks=st.integers(1, 20), seq_len=st.integers(2, 4))
def test_it_is_that_of_all_tokens_written_out(n_blocks: int, seq_len: int) -> None:
    epochs = Epochs(n_blocks, seq_len)
    tokens = written_out(epochs, 2 * epochs.epoch_tokens + 1)
    assert [epochs.locate(i) for i in range(len(tokens))] == [token[:2] for token in tokens]
    assert epochs.n_windows(0) == epochs.n_reads(0) == 0
    ends = [i for i, (before, after) in enumerate(pairwise(tokens), 1) if before[0] != after[0]]
    for n in (1, *ends, *(end + 1 for end in islice(ends, 3))):
        window, _, n_reads = tokens[n - 1]
        assert (epochs.n_windows(n), epochs.n_reads(n)) == (window + 1, n_reads)
