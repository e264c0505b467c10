"""What a person reads: progress lines, plans and results in words."""

from typing import Any

import pytest

from sweep.launch.console import PlainLines, duration, line, readable, size
from sweep.progress import Snapshot


def test_lines_tell_progress_and_what_is_left(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report = PlainLines()
    report("start", 0, 0, "")
    report("train", 0, 400, "steps")
    for step in range(1, 401):
        clock.now += 1
        report("train", step, 400, "steps")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["start ...", "train: 0 of 400 steps", "train: 10 of 400 steps, 1/s, 6 min left"]
    assert lines[-1] == "train: 400 of 400 steps, 1/s"
    assert len(lines) == 2 + 40


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (Snapshot("load language model"), "load language model ..."),
        (Snapshot("tokenise", 10, 0, "tokens", 5.0), "tokenise: 10 tokens, 5/s"),
        (Snapshot("train", 1200, 4800, "steps", 2.5, 1440.0), "train: 1,200 of 4,800 steps, 2.5/s, 24 min left"),
    ],
)
def test_a_line_shows_what_is_known(at: Snapshot, text: str) -> None:
    assert line(at) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (120, "2 min"), (3600, "60 min"), (7200, "2.0 h")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_values_are_readable() -> None:
    assert (size(2**20), size(3 * 2**30)) == ("1 MiB", "3.0 GiB")
    assert [readable(value) for value in (0.123456, (1, 2), "x", None)] == ["0.1235", "[1, 2]", "x", "None"]
