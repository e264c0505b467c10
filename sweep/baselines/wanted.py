"""The baselines that belong beside the cells of a sweep, and which of them have their row already.

A baseline's row is named by what its numbers depend on: its file, the held-out rows, the language model. So it is
scored once, whatever number of sweeps ask for it, and again only where the language model shall run on more rows.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sweep.baselines.family import Entry, choose, scan
from sweep.config import SCHEMA_VERSION, Cell, Site, StreamConfig
from sweep.options import Workflow
from sweep.paths import ResultsFolder
from sweep.results import has_row, read_row
from sweep.revisions import sha256_of_file
from sweep.tokens import row_counts

__all__ = ["Wanted", "is_scored", "layers_beside", "rows_beside", "wanted", "wanted_rows"]


@dataclass(frozen=True)
class Wanted:
    """A baseline that a workflow asks for at a layer."""

    entry: Entry
    layer: int

    @property
    def site(self) -> Site:
        return self.entry.site(self.layer)

    def row_id(self, config: StreamConfig, heldout_hash: str, model_hash: str) -> str:
        """First 10 hex digits of the sha256 of everything its numbers depend on. Reads the whole file."""
        identity = {
            "schema_version": SCHEMA_VERSION,
            "file_hash": sha256_of_file(self.entry.params),
            "heldout_hash": heldout_hash,
            "model_hash": model_hash,
            "hook_names": self.site.hook_names,
            "model_dtype": config.model.model_dtype,
            "activation_dtype": config.data.activation_dtype,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def layers_beside(sites: Collection[Site]) -> list[int]:
    """The layers at which baselines predict what one of the sites does."""
    return sorted({site.layer for site in sites if site.hook_out == "mlp_out"})


def wanted(workflow: Workflow, layer: int) -> list[Wanted]:
    """The baselines of a layer; none where they are not asked for, or not on this machine yet.

    Raises:
        BaselineError: they are not in the folder.
    """
    if workflow.baselines == "none" or workflow.baselines_dir is None:
        return []
    entries = scan(Path(workflow.baselines_dir))
    chosen = choose(entries, layer, workflow.baselines_width, workflow.baselines_l0, workflow.baselines_dir)
    return [Wanted(entry, layer) for entry in chosen]


def is_scored(row_id: str, workflow: Workflow, config: StreamConfig, results: ResultsFolder) -> bool:
    """Whether a baseline has its row, with cross-entropies on as many rows as the workflow asks for."""
    if not has_row(results, row_id):
        return False
    n_rows = min(workflow.n_causal_rows, row_counts(config.data)["heldout"])
    n_causal_tokens = n_rows * max(config.data.seq_len - 2, 0)
    return not n_causal_tokens or (read_row(results.row("runs", row_id))["n_causal_tokens"] or 0) >= n_causal_tokens


def wanted_rows(
    layer: int, workflow: Workflow, config: StreamConfig, heldout_hash: str, model_hash: str
) -> dict[str, Wanted]:
    """The baselines of a layer by the ids of their rows.

    Raises:
        BaselineError: they are not in the folder.
    """
    return {each.row_id(config, heldout_hash, model_hash): each for each in wanted(workflow, layer)}


def rows_beside(cell: Cell, workflow: Workflow, results: ResultsFolder) -> dict[str, Wanted]:
    """Those that belong beside a finished cell.

    Raises:
        BaselineError: they are not in the folder.
    """
    if not layers_beside([cell.site]):
        return {}
    row = read_row(results.row("runs", cell.cell_id))
    return wanted_rows(cell.site.layer, workflow, cell.stream, row["heldout_hash"], row["model_hash"])
