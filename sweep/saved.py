"""A transcoder on disk, and what is known of it before anything is loaded: where it reads, of which model, which text.

results/cells/<cell_id>/              the folder of a finished cell
results/cells/<cell_id>/transcoder/   the transcoder in it, also when it was copied elsewhere
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep.config import Cell, cell_from_json
from sweep.errors import CheckpointError, ConfigError
from sweep.paths import CellFolder, ResultsFolder, check_writable
from sweep.revisions import read_object
from sweep.status import read_status

if TYPE_CHECKING:
    from sweep.transcoder import Transcoder

__all__ = ["Saved", "check_layer", "check_output", "open_saved", "read_cell"]

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Saved:
    """A transcoder that can be loaded from `folder`; `results` is the results folder it lies in, if it does."""

    folder: Path
    cell: Cell
    results: ResultsFolder | None

    @property
    def name(self) -> str:
        return self.cell.cell_id

    @property
    def n_training_tokens(self) -> int | None:
        """What it was trained on, where that is known."""
        return self.cell.schedule.steps * self.cell.schedule.batch_size

    @property
    def default_cache(self) -> Path:
        """The cache in the results folder; of a transcoder elsewhere, that of the default results folder."""
        return (Path("results") if self.results is None else self.results.root) / "cache"

    def facts(self) -> dict[str, Any]:
        """What it is, for a report."""
        cell = self.cell
        return {
            "name": self.name,
            "checkpoint": str(self.folder),
            "model": cell.model.model,
            "model_revision": cell.model.model_revision,
            "layer": cell.site.layer,
            "hook_in": cell.site.hook_in,
            "hook_out": cell.site.hook_out,
            "dataset": cell.data.dataset,
            "dataset_revision": cell.data.dataset_revision,
            "seq_len": cell.data.seq_len,
        }

    def load(self, device: str) -> "Transcoder":
        """Read the transcoder and hold its widths and numbers against what its cell says.

        Raises:
            CheckpointError: it is damaged, or not the one its config describes.
        """
        transcoder = self.read(device)
        expected = (self.cell.model.d_in, self.cell.model.d_out)
        if (found := (transcoder.W_enc.shape[0], transcoder.W_dec.shape[1])) != expected:
            raise CheckpointError(
                f"{self.folder} reads and predicts {found} numbers per token; {self.cell.model.model} has {expected}"
            )
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            if not bool(getattr(transcoder, name).isfinite().all()):
                raise CheckpointError(f"{self.folder}: {name} holds numbers that are not finite")
        return transcoder

    def read(self, device: str) -> "Transcoder":
        from sweep.transcoder import load_transcoder

        return load_transcoder(self.folder, device)


def open_saved(path: Path) -> Saved:
    """What a folder holds, from its JSON files alone.

    Raises:
        CheckpointError: it does not exist, holds no finished transcoder, or its files contradict each other.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} {'is a file' if path.exists() else 'does not exist'}; {WHAT_TO_NAME}")
    folder = CellFolder(path.resolve())
    if (folder.transcoder / "config.json").exists():
        return in_cell(folder)
    config = config_in(folder.root)
    if "format" in config:
        cell = CellFolder(folder.root.parent)
        if folder.root.name == folder.transcoder.name and cell.config.exists():
            return in_cell(cell)
        return alone(folder.root, config)
    if folder.status.exists() or folder.checkpoints.exists():
        raise CheckpointError(not_finished(folder))
    raise CheckpointError(f"{path} holds no transcoder; {WHAT_TO_NAME}{cells_in(path)}")


WHAT_TO_NAME = "name the folder of a finished cell, results/cells/<cell_id>"


def in_cell(folder: CellFolder) -> Saved:
    cell = parse(folder.config, config_in(folder.root))
    belongs_to = config_in(folder.transcoder).get("cell_id")
    if belongs_to != cell.cell_id:
        raise CheckpointError(f"{folder.transcoder} is of cell {belongs_to}, but {folder.config} is {cell.cell_id}'s")
    results = ResultsFolder(folder.root.parents[1])
    return Saved(folder.transcoder, cell, results if results.about.exists() else None)


def alone(folder: Path, config: dict[str, Any]) -> Saved:
    """A transcoder folder outside its cell: the cell is told in its own config."""
    if "cell" not in config:
        raise CheckpointError(f"{folder} does not say on what it was trained; keep it in its cell's folder")
    return Saved(folder, parse(folder / "config.json", config["cell"]), None)


def check_layer(saved: Saved, layer: int | None) -> None:
    """Refuse a layer that is not the transcoder's own.

    Raises:
        ConfigError: it says what the transcoder was trained on.
    """
    cell = saved.cell
    if layer is not None and layer != cell.site.layer:
        raise ConfigError(
            f"--layer {layer}: {saved.name} was trained on layer {cell.site.layer} of {cell.model.model} "
            f"({cell.site.hook_in} -> {cell.site.hook_out}) and knows no other; leave --layer out"
        )


def check_output(folder: Path) -> None:
    """Refuse a folder that cannot be written to or belongs to a cell, before the work. Makes nothing.

    Raises:
        ConfigError: it is a file, read-only, no name a file system takes, or would lose a cell's own metrics.
    """
    try:
        if any((folder / name).exists() for name in ("status.json", "transcoder.safetensors")):
            raise ConfigError(
                f"--output_dir {folder} belongs to a cell, whose own metrics.json would go; choose another"
            )
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        check_writable(there)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be written to ({error}); choose another") from error


def read_cell(folder: CellFolder) -> Cell:
    """The cell whose folder in a results folder it is.

    Raises:
        CheckpointError: its config cannot be read, holds what no cell of this version may, or is of another cell.
    """
    cell = parse(folder.config, config_in(folder.root))
    if cell.cell_id != folder.root.name:
        raise CheckpointError(f"{folder.config} is of cell {cell.cell_id}, not of the one its folder is named after")
    return cell


def parse(path: Path, value: Any) -> Cell:
    """A cell from parsed JSON, whose values are checked again: the file may come from anywhere."""
    try:
        cell = cell_from_json(json.dumps(value))
        problems = list(cell.problems())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the config of a cell of this version ({error!r})") from error
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    return cell


def config_in(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; empty without one."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        return read_object(path, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def not_finished(folder: CellFolder) -> str:
    status = read_status(folder)
    return (
        f"{folder.root} has no transcoder yet: the cell is {status.state}, at step {status.step} of {status.steps}; "
        "give the command of its sweep again to finish it"
    )


def cells_in(path: Path) -> str:
    """A hint for somebody who named a results folder."""
    done = sorted(folder.parent.name for folder in path.glob("cells/*/transcoder"))
    return f"; in this one: {', '.join(done[:5])}{', ...' if len(done) > 5 else ''}" if done else ""
