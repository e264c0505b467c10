"""SAELens trains a transcoder: whole `step` calls of its trainer, on its Matryoshka batch top-k.

It knows autoencoders of this kind only: it is given the target, and its encoder is handed the source instead. Latents
count as dead after as many batches as with us, not 1,000.
"""

from typing import Any

from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.trainee import Task, scheduled, serve


class Trainer:
    """Its trainer at work."""

    def __init__(self, task: Task) -> None:
        self.sae = MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                d_in=task.d_in,
                d_sae=task.dict_size,
                k=task.top_k,
                matryoshka_widths=list(task.groups),
                apply_b_dec_to_input=False,
                device="cpu",
                dtype="float32",
            )
        )
        config = SAETrainerConfig(
            total_training_samples=task.batch_size * (len(task.rates) + 1),
            train_batch_size_samples=task.batch_size,
            lr=task.lr,
            lr_end=task.lr,
            dead_feature_window=task.n_batches_to_dead,
            device="cpu",
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer = SAETrainer(config, self.sae, iter(()))
        self.trainer.lr_scheduler = scheduled(self.trainer.optimizer, task)
        self.source = Tensor()
        encode = self.sae.encode_with_hidden_pre

        def encode_source(_: Tensor) -> Any:
            return encode(self.source)

        self.sae.encode_with_hidden_pre = encode_source

    def step(self, source: Tensor, target: Tensor) -> None:
        self.source = source
        self.trainer.step(target)
        self.trainer.n_training_steps += 1

    def parameters(self) -> dict[str, Tensor]:
        norm = self.sae.W_dec.detach().norm(dim=1)  # its pre-latents are multiplied by it, its latents divided
        return {
            "W_enc": self.sae.W_enc * norm,
            "b_enc": self.sae.b_enc * norm,
            "W_dec": self.sae.W_dec / norm[:, None],
            "b_dec": self.sae.b_dec,
        }


if __name__ == "__main__":
    serve(Trainer)
