"""What a cell leaves behind: its transcoder, its metrics and its rows, the row in `runs/` last.

One that diverged leaves its curve and a row without metrics: with the same options it would diverge again.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from sweep.activations import ActivationStream
from sweep.blocks import HarvestedBlocks
from sweep.config import SCHEMA_VERSION, Cell
from sweep.gang import Member
from sweep.language_model import Pieces, Tokenizer
from sweep.options import Workflow
from sweep.paths import ResultsFolder, write_atomic, write_json
from sweep.progress import Snapshot
from sweep.provenance import git_state, package_versions
from sweep.results import write_run
from sweep.status import SCORES
from sweep.summary import summary
from sweep.tokens import TokenFile
from sweep.train import Run
from sweep.transcoder import save_transcoder

__all__ = ["Workplace", "circumstances", "commit", "commit_diverged"]


@dataclass(frozen=True)
class Workplace:
    """What the members share: text, stream, and facts about both for the rows."""

    stream: ActivationStream
    harvested: HarvestedBlocks
    tokens: TokenFile
    tokenizer: Tokenizer
    model_hash: str
    device: str
    started: float
    gang_size: int


def commit(member: Member, results: ResultsFolder, place: Workplace, workflow: Workflow) -> None:
    """Write everything a finished cell leaves behind; the row in `runs/` goes last.

    Side effects: the cell's checkpoints go, unless `keep_checkpoints`.

    Raises:
        Superseded: the cell has been started again elsewhere. Should that happen while files are written, both starts
            write the same bytes under the same names, each file by a rename.
    """
    cell, run, transcoder, evaluation = member.cell, member.run, member.transcoder, member.evaluation
    assert run is not None and transcoder is not None and evaluation is not None
    row = run_row(member, place)
    member.attempt.check()
    save_transcoder(member.folder.transcoder, transcoder, about(cell))
    write_json(member.folder.metrics, {"cell_id": cell.cell_id, **metrics(member)})
    write_atomic(member.folder.summary, summary(metrics(member)).encode())
    since_fired = run.state.batches_since_fired.tolist()
    write_run(
        results,
        cell.cell_id,
        {
            "runs": [row],
            "curves": curve(run),
            "latents": [
                {**latent, "group": group, "batches_since_fired": since}
                for latent, group, since in zip(evaluation.latents, groups(cell), since_fired, strict=True)
            ],
            "sequences": evaluation.sequences,
            "contexts": with_tokens(evaluation.contexts, place),
        },
    )
    scores = {name: row[name] for name in SCORES}
    member.set_status(state="done", progress=Snapshot(), **run.standing() | scores)
    member.log.info("done: fvu %s at l0 %s", row["fvu"], row["l0"])
    if not workflow.keep_checkpoints:
        shutil.rmtree(member.folder.checkpoints, ignore_errors=True)


def commit_diverged(member: Member, results: ResultsFolder, place: Workplace, workflow: Workflow) -> None:
    """Write the row of a cell that has diverged, as its status says already, and its curve until then.

    Side effects: the cell's checkpoints go, unless `keep_checkpoints`.

    Raises:
        Superseded: the cell has been started again elsewhere.
    """
    run = member.run
    assert run is not None
    row = {**facts(member, place), "status": "diverged", "failure": member.status.error["message"]}
    member.attempt.check()
    write_run(results, member.cell.cell_id, {"runs": [row], "curves": curve(run)})
    if not workflow.keep_checkpoints:
        shutil.rmtree(member.folder.checkpoints, ignore_errors=True)


def curve(run: Run) -> list[dict[str, Any]]:
    return [{"step": step, "metric": metric, "value": value} for step, metric, value in run.state.curve]


def with_tokens(contexts: list[dict[str, Any]], place: Workplace) -> Iterator[dict[str, Any]]:
    """The contexts with the text of their tokens; token 0 of a row is its BOS, which no context counts."""
    text = Pieces(place.tokenizer)
    for context in contexts:
        begin = context["start"] + 1
        ids = place.tokens.heldout[context["sequence"], begin : begin + len(context["activations"])]
        yield {**context, "tokens": [text[token] for token in ids.tolist()]}


def groups(cell: Cell) -> Iterator[int]:
    """For each latent, the innermost prefix that holds it."""
    for group, (begin, end) in enumerate(cell.capacity.spans):
        yield from (group for _ in range(begin, end))


def about(cell: Cell) -> dict[str, Any]:
    """What a reader of the transcoder's folder must know beside its shapes."""
    hook_in, hook_out = cell.site.hook_names
    return {
        "cell_id": cell.cell_id,
        "model": cell.model.model,
        "model_repo": cell.model.model_repo,
        "model_revision": cell.model.model_revision,
        "layer": cell.site.layer,
        "hook_in": hook_in,
        "hook_out": hook_out,
        "groups": list(cell.capacity.groups),
        "seq_len": cell.data.seq_len,
        "cell": asdict(without_paths(cell)),
    }


def without_paths(cell: Cell) -> Cell:
    """The cell without the paths of this machine, which are no part of its identity."""
    return replace(cell, model=replace(cell.model, model_path=None), data=replace(cell.data, dataset_path=None))


def metrics(member: Member) -> dict[str, Any]:
    assert member.run is not None and member.evaluation is not None
    dead = member.run.state.batches_since_fired >= member.cell.revival.n_batches_to_dead
    return {**member.evaluation.metrics, "dead_fraction_training": int(dead.sum()) / dead.numel()}


def circumstances(place: Workplace) -> dict[str, Any]:
    """Columns of every row: on which text and weights it was made, when, with what, and how long that took."""
    git_sha, git_dirty = git_state()
    return {
        "tokens_hash": place.tokens.hash,
        "heldout_hash": place.tokens.heldout_hash,
        "model_hash": place.model_hash,
        "n_language_model_tokens": place.harvested.n_tokens_seen,
        "gang_size": place.gang_size,
        "seconds": time.monotonic() - place.started,
        "device": place.device,
        "n_threads": torch.get_num_threads(),
        "versions": json.dumps(package_versions(), sort_keys=True),
        "git_sha": git_sha,
        "git_dirty": git_dirty,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run_row(member: Member, place: Workplace) -> dict[str, Any]:
    """The row in `runs` of a cell that is done, by the schema of results.py."""
    assert member.run is not None and member.transcoder is not None
    threshold = member.transcoder.threshold
    losses = [value for _, metric, value in member.run.state.curve if metric == "loss"]
    return {
        **facts(member, place),
        "status": "done",
        **metrics(member),
        "final_loss": losses[-1],
        "threshold": None if threshold is None else float(threshold[0]),
    }


def facts(member: Member, place: Workplace) -> dict[str, Any]:
    """Columns of every cell's row, whatever became of it."""
    cell, run = member.cell, member.run
    assert run is not None
    made = circumstances(place)
    return {
        "kind": "cell",
        "schema_version": SCHEMA_VERSION,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in cell.flat().items()},
        "rollbacks": len(run.state.rollbacks),
        "lr_factor": run.state.lr_factor,
        "source_scale": run.state.source_scale,
        "target_scale": run.state.target_scale,
        **made,
        "config": json.dumps(cell.flat(identity_only=True), sort_keys=True),
        "attempts": member.status.attempts,
        "training_tokens_per_second": run.n_taken * cell.schedule.batch_size / made["seconds"] if run.n_taken else None,
        "host": member.status.host,
    }
