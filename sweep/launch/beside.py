"""The baselines a sweep asks for, found and checked before anything runs; what is missing is downloaded here."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sweep.baselines.family import choose, scan
from sweep.baselines.header import check, check_shapes
from sweep.baselines.hub import REPOSITORIES, download
from sweep.config import Cell
from sweep.errors import BaselineError, ConfigError
from sweep.launch.cost import Beside
from sweep.options import Workflow
from sweep.progress import Report

__all__ = ["baselines_of", "with_baselines"]


def with_baselines(workflow: Workflow, cells: Sequence[Cell], report: Report) -> Workflow:
    """The workflow with `baselines_dir` set to a local folder that has what the cells' layers need.

    Raises:
        ConfigError: baselines are asked for where there can be none.
        BaselineError: they are not there, not whole, or of another model.
    """
    if workflow.baselines == "none":
        return workflow
    beside = [cell for cell in cells if cell.site.hook_out == "mlp_out"]
    if not beside:
        raise ConfigError(f"baselines={workflow.baselines} predict mlp_out; set hook_out=mlp_out or baselines=none")
    models = {cell.model.model: cell.model for cell in beside}
    if len(models) > 1:
        raise ConfigError(f"baselines={workflow.baselines} stand beside one model, not {', '.join(models)}")
    ((name, model),) = models.items()
    layers = sorted({cell.site.layer for cell in beside})
    if workflow.baselines_dir is None:
        if name not in REPOSITORIES:
            raise ConfigError(
                f"baselines={workflow.baselines}: there are none for model={name}; choose one of "
                f"{', '.join(REPOSITORIES)}, or set baselines_dir= to a folder in Google's layout"
            )
        if workflow.dry_run:
            return workflow
        choice = (workflow.baselines_width, workflow.baselines_l0, workflow.baselines_revision)
        workflow = replace(workflow, baselines_dir=str(download(REPOSITORIES[name], layers, *choice, report)))
    assert workflow.baselines_dir is not None
    root = Path(workflow.baselines_dir).expanduser().resolve()
    try:
        entries = scan(root)
        for layer in layers:
            for entry in choose(entries, layer, workflow.baselines_width, workflow.baselines_l0, str(root)):
                check(entry, layer, model.d_in, model.d_out)
    except BaselineError as error:
        raise BaselineError(f"baselines_dir={workflow.baselines_dir}: {error}") from error
    return replace(workflow, baselines_dir=str(root))


def baselines_of(workflow: Workflow, cells: Sequence[Cell]) -> list[Beside]:
    """What a checked workflow scores beside the cells; nothing where the baselines are not on this machine yet.

    Raises:
        BaselineError: they changed since they were checked.
    """
    if workflow.baselines == "none" or workflow.baselines_dir is None:
        return []
    root, found = Path(workflow.baselines_dir), []
    models = {cell.site.layer: cell.model for cell in cells if cell.site.hook_out == "mlp_out"}
    entries = scan(root)
    for layer, model in sorted(models.items()):
        for entry in choose(entries, layer, workflow.baselines_width, workflow.baselines_l0, str(root)):
            (width,) = check_shapes(entry, model.d_in, model.d_out)["b_enc"]
            found.append(Beside(entry.site(layer), width))
    return found
