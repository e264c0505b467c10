"""What a folder in Google's layout holds, and the choice among it."""

from pathlib import Path

import pytest
from gemma_scope import random_arrays, write_first, write_second
from hypothesis import given
from hypothesis import strategies as st

from sweep.baselines.family import Entry, choose, entry_of, scan
from sweep.errors import BaselineError

ARRAYS = random_arrays(4, 6, 4)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    for layer, l0 in ((1, 4), (1, 12), (1, 100), (2, 7)):
        write_first(tmp_path / "scope", ARRAYS, layer, l0)
    write_first(tmp_path / "scope", ARRAYS, 1, 5, width="65k")
    return tmp_path / "scope"


@pytest.fixture
def second(tmp_path: Path) -> Path:
    root = tmp_path / "scope2"
    for size, l0 in (("small", 10), ("big", 100)):
        write_second(root, ARRAYS, 1, l0, size)
        write_second(root, random_arrays(4, 6, 4, skip=True), 1, l0, size)
    write_second(root, ARRAYS, 1, 50, "medium", kind="transcoder")
    write_second(root, ARRAYS, 1, 20, kind="resid_post", hf_hook_point_in="model.layers.1.output")
    return root


def names(entries: list[Entry]) -> list[str]:
    return [entry.name for entry in entries]


def test_scan_reads_layer_width_and_l0_off_the_path(first: Path) -> None:
    found = {(entry.layer, entry.width, entry.l0) for entry in scan(first)}
    assert found == {(1, "16k", 4), (1, "16k", 12), (1, "16k", 100), (2, "16k", 7), (1, "65k", 5)}
    assert all(entry.params.name == "params.npz" and entry.params.is_file() for entry in scan(first))


def test_scan_of_gemma_scope_2_reads_l0_off_the_config_and_passes_autoencoders_by(second: Path) -> None:
    found = {entry.name: entry.l0 for entry in scan(second)}
    assert found == {
        "transcoder_all/layer_1_width_16k_l0_small": 10,
        "transcoder_all/layer_1_width_16k_l0_small_affine": 10,
        "transcoder_all/layer_1_width_16k_l0_big": 100,
        "transcoder_all/layer_1_width_16k_l0_big_affine": 100,
        "transcoder/layer_1_width_16k_l0_medium": 50,
    }
    assert {entry.layer for entry in scan(second)} == {1}


@pytest.mark.parametrize("part", ["", "layer_1", "layer_1/width_16k", "layer_1/width_16k/average_l0_12"])
def test_scan_takes_any_part_of_a_family(first: Path, part: str) -> None:
    assert "layer_1/width_16k/average_l0_12" in names(scan(first / part))


def test_scan_finds_a_single_folder_under_another_name(first: Path) -> None:
    folder = first.parent / "mine"
    (first / "layer_1/width_16k/average_l0_12").rename(folder)
    (entry,) = scan(folder)
    assert (entry.name, entry.layer, entry.width, entry.l0) == ("mine", None, None, None)
    assert choose([entry], 17, "16k", "all", "mine") == [entry]


@pytest.mark.parametrize(
    ("l0", "expected"),
    [
        ("all", [4, 12, 100]),
        ("lowest", [4]),
        ("12", [12]),
        ("nearest:96", [100]),
        ("nearest:8", [4]),  # of equal distance the sparser
        ("nearest:8.5", [12]),
        ("nearest:1000000", [100]),
    ],
)
def test_choose_takes_the_l0_asked_for(first: Path, l0: str, expected: list[float]) -> None:
    assert [entry.l0 for entry in choose(scan(first), 1, "16k", l0, "there")] == expected


def test_choose_takes_both_kinds_of_gemma_scope_2_at_an_l0(second: Path) -> None:
    found = names(choose(scan(second), 1, "16k", "nearest:90", "there"))
    assert found == ["transcoder_all/layer_1_width_16k_l0_big", "transcoder_all/layer_1_width_16k_l0_big_affine"]


@given(st.lists(st.integers(1, 2000), min_size=1, unique=True), st.integers(0, 3000))
def test_nearest_is_nearest(l0s: list[int], asked: int) -> None:
    entries = [entry_of(f"layer_0/width_16k/average_l0_{l0}") for l0 in l0s]
    (chosen,) = choose(entries, 0, "16k", f"nearest:{asked}", "there")
    assert chosen.l0 is not None
    assert abs(chosen.l0 - asked) == min(abs(l0 - asked) for l0 in l0s)


@pytest.mark.parametrize(
    ("layer", "width", "l0", "message"),
    [
        (17, "16k", "all", "layer 17 is not in there; it has layers 1, 2"),
        (1, "32k", "all", "width 32k is not in there at layer 1; it has widths 16k, 65k"),
        (1, "16k", "113", "L0 113 is not in there at layer 1; it has L0 4, 12, 100; .* nearest:113"),
    ],
)
def test_choose_lists_what_is_there(first: Path, layer: int, width: str, l0: str, message: str) -> None:
    with pytest.raises(BaselineError, match=message):
        choose(scan(first), layer, width, l0, "there")


def test_choose_says_when_no_l0_is_known() -> None:
    with pytest.raises(BaselineError, match="choose l0=all"):
        choose([entry_of("mine")], 1, "16k", "lowest", "there")


def test_scan_says_what_a_folder_should_hold(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="is no folder"):
        scan(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(BaselineError, match="is no folder"):
        scan(tmp_path / "file")
    with pytest.raises(BaselineError, match=r"holds no transcoder.*layer_<L>/width_16k/average_l0_<N>/params.npz"):
        scan(tmp_path)


def test_scan_does_not_walk_a_whole_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.baselines.family.MAX_FOLDERS", 10)
    for i in range(11):
        (tmp_path / str(i)).mkdir()
    with pytest.raises(BaselineError, match="more than 10 folders"):
        scan(tmp_path)


@pytest.mark.parametrize("content", ["[", "[]", "[" * 100_000])
def test_a_config_that_is_no_config_is_told(second: Path, content: str) -> None:
    path = second / "transcoder/layer_1_width_16k_l0_medium/config.json"
    path.write_text(content)
    with pytest.raises(BaselineError, match=f"{path} .*download it again"):
        scan(second)


def test_an_l0_that_is_no_number_is_not_known(second: Path) -> None:
    folder = second / "transcoder/layer_1_width_16k_l0_medium"
    (folder / "config.json").write_text('{"l0": "many"}')
    assert scan(folder)[0].l0 is None
