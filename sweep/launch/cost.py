"""What a gang will cost, from arithmetic alone; seconds come from a matrix product timed on the spot."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sweep.config import Cell
from sweep.tokens import row_bytes, row_counts

__all__ = ["Cost", "gang_cost", "machine_flops"]


EFFICIENCY = 0.35
"""What the dense step and the language model reach of the rate `machine_flops` measures, on two CPU cores."""


@dataclass(frozen=True)
class Cost:
    """Upper estimates: caches and checkpoints that are there already make it cheaper."""

    language_model_tokens: int
    language_model_flops: float
    training_flops: float
    memory_bytes: float
    disk_bytes: float

    def seconds(self, flops_per_second: float) -> float:
        """Time at a machine's matrix-product rate, of which real passes and steps reach a share."""
        return (self.language_model_flops + self.training_flops) / (EFFICIENCY * flops_per_second)


def gang_cost(gang: Sequence[Cell], cache_gib: float) -> Cost:
    """Cost of training and evaluating the cells of one stream together."""
    stream = gang[0].stream
    model, data = stream.model, stream.data
    rows = row_counts(data)
    sites = {cell.site for cell in gang}
    cached = sum(rows.values()) * row_bytes(model, data) * len(sites)
    fits = cached <= cache_gib * 2**30
    longest = max(cell.schedule.steps for cell in gang)
    epochs = -(-longest * stream.batch_size // (rows["train"] * (data.seq_len - 1)))
    passes = 1 if fits else epochs
    tokens = (rows["train"] * passes + rows["calibration"] + rows["heldout"]) * data.seq_len
    depth = (max(site.deepest_layer for site in sites) + 1) / model.n_layers
    parameters = sum(cell.n_train_params for cell in gang)
    batch = max(cell.schedule.batch_size * cell.capacity.dict_size for cell in gang)
    return Cost(
        language_model_tokens=tokens,
        language_model_flops=2.0 * model.n_body_params * depth * tokens,
        training_flops=sum(training_flops(cell) for cell in gang),
        memory_bytes=4.0 * (3 * parameters + max(cell.n_train_params for cell in gang) + 6 * batch)
        + 4.0 * model.n_body_params,
        disk_bytes=(cached if fits else 0) + 4.0 * parameters * (1 + 2 * 3),
    )


def training_flops(cell: Cell) -> float:
    """Dense step: 2 matrix products for the encoder, 3 for the decoder; 2 flops per weight and token each."""
    per_token = 2.0 * cell.capacity.dict_size * (2 * cell.model.d_in + 3 * cell.model.d_out)
    return per_token * cell.schedule.steps * cell.schedule.batch_size


def machine_flops() -> float:
    """Floating-point operations a second of a single-precision matrix product here; takes a tenth of a second."""
    import numpy as np

    n = 1024
    a = np.ones((n, n), dtype=np.float32)
    np.matmul(a, a)
    start = time.perf_counter()
    for _ in range(3):
        np.matmul(a, a)
    return 3 * 2.0 * n**3 / (time.perf_counter() - start)
