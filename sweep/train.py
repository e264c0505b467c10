"""The loop: one batch of the stream, one step of every cell of the gang.

A run whose loss stops being a number goes back and tries again with half the learning rate: first to the end of the
last stage before, then to the start. The step it goes back to follows from the cell and the step of the failure alone,
and from where on the rate is lower is part of the state; so any earlier state leads to the same bytes, whichever
checkpoints happen to be there. The others of the gang wait for it.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from sweep import devices
from sweep.activations import ActivationStream
from sweep.config import Cell, Schedule
from sweep.errors import Diverged
from sweep.language_model import Activations
from sweep.schedule import is_stage, stage_before
from sweep.state import TrainState
from sweep.status import SCORES
from sweep.step.step import StepReport, train_step_

__all__ = ["Guard", "Run", "SaveClock", "train"]

N_CURVE_POINTS = 200
"""Points on a training curve, whatever its length."""

MAX_ROLLBACKS = 2

SAVING_SHARE = 0.01
"""A save by the clock waits until those before it took no more than this share of the time; with it they may take
twice as much."""

log = logging.getLogger(__name__)

Guard = Callable[["Run", Callable[[], None]], bool]
"""Calls the function for a run and tells whether it went well; a failure costs the run its place in the gang."""


@dataclass
class Run:
    """One attempt at a cell: its state, and where it saves.

    `back` gives an earlier state, of the step it is asked for or before, and forgets the checkpoints after that step.
    `checkpoint_steps` of 0 saves by the clock alone; without `save` nothing is ever saved. `unread` holds the loss of
    each step that nobody has looked at yet, with its learning rate. `n_taken` counts the steps of this attempt, also
    those it went back behind.
    """

    cell: Cell
    state: TrainState
    save: Callable[[TrainState], None] | None
    back: Callable[[int], TrainState]
    checkpoint_steps: int
    unread: dict[int, tuple[Tensor, float]] = field(default_factory=dict)
    n_taken: int = 0

    @property
    def finished(self) -> bool:
        return self.state.step >= self.cell.schedule.steps

    def advance(self, activations: Activations) -> None:
        """One training step, then log and save when due; or back to an earlier step, if a loss is not finite.

        Raises:
            Diverged: a loss is not finite, nor did it stay so with lower learning rates.
        """
        step = self.state.step
        report = train_step_(self.state, *activations, self.cell.capacity, self.cell.schedule, self.cell.revival)
        self.n_taken += 1
        self.unread[step] = report.loss.total, report.lr
        saves = self.checkpoint_steps > 0 and self.state.step % self.checkpoint_steps == 0
        something_due = saves or logs(step, self.cell.schedule) or is_stage(step + 1, self.cell.schedule)
        if devices.reading_waits(report.loss.total) and not something_due:
            return
        if (failed := self._first_not_finite()) is not None:
            loss, lr = self.unread[failed]
            self._go_back(failed, f"the loss of step {failed} is {float(loss)} at lr {lr:g}")
            return
        self.unread.clear()
        if is_stage(step + 1, self.cell.schedule) and not self.usable:
            self._go_back(step + 1, f"the weights are not finite after step {step} at lr {report.lr:g}")
            return
        self._log(step, report)
        if self.finished or saves:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save the state, but never one that cannot be used: the next stage's end finds that out, or the next loss."""
        if self.save is not None and self.usable:
            self.save(self.state)

    @property
    def usable(self) -> bool:
        """Whether every parameter and every loss is finite."""
        params = self.state.params
        in_memory_order = (tensor.T if tensor is params.W_enc else tensor for tensor in params.tensors())
        extremes = [extreme for tensor in in_memory_order for extreme in tensor.aminmax()]
        return bool(torch.stack(extremes).isfinite().all()) and self._first_not_finite() is None

    def _first_not_finite(self) -> int | None:
        """The step of the first unread loss that is not finite."""
        if not self.unread:
            return None
        finite = torch.stack([loss for loss, _ in self.unread.values()]).isfinite().tolist()
        return next((step for step, is_finite in zip(self.unread, finite, strict=True) if not is_finite), None)

    def _go_back(self, step: int, reason: str) -> None:
        """Take up an earlier state, with half the learning rate from there on.

        Raises:
            Diverged: that was tried often enough.
        """
        rollbacks = self.state.rollbacks
        if len(rollbacks) == MAX_ROLLBACKS:
            raise Diverged(f"{reason}, which was lowered {MAX_ROLLBACKS} times already; try a lower lr")
        target = 0 if rollbacks else stage_before(step, self.cell.schedule)
        self.unread.clear()
        self.state = self.back(target)
        self.state.rollbacks = [*rollbacks, target]
        log.info(
            "cell %s: %s; back to step %d, with half the lr from step %d on",
            self.cell.cell_id,
            reason,
            self.state.step,
            target,
            extra={"cell_id": self.cell.cell_id},
        )
        self.checkpoint()

    def standing(self) -> dict[str, Any]:
        """What a status tells of the run: how far it is, how often it went back, and its scores."""
        return {"step": self.state.step, "rollbacks": len(self.state.rollbacks), **self.scores()}

    def scores(self) -> dict[str, float]:
        """FVU, L0 and dead fraction at the last point on the curve: of a training batch, by the training rule."""
        latest = takewhile(lambda point: point[0] == self.state.curve[-1][0], reversed(self.state.curve))
        values = {metric: value for _, metric, value in latest}
        if "n_dead" in values:
            values["dead_fraction"] = values["n_dead"] / self.cell.capacity.dict_size
        return {name: values[name] for name in SCORES if math.isfinite(values.get(name, math.nan))}

    def _log(self, step: int, report: StepReport) -> None:
        if logs(step, self.cell.schedule):
            self.state.curve.extend((step, metric, value) for metric, value in report.values().items())


class SaveClock:
    """When a gang saves by the clock: so many minutes after its last save, but never so often that it costs much.

    `now` gives seconds, of any beginning.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds = 60 * minutes
        self._now = now
        self._begun = self._last = now()
        self._spent = 0.0

    def due(self) -> bool:
        """Whether it is time to save; never, with 0 minutes."""
        now = self._now()
        rests = now - self._last >= self._seconds
        return self._seconds > 0 and rests and self._spent <= SAVING_SHARE * (now - self._begun)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around every save, whatever it was due to."""
        begun = self._now()
        try:
            yield
        finally:
            self._last = self._now()
            self._spent += self._last - begun


def logs(step: int, schedule: Schedule) -> bool:
    """Whether a step is a point on the curve: evenly spaced, the last one always."""
    every = max(schedule.steps // N_CURVE_POINTS, 1)
    return step % every == 0 or step == schedule.steps - 1


def train(
    runs: Iterable[Run],
    stream: ActivationStream,
    guard: Guard,
    after_step: Callable[[int], None],
    save_due: Callable[[], bool] = lambda: False,
) -> None:
    """Bring every run to its last step, in lockstep; a run that is ahead waits for the others.

    `after_step` is called with the number of finished steps once per step of the gang, and `save_due` then asked
    whether all shall save.
    """
    gang = list(runs)
    while gang := [run for run in gang if not run.finished]:
        start = min(run.state.step for run in gang)
        until = max(run.cell.schedule.steps for run in gang)
        for step, batch in stream.batches(start, until):
            for run in list(gang):
                due = run.state.step == step and not run.finished
                if due and not guard(run, partial(run.advance, batch[run.cell.site])):
                    gang.remove(run)
            after_step(step + 1)
            if save_due():
                gang = [run for run in gang if guard(run, run.checkpoint)]
            if not gang or any(run.state.step <= step for run in gang):
                break  # one went back: from there again
