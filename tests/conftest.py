"""Fixtures shared by all tests. Torch is imported inside them: tests of the light modules stay light.

The tiny language model is made once a session and is never changed: tests only read it.
"""

import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from make import TINY

from sweep.config import Model
from sweep.paths import CacheFolder
from sweep.progress import silent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sweep.language_model import LanguageModel

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the processes tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network


hypothesis.settings.register_profile("sweep", deadline=None)  # no test fails for being slow
hypothesis.settings.load_profile("sweep")


@pytest.fixture
def ram(tmp_path: "Path") -> "Iterator[Path]":
    """A folder in memory where the system offers one, for tests that sync and remove thousands of files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="sweep-tests.", dir="/dev/shm") as folder:
        yield type(tmp_path)(folder)


@pytest.fixture
def exact_integers() -> "Iterator[None]":
    """Products of integers are exact, also where this processor has no instruction for them."""
    from sweep import similarity
    from sweep.processor import has_fast_int8
    from sweep.step import int8

    with pytest.MonkeyPatch.context() as patch:
        for module in () if has_fast_int8() else (int8, similarity):
            patch.setattr(module, "int8_product", lambda left, right, out: out.copy_(left.double() @ right.T.double()))
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheFolder:
    """A cache folder shared by the whole session."""
    return CacheFolder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The random three-layer Gemma-2."""
    return TINY


@pytest.fixture(scope="session")
def tiny_folder(tiny: Model, cache: CacheFolder) -> "Path":
    """The saved model and tokenizer."""
    from sweep.language_model import ensure_model_folder

    return ensure_model_folder(tiny, cache, silent)


@pytest.fixture(scope="session")
def language_model(tiny: Model, tiny_folder: "Path") -> "LanguageModel":
    """The tiny model, loaded on the CPU."""
    from sweep.language_model import load_language_model

    return load_language_model(tiny, tiny_folder, "cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that stands still until it is told otherwise."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock
