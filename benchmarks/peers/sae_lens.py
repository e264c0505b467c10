"""SAELens: its batch top-k and Matryoshka batch top-k autoencoders, whole `step` calls of its trainer.

It has no transcoder of these kinds, so the target is the source. Sparse activations exist for its top-k only, and fail
in the backward pass with the default scaling by decoder norms.
"""

import importlib.metadata

from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.contest import Case
from benchmarks.worker import SILENT, Step, dead_latents, serve


def make(case: Case) -> Step:
    options = {"d_in": case.d, "d_sae": case.dict_size, "k": case.top_k, "device": case.device, "dtype": "float32"}
    if len(case.groups) > 1:
        sae = MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**options, matryoshka_widths=list(case.groups))
        )
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**options))
    config = SAETrainerConfig(
        total_training_samples=case.batch << 20,
        train_batch_size_samples=case.batch,
        lr_end=3e-5,
        device=case.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, iter(()))
    dead = dead_latents(case)
    sae.b_enc.data[dead] = SILENT
    trainer.n_forward_passes_since_fired[dead] = 1e9

    def step(source: Tensor, target: Tensor) -> None:
        trainer.step(source)
        trainer.n_training_steps += 1

    return step


if __name__ == "__main__":
    serve(make, importlib.metadata.version("sae-lens"))
