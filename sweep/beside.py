"""Baselines beside the cells of a gang: loaded, scored in the same held-out pass, and committed as rows of their own.

One that cannot be read costs no cell anything. One that another job is just scoring is left to that job.
"""

import contextlib
import logging
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep.baselines.gemma_scope import Baseline, load_baseline, suspicions
from sweep.baselines.wanted import is_scored, layers_beside, wanted_rows
from sweep.commit import Workplace, circumstances
from sweep.config import SCHEMA_VERSION, Site, StreamConfig
from sweep.errors import SweepError
from sweep.evaluate import Evaluation
from sweep.locks import try_lock
from sweep.options import Workflow
from sweep.paths import ResultsFolder
from sweep.progress import Report
from sweep.results import write_run

__all__ = ["Beside", "baselines_beside", "commit_baseline"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beside:
    """A baseline to be scored, and the id of its row."""

    row_id: str
    baseline: Baseline


def baselines_beside(
    sites: Collection[Site],
    workflow: Workflow,
    place: Workplace,
    results: ResultsFolder,
    report: Report,
    stack: contextlib.ExitStack,
) -> list[Beside]:
    """The baselines of the layers of these sites that nobody has scored or is scoring, loaded.

    Side effects: they are this job's until the stack closes; loads the language model where a baseline reads a hook
    that no cell does.
    """
    config, found = place.stream.config, list[Beside]()
    for layer in layers_beside(sites):
        try:
            asked = wanted_rows(layer, workflow, config, place.tokens.heldout_hash, place.model_hash)
        except SweepError as error:
            log.warning("no baselines at layer %d: %s", layer, error)
            continue
        for row_id, each in asked.items():
            if is_scored(row_id, workflow, config, results):
                continue
            if not claim(results.scoring(row_id), stack):
                log.info("baseline %s: another job is scoring it", each.entry.name)
                continue
            if is_scored(row_id, workflow, config, results):  # by a job that ended just now
                continue
            report(f"load {each.entry.name}", 0, 0, "")
            try:
                if each.site not in place.stream.sites:
                    place.harvested.language_model().check(each.site, config.model.d_in, config.model.d_out)
                baseline = load_baseline(each.entry, layer, config.model.d_in, config.model.d_out, place.device)
            except SweepError as error:
                log.warning("no baseline %s: %s", each.entry.name, error)
            else:
                found.append(Beside(row_id, baseline))
    return found


def claim(path: Path, stack: contextlib.ExitStack) -> bool:
    """Whether the lock could be taken; it is held until the stack closes, and its file goes."""
    if path.is_symlink():  # in a folder from elsewhere it may lead anywhere
        path.unlink()
    if (lock := try_lock(path)) is None:
        return False
    stack.enter_context(lock)
    stack.callback(path.unlink, missing_ok=True)
    return True


def commit_baseline(one: Beside, evaluation: Evaluation, results: ResultsFolder, place: Workplace) -> None:
    """Write the rows of a baseline; what looks wrong about it is logged and stands in its row."""
    remarks = suspicions(one.baseline, float(evaluation.metrics["l0"] or 0), evaluation.source_norm)
    for remark in remarks:
        log.warning("baseline %s: %s", one.baseline.name, remark)
    row = {**_row(one.baseline, place), **evaluation.metrics, "remarks": "; ".join(remarks) or None}
    tables = {"curves": [], "latents": evaluation.latents, "sequences": evaluation.sequences, "runs": [row]}
    try:
        write_run(results, one.row_id, tables)
    except OSError as error:
        log.warning("baseline %s: its rows cannot be written (%s)", one.baseline.name, error)
        return
    log.info("baseline %s: fvu %s at l0 %s", one.baseline.name, row["fvu"], row["l0"])


def _row(baseline: Baseline, place: Workplace) -> dict[str, Any]:
    config = place.stream.config
    return {
        "kind": "baseline",
        "status": "done",
        "schema_version": SCHEMA_VERSION,
        **dict(_options(config, baseline.site)),
        "dict_size": baseline.transcoder.W_enc.shape[1],
        "activation": baseline.transcoder.activation,
        "baseline": baseline.name,
        "baseline_hash": baseline.file_hash,
        "baseline_l0": baseline.l0,
        "baseline_model": baseline.trained_on,
        **circumstances(place),
        "host": socket.gethostname(),
    }


def _options(config: StreamConfig, site: Site) -> Iterator[tuple[str, Any]]:
    """What a baseline shares with the cells beside it: language model, data and its own site."""
    for part in (config.model, config.data, site):
        yield from vars(part).items()
