"""What `evaluate` and `compare` score: a transcoder of ours, or a torch file of another program and what it lacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from sweep.checkout import CONF
from sweep.errors import CheckpointError, ConfigError
from sweep.launch.compose import cells_of
from sweep.saved import Saved, check_layer, config_in, open_saved

if TYPE_CHECKING:
    from sweep.foreign import ForeignTranscoder
    from sweep.transcoder import Transcoder

__all__ = ["open_checkpoint"]

SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class SavedElsewhere(Saved):
    """A torch file read already; `activation` may be one that no cell trains with."""

    weights: "ForeignTranscoder"
    activation: str

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def n_training_tokens(self) -> None:
        return None

    def read(self, device: str) -> "Transcoder":
        return self.weights.transcoder(self.activation, self.cell.capacity.top_k, device)


def open_checkpoint(path: Path, layer: int | None, overrides: Sequence[str]) -> Saved:
    """A transcoder of ours, or one in a folder with a torch file and a config.json; overrides fill what that lacks.

    Raises:
        CheckpointError: it is not there, damaged, or not understood.
        ConfigError: the options are wrong, or contradict what the transcoder says of itself.
    """
    if files := torch_files(path):
        return elsewhere(path.resolve(), files, layer, overrides)
    if overrides:
        raise ConfigError(f"{' '.join(overrides)}: {path} knows its own options; leave these out")
    saved = open_saved(path)
    check_layer(saved, layer)
    return saved


def torch_files(path: Path) -> list[Path]:
    """The torch files of a folder that is none of ours."""
    if not path.is_dir() or any((path / name).exists() for name in ("transcoder", "transcoder.safetensors")):
        return []
    return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())


def elsewhere(folder: Path, files: Sequence[Path], layer: int | None, overrides: Sequence[str]) -> SavedElsewhere:
    from sweep.foreign import ForeignTranscoder, options_in

    if len(files) > 1:
        raise CheckpointError(f"{folder} holds {', '.join(file.name for file in files)}; keep one of them in a folder")
    told = options_in(config_in(folder), folder / "config.json")
    typed = dict(word.partition("=")[::2] for word in overrides)
    if layer is not None:
        typed["layer"] = str(layer)
    if "layer" in told and "layer" in typed and str(told["layer"]) != typed["layer"]:
        raise ConfigError(f"layer={typed['layer']}: {folder / 'config.json'} says that it is of layer {told['layer']}")
    if "layer" not in told and "layer" not in typed:
        raise ConfigError(f"{folder} does not say of which layer it is; give --layer")
    weights = ForeignTranscoder(files[0])
    if told.setdefault("dict_size", weights.dict_size) != weights.dict_size:
        raise CheckpointError(f"{folder}: config.json says dict_size={told['dict_size']}, W_enc {weights.dict_size}")
    activation = typed.pop("activation", "") or str(told.pop("activation", ""))
    told.pop("activation", None)
    activation = activation or ("jump_relu" if weights.threshold is not None else "top_k")
    if activation == "top_k" and not {"top_k"} & (told.keys() | typed.keys()):
        raise ConfigError(f"{folder} does not say how many latents are active; give top_k=")
    if "model" in told:
        told["model"] = preset(str(told["model"]))
    words = {"top_k": "1", "skip": "false", **told, **typed}  # such files hold no linear map
    _, cells = cells_of([f"{key}={value}" for key, value in words.items()])
    if len(cells) != 1:
        raise ConfigError(f"{' '.join(overrides)} is a grid; name one transcoder")
    return SavedElsewhere(folder, cells[0], None, weights, activation)


def preset(name: str) -> str:
    """The model preset of that name or repository.

    Raises:
        ConfigError: there is none.
    """
    known: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in sorted((CONF / "model").glob("*.yaml"))}
    for stem, values in known.items():
        if name in (stem, values["model_repo"], str(values["model_repo"]).rpartition("/")[2]):
            return stem
    raise ConfigError(f"model {name} is not a preset; give model= one of {', '.join(known)}, or model_path=")
