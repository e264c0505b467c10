"""`python -m sweep cache`: what is there, what goes, and what stays whatever is asked for."""

import os
from pathlib import Path

import pytest
from commands import sweep as run
from gangs import make_workflow, run_cells
from make import make_cell

from sweep.cache import entries, in_use
from sweep.paths import CacheFolder


@pytest.fixture
def own(tmp_path: Path) -> CacheFolder:
    """A cache that a sweep has filled, as results/cache."""
    cache = CacheFolder(tmp_path / "cache")
    run_cells([make_cell(steps=1, dict_size=16)], make_workflow(tmp_path, cache))
    return cache


def kinds(cache: CacheFolder) -> list[str]:
    return [entry.kind for entry in entries(cache)]


def test_list_and_clear_what_a_sweep_made_and_nothing_else(own: CacheFolder) -> None:
    listed = run("cache", "list", own.root.parent).output
    for words in ("tiny", "docstrings for tiny, 3", "tiny, layer 1 (norm_out to mlp_out)", "3 in all"):
        assert words in listed
    (activations,) = (entry.path for entry in entries(own) if entry.kind == "activations")
    (activations / "notes.txt").write_text("mine")
    for foreign in ("models/net", "tokens/x", "activations/y/layer_1_z"):
        (own.root / foreign).mkdir(parents=True)
        (own.root / foreign / "config.json").write_text("{}")
    (own.root / "tokens" / "link").symlink_to(own.root / "models" / "net")
    assert run("cache", "clear", own.root).exit_code == 2  # no terminal to ask on
    assert len(kinds(own)) == 3
    done = run("cache", "clear", own.root, "--kind", "activations", "--yes")
    assert (done.exit_code, "freed" in done.output) == (0, True)
    assert kinds(own) == ["models", "tokens"]
    assert run("cache", "clear", own.root, "--yes").exit_code == 0
    left = {
        str(path.relative_to(own.root)) for path in own.root.rglob("*") if path.is_file() and path.suffix != ".lock"
    }
    mine = str((activations / "notes.txt").relative_to(own.root))
    assert left == {mine, "models/net/config.json", "tokens/x/config.json", "activations/y/layer_1_z/config.json"}
    assert (own.root / "tokens" / "link" / "config.json").is_file()
    assert run("cache", "clear", own.root, "--yes").output.strip() == "nothing to delete"


def test_what_a_job_uses_stays(own: CacheFolder) -> None:
    stream = next(entry.path.parent for entry in entries(own) if entry.kind == "activations")
    with in_use(stream):
        assert "in use" in run("cache", "list", own.root).output
        done = run("cache", "clear", own.root, "--yes")
        assert "1 in use and left alone" in done.output
        assert kinds(own) == ["activations"]
    run("cache", "clear", own.root, "--yes")
    assert kinds(own) == []


def test_clear_by_age_and_refusals(own: CacheFolder, tmp_path: Path) -> None:
    for entry in entries(own):
        if entry.kind == "tokens":
            for path in (*entry.path.iterdir(), entry.used):
                os.utime(path, (0, 0))
    assert run("cache", "clear", own.root, "--unused_days", "30", "--yes").exit_code == 0
    assert kinds(own) == ["models", "activations"]
    for words in (("clear", own.root, "--kind", "rows"), ("list", tmp_path / "none")):
        assert run("cache", *words).exit_code == 2
