"""EleutherAI's sparsify trains a transcoder: its coder, its loss and the default optimiser of its trainer.

That optimiser is schedule-free and takes one learning rate throughout. As in its trainer, the biases are set from the
means of the first batch; the auxiliary loss is off, as by default.
"""

import os

import torch
from torch import Tensor

from benchmarks.trainee import Task, serve

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD


class Coder:
    """Its coder in training."""

    def __init__(self, task: Task) -> None:
        config = SparseCoderConfig(num_latents=task.dict_size, k=task.top_k, transcode=True)
        self.coder = SparseCoder(task.d_in, config, "cpu", dtype=torch.float32)
        groups = [{"params": self.coder.parameters(), "lr": task.lr}]
        self.optimizer = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
        self.optimizer.train()
        self.first = True

    def step(self, source: Tensor, target: Tensor) -> None:
        if self.first:
            self.coder.encoder.bias.data = -source.mean(0) @ self.coder.encoder.weight.data.T
            self.coder.b_dec.data = target.mean(0)
            self.first = False
        out = self.coder(source, target, total_variance=(target - target.mean(0)).pow(2).sum())
        out.fvu.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> dict[str, Tensor]:
        self.optimizer.eval()
        encoder = self.coder.encoder
        return {
            "W_enc": encoder.weight.T,
            "b_enc": encoder.bias,
            "W_dec": self.coder.W_dec,
            "b_dec": self.coder.b_dec,
        }


if __name__ == "__main__":
    serve(Coder)
