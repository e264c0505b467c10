"""What a name stands for on this machine: revisions of files, folders and packages, and facts read off them.

Part of a cell's identity is looked up, not typed: the hash of a local file, the versions of the packages whose
docstrings are the text. Everything here reads headers and hashes; nothing is loaded, unpickled or run.
"""

import hashlib
import importlib.metadata
import json
import math
import operator
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sweep.errors import ConfigError

__all__ = [
    "DOCSTRING_PACKAGES",
    "data_facts",
    "layers_in",
    "model_facts",
    "read_json",
    "read_object",
    "sha256_of_file",
    "weights_hash",
]

DOCSTRING_PACKAGES = (
    "datasets",
    "huggingface-hub",
    "hydra-core",
    "numpy",
    "omegaconf",
    "polars",
    "pyarrow",
    "safetensors",
    "submitit",
    "torch",
    "transformer-lens",
    "transformers",
)
"""The packages `dataset=docstrings` reads: runtime dependencies, pinned in constraints.txt."""

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 100 << 20


def model_facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the language model that are read off `model_path`; empty without one.

    Raises:
        ConfigError: the directory lacks a readable config.json or safetensors files.
    """
    if options["model_path"] is None:
        missing = [key for key in ("model_revision", "n_layers", "d_in", "d_out") if options[key] is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: not known for model={options['model']}; set it, or model_path=")
        if options["model_format"] == "hub" and not is_commit(options["model_revision"]):
            raise ConfigError(not_pinned("model_revision", options["model_revision"], options["model_repo"]))
        return {"n_body_params": options["n_body_params"] or 0}
    folder = Path(options["model_path"]).expanduser().resolve()
    return {"model_path": str(folder), **_directory_facts(folder, options["model_path"])}


@lru_cache(maxsize=16)
def _directory_facts(folder: Path, typed: str) -> dict[str, Any]:
    weights = sorted(folder.glob("*.safetensors"))
    config_file = folder / "config.json"
    if not config_file.is_file() or not weights:
        raise ConfigError(
            f"model_path={typed} is not a model directory; it needs config.json and *.safetensors "
            "(as written by save_pretrained)"
        )
    try:
        config = read_json(config_file, MAX_CONFIG_BYTES)
        config = config.get("text_config", config)
        width = int(config.get("hidden_size") or config["n_embd"])
        n_layers = layers_in(folder)
        n_body_params = sum(_body_params(path) for path in weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"model_path={typed}: its config.json or weights cannot be read ({error})") from error
    digest = hashlib.sha256()
    for path in (config_file, *weights, *sorted(folder.glob("tokenizer*"))):
        digest.update(f"{path.name} {sha256_of_file(path)}\n".encode())
    return {
        "model": folder.name,
        "model_format": "directory",
        "model_repo": "",
        "model_revision": digest.hexdigest(),
        "n_layers": n_layers,
        "d_in": width,
        "d_out": width,
        "n_body_params": n_body_params,
    }


def _body_params(path: Path) -> int:
    """Parameters outside the embeddings, from the header of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ValueError(f"{path.name} claims a header of {size} bytes")
        header = json.loads(file.read(size))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__" and ("layers." in name or ".h." in name):
            total += math.prod(operator.index(extent) for extent in tensor["shape"])
    return total


def data_facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the text that are looked up: the revision of a file or of the installed packages.

    Raises:
        ConfigError: the file is missing or of an unknown kind, or a hub dataset has no revision.
    """
    if options["dataset_path"] is not None:
        path = Path(options["dataset_path"]).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"dataset_path={options['dataset_path']} is not a file")
        if path.suffix not in (".txt", ".jsonl", ".parquet"):
            raise ConfigError(f"dataset_path={options['dataset_path']} must end in .txt, .jsonl or .parquet")
        if path.stat().st_size == 0:
            raise ConfigError(f"dataset_path={options['dataset_path']} is empty; name a file with text")
        return {
            "dataset": path.name,
            "dataset_format": "file",
            "dataset_path": str(path),
            "dataset_revision": _cached_sha256(path, path.stat().st_mtime_ns),
        }
    if options["dataset_format"] == "file":
        raise ConfigError("dataset_path=null: data=file needs a file; set dataset_path=<.txt, .jsonl or .parquet>")
    if options["dataset_format"] == "docstrings":
        return {"dataset_revision": docstrings_revision()}
    if not options["dataset"]:
        raise ConfigError("dataset is empty: data=hub needs a name; set dataset=<owner>/<name> and dataset_revision=")
    if not is_commit(options["dataset_revision"]):
        raise ConfigError(not_pinned("dataset_revision", options["dataset_revision"], options["dataset"]))
    return {}


@lru_cache(maxsize=1)
def docstrings_revision() -> str:
    """Hash of the names and versions of DOCSTRING_PACKAGES, local build tags left out."""
    versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in DOCSTRING_PACKAGES]
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()


def is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def not_pinned(key: str, value: str | None, name: str) -> str:
    return (
        f"{key}={value} is no commit: what {name} holds could change between two runs; "
        f"set {key}= to the 40 hex digits of a commit on the hub"
    )


def layers_in(folder: Path) -> int:
    """Layers a model folder's config.json tells.

    Raises:
        OSError, ValueError, KeyError: it cannot be read.
    """
    config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
    config = config.get("text_config", config)
    return int(config.get("num_hidden_layers") or config["n_layer"])


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=16)
def _cached_sha256(path: Path, _modified: int) -> str:
    return sha256_of_file(path)


def read_json(path: Path, max_bytes: int) -> Any:
    """Parse a JSON file after checking its size.

    Raises:
        ValueError: larger than `max_bytes`, not JSON, or nested too deeply.
    """
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path.name} is larger than {max_bytes} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Parse a JSON file that may come from anywhere and must hold an object.

    Raises:
        ValueError: larger than `max_bytes`, not JSON, nested too deeply, or no object.
    """
    found = read_json(path, max_bytes)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def weights_hash(folder: Path) -> str:
    """sha256 over names and contents of a folder's safetensors files (1 GB takes a second or two)."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()
