"""Every preset composes to a valid cell, and the presets hold what they promise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sweep.config import Cell
from sweep.errors import ConfigError
from sweep.launch.compose import cells_of
from sweep.launch.help import help_text
from sweep.launch.register import register
from sweep.options import Workflow, cell_from_options, option_fields, workflow_from_options

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture(autouse=True, scope="module")
def hydra() -> Iterator[None]:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def options(*overrides: str) -> dict[str, Any]:
    container = OmegaConf.to_container(compose("config", list(overrides)), resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def cell(*overrides: str) -> Cell:
    return cell_from_options(options(*overrides))


def presets() -> list[str]:
    groups = ("capacity", "schedule", "revival", "model", "experiment")
    return [f"{group}={path.stem}" for group in groups for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize("preset", [*presets(), "data=docstrings", "data=fineweb-edu"])
def test_every_preset_composes_to_a_valid_cell(preset: str) -> None:
    assert cell(preset).cell_id


def test_data_file_needs_a_path(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    assert cell("data=file", f"dataset_path={tmp_path}/corpus.txt").data.dataset == "corpus.txt"


def test_data_hub_takes_any_dataset_and_pins_it() -> None:
    commit = "0123456789" * 4
    data = cell("data=hub", "dataset=someone/corpus", f"dataset_revision={commit}", "dataset_subset=de").data
    assert (data.dataset, data.dataset_revision, data.dataset_subset) == ("someone/corpus", commit, "de")
    with pytest.raises(ConfigError, match="needs a name; set dataset="):
        cell("data=hub", f"dataset_revision={commit}")
    with pytest.raises(ConfigError, match="is no commit: what someone/corpus holds could change"):
        cell("data=hub", "dataset=someone/corpus")


def test_defaults_give_a_value_to_every_option() -> None:
    assert set(options()) == {name for _, name, _, _ in option_fields()}
    workflow_from_options(options())


def test_seed_experiment_is_the_starting_point() -> None:
    seed = cell("experiment=seed")
    assert seed.capacity.groups == (2304, 4608, 9216, 13824, 18432)
    assert (seed.capacity.top_k, seed.model.model, seed.site.layer) == (96, "gemma-2-2b", 17)
    assert (seed.schedule.lr, seed.schedule.warmup_steps, seed.schedule.steps) == (4e-4, 500, 15_000)
    assert (seed.schedule.batch_size, seed.schedule.betas, seed.data.seq_len) == (1024, (0.9, 0.99), 128)
    revival = seed.revival
    assert (revival.aux_penalty, revival.top_k_aux, revival.n_batches_to_dead) == (1 / 64, 256, 20)


def test_improved_experiment_changes_exactly_options_a_b_and_c() -> None:
    seed, improved = cell("experiment=seed").flat(), cell("experiment=improved").flat()
    changed = {name: improved[name] for name in seed if seed[name] != improved[name]}
    assert changed.pop("groups") == (4608, 9216, 18432, 27648, 36864)
    assert changed.pop("min_lr") == pytest.approx(5e-7)
    assert changed == {
        "dict_size": 36864, "top_k": 128,
        "lr": 5e-4, "warmup_steps": 1000, "decay": "linear",
        "aux_penalty": 1 / 128, "top_k_aux": 128, "n_batches_to_dead": 30,
    }  # fmt: skip


def test_smoke_experiment_sets_its_own_values() -> None:
    smoke = cell("experiment=smoke")
    assert (smoke.model.model, smoke.schedule.steps, smoke.data.n_tokens) == ("tiny", 30, 2048)


def test_experiment_gives_way_to_the_command_line() -> None:
    assert cell("experiment=improved", "model=tiny", "dict_size=64", "top_k=4").model.model == "tiny"


def test_no_preset_repeats_the_default_it_overrides() -> None:
    """No default is written twice: each value of a preset differs from the preset it builds on."""
    for path in CONF.glob("*/*.yaml"):
        raw = OmegaConf.load(path)
        bases = [base for base in raw.get("defaults", []) if isinstance(base, str) and base != "_self_"]
        for base in bases:
            other = OmegaConf.load(path.with_name(f"{base}.yaml"))
            repeated = [key for key in raw if key != "defaults" and key in other and other[key] == raw[key]]
            assert not [key for key in repeated if key != "dataset_revision"], f"{path} repeats {repeated} of {base}"


def test_no_preset_sets_a_workflow_key() -> None:
    """Workflow keys are the same for all cells, so a preset that sets one could not be swept."""
    workflow = {name for kind, name, _, _ in option_fields() if kind is Workflow}
    for path in (path for path in CONF.glob("*/*.yaml")):
        assert not workflow & set(OmegaConf.load(path)), path


def test_help_names_every_option_with_its_value() -> None:
    text = help_text(_root_=compose("config", ["top_k=77"]))
    for _, name, _, metadata in option_fields():
        assert f"{name}=" in text
        assert metadata["doc"].split()[0] in text
    assert "top_k=77" in text
    assert "tiny" in text
    assert "Exit codes" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize(("experiment", "origin"), [("options", "base"), ("options-tuned", "tuned")])
def test_options_experiment_is_every_combination_of_a_b_and_c(experiment: str, origin: str) -> None:
    GlobalHydra.instance().clear()
    _, found = cells_of([f"experiment={experiment}", "model=tiny"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        wanted = [
            cell("model=tiny", f"capacity={a}", f"schedule={b}", f"revival={c}")
            for a in ("base", "improved")
            for b in (origin, "improved")
            for c in (origin, "improved")
        ]
    assert {one.cell_id for one in found} == {one.cell_id for one in wanted}
    assert len(found) == 8


@pytest.mark.parametrize(
    ("words", "n_cells"),
    [(["seed=range(0,1000000000)"], "1,000,000,000"), (["lr=range(0.0,1.0,1e-9)"], "1,000,000,000")],
)
def test_a_grid_that_fits_no_memory_is_refused_before_it_is_made(words: list[str], n_cells: str) -> None:
    with pytest.raises(ConfigError, match=f"asks for {n_cells} cells; choose at most 100,000"):
        cells_of(words)
