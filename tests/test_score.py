"""`python -m sweep evaluate`: the same numbers on the sweep's rows, unused documents beyond them, and every refusal."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from commands import sweep as run
from gangs import make_workflow, run_cells
from make import make_cell
from safetensors.torch import load_file, save_file

from sweep.config import Cell
from sweep.errors import Interrupted
from sweep.language_model import load_tokenizer
from sweep.paths import CacheFolder, ResultsFolder
from sweep.progress import silent
from sweep.results import METRICS
from sweep.saved import open_saved
from sweep.score import Rows, score
from sweep.tokens import prepare_tokens, row_counts, split_of

CELLS = [{}, {"dict_size": 96, "layer": 2, "activation": "top_k"}, {"data_seed": 1}]
COMPARED = [column.name for column in METRICS if column.name != "dead_fraction_training"]


def cells() -> list[Cell]:
    return [make_cell(**overrides) for overrides in CELLS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, cache: CacheFolder) -> ResultsFolder:
    """Two finished cells of one stream. Tests only read it."""
    return run_cells(cells()[:2], make_workflow(tmp_path_factory.mktemp("results"), cache, keep_checkpoints=False))


@pytest.fixture
def folder(results: ResultsFolder) -> Path:
    return results.cell(cells()[0].cell_id).root


def evaluate(checkpoint: Path, cache: CacheFolder, *words: object) -> Any:
    return run("evaluate", "--checkpoint", checkpoint, "--cache_dir", cache.root, "--device", "cpu", *words)


@pytest.mark.parametrize("number", [0, 1])
def test_the_sweeps_own_rows_give_the_numbers_of_its_row(
    results: ResultsFolder, cache: CacheFolder, number: int, tmp_path: Path
) -> None:
    cell_id = cells()[number].cell_id
    done = evaluate(results.cell(cell_id).root, cache, "--output_dir", tmp_path / "out", "--layer", number + 1)
    assert done.exit_code == 0, done.output
    assert "the same numbers as the row in runs/" in done.stdout
    row = pl.read_parquet(results.row("runs", cell_id)).row(0, named=True)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {name: found[name] for name in COMPARED} == {name: row[name] for name in COMPARED}
    assert (found["heldout_hash"], found["model_hash"]) == (row["heldout_hash"], row["model_hash"])
    assert done.stdout.endswith((tmp_path / "out" / "summary.txt").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "summary.txt"]


def test_the_numbers_do_not_depend_on_the_caches(results: ResultsFolder, folder: Path, tmp_path: Path) -> None:
    row = pl.read_parquet(results.row("runs", folder.name)).row(0, named=True)
    scored = score(open_saved(folder), None, None, CacheFolder(tmp_path / "cache"), "cpu", silent)
    assert {name: scored.metrics[name] for name in COMPARED} == {name: row[name] for name in COMPARED}
    assert scored.facts["heldout_hash"] == row["heldout_hash"]


def test_each_metric_has_its_target_and_verdict(folder: Path, cache: CacheFolder, tmp_path: Path) -> None:
    evaluate(folder, cache, "--output_dir", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["targets"] == {"fvu": "< 0.1", "dead_fraction": "< 0.1", "absorption_score": "< 0.01"}
    assert found["verdicts"]["fvu"] == "poor"
    assert found["fvu"] > 0.3
    (line,) = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines() if line[:4] == "fvu "]
    assert line == ["fvu", f"{found['fvu']:.4g}", "<", "0.1", "poor"]


@pytest.mark.parametrize("n_rows", [5, 16, 17])
def test_fewer_rows_are_the_first_ones(results: ResultsFolder, folder: Path, cache: CacheFolder, n_rows: int) -> None:
    own = pl.read_parquet(results.row("sequences", folder.name))
    found = score(open_saved(folder), None, n_rows, cache, "cpu", silent)
    first = own.head(n_rows)
    assert found.metrics["n_evaluated_tokens"] == first["n_tokens"].sum()
    assert found.metrics["mse"] == pytest.approx(first["sum_squared_error"].sum() / first["n_tokens"].sum() / 32)
    assert found.metrics["l0"] == pytest.approx(first["sum_l0"].sum() / first["n_tokens"].sum())


def test_more_rows_begin_with_the_sweeps_and_go_on_with_documents_in_no_other_split(
    cache: CacheFolder, tiny_folder: Path, tmp_path: Path
) -> None:
    documents = [f"document {i} " + f"w{i} " * (5 + i % 7) for i in range(900)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(documents))
    budgets = {"n_tokens": 4960, "n_calibration_tokens": 310, "n_heldout_tokens": 310}
    cell = make_cell(dataset_path=str(path), steps=2, **budgets)
    n_own = row_counts(cell.data)["heldout"]
    own = prepare_tokens(cell.data, cell.model, load_tokenizer(tiny_folder), cache, silent)
    rows = Rows(cell, [cell.site], 6 * n_own, cache, "cpu", silent)
    more = rows._tokens.heldout
    assert len(more) == 6 * n_own
    assert np.array_equal(more[:n_own], own.heldout)

    def pieces_of(tokens: np.ndarray) -> set[bytes]:
        text = bytes((tokens[:, 1:].flatten() - 4).astype(np.uint8))  # the ids are those of bytes, in another order
        return {text[start : start + 24] for start in range(0, len(text) - 24)}

    assert not pieces_of(more) & (pieces_of(own.train) | pieces_of(own.calibration))
    tokenizer = load_tokenizer(tiny_folder)
    held_out = [ids for ids, text in zip(tokenizer.encode_batch(documents), documents, strict=True)
                if split_of(text) == "heldout"]  # fmt: skip
    chain = [token for ids in held_out for token in (*tokenizer.encode_batch(["\n\n"])[0], *ids)][2:]
    assert more[:, 1:].flatten().tolist() == chain[: more[:, 1:].size]
    assert sum(len(block[cell.site].source) for block in rows.blocks()) == 6 * n_own * 31


def test_batches_of_rows_are_counted(folder: Path, cache: CacheFolder) -> None:
    assert "24 held-out rows of docstrings (744 tokens)" in evaluate(folder, cache, "--batches", 3).stdout
    assert "6 held-out rows" in evaluate(folder, cache, "--batches", 3, "--batch-size", 2).stdout


def test_the_change_against_another_cell_is_on_the_same_rows(
    results: ResultsFolder, folder: Path, cache: CacheFolder, tmp_path: Path
) -> None:
    other = results.cell(cells()[1].cell_id)
    done = evaluate(folder, cache, "--against", other.root, "--output_dir", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "metrics.json").read_text())
    theirs = json.loads(other.metrics.read_text())
    assert {name: found["against_metrics"][name] for name in COMPARED} == {name: theirs[name] for name in COMPARED}
    assert found["changes"]["fvu"] == found["fvu"] - theirs["fvu"]
    assert f"{found['changes']['fvu']:+.4g}" in (tmp_path / "summary.txt").read_text()
    itself = evaluate(folder, cache, "--against", folder)
    assert all(line.endswith("none") for line in itself.stdout.splitlines() if line.startswith(("fvu", "l0")))


def test_a_cell_of_another_language_model_is_no_comparison(folder: Path, cache: CacheFolder, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "transcoder", other)
    edit(other / "config.json", lambda config: config["cell"]["model"].update(model="large"))
    refused = evaluate(folder, cache, "--against", other)
    assert refused.exit_code == 2
    assert "of the same language model" in refused.stderr


@pytest.mark.parametrize("place", ["transcoder", "elsewhere"])
def test_the_transcoder_folder_will_do(folder: Path, cache: CacheFolder, place: str, tmp_path: Path) -> None:
    checkpoint = folder / "transcoder"
    if place == "elsewhere":
        checkpoint = shutil.copytree(checkpoint, tmp_path / "carried away")
    words = ("--causal-rows", 0)  # nothing in the folder tells how many there were
    tables = [evaluate(path, cache, *words).stdout.partition("metric")[2] for path in (folder, checkpoint)]
    assert tables[0].splitlines()[:10] == tables[1].splitlines()[:10]
    assert len(tables[0].splitlines()) >= 10


def test_a_row_that_was_scored_on_other_text_is_told(
    results: ResultsFolder, folder: Path, cache: CacheFolder, tmp_path: Path
) -> None:
    copy = ResultsFolder(shutil.copytree(results.root, tmp_path / "copy"))
    row = pl.read_parquet(copy.row("runs", folder.name))
    for change, words in (({"heldout_hash": "0"}, "the text changed"), ({"mse": 0.5}, "mse differ")):
        row.with_columns(**{name: pl.lit(value) for name, value in change.items()}).write_parquet(
            copy.row("runs", folder.name)
        )
        assert words in evaluate(copy.cell(folder.name).root, cache).stdout


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def poison(path: Path, name: str, value: Any) -> None:
    tensors = load_file(path)
    tensors[name] = tensors[name].clone().fill_(value) if isinstance(value, float) else tensors[name].to(value)
    save_file(tensors, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "transcoder/transcoder.safetensors"), "cannot be read as a transcoder"),
        (lambda f: (f / "transcoder/transcoder.safetensors").unlink(), "cannot be read as a transcoder"),
        (lambda f: poison(f / "transcoder/transcoder.safetensors", "W_enc", float("nan")), "W_enc holds numbers"),
        (lambda f: poison(f / "transcoder/transcoder.safetensors", "W_dec", torch.int32), "hold I32"),
        (lambda f: edit(f / "transcoder/config.json", lambda c: c.update(dict_size=63)), "do not fit its config.json"),
        (lambda f: edit(f / "transcoder/config.json", lambda c: c.update(cell_id="another")), "is of cell another"),
        (lambda f: (f / "transcoder/config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "transcoder/config.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / "transcoder/config.json").write_text("[]"), "it is no JSON object"),
        (lambda f: (f / "config.json").write_text("{}"), "not the config of a cell"),
        (lambda f: (f / "config.json").write_text('{"capacity": 3}'), "not the config of a cell"),
        (lambda f: edit(f / "config.json", lambda c: c["site"].update(layer=-4)), "layer=-4 does not exist"),
        (lambda f: edit(f / "config.json", lambda c: c["model"].update(model="../up")), "model=../up"),
        (lambda f: (f / "config.json").write_text(" " * 2_000_000), "larger than"),
        (lambda f: shutil.rmtree(f / "transcoder"), "has no transcoder yet: the cell is done"),
        (shutil.rmtree, "does not exist; name the folder of a finished cell"),
    ],
)
def test_a_damaged_cell_is_one_message(
    folder: Path, cache: CacheFolder, damage: Any, message: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / folder.name)
    damage(copy)
    refused = evaluate(copy, cache, "--output_dir", tmp_path / "out")
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "2"], "was trained on layer 1 of tiny (norm_out -> mlp_out)"),
        (["--batch_size", "2"], "say how many with --batches"),
        (["--device", "tpu"], "device=tpu is not a device"),
        (["--device", "cuda"], "device=cuda: torch sees no CUDA device"),
        (["--output_dir", "/dev/null/x"], "cannot be written to"),
        (["--output_dir", "/proc/x"], "cannot be written to"),
        (["--cache_dir", "/dev/null/x"], "cache_dir=/dev/null/x cannot be used"),
        (["--against", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_a_wrong_request_is_one_message(folder: Path, cache: CacheFolder, words: list[str], message: str) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused = evaluate(folder, cache, *words)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_more_rows_than_the_text_has_are_refused_with_their_number(cache: CacheFolder, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"document {i} " + f"w{i} " * 9 for i in range(300)))
    budgets = {"n_tokens": 496, "n_calibration_tokens": 31, "n_heldout_tokens": 31, "batch_size": 16}
    cell = make_cell(dataset_path=str(path), steps=2, **budgets)
    swept = run_cells([cell], make_workflow(tmp_path / "results", cache))
    refused = evaluate(swept.cell(cell.cell_id).root, cache, "--batches", 100)
    assert refused.exit_code == 2
    n_rows = int(refused.stderr.partition("corpus.txt has ")[2].split()[0])
    assert evaluate(swept.cell(cell.cell_id).root, cache, "--batches", n_rows, "--batch_size", 1).exit_code == 0
    more = evaluate(swept.cell(cell.cell_id).root, cache, "--batches", n_rows + 1, "--batch_size", 1)
    assert more.exit_code == 2


def test_a_cells_own_folder_is_not_written_into(folder: Path, cache: CacheFolder) -> None:
    before = (folder / "metrics.json").read_bytes()
    refused = evaluate(folder, cache, "--output_dir", folder)
    assert refused.exit_code == 2
    assert "belongs to a cell" in refused.stderr
    assert (folder / "metrics.json").read_bytes() == before


def test_a_cell_that_is_still_training_is_told(cache: CacheFolder, tmp_path: Path) -> None:
    cell = dataclasses.replace(cells()[0], seed=77)
    calls = iter(range(10_000))
    with pytest.raises(Interrupted):
        run_cells([cell], make_workflow(tmp_path, cache), stop=lambda: next(calls) > 25)
    refused = evaluate(ResultsFolder(tmp_path).cell(cell.cell_id).root, cache)
    assert refused.exit_code == 2
    assert "has no transcoder yet: the cell is interrupted, at step" in refused.stderr


def test_a_results_folder_is_answered_with_its_cells(results: ResultsFolder, cache: CacheFolder) -> None:
    refused = evaluate(results.root, cache)
    assert refused.exit_code == 2
    assert all(cell.cell_id in refused.stderr for cell in cells()[:2])
