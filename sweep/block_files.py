"""Activations on disk: what one process harvested, others map into memory.

    activations/<key>/layer_12_1a2b3c4d5e/about.json                 what it is, in words
                                          train_000003.safetensors   source and target, with their checksum
                      train_000003.lock                              while a process harvests that block

The key holds everything the numbers depend on. A file appears whole, and is held against its checksum when a process
first reads it.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sweep.activations import Read
from sweep.cached import ABOUT, depends_on, site_name
from sweep.config import Site, StreamConfig
from sweep.language_model import Activations
from sweep.locks import try_lock
from sweep.paths import remove_leftovers, write_atomic, write_json
from sweep.tokens import row_counts

__all__ = ["BlockFiles", "activations_key"]

BLOCKS_VERSION = 2
CHECKSUM = "xxh3_128"

log = logging.getLogger(__name__)


def activations_key(config: StreamConfig, model_hash: str, tokens_hash: str, device: str) -> str:
    """Identity of a stream's activations: weights, text, precisions, library versions and the processor.

    Threads count on a CPU: a matrix product cut in three differs in its last bits from one cut in two.
    """
    parts = {
        "blocks_version": BLOCKS_VERSION,
        "model_dtype": config.model.model_dtype,
        "model_hash": model_hash,
        "tokens_hash": tokens_hash,
        "activation_dtype": config.data.activation_dtype,
        "versions": [torch.__version__, version("transformers"), version("transformer-lens")],
        "processor": processor(device),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def processor(device: str) -> list[str]:
    """What two machines must share for the same program to give the same bits."""
    if torch.device(device).type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device)]
    capability = torch.backends.cpu.get_cpu_capability()
    return ["cpu", platform.machine(), capability, str(torch.get_num_threads())]


class BlockFiles:
    """The files of one stream. Reading, writing and locking may each raise OSError, where the method says so."""

    def __init__(self, folder: Path, config: StreamConfig, device: str) -> None:
        self.folder = folder
        self._config = config
        self._device = device
        self._verified: set[Path] = set()

    def has(self, read: Read, sites: Collection[Site]) -> bool:
        """Whether there is a file for a block at each site; not whether it is whole."""
        return all(self._path(read, site).exists() for site in sites)

    def load(self, read: Read, site: Site, n_tokens: int) -> Activations | None:
        """A block at a site, mapped into memory; None when it is not there, or damaged, which the log then tells."""
        path = self._path(read, site)
        try:
            with safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {}).get(CHECKSUM)
                activations = Activations(file.get_tensor("source"), file.get_tensor("target"))
            self._check(path, activations, n_tokens, checksum)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("cached activations %s are damaged (%s); harvesting them again", path, error)
            return None
        return Activations(*(tensor.to(self._device) for tensor in activations))

    def save(self, read: Read, site: Site, activations: Activations) -> None:
        """Write a block at a site.

        Raises:
            OSError: the disk is full or the folder cannot be written to; no part of the file is left.
        """
        path = self._path(read, site)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path.parent / ABOUT, about(self._config, site, self._device))
        remove_leftovers(path.parent, path.name)
        on_cpu = Activations(*(tensor.cpu() for tensor in activations))
        content = save(on_cpu._asdict(), metadata={CHECKSUM: checksum_of(on_cpu)})
        write_atomic(path, content, durable=False)  # what a crash of the machine leaves behind, the checksum tells
        self._verified.discard(path)

    def claim(self, read: Read) -> IO[bytes] | None:
        """The right to harvest a block, until `release`; None while another process has it.

        Raises:
            OSError: the folder cannot be written to.
        """
        return try_lock(self._lock(read))

    def release(self, read: Read, lock: IO[bytes]) -> None:
        """Let go, and remove the lock: whoever gets a lock looks for the block first, so an old one does no harm."""
        self._lock(read).unlink(missing_ok=True)
        lock.close()

    def _check(self, path: Path, activations: Activations, n_tokens: int, checksum: str | None) -> None:
        dtype = getattr(torch, self._config.data.activation_dtype)
        for tensor in activations:
            if tensor.ndim != 2 or len(tensor) != n_tokens or tensor.dtype != dtype:
                raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype} instead of {n_tokens} tokens in {dtype}")
        if path not in self._verified:
            if checksum != checksum_of(activations):
                raise ValueError("its checksum does not fit")
            self._verified.add(path)

    def _path(self, read: Read, site: Site) -> Path:
        split, block = read
        return self.folder / site_name(site) / f"{split}_{block:06d}.safetensors"

    def _lock(self, read: Read) -> Path:
        split, block = read
        return self.folder / f"{split}_{block:06d}.lock"


def checksum_of(activations: Activations) -> str:
    """Of source and target, at several gigabytes a second: it guards against damage, not against an attacker."""
    digest = xxhash.xxh3_128()
    for tensor in activations:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def about(config: StreamConfig, site: Site, device: str) -> dict[str, Any]:
    """What a person must know to keep or delete a site's folder, and a plan to count on it; no job reads it back."""
    data, model = config.data, config.model
    rows = row_counts(data)
    n_tokens = sum(rows.values()) * (data.seq_len - 1)
    return {
        **depends_on(config, site),
        "summary": f"{model.model}, layer {site.layer} ({site.hook_in} to {site.hook_out}), "
        f"{n_tokens:,} tokens of {data.dataset}, {data.activation_dtype}",
        "layer": site.layer,
        "dataset": data.dataset,
        "dataset_revision": data.dataset_revision,
        "n_tokens": n_tokens,
        "rows": rows,
        "seq_len": data.seq_len,
        "processor": processor(device),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
