"""Small valid values for tests, and made-up results of finished cells: `from make import make_cell, write_cell`."""

from pathlib import Path
from typing import Any

from sweep.config import Cell, Model, Site
from sweep.options import cell_from_options
from sweep.paths import ResultsFolder
from sweep.results import write_run

__all__ = ["NO_BASELINES", "TINY", "make_cell", "make_options", "make_site", "row_file", "write_cell"]

TINY = Model(
    model="tiny",
    model_format="tiny",
    model_repo="",
    model_revision="1",
    model_dtype="float32",
    model_path=None,
    n_layers=3,
    d_in=32,
    d_out=32,
    n_body_params=28_064,
)

NO_BASELINES: dict[str, Any] = {
    "baselines": "none",
    "baselines_dir": None,
    "baselines_l0": "all",
    "baselines_width": "16k",
    "baselines_revision": None,
}

OPTIONS: dict[str, Any] = {
    # capacity
    "dict_size": 64,
    "top_k": 4,
    "activation": "batch_top_k",
    "groups": None,
    "group_fractions": [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1],
    "skip": False,
    "prefix_weight": 1.0,
    # schedule
    "lr": 3e-3,
    "steps": 30,
    "batch_size": 64,
    "warmup_steps": None,
    "warmup_fraction": 0.1,
    "decay": "linear",
    "min_lr": None,
    "min_lr_fraction": 0.01,
    "betas": [0.9, 0.999],
    "step_dtype": "float32",
    "rate_by_spread": False,
    "centre_source": False,
    "refit_iterations": 0,
    "epochs": 1.0,
    # revival
    "aux_penalty": 1 / 8,
    "top_k_aux": 16,
    "n_batches_to_dead": 5,
    # model and site
    **{name: getattr(TINY, name) for name in TINY.__dataclass_fields__},
    "layer": 1,
    "hook_in": "norm_out",
    "hook_out": "mlp_out",
    # data
    "dataset": "docstrings",
    "dataset_format": "docstrings",
    "dataset_revision": None,
    "dataset_path": None,
    "dataset_subset": None,
    "dataset_split": "train",
    "text_column": "text",
    "seq_len": 32,
    "n_tokens": 2048,
    "n_calibration_tokens": 512,
    "n_heldout_tokens": 512,
    "data_seed": 0,
    "activation_dtype": "float32",
    "seed": 0,
}


def make_options(**overrides: Any) -> dict[str, Any]:
    """Flat options of a small cell on the tiny model, as Hydra would hand them over."""
    if unknown := overrides.keys() - OPTIONS.keys():
        raise KeyError(f"no such option: {', '.join(sorted(unknown))}")
    return OPTIONS | overrides


def make_cell(**overrides: Any) -> Cell:
    """A small cell on the tiny model, resolved and checked as a user's would be."""
    return cell_from_options(make_options(**overrides))


def make_site(layer: int = 1, hook_in: str = "norm_out", hook_out: str = "mlp_out") -> Site:
    return Site(layer=layer, hook_in=hook_in, hook_out=hook_out)


def write_cell(
    root: Path,
    cell_id: str,
    *,
    options: dict[str, Any] | None = None,
    sequences: list[dict[str, Any]] | None = None,
    **row: Any,
) -> None:
    """Commit a made-up finished cell: `options` as on the command line, `row` whatever else its row should say."""
    flat = make_cell(**(options or {})).flat()
    results = ResultsFolder(root)
    results.create()
    run = {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()},
        "kind": "cell",
        "status": "done",
        "schema_version": 1,
        "fvu": 0.5,
        "l0": 4.0,
        "dead_fraction": 0.25,
        "tokens_hash": "7" * 64,
        "heldout_hash": "a" * 64,
        "model_hash": "b" * 64,
        **row,
    }
    curve = [{"step": step, "metric": "loss", "value": 1 / (step + 1)} for step in range(3)]
    latents = [{"latent": i, "group": 0, "density": 0.5} for i in range(2)]
    sequences = sequences or [{"sequence": 0, "n_tokens": 31, "sum_squared_error": 1.5}]
    contexts = [{"latent": 0, "place": 0, "tokens": ["a", " b"], "activations": [0.0, 1.5], "activation": 1.5}]
    tables = {"runs": [run], "curves": curve, "latents": latents, "sequences": sequences, "contexts": contexts}
    write_run(results, cell_id, tables)


def row_file(root: Path, cell_id: str, table: str = "runs") -> Path:
    return ResultsFolder(root).row(table, cell_id)
