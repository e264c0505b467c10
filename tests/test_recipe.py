"""The recipe benchmark: every recipe learns and starts as it says, rates are walked on the calibration split alone."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell

from benchmarks import recipe, recipes, trainee
from benchmarks.embedded import cell_of, prepare
from benchmarks.peers import FOLDER, PEERS, python
from sweep.step.update import update_
from sweep.transcoder import Parameters

SMOKE = ("experiment=smoke", "lr=1e-2")
SHORT = ("experiment=smoke", "steps=8")
PLACE = recipes.Place(n_threads=1, peers=FOLDER)
OWN = [name for name, each in recipes.RECIPES.items() if each.peer is None]
THEIRS = [name for name, each in recipes.RECIPES.items() if each.peer is not None]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def learns(name: str, cache: Path) -> None:
    """The calibration FVU falls from the 2nd step to the last."""
    cell = cell_of([*recipes.RECIPES[name].options, *SMOKE])
    stream = prepare([cell], cache).stream
    row, _ = recipe.measure(recipes.RECIPES[name], cell, stream, PLACE)
    short = cell_of([*recipes.RECIPES[name].options, *SMOKE, "steps=2"])
    before, _ = recipe.measure(recipes.RECIPES[name], short, stream, PLACE)
    assert row["calibration_fvu"] < before["calibration_fvu"]


@pytest.mark.parametrize("name", OWN)
def test_every_recipe_of_our_own_environment_learns(name: str, cache: Path) -> None:
    learns(name, cache)


@pytest.mark.peers
@pytest.mark.parametrize("name", THEIRS)
def test_every_recipe_of_a_peer_learns_from_the_batches_it_is_sent(name: str, cache: Path) -> None:
    peer = PEERS[str(recipes.RECIPES[name].peer)]
    if not python(FOLDER, peer).exists():
        pytest.skip(f"{peer.name} is missing: python -m benchmarks.peers build {peer.name}")
    learns(name, cache)


def test_several_runs_at_once_each_get_the_cell_they_ask_for() -> None:
    with ThreadPoolExecutor(4) as pool:
        cells = list(pool.map(lambda seed: cell_of([*recipe.QUICK, f"seed={seed}"]), range(8)))
    assert [cell.seed for cell in cells] == list(range(8))


LOSSES = st.lists(st.one_of(st.none(), st.floats(0.1, 0.9)), min_size=1, max_size=9)


@given(LOSSES)
def test_the_walk_ends_where_no_neighbour_it_may_go_to_is_better(losses: list[float | None]) -> None:
    asked: list[int] = []

    def score(rate: float) -> float | None:
        asked.append(int(rate))
        return losses[int(rate)]

    at = recipe.walk([float(i) for i in range(len(losses))], score)
    known = {i: loss for i in asked if (loss := losses[i]) is not None}
    if at is None:
        assert not known
    else:
        assert known[int(at)] == min(known.values())


@pytest.mark.parametrize("best", range(7))
def test_the_walk_finds_the_best_of_losses_that_fall_and_rise(best: int) -> None:
    asked: list[float] = []

    def score(rate: float) -> float:
        asked.append(rate)
        return abs(rate - best)

    assert recipe.walk([float(i) for i in range(7)], score) == best
    assert len(set(asked)) <= abs(best - 3) + 3


def test_the_walk_goes_down_past_rates_that_diverge() -> None:
    assert recipe.walk([1.0, 2.0, 3.0, 4.0, 5.0], lambda rate: None if rate > 1 else 0.5) == 1.0


def test_rows_of_a_comparison_that_is_resumed_and_one_peer_that_is_missing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, table = tmp_path / "recipe.jsonl", tmp_path / "table.json"
    asked = ["--recipes", "simple", "sparsify", "--changes", "aux_penalty=0", "--rates", "1e-3", "1e-2"]
    where = ["--cache", str(cache), "--peers", str(tmp_path), "--runs", str(runs), "--json", str(table)]
    monkeypatch.setattr(sys, "argv", ["recipe", *asked, "--seeds", "2", "--rows", "1", *where, *SHORT])
    recipe.main()
    captured = capsys.readouterr().out
    assert "sparsify is missing: python -m benchmarks.peers build sparsify" in captured
    rows = {row["recipe"]: row for row in json.loads(table.read_text())}
    assert list(rows) == ["simple", "ours, aux_penalty=0"]
    found = [json.loads(line) for line in runs.read_text().splitlines()]
    for name, row in rows.items():
        tried = [run for run in found if run["recipe"] == name and run["kind"] == "run" and run["seed"] == 0]
        assert row["lr"] == min(tried, key=lambda run: run["calibration_fvu"])["lr"]
        scored = [run["fvu"] for run in found if run["recipe"] == name and run["kind"] == "score"]
        assert row["fvu"] == pytest.approx(sum(scored) / 2)
        assert row["n_seeds"] == len(scored) == 2
        assert row["fvu_half_width"] > 0

    lines = runs.read_text()
    runs.write_text(lines + '{"recipe": "ours", "opt')  # killed while it wrote
    monkeypatch.setattr(recipe, "measure", None)  # nothing is run again
    recipe.main()
    assert runs.read_text() == lines
    assert {row["recipe"]: row for row in json.loads(table.read_text())} == rows


def test_held_out_rows_are_seen_once_rates_are_chosen(cache: Path) -> None:
    cell = cell_of(SMOKE)
    stream = prepare([cell], cache).stream
    splits: list[str] = []
    read = stream.blocks.read

    def watched(split: str, *args: object) -> object:
        splits.append(split)
        return read(split, *args)  # type: ignore[arg-type]

    stream.blocks = SimpleNamespace(read=watched, count=stream.blocks.count)  # type: ignore[assignment]
    recipe.measure(recipes.RECIPES["ours"], cell, stream, PLACE)
    assert set(splits) == {"train", "calibration"}


class Means:
    """A trainee that writes the mean of the targets."""

    def __init__(self, task: trainee.Task) -> None:
        self.task, self.sum = task, torch.zeros(task.d_out)

    def step(self, source: torch.Tensor, target: torch.Tensor) -> None:
        assert source.shape == (self.task.batch_size, self.task.d_in)
        self.sum += target.mean(0) / len(self.task.rates)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"b_dec": self.sum}


def test_a_trainee_gets_every_batch_and_leaves_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"d_in": 3, "d_out": 2, "dict_size": 4, "top_k": 1, "batch_size": 5, "groups": [4], "rates": [1e-3, 5e-4]}
    task |= {"lr": 1e-3, "n_batches_to_dead": 1, "seed": 0, "n_threads": torch.get_num_threads()}
    task |= {"path": str(tmp_path / "out.pt")}
    batches = torch.randn(2, 5, 5)
    data = b"".join(part.contiguous().numpy().tobytes() for batch in batches for part in batch.split([3, 2], dim=1))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(json.dumps(task).encode() + b"\n" + data)))
    trainee.serve(Means)
    assert torch.allclose(torch.load(tmp_path / "out.pt")["b_dec"], batches[:, :, 3:].mean((0, 1)))
    cut = io.BytesIO(json.dumps(task).encode() + b"\n" + data[:-1])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=cut))
    with pytest.raises(SystemExit, match="before the last batch"):
        trainee.serve(Means)


def test_zero_decoder_predicts_the_mean_and_tied_encoder_is_the_decoder_transposed() -> None:
    cell = make_cell()
    source, target = torch.randn(128, 32), torch.randn(128, 32)
    zero = recipes.from_zero_decoder(source, target, cell)
    assert not zero.params.W_dec.any()
    assert torch.allclose(zero.params.b_dec, target.mean(0) * zero.target_scale)
    assert float(((source * zero.source_scale) @ zero.params.W_enc + zero.params.b_enc).mean(0).abs().max()) < 1e-5
    tied = recipes.from_tied(source, target, cell).params
    assert torch.equal(tied.W_enc, tied.W_dec.T)
    assert torch.allclose(tied.W_dec.norm(dim=1), torch.ones(64))


def test_free_adam_is_ours_where_no_row_is_constrained() -> None:
    source, target = torch.randn(128, 32), torch.randn(128, 32)
    ours, free = (recipes.from_data(source, target, make_cell()) for _ in range(2))
    gradients = ours.params.map(torch.randn_like)
    update_(ours, Parameters(*(tensor.clone() for tensor in gradients.tensors())), 1e-2, (0.9, 0.999))
    recipes.adam_free_(free, gradients, 1e-2, (0.9, 0.999))
    for name in ("W_enc", "b_enc", "b_dec"):
        assert torch.allclose(getattr(ours.params, name), getattr(free.params, name), atol=1e-6)
