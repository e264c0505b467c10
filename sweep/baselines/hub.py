"""Gemma Scope from the Hugging Face hub: the list of a repository, then the single files that were chosen.

The list comes with the commit it was taken at, and every file is read at that commit. Without a network the folders
that are known to exist take the list's place, and only what was downloaded before can be read.
"""

import csv
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sweep.baselines.family import CONFIG, PARAMS, Entry, choose, entry_of, l0_of, read_config, scan
from sweep.errors import BaselineError, first_line
from sweep.progress import Report

__all__ = ["REPOSITORIES", "Repository", "download"]

TIMEOUT_SECONDS = 10

BUSY = (429, 500, 502, 503, 504)
"""Answers with which the hub asks for patience; files may come all the same."""


@dataclass(frozen=True)
class Repository:
    """A family on the hub, and the folders in it that hold transcoders of MLPs."""

    name: str
    known: Callable[[int], list[str]]
    """The folders known to exist at a layer, for when the hub cannot be asked."""

    def file_of(self, folder: str) -> str:
        return f"{folder}/{PARAMS[0] if 'average_l0' in folder else PARAMS[1]}"


def _first_known(layer: int) -> list[str]:
    text = files("sweep.baselines").joinpath("gemma_scope_2b_l0.csv").read_text(encoding="utf-8")
    lines = csv.DictReader(text.splitlines(), strict=True)
    return [f"layer_{layer}/width_16k/average_l0_{line['average_l0']}" for line in lines if int(line["layer"]) == layer]


def _second_known(layer: int) -> list[str]:
    sizes = [f"{size}{affine}" for size in ("small", "big") for affine in ("", "_affine")]
    return [f"transcoder_all/layer_{layer}_width_{width}_l0_{size}" for width in ("16k", "262k") for size in sizes]


REPOSITORIES = {
    "gemma-2-2b": Repository("google/gemma-scope-2b-pt-transcoders", _first_known),
    "gemma-3-270m": Repository("google/gemma-scope-2-270m-pt", _second_known),
    "gemma-3-1b": Repository("google/gemma-scope-2-1b-pt", _second_known),
}
"""The families of pretrained language models, under the names of conf/model."""


def download(
    repository: Repository, layers: Collection[int], width: str, l0: str, revision: str | None, report: Report
) -> Path:
    """Fetch the chosen transcoders of some layers into the hub's own cache; returns a folder in Google's layout.

    Args:
        revision: a commit; None takes the newest one.

    Raises:
        BaselineError: the hub cannot be reached and what is asked for was not downloaded before, or it has no such
            layer, width or L0.
    """
    try:
        commit, listed = _list(repository, revision)
    except _UnreachableError as error:
        return _downloaded_before(repository, layers, width, l0, revision, str(error))
    fetch = _Fetch(repository.name, commit)
    root = None
    for layer in layers:
        entries = [entry_of(folder) for folder in listed or repository.known(layer)]
        entries = [_with_l0(entry, fetch, l0) if entry.layer == layer else entry for entry in entries]
        for entry in choose(entries, layer, width, l0, repository.name):
            report(f"download {entry.name}", 0, 0, "")
            name = repository.file_of(entry.name)
            path = fetch(name)
            root = path.parents[len(Path(name).parts) - 1]
            if path.suffix == ".safetensors":
                fetch(f"{entry.name}/{CONFIG}")
    assert root is not None, "there is no layer to download"
    return root


def _list(repository: Repository, revision: str | None) -> tuple[str, Sequence[str]]:
    """A commit and its folders of transcoders; no folder where the hub is too busy to list them.

    Raises:
        BaselineError: the hub refuses.
        _UnreachableError: it does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(
            repository.name, revision=revision, timeout=TIMEOUT_SECONDS, token=os.environ.get("HF_TOKEN")
        )
    except HfHubHTTPError as error:
        if error.response.status_code in BUSY:
            return revision or "main", []
        raise BaselineError(
            f"{repository.name} at {revision or 'its newest commit'}: the hub refuses ({first_line(error)}); "
            "set baselines_revision= to a commit that exists, or baselines_dir= to a local folder"
        ) from error
    except Exception as error:  # the hub's HTTP library, and so its errors, differ between its versions
        raise _UnreachableError(first_line(error)) from error
    names = [Path(sibling.rfilename) for sibling in info.siblings or ()]
    folders = [name.parent.as_posix() for name in names if name.name in PARAMS]
    return str(info.sha), [name for name in folders if name.startswith(("layer_", "transcoder/", "transcoder_all/"))]


def _downloaded_before(
    repository: Repository, layers: Collection[int], width: str, l0: str, revision: str | None, reason: str
) -> Path:
    """The newest snapshot in the hub's cache, if it has what is asked for.

    Raises:
        BaselineError: it does not.
    """
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / f"models--{repository.name.replace('/', '--')}" / "snapshots"
    snapshots = sorted(place.glob(revision or "*"), key=lambda folder: folder.stat().st_mtime)
    try:
        if not snapshots:
            for layer in layers:
                choose(map(entry_of, repository.known(layer)), layer, width, l0, repository.name)
            raise BaselineError("nothing was downloaded before")
        entries = scan(snapshots[-1])
        for layer in layers:
            choose(entries, layer, width, l0, str(snapshots[-1]))
    except BaselineError as error:
        raise BaselineError(
            f"{repository.name}: the hub cannot be reached ({reason}), and {error}. Connect once, or set "
            "baselines_dir= to a local folder in Google's layout"
        ) from error
    return snapshots[-1]


class _UnreachableError(Exception):
    """The hub does not answer."""


@dataclass(frozen=True)
class _Fetch:
    """Gets single files of a repository at one revision."""

    repository: str
    revision: str

    def __call__(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(
                self.repository,
                name,
                revision=self.revision,
                token=os.environ.get("HF_TOKEN"),
                etag_timeout=TIMEOUT_SECONDS,
            )
        except Exception as error:
            raise BaselineError(
                f"{self.repository} at {self.revision}: {name} cannot be downloaded ({first_line(error)}); "
                "give the command again, or set baselines_dir= to a folder in Google's layout"
            ) from error
        return Path(path)


def _with_l0(entry: Entry, fetch: _Fetch, l0: str) -> Entry:
    """The entry with the L0 its config.json tells, where its path does not and the choice depends on it."""
    if entry.l0 is not None or l0 == "all":
        return entry
    return entry_of(entry.folder, l0_of(read_config(fetch(f"{entry.name}/{CONFIG}").parent)))
