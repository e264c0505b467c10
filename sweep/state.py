"""TrainState: the only thing that changes over time, and so exactly what a checkpoint holds."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sweep.transcoder import Parameters

__all__ = ["CurvePoint", "TrainState"]

CurvePoint = tuple[int, str, float]
"""Step, metric, value."""

LOWERED = 0.5
"""Factor on the learning rate for each time a run went back."""


@dataclass
class TrainState:
    """A cell in training. Nothing random happens after initialisation, so there is no generator to keep.

    `step` counts finished steps. `curve` holds what has been logged so far, so that a resumed run ends with the
    same curve. Scales are the recorded factors that give source and target unit mean square. `guess` is a little less
    than the smallest latent of the last batch top-k: there the next selection starts its search. `rollbacks` holds, for
    each time the run went back, the step from which on its learning rate is lowered. `write_rates` is, with
    `rate_by_spread`, the share of the learning rate with which each dimension of the target is written, from 0 to 1;
    `source_mean`, with `centre_source`, the mean of the scaled source, about which the encoder turns.
    """

    step: int
    params: Parameters
    first_moments: Parameters
    second_moments: Parameters
    batches_since_fired: Int64[Tensor, " dict_size"]
    source_scale: float
    target_scale: float
    guess: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)
    write_rates: Float[Tensor, " d_out"] | None = None
    source_mean: Float[Tensor, " d_in"] | None = None

    @classmethod
    def initial(cls, params: Parameters, source_scale: float, target_scale: float) -> "TrainState":
        params = params.by_latent()
        return cls(
            step=0,
            params=params,
            first_moments=params.map(torch.zeros_like),
            second_moments=params.map(torch.zeros_like),
            batches_since_fired=torch.zeros_like(params.b_enc, dtype=torch.int64),
            source_scale=source_scale,
            target_scale=target_scale,
        )

    @property
    def lr_factor(self) -> float:
        """What the learning rate of the next step is multiplied by: lowered once for each rollback that covers it."""
        return LOWERED ** sum(begin <= self.step for begin in self.rollbacks)

    @property
    def fitted(self) -> dict[str, Tensor]:
        """What fits steps to the site, as far as the schedule asks for it."""
        tensors = {"write_rates": self.write_rates, "source_mean": self.source_mean}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a unique name."""
        parts = {"params": self.params, "first_moments": self.first_moments, "second_moments": self.second_moments}
        named = {f"{part}.{name}": tensor for part, params in parts.items() for name, tensor in params.items()}
        return {**named, "batches_since_fired": self.batches_since_fired, **self.fitted}

    def scalars(self) -> dict[str, Any]:
        """Everything else, as JSON values; floats survive JSON exactly."""
        return {
            "step": self.step,
            "source_scale": self.source_scale,
            "target_scale": self.target_scale,
            "guess": self.guess,
            "curve": self.curve,
            "rollbacks": self.rollbacks,
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> "TrainState":
        """The inverse of `tensors` and `scalars`."""

        def part(prefix: str) -> Parameters:
            names = [name for name in tensors if name.startswith(f"{prefix}.")]
            return Parameters(**{name.split(".")[1]: tensors[name] for name in names}).by_latent()

        return cls(
            step=scalars["step"],
            params=part("params"),
            first_moments=part("first_moments"),
            second_moments=part("second_moments"),
            batches_since_fired=tensors["batches_since_fired"],
            source_scale=scalars["source_scale"],
            target_scale=scalars["target_scale"],
            guess=scalars.get("guess", 0.0),  # older checkpoints have none, and it decides no number
            curve=[(step, metric, value) for step, metric, value in scalars["curve"]],
            rollbacks=[int(step) for step in scalars["rollbacks"]],
            write_rates=tensors.get("write_rates"),
            source_mean=tensors.get("source_mean"),
        )
