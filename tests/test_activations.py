"""The stream: batch i is a pure function of (config, i), every token comes once an epoch."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell, make_site

from sweep.activations import ActivationStream, Batch, permutation
from sweep.config import Site
from sweep.epochs import BLOCKS_PER_WINDOW
from sweep.language_model import Activations
from sweep.tokens import ROWS_PER_BLOCK

SITE, OTHER = make_site(layer=1), make_site(layer=2)
SEQ = 5
BLOCK_TOKENS = ROWS_PER_BLOCK * (SEQ - 1)


class CountingBlocks:
    """Blocks whose source holds the number of each token, and whose target holds it plus the layer."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.reads: list[tuple[str, int]] = []

    def count(self, split: str) -> int:
        return self.n_blocks if split == "train" else 1

    def read(self, split: str, blocks: Sequence[int], sites: Collection[Site]) -> list[Batch]:
        return [self.read_one(split, block, sites) for block in blocks]

    def read_one(self, split: str, block: int, sites: Collection[Site]) -> Batch:
        self.reads.append((split, block))
        numbers = torch.arange(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS, dtype=torch.float32)[:, None]
        return {site: Activations(numbers, numbers + site.layer / 4) for site in sites}


def make_stream(
    n_blocks: int = 11, batch_size: int = 100, sites: tuple[Site, ...] = (SITE,), data_seed: int = 0
) -> ActivationStream:
    config = make_cell(seq_len=SEQ, batch_size=batch_size, data_seed=data_seed).stream
    return ActivationStream(config, CountingBlocks(n_blocks), sites)


def numbers(batch: Batch, site: Site = SITE) -> list[int]:
    return [int(number) for number in batch[site].source[:, 0]]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 20), st.integers(1, 300))
def test_batch_does_not_depend_on_what_was_read_before(jumps: list[int], n_blocks: int, batch_size: int) -> None:
    wandering = make_stream(n_blocks, batch_size)
    for i in jumps:
        batch = wandering.batch(i)
        fresh = make_stream(n_blocks, batch_size).batch(i)
        assert torch.equal(batch[SITE].source, fresh[SITE].source)
        assert torch.equal(batch[SITE].target, fresh[SITE].target)


def test_batches_are_the_batches_in_order() -> None:
    stream = make_stream()
    for i, batch in stream.batches(3, 9):
        assert numbers(batch) == numbers(make_stream().batch(i))


@given(st.integers(1, 20), st.integers(1, 300), st.integers(0, 3))
def test_every_epoch_reads_every_token_once(n_blocks: int, batch_size: int, data_seed: int) -> None:
    stream = make_stream(n_blocks, batch_size, data_seed=data_seed)
    n_tokens = n_blocks * BLOCK_TOKENS
    n_batches = -(-2 * n_tokens // batch_size)
    seen = [number for _, batch in stream.batches(0, n_batches) for number in numbers(batch)]
    for epoch in range(2):
        assert sorted(seen[epoch * n_tokens : (epoch + 1) * n_tokens]) == list(range(n_tokens))


def test_epochs_differ_in_the_order_of_blocks_and_of_tokens() -> None:
    stream = make_stream(n_blocks=2 * BLOCKS_PER_WINDOW, batch_size=BLOCK_TOKENS * BLOCKS_PER_WINDOW)
    first, second = numbers(stream.batch(0)), numbers(stream.batch(2))
    assert first != second
    assert set(first) != set(second)


def test_batches_mix_the_rows_of_a_window() -> None:
    stream = make_stream(n_blocks=BLOCKS_PER_WINDOW, batch_size=100)
    blocks_met = {number // BLOCK_TOKENS for number in numbers(stream.batch(0))}
    assert len(blocks_met) == BLOCKS_PER_WINDOW


def test_all_sites_see_the_same_tokens_and_no_site_changes_another() -> None:
    both = make_stream(sites=(SITE, OTHER)).batch(7)
    alone = make_stream(sites=(SITE,)).batch(7)
    assert torch.equal(both[SITE].source, both[OTHER].source)
    assert torch.equal(both[OTHER].target - both[OTHER].source, torch.full((100, 1), 0.5))
    assert torch.equal(both[SITE].source, alone[SITE].source)
    assert torch.equal(both[SITE].target, alone[SITE].target)


def test_source_and_target_of_a_token_stay_together() -> None:
    batch = make_stream().batch(5)
    assert torch.equal(batch[SITE].target - batch[SITE].source, torch.full((100, 1), 0.25))


def test_data_seed_changes_the_order() -> None:
    assert numbers(make_stream(data_seed=0).batch(0)) != numbers(make_stream(data_seed=1).batch(0))


@pytest.mark.parametrize("n_batches", [1, 5, 13, 14, 40])
def test_demand_is_what_the_batches_ask_for(n_batches: int) -> None:
    stream = make_stream(n_blocks=20, batch_size=100)
    for i in range(n_batches):
        stream.batch(i)
    assert isinstance(stream.blocks, CountingBlocks)
    demand = stream.demand(n_batches)
    assert demand.n_reads == len(stream.blocks.reads) + 2
    assert demand.blocks == {*stream.blocks.reads, ("calibration", 0), ("heldout", 0)}
    twice = stream.demand(n_batches, n_batches)
    assert (twice.blocks, twice.n_reads) == (demand.blocks, 2 * demand.n_reads - 2)


def test_demand_of_a_very_long_run_is_told_at_once() -> None:
    assert make_stream(n_blocks=20).demand(10**15).n_reads > 10**12


def test_a_window_is_read_once_while_it_lasts() -> None:
    stream = make_stream(n_blocks=BLOCKS_PER_WINDOW, batch_size=10)
    for i in range(10):
        stream.batch(i)
    assert isinstance(stream.blocks, CountingBlocks)
    assert len(stream.blocks.reads) == BLOCKS_PER_WINDOW


@given(st.integers(0, 2000), st.integers(0, 2**63 - 1), st.integers(0, 50), st.integers(0, 50))
def test_permutation_permutes(n: int, seed: int, epoch: int, part: int) -> None:
    assert sorted(permutation(n, seed, epoch, part)) == list(range(n))


def test_permutation_parts_are_independent() -> None:
    drawn = [tuple(permutation(50, seed, epoch, part)) for seed in (0, 1) for epoch in (0, 1) for part in (0, 1, 2)]
    assert len(set(drawn)) == len(drawn)
    places = np.array([np.argsort(order) for order in drawn])
    assert np.abs(np.corrcoef(places) - np.eye(len(drawn))).max() < 0.6


def test_permutation_never_changes() -> None:
    """The order is part of every identity: a change here needs a new SCHEMA_VERSION."""
    assert permutation(8, 0, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(6, 3, 1, 2).tolist() == [4, 5, 2, 1, 3, 0]


def test_stream_ignores_what_is_not_part_of_it() -> None:
    cell = make_cell()
    other = replace(cell, seed=5, schedule=replace(cell.schedule, steps=99, lr=1.0), site=OTHER)
    assert other.stream == cell.stream
    assert make_cell(batch_size=32).stream != cell.stream


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_split_reads_its_blocks_in_order(split: str) -> None:
    (block,) = make_stream().split(split)
    assert numbers(block) == list(range(BLOCK_TOKENS))
