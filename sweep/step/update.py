"""How gradients change the state: Adam on unit-norm decoder rows, a range of latents at a time."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sweep.state import TrainState
from sweep.transcoder import Parameters

__all__ = ["normalise_rows_", "update_", "update_latents_", "update_shared_"]

SKIP_RATE = 0.2
"""Learning rate of the linear map beside the latents, as a share of theirs. Adam moves all its weights at once, and
what they write adds up over the width of the source: at the full rate small dimensions of the target are drowned."""

BIAS_RATE = 10.0
"""Learning rate of the encoder's biases where the weights turn about the mean of the source, as a multiple of theirs. A
step of the weights moves a latent by as much as the source is wide, one of the bias by itself alone."""


def update_(state: TrainState, gradients: Parameters, lr: float, betas: tuple[float, ...]) -> None:
    """One Adam step (Kingma & Ba 2015, eps 1e-8, no weight decay), in place; `state.step` is not changed."""
    everything = slice(0, len(gradients.b_enc))
    encoder = gradients.W_enc.T.contiguous()
    update_latents_(state, everything, encoder, gradients.b_enc, gradients.W_dec, lr, betas)
    update_shared_(state, gradients.b_dec, gradients.W_skip, lr, betas)


def update_latents_(
    state: TrainState,
    latents: slice,
    encoder: Float[Tensor, "n d_in"],
    bias: Float[Tensor, " n"],
    decoder: Float[Tensor, "n d_out"],
    lr: float,
    betas: tuple[float, ...],
) -> None:
    """The Adam step of some latents, from the gradients of their encoder weights, biases and decoder rows.

    The part of the decoder's gradient along each row is removed first: the renormalisation afterwards would undo
    it, and it would only disturb the moments.

    About a `source_mean` m the weights w turn so that w @ m + b, what a latent has at the mean, changes with the bias
    alone. Else all tokens' latents would move together with every step of w.
    """

    def weights(params: Parameters) -> list[Tensor]:
        return [params.W_enc.T[latents], params.W_dec[latents]]

    bias_lr = lr if state.source_mean is None else lr * BIAS_RATE
    rows = state.params.W_dec[latents]
    decoder.addcmul_((decoder * rows).sum(dim=1, keepdim=True), rows, value=-1)
    turned = turning(state.params.W_enc.T[latents], encoder, state.params.b_enc[latents], bias, state.source_mean)
    with turned, shortened(rows, state.write_rates):
        adam_(state, weights, [encoder, decoder], lr, betas)
        adam_(state, lambda params: [params.b_enc[latents]], [bias], bias_lr, betas)
    normalise_rows_(rows)


def update_shared_(
    state: TrainState,
    b_dec: Float[Tensor, " d_out"],
    W_skip: Float[Tensor, "d_in d_out"] | None,
    lr: float,
    betas: tuple[float, ...],
) -> None:
    """The Adam step of what belongs to no latent, from the gradients of the decoder's bias and of the linear map."""
    with shortened(state.params.b_dec, state.write_rates):
        adam_(state, lambda params: [params.b_dec], [b_dec], lr, betas)
    if W_skip is not None:
        assert state.params.W_skip is not None
        W_skip = W_skip.contiguous()
        turned = turning(state.params.W_skip.T, W_skip.T, state.params.b_dec, b_dec, state.source_mean)
        with turned, shortened(state.params.W_skip, state.write_rates):
            adam_(state, lambda params: [params.W_skip], [W_skip], lr * SKIP_RATE, betas)  # type: ignore[list-item]


@contextlib.contextmanager
def turning(
    weights: Float[Tensor, "n d_in"],
    d_weights: Float[Tensor, "n d_in"],
    bias: Float[Tensor, " n"],
    d_bias: Float[Tensor, " n"],
    mean: Float[Tensor, " d_in"] | None,
) -> Iterator[None]:
    """Make gradients those of weights on `source - mean`, and let the bias take up what the weights then do at the
    mean; nothing without a mean.

    In terms of source - mean the bias is b + w @ mean, so the gradient of w, with that held fixed, loses d_b * mean.
    """
    if mean is None:
        yield
        return
    d_weights.addr_(d_bias, mean, alpha=-1)
    before = (weights * mean).sum(dim=1)
    yield
    bias -= (weights * mean).sum(dim=1) - before


@contextlib.contextmanager
def shortened(weights: Float[Tensor, "*n d_out"], rates: Float[Tensor, " d_out"] | None) -> Iterator[None]:
    """Let what happens inside move the weights by these shares of the way only; without rates, all of it.

    Adam's steps are as long for a dimension that hardly varies as for one that varies a hundred times as much; the
    small ones would be drowned in them.
    """
    if rates is None:
        yield
        return
    before = weights.clone()
    yield
    torch.lerp(before, weights, rates.expand_as(weights), out=weights)


def adam_(
    state: TrainState,
    part: Callable[[Parameters], list[Tensor]],
    gradients: list[Tensor],
    lr: float,
    betas: tuple[float, ...],
) -> None:
    """torch's fused Adam on contiguous parts of the state: the same bits however they are cut."""
    n_steps = torch.full((), state.step + 1.0, device=gradients[0].device)  # a copy from the host would wait
    torch._fused_adam_(
        part(state.params),
        gradients,
        part(state.first_moments),
        part(state.second_moments),
        [],
        [n_steps] * len(gradients),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def normalise_rows_(rows: Tensor) -> None:
    """Scale each row to Euclidean norm 1, in place; a zero row stays zero."""
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
