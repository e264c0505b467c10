"""What of a sweep's needs the cache holds already, read off names and small files: no weights, no tensors.

Of activations the folder's `about.json` tells what they depend on. It is believed here and nowhere else: a plan may be
wrong, while a job asks `sweep.block_files`, whose key holds everything.
"""

import hashlib
import json
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sweep.config import Data, Model, Site, StreamConfig
from sweep.paths import CacheFolder
from sweep.revisions import read_object
from sweep.tokens import BUDGETS, Split, tokens_folder

__all__ = ["ABOUT", "Cached", "Processor", "SiteFolder", "depends_on", "model_is_there", "site_folders", "site_name"]

ABOUT = "about.json"
MAX_ABOUT_BYTES = 1 << 20


@dataclass(frozen=True)
class Processor:
    """What a job runs on: a GPU, or so many threads of this machine's CPU."""

    gpu: bool
    n_threads: int

    def made(self, processor: Any) -> bool:
        """Whether activations made on `processor`, as about.json tells it, can be had again here."""
        if not isinstance(processor, list) or not processor:
            return False
        if self.gpu or processor[0] != "cpu":
            return self.gpu and processor[0] == "cuda"
        return processor[1:2] == [platform.machine()] and processor[-1] == str(self.n_threads)


@dataclass(frozen=True)
class SiteFolder:
    """The activations of one stream at one site: what they are, and how many blocks of each split are there."""

    path: Path
    about: Mapping[str, Any]
    n_blocks: Mapping[str, int]


@dataclass(frozen=True)
class Cached:
    """What a cache holds at the moment it was looked at."""

    folder: CacheFolder
    sites: Sequence[SiteFolder]

    @classmethod
    def look(cls, folder: CacheFolder) -> "Cached":
        return cls(folder, site_folders(folder))

    def has_model(self, model: Model) -> bool:
        return model_is_there(model, self.folder)

    def has_tokens(self, data: Data, model: Model) -> bool:
        return tokens_folder(data, model, self.folder).is_dir()

    def n_blocks(self, stream: StreamConfig, sites: Collection[Site], processor: Processor) -> dict[Split, int]:
        """Blocks of each split that are there at every one of these sites."""
        found = [self._at(stream, site, processor) for site in sites]
        return {split: min((each.get(split, 0) for each in found), default=0) for split in BUDGETS}

    def _at(self, stream: StreamConfig, site: Site, processor: Processor) -> Mapping[str, int]:
        wanted = depends_on(stream, site)
        for each in self.sites:
            fits = all(each.about.get(key) == value for key, value in wanted.items())
            if fits and processor.made(each.about.get("processor")):
                return each.n_blocks
        return {}


def depends_on(stream: StreamConfig, site: Site) -> dict[str, Any]:
    """What the activations of a site depend on beside the processor, as about.json holds it."""
    model, data = stream.model, stream.data
    hook_in, hook_out = site.hook_names
    return {
        "model": model.model,
        "model_revision": model.model_revision,
        "model_dtype": model.model_dtype,
        "hook_in": hook_in,
        "hook_out": hook_out,
        "tokens": tokens_folder(data, model, CacheFolder(Path())).name,
        "activation_dtype": data.activation_dtype,
        "versions": library_versions(),
    }


@cache
def library_versions() -> list[str]:
    """Of those that compute activations."""
    return [version(name) for name in ("torch", "transformers", "transformer-lens")]


def site_name(site: Site) -> str:
    """The name of a site's folder among the activations of its stream."""
    digest = hashlib.sha256(json.dumps(asdict(site), sort_keys=True).encode()).hexdigest()
    return f"layer_{site.layer}_{digest[:10]}"


def site_folders(folder: CacheFolder) -> list[SiteFolder]:
    """All activations of a cache, by path; folders without a readable about.json are not ours."""
    found = []
    for path in sorted(folder.activations("*").parent.glob(f"*/layer_*/{ABOUT}")):
        try:
            about = read_object(path, MAX_ABOUT_BYTES)
        except (OSError, ValueError):
            continue
        n_blocks: dict[str, int] = {
            split: sum(1 for _ in path.parent.glob(f"{split}_*.safetensors")) for split in BUDGETS
        }
        found.append(SiteFolder(path.parent, about, n_blocks))
    return found


def model_is_there(model: Model, folder: CacheFolder) -> bool:
    """Whether a job would find the model on this machine, without download or conversion."""
    if model.model_format == "directory":
        return True
    if model.model_format == "hub":
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(model.model_repo, "config.json", revision=model.model_revision), str)
    return folder.model(model.model, model.model_revision).is_dir()
