"""dictionary_learning: its batch top-k and Matryoshka batch top-k trainers, whole `update` calls.

It trains autoencoders only, so the target is the source. Steps are those after the first thousand, when the running
threshold is updated too.
"""

import importlib.metadata
import sys
from unittest.mock import MagicMock

# Only its activation buffer uses nnsight, whose torchvision does not load beside a CPU build of torch.
sys.modules["nnsight"] = MagicMock()

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.contest import Case  # noqa: E402
from benchmarks.worker import SILENT, Step, dead_latents, serve  # noqa: E402

STEP = 10_000


def make(case: Case) -> Step:
    options = {
        "steps": 1 << 20,
        "activation_dim": case.d,
        "dict_size": case.dict_size,
        "k": case.top_k,
        "layer": 0,
        "lm_name": "none",
        "device": case.device,
    }
    dead = dead_latents(case)
    if len(case.groups) > 1:
        parts = [(end - start) / case.dict_size for start, end in zip((0, *case.groups), case.groups, strict=False)]
        trainer = MatryoshkaBatchTopKTrainer(**options, group_fractions=parts)
        trainer.ae.b_enc.data[dead] = SILENT
    else:
        trainer = BatchTopKTrainer(**options)
        trainer.ae.encoder.bias.data[dead] = SILENT
    trainer.num_tokens_since_fired[dead] = 1 << 40

    def step(source: Tensor, target: Tensor) -> None:
        trainer.update(STEP, source)

    return step


if __name__ == "__main__":
    serve(make, importlib.metadata.version("dictionary-learning"))
