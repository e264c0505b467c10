"""Baselines beside the cells of a gang: found, scored in the same held-out pass, and committed as rows of their own.

A baseline's row is named by what its numbers depend on: its file, the held-out rows, the language model. So it is
scored once, whatever number of sweeps ask for it. One that cannot be read costs no cell anything.
"""

import hashlib
import json
import logging
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep.baselines.family import choose, scan
from sweep.baselines.gemma_scope import Baseline, load_baseline, suspicions
from sweep.commit import Workplace, circumstances
from sweep.config import SCHEMA_VERSION, Site, StreamConfig
from sweep.errors import SweepError
from sweep.evaluate import Evaluation
from sweep.options import Workflow
from sweep.paths import ResultsFolder
from sweep.progress import Report
from sweep.results import write_run

__all__ = ["Beside", "baseline_id", "baselines_beside", "commit_baseline"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beside:
    """A baseline that has no row yet, and the id its row will have."""

    row_id: str
    baseline: Baseline


def baseline_id(baseline: Baseline, config: StreamConfig, heldout_hash: str, model_hash: str) -> str:
    """First 10 hex digits of the sha256 of everything the numbers of a baseline depend on."""
    identity = {
        "schema_version": SCHEMA_VERSION,
        "file_hash": baseline.file_hash,
        "heldout_hash": heldout_hash,
        "model_hash": model_hash,
        "hook_names": baseline.site.hook_names,
        "model_dtype": config.model.model_dtype,
        "activation_dtype": config.data.activation_dtype,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def baselines_beside(
    sites: Collection[Site], workflow: Workflow, place: Workplace, results: ResultsFolder, report: Report
) -> list[Beside]:
    """The baselines of the layers of these sites that have no row yet, loaded.

    Side effects: loads the language model where a baseline reads a hook that no cell does.
    """
    if workflow.baselines == "none" or workflow.baselines_dir is None:
        return []
    config, root = place.stream.config, Path(workflow.baselines_dir)
    found: dict[str, Beside] = {}
    for layer in sorted({site.layer for site in sites if site.hook_out == "mlp_out"}):
        try:
            entries = choose(scan(root), layer, workflow.baselines_width, workflow.baselines_l0, str(root))
            for entry in entries:
                report(f"load {entry.name}", 0, 0, "")
                baseline = load_baseline(entry, layer, config.model.d_in, config.model.d_out, place.device)
                row_id = baseline_id(baseline, config, place.tokens.heldout_hash, place.model_hash)
                if not results.row("runs", row_id).exists():
                    found.setdefault(row_id, Beside(row_id, baseline))
            for site in {one.baseline.site for one in found.values()} - set(sites):
                place.harvested.language_model().check(site, config.model.d_in, config.model.d_out)
        except SweepError as error:
            log.warning("no baselines at layer %d: %s", layer, error)
            found = {row_id: one for row_id, one in found.items() if one.baseline.site.layer != layer}
    return list(found.values())


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
