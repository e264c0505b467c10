"""`python -m sweep prepare`: makes what the sweep of the same overrides needs, and nothing else."""

import os
from pathlib import Path

import pytest
from commands import sweep as run
from commands import sweep_process as process
from commands import sweep_runner as sweep

from sweep.errors import ConfigError
from sweep.launch.compose import cells_of

GRID = (
    "model=tiny", "dict_size=64,128", "top_k=4", "steps=5", "batch_size=64",
    "data=file", "seq_len=32", "n_tokens=496", "n_calibration_tokens=62", "n_heldout_tokens=62",
)  # fmt: skip


@pytest.fixture
def grid(tmp_path: Path) -> tuple[str, ...]:
    """A sweep of two cells on one small file."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"document {i} " + f"w{i} " * 9 for i in range(300)))
    return (*GRID, f"dataset_path={path}")


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".used"))
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_a_sweep_finds_what_was_prepared_for_it(grid: tuple[str, ...], tmp_path: Path) -> None:
    made = process("prepare", "-m", *grid, f"results_dir={tmp_path / 'out'}")
    assert made.returncode == 0, made.stderr
    assert "2 things made, 0 there already" in made.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cache"}
    assert sorted(path.name for path in (tmp_path / "out" / "cache").iterdir()) == ["models", "tokens"]
    before = files(tmp_path)
    done = sweep("-m", *grid, f"results_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    after = files(tmp_path)
    assert before.items() <= after.items()
    made_by_sweep = {path.relative_to(tmp_path / "out" / "cache").parts[0] for path in after.keys() - before.keys()
                     if (tmp_path / "out" / "cache") in path.parents}  # fmt: skip
    assert made_by_sweep <= {"activations"}


def test_given_again_all_is_there(grid: tuple[str, ...], tmp_path: Path) -> None:
    words = ("prepare", *grid, "seq_len=32,64", f"results_dir={tmp_path / 'out'}")
    assert run(*words).exit_code == 0
    before = files(tmp_path)
    again = run(*words)
    assert again.exit_code == 0
    assert "all is there" in again.stdout
    assert files(tmp_path) == before
    words_of_it = "".join(again.stdout.split())  # a long path goes on in the next line
    for kind in ("models", "tokens"):
        assert str(tmp_path / "out" / "cache" / kind) in words_of_it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense=3"], "nonsense=3 is not an option"),
        (["dict_size=abc"], "dict_size=abc must be a whole number"),
        (["dict_size=64,abc"], "dict_size=abc must be a whole number"),
        (["model=unknown"], "model=unknown does not exist; choose one of"),
        (["dict_size=64", "top_k=4,99"], "top_k=99 exceeds dict_size=64"),
        (["dry_run=true"], "prepare makes things"),
        (["cache_dir=/dev/null/x"], "cache_dir=/dev/null/x cannot be used"),
        (["data=file"], "data=file needs a file"),
        (["n_tokens=9000000000", "steps=3"], "is too short"),
    ],
)
def test_a_wrong_request_is_told_as_the_sweep_tells_it(words: list[str], message: str, tmp_path: Path) -> None:
    model = [] if words[0].startswith("model=") else ["model=tiny"]
    if message == "is too short":
        (tmp_path / "corpus.txt").write_text("a few words")
        words = [*words, "data=file", f"dataset_path={tmp_path / 'corpus.txt'}"]
    refused = run("prepare", *model, f"results_dir={tmp_path / 'out'}", *words)
    assert refused.exit_code == 2
    assert message in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.output
    assert not list(tmp_path.rglob("*.npy"))


def test_a_hub_model_without_network_is_told(tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    refused = run("prepare", "model=smollm2-135m", f"results_dir={tmp_path}")
    assert refused.exit_code == 2
    assert "cannot be downloaded" in refused.stderr
    assert "model=gemma-3-270m" in refused.stderr


def test_cells_are_those_of_the_sweep_in_its_order() -> None:
    workflow, cells = cells_of(["model=tiny", "dict_size=64,128", "top_k=4,8", "results_dir=elsewhere"])
    assert [(cell.capacity.dict_size, cell.capacity.top_k) for cell in cells] == [
        (64, 4), (64, 8), (128, 4), (128, 8),
    ]  # fmt: skip
    assert (workflow.results_dir, workflow.cache_dir) == ("elsewhere", "elsewhere/cache")
    with pytest.raises(ConfigError, match="no such"):
        cells_of(["no such"])
