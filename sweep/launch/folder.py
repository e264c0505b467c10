"""What a results folder tells of all its cells and their jobs, from any machine that sees it."""

import os

from sweep.attempt import whereabouts
from sweep.errors import CheckpointError, ResultsError
from sweep.launch import console
from sweep.launch.claims import Others, living_claims
from sweep.launch.console import out, plural
from sweep.launch.outcome import DONE, causes, tell
from sweep.launch.plan import Planned, look_up
from sweep.launch.slurm import SlurmJobs
from sweep.launch.squeue import SlurmSilent, scancel
from sweep.launch.watch import Together, Watcher, follow_to_the_end, watching
from sweep.locks import is_held
from sweep.paths import CellFolder, ResultsFolder
from sweep.saved import read_cell
from sweep.status import FAILED

__all__ = ["cancel", "cells_of", "collect", "status", "watch"]


def cells_of(results: ResultsFolder, *, readable: bool = False) -> list[Planned]:
    """Every cell that has a folder; if asked, those whose config can be read, and the others are told.

    Raises:
        ResultsError: there is none, or a config cannot be read.
    """
    results.check()
    cells, unreadable = [], []
    for path in sorted(results.root.glob("cells/*/config.json")):
        try:
            cell = read_cell(CellFolder(path.parent))
        except CheckpointError as error:
            unreadable.append(f"{error}; move its folder away")
        else:
            cells.append(Planned(cell, (), *look_up(cell, results, {})))
    if unreadable and not (readable and cells):
        raise CheckpointError("\n".join(unreadable))
    for problem in unreadable:
        console.problem(f"left out: {problem}")
    if not cells:
        raise ResultsError(f"{results.root} holds no cells; name the results_dir of a sweep")
    return cells


def jobs_of(results: ResultsFolder, cells: list[Planned]) -> SlurmJobs:
    """Their jobs, as Slurm tells just now."""
    jobs = SlurmJobs(results, [planned.cell.cell_id for planned in cells])
    jobs.refresh(now=True)
    return jobs


def everywhere(results: ResultsFolder, cells: list[Planned]) -> Together:
    """Their jobs in Slurm, and those of launchers that live."""
    return Together(jobs_of(results, cells), Others(results, [planned.cell.cell_id for planned in cells]))


def status(results: ResultsFolder) -> int:
    """One table of all cells; what Slurm is not asked about is known from files."""
    cells = cells_of(results, readable=True)
    jobs = jobs_of(results, cells)
    rows = Watcher(cells, results).rows(jobs)
    for cell_id, row in rows.items():
        job = jobs.of(cell_id)
        here = is_held(results.cell(cell_id).lock)
        begun = row.status.state == "running"
        if results.row("runs", cell_id).exists() and row.status.state != "diverged":
            rows[cell_id] = row.saying("done")
        elif begun and not here and row.status.job and not jobs.silent and not (job and job.live):
            rows[cell_id] = row.saying(f"lost ({job.words if job else 'unknown to Slurm'})")
        elif begun and not here and not row.status.job and row.status.host == whereabouts(os.environ):
            rows[cell_id] = row.saying("killed")
    out.print(Watcher(cells, results).table(rows, room=len(rows)))
    ended = [cell_id for cell_id, row in rows.items() if row.status.state in FAILED and row.word != "done"]
    console.show_failures(causes(ended, results, jobs))
    if jobs.silent:
        out.print(f"Slurm was not asked: {jobs.silent}")
    for claim in living_claims(results):
        out.print(f"{claim.words}: launcher of {plural(len(claim.starts), 'cell')}")
    for job in jobs.live:
        out.print(f"{job.words}: {plural(len(job.cell_ids), 'cell')}; it prints to {job.log}")
    return DONE


def watch(results: ResultsFolder) -> int:
    """Follow all jobs, in Slurm and of other launchers, until none lives, then tell what came of the cells."""
    cells = cells_of(results)
    jobs = everywhere(results, cells)
    with watching(cells, results) as watch:
        follow_to_the_end(jobs, watch)
    return tell(cells, results, jobs)


def collect(results: ResultsFolder) -> int:
    """Results and failures so far; the exit code says whether every cell is done."""
    cells = cells_of(results)
    return tell(cells, results, everywhere(results, cells))


def cancel(results: ResultsFolder) -> int:
    """End every job of the folder that Slurm runs or keeps waiting; those that run save first.

    Raises:
        SlurmSilent: Slurm cannot be asked.
    """
    jobs = jobs_of(results, cells_of(results))
    if jobs.silent:
        raise SlurmSilent(jobs.silent)
    scancel([job.id for job in jobs.live])
    out.print(
        f"cancelled {plural(len(jobs.live), 'job')}"
        + (": " + ", ".join(job.id for job in jobs.live) if jobs.live else "")
    )
    return DONE
