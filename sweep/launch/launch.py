"""The flow of a sweep: resolve, plan, divide into jobs, and run them in rounds."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sweep.cached import Cached, Processor
from sweep.config import StreamConfig
from sweep.errors import ConfigError, SweepError
from sweep.launch import console
from sweep.launch.beside import baselines_of, with_baselines, with_done_cells
from sweep.launch.cost import Cost, Setting, gang_cost, machine_flops, training_flops
from sweep.launch.jobs import Job, divide
from sweep.launch.machine import LocalOptions, Slot, find_slots
from sweep.launch.outcome import DONE, WRONG
from sweep.launch.plan import Composed, Plan, make_plan, resolve
from sweep.launch.rounds import Venue, run_rounds
from sweep.launch.slurm import sbatch_script
from sweep.launch.slurm_options import SlurmOptions
from sweep.options import Workflow
from sweep.paths import CacheFolder, ResultsFolder
from sweep.progress import silent
from sweep.text import check_beginning

__all__ = ["launch"]


def launch(composed: Sequence[Composed], options: LocalOptions | SlurmOptions) -> int:
    """Run a sweep; returns the exit code of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("sweep").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
    try:
        workflow, cells = resolve(composed)
        for data in dict.fromkeys(cell.data for _, cell in cells):
            check_beginning(data)
        workflow = with_baselines(workflow, [cell for _, cell in cells], silent)
        slots = room_for(workflow, options)
        results = ResultsFolder(Path(workflow.results_dir))
        results.check()
        results.check_links(cell.cell_id for _, cell in cells)
        venue = Venue(results, slots, options)
        elsewhere = venue.in_other_hands()
        plan = with_done_cells(make_plan(workflow, cells, results, elsewhere), results, elsewhere)
        jobs = shown_jobs(plan, venue)
        if workflow.dry_run:
            return DONE
        cache = CacheFolder(Path(workflow.cache_dir))
        if results.root not in cache.root.parents:
            cache.check()
        results.create()
        return run_rounds(plan, jobs, venue, lambda later: shown_jobs(later, venue))
    except SweepError as error:
        console.problem(str(error))
        return WRONG
    except OSError as error:
        console.problem(f"{type(error).__name__}: {error}")
        return WRONG


def shown_jobs(plan: Plan, venue: Venue) -> list[Job]:
    """The jobs of a plan; both are shown, and with dry_run=true what they cost.

    Raises:
        BaselineError: a baseline changed since it was checked.
    """
    slots, options = venue.slots, venue.options
    setting = setting_of(plan, slots, options)
    jobs = divide(plan.gangs, slots, lambda cells: gang_cost(cells, setting).memory_bytes, training_flops)
    costs = [gang_cost(job.cells, setting) for job in jobs]
    rate = machine_flops() if jobs and not setting.processor.gpu else None
    console.show_plan(plan)
    console.show_streams([(gang[0].stream, gang_cost(gang, setting)) for gang in plan.gangs])
    console.show_jobs(jobs, slots, None if rate is None else times(jobs, costs, rate / len(slots)))
    if jobs and plan.workflow.dry_run:
        console.show_cost(costs, rate)
        if isinstance(options, SlurmOptions):
            console.out.print(sbatch_script(len(jobs), options, venue.results))
    return jobs


def setting_of(plan: Plan, slots: Sequence[Slot], options: LocalOptions | SlurmOptions) -> Setting:
    """Where the jobs will run and what they find there.

    Raises:
        BaselineError: a baseline changed since it was checked.
    """
    workflow = plan.workflow
    gpu = slots[0].gpu is not None
    if isinstance(options, SlurmOptions):
        gpu = workflow.device != "cpu" and bool(options.gpus_per_node or options.gres)
    return Setting(
        cached=Cached.look(CacheFolder(Path(workflow.cache_dir))),
        processor=Processor(gpu, slots[0].n_threads),
        cache_gib=workflow.cache_gib,
        n_causal_rows=workflow.n_causal_rows,
        done=frozenset(planned.cell.cell_id for planned in plan.cells if planned.action == "baselines"),
        beside=baselines_of(workflow, [planned.cell for planned in plan.cells if planned.runs]),
    )


def times(jobs: Sequence[Job], costs: Sequence[Cost], rate: float) -> list[float]:
    """About how many seconds each job takes; the first one of a stream makes what the others read."""
    seen: set[StreamConfig] = set()
    seconds = []
    for job, cost in zip(jobs, costs, strict=True):
        stream = job.cells[0].stream
        seconds.append(cost.seconds(rate, shared=stream in seen))
        seen.add(stream)
    return seconds


def room_for(workflow: Workflow, options: LocalOptions | SlurmOptions) -> list[Slot]:
    """What jobs may plan with.

    Raises:
        ConfigError: an option of the launcher is out of range.
    """
    if isinstance(options, SlurmOptions):
        options.check()
        return options.slots()
    if not workflow.wait:
        raise ConfigError(
            "wait=false needs jobs that outlive their launcher; choose hydra/launcher=slurm, or wait=true"
        )
    return find_slots(workflow.device, options)
