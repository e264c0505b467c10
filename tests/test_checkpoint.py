"""Checkpoints: whole or not there, the last two kept, damage found, strangers refused."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from make import make_cell
from states import CELL, INPUTS, equal, make_state

from sweep.checkpoint import load_latest, save
from sweep.errors import CheckpointError
from sweep.paths import CellFolder
from sweep.state import TrainState


@pytest.fixture
def folder(tmp_path: Path) -> CellFolder:
    """A cell's folder with the checkpoints of steps 10 and 20."""
    cell_folder = CellFolder(tmp_path / "cell")
    for step in (10, 20):
        save(make_state(step), cell_folder, CELL, INPUTS)
    return cell_folder


def test_save_and_load_give_the_same_state(folder: CellFolder) -> None:
    loaded = load_latest(folder, CELL, INPUTS, "cpu")
    assert loaded is not None
    assert equal(loaded, make_state(20))


def test_a_cell_with_a_linear_map_takes_no_checkpoint_without_one(folder: CellFolder, tmp_path: Path) -> None:
    with_skip = make_cell(skip=True)
    state = make_state(20)
    state.params.W_skip = torch.ones(32, 32)
    state = TrainState.initial(state.params, 1.0, 1.0)
    other = CellFolder(tmp_path / "other")
    save(state, other, with_skip, INPUTS)
    loaded = load_latest(other, with_skip, INPUTS, "cpu")
    assert loaded is not None
    assert equal(loaded, state)
    save(make_state(20), other, with_skip, INPUTS)
    with pytest.raises(CheckpointError, match="W_skip is missing"):
        load_latest(other, with_skip, INPUTS, "cpu")


@pytest.mark.parametrize(("option", "held"), [("rate_by_spread", "write_rates"), ("centre_source", "source_mean")])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_checkpoint_whose_steps_are_not_fitted_as_the_cells_is_refused(
    option: str, held: str, wanted: bool, tmp_path: Path
) -> None:
    state, folder = make_state(20), CellFolder(tmp_path / "cell")
    cell = make_cell(**{"rate_by_spread": True, "centre_source": True, option: wanted})
    if wanted:
        setattr(state, held, None)
    save(state, folder, cell, INPUTS)
    with pytest.raises(CheckpointError, match=f"{held} is missing, or not of this cell"):
        load_latest(folder, cell, INPUTS, "cpu")


def test_everything_a_state_holds_is_saved() -> None:
    state = make_state(3)
    held = {**state.tensors(), **state.scalars()}
    assert {name.split(".")[0] for name in held} == set(TrainState.__dataclass_fields__)


def test_save_keeps_the_last_two(folder: CellFolder) -> None:
    save(make_state(30), folder, CELL, INPUTS)
    assert folder.checkpoint_steps() == [20, 30]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_00000020", "step_00000030"]


def test_load_without_a_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(CellFolder(tmp_path), CELL, INPUTS, "cpu") is None


NAMES = ("state.safetensors", "state.json", "manifest.json")


def assert_found_damaged(folder: CellFolder, name: str, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Assert that with this content of one file the checkpoint of step 20 is named and that of step 10 is taken."""
    (folder.checkpoint(20) / name).write_bytes(content)
    caplog.clear()
    loaded = load_latest(folder, CELL, INPUTS, "cpu")
    assert loaded is not None
    assert loaded.step == 10
    (record,) = caplog.records
    assert f"{folder.checkpoint(20)} is damaged" in record.getMessage()
    assert (record.levelname, record.__dict__["cell_id"]) == ("WARNING", CELL.cell_id)


@pytest.mark.parametrize("name", NAMES)
def test_truncation_at_every_hundredth_of_a_file_is_found(
    folder: CellFolder, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = (folder.checkpoint(20) / name).read_bytes()
    for percent in range(100):
        assert_found_damaged(folder, name, content[: len(content) * percent // 100], caplog)


def test_each_of_a_thousand_flipped_bits_is_found(folder: CellFolder, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(0)
    contents = {name: (folder.checkpoint(20) / name).read_bytes() for name in NAMES}
    for number in range(1000):
        name = NAMES[number % len(NAMES)]
        flipped = bytearray(contents[name])
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        assert_found_damaged(folder, name, flipped, caplog)
        (folder.checkpoint(20) / name).write_bytes(contents[name])
    whole = load_latest(folder, CELL, INPUTS, "cpu")
    assert whole is not None
    assert equal(whole, make_state(20))


def test_a_missing_file_falls_back(folder: CellFolder) -> None:
    (folder.checkpoint(20) / "state.json").unlink()
    loaded = load_latest(folder, CELL, INPUTS, "cpu")
    assert loaded is not None
    assert loaded.step == 10


def test_no_whole_checkpoint_says_what_to_delete(folder: CellFolder) -> None:
    for step in (10, 20):
        (folder.checkpoint(step) / "state.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=f"delete {folder.checkpoints}"):
        load_latest(folder, CELL, INPUTS, "cpu")


def test_the_checkpoint_of_another_cell_is_refused(folder: CellFolder) -> None:
    with pytest.raises(CheckpointError, match="belongs to another run: its cell_id"):
        load_latest(folder, make_cell(seed=1), INPUTS, "cpu")


def test_the_checkpoint_of_another_text_is_refused(folder: CellFolder) -> None:
    with pytest.raises(CheckpointError, match="belongs to another run: its tokens_hash"):
        load_latest(folder, CELL, {**INPUTS, "tokens_hash": "other"}, "cpu")


def test_the_checkpoint_of_another_language_model_is_refused(folder: CellFolder) -> None:
    with pytest.raises(CheckpointError, match="belongs to another run: its model_hash"):
        load_latest(folder, CELL, {**INPUTS, "model_hash": "other"}, "cpu")


def test_a_half_written_folder_does_not_count(folder: CellFolder) -> None:
    shutil.copytree(folder.checkpoint(20), folder.checkpoints / ".step_00000099.x.tmp")
    (folder.checkpoints / "step_junk").mkdir()
    assert folder.checkpoint_steps() == [10, 20]


def test_nothing_is_left_of_a_save_that_failed(folder: CellFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sweep.checkpoint.write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(make_state(30), folder, CELL, INPUTS)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_00000010", "step_00000020"]


def test_a_consistent_checkpoint_of_other_shapes_is_refused(folder: CellFolder) -> None:
    path = folder.checkpoint(20)
    save(make_state(20), folder, make_cell(dict_size=128), INPUTS)
    about = json.loads((path / "state.json").read_text())
    assert about["cell_id"] != CELL.cell_id
    with pytest.raises(CheckpointError, match="not \\(32, 128\\)"):
        load_latest(folder, make_cell(dict_size=128), INPUTS, "cpu")
