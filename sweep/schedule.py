"""The learning rate of a step: pure."""

import math

from sweep.config import Schedule

__all__ = ["learning_rate"]


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
