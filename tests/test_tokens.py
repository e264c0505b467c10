"""The token file: packing, splits by document, growth, damage."""

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell

from sweep import tokens
from sweep.config import Data
from sweep.errors import DataError
from sweep.paths import CacheFolder
from sweep.progress import silent
from sweep.revisions import sha256_of_file
from sweep.tokens import ROWS_PER_BLOCK, RowWriter, TokenFile, prepare_tokens, row_counts, split_of

BOS = 1


class Bytes:
    """A tokenizer of bytes: 4 and up are bytes, BOS is 1."""

    bos_token_id = BOS

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[byte + 4 for byte in text.encode()] for text in texts]


def words(n: int) -> str:
    return "\n\n".join(f"document {i} " + f"w{i} " * (5 + i % 7) for i in range(n))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(words(400))
    return path


def data_of(path: Path, **overrides: Any) -> Data:
    small = {"seq_len": 16, "n_tokens": 480, "n_calibration_tokens": 60, "n_heldout_tokens": 60}
    return make_cell(dataset_path=str(path), **small | overrides).data


def prepare(data: Data, root: Path) -> TokenFile:
    return prepare_tokens(data, make_cell().model, Bytes(), CacheFolder(root), silent)


def text_of(rows: np.ndarray) -> str:
    return bytes((rows[:, 1:].flatten() - 4).astype(np.uint8)).decode(errors="replace")


def test_rows_begin_with_bos_and_hold_it_nowhere_else(corpus: Path, tmp_path: Path) -> None:
    file = prepare(data_of(corpus), tmp_path)
    for rows in (file.train, file.calibration, file.heldout):
        assert rows.dtype == np.int32
        assert (rows[:, 0] == BOS).all()
        assert (rows[:, 1:] >= 4).all()


def test_rows_are_the_documents_of_the_split_in_order(corpus: Path, tmp_path: Path) -> None:
    file = prepare(data_of(corpus), tmp_path)
    documents = corpus.read_text().split("\n\n")
    for split in ("train", "calibration", "heldout"):
        expected = "\n\n".join(document for document in documents if split_of(document) == split)
        found = text_of(getattr(file, split))
        assert expected.startswith(found)
        assert len(found) == len(getattr(file, split)) * 15


def test_text_that_spells_bos_gets_none_in_a_row(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(_: Bytes, texts: list[str]) -> list[list[int]]:
        return [[BOS if letter == "w" else ord(letter) for letter in text] for text in texts]

    monkeypatch.setattr(Bytes, "encode_batch", encode)
    file = prepare(data_of(corpus), tmp_path)
    for rows in (file.train, file.calibration, file.heldout):
        assert (rows[:, 0] == BOS).all()
        assert not (rows[:, 1:] == BOS).any()


@given(
    documents=st.lists(st.lists(st.integers(2, 99), max_size=20), max_size=15),
    separator=st.lists(st.integers(2, 99), max_size=3),
    n_rows=st.integers(1, 12),
    seq_len=st.integers(2, 9),
)
def test_row_writer_cuts_the_chain_of_documents(
    documents: list[list[int]], separator: list[int], n_rows: int, seq_len: int
) -> None:
    chain: list[int] = []
    for ids in filter(None, documents):
        chain += (separator if chain else []) + ids
    chain = chain[: n_rows * (seq_len - 1)]
    starts = range(0, len(chain) - seq_len + 2, seq_len - 1)

    with tempfile.TemporaryFile() as file:
        writer = RowWriter(file, (n_rows, seq_len), BOS, separator)
        header = file.tell()
        for ids in documents:
            writer.add(ids)
        file.seek(header)
        rows = np.frombuffer(file.read(), "<i4").reshape(-1, seq_len)
    assert rows.tolist() == [[BOS, *chain[start : start + seq_len - 1]] for start in starts]
    assert writer.n_tokens == len(chain)
    assert writer.full == (len(rows) == n_rows)


def test_reading_stops_once_all_splits_are_full(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(_data: Data) -> Iterator[str]:
        for i in range(10_000):
            yield f"document number {i}"
        pytest.fail("read on")

    monkeypatch.setattr(tokens, "documents", endless)
    assert len(prepare(data_of(corpus), tmp_path).heldout) == 4


def test_split_of_never_moves() -> None:
    found = [split_of(f"document {i}") for i in range(12)]
    assert "".join(split[0] for split in found) == "ctttttttttht"


def test_split_of_shares_are_eighty_ten_ten() -> None:
    counts = dict.fromkeys(("train", "calibration", "heldout"), 0)
    for i in range(5000):
        counts[split_of(f"document {i}")] += 1
    assert counts["train"] / 5000 == pytest.approx(0.8, abs=0.03)
    assert counts["heldout"] / 5000 == pytest.approx(0.1, abs=0.03)


@given(st.integers(2, 300), st.integers(1, 10**7), st.integers(1, 10**6), st.integers(1, 10**6))
def test_row_counts_are_the_least_that_hold_the_budgets(
    seq_len: int, train: int, calibration: int, heldout: int
) -> None:
    budgets = {"n_tokens": train, "n_calibration_tokens": calibration, "n_heldout_tokens": heldout}
    counts = row_counts(make_cell(seq_len=seq_len, steps=1, **budgets).data)
    assert counts["train"] % ROWS_PER_BLOCK == 0
    for split, budget, unit in (("train", train, 16), ("calibration", calibration, 1), ("heldout", heldout, 1)):
        assert counts[split] * (seq_len - 1) >= budget > (counts[split] - unit) * (seq_len - 1)


def test_preparing_again_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    first, second = (prepare(data_of(corpus), tmp_path / name) for name in "ab")
    assert (first.hash, first.heldout_hash) == (second.hash, second.heldout_hash)
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in "ab"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_preparing_again_opens_the_file_that_is_there(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(data_of(corpus), tmp_path)
    monkeypatch.setattr(tokens, "documents", lambda data: pytest.fail("read again"))
    assert prepare(data_of(corpus), tmp_path).hash == first.hash


@pytest.mark.parametrize(
    ("changed", "n_files"),
    [
        ({"dataset": "other"}, 2),
        ({"dataset_revision": "other"}, 2),
        ({"dataset_subset": "other"}, 2),
        ({"dataset_split": "other"}, 2),
        ({"text_column": "other"}, 2),
        ({"seq_len": 8}, 2),
        ({"n_heldout_tokens": 90}, 2),
        ({"model": "other"}, 2),
        ({"model_revision": "other"}, 2),
        ({"dataset_path": "moved.txt"}, 1),
        ({"n_heldout_tokens": 59}, 1),
        ({"data_seed": 7}, 1),
    ],
)
def test_what_the_rows_depend_on_gives_another_file(
    corpus: Path, tmp_path: Path, changed: dict[str, Any], n_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = corpus.read_text().split("\n\n")
    monkeypatch.setattr(tokens, "documents", lambda _: iter(texts))
    data, model = data_of(corpus), make_cell().model
    for options in ({}, changed):
        of_model = {key: value for key, value in options.items() if key.startswith("model")}
        of_data = {key: value for key, value in options.items() if key not in of_model}
        replaced = dataclasses.replace(data, **of_data), dataclasses.replace(model, **of_model)
        prepare_tokens(*replaced, Bytes(), CacheFolder(tmp_path), silent)
    assert len(list(tmp_path.rglob("manifest.json"))) == n_files


def test_one_of_several_builds_and_the_others_wait(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[Data] = []

    def slowly(data: Data) -> Iterator[str]:
        builds.append(data)
        time.sleep(0.2)  # long enough for the others to come to the lock
        yield from corpus.read_text().split("\n\n")

    monkeypatch.setattr(tokens, "documents", slowly)
    with ThreadPoolExecutor(4) as pool:
        hashes = set(pool.map(lambda _: prepare(data_of(corpus), tmp_path).hash, range(4)))
    assert (len(hashes), len(builds)) == (1, 1)


def test_the_first_build_is_no_damage(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare(data_of(corpus), tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("n_documents", [1, 3, 1000])
def test_the_batch_of_the_tokenizer_changes_nothing(
    corpus: Path, tmp_path: Path, n_documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(data_of(corpus), tmp_path / "a").hash
    monkeypatch.setattr(tokens, "DOCUMENTS_PER_BATCH", n_documents)
    assert prepare(data_of(corpus), tmp_path / "b").hash == expected


def test_a_larger_budget_begins_with_the_rows_of_a_smaller(corpus: Path, tmp_path: Path) -> None:
    small = prepare(data_of(corpus), tmp_path)
    large = prepare(data_of(corpus, n_tokens=960, n_heldout_tokens=150), tmp_path)
    assert np.array_equal(large.train[: len(small.train)], small.train)
    assert np.array_equal(large.heldout[: len(small.heldout)], small.heldout)
    assert len(large.heldout) > len(small.heldout)


def test_held_out_rows_do_not_depend_on_the_training_budget(corpus: Path, tmp_path: Path) -> None:
    hashes = {prepare(data_of(corpus, n_tokens=n), tmp_path).heldout_hash for n in (240, 480, 960)}
    assert len(hashes) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_file_is_rebuilt_loudly(
    corpus: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = prepare(data_of(corpus), tmp_path).hash
    (path,) = tmp_path.rglob("manifest.json" if damage == "manifest" else "train.npy")
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(content[: len(content) // 2])
    assert prepare(data_of(corpus), tmp_path).hash == expected
    assert caplog.records


def test_a_manifest_that_claims_terabytes_is_not_believed(corpus: Path, tmp_path: Path) -> None:
    expected = prepare(data_of(corpus), tmp_path).hash
    (path,) = tmp_path.rglob("manifest.json")
    manifest = json.loads(path.read_text())
    manifest["files"]["train"]["shape"] = [2**40, 16]
    path.write_text(json.dumps(manifest))
    assert prepare(data_of(corpus), tmp_path).hash == expected


def test_rows_of_another_type_are_not_believed(corpus: Path, tmp_path: Path) -> None:
    expected = prepare(data_of(corpus), tmp_path).hash
    (manifest_path,), (path,) = tmp_path.rglob("manifest.json"), tmp_path.rglob("train.npy")
    np.save(path, np.load(path).astype(np.float32))
    manifest = json.loads(manifest_path.read_text())
    manifest["files"]["train"] |= {"n_bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    manifest_path.write_text(json.dumps(manifest))
    file = prepare(data_of(corpus), tmp_path)
    assert (file.hash, file.train.dtype) == (expected, np.int32)


def test_an_empty_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match=r"dataset=corpus\.txt is empty"):
        prepare(data_of(tmp_path / "corpus.txt"), tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_short_text_says_what_would_fit(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(words(60))
    with pytest.raises(DataError, match=r"n_tokens=48000 needs") as caught:
        prepare(data_of(path, n_tokens=48_000), tmp_path)
    assert not list(tmp_path.rglob("*.npy"))
    found = re.search(r"choose at most n_tokens=(\d+)", str(caught.value))
    assert found is not None
    fitting = int(found[1])
    assert len(prepare(data_of(path, n_tokens=fitting), tmp_path).train) * 15 == fitting
    with pytest.raises(DataError):
        prepare(data_of(path, n_tokens=fitting + 1), tmp_path)


def test_progress_ends_at_the_budget(corpus: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int, str]] = []
    prepare_tokens(data_of(corpus), make_cell().model, Bytes(), CacheFolder(tmp_path), lambda *call: calls.append(call))
    last = [call for call in calls if call[0] == "tokenise"][-1]
    assert last[1] == last[2] == sum(row_counts(data_of(corpus)).values()) * 15
