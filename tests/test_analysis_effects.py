"""What options did: which runs are compared, and the three improvements known by their values."""

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from commands import analysis
from hypothesis import given
from hypothesis import strategies as st
from make import make_cell, write_cell

from analysis.effects import FIELDS, Effect, Effects, effects
from analysis.effects_table import effects_text
from analysis.presets import has_preset, preset
from analysis.tables import load_table
from sweep.results import METRICS

LONG = {"steps": 3000, "batch_size": 64}


def found(root: Path) -> Effects:
    (group,) = effects(load_table(root, "runs").frame.collect())
    return group


def of(group: Effects, metric: str = "fvu") -> dict[tuple[str, str, str], Effect]:
    return {(e.option, e.from_value, e.to_value): e for e in group.effects if e.metric == metric}


def test_an_effect_is_the_mean_over_matched_pairs(tmp_path: Path):
    for i, (width, top_k, seed) in enumerate(itertools.product((64, 128), (4, 8), (0, 1))):
        fvu = 0.5 - 0.1 * (width == 128) - 0.05 * (top_k == 8) + 0.01 * (width == 128 and top_k == 8) + 0.02 * seed
        write_cell(tmp_path, f"c{i}", options={"dict_size": width, "top_k": top_k, "seed": seed}, fvu=fvu)
    group = found(tmp_path)
    assert group.unmatched == []
    effect = of(group)["dict_size", "64", "128"]
    assert (effect.n_pairs, effect.mean_from) == (4, pytest.approx(0.485))
    assert effect.change == pytest.approx(-0.095)  # -0.1 at top_k 4, -0.09 at 8
    half = 3.1824 * 0.005773502691896258 / 2
    assert (effect.low, effect.high) == (pytest.approx(-0.095 - half), pytest.approx(-0.095 + half))
    assert set(of(group)) == {("dict_size", "64", "128"), ("top_k", "4", "8")}


def test_options_that_change_together_have_no_effect_of_their_own(tmp_path: Path):
    write_cell(tmp_path, "aa", options={"dict_size": 64, "top_k": 4})
    write_cell(tmp_path, "bb", options={"dict_size": 128, "top_k": 8})
    group = found(tmp_path)
    assert (group.effects, group.unmatched) == ([], ["dict_size", "top_k"])
    assert "dict_size varies, but no two runs differ in it alone" in effects_text(group)


def test_runs_of_different_seeds_are_no_pair(tmp_path: Path):
    write_cell(tmp_path, "aa", options={"lr": 1e-3, "seed": 0})
    write_cell(tmp_path, "bb", options={"lr": 2e-3, "seed": 1})
    assert found(tmp_path).unmatched == ["lr"]


def test_what_follows_an_option_does_not_stand_in_its_way(tmp_path: Path):
    for i, options in enumerate([{"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-3, "dict_size": 100}]):
        write_cell(tmp_path, f"c{i}", options={**LONG, **options})
    assert set(of(found(tmp_path))) == {("lr", "0.001", "0.003"), ("dict_size", "64", "100")}


def test_other_fractions_are_another_option(tmp_path: Path):
    write_cell(tmp_path, "aa", options={"dict_size": 64, "groups": [32, 64]})
    write_cell(tmp_path, "bb", options={"dict_size": 128, "groups": [32, 128]})
    assert found(tmp_path).unmatched == ["dict_size", "groups"]
    write_cell(tmp_path, "cc", options={"dict_size": 64, "groups": [16, 64]})
    assert ("groups", "0.25,1*dict_size", "0.5,1*dict_size") in of(found(tmp_path))


def test_a_constant_rate_is_compared_with_a_falling_one(tmp_path: Path):
    write_cell(tmp_path, "aa", options={"decay": "constant"})
    write_cell(tmp_path, "bb", options={"decay": "linear"})
    assert ("decay", "constant", "linear") in of(found(tmp_path))


def test_every_value_is_compared_with_the_first(tmp_path: Path):
    for i, lr in enumerate((1e-2, 1e-3, 3e-3)):
        write_cell(tmp_path, f"c{i}", options={"lr": lr}, fvu=0.1 * (i + 1))
    group = of(found(tmp_path))
    assert list(group) == [("lr", "0.001", "0.003"), ("lr", "0.001", "0.01")]
    assert group["lr", "0.001", "0.01"].change == pytest.approx(-0.1)
    assert group["lr", "0.001", "0.01"].low is None


def test_a_value_the_first_has_no_pair_with_is_compared_with_the_next(tmp_path: Path):
    for i, (width, top_k) in enumerate([(64, 4), (128, 8), (256, 8)]):
        write_cell(tmp_path, f"c{i}", options={"dict_size": width, "top_k": top_k})
    group = found(tmp_path)
    assert (set(of(group)), group.unmatched) == ({("dict_size", "128", "256")}, ["top_k"])


def test_steps_follow_the_batch_size(tmp_path: Path):
    """As many passes over the text are preferred to as many steps."""
    for i, (batch, steps) in enumerate([(64, 32), (48, 42), (48, 32)]):
        write_cell(tmp_path, f"c{i}", options={"batch_size": batch, "steps": steps, "warmup_steps": 1}, fvu=0.1 * i)
    group = of(found(tmp_path))
    assert {key: (e.n_pairs, e.change) for key, e in group.items() if key[0] == "batch_size"} == {
        ("batch_size", "48", "64"): (1, pytest.approx(-0.1))
    }
    assert group["steps", "0.76*n_tokens/batch_size", "1*n_tokens/batch_size"].n_pairs == 1


def test_an_option_that_stays_as_it_is_does_not_vary(tmp_path: Path):
    for i, batch in enumerate((48, 64)):
        write_cell(tmp_path, f"c{i}", options={"batch_size": batch, "steps": 30, "warmup_steps": 1})
    group = found(tmp_path)
    assert (set(of(group)), group.unmatched) == ({("batch_size", "48", "64")}, [])


def test_more_text_is_compared_with_less(tmp_path: Path):
    for i, n_tokens in enumerate((2048, 4096)):
        options = {"n_tokens": n_tokens, "steps": n_tokens // 64, "warmup_steps": 0}
        write_cell(tmp_path, f"c{i}", options=options, tokens_hash=str(i) * 64)
    group = found(tmp_path)
    assert (set(of(group)), group.unmatched) == ({("n_tokens", "2048", "4096")}, [])


def test_a_metric_one_run_lacks_is_left_to_the_other_pairs(tmp_path: Path):
    for i, (lr, seed) in enumerate(itertools.product((1e-3, 2e-3), (0, 1))):
        write_cell(tmp_path, f"c{i}", options={"lr": lr, "seed": seed}, mse=None if i == 0 else float(i))
    group = found(tmp_path)
    assert {e.metric: e.n_pairs for e in group.effects}["fvu"] == 2
    assert {e.metric: e.n_pairs for e in group.effects}["mse"] == 1


def test_other_transcoders_and_unfinished_runs_take_no_part(tmp_path: Path):
    write_cell(tmp_path, "aa", options={"lr": 1e-3})
    write_cell(tmp_path, "bb", options={"lr": 2e-3}, kind="baseline")
    write_cell(tmp_path, "cc", options={"lr": 3e-3}, status="diverged")
    assert found(tmp_path).effects == []


CAPACITY = {"base": {"dict_size": 18432, "top_k": 96}, "improved": {"dict_size": 36864, "top_k": 128}}
SCHEDULE = {
    "base": {"lr": 4e-4, "warmup_fraction": 1 / 30, "decay": "constant", "betas": [0.9, 0.99]},
    "improved": {"lr": 5e-4, "warmup_steps": 200, "min_lr": 5e-7, "betas": [0.9, 0.99]},
}
REVIVAL = {
    "base": {"aux_penalty": 1 / 64, "top_k_aux": 256, "n_batches_to_dead": 20},
    "improved": {"aux_penalty": 1 / 128, "top_k_aux": 128, "n_batches_to_dead": 30},
}


@pytest.mark.parametrize(
    ("letter", "group", "typed"),
    [("A", "capacity", CAPACITY), ("B", "schedule", SCHEDULE), ("C", "revival", REVIVAL)],
)
def test_improvements_are_known_by_their_values(
    tmp_path: Path, letter: str, group: str, typed: dict[str, dict[str, Any]]
):
    """Typed one by one, absolute or relative, never as the preset."""
    for i, (name, options) in enumerate(typed.items()):
        write_cell(tmp_path, f"c{i}", options={**LONG, **options}, fvu=0.5 - 0.1 * i)
        row = {key: list(v) if isinstance(v, tuple) else v for key, v in make_cell(**LONG, **options).flat().items()}
        assert has_preset(row, preset(group, name))
        assert not has_preset(row, preset(group, "improved" if name == "base" else "base"))
    changes = found(tmp_path)
    effect = of(changes)[f"{letter} {group}", "base", "improved"]
    assert (effect.n_pairs, effect.change) == (1, pytest.approx(-0.1))
    assert changes.unmatched == []


def test_one_value_off_is_no_improvement(tmp_path: Path):
    write_cell(tmp_path, "aa", options=REVIVAL["base"])
    write_cell(tmp_path, "bb", options={**REVIVAL["improved"], "top_k_aux": 127})
    assert not any(e.option.startswith("C") for e in found(tmp_path).effects)


@given(steps=st.integers(2, 20_000), width=st.integers(8, 40_000))
def test_a_run_that_was_given_a_preset_has_it(steps: int, width: int):
    for group, name in itertools.product(("schedule", "revival"), ("base", "improved", "tuned")):
        options = {"steps": steps, "dict_size": width, "top_k": 4, **preset(group, name)}
        assert has_preset(make_cell(**options).flat(), preset(group, name))


def test_command_prints_json_csv_and_text(tmp_path: Path):
    for i, (lr, seed) in enumerate(itertools.product((1e-3, 2e-3), (0, 1))):
        write_cell(tmp_path, f"c{i}", options={"lr": lr, "seed": seed}, fvu=0.5 - 0.1 * (i > 1) + 0.001 * i)
    records = json.loads(analysis("effects", tmp_path, "--json").stdout)
    assert {record["option"] for record in records} == {"lr"}
    assert all(tuple(record) == FIELDS for record in records)
    assert {record["metric"] for record in records} <= {column.name for column in METRICS}
    lines = list(csv.DictReader(io.StringIO(analysis("effects", tmp_path, "--csv").stdout)))
    assert [line["metric"] for line in lines] == [record["metric"] for record in records]
    text = analysis("effects", tmp_path, "--metrics", "fvu").stdout
    assert "-0.098 ±" in text
    bad = analysis("effects", tmp_path, "--metrics", "fvu,speed")
    assert (bad.exit_code, bad.stdout) == (2, "")
    assert "--metrics speed: no such metric" in bad.stderr
