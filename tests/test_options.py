"""Options become cells: resolution, identity, and every problem named with key, value and fix."""

import dataclasses
import json
import math
import re
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import NO_BASELINES, make_cell, make_options

from sweep.config import HOOKS, Cell, as_json, cell_from_json, is_of
from sweep.errors import ConfigError
from sweep.options import Workflow, cell_from_options, option_fields, options_schema, workflow_from_options


def problems(**overrides: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        make_cell(**overrides)
    return caught.value.problems


def test_relative_values_are_resolved() -> None:
    cell = make_cell(dict_size=64, steps=200, warmup_fraction=0.1, lr=1e-2, min_lr_fraction=0.5)
    assert cell.capacity.groups == (8, 16, 32, 48, 64)
    assert cell.schedule.warmup_steps == 20
    assert cell.schedule.min_lr == 5e-3


def test_a_narrow_dictionary_has_fewer_prefixes() -> None:
    assert make_cell(dict_size=4, top_k=1).capacity.groups == (1, 2, 3, 4)
    assert make_cell(dict_size=1, top_k=1).capacity.groups == (1,)


def test_constant_schedules_have_no_min_lr_of_their_own() -> None:
    cells = [make_cell(decay="constant", min_lr=min_lr) for min_lr in (0.0, 1e-4, None)]
    assert len({cell.cell_id for cell in cells}) == 1
    assert cells[0].schedule.min_lr == cells[0].schedule.lr


def test_absolute_values_win() -> None:
    cell = make_cell(dict_size=64, groups=[10, 64], warmup_steps=3, min_lr=0.0, steps=7)
    assert (cell.capacity.groups, cell.schedule.warmup_steps) == ((10, 64), 3)
    assert (cell.schedule.min_lr, cell.schedule.steps) == (0.0, 7)


def test_steps_follow_from_tokens_and_epochs() -> None:
    assert make_cell(steps=None, n_tokens=2048, epochs=3.0, batch_size=64).schedule.steps == 96


def test_relative_and_absolute_spellings_are_one_cell() -> None:
    assert make_cell(steps=100, warmup_fraction=0.1).cell_id == make_cell(steps=100, warmup_steps=10).cell_id
    assert make_cell(layer=1, hook_in="blocks.1.mlp.hook_in").cell_id == make_cell(layer=1).cell_id


def test_cell_id_is_ten_hex_digits_and_stable_across_processes() -> None:
    cell = make_cell()
    assert re.fullmatch("[0-9a-f]{10}", cell.cell_id)
    assert cell_from_json(as_json(cell)).cell_id == cell.cell_id


SCIENCE: dict[str, Any] = {
    "dict_size": 128, "top_k": 5, "activation": "top_k", "groups": [64], "lr": 1e-4, "steps": 31, "batch_size": 32,
    "warmup_steps": 1, "decay": "cosine", "min_lr": 1e-6, "betas": [0.8, 0.99], "aux_penalty": 0.5, "top_k_aux": 8,
    "n_batches_to_dead": 7, "model_revision": "2", "layer": 2, "hook_in": "resid_mid", "hook_out": "resid_mid",
    "seq_len": 64, "n_tokens": 4096, "n_calibration_tokens": 256, "n_heldout_tokens": 256, "data_seed": 1, "seed": 1,
    "activation_dtype": "bfloat16", "model_dtype": "bfloat16", "step_dtype": "bfloat16", "skip": True,
    "rate_by_spread": True, "centre_source": True, "refit_iterations": 3, "prefix_weight": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("key", SCIENCE)
def test_cell_id_changes_with_every_scientific_option(key: str) -> None:
    assert make_cell(**{key: SCIENCE[key]}).cell_id != make_cell().cell_id


def test_cell_id_ignores_facts_about_the_model() -> None:
    assert make_cell(n_body_params=1).cell_id == make_cell().cell_id


def test_every_identity_option_is_in_the_identity_and_nothing_else() -> None:
    expected = {name for kind, name, _, meta in option_fields() if meta["identity"] and kind not in (Workflow,)}
    relative = {"group_fractions", "warmup_fraction", "min_lr_fraction", "epochs"}
    assert set(make_cell().flat(identity_only=True)) == expected - relative


def test_workflow_is_no_part_of_a_cell() -> None:
    assert not {f.name for f in dataclasses.fields(Workflow)} & set(make_cell().flat())


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_cell_exists_exactly_when_top_k_fits(dict_size: int, top_k: int) -> None:
    options = make_options(dict_size=dict_size, top_k=top_k, groups=[dict_size])
    if top_k <= dict_size:
        assert cell_from_options(options).capacity.top_k == top_k
    else:
        with pytest.raises(ConfigError, match=f"top_k={top_k} exceeds dict_size={dict_size}"):
            cell_from_options(options)


@given(
    st.floats(1e-6, 1), st.floats(0, 1), st.integers(1, 10_000), st.floats(0, 1),
    st.sampled_from(["linear", "cosine", "constant"]),
)  # fmt: skip
def test_a_cell_survives_json(lr: float, fraction: float, steps: int, warmup: float, decay: str) -> None:
    cell = make_cell(lr=lr, min_lr_fraction=fraction, steps=steps, warmup_fraction=warmup, decay=decay)
    again = cell_from_json(as_json(cell))
    assert again == cell
    assert again.cell_id == cell.cell_id


@pytest.mark.parametrize(
    ("hint", "fits", "others"),
    [
        (int, 3, (3.0, True, "3", None)),
        (float, 3, (True, "3", None, [3.0])),
        (str, "a", (1, None, ["a"])),
        (str | None, None, (1, ["a"])),
        (tuple[int, ...], (1, 2), ([1, 2], (1, 2.0), (1, "2"), 1)),
        (Literal["a", "b"], "a", ("c", None, ["a"], {})),
    ],
)
def test_a_config_on_disk_holds_the_types_of_its_options(hint: Any, fits: Any, others: tuple[Any, ...]) -> None:
    assert is_of(fits, hint)
    assert not any(is_of(other, hint) for other in others)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dict_size": 0, "groups": [1]}, "dict_size=0 must be at least 1"),
        ({"top_k": 99999}, "top_k=99999 exceeds dict_size=64; choose at most 64"),
        ({"groups": [8, 8, 64]}, r"groups=\[8, 8, 64\] must increase"),
        ({"groups": [8, 32]}, "end at dict_size=64"),
        ({"groups": []}, "must increase"),
        ({"prefix_weight": -0.5}, "prefix_weight=-0.5 must lie between 0 and 1000"),
        ({"prefix_weight": 1e308}, "prefix_weight=1e"),
        ({"steps": -5}, "steps=-5 must be at least 1"),
        ({"steps": None, "n_tokens": 10}, "steps=0 must be at least 1"),
        ({"lr": float("nan")}, "lr=nan must be a positive number"),
        ({"lr": 0.0}, "lr=0.0 must be"),
        ({"min_lr": 1.0}, "min_lr=1.0 must lie between 0 and lr=0.003"),
        ({"warmup_steps": 31}, "warmup_steps=31 is too long for steps=30; choose at most 29"),
        ({"betas": [0.9]}, r"betas=\[0.9\] must be two numbers"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"aux_penalty": float("inf")}, "aux_penalty=inf"),
        ({"top_k_aux": 0}, "top_k_aux=0 must be at least 1"),
        ({"activation": "relu"}, "activation=relu is not a choice; choose one of batch_top_k, top_k"),
        ({"decay": "exp"}, "decay=exp is not a choice"),
        ({"layer": 3}, "layer=3 does not exist: tiny has layers 0 to 2"),
        ({"layer": -1}, "layer=-1 does not exist"),
        ({"hook_in": "mlp_in"}, "hook_in=mlp_in has two meanings"),
        ({"hook_in": "nonsense"}, "hook_in=nonsense is not a hook; choose one of norm_out"),
        ({"hook_out": "blocks.7.hook_mlp_out"}, "names a layer that does not exist"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"n_tokens": 0}, "n_tokens=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**63}, "is too large"),
        ({"group_fractions": [0.5, 2.0]}, "group_fractions"),
        ({"warmup_fraction": 1.5}, "warmup_fraction=1.5 must be between 0 and 1"),
        ({"epochs": 0.0}, "epochs=0.0 must be a positive number"),
        ({"model_path": "/nowhere"}, "model_path=/nowhere is not a model directory"),
        ({"dataset_path": "/nowhere.txt"}, "dataset_path=/nowhere.txt is not a file"),
        ({"dataset_format": "file"}, "set dataset_path="),
        ({"dataset_format": "hub"}, "set dataset_revision="),
        ({"model_revision": None}, "model_revision: not known for model=tiny"),
        ({"model_format": "hub", "model_revision": "main"}, "model_revision=main is no commit"),
        ({"dataset_format": "hub", "dataset_revision": "main"}, "dataset_revision=main is no commit"),
        ({"dataset_format": "hub", "dataset": "../near", "dataset_revision": "0" * 40}, "not the name of a dataset"),
        ({"model_format": "hub", "model_repo": "../near", "model_revision": "0" * 40}, "not the name of a repository"),
        ({"model": "../up"}, "model=../up is not a plain name"),
        ({"model": "x" * 300}, "is not a plain name"),
        ({"model_revision": "../../up"}, "model_revision=../../up is no commit"),
        ({"text_column": "a\0b"}, r"text_column='a\\x00b' holds control characters"),
        ({"text_column": "\ud800"}, "holds control characters"),
        ({"hook_in": "blocks.\u00b2.mlp.hook_in"}, "is not a hook"),
        ({"hook_in": f"blocks.{'9' * 5000}.mlp.hook_in"}, "is not a hook"),
    ],
)
def test_a_bad_option_is_named_with_its_value(overrides: dict[str, Any], message: str) -> None:
    assert any(re.search(message, problem) for problem in problems(**overrides))


def test_all_problems_of_a_cell_are_listed() -> None:
    found = problems(top_k=100, lr=-1.0, layer=9)
    assert {problem.split("=")[0] for problem in found} >= {"top_k", "lr", "layer"}


def test_hooks_resolve_to_full_names() -> None:
    assert make_cell(layer=2).site.hook_names == ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    assert make_cell(layer=0, hook_out="blocks.2.hook_mlp_out").site.deepest_layer == 2
    assert set(HOOKS) == {"norm_out", "norm_unit", "resid_mid", "mlp_out"}


def test_model_path_facts_are_read_off_the_directory(tiny_folder: Any) -> None:
    cell = make_cell(model_path=str(tiny_folder), n_layers=99, d_in=1, d_out=1)
    assert (cell.model.model_format, cell.model.n_layers, cell.model.d_in, cell.model.d_out) == ("directory", 3, 32, 32)
    assert cell.model.model == tiny_folder.name
    assert re.fullmatch("[0-9a-f]{64}", cell.model.model_revision)


def test_model_path_is_not_identity_but_content_is(tiny_folder: Any, tmp_path: Any) -> None:
    import shutil

    first = shutil.copytree(tiny_folder, tmp_path / "a" / "net")
    second = shutil.copytree(tiny_folder, tmp_path / "b" / "net")
    assert make_cell(model_path=str(first)).cell_id == make_cell(model_path=str(second)).cell_id
    third = shutil.copytree(tiny_folder, tmp_path / "c" / "net")
    config = json.loads((third / "config.json").read_text())
    (third / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert make_cell(model_path=str(first)).cell_id != make_cell(model_path=str(third)).cell_id


def test_dataset_file_is_identified_by_content(tmp_path: Any) -> None:
    def cell(folder: str, text: str) -> Cell:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "corpus.txt").write_text(text)
        return make_cell(dataset_path=str(tmp_path / folder / "corpus.txt"))

    assert cell("a", "one").cell_id == cell("b", "one").cell_id
    assert make_cell(dataset_path=str(tmp_path / "a" / "corpus.txt")).cell_id != cell("c", "two").cell_id


def test_options_schema_holds_every_option_once() -> None:
    names = [name for _, name, _, _ in option_fields()]
    assert len(names) == len(set(names))
    assert [f.name for f in dataclasses.fields(options_schema())] == names


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"device": "tpu"}, "device=tpu is not a device"),
        ({"baselines_dir": "google"}, "baselines_dir=google has nobody to read it; add baselines=gemma_scope"),
        ({"checkpoint_steps": -1}, "checkpoint_steps=-1 must be at least 0"),
        ({"checkpoint_minutes": math.nan}, "checkpoint_minutes=nan must be at least 0"),
        ({"device": "cuda:\u00b2"}, "is not a device"),
        ({"results_dir": ""}, "results_dir is empty"),
        ({"results_dir": "a\x1bb"}, "results_dir='a.x1bb' holds control characters"),
        ({"baselines_revision": "/"}, "baselines_revision=/ is no commit"),
        *(
            ({"baselines_l0": l0}, "baselines_l0=.*is no L0; choose all, lowest")
            for l0 in ("", "most", "nearest:", "-3")
        ),
    ],
)
def test_a_bad_workflow_value_is_named(overrides: dict[str, Any], message: str) -> None:
    values = {"results_dir": "out", "cache_dir": "cache", "cache_gib": 1.0, "dry_run": False, "checkpoint_steps": 10}
    with pytest.raises(ConfigError, match=message):
        fixed = {
            "checkpoint_minutes": 5.0,
            "keep_checkpoints": False,
            "n_contexts": 0,
            "n_causal_rows": 0,
            "device": "cpu",
            "wait": True,
            "hang_minutes": 0.0,
            "retry": "all",
        } | NO_BASELINES
        workflow_from_options(values | fixed | overrides)
