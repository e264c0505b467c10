"""After the last step: fit the inference threshold, then decoder, bias and linear map. Pure functions of the weights.

Batch top-k looks at a whole batch, inference at one token. The threshold that replaces it is the pooled quantile
of the pre-latents over the calibration split at which `top_k` latents per token are active on average.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sweep.config import Cell
from sweep.language_model import Activations
from sweep.refit import refit
from sweep.state import TrainState
from sweep.step.entries import k_largest, kth_largest
from sweep.transcoder import Parameters, Transcoder, fold, pre_latents

__all__ = ["finish", "fit_threshold"]

CHUNK_ELEMENTS = 1 << 24
"""Pre-latents held at once: 64 MiB in fp32."""


@torch.no_grad()
def finish(
    state: TrainState,
    cell: Cell,
    calibration: Sequence[Activations],
    sample: Sequence[Activations] = (),
    tick: Callable[[int], None] = lambda done: None,
) -> Transcoder:
    """The transcoder in raw units, with its threshold if the activation rule needs one.

    `calibration` and `sample`, which the refit learns from if there is one, are of the cell's own site. `tick` is told
    how many iterations of it are done.
    """
    params = replace(state.params, W_enc=state.params.W_enc.contiguous())  # as it is saved: rounds as inference will
    threshold = None
    if cell.capacity.activation == "batch_top_k":
        dtype = params.W_enc.dtype  # scaled in it, as in training: bfloat16 would be rounded twice
        sources = (activations.source.to(dtype) * state.source_scale for activations in calibration)
        n_tokens = sum(len(activations.source) for activations in calibration)
        threshold = fit_threshold(params, sources, n_tokens, cell.capacity.top_k)
    if sample:
        pair = scaled(state, sample), scaled(state, calibration)
        params = refit(params, cell.capacity, threshold, *pair, cell.schedule.refit_iterations, tick)
    return fold(params, cell.capacity, state.source_scale, state.target_scale, threshold)


def scaled(state: TrainState, parts: Sequence[Activations]) -> Activations:
    """End to end, as training sees them."""
    dtype = state.params.W_enc.dtype
    source, target = (torch.cat([part[i] for part in parts]).to(dtype) for i in (0, 1))
    return Activations(source.mul_(state.source_scale), target.mul_(state.target_scale))


def fit_threshold(params: Parameters, sources: Iterable[Float[Tensor, "_ d_in"]], n_tokens: int, top_k: int) -> float:
    """The value that exactly `top_k * n_tokens` positive pre-latents exceed (fewer where values tie); at least 0.

    Exact and streaming: what is below the largest `top_k * n_tokens + 1` values seen so far can never be the
    answer, so only those are kept.
    """
    kept = params.W_enc.new_empty(0)
    n_wanted = top_k * n_tokens
    rows = max(CHUNK_ELEMENTS // params.b_enc.numel(), 1)
    bound = 0.0
    for source in sources:
        for chunk in source.split(rows):
            pre = pre_latents(params, chunk)
            kept = torch.cat([kept, pre[pre > bound]])
            if len(kept) > 2 * n_wanted:
                kept = k_largest(kept, n_wanted + 1)
                bound = float(kept[0])
    if len(kept) <= n_wanted:
        return 0.0
    return kth_largest(kept, n_wanted + 1)
