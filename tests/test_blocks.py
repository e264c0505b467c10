"""The cache of activations: same bytes, harvested once by however many processes, never trusted blindly."""

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from make import TINY, make_cell, make_site

from sweep.activations import Demand
from sweep.block_files import BlockFiles, activations_key
from sweep.blocks import CachedBlocks, HarvestedBlocks, with_cache
from sweep.language_model import LanguageModel, load_language_model
from sweep.locks import try_lock
from sweep.paths import CacheFolder
from sweep.progress import Report, silent
from sweep.tokens import TokenFile

CONFIG = make_cell().stream
SITE, OTHER = make_site(layer=1), make_site(layer=2, hook_in="norm_unit")
SITES = (SITE, OTHER)
N_BLOCKS = 8


def make_tokens() -> TokenFile:
    def rows(n: int) -> np.ndarray:
        return np.random.default_rng(n).integers(4, 260, (n, 32), dtype=np.int32)

    return TokenFile(rows(16 * N_BLOCKS), rows(9), rows(20), hash="t" * 64, heldout_hash="h" * 64)


def harvesting(model: LanguageModel | Path, report: Report = silent) -> HarvestedBlocks:
    """Blocks whose language model counts from 0."""

    def load() -> LanguageModel:
        if isinstance(model, Path):
            return load_language_model(TINY, model, "cpu")
        model.n_tokens_seen = 0
        return model

    return HarvestedBlocks(make_tokens(), load, report)


def cached(folder: Path, model: LanguageModel | Path, least_free: float = 0.0, report: Report = silent) -> CachedBlocks:
    return CachedBlocks(harvesting(model, report), BlockFiles(folder, CONFIG, "cpu"), least_free)


def everything(blocks: CachedBlocks | HarvestedBlocks) -> list[bytes]:
    reads = [("train", [3, 1, 2, 0, 7, 6, 5, 4]), ("calibration", [0]), ("heldout", [1, 0])]
    batches = [batch for split, numbers in reads for batch in blocks.read(split, numbers, SITES)]
    return [tensor.numpy().tobytes() for batch in batches for site in SITES for tensor in batch[site]]


@pytest.fixture
def expected(language_model: LanguageModel) -> list[bytes]:
    return everything(harvesting(language_model))


def n_seen(blocks: CachedBlocks) -> int:
    return blocks._blocks.n_tokens_seen


def test_cache_gives_the_bytes_of_the_language_model(
    language_model: LanguageModel, tmp_path: Path, expected: list[bytes]
) -> None:
    first, again = cached(tmp_path, language_model), cached(tmp_path, language_model)
    assert everything(first) == expected
    assert n_seen(first) == (16 * N_BLOCKS + 9 + 20) * 32
    assert everything(again) == expected
    assert n_seen(again) == 0
    assert not list(tmp_path.glob("*.lock"))


def test_blocks_are_mapped_into_memory(language_model: LanguageModel, tmp_path: Path) -> None:
    cached(tmp_path, language_model).read("train", [0], SITES)
    (batch,) = cached(tmp_path, language_model).read("train", [0], SITES)
    maps = Path("/proc/self/maps").read_text()
    assert maps.count("train_000000.safetensors") >= len(batch)


def test_a_site_that_is_new_is_harvested_alone(language_model: LanguageModel, tmp_path: Path) -> None:
    cached(tmp_path, language_model).read("train", [0], [SITE])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    (batch,) = cached(tmp_path, language_model).read("train", [0], SITES)
    (alone,) = harvesting(language_model).read("train", [0], SITES)
    assert all(torch.equal(batch[site].source, alone[site].source) for site in SITES)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", [0.0, 0.005, 0.2, 0.5, 0.99, 1.0])
def test_one_flipped_bit_is_noticed_told_and_repaired(
    language_model: LanguageModel, tmp_path: Path, expected: list[bytes], where: float, caplog: pytest.LogCaptureFixture
) -> None:
    everything(cached(tmp_path, language_model))
    path = sorted(tmp_path.rglob("train_*.safetensors"))[3]
    flip(path, where)
    with caplog.at_level(logging.WARNING):
        again = cached(tmp_path, language_model)
        assert everything(again) == expected
    assert f"{path} are damaged" in caplog.text
    assert n_seen(again) == 16 * 32
    assert everything(cached(tmp_path, language_model)) == expected


def test_a_short_or_foreign_file_is_harvested_again(
    language_model: LanguageModel, tmp_path: Path, expected: list[bytes]
) -> None:
    everything(cached(tmp_path, language_model))
    paths = sorted(tmp_path.rglob("train_*.safetensors"))
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    paths[2].write_bytes(sorted(tmp_path.rglob("heldout_*.safetensors"))[1].read_bytes())
    assert everything(cached(tmp_path, language_model)) == expected


def test_key_holds_what_the_bytes_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(config: object = CONFIG, model: str = "m", tokens: str = "t") -> str:
        return activations_key(config, model, tokens, "cpu")  # type: ignore[arg-type]

    data = replace(CONFIG, data=replace(CONFIG.data, activation_dtype="bfloat16"))
    dtype = replace(CONFIG, model=replace(CONFIG.model, model_dtype="bfloat16"))
    keys = [key(), key(data), key(dtype), key(model="n"), key(tokens="u")]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    keys.append(key())
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(replace(CONFIG, batch_size=7)) == keys[-1]


def test_an_entry_says_in_words_what_it_is(language_model: LanguageModel, tmp_path: Path) -> None:
    cached(tmp_path, language_model).read("train", [0], [SITE])
    (about,) = tmp_path.glob("*/about.json")
    content = json.loads(about.read_text())
    assert content["summary"] == "tiny, layer 1 (norm_out to mlp_out), 3,534 tokens of docstrings, float32"
    assert {"model_revision", "dataset_revision", "made_at", "versions", "processor"} <= content.keys()


# several processes


def share(folder: Path, model: Path, queue: object) -> None:
    torch.set_num_threads(1)
    blocks = cached(folder, model)
    blocks._blocks.language_model()
    queue.put("ready")  # type: ignore[attr-defined]
    found = everything(blocks)
    queue.put((n_seen(blocks), found))  # type: ignore[attr-defined]


def test_processes_share_one_pass(tiny_folder: Path, tmp_path: Path, expected: list[bytes]) -> None:
    context = get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=share, args=(tmp_path, tiny_folder, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    told = [queue.get(timeout=120) for _ in range(6)]
    for worker in workers:
        worker.join(60)
    seen, found = zip(*(answer for answer in told if answer != "ready"), strict=True)
    assert sum(seen) == (16 * N_BLOCKS + 9 + 20) * 32
    assert all(batches == expected for batches in found)


def test_a_claimed_block_comes_last_and_is_waited_for(
    language_model: LanguageModel, tmp_path: Path, expected: list[bytes]
) -> None:
    """Another process has block 1 and dies when all others are there."""
    held = try_lock(tmp_path / "train_000001.lock")
    assert held is not None
    n_waited = 0

    def report(*_: object) -> None:
        nonlocal n_waited
        if len(list(tmp_path.glob("*/train_*"))) == 2 * (N_BLOCKS - 1):
            n_waited += 1
        if n_waited == 3:
            held.close()

    assert everything(cached(tmp_path, language_model, report=report)) == expected
    assert n_waited >= 3


def test_a_process_that_never_lets_go_stops_nobody(
    language_model: LanguageModel, tmp_path: Path, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.blocks.PATIENCE_SECONDS", 0.0)
    with try_lock(tmp_path / "train_000001.lock") or pytest.fail("the lock is taken") as _:
        assert everything(cached(tmp_path, language_model)) == expected


def test_waiting_can_be_stopped(language_model: LanguageModel, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with (
        try_lock(tmp_path / "train_000001.lock") or pytest.fail("the lock is taken") as _,
        pytest.raises(KeyboardInterrupt),
    ):
        cached(tmp_path, language_model, report=stop).read("train", [1], SITES)


def test_what_others_harvest_is_no_longer_expected(language_model: LanguageModel, tmp_path: Path) -> None:
    blocks = cached(tmp_path, language_model)
    demand = Demand(frozenset(("train", block) for block in range(N_BLOCKS)), N_BLOCKS)
    blocks._blocks.n_expected = blocks.n_missing(demand, SITES)
    assert blocks._blocks.n_expected == N_BLOCKS * 16 * 32
    cached(tmp_path, language_model).read("train", [0, 1, 2], SITES)
    blocks.read("train", [0, 1, 2], SITES)
    assert blocks._blocks.n_expected == (N_BLOCKS - 3) * 16 * 32


# disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "x", folder], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_the_cache_and_one_warning(
    language_model: LanguageModel, small_disk: Path, expected: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    blocks = cached(small_disk, language_model, least_free=-1e9)  # so that a write fails halfway
    assert everything(blocks) == expected
    assert everything(blocks) == expected
    told = [record for record in caplog.records if "no more activations are kept" in record.message]
    assert len(told) == 1
    assert "No space left on device" in told[0].message
    assert not list(small_disk.rglob("*.tmp"))
    assert 0 < len(list(small_disk.rglob("*.safetensors"))) < 2 * (N_BLOCKS + 3)


def test_what_checkpoints_need_is_left(language_model: LanguageModel, small_disk: Path, expected: list[bytes]) -> None:
    assert everything(cached(small_disk, language_model, least_free=300_000)) == expected
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    assert 300_000 <= free < 600_000
    assert list(small_disk.rglob("*.safetensors"))


def test_a_read_only_cache_is_used_and_not_needed(
    language_model: LanguageModel, small_disk: Path, expected: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    cached(small_disk, language_model).read("train", [0, 1], SITES)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    blocks = cached(small_disk, language_model)
    assert everything(blocks) == expected
    assert n_seen(blocks) == (16 * (N_BLOCKS - 2) + 9 + 20) * 32
    assert caplog.text.count("Read-only file system") == 1


def open_cache(root: Path, model: LanguageModel, cache_gib: float = 1.0) -> CachedBlocks | HarvestedBlocks:
    return with_cache(harvesting(model), CONFIG, SITES, "m", "cpu", CacheFolder(root), cache_gib)


def test_a_stream_that_is_too_large_is_not_cached_and_says_so(
    language_model: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(open_cache(tmp_path, language_model, cache_gib=0.0), HarvestedBlocks)
    assert "more than cache_gib=0" in caplog.text


def test_a_disk_that_is_too_full_is_told_unless_the_blocks_are_there(
    language_model: LanguageModel, tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(open_cache(small_disk, language_model), HarvestedBlocks)
    assert f"the disk of cache_dir={small_disk} has 0.0 GiB free" in caplog.text


def test_a_moved_cache_is_the_same_cache(language_model: LanguageModel, tmp_path: Path, expected: list[bytes]) -> None:
    assert everything(open_cache(tmp_path / "old", language_model)) == expected
    (tmp_path / "old").rename(tmp_path / "new")
    moved = open_cache(tmp_path / "new", language_model)
    assert everything(moved) == expected
    assert isinstance(moved, CachedBlocks)
    assert n_seen(moved) == 0
