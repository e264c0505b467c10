"""Files are whole or not there; a results folder is ours, new, or refused."""

import json
from pathlib import Path

import pytest

from sweep.errors import ResultsError
from sweep.locks import locked, try_lock
from sweep.paths import CellFolder, ResultsFolder, atomic_directory, remove_leftovers, write_atomic, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a'; echo $HOME.json"
    for content in (b"one", b"two"):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert names(tmp_path) == [path.name]


def test_write_atomic_keeps_the_old_content_when_the_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for function in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(function, fail)
            write_atomic(path, b"new")
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == ["file"]


def test_write_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "x.json", {"a": 0.1 + 0.2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 0.1 + 0.2}


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(RuntimeError), atomic_directory(path) as partial:
        (partial / "file").write_text("half")
        assert not path.exists()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for content in ("one", "two"):
        with atomic_directory(path) as partial:
            (partial / "file").write_text(content)
        assert (path / "file").read_text() == content
    assert names(tmp_path) == ["folder"]


def test_a_lock_is_exclusive_until_closed(tmp_path: Path) -> None:
    first = try_lock(tmp_path / "lock")
    assert first is not None
    assert try_lock(tmp_path / "lock") is None
    first.close()
    with locked(tmp_path / "lock"):
        assert try_lock(tmp_path / "lock") is None


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    results = ResultsFolder(tmp_path)
    with pytest.raises(ResultsError, match="holds files that are not results"):
        results.create()
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"Results of something else\n"])
def test_a_foreign_readme_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.txt").write_bytes(content)
    with pytest.raises(ResultsError, match=f"results_dir={tmp_path}"):
        ResultsFolder(tmp_path).check()


def test_tables_alone_are_results_too(tmp_path: Path) -> None:
    """As where somebody copied them to another machine, without the file that says whose they are."""
    for name in ("runs", "sequences"):
        (tmp_path / name).mkdir()
    ResultsFolder(tmp_path).check()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ResultsError, match="holds files that are not results"):
        ResultsFolder(tmp_path).check()


def test_a_file_is_refused_as_results_dir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="is a file"):
        ResultsFolder(tmp_path / "file").check()


def test_new_empty_cached_and_own_folders_are_accepted(tmp_path: Path) -> None:
    for name in ("new", "empty", "cached"):
        results = ResultsFolder(tmp_path / name)
        if name != "new":
            results.root.mkdir()
        if name == "cached":
            (results.root / "cache").mkdir()
        results.create()
        results.create()
        assert results.about.read_text().startswith("Results of sparse transcoder sweeps")


def test_create_marks_the_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after any step leaves a folder that the next run accepts."""
    results = ResultsFolder(tmp_path / "out")
    made: list[Path] = []
    real = Path.mkdir

    def mkdir(self: Path, *arguments: object, **options: object) -> None:
        real(self, *arguments, **options)  # type: ignore[arg-type]
        made.append(self)
        if len(made) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "mkdir", mkdir)
        results.create()
    results.create()


def test_checkpoint_steps_are_sorted_numbers(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    assert folder.checkpoint_steps() == []
    for step in (300, 20, 5):
        folder.checkpoint(step).mkdir(parents=True)
    assert folder.checkpoint_steps() == [5, 20, 300]


def test_remove_leftovers_takes_what_dead_writers_of_that_name_left(tmp_path: Path) -> None:
    kept = [".ab.x.tmp", "a", "a.tmp", ".a.x", ".a", "a.old"]
    for name in (*kept, ".a.x.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".a.y.old").mkdir()
    (tmp_path / ".a.y.old" / "file").touch()
    remove_leftovers(tmp_path, "a")
    assert names(tmp_path) == sorted(kept)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept[1:])
    remove_leftovers(tmp_path / "nothing")


def test_remove_leftovers_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".a.x.tmp").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(tmp_path / "folder")
    assert names(tmp_path / "elsewhere") == ["file"]
