"""Contenders of our own environment: the floor, our two steps, a dense recipe. `python -m benchmarks.contenders NAME`

matryoshka_sae is the recipe of Bussmann et al. (2025) written plainly in torch, as a transcoder: batch top-k, every
prefix in the loss, an auxiliary loss on dead latents, clipped gradients, Adam, unit decoder rows. It is dense.
"""

import sys

import torch
from torch import Tensor

from benchmarks.contest import Case
from benchmarks.worker import SILENT, Make, Step, dead_latents, serve
from sweep.config import Capacity, Revival, Schedule
from sweep.devices import pick_device
from sweep.state import TrainState
from sweep.step import reference, sparse
from sweep.step.step import Learn, train_step_
from sweep.transcoder import Parameters

__all__ = ["CONTENDERS"]

LR = 1e-4
BETAS = (0.9, 0.999)
REVIVAL = Revival(aux_penalty=1 / 8, top_k_aux=256, n_batches_to_dead=1000)


def initial_parameters(case: Case) -> Parameters:
    """Random unit decoder rows, the encoder their transpose; dead latents are held down by their bias."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(case.dict_size, case.d, generator=generator).to(case.device)
    rows /= rows.norm(dim=1, keepdim=True)
    params = Parameters(
        W_enc=rows.T.clone(), b_enc=rows.new_zeros(case.dict_size), W_dec=rows, b_dec=rows.new_zeros(case.d)
    )
    params.b_enc[dead_latents(case)] = SILENT
    return params.by_latent()


def ours(learn_: Learn) -> Make:
    def make(case: Case) -> Step:
        pick_device(case.device)  # as every job does, which settles how memory is kept, too
        state = TrainState.initial(initial_parameters(case), source_scale=1.0, target_scale=1.0)
        state.batches_since_fired[dead_latents(case)] = REVIVAL.n_batches_to_dead
        zeros = torch.zeros(case.d, device=case.device)
        state.source_mean, state.write_rates = zeros, zeros + 1  # the default fits steps to the site, which takes time
        capacity = Capacity(case.dict_size, case.top_k, "batch_top_k", case.groups)
        schedule = Schedule(LR, 1 << 30, case.batch, 0, "constant", LR, BETAS, "float32")

        def step(source: Tensor, target: Tensor) -> None:
            train_step_(state, source, target, capacity, schedule, REVIVAL, learn_)

        return step

    return make


def floor(case: Case) -> Step:
    """The encoder's product of the whole batch, written into memory that is there."""
    params = initial_parameters(case)
    out = torch.empty(case.batch, case.dict_size, device=case.device)

    def step(source: Tensor, target: Tensor) -> None:
        torch.addmm(params.b_enc, source, params.W_enc, out=out)

    return step


def matryoshka_sae(case: Case) -> Step:
    top_k_aux, aux_penalty, max_norm = 512, 1 / 32, 1.0
    params = initial_parameters(case)
    leaves = [tensor.contiguous().requires_grad_() for tensor in params.tensors()]
    W_enc, b_enc, W_dec, b_dec = leaves
    optimizer = torch.optim.Adam(leaves, LR, betas=(0.9, 0.99))
    silent_for = torch.zeros(case.dict_size, device=case.device)
    silent_for[dead_latents(case)] = 1000

    def step(source: Tensor, target: Tensor) -> None:
        pre = (source @ W_enc + b_enc).relu()
        flat = pre.flatten()
        found = flat.topk(case.top_k * case.batch, sorted=False)
        latents = torch.zeros_like(flat).scatter(0, found.indices, found.values).view_as(pre)
        prediction, losses, start = b_dec, [], 0
        for end in case.groups:
            prediction = prediction + latents[:, start:end] @ W_dec[start:end]
            losses.append((prediction - target).square().mean())
            start = end
        loss = torch.stack(losses).mean()
        dead = silent_for >= 20
        if dead.any():
            values, index = pre[:, dead].topk(min(top_k_aux, int(dead.sum())), sorted=False)
            revived = torch.zeros(case.batch, int(dead.sum()), device=case.device).scatter(1, index, values)
            residual = (target - prediction).detach()
            loss = loss + aux_penalty * (revived @ W_dec[dead] - residual).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        with torch.no_grad():
            unit = W_dec / W_dec.norm(dim=1, keepdim=True)
            W_dec.grad -= (W_dec.grad * unit).sum(dim=1, keepdim=True) * unit
            W_dec.copy_(unit)
        optimizer.step()
        optimizer.zero_grad()
        silent_for.add_(1)
        silent_for[latents.detach().sum(dim=0) > 0] = 0

    return step


CONTENDERS: dict[str, Make] = {
    "floor": floor,
    "sparse": ours(sparse.learn_),
    "reference": ours(reference.learn_),
    "matryoshka_sae": matryoshka_sae,
}

if __name__ == "__main__":
    serve(CONTENDERS[sys.argv[1]])
