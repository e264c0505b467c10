"""Checkpoints: a TrainState as a folder that is whole or not there.

    step_00005000/  state.safetensors   every tensor
                    state.json          scalars, the curve, and what the state belongs to
                    manifest.json       sha256 and size of both; without a fitting one the folder does not count

No pickle is written or read.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sweep.config import Cell
from sweep.errors import CheckpointError
from sweep.paths import CellFolder, atomic_directory, remove_directory, write_json
from sweep.revisions import read_json, sha256_of_file
from sweep.schedule import stage_before
from sweep.state import TrainState
from sweep.transcoder import Parameters

__all__ = ["forget_after", "load_latest", "save"]

KEPT = 2
FORMAT_VERSION = 2
MAX_JSON_BYTES = 64 << 20
FILES = ("state.safetensors", "state.json")

log = logging.getLogger(__name__)


def save(state: TrainState, folder: CellFolder, cell: Cell, belongs_to: Mapping[str, str]) -> None:
    """Write the state's checkpoint and remove all but the last two, and the one a run would go back to if its loss
    stopped being a number. `belongs_to` holds hashes of its inputs.

    Side effects: `checkpoints/step_<n>` appears by one rename; older ones go after it is there.
    """
    path = folder.checkpoint(state.step)
    with atomic_directory(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in state.tensors().items()}, partial / FILES[0])
        about = {**identity(cell, belongs_to), "scalars": state.scalars()}
        # before the folder gets its name all of it is synced; indenting a curve takes three times as long
        write_json(partial / FILES[1], about, durable=False, indent=None)
        sizes = {name: (partial / name).stat().st_size for name in FILES}
        hashes = {name: sha256_of_file(partial / name) for name in FILES}
        write_json(partial / "manifest.json", {"sizes": sizes, "sha256": hashes}, durable=False)
    steps = folder.checkpoint_steps()
    resort = max((step for step in steps if step <= stage_before(state.step, cell.schedule)), default=None)
    for step in steps[:-KEPT]:
        if step != resort:
            shutil.rmtree(folder.checkpoint(step), ignore_errors=True)  # a start that took over may be at it too


def forget_after(step: int, folder: CellFolder) -> None:
    """Remove the checkpoints after a step, the newest first, each in one rename: a run that goes back made them, or
    they are damaged and would count among the last two."""
    for later in reversed([found for found in folder.checkpoint_steps() if found > step]):
        remove_directory(folder.checkpoint(later))


def identity(cell: Cell, belongs_to: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint must agree in to be this run's."""
    return {"format_version": FORMAT_VERSION, "cell_id": cell.cell_id, **belongs_to}


def load_latest(folder: CellFolder, cell: Cell, belongs_to: Mapping[str, str], device: str) -> TrainState | None:
    """The newest whole checkpoint of this cell, or None when there is none at all.

    A damaged one is warned of by name and the one before it is used.

    Raises:
        CheckpointError: there are checkpoints but none is whole, or the newest whole one belongs to another cell,
            text or language model.
    """
    steps = folder.checkpoint_steps()
    damaged = []
    for step in reversed(steps):
        path = folder.checkpoint(step)
        try:
            return _load(path, cell, belongs_to, device)
        except _DamagedError as error:
            damaged.append(f"{path}: {error}")
            log.warning(
                "checkpoint %s is damaged (%s); going on from the one before",
                path,
                error,
                extra={"cell_id": cell.cell_id},
            )
    if damaged:
        raise CheckpointError(
            f"no checkpoint of cell {cell.cell_id} is whole; to start the cell again delete {folder.checkpoints}\n"
            + "\n".join(damaged)
        )
    return None


class _DamagedError(Exception):
    """This one checkpoint cannot be used; an older one may be."""


def _load(path: Path, cell: Cell, belongs_to: Mapping[str, str], device: str) -> TrainState:
    _verify(path)
    try:
        about = read_json(path / FILES[1], MAX_JSON_BYTES)
        tensors = load_file(path / FILES[0], device=device)
        found = {name: about[name] for name in identity(cell, belongs_to)}
        state = TrainState.restore(tensors, about["scalars"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise _DamagedError(f"not a checkpoint ({error})") from error
    for name, wanted in identity(cell, belongs_to).items():
        if found[name] != wanted:
            raise CheckpointError(
                f"{path} belongs to another run: its {name} is {found[name]}, this one's is {wanted}; "
                f"delete {path.parent} to start the cell again, or choose another results_dir"
            )
    _check_shapes(path, state, cell)
    return state


def _verify(path: Path) -> None:
    """Sizes first, hashes second: nothing is parsed before it is known to be what was written."""
    try:
        manifest: dict[str, Any] = read_json(path / "manifest.json", MAX_JSON_BYTES)
        for name in FILES:
            if (path / name).stat().st_size != manifest["sizes"][name]:
                raise _DamagedError(f"{name} has not the size its manifest tells")
            if sha256_of_file(path / name) != manifest["sha256"][name]:
                raise _DamagedError(f"{name} has not the sha256 its manifest tells")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"unreadable ({error})") from error


def _check_shapes(path: Path, state: TrainState, cell: Cell) -> None:
    model = cell.model
    shapes = Parameters.shapes(model.d_in, cell.capacity.dict_size, model.d_out, cell.capacity.skip)
    fitted: dict[str, tuple[int, ...]] = {}
    if cell.schedule.rate_by_spread:
        fitted["write_rates"] = (model.d_out,)
    if cell.schedule.centre_source:
        fitted["source_mean"] = (model.d_in,)
    weights = [dict(params.items()) for params in (state.params, state.first_moments, state.second_moments)]
    for tensors, wanted in (*((part, shapes) for part in weights), (state.fitted, fitted)):
        if missing := wanted.keys() ^ tensors.keys():
            raise CheckpointError(f"{path}: {', '.join(sorted(missing))} is missing, or not of this cell")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != wanted[name] or tensor.dtype != torch.float32:
                raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, not {wanted[name]}")
