"""The loop: one batch of the stream, one step of every cell of the gang."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from sweep.activations import ActivationStream
from sweep.config import Cell, Schedule
from sweep.errors import Diverged
from sweep.language_model import Activations
from sweep.state import TrainState
from sweep.status import SCORES
from sweep.step.step import StepReport, train_step_

__all__ = ["Attempt", "Run", "train"]

N_CURVE_POINTS = 200
"""Points on a training curve, whatever its length."""

Attempt = Callable[["Run", Callable[[], None]], bool]
"""Calls the function for a run and tells whether it went well; a failure costs the run its place in the gang."""


@dataclass
class Run:
    """One attempt at a cell: its state, and where it saves."""

    cell: Cell
    state: TrainState
    save: Callable[[TrainState], None]
    checkpoint_steps: int

    @property
    def finished(self) -> bool:
        return self.state.step >= self.cell.schedule.steps

    def advance(self, activations: Activations) -> None:
        """One training step, then log and save when due.

        Raises:
            Diverged: the loss is not finite.
        """
        step = self.state.step
        report = train_step_(self.state, *activations, self.cell.capacity, self.cell.schedule, self.cell.revival)
        if not math.isfinite(float(report.loss.total)):
            raise Diverged(f"the loss of step {step} is {float(report.loss.total)}; try a lower lr than {report.lr:g}")
        self._log(step, report)
        if self.finished or (self.checkpoint_steps and self.state.step % self.checkpoint_steps == 0):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save the state, but never one that cannot be used.

        Raises:
            Diverged: a parameter is not finite.
        """
        if not all(bool(tensor.isfinite().all()) for tensor in self.state.params.tensors()):
            raise Diverged(f"the weights are not finite after step {self.state.step}; try a lower lr")
        if self.checkpoint_steps:
            self.save(self.state)

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


def logs(step: int, schedule: Schedule) -> bool:
    """Whether a step is a point on the curve: evenly spaced, the last one always."""
    every = max(schedule.steps // N_CURVE_POINTS, 1)
    return step % every == 0 or step == schedule.steps - 1


def train(
    runs: Iterable[Run],
    stream: ActivationStream,
    attempt: Attempt,
    after_step: Callable[[int], None],
) -> None:
    """Bring every run to its last step, in lockstep; a run that is ahead waits for the others.

    `after_step` is called with the number of finished steps once per step of the gang.
    """
    gang = [run for run in runs if not run.finished]
    if not gang:
        return
    start = min(run.state.step for run in gang)
    until = max(run.cell.schedule.steps for run in gang)
    for step, batch in stream.batches(start, until):
        for run in list(gang):
            due = run.state.step == step and not run.finished
            if due and not attempt(run, partial(run.advance, batch[run.cell.site])):
                gang.remove(run)
        after_step(step + 1)
        if not gang:
            return
