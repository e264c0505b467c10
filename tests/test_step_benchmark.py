"""The step benchmark: contenders learn, their encoder is found, rows say what they should."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import contest, step
from benchmarks.contenders import CONTENDERS
from benchmarks.peers import FOLDER, PEERS, python
from benchmarks.worker import EncoderTime, dead_latents, made_up

CASE = contest.Case(
    d=16, dict_size=512, top_k=8, batch=64, groups=(64, 512), dead_fraction=0.0, device="cpu", threads=1
)


@pytest.mark.parametrize("impl", CONTENDERS)
@pytest.mark.parametrize("dead_fraction", [0.0, 0.5])
def test_the_encoder_of_each_contender_is_seen_whole(impl: str, dead_fraction: float) -> None:
    case = replace(CASE, dead_fraction=dead_fraction)
    take, batch = CONTENDERS[impl](case), made_up(case)[0]
    take(*batch)
    with EncoderTime(case) as encoder:
        take(*batch)
    assert encoder.n_missing == 0
    assert encoder.seconds > 0


def test_dead_latents_are_as_many_as_asked_for_and_the_same_every_time() -> None:
    found = dead_latents(replace(CASE, dead_fraction=0.25))
    assert len(found.unique()) == 128
    assert torch.equal(found, dead_latents(replace(CASE, dead_fraction=0.25)))


def test_rows_of_a_run_and_a_contender_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "--shapes",
        "16x512x8x64",
        "--variants",
        "plain",
        "nested+0.5",
        "--impls",
        "sparse",
        "sae_lens",
        "--rounds",
        "2",
    ]
    monkeypatch.setattr(
        sys, "argv", ["step", *asked, "--threads", "1", "--peers", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    )
    missing = contest.Contender("missing", (sys.executable, "-c", "raise SystemExit('no such peer')"), CASE)
    found = step.contenders
    monkeypatch.setattr(step, "contenders", lambda *args: [*found(*args), missing])
    step.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    keys = ("impl", "groups", "dead_fraction", "rounds")
    assert [[row[key] for key in keys] for row in rows] == [
        ["floor", [512], 0.0, 2],
        ["sparse", [512], 0.0, 2],
        ["sparse", [64, 128, 256, 384, 512], 0.5, 2],
    ]
    for row in rows[1:]:
        assert (row["d"], row["dict_size"], row["top_k"], row["batch"], row["ratio"]) == (16, 512, 8, 64, 1.0)
        assert row["seconds"] > 0
        assert 0 < row["encoder_fraction"] < 1
        assert row["floor_fraction"] > 0
        assert 0 <= row["peak_mb"] < 100  # libraries are not counted
    captured = capsys.readouterr()
    assert "missing (d 16, nested) is left out: no such peer" in captured.err
    assert "sae_lens is missing: python -m benchmarks.peers build sae_lens" in captured.out


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("variant", ["plain", "nested+0.5"])
def test_a_peer_takes_steps_in_its_own_environment(name: str, variant: str) -> None:
    """Needs `python -m benchmarks.peers build`."""
    if not python(FOLDER, PEERS[name]).exists():
        pytest.skip(f"{name} is not built")
    commands = {name: step.command(name, FOLDER)}
    found = [
        one for one in step.contenders((16, 512, 8, 64), [variant], commands, "cpu", 1) if step.fits(one, quick=False)
    ]
    rows = step.rows_of(contest.contest(found, rounds=1))
    assert [row["impl"] for row in rows] == ["floor", name] if PEERS[name].nested or variant == "plain" else ["floor"]
    for row in rows[1:]:
        assert row["version"] in PEERS[name].requirements.read_text()
        assert 0 < row["encoder_fraction"] < 1
