"""What the header of a file of Google's weights says, held against the language model, before anything is read."""

from typing import Any

from safetensors import SafetensorError, safe_open

from sweep.baselines.family import CONFIG, READS, Entry, read_config
from sweep.baselines.npz import npz_shapes, why_not_whole
from sweep.errors import BaselineError

__all__ = ["NAMES", "check", "check_shapes"]

NAMES = {
    "w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold",
    "affine_skip_connection": "W_skip",
}  # fmt: skip
"""Gemma Scope 2's names of the tensors, and ours, which are Gemma Scope's."""

PREDICTS = "post_feedforward_layernorm.output"


def check_shapes(entry: Entry, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Names (ours) and shapes of the weights, read off the header alone.

    Raises:
        BaselineError: the file is missing, not whole, or of a model of other widths.
    """
    path = entry.params
    if not path.is_file():
        raise BaselineError(f"{path} is missing; download it again")
    shapes = npz_shapes(path) if path.suffix == ".npz" else _safetensors_shapes(entry)
    if missing := [name for name in NAMES.values() if name not in shapes and name != "W_skip"]:
        raise BaselineError(f"{path} has no {', '.join(missing)}; it holds {', '.join(sorted(shapes))}")
    width = shapes["b_enc"][0] if len(shapes["b_enc"]) == 1 else -1
    expected = {
        "W_enc": (d_in, width), "b_enc": (width,), "W_dec": (width, d_out), "b_dec": (d_out,), "threshold": (width,),
        "W_skip": (d_in, d_out),
    }  # fmt: skip
    for name, shape in expected.items():
        if shapes.get(name, shape) != shape:
            raise BaselineError(
                f"{path}: {name} has the shape {shapes[name]}; a transcoder of this language model, of width {width}, "
                f"has {shape}: it belongs to another model"
            )
    return {name: shape for name, shape in shapes.items() if name in expected}


def check(entry: Entry, layer: int, d_in: int, d_out: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of the weights, and the config.json beside them; empty for Gemma Scope's first, which has none.

    Raises:
        BaselineError: either is missing, not whole, of another model, layer or kind.
    """
    shapes = check_shapes(entry, d_in, d_out)
    return shapes, {} if entry.is_first else _check_config(entry, layer)


def _check_config(entry: Entry, layer: int) -> dict[str, Any]:
    """The config.json beside Gemma Scope 2's weights, if it speaks of a transcoder of this layer's MLP.

    Raises:
        BaselineError: it speaks of something else, or cannot be read.
    """
    config, path = read_config(entry.folder), entry.folder / CONFIG
    for key, part in (("hf_hook_point_in", READS), ("hf_hook_point_out", PREDICTS)):
        expected = f"model.layers.{layer}.{part}"
        if (found := config.get(key)) != expected:
            raise BaselineError(f"{path}: {key} is {found}; a transcoder of layer {layer} has {expected}")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise BaselineError(f"{path}: architecture is {config['architecture']}; only jump_relu is known")
    return config


def _safetensors_shapes(entry: Entry) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(entry.params, "np") as file:
            names = [name for name in file.keys() if name in NAMES]  # noqa: SIM118
            return {NAMES[name]: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise BaselineError(why_not_whole(entry.params, error)) from error
