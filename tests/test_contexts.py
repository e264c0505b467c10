"""The contexts that excite a latent most: against sorting everything at once."""

from pathlib import Path

import polars as pl
import pytest
import torch
from gangs import make_workflow, run_cells, same_bytes
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell

import analysis
from sweep.contexts import BEFORE, WINDOW, TopContexts
from sweep.language_model import Pieces, load_tokenizer
from sweep.paths import CacheFolder


def expected(latents: torch.Tensor, n: int) -> list[tuple[int, int, int, int, float]]:
    """(latent, place, sequence, position, activation) of all contexts; `latents` is sequences x tokens x latents."""
    rows = []
    for latent in range(latents.shape[2]):
        best = [(float(s[:, latent].max()), i, int(s[:, latent].argmax())) for i, s in enumerate(latents)]
        best = sorted((b for b in best if b[0] > 0), key=lambda b: (-b[0], b[1]))[:n]
        rows += [(latent, place, sequence, peak, value) for place, (value, sequence, peak) in enumerate(best)]
    return rows


@given(
    n_sequences=st.integers(1, 9),
    seq_tokens=st.integers(1, 50),
    n=st.integers(1, 4),
    chunk=st.integers(1, 120),
    seed=st.integers(0, 9),
)
def test_contexts_are_the_largest_whatever_the_chunks(n_sequences: int, seq_tokens: int, n: int, chunk: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randint(-6, 4, (n_sequences, seq_tokens, 5), generator=generator).clamp(min=0).float()
    top = TopContexts(5, seq_tokens, n, torch.device("cpu"))
    for part in latents.flatten(0, 1).split(chunk):
        top.update(part)
    rows = top.rows()
    found = [(r["latent"], r["place"], r["sequence"], r["position"], r["activation"]) for r in rows]
    assert found == expected(latents, n)
    for row in rows:
        window = latents[row["sequence"], row["start"] : row["start"] + WINDOW, row["latent"]]
        assert row["activations"] == window.tolist()
        assert row["activations"][row["position"] - row["start"]] == row["activation"]
        assert row["position"] - row["start"] <= BEFORE or row["start"] == seq_tokens - len(window)


def test_a_latent_that_never_fires_has_no_context():
    top = TopContexts(3, 4, 2, torch.device("cpu"))
    top.update(torch.zeros(8, 3))
    assert top.rows() == []


def test_pieces_put_together_are_the_text(tiny_folder: Path):
    tokenizer = load_tokenizer(tiny_folder)
    (ids,) = tokenizer.encode_batch(["Two words, one line.\n"])
    pieces = Pieces(tokenizer)
    assert "".join(pieces[token] for token in ids) == "Two words, one line.\n"
    assert "bos" in pieces[tokenizer.bos_token_id]


def test_a_cell_leaves_contexts_where_they_are_asked_for(tmp_path: Path, cache: CacheFolder):
    cell = make_cell()
    results = run_cells([cell], make_workflow(tmp_path / "with", cache, n_contexts=3))
    frame = analysis.load(tmp_path / "with", "contexts").collect()
    densities = analysis.load(tmp_path / "with", "latents").collect().filter(pl.col("density") > 0)
    assert frame["latent"].unique().sort().to_list() == densities["latent"].to_list()
    assert frame.group_by("latent").len()["len"].max() == 3
    first = frame.filter(pl.col("place") == 0)
    assert first["activation"].to_list() == pytest.approx(densities["max_activation"].to_list(), rel=1e-6)
    assert (frame["tokens"].list.len() == frame["activations"].list.len()).all()
    assert (frame["activations"].list.max() == frame["activation"]).all()

    without = run_cells([cell], make_workflow(tmp_path / "without", cache, n_contexts=0))
    same_bytes(results, without, cell)
    assert not (tmp_path / "without" / "contexts").exists()
