"""Blocks of activations: from the language model, or from a cache of what it said before.

The cache changes how fast a block comes, never its bytes. Processes that share a stream share the work: each harvests
blocks that nobody else is at, and waits for the others.
"""

import logging
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO

import torch
from numpy.typing import NDArray

from sweep.activations import Batch, Demand, Read
from sweep.block_files import BlockFiles, activations_key
from sweep.config import Site, StreamConfig
from sweep.language_model import LanguageModel, load_language_model
from sweep.paths import CacheFolder
from sweep.progress import Report
from sweep.tokens import ROWS_PER_BLOCK, TokenFile, row_bytes, row_counts

__all__ = ["CachedBlocks", "HarvestedBlocks", "from_model", "with_cache"]

LEAST_FREE = 0.1
"""Share of the disk's free space that the cache leaves to checkpoints and results."""

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 600.0
"""How long to wait for a block that another process has claimed; a stopped process must not stop the others."""

log = logging.getLogger(__name__)


class HarvestedBlocks:
    """Blocks from the language model, which is loaded when the first one is asked for."""

    def __init__(self, tokens: TokenFile, load: Callable[[], LanguageModel], report: Report) -> None:
        self.tokens = tokens
        self.n_expected = 0
        self._load = load
        self._report = report
        self._language_model: LanguageModel | None = None

    @property
    def n_tokens_seen(self) -> int:
        """Tokens that went through the language model so far."""
        return 0 if self._language_model is None else self._language_model.n_tokens_seen

    def language_model(self) -> LanguageModel:
        """The language model, loaded now if need be."""
        if self._language_model is None:
            self._language_model = self._load()
        return self._language_model

    def count(self, split: str) -> int:
        return -(-len(self._rows(split)) // ROWS_PER_BLOCK)

    def n_tokens(self, read: Read) -> int:
        """Tokens of a block, BOS not counted."""
        rows = self.rows(read)
        return len(rows) * (rows.shape[1] - 1)

    def read(self, split: str, blocks: Sequence[int], sites: Collection[Site]) -> list[Batch]:
        return [self.harvest((split, block), sites) for block in blocks]

    def harvest(self, read: Read, sites: Collection[Site]) -> Batch:
        batch = self.language_model().harvest(torch.from_numpy(self.rows(read).astype("int64")), sites)
        self.tick()
        return batch

    def tick(self) -> None:
        """Report how far the language model is; the report may ask for a stop by raising."""
        self._report("language model", self.n_tokens_seen, max(self.n_expected, self.n_tokens_seen), "tokens")

    def n_missing(self, demand: Demand, sites: Collection[Site]) -> int:
        """Tokens the language model must see for this demand; at most, as the last block of a split may be short."""
        return demand.n_reads * ROWS_PER_BLOCK * self.tokens.train.shape[1]

    def rows(self, read: Read) -> NDArray:  # type: ignore[type-arg]
        split, block = read
        return self._rows(split)[block * ROWS_PER_BLOCK : (block + 1) * ROWS_PER_BLOCK]

    def _rows(self, split: str) -> NDArray:  # type: ignore[type-arg]
        return getattr(self.tokens, split)


def from_model(
    config: StreamConfig, folder: Path, tokens: TokenFile, device: str, report: Report, check: Collection[Site] = ()
) -> HarvestedBlocks:
    """Blocks of these tokens from the model in `folder`, whose hooks at `check` are looked at once it is loaded."""

    def load() -> LanguageModel:
        report("load language model", 0, 0, "")
        model = load_language_model(config.model, folder, device, getattr(torch, config.data.activation_dtype))
        for site in check:
            model.check(site, config.model.d_in, config.model.d_out)
        return model

    return HarvestedBlocks(tokens, load, report)


class CachedBlocks:
    """Blocks kept on disk after their first harvest.

    `least_free` bytes of the disk are left alone: past them, or when writing fails, harvesting goes on without
    keeping, after one warning.
    """

    def __init__(self, blocks: HarvestedBlocks, files: BlockFiles, least_free: float = 0.0) -> None:
        self._blocks = blocks
        self._files = files
        self._least_free = least_free
        self._keeps = True
        self._missing: set[Read] = set()

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        return self._files.folder

    def count(self, split: str) -> int:
        return self._blocks.count(split)

    def read(self, split: str, blocks: Sequence[int], sites: Collection[Site]) -> list[Batch]:
        """Blocks of a split; those nobody harvests yet are harvested before waiting for the others."""
        found: dict[int, Batch] = {}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while waiting := [block for block in blocks if block not in found]:
            n_found = len(found)
            for block in waiting:
                if (batch := self._try((split, block), sites, patient=time.monotonic() < deadline)) is not None:
                    found[block] = batch
                    self._came((split, block))
            if len(found) == n_found:
                self._blocks.tick()
                time.sleep(POLL_SECONDS)
            else:
                deadline = time.monotonic() + PATIENCE_SECONDS
        return [found[block] for block in blocks]

    def n_missing(self, demand: Demand, sites: Collection[Site]) -> int:
        """Tokens the language model must see: each block once, and none that is on disk."""
        self._missing = {read for read in demand.blocks if not self._files.has(read, sites)}
        return self._blocks.n_missing(Demand(frozenset(self._missing), len(self._missing)), sites)

    def _came(self, read: Read) -> None:
        """What other processes harvest need not be waited for as if it went through our language model."""
        if read in self._missing:
            self._missing.remove(read)
            left = self._blocks.n_missing(Demand(frozenset(self._missing), len(self._missing)), ())
            self._blocks.n_expected = self._blocks.n_tokens_seen + left

    def _try(self, read: Read, sites: Collection[Site], *, patient: bool) -> Batch | None:
        """A block from disk or from the language model; None while another process harvests it."""
        batch = self._load(read, sites)
        if batch.keys() >= set(sites):
            return batch
        lock = self._claim(read) if self._keeps else None
        if lock is None:
            return None if self._keeps and patient else self._harvest(read, sites, batch)
        try:
            return self._harvest(read, sites, self._load(read, sites))  # it may have come while the lock was taken
        finally:
            self._files.release(read, lock)

    def _load(self, read: Read, sites: Collection[Site]) -> Batch:
        n_tokens = self._blocks.n_tokens(read)
        loaded = {site: self._files.load(read, site, n_tokens) for site in sites}
        return {site: activations for site, activations in loaded.items() if activations is not None}

    def _harvest(self, read: Read, sites: Collection[Site], known: Batch) -> Batch:
        missing = [site for site in sites if site not in known]
        if not missing:
            return known
        harvested = self._blocks.harvest(read, missing)
        if self._keeps:
            try:
                n_bytes = sum(tensor.nbytes for site in missing for tensor in harvested[site])
                if shutil.disk_usage(self._files.folder).free - n_bytes < self._least_free:
                    raise OSError("the disk is nearly full, and what is left is for checkpoints and results")
                for site in missing:
                    self._files.save(read, site, harvested[site])
            except OSError as error:
                self._give_up(error)
        return known | harvested

    def _claim(self, read: Read) -> IO[bytes] | None:
        try:
            return self._files.claim(read)
        except OSError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: OSError) -> None:
        self._keeps = False
        log.warning(
            "no more activations are kept in %s (%s): going on without, which changes no number; "
            "later epochs run the language model again",
            self._files.folder,
            error,
        )


def with_cache(
    harvested: HarvestedBlocks,
    config: StreamConfig,
    sites: Collection[Site],
    model_hash: str,
    device: str,
    cache: CacheFolder,
    cache_gib: float,
) -> CachedBlocks | HarvestedBlocks:
    """The blocks with a cache in front, unless they need more than `cache_gib` or 90% of the free disk."""
    key = activations_key(config, model_hash, harvested.tokens.hash, device)
    files = BlockFiles(cache.activations(key), config, device)
    n_bytes = sum(row_counts(config.data).values()) * row_bytes(config.model, config.data) * len(sites)
    if n_bytes > cache_gib * 2**30:
        log.warning(
            "activations (%.1f GiB) are not cached: more than cache_gib=%g; each epoch runs the language model again",
            n_bytes / 2**30,
            cache_gib,
        )
        return harvested
    cache.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.root).free
    there = sum(path.stat().st_size for path in files.folder.glob("*/*.safetensors"))
    if n_bytes - there > (1 - LEAST_FREE) * free:
        log.warning(
            "activations (%.1f GiB) are not cached: the disk of cache_dir=%s has %.1f GiB free; each epoch runs the "
            "language model again",
            n_bytes / 2**30,
            cache.root,
            free / 2**30,
        )
        return harvested
    return CachedBlocks(harvested, files, LEAST_FREE * free)
