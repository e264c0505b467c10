"""Run a gang: the one place that wires objects, and the only one with a broad except.

1. Prepare: model folder, token file, blocks, stream.
2. Start each cell: from its last checkpoint, or from the first window of its site.
3. Train all in lockstep on one stream.
4. Finish (threshold), evaluate all in one pass over the held-out rows, commit the rows.

A cell that fails leaves the gang with its error in its status; the others go on.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sweep import checkpoint
from sweep.activations import ActivationStream
from sweep.blocks import CachedBlocks, HarvestedBlocks, cache_bytes, cache_fits
from sweep.config import SCHEMA_VERSION, Cell, cell_from_json
from sweep.errors import Diverged, Interrupted, SweepError
from sweep.evaluate import Evaluation, evaluate
from sweep.finish import finish
from sweep.initialise import initial_state
from sweep.language_model import LanguageModel, ensure_model_folder, load_language_model, load_tokenizer
from sweep.options import Workflow
from sweep.paths import CacheFolder, CellFolder, ResultsFolder, try_lock, write_atomic, write_json
from sweep.progress import Report
from sweep.provenance import git_state, package_versions
from sweep.results import write_run
from sweep.revisions import weights_hash
from sweep.status import Status, read_status
from sweep.summary import summary
from sweep.tokens import TokenFile, prepare_tokens, row_counts
from sweep.train import Run, train
from sweep.transcoder import Transcoder, save_transcoder

__all__ = ["run_gang"]

HEARTBEAT_SECONDS = 2.0

log = logging.getLogger(__name__)


@dataclass
class Member:
    """A cell of the gang while it is in it."""

    cell: Cell
    folder: CellFolder
    status: Status
    run: Run | None = None
    transcoder: Transcoder | None = None
    evaluation: Evaluation | None = None
    last_beat: float = 0.0

    @property
    def log(self) -> "logging.LoggerAdapter[logging.Logger]":
        """Speaks in this cell's log only."""
        return logging.LoggerAdapter(log, {"cell_id": self.cell.cell_id})

    def set_status(self, **values: Any) -> None:
        self.status = self.status.changed(**values)
        self.status.write(self.folder)
        self.last_beat = time.monotonic()

    def beat(self) -> None:
        """Say how far the cell is, at most every HEARTBEAT_SECONDS."""
        if self.run and time.monotonic() - self.last_beat > HEARTBEAT_SECONDS:
            self.set_status(step=self.run.state.step)


@dataclass
class Gang:
    """The members still in it, and the one place where an error costs a member its place."""

    members: list[Member]
    failed: list[Member] = field(default_factory=list)

    def attempt(self, member: Member, action: Callable[[], None]) -> bool:
        """Run the action; on any error record class, message and traceback, and let the member go."""
        try:
            action()
        except Exception as error:
            self.fail(member, error)
            return False
        return True

    def attempt_all(self, action: Callable[[Member], None]) -> None:
        for member in list(self.members):
            self.attempt(member, lambda member=member: action(member))  # type: ignore[misc]

    def fail(self, member: Member, error: Exception) -> None:
        trace = "".join(traceback.format_exception(error))
        member.log.info("failed: %s", error if isinstance(error, SweepError) else trace)
        member.set_status(
            state="diverged" if isinstance(error, Diverged) else "failed",
            failures=member.status.failures + 1,
            error={
                "class": type(error).__name__,
                "message": str(error),
                "traceback": trace,
            },
        )
        self.members.remove(member)
        self.failed.append(member)

    def fail_all(self, error: Exception) -> None:
        for member in list(self.members):
            self.fail(member, error)


@dataclass(frozen=True)
class Workplace:
    """What the members share: text, stream, and facts about both for the rows."""

    stream: ActivationStream
    harvested: HarvestedBlocks
    tokens: TokenFile
    model_hash: str
    device: str
    started: float
    gang_size: int


def run_gang(cell_ids: Sequence[str], workflow: Workflow, report: Report, stop: Callable[[], bool]) -> None:
    """Train, evaluate and commit the cells whose configs lie in `results_dir/cells/`, which share one stream.

    Errors end in the status of the cells they hit. `stop` is polled at every step and block.

    Raises:
        Interrupted: `stop` became true; the cells are saved.
    """
    results = ResultsFolder(Path(workflow.results_dir))
    with contextlib.ExitStack() as stack:
        gang = Gang(list(join(cell_ids, results, stack)))
        if not gang.members:
            return

        def tick(phase: str, done: int, total: int, unit: str) -> None:
            report(phase, done, total, unit)
            for member in gang.members:
                member.beat()
            if stop():
                raise Interrupted

        try:
            work(gang, results, workflow, tick)
        except Interrupted:  # raised between steps, so every state is whole
            for member in gang.members:
                if member.run:
                    member.run.checkpoint()
                member.set_status(state="interrupted", step=member.run.state.step if member.run else 0)
            raise
        except Exception as error:
            gang.fail_all(error)


def join(cell_ids: Sequence[str], results: ResultsFolder, stack: contextlib.ExitStack) -> Iterator[Member]:
    """The cells nobody else is at, each locked and with its log open until the stack closes."""
    for cell_id in cell_ids:
        folder = results.cell(cell_id)
        lock = try_lock(folder.lock)
        if lock is None:
            log.warning("cell %s is being run by another process; leaving it to that one", cell_id)
            continue
        stack.enter_context(lock)
        stack.enter_context(logging_to(folder.log, cell_id))
        status = read_status(folder)
        member = Member(cell_from_json(folder.config.read_text(encoding="utf-8")), folder, status)
        member.set_status(
            state="running",
            steps=member.cell.schedule.steps,
            attempts=status.attempts + 1,
            error={},
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        yield member


@contextlib.contextmanager
def logging_to(path: Path, cell_id: str) -> Iterator[None]:
    """Append what the package logs to a file, but for what speaks of another cell."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.addFilter(lambda record: getattr(record, "cell_id", cell_id) == cell_id)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("sweep")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def work(gang: Gang, results: ResultsFolder, workflow: Workflow, report: Report) -> None:
    """The life of a gang from prepared text to committed rows."""
    place = prepare([member.cell for member in gang.members], workflow, report)
    gang.attempt_all(lambda member: start(member, place, workflow))
    runs = {id(member.run): member for member in gang.members}
    train(
        [member.run for member in gang.members if member.run],
        place.stream,
        attempt=lambda run, action: gang.attempt(runs[id(run)], action),
        after_step=lambda step: report_training(gang, step, report),
    )
    calibrate(gang, place, report)
    evaluate_all(gang, place, report)
    gang.attempt_all(lambda member: commit(member, results, place, workflow))


def prepare(cells: Sequence[Cell], workflow: Workflow, report: Report) -> Workplace:
    """Model folder, token file, blocks and stream for the cells of one gang."""
    started = time.monotonic()
    config = cells[0].stream
    device = pick_device(workflow.device)
    cache = CacheFolder(Path(workflow.cache_dir))
    folder = ensure_model_folder(config.model, cache, report)
    tokens = prepare_tokens(config.data, config.model, load_tokenizer(folder), cache, report)
    model_hash = weights_hash(folder)

    def load() -> LanguageModel:
        report("load language model", 0, 0, "")
        model = load_language_model(config.model, folder, device, getattr(torch, config.data.activation_dtype))
        for site in sites:
            model.check(site, config.model.d_in, config.model.d_out)
        return model

    sites = list(dict.fromkeys(cell.site for cell in cells))
    harvested = HarvestedBlocks(tokens, load, report)
    n_bytes = cache_bytes(config.model, config.data, sum(row_counts(config.data).values()), len(sites))
    if cache_fits(cache, n_bytes, workflow.cache_gib):
        key = CachedBlocks.key(config.model, config.data, model_hash, tokens.hash, device)
        blocks: CachedBlocks | HarvestedBlocks = CachedBlocks(harvested, cache.activations(key), device)
    else:
        log.info("activations (%.1f GiB) are not cached; cache_gib=%g", n_bytes / 2**30, workflow.cache_gib)
        blocks = harvested
    stream = ActivationStream(config, blocks, sites)
    harvested.n_expected = blocks.n_missing(stream.reads(max(cell.schedule.steps for cell in cells)), sites)
    return Workplace(stream, harvested, tokens, model_hash, device, started, len(cells))


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SweepError(f"device={device}: torch sees no CUDA device; choose device=cpu or device=auto")
    return device


def start(member: Member, place: Workplace, workflow: Workflow) -> None:
    """Give the member its run: resumed, or fresh from the first window of its own site."""
    cell = member.cell
    state = checkpoint.load_latest(member.folder, cell, place.tokens.hash, place.device)
    if state is None:
        window = place.stream.first_window()[cell.site]
        state = initial_state(window.source.float(), window.target.float(), cell.capacity, cell.seed)
    member.log.info("start at step %d of %d", state.step, cell.schedule.steps)
    member.run = Run(
        cell,
        state,
        save=lambda state: checkpoint.save(state, member.folder, cell, place.tokens.hash),
        checkpoint_steps=workflow.checkpoint_steps,
    )


def report_training(gang: Gang, step: int, report: Report) -> None:
    steps = max((member.cell.schedule.steps for member in gang.members), default=step)
    report("train", step, steps, "steps")


def calibrate(gang: Gang, place: Workplace, report: Report) -> None:
    """Fit the members' thresholds on the calibration split."""
    split = list(place.stream.split("calibration"))

    def fit(member: Member) -> None:
        assert member.run is not None
        site = member.cell.site
        n_tokens = sum(len(block[site].source) for block in split)
        member.transcoder = finish(member.run.state, member.cell, (block[site] for block in split), n_tokens)
        report("fit thresholds", gang.members.index(member) + 1, len(gang.members), "cells")

    gang.attempt_all(fit)


def evaluate_all(gang: Gang, place: Workplace, report: Report) -> None:
    """Score the members on the held-out rows, all in one pass."""
    predictors = {m.cell.cell_id: (m.cell.site, m.transcoder) for m in gang.members if m.transcoder}
    if not predictors:
        return
    seq_tokens = place.stream.config.data.seq_len - 1
    n_blocks = place.stream.blocks.count("heldout")
    evaluations = evaluate(predictors, place.stream.split("heldout"), seq_tokens, report, n_blocks)
    for member in gang.members:
        member.evaluation = evaluations[member.cell.cell_id]


def commit(member: Member, results: ResultsFolder, place: Workplace, workflow: Workflow) -> None:
    """Write everything a finished cell leaves behind; the row in `runs/` goes last.

    Side effects: the cell's checkpoints go, unless `keep_checkpoints`.
    """
    cell, run, transcoder, evaluation = member.cell, member.run, member.transcoder, member.evaluation
    assert run is not None and transcoder is not None and evaluation is not None
    row = run_row(member, place)
    save_transcoder(member.folder.transcoder, transcoder, about(cell))
    write_json(member.folder.metrics, {"cell_id": cell.cell_id, **metrics(member)})
    write_atomic(member.folder.summary, summary(metrics(member)).encode())
    since_fired = run.state.batches_since_fired.tolist()
    write_run(
        results,
        cell.cell_id,
        {
            "runs": [row],
            "curves": [{"step": s, "metric": m, "value": v} for s, m, v in run.state.curve],
            "latents": [
                {**latent, "group": group, "batches_since_fired": since}
                for latent, group, since in zip(evaluation.latents, groups(cell), since_fired, strict=True)
            ],
            "sequences": evaluation.sequences,
        },
    )
    member.set_status(state="done", step=run.state.step)
    member.log.info("done: fvu %.4f at l0 %.2f", row["fvu"], row["l0"])
    if not workflow.keep_checkpoints:
        shutil.rmtree(member.folder.checkpoints, ignore_errors=True)


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
    }


def metrics(member: Member) -> dict[str, Any]:
    assert member.run is not None and member.evaluation is not None
    dead = member.run.state.batches_since_fired >= member.cell.revival.n_batches_to_dead
    return {**member.evaluation.metrics, "dead_fraction_training": int(dead.sum()) / dead.numel()}


def run_row(member: Member, place: Workplace) -> dict[str, Any]:
    """The cell's row in `runs`, by the schema of results.py."""
    cell, run = member.cell, member.run
    assert run is not None and member.transcoder is not None
    seconds = time.monotonic() - place.started
    threshold = member.transcoder.threshold
    git_sha, git_dirty = git_state()
    losses = [value for _, metric, value in run.state.curve if metric == "loss"]
    return {
        "kind": "cell",
        "status": "done",
        "schema_version": SCHEMA_VERSION,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in cell.flat().items()},
        **metrics(member),
        "final_loss": losses[-1],
        "threshold": None if threshold is None else float(threshold[0]),
        "source_scale": run.state.source_scale,
        "target_scale": run.state.target_scale,
        "tokens_hash": place.tokens.hash,
        "heldout_hash": place.tokens.heldout_hash,
        "model_hash": place.model_hash,
        "config": json.dumps(cell.flat(identity_only=True), sort_keys=True),
        "n_language_model_tokens": place.harvested.n_tokens_seen,
        "gang_size": place.gang_size,
        "attempts": member.status.attempts,
        "seconds": seconds,
        "training_tokens_per_second": cell.schedule.steps * cell.schedule.batch_size / seconds,
        "host": socket.gethostname(),
        "device": place.device,
        "n_threads": torch.get_num_threads(),
        "versions": json.dumps(package_versions(), sort_keys=True),
        "git_sha": git_sha,
        "git_dirty": git_dirty,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
