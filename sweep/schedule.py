"""The learning rate of a step, where a run goes back to when its loss is no number, what it refits on: pure."""

import math

from sweep.config import Cell, Schedule
from sweep.tokens import row_counts

__all__ = ["is_stage", "learning_rate", "n_refit_batches", "stage_before"]

N_STAGES = 20
"""Parts of a run. Their ends are where its weights are looked at, and where it may go back to."""

SAMPLE_BYTES = 1 << 29
"""Activations of a site held at once: 104,857 tokens of 640 dimensions each way."""


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up to `lr`, then `decay` down to exactly `min_lr` at the last step, `steps - 1`.

    Step 0 already learns (at lr / warmup_steps); the peak is reached at step `warmup_steps - 1`, or at step 0
    without warm-up.
    """
    if step < schedule.warmup_steps:
        return schedule.lr * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return schedule.lr
    peak = max(schedule.warmup_steps - 1, 0)
    progress = min((step - peak) / max(schedule.steps - 1 - peak, 1), 1.0)
    if schedule.decay == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return schedule.lr * (1 - progress) + schedule.min_lr * progress


def stage_steps(schedule: Schedule) -> int:
    return max(schedule.steps // N_STAGES, 1)


def is_stage(step: int, schedule: Schedule) -> bool:
    """Whether a stage ends after so many steps; the last step always ends one."""
    return step % stage_steps(schedule) == 0 or step == schedule.steps


def stage_before(step: int, schedule: Schedule) -> int:
    """The end of the last stage before a step, in steps taken; 0 in the first stage."""
    every = stage_steps(schedule)
    return max(step - 1, 0) // every * every


def n_refit_batches(cell: Cell) -> int:
    """How many of the first batches the refit learns from: an epoch, or SAMPLE_BYTES, and none that training has not
    seen.
    """
    if not cell.schedule.refit_iterations:
        return 0
    n_bytes = 4 * cell.schedule.batch_size * (cell.model.d_in + cell.model.d_out)
    n_tokens = row_counts(cell.data)["train"] * (cell.data.seq_len - 1)
    epoch = max(n_tokens // cell.schedule.batch_size, 1)
    return min(cell.schedule.steps, epoch, max(SAMPLE_BYTES // n_bytes, 1))
