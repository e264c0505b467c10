"""The token file: packing, splits by document, growth, damage."""

import json
import re
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
from sweep.tokens import ROWS_PER_BLOCK, TokenFile, prepare_tokens, row_counts, split_of

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


@given(st.text(max_size=50))
def test_split_of_is_one_of_three_and_fixed(document: str) -> None:
    assert split_of(document) == split_of(document)
    assert split_of(document) in ("train", "calibration", "heldout")


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
