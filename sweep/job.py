"""Run a gang: the one place that wires objects.

1. Prepare: model folder, token file, blocks, stream.
2. Start each cell: from its last checkpoint, or from the first window of its site.
3. Train all in lockstep on one stream.
4. Finish (threshold, refit), evaluate all in one pass over the held-out rows, commit the rows.

Broad excepts stand here and in `gang.py`, and nowhere else.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sweep import checkpoint
from sweep.activations import ActivationStream
from sweep.beside import Beside, baselines_beside, commit_baseline
from sweep.blocks import CachedBlocks, from_model, with_cache
from sweep.cache import in_use
from sweep.causal import CausalRows
from sweep.commit import Workplace, commit, commit_diverged
from sweep.config import Model
from sweep.devices import pick_device
from sweep.errors import Interrupted, ModelError, Superseded
from sweep.evaluate import Evaluation, evaluate
from sweep.finish import finish
from sweep.gang import Gang, Member, join
from sweep.initialise import initial_state
from sweep.language_model import Activations, ensure_model_folder, load_tokenizer
from sweep.options import Workflow
from sweep.paths import CacheFolder, ResultsFolder
from sweep.progress import Progress, Report
from sweep.revisions import layers_in, weights_hash
from sweep.schedule import n_refit_batches
from sweep.state import TrainState
from sweep.tokens import prepare_tokens, tokens_folder
from sweep.train import Run, SaveClock, train

__all__ = ["run_gang"]

log = logging.getLogger(__name__)


def run_gang(
    cell_ids: Sequence[str],
    workflow: Workflow,
    report: Report,
    stop: Callable[[], bool],
    at: Callable[[str], None] = lambda _: None,
) -> None:
    """Train, evaluate and commit the cells whose configs lie in `results_dir/cells/`, which share one stream.

    Errors end in the status of the cells they hit. `stop` is polled at every step and block; `at` is told which cell's
    work follows.

    Raises:
        Interrupted: `stop` became true; the cells are saved.
    """
    results = ResultsFolder(Path(workflow.results_dir))
    with contextlib.ExitStack() as stack:
        joined = list(join(cell_ids, results, stack, finished_too=workflow.baselines != "none"))
        gang = Gang([each for each in joined if not each.finished], at, [each for each in joined if each.finished])
        if not joined:
            return

        progress = Progress()

        def tick(phase: str, done: int, total: int, unit: str) -> None:
            report(phase, done, total, unit)
            progress(phase, done, total, unit)
            gang.beat(progress.snapshot)
            if stop():
                raise Interrupted

        try:
            work(gang, results, workflow, tick, stack)
        except Interrupted:  # raised between steps, so every state is whole
            gang.guard_all(interrupt)
            raise
        except Exception as error:
            gang.fail_all(error)


def interrupt(member: Member) -> None:
    """Save the member where it stands."""
    if member.run:
        member.run.checkpoint()
    member.set_status(state="interrupted", **({} if member.run is None else member.run.standing()))


def work(gang: Gang, results: ResultsFolder, workflow: Workflow, report: Report, stack: contextlib.ExitStack) -> None:
    """The life of a gang from prepared text to committed rows."""
    place = prepare(gang, workflow, report, stack)
    if gang.members:
        train_and_calibrate(gang, place, results, workflow, report)
    if not gang.members and not gang.finished:
        return
    sites = [member.cell.site for member in (*gang.members, *gang.finished)]
    beside = baselines_beside(sites, workflow, place, results, report, stack)
    evaluations = evaluate_all(gang, beside, place, workflow, report)
    gang.guard_all(lambda member: commit(member, results, place, workflow))
    for one in beside:
        if one.row_id in evaluations:
            commit_baseline(one, evaluations[one.row_id], results, place)


def train_and_calibrate(
    gang: Gang, place: Workplace, results: ResultsFolder, workflow: Workflow, report: Report
) -> None:
    """Bring every member from where it stands to its transcoder, or to the row of a cell that diverged."""
    clock = SaveClock(workflow.checkpoint_minutes)
    gang.guard_all(lambda member: start(member, place, workflow, clock))
    runs = {id(member.run): member for member in gang.members}

    def guard(run: Run, action: Callable[[], None]) -> bool:
        member = runs[id(run)]
        if gang.guard(member, action):
            return True
        if member.status.state == "diverged":
            leave_row(member, results, place, workflow)
        return False

    train(
        [member.run for member in gang.members if member.run],
        place.stream,
        guard=guard,
        after_step=lambda step: report_training(gang, step, report),
        save_due=clock.due,
    )
    if gang.members:
        calibrate(gang, place, report)


def leave_row(member: Member, results: ResultsFolder, place: Workplace, workflow: Workflow) -> None:
    """Write the row of a member that left because it diverged; without one the cell would only be run again."""
    try:
        commit_diverged(member, results, place, workflow)
    except (OSError, Superseded) as error:
        log.warning("no row: %s", error, extra={"cell_id": member.cell.cell_id})


def prepare(gang: Gang, workflow: Workflow, report: Report, stack: contextlib.ExitStack) -> Workplace:
    """Model folder, token file, blocks and stream. A member whose hooks the model lacks leaves here.

    Until the stack closes nobody clears from the cache what is used.
    """
    started = time.monotonic()
    config = gang.stream
    device = pick_device(workflow.device)
    cache = CacheFolder(Path(workflow.cache_dir))
    made = cache.model(config.model.model, config.model.model_revision)
    stack.enter_context(in_use(made, tokens_folder(config.data, config.model, cache)))
    folder = ensure_model_folder(config.model, cache, report)
    if (found := layers_in(folder)) != config.model.n_layers:
        raise ModelError(f"n_layers={config.model.n_layers}: model={config.model.model} has {found} layers")
    tokenizer = load_tokenizer(folder)
    tokens = prepare_tokens(config.data, config.model, tokenizer, cache, report)
    model_hash = weights_hash(folder)
    harvested = from_model(config, folder, tokens, device, report)
    blocks = with_cache(harvested, config, gang.sites, model_hash, device, cache, workflow.cache_gib)
    if isinstance(blocks, CachedBlocks):
        stack.enter_context(in_use(blocks.folder))
    if gang.members:
        n_again = max(n_refit_batches(member.cell) for member in gang.members)
        demand = ActivationStream(config, blocks, gang.sites).demand(gang.steps, n_again)
        harvested.n_expected = blocks.n_missing(demand, gang.sites)
    if harvested.n_expected:
        model = harvested.language_model()
        gang.guard_all(lambda member: model.check(member.cell.site, config.model.d_in, config.model.d_out))
    stream = ActivationStream(config, blocks, gang.sites)
    return Workplace(stream, harvested, tokens, tokenizer, model_hash, device, started, len(gang.members))


def start(member: Member, place: Workplace, workflow: Workflow, clock: SaveClock) -> None:
    """Give the member its run: resumed, or fresh from the first window of its own site."""
    cell = member.cell
    belongs_to = {"tokens_hash": place.tokens.hash, "model_hash": place.model_hash}

    def begin() -> TrainState:
        state = checkpoint.load_latest(member.folder, cell, belongs_to, place.device)
        if state is None:
            window = place.stream.first_window()[cell.site]
            check_widths(window, cell.model)
            pair = window.source.float(), window.target.float()
            state = initial_state(*pair, cell.capacity, cell.seed, schedule=cell.schedule)
        else:
            checkpoint.forget_after(state.step, member.folder)
        return state

    def back(step: int) -> TrainState:
        member.attempt.check()
        checkpoint.forget_after(step, member.folder)
        return begin()

    def save(state: TrainState) -> None:
        member.attempt.check()
        with clock.saving():
            checkpoint.save(state, member.folder, cell, belongs_to)

    member.run = Run(cell, begin(), save if workflow.saves else None, back, workflow.checkpoint_steps)
    member.log.info("start at step %d of %d", member.run.state.step, cell.schedule.steps)


def check_widths(window: Activations, model: Model) -> None:
    """Hold the declared widths against what is read; activations may come from a cache, without the model.

    Raises:
        ModelError: they differ.
    """
    for key, declared, tensor in (("d_in", model.d_in, window.source), ("d_out", model.d_out, window.target)):
        if tensor.shape[1] != declared:
            raise ModelError(f"{key}={declared}: {model.model} has {tensor.shape[1]} there")


def report_training(gang: Gang, step: int, report: Report) -> None:
    report("train", step, max(gang.steps, step), "steps")


def calibrate(gang: Gang, place: Workplace, report: Report) -> None:
    """Fit the members' thresholds on the calibration split, and refit them on the first batches."""
    split = list(place.stream.split("calibration"))
    cells = [member.cell for member in gang.members]
    batches = [batch for _, batch in place.stream.batches(0, max(map(n_refit_batches, cells)))]
    n_iterations = [cell.schedule.refit_iterations for cell in cells]

    def fit(member: Member) -> None:
        assert member.run is not None
        cell, at = member.cell, cells.index(member.cell)
        calibration, sample = (
            [batch[cell.site] for batch in part] for part in (split, batches[: n_refit_batches(cell)])
        )

        def tick(done: int) -> None:
            report("fit decoders", sum(n_iterations[:at]) + done, sum(n_iterations), "iterations")

        member.transcoder = finish(member.run.state, cell, calibration, sample, tick)
        report("fit thresholds", at + 1, len(cells), "cells")

    gang.guard_all(fit)


def evaluate_all(
    gang: Gang, beside: Sequence[Beside], place: Workplace, workflow: Workflow, report: Report
) -> dict[str, Evaluation]:
    """Score the members on the held-out rows, and the baselines beside them, all in one pass."""
    members = {member.cell.cell_id: member for member in gang.members}
    names = {one.row_id: one.baseline.name for one in beside}
    predictors = {m.cell.cell_id: (m.cell.site, m.transcoder) for m in gang.members if m.transcoder}
    predictors |= {one.row_id: (one.baseline.site, one.baseline.transcoder) for one in beside}
    if not predictors:
        return {}
    heldout = place.stream.split("heldout", also=[one.baseline.site for one in beside])
    seq_tokens = place.stream.config.data.seq_len - 1
    n_blocks = place.stream.blocks.count("heldout")

    def guard(name: str, action: Callable[[], None]) -> bool:
        if name in members:
            return gang.guard(members[name], action)
        try:
            action()
        except Exception as error:
            log.warning("baseline %s cannot be scored: %s", names[name], error)
            return False
        return True

    causal = CausalRows.first(workflow.n_causal_rows, place.harvested)
    evaluations = evaluate(predictors, heldout, seq_tokens, report, n_blocks, workflow.n_contexts, guard, causal)
    for member in gang.members:
        member.evaluation = evaluations[member.cell.cell_id]
    return evaluations
