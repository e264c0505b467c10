"""Which launcher is at which cells, as others see it. A launcher here is no more than the lock of its folder."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sweep.launch.claims import Claim, Others, claimed, living_claims
from sweep.locks import locked
from sweep.paths import LaunchFolder, ResultsFolder
from sweep.status import State, Status


@pytest.fixture
def results(tmp_path: Path) -> ResultsFolder:
    folder = ResultsFolder(tmp_path)
    folder.create()
    return folder


@contextmanager
def launcher(results: ResultsFolder, *cell_ids: str) -> Iterator[None]:
    """One that lives and has claimed cells; its death leaves the claim and no lock."""
    folder = LaunchFolder(results.sweeps / f"sweep.{'_'.join(cell_ids)}")
    with locked(folder.lock):
        Claim.of(cell_ids, results).write(folder)
        yield


def say(results: ResultsFolder, cell_id: str, state: State, attempts: int) -> None:
    results.cell(cell_id).root.mkdir(exist_ok=True)
    Status(state=state, attempts=attempts).write(results.cell(cell_id))


def refreshed(others: Others, clock: Any) -> Others:
    clock.now += 2
    others.refresh()
    return others


def test_a_claim_lives_as_long_as_its_launcher(results: ResultsFolder, clock: Any) -> None:
    with launcher(results, "three"):
        with launcher(results, "one", "two"):
            assert set(claimed(results)) == {"one", "two", "three"}
            others = Others(results, ["two", "three", "four"])
            assert [list(claim.starts) for claim in others.claims] == [["two"], ["three"]]
            assert others.left == {"four"}
        assert set(claimed(results)) == {"three"}
        assert not refreshed(others, clock).over
        assert others.left == {"two", "four"}
    assert refreshed(others, clock).over
    assert others.left == {"two", "three", "four"}


def test_looking_for_claims_leaves_no_file(results: ResultsFolder) -> None:
    folder = LaunchFolder(results.sweeps / "sweep.dead")
    folder.root.mkdir()
    Claim.of(["one"], results).write(folder)
    assert living_claims(results) == []
    assert [path.name for path in folder.root.iterdir()] == ["claim.json"]


@pytest.mark.parametrize("state", ["failed", "killed", "interrupted", "running"])
def test_only_an_error_since_the_claim_settles_a_cell(state: State, results: ResultsFolder, clock: Any) -> None:
    """What failed before was claimed to be tried again: if its launcher died before that, it still is to do."""
    for cell_id in ("old", "tried"):
        say(results, cell_id, "failed", attempts=3)
    with launcher(results, "old", "tried"):
        others = Others(results, ["old", "tried"])
        assert others.words == {"old": "waiting elsewhere", "tried": "waiting elsewhere"}
        say(results, "tried", state, attempts=4)
    assert refreshed(others, clock).left == ({"old"} if state in ("failed", "killed") else {"old", "tried"})


def test_a_cell_that_a_process_is_at_is_in_its_hands_until_it_has_a_row(results: ResultsFolder, clock: Any) -> None:
    """Such as a job that is saving because its launcher died."""
    say(results, "one", "running", attempts=1)
    with locked(results.cell("one").lock):
        others = Others(results, ["one"])
        assert not others.over
        assert others.left == set()
        assert others.words == {"one": "starting elsewhere"}
        results.row("runs", "one").touch()
        assert refreshed(others, clock).over
    assert refreshed(others, clock).left == set()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: "no json",
        lambda found: json.dumps([found]),
        lambda found: json.dumps({**found, "starts": {"one": "many"}}),
        lambda found: json.dumps({**found, "starts": ["one"]}),
        lambda found: json.dumps({key: found[key] for key in ("host", "pid")}),
    ],
)
def test_a_spoilt_claim_is_none(spoil: Callable[[Any], str], results: ResultsFolder) -> None:
    with launcher(results, "one"):
        (path,) = results.sweeps.glob("*/claim.json")
        path.write_text(spoil(json.loads(path.read_text())))
        assert living_claims(results) == []
