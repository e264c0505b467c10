"""What a broken sweep may leave behind, held against one that was left alone."""

import json
from pathlib import Path

from gangs import same_bytes

from sweep.config import Cell, cell_from_json
from sweep.paths import ResultsFolder
from sweep.results import seal_holds
from sweep.revisions import sha256_of_file
from sweep.transcoder import load_transcoder


def cells_of(results: ResultsFolder) -> list[Cell]:
    return [cell_from_json(path.read_text()) for path in sorted(results.root.glob("cells/*/config.json"))]


def check_visible(found: Path, reference: ResultsFolder) -> int:
    """Assert that all there is under its final name is whole, and that finished cells are the reference's. How many."""
    results = ResultsFolder(found)
    for table in ("curves", "latents", "sequences", "runs"):
        for path in results.table(table).glob("[!.]*"):
            assert seal_holds(path.read_bytes()) is True, path
    for path in found.glob("cells/*/transcoder/config.json"):
        load_transcoder(path.parent)
    done = [cell for cell in cells_of(reference) if results.row("runs", cell.cell_id).exists()]
    for cell in done:
        same_bytes(reference, results, cell)
    return len(done)


def check_checkpoints(found: Path) -> None:
    """Assert that every checkpoint under its final name fits its manifest."""
    for path in found.glob("cells/*/checkpoints/step_*/"):
        manifest = json.loads((path / "manifest.json").read_text())
        assert {name: sha256_of_file(path / name) for name in manifest["sha256"]} == manifest["sha256"], path
