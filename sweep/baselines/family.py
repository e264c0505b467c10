"""Which transcoders a folder in Google's layout holds, read off paths and small JSON files, and a choice among them.

    Gemma Scope      layer_17/width_16k/average_l0_112/params.npz
    Gemma Scope 2    transcoder_all/layer_12_width_16k_l0_small[_affine]/params.safetensors, config.json

A family is all transcoders of one layer and width. `l0` chooses from it: all, lowest, nearest:96, or a number that
is there. The folder a user names may be the whole family, a part of it, or a single transcoder.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep.config import Site
from sweep.errors import BaselineError
from sweep.revisions import read_object

__all__ = ["CONFIG", "PARAMS", "Entry", "choose", "entry_of", "l0_of", "read_config", "scan"]

PARAMS = ("params.npz", "params.safetensors")
CONFIG = "config.json"
READS = "pre_feedforward_layernorm.output"
"""The end of `hf_hook_point_in` in the config.json of transcoders."""

MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 4
MAX_FOLDERS = 5_000

FIRST = re.compile(r"(?:^|/)(?P<path>layer_(?P<layer>\d+)/width_(?P<width>\w+)/average_l0_(?P<l0>\d+))$")
SECOND = re.compile(
    r"(?:^|/)(?P<path>(?:transcoder(?:_all)?/)?layer_(?P<layer>\d+)_width_(?P<width>\w+?)_l0_(?P<size>[a-z]+)(?P<affine>_affine)?)$"
)

LAYOUTS = (
    "layer_<L>/width_16k/average_l0_<N>/params.npz (Gemma Scope) or "
    "transcoder_all/layer_<L>_width_16k_l0_small/params.safetensors (Gemma Scope 2)"
)


@dataclass(frozen=True)
class Entry:
    """One transcoder of a family, as its place tells; None is what nothing tells."""

    folder: Path
    name: str
    """Its path in Google's layout, or its folder's name."""
    layer: int | None
    width: str | None
    l0: float | None
    """The L0 its authors measured."""

    @property
    def params(self) -> Path:
        """The file of its weights."""
        return next((path for name in PARAMS if (path := self.folder / name).is_file()), self.folder / PARAMS[0])

    @property
    def is_first(self) -> bool:
        """Whether it is of Gemma Scope, the first, and not of Gemma Scope 2."""
        return self.params.suffix == ".npz"

    def site(self, layer: int) -> Site:
        """What it reads and predicts in the language model."""
        return Site(layer, "norm_unit" if self.is_first else "norm_out", "mlp_out")


def entry_of(folder: Path | str, l0: float | None = None) -> Entry:
    """What the path of a transcoder's folder tells; `l0` comes from elsewhere where the path does not tell it."""
    text = Path(folder).as_posix()
    if match := FIRST.search(text):
        return Entry(Path(folder), match["path"], int(match["layer"]), match["width"], float(match["l0"]))
    if match := SECOND.search(text):
        return Entry(Path(folder), match["path"], int(match["layer"]), match["width"], l0)
    return Entry(Path(folder), Path(folder).name, None, None, l0)


def scan(root: Path) -> list[Entry]:
    """All transcoders below a local folder, or in it. Reads names and the small config files only.

    Raises:
        BaselineError: the folder does not exist, or has none.
    """
    if not root.is_dir():
        raise BaselineError(f"{root} is no folder; give one with {LAYOUTS}")
    entries = [_local(folder) for folder in _folders_with_weights(root.resolve())]
    if not entries:
        raise BaselineError(f"{root} holds no transcoder of Google's; it should have {LAYOUTS}")
    transcoders = [entry for entry, is_transcoder in entries if is_transcoder]
    return transcoders or [entry for entry, _ in entries]  # of the latter, loading says what they are


def _folders_with_weights(root: Path) -> Iterator[Path]:
    for n_folders, (place, folders, files) in enumerate(os.walk(root), 1):
        if n_folders > MAX_FOLDERS:
            raise BaselineError(f"{root} has more than {MAX_FOLDERS} folders; name the one that holds the transcoders")
        folders.sort()
        if len(Path(place).relative_to(root).parts) >= MAX_DEPTH:
            folders.clear()
        if set(files) & set(PARAMS):
            yield Path(place)


def _local(folder: Path) -> tuple[Entry, bool]:
    """A transcoder, or one of the autoencoders that lie beside them; which of the two."""
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    is_transcoder = not config or str(config.get("hf_hook_point_in", "")).endswith(READS)
    return entry_of(folder, l0_of(config)), is_transcoder


def l0_of(config: Mapping[str, Any]) -> float | None:
    l0 = config.get("l0")
    return float(l0) if isinstance(l0, int | float) else None


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Gemma Scope 2 transcoder.

    Raises:
        BaselineError: it is missing, too large or no JSON object.
    """
    path = folder / CONFIG
    try:
        return read_object(path, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise BaselineError(f"{path} cannot be read ({reason}); download it again") from error


def choose(entries: Iterable[Entry], layer: int, width: str | None, l0: str, where: str) -> list[Entry]:
    """The transcoders of a layer and width that `l0` asks for, sparsest first.

    Transcoders whose path does not tell a layer or width (a single folder under another name) fit any.

    Args:
        width: as in the folder's name, such as 16k; None takes every width.
        where: what the entries were taken from, for messages.

    Raises:
        BaselineError: the layer, the width or the L0 is not there; the message lists what is.
    """
    found = list(entries)
    layers = sorted({entry.layer for entry in found if entry.layer is not None})
    found = [entry for entry in found if entry.layer in (layer, None)]
    if not found:
        raise BaselineError(f"layer {layer} is not in {where}; it has {_listed('layer', layers)}")
    widths = sorted({entry.width for entry in found if entry.width is not None})
    found = [entry for entry in found if width is None or entry.width in (width, None)]
    if not found:
        raise BaselineError(f"width {width} is not in {where} at layer {layer}; it has {_listed('width', widths)}")
    found.sort(key=lambda entry: (entry.l0 is None, entry.l0, entry.name))
    if l0 == "all":
        return found
    known = sorted({entry.l0 for entry in found if entry.l0 is not None})
    if not known:
        raise BaselineError(f"no L0 is known of the transcoders in {where}; choose l0=all")
    if l0 == "lowest":
        wanted = known[0]
    elif l0.startswith("nearest:"):
        asked = float(l0.removeprefix("nearest:"))
        wanted = min(known, key=lambda value: (abs(value - asked), value))
    else:
        wanted = float(l0)
    chosen = [entry for entry in found if entry.l0 == wanted]
    if not chosen:
        raise BaselineError(
            f"L0 {l0} is not in {where} at layer {layer}; it has {_listed('L0', known)}; "
            f"for the nearest one choose nearest:{l0}"
        )
    return chosen


def _listed(name: str, values: Sequence[Any]) -> str:
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return f"{name}{'s' * (len(values) > 1 and name != 'L0')} {', '.join(shown)}" if shown else f"no {name} in its name"
