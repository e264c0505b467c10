"""Score a saved transcoder afresh on held-out rows: what `python -m sweep evaluate` does.

1. Rows: the first ones of the held-out split; where more are asked for, from documents the sweep did not use.
2. Blocks: from the sweep's cache where they are there, else from the language model.
3. Metrics: by `evaluate`, the same code that scores a cell after its last step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sweep.activations import Batch
from sweep.blocks import CachedBlocks, HarvestedBlocks, from_model, with_cache
from sweep.causal import CausalRows
from sweep.config import Cell, Site
from sweep.devices import pick_device
from sweep.errors import ConfigError, TooShort
from sweep.evaluate import Evaluation, evaluate
from sweep.language_model import Activations, ensure_model_folder, load_tokenizer
from sweep.metrics import Metrics
from sweep.paths import CacheFolder, write_atomic, write_json
from sweep.progress import Report
from sweep.results import read_row
from sweep.revisions import weights_hash
from sweep.saved import Saved
from sweep.summary import SCALES, summary, target, verdict
from sweep.tokens import ROWS_PER_BLOCK, TokenFile, only_heldout, prepare_tokens, row_counts, tokens_folder
from sweep.transcoder import Transcoder

__all__ = ["Scored", "score", "score_on_rows", "text", "write"]


CAUSAL_ROWS = 8
"""Rows that the language model runs on with predictions in it, where no row of a sweep tells how many."""


@dataclass(frozen=True)
class Scored:
    """Metrics of a transcoder, and of another one on the same rows; `facts` say on what."""

    metrics: Metrics
    against: Metrics | None
    facts: dict[str, Any]
    remark: str


def score(
    saved: Saved,
    against: Saved | None,
    n_rows: int | None,
    cache: CacheFolder,
    device: str,
    report: Report,
    n_causal_rows: int | None = None,
) -> Scored:
    """Score `saved` on its first `n_rows` held-out rows (None: exactly those of its sweep), `against` on the same.

    The language model runs with predictions in it on the first `n_causal_rows` of them (None: as many as in its sweep).

    Side effects: on a CPU, rows that were scored before are scored with as many threads as then, because sums of
    floats depend on it.

    Raises:
        SweepError: a transcoder is damaged, the two are of different language models, the text has fewer rows, the
            device is not there.
    """
    if against is not None and model_of(against.cell) != model_of(saved.cell):
        raise ConfigError(
            f"--against {against.name} is of {' '.join(model_of(against.cell))}, {saved.name} of "
            f"{' '.join(model_of(saved.cell))}; name a cell of the same language model"
        )
    device = pick_device(device)
    both = {"checkpoint": saved} | ({} if against is None else {"against": against})
    predictors = {name: (each.cell.site, each.load(device)) for name, each in both.items()}
    n_own = row_counts(saved.cell.data)["heldout"]
    n_rows = n_rows or n_own
    before = row_before(saved)
    if n_causal_rows is None:
        n_causal_rows = causal_rows_of(before, saved.cell)
    if n_rows != n_own:
        before = None
    if before is not None and device == before["device"] == "cpu":
        torch.set_num_threads(before["n_threads"])

    scores, on = score_on_rows(predictors, saved.cell, n_rows, n_causal_rows, cache, device, report)
    metrics = scores["checkpoint"].metrics
    facts = {**saved.facts(), **on, **({} if against is None else {"against": against.name})}
    other = scores["against"].metrics if against is not None else None
    return Scored(metrics, other, facts, remark(metrics, facts, before))


def model_of(cell: Cell) -> tuple[str, str]:
    return cell.model.model, cell.model.model_revision[:12]


def score_on_rows(
    predictors: Mapping[str, tuple[Site, Transcoder]],
    cell: Cell,
    n_rows: int,
    n_causal_rows: int,
    cache: CacheFolder,
    device: str,
    report: Report,
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    """Every transcoder on the first `n_rows` held-out rows of a cell, in one pass; and what tells which rows these are.

    Raises:
        SweepError: the text has fewer rows, or the language model lacks a hook.
    """
    sites = list(dict.fromkeys(site for site, _ in predictors.values()))
    rows = Rows(cell, sites, n_rows, cache, device, report)
    n_blocks = -(-n_rows // ROWS_PER_BLOCK)
    causal = rows.causal(n_causal_rows)
    scores = evaluate(predictors, rows.blocks(), rows.seq_tokens, report, n_blocks, causal=causal)
    facts = {"n_rows": n_rows, "heldout_hash": rows.heldout_hash, "model_hash": rows.model_hash, "device": device}
    return scores, facts


class Rows:
    """The first `n_rows` held-out rows of a cell, as activations."""

    def __init__(
        self, cell: Cell, sites: list[Site], n_rows: int, cache: CacheFolder, device: str, report: Report
    ) -> None:
        self.seq_tokens = cell.data.seq_len - 1
        self._cell, self._sites, self._n_rows, self._cache, self._report = cell, sites, n_rows, cache, report
        self._device = device
        self._folder = ensure_model_folder(cell.model, cache, report)
        self._tokens = self._prepare()
        self.heldout_hash = self._tokens.heldout_hash
        self.model_hash = weights_hash(self._folder)
        self._harvested = from_model(cell.stream, self._folder, self._tokens, device, report, check=sites)
        self._harvested.n_expected = n_rows * cell.data.seq_len

    def _prepare(self) -> TokenFile:
        """The sweep's own token file where it is there and long enough, else one of held-out rows alone."""
        model, data = self._cell.model, self._cell.data
        tokenizer = load_tokenizer(self._folder)
        is_there = tokens_folder(data, model, self._cache).is_dir()
        if not is_there or self._n_rows > row_counts(data)["heldout"]:
            data = only_heldout(data, self._n_rows)
        try:
            return prepare_tokens(data, model, tokenizer, self._cache, self._report)
        except TooShort as error:
            raise ConfigError(
                f"{self._n_rows} rows are asked for, and dataset={data.dataset} has {error.n_rows['heldout']:,} that "
                "are held out; ask for fewer with --batches and --batch_size"
            ) from error

    def blocks(self) -> Iterator[Batch]:
        """Blocks of whole rows, the last one cut where the rows end."""
        blocks, n_left = self._source(), self._n_rows
        for number in range(-(-self._n_rows // ROWS_PER_BLOCK)):
            (batch,) = blocks.read("heldout", [number], self._sites)
            n_tokens = min(n_left, ROWS_PER_BLOCK) * self.seq_tokens
            n_left -= ROWS_PER_BLOCK
            yield {site: Activations(a.source[:n_tokens], a.target[:n_tokens]) for site, a in batch.items()}

    def causal(self, n_rows: int) -> CausalRows | None:
        """The first of the rows, for the language model with predictions in it; None where none are asked for."""
        return CausalRows.first(min(n_rows, self._n_rows), self._harvested)

    def _source(self) -> CachedBlocks | HarvestedBlocks:
        if not len(self._tokens.train):  # rows that no sweep reads need no place in its cache
            return self._harvested
        stream = self._cell.stream
        return with_cache(
            self._harvested, stream, self._sites, self.model_hash, self._device, self._cache, float("inf")
        )


def row_before(saved: Saved) -> dict[str, Any] | None:
    """The row the sweep committed for this cell, if it is there and can be read."""
    import polars as pl

    if saved.results is None:
        return None
    try:
        return read_row(saved.results.row("runs", saved.cell.cell_id))
    except (OSError, pl.exceptions.PolarsError):
        return None


def causal_rows_of(before: Mapping[str, Any] | None, cell: Cell) -> int:
    """On how many rows the sweep ran the language model with predictions in it."""
    if before is None:
        return CAUSAL_ROWS
    return int(before.get("n_causal_tokens") or 0) // max(cell.data.seq_len - 2, 1)


def remark(metrics: Metrics, facts: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """What to say about the row the sweep committed, when the same rows were scored."""
    if before is None:
        return ""
    for key, what in (("heldout_hash", "text"), ("model_hash", "weights of the language model")):
        if before[key] != facts[key]:
            return f"not comparable with the row in runs/: the {what} changed since ({key})"
    differ = [name for name, value in metrics.items() if before.get(name) != value]
    if not differ:
        return "the same numbers as the row in runs/, to the last digit"
    return (
        f"not to the last digit the numbers of the row in runs/: {', '.join(differ)} differ; it was made on "
        f"{before['device']} with {before['n_threads']} threads and {before['versions']}"
    )


def text(scored: Scored) -> str:
    """What was scored, on what, and the table."""
    facts = scored.facts
    rows = f"{facts['n_rows']:,} held-out rows of {facts['dataset']} ({scored.metrics['n_evaluated_tokens']:,} tokens)"
    about = f"{facts['name']}: {facts['model']} layer {facts['layer']}, {facts['hook_in']} -> {facts['hook_out']}"
    lines = [about, rows + (f", against {facts['against']} on the same" if "against" in facts else ""), ""]
    return (
        "\n".join(lines) + "\n" + summary(scored.metrics, scored.against) + (scored.remark and f"\n{scored.remark}\n")
    )


def write(scored: Scored, folder: Path) -> None:
    """Write `metrics.json` and `summary.txt`, each whole or not at all; `folder` is made if need be.

    Raises:
        OSError: they cannot be written.
    """
    metrics = scored.metrics
    value: dict[str, Any] = {
        **scored.facts,
        **metrics,
        "targets": {name: target(name) for name in SCALES},
        "verdicts": {name: verdict(name, metrics[name]) for name in SCALES},
    }
    if scored.against is not None:
        pairs = {name: (metrics[name], other) for name, other in scored.against.items()}
        changes = {name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()}
        value |= {"against_metrics": scored.against, "changes": changes}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", value)
    write_atomic(folder / "summary.txt", text(scored).encode())
