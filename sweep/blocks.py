"""Blocks of activations: from the language model, or from a cache of what it said before.

The cache holds one safetensors file per site, split and block, under a key of everything the numbers depend on.
It changes how fast a block comes, never its bytes, and two processes may fill it at once.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sweep.activations import Batch, Demand
from sweep.config import Data, Model, Site, StreamConfig
from sweep.language_model import Activations, LanguageModel
from sweep.paths import CacheFolder, write_atomic
from sweep.progress import Report
from sweep.tokens import ROWS_PER_BLOCK, TokenFile, row_bytes, row_counts

__all__ = ["CachedBlocks", "HarvestedBlocks", "with_cache"]

BLOCKS_VERSION = 1

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

    def read(self, split: str, block: int, sites: Collection[Site]) -> Batch:
        rows = self._rows(split)[block * ROWS_PER_BLOCK : (block + 1) * ROWS_PER_BLOCK]
        batch = self.language_model().harvest(torch.from_numpy(rows.astype("int64")), sites)
        self._report("language model", self.n_tokens_seen, max(self.n_expected, self.n_tokens_seen), "tokens")
        return batch

    def n_missing(self, demand: Demand, sites: Collection[Site]) -> int:
        """Tokens the language model must see for this demand; at most, as the last block of a split may be short."""
        return demand.n_reads * ROWS_PER_BLOCK * self.tokens.train.shape[1]

    def _rows(self, split: str) -> NDArray:  # type: ignore[type-arg]
        return getattr(self.tokens, split)


class CachedBlocks:
    """Blocks kept on disk after their first harvest."""

    def __init__(self, blocks: HarvestedBlocks, folder: Path, device: str) -> None:
        self._blocks = blocks
        self._folder = folder
        self._device = device

    @staticmethod
    def key(model: Model, data: Data, model_hash: str, tokens_hash: str, device: str) -> str:
        """Identity of a stream's activations on this kind of device with these versions of its libraries."""
        parts = {
            "blocks_version": BLOCKS_VERSION,
            "model_dtype": model.model_dtype,
            "model_hash": model_hash,
            "tokens_hash": tokens_hash,
            "activation_dtype": data.activation_dtype,
            "versions": [torch.__version__, version("transformers"), version("transformer-lens")],
            "device": torch.device(device).type,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def count(self, split: str) -> int:
        return self._blocks.count(split)

    def read(self, split: str, block: int, sites: Collection[Site]) -> Batch:
        found = {site: self._load(self._path(split, block, site)) for site in sites}
        missing = [site for site, activations in found.items() if activations is None]
        if missing:
            harvested = self._blocks.read(split, block, missing)
            for site in missing:
                self._save(self._path(split, block, site), harvested[site])
            found |= harvested
        return {site: activations for site, activations in found.items() if activations is not None}

    def n_missing(self, demand: Demand, sites: Collection[Site]) -> int:
        """Tokens the language model must see: each block once, and none that is on disk."""
        new = frozenset(read for read in demand.blocks if not all(self._path(*read, site).exists() for site in sites))
        return self._blocks.n_missing(Demand(new, len(new)), sites)

    def _path(self, split: str, block: int, site: Site) -> Path:
        name = hashlib.sha256(json.dumps(asdict(site), sort_keys=True).encode()).hexdigest()[:10]
        return self._folder / f"layer_{site.layer}_{name}" / f"{split}_{block:06d}.safetensors"

    def _load(self, path: Path) -> Activations | None:
        if not path.exists():
            return None
        try:
            tensors = load_file(path, device=self._device)
            return Activations(tensors["source"], tensors["target"])
        except (OSError, KeyError, SafetensorError) as error:
            log.warning("cached activations %s are damaged (%s); harvesting them again", path, error)
            return None

    def _save(self, path: Path, activations: Activations) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"source": activations.source.cpu(), "target": activations.target.cpu()}))


def with_cache(
    harvested: HarvestedBlocks,
    config: StreamConfig,
    sites: Collection[Site],
    model_hash: str,
    device: str,
    cache: CacheFolder,
    cache_gib: float,
) -> CachedBlocks | HarvestedBlocks:
    """The blocks with a cache in front, unless the stream needs more than `cache_gib` or 90% of the free disk."""
    n_bytes = sum(row_counts(config.data).values()) * row_bytes(config.model, config.data) * len(sites)
    cache.root.mkdir(parents=True, exist_ok=True)
    if n_bytes > min(cache_gib * 2**30, 0.9 * shutil.disk_usage(cache.root).free):
        log.info("activations (%.1f GiB) are not cached: cache_gib=%g", n_bytes / 2**30, cache_gib)
        return harvested
    key = CachedBlocks.key(config.model, config.data, model_hash, harvested.tokens.hash, device)
    return CachedBlocks(harvested, cache.activations(key), device)
