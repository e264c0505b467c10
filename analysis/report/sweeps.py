"""The commands that made the cells, from `sweeps/` of a results folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from sweep.paths import ResultsFolder

__all__ = ["Sweep", "sweeps_of"]

MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Sweep:
    """One command, when it was last given, and its cells."""

    command: str
    started_at: str
    git_sha: str
    cell_ids: frozenset[str]


def sweeps_of(results: Path) -> list[Sweep]:
    """All sweeps of a results folder, the newest first. Files that hold something else are passed over: they say
    nothing about a number."""
    found = []
    for path in sorted(ResultsFolder(results).sweeps.glob("*.json")):
        try:
            if path.stat().st_size > MAX_BYTES:
                continue
            value = json.loads(path.read_text(encoding="utf-8"))
            cell_ids = frozenset(str(cell_id) for cell_id in value["cell_ids"])
            command, started_at, git_sha = (str(value.get(name) or "") for name in ("command", "started_at", "git_sha"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        found.append(Sweep(command, started_at, git_sha, cell_ids))
    return sorted(found, key=lambda sweep: sweep.started_at, reverse=True)
