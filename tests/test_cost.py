"""What a plan says a sweep costs: held against what was measured, and against what a job then does."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from gangs import make_workflow, run_cells
from gemma_scope import random_arrays, write_first
from make import make_cell, make_site

from sweep.cached import Cached, Processor
from sweep.config import Cell
from sweep.launch.beside import baselines_of
from sweep.launch.compose import cells_of
from sweep.launch.console import activations, in_turn
from sweep.launch.cost import Beside, Cost, Setting, gang_cost, training_flops
from sweep.launch.jobs import divide
from sweep.launch.launch import times
from sweep.launch.machine import Slot
from sweep.paths import CacheFolder
from sweep.tokens import row_counts

CPU = Processor(gpu=False, n_threads=torch.get_num_threads())
GPU = replace(CPU, gpu=True)
NO_CACHE = Cached(CacheFolder(Path("/nonexistent")), ())
EMPTY = Setting(NO_CACHE, CPU, cache_gib=8)
QUIET_FLOPS = 185e9
"""What two quiet cores gave when the README's sweeps were timed."""


def everything_there(setting: Setting) -> Setting:
    """The same with a cache that has all it is asked for."""

    class Full(Cached):
        def has_model(self, *_: Any) -> bool:
            return True

        has_tokens = has_model

        def n_blocks(self, *_: Any) -> Any:
            return dict.fromkeys(("train", "calibration", "heldout"), 1 << 20)

    return replace(setting, cached=Full(NO_CACHE.folder, ()))


def readme_gang(*grid: str) -> list[Cell]:
    return cells_of(grid)[1]


@pytest.mark.parametrize(
    ("grid", "cached", "minutes", "gigabytes"),
    [
        (("dict_size=4608,9216", "top_k=32,64"), False, 9 + 4 / 60, 4.2),
        (("dict_size=18432,36864", "top_k=96,128"), True, 13 + 45 / 60, 6.9),
    ],
)
def test_estimates_of_the_readme_sweeps_are_near_what_was_measured(
    grid: Sequence[str], cached: bool, minutes: float, gigabytes: float
) -> None:
    setting = replace(everything_there(EMPTY) if cached else EMPTY, n_causal_rows=8)
    cost = gang_cost(readme_gang(*grid), setting)
    assert minutes / 1.3 < cost.seconds(QUIET_FLOPS) / 60 < 1.3 * minutes
    assert gigabytes / 1.15 < cost.memory_bytes / 1e9 < 1.15 * gigabytes


def test_no_more_rows_are_spliced_than_there_are() -> None:
    cell = make_cell()
    there = row_counts(cell.data)["heldout"]
    few, all_rows, more = (gang_cost([cell], replace(EMPTY, n_causal_rows=n)) for n in (1, there, 100 * there))
    assert few.evaluation_flops < all_rows.evaluation_flops == more.evaluation_flops


def test_a_cell_that_is_done_costs_no_step() -> None:
    done = replace(EMPTY, done=frozenset([make_cell().cell_id]))
    assert gang_cost([make_cell()], done).training_flops == 0
    assert gang_cost([make_cell(), make_cell(seed=1)], done).training_flops == training_flops(make_cell())
    data = make_cell().data
    heldout = -(-data.n_heldout_tokens // (data.seq_len - 1)) * data.seq_len
    assert gang_cost([make_cell()], done).language_model_tokens == heldout


def test_a_gang_costs_one_pass_and_each_cell_its_training() -> None:
    alone, together = gang_cost([make_cell()], EMPTY), gang_cost([make_cell(seed=seed) for seed in range(4)], EMPTY)
    assert together.language_model_tokens == alone.language_model_tokens
    assert together.training_flops == 4 * alone.training_flops == 4 * training_flops(make_cell())


def test_training_is_counted_by_the_encoders_product() -> None:
    assert training_flops(make_cell(dict_size=64, steps=10, batch_size=64)) == 10 * 64 * 2 * 64 * 32
    refitted = make_cell(dict_size=64, steps=10, batch_size=64, refit_iterations=2)
    assert training_flops(refitted) == 20 * 64 * 2 * 64 * 32


@pytest.mark.parametrize(
    ("steps", "cache_gib", "refit"), [(1, 1.0, 0), (70, 1.0, 1), (101, 1.0, 0), (101, 0.0, 0), (101, 0.0, 1)]
)
def test_tokens_are_those_a_job_sends_through_the_language_model(
    steps: int, cache_gib: float, refit: int, tmp_path: Path, cache: CacheFolder
) -> None:
    budgets: dict[str, Any] = {"n_tokens": 6200, "n_calibration_tokens": 300, "n_heldout_tokens": 600}
    cell = make_cell(steps=steps, dict_size=16, refit_iterations=refit, **budgets)
    own = CacheFolder(tmp_path / "cache")
    (own.root / "models").mkdir(parents=True)
    for path in (cache.root / "models").glob("tiny-1*"):
        (own.root / "models" / path.name).symlink_to(path)
    workflow = make_workflow(tmp_path / "out", own, cache_gib=cache_gib)
    setting = Setting(Cached.look(own), CPU, cache_gib)
    cost = gang_cost([cell], setting)
    results = run_cells([cell], workflow)
    seen = pl.read_parquet(results.row("runs", cell.cell_id))["n_language_model_tokens"].item()
    # The stream reads the first window once more, for scales and initial weights, where nothing keeps it.
    assert cost.language_model_tokens == pytest.approx(seen, abs=8 * 16 * 32 if cache_gib == 0 else 0)

    again = gang_cost([replace(cell, seed=7)], replace(setting, cached=Cached.look(own)))
    assert again.tokenised_tokens == 0
    if cache_gib:
        assert (again.language_model_tokens, activations(again)) == (0, "cached")
        assert again.cached_tokens == seen
        other = replace(setting, cached=Cached.look(own), processor=replace(CPU, n_threads=CPU.n_threads + 1))
        assert gang_cost([cell], other).language_model_tokens == seen
        bf16 = replace(cell, data=replace(cell.data, activation_dtype="bfloat16"))
        assert gang_cost([bf16], other).cached_tokens == 0
    else:
        assert again.language_model_tokens == cost.language_model_tokens
        assert "again in each epoch" in activations(again)


def test_the_language_model_takes_memory_once_per_job_and_only_where_it_runs() -> None:
    def bytes_of(n: int, setting: Setting) -> float:
        return gang_cost([make_cell(seed=seed) for seed in range(n)], setting).memory_bytes

    cell_bytes = 4 * 4 * make_cell().n_train_params
    for setting in (EMPTY, everything_there(EMPTY), replace(EMPTY, processor=GPU)):
        assert bytes_of(3, setting) - bytes_of(2, setting) == cell_bytes
    model_bytes = bytes_of(2, EMPTY) - bytes_of(2, everything_there(EMPTY))
    assert model_bytes > 4 * make_cell().model.n_body_params
    assert bytes_of(3, EMPTY) - bytes_of(3, everything_there(EMPTY)) == model_bytes


def test_gangs_are_divided_so_that_every_job_fits_with_its_own_language_model() -> None:
    gang = [replace(cell, seed=seed) for cell in readme_gang("dict_size=36864") for seed in range(6)]
    room = 6 * 2**30
    jobs = divide([gang], [Slot(None, 2, room)], lambda cells: gang_cost(cells, EMPTY).memory_bytes, training_flops)
    assert [len(job.cells) for job in jobs] == [3, 3]
    assert all(job.memory_bytes <= room < gang_cost([*job.cells, gang[0]], EMPTY).memory_bytes for job in jobs)
    first, second = times(jobs, [gang_cost(job.cells, EMPTY) for job in jobs], QUIET_FLOPS)
    assert first > second + 81_920 / 1000  # which makes the activations that the other reads


def test_the_dense_step_of_a_gpu_holds_batch_times_dict_size() -> None:
    narrow, wide = (replace(make_cell(), schedule=replace(make_cell().schedule, batch_size=n)) for n in (64, 4096))
    for setting, least in ((replace(EMPTY, processor=GPU), 4096 * 64 * 4 * 5), (EMPTY, 0)):
        grown = gang_cost([wide], setting).memory_bytes - gang_cost([narrow], setting).memory_bytes
        assert grown > least


def test_baselines_count_with_their_evaluation_memory_and_pass(tmp_path: Path) -> None:
    for l0 in (4, 8):
        write_first(tmp_path, random_arrays(32, 48, 32), l0=l0)
    workflow = make_workflow(tmp_path, NO_CACHE.folder, baselines="gemma_scope", baselines_dir=str(tmp_path))
    cell = make_cell()
    beside = baselines_of(workflow, [cell, make_cell(hook_out="blocks.1.mlp.hook_out")])
    assert beside == 2 * [Beside(make_site(hook_in="norm_unit"), 48)]
    assert baselines_of(replace(workflow, baselines="none"), [cell]) == []
    alone, both = gang_cost([cell], EMPTY), gang_cost([cell], replace(EMPTY, beside=beside))
    assert both.evaluation_flops > alone.evaluation_flops
    assert both.memory_bytes >= alone.memory_bytes + 2 * 4 * 48 * 64
    assert both.language_model_tokens == alone.language_model_tokens  # they share the pass over the held-out rows
    elsewhere = gang_cost([make_cell(layer=2)], replace(EMPTY, beside=beside))
    assert elsewhere == gang_cost([make_cell(layer=2)], EMPTY)


def test_baselines_share_the_pass_of_the_cells_and_cost_one_where_that_is_cached(
    tmp_path: Path, cache: CacheFolder
) -> None:
    cell, own = make_cell(steps=2), CacheFolder(tmp_path / "cache")
    (own.root / "models").mkdir(parents=True)
    for path in (cache.root / "models").glob("tiny-1*"):
        (own.root / "models" / path.name).symlink_to(path)
    for l0 in (4, 8, 16):
        write_first(tmp_path / "google", random_arrays(32, 48, 32, seed=l0), l0=l0)
    asked = make_workflow(tmp_path / "out", own, baselines="gemma_scope", baselines_dir=str(tmp_path / "google"))

    def planned_and_seen(part: str) -> tuple[int, set[int]]:
        workflow = replace(asked, baselines_l0=part, results_dir=str(tmp_path / part))
        setting = Setting(Cached.look(own), CPU, 1.0, beside=tuple(baselines_of(workflow, [cell])))
        cost = gang_cost([cell], setting)
        results = run_cells([cell], workflow)
        rows = pl.read_parquet(sorted(results.table("runs").glob("*.parquet")))
        assert set(rows["kind"]) == {"cell", "baseline"}
        return cost.language_model_tokens, set(rows["n_language_model_tokens"])

    once = gang_cost([cell], Setting(Cached.look(own), CPU, 1.0)).language_model_tokens
    assert planned_and_seen("4") == (once, {once})
    assert planned_and_seen("8") == (0, {0})
    for site in (path for path in own.root.glob("activations/*/*") if not [*path.glob("train*")]):
        shutil.rmtree(site)
    heldout = -(-cell.data.n_heldout_tokens // (cell.data.seq_len - 1)) * cell.data.seq_len
    assert planned_and_seen("16") == (heldout, {heldout})


def test_jobs_take_slots_in_turn() -> None:
    assert in_turn([5.0, 3.0, 1.0, 1.0], 1) == 10
    assert in_turn([5.0, 3.0, 1.0, 1.0], 2) == 5


def test_activations_in_words() -> None:
    cost = gang_cost([make_cell()], EMPTY)
    assert activations(cost) == f"{cost.language_model_tokens:,} tokens through the language model once"
    partly: Cost = replace(cost, cached_tokens=1024)
    assert activations(partly).endswith("once, 1,024 cached")
