"""Text to tokens: bytes, order, and what begins a row."""

from pathlib import Path

import pytest

from sweep.errors import ModelError
from sweep.language_model import load_tokenizer


@pytest.mark.parametrize("text", ["plain", "<bos>", "<pad><eos>x<unk>", "é\n\n\t漢 🙂", " leading", "\x00\x7f"])
def test_tokens_of_tiny_are_the_bytes_of_the_text(tiny_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    (ids,) = tokenizer.encode_batch([text])
    assert len(ids) == len(text.encode())
    assert min(ids) >= 4  # 0 to 3 are special tokens
    assert tokenizer._backend.decode(ids, clean_up_tokenization_spaces=False) == text


def test_tokenizer_keeps_the_order_of_texts_and_gives_nothing_for_nothing(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    assert tokenizer.encode_batch([]) == []
    a, nothing, ab = tokenizer.encode_batch(["a", "", "ab"])
    assert (len(a), nothing, len(ab)) == (1, [], 2)
    assert ab[:1] == a
    assert tokenizer.bos_token_id == 2


def save_tokenizer(tiny_folder: Path, folder: Path, **special: str | None) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(tiny_folder / "tokenizer.json"), **special).save_pretrained(folder)


def test_tokenizer_without_bos_begins_rows_with_eos(tiny_folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tiny_folder, tmp_path, eos_token="<eos>")
    assert load_tokenizer(tmp_path).bos_token_id == 1


def test_tokenizer_without_bos_and_eos_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tiny_folder, tmp_path)
    with pytest.raises(ModelError, match="neither a BOS nor an EOS"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_tokenizer_that_cannot_be_read_is_named(tiny_folder: Path, tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_bytes((tiny_folder / "tokenizer_config.json").read_bytes())
    with pytest.raises(ModelError, match=f"{tmp_path} has no tokenizer that can be read"):
        load_tokenizer(tmp_path)
