"""dictionary_learning trains a transcoder: whole `update` calls of its Matryoshka batch top-k trainer.

It knows autoencoders only: it is given the target, and its encoder is handed the source instead. The decoder's bias is
added to the source because the encoder subtracts it. Latents count as dead after as many tokens as with us, not after
10 million.
"""

import sys
from typing import Any
from unittest.mock import MagicMock

# Only its activation buffer uses nnsight, whose torchvision does not load beside a CPU build of torch.
sys.modules["nnsight"] = MagicMock()

from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.trainee import Task, scheduled, serve  # noqa: E402


class Trainer:
    """Its trainer at work."""

    def __init__(self, task: Task) -> None:
        widths = [end - start for start, end in zip((0, *task.groups), task.groups, strict=False)]
        self.trainer = MatryoshkaBatchTopKTrainer(
            steps=len(task.rates) + 1,
            activation_dim=task.d_in,
            dict_size=task.dict_size,
            k=task.top_k,
            layer=0,
            lm_name="none",
            group_fractions=[width / task.dict_size for width in widths],
            lr=task.lr,
            warmup_steps=0,
            seed=task.seed,
            device="cpu",
        )
        self.trainer.scheduler = scheduled(self.trainer.optimizer, task)
        self.trainer.dead_feature_threshold = task.n_batches_to_dead * task.batch_size
        self.n_steps = 0
        self.source = Tensor()
        ae, encode = self.trainer.ae, self.trainer.ae.encode

        def encode_source(_: Tensor, **options: Any) -> Any:
            return encode(self.source + ae.b_dec, **options)

        ae.encode = encode_source

    def step(self, source: Tensor, target: Tensor) -> None:
        self.source = source
        self.trainer.update(self.n_steps, target)
        self.n_steps += 1

    def parameters(self) -> dict[str, Tensor]:
        ae = self.trainer.ae
        return {"W_enc": ae.W_enc, "b_enc": ae.b_enc, "W_dec": ae.W_dec, "b_dec": ae.b_dec}


if __name__ == "__main__":
    serve(Trainer)
