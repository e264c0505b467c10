"""EleutherAI's sparsify: a transcoder with top-k, and the defaults of its trainer: schedule-free sign descent.

It has neither batch top-k nor nesting, and no unit norm for transcoders. Its auxiliary loss, off by default, is on
where latents are dead.
"""

import importlib.metadata
import os

import torch
from torch import Tensor

from benchmarks.contest import Case
from benchmarks.worker import SILENT, Step, dead_latents, serve

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "0" if torch.cuda.is_available() else "1")

from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD

AUXK_ALPHA = 1 / 32


def make(case: Case) -> Step:
    config = SparseCoderConfig(num_latents=case.dict_size, k=case.top_k, transcode=True)
    coder = SparseCoder(case.d, config, case.device, dtype=torch.float32)
    dead = dead_latents(case)
    coder.encoder.bias.data[dead] = SILENT
    lr = 5e-3 / (case.dict_size / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD([{"params": coder.parameters(), "lr": lr}]), momentum=0.95)
    optimizer.train()
    silent_tokens = torch.zeros(case.dict_size, device=case.device, dtype=torch.long)
    silent_tokens[dead] = 1 << 40
    fired = torch.zeros(case.dict_size, device=case.device, dtype=torch.bool)

    def step(source: Tensor, target: Tensor) -> None:
        dead_mask = silent_tokens > 10_000_000 if len(dead) else None
        variance = (target - target.mean(0)).pow(2).sum()
        out = coder(source, target, dead_mask=dead_mask, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + AUXK_ALPHA * out.auxk_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        silent_tokens.add_(len(source))
        silent_tokens[fired] = 0
        fired.zero_()

    return step


if __name__ == "__main__":
    serve(make, importlib.metadata.version("eai-sparsify"))
