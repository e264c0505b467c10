"""Google's transcoders from a hub: a local server that speaks the hub's protocol, and tells what was asked of it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gemma_scope import random_arrays, write_first, write_second
from huggingface_hub import constants

from sweep.baselines.hub import REPOSITORIES, download
from sweep.errors import BaselineError
from sweep.progress import silent

FIRST, SECOND = REPOSITORIES["gemma-2-2b"], REPOSITORIES["gemma-3-270m"]
NEWEST, OLDER = "a" * 40, "b" * 40


class Hub:
    """Repositories, each with the same files at two commits, and the requests for them."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.asked: list[str] = []
        self.busy = False
        """Whether it refuses to list."""

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        name = next((name for name in self.folders if name in path), "")
        if path.startswith("/api/models/"):
            self.asked.append(path)
            revision = path.partition("/revision/")[2] or NEWEST
            if self.busy or revision not in (NEWEST, OLDER) or not name:
                return 503 if self.busy else 404, {}, b""
            files = [path for path in self.folders[name].rglob("*") if path.is_file()]
            siblings = [{"rfilename": path.relative_to(self.folders[name]).as_posix()} for path in files]
            return 200, {}, json.dumps({"id": name, "sha": revision, "siblings": siblings}).encode()
        revision, _, file = path.partition("/resolve/")[2].partition("/")
        source = self.folders[name] / file
        if not source.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if method == "GET":
            self.asked.append(f"{revision[:4]}:{file}")
        commit = NEWEST if revision == "main" else revision
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{file.replace("/", "-")}"'}, source.read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    first, second = tmp_path / "first", tmp_path / "second"
    for layer, l0 in ((17, 12), (17, 34), (17, 112), (18, 61)):
        write_first(first, random_arrays(4, 6, 4, seed=l0), layer, l0)
    write_first(first, random_arrays(4, 9, 4), 17, 20, width="65k")
    for size, l0 in (("small", 15), ("big", 105)):
        write_second(second, random_arrays(4, 6, 4, seed=l0), 12, l0, size)
        write_second(second, random_arrays(4, 6, 4, skip=True), 12, l0, size)
        write_second(second, random_arrays(4, 6, 4), 12, l0, size, kind="resid_post")
    stand_in = Hub({FIRST.name: first, SECOND.name: second})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, headers, body = stand_in.answer(self.command, self.path)
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield stand_in
    server.shutdown()
    server.server_close()


def params(layer: int, *l0s: int) -> list[str]:
    return [f"layer_{layer}/width_16k/average_l0_{l0}/params.npz" for l0 in l0s]


@pytest.mark.parametrize(
    ("l0", "expected"), [("all", (12, 34, 112)), ("lowest", (12,)), ("nearest:96", (112,)), ("34", (34,))]
)
def test_only_the_files_asked_for_come_and_all_of_one_commit(hub: Hub, l0: str, expected: tuple[int, ...]) -> None:
    root = download(FIRST, [17], "16k", l0, None, silent)
    assert hub.asked == [f"/api/models/{FIRST.name}", *(f"{NEWEST[:4]}:{name}" for name in params(17, *expected))]
    for name in params(17, *expected):
        assert (root / name).read_bytes() == (hub.folders[FIRST.name] / name).read_bytes()
    download(FIRST, [17], "16k", l0, None, silent)
    assert len(hub.asked) == 2 + len(expected)  # a file that is there does not come again


def test_several_layers_lie_in_one_folder_and_a_revision_is_kept_to(hub: Hub) -> None:
    root = download(FIRST, [17, 18], "16k", "nearest:61", OLDER, silent)
    names = params(17, 34) + params(18, 61)
    assert hub.asked == [f"/api/models/{FIRST.name}/revision/{OLDER}", *(f"{OLDER[:4]}:{name}" for name in names)]
    assert all((root / name).is_file() for name in names)
    assert root.name == OLDER


def test_of_gemma_scope_2_small_configs_alone_decide_what_comes(hub: Hub) -> None:
    root = download(SECOND, [12], "16k", "nearest:96", None, silent)
    weights = [line.partition(":")[2] for line in hub.asked if line.endswith("safetensors")]
    folders = [f"transcoder_all/layer_12_width_16k_l0_big{affine}" for affine in ("", "_affine")]
    assert weights == [f"{folder}/params.safetensors" for folder in folders]
    assert all((root / folder / "config.json").is_file() for folder in folders)
    assert not [line for line in hub.asked if "resid_post" in line]


def test_a_hub_that_is_too_busy_to_list_gives_what_is_known_to_be_there(hub: Hub) -> None:
    hub.busy = True
    root = download(FIRST, [17], "16k", "112", None, silent)
    assert hub.asked[-1] == f"main:{params(17, 112)[0]}"
    assert (root / params(17, 112)[0]).is_file()
    with pytest.raises(BaselineError, match=r"average_l0_1246/params.npz cannot be downloaded .*baselines_dir="):
        download(FIRST, [17], "16k", "1246", None, silent)


@pytest.mark.parametrize(
    ("layer", "width", "l0", "revision", "message"),
    [
        (17, "16k", "113", None, r"L0 113 is not in .* it has L0 12, 34, 112; .*nearest:113"),
        (3, "16k", "all", None, r"layer 3 is not in .* it has layers 17, 18"),
        (17, "1m", "all", None, r"width 1m is not in .* it has widths 16k, 65k"),
        (17, "16k", "all", "c" * 40, r"at c{40}: the hub refuses .*baselines_revision="),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, layer: int, width: str, l0: str, revision: str | None, message: str
) -> None:
    with pytest.raises(BaselineError, match=message):
        download(FIRST, [layer], width, l0, revision, silent)
    assert not (tmp_path / "cache").exists()
