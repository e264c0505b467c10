"""What a gang will cost, from arithmetic and a look into the cache; for seconds a matrix product is timed on the spot.

The constants were measured on two quiet cores with Gemma 3 270M at layer 12, float32, in the README's two sweeps
(docs/log.md): 81,920 tokens took 88 to 130 s in the language model, 508 steps of four cells 200 s at dict_size 4608 and
9216, 790 s at 18432 and 36864. The product of `machine_flops` ran at 185 GFLOP/s there. Expect other machines to differ
by half.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sweep.cached import Cached, Processor
from sweep.config import Cell, Model, Site, StreamConfig
from sweep.epochs import BLOCKS_PER_WINDOW, Epochs
from sweep.schedule import n_refit_batches
from sweep.tokens import ROWS_PER_BLOCK, row_bytes, row_counts

__all__ = ["Beside", "Cost", "Setting", "gang_cost", "machine_flops", "training_flops"]

STEP_SHARE = 0.25
"""The encoder's product, at the machine's rate, in the time of a sparse step; the same at all widths above."""

LANGUAGE_MODEL_SHARE = 0.6
"""Products with the weights, at the machine's rate, in the time of a pass of the language model."""

CONVERSION_SECONDS = 0.3e-6
"""Unpacking and converting a packaged model, per parameter: 56 to 98 s for 268 million."""

TOKENISE_SECONDS = 60e-6
"""Reading and tokenising text, per token: 5 s for 81,280."""

START_SECONDS = 10.0
"""Imports, tokenizer and language model of a job."""

PROCESS_BYTES = 2**30
"""Python with torch, transformers and a tokenizer of 262,144 words: 0.7 GiB resident, and what the allocators keep."""

LARGEST_VOCABULARY = 262_144
"""Gemma 3's; how many words a model embeds is not among its options."""

ACTIVATIONS_IN_FLIGHT = 20
"""Tensors of tokens x d_in that a pass of the language model holds at once: 0.1 GiB over its weights."""

LATENT_ENTRY_BYTES = 64
"""An active latent in the sparse step: its place, value and gradient, and their sorted copies."""

REFIT_MATRICES = 8
"""By latent: weights as trained, as found and the best of them, what the source explains, changes, residuals,
directions and what those turn into."""

DENSE_LATENTS = 7
"""Tensors of batch x dict_size that the dense step holds at once as it runs on a GPU (6.6, measured on a CPU)."""


@dataclass(frozen=True)
class Beside:
    """A baseline that is scored beside the cells: its site and width."""

    site: Site
    dict_size: int


ABLATIONS = ("zero", "mean")
"""What the language model is also run with in the place of a prediction, once for every hook."""


@dataclass(frozen=True)
class Setting:
    """Where a gang runs and what is there already."""

    cached: Cached
    processor: Processor
    cache_gib: float
    n_causal_rows: int = 0
    done: frozenset[str] = frozenset()
    """Cells that train no more; baselines are scored at their layers."""
    beside: Sequence[Beside] = ()


@dataclass(frozen=True)
class Cost:
    """Upper estimates: cells that are resumed and baselines that have their row already make it cheaper."""

    has_model: bool
    converted_params: int
    """Parameters of a packaged model to be converted; 0 where it is there."""
    tokenised_tokens: int
    """Tokens of text to be read; 0 where the token file is there."""
    language_model_tokens: int
    cached_tokens: int
    """Tokens whose activations come from the cache."""
    keeps: bool
    """Whether activations fit `cache_gib`, so that none is harvested twice, by whatever number of jobs."""
    language_model_flops: float
    training_flops: float
    evaluation_flops: float
    memory_bytes: float
    disk_bytes: float

    def seconds(self, flops_per_second: float, *, shared: bool = False) -> float:
        """About how long it takes on a CPU with this matrix-product rate.

        `shared`: another job of the same stream makes model, tokens and activations, where they are kept.
        """
        flops = self.training_flops / STEP_SHARE + self.evaluation_flops
        seconds = START_SECONDS
        if not (shared and self.keeps):
            flops += self.language_model_flops / LANGUAGE_MODEL_SHARE
        if not shared:
            seconds += CONVERSION_SECONDS * self.converted_params + TOKENISE_SECONDS * self.tokenised_tokens
        return seconds + flops / flops_per_second


def gang_cost(gang: Sequence[Cell], setting: Setting) -> Cost:
    """Cost of training and evaluating cells of one stream in one process."""
    gang = [trained(cell) if cell.cell_id in setting.done else cell for cell in gang] if setting.done else gang
    stream = gang[0].stream
    model, data, rows = stream.model, stream.data, row_counts(stream.data)
    sites = list(dict.fromkeys(cell.site for cell in gang))
    beside = [one for one in setting.beside if one.site.layer in {site.layer for site in sites}]
    kept_bytes = sum(rows.values()) * row_bytes(model, data) * len(sites)
    keeps = kept_bytes <= setting.cache_gib * 2**30
    others = {one.site for one in beside} - set(sites)
    harvested, cached = reads(gang, setting, others, keeps=keeps)
    depth = (max(site.deepest_layer for site in sites) + 1) / model.n_layers
    has_model = setting.cached.has_model(model)
    to_convert = model.model_format == "package" and not has_model
    has_tokens = setting.cached.has_tokens(data, model)
    parameters = sum(cell.n_train_params for cell in gang)
    widths = [cell.capacity.dict_size for cell in gang] + [one.dict_size for one in beside]
    return Cost(
        has_model=has_model,
        converted_params=n_params(model) if to_convert else 0,
        tokenised_tokens=0 if has_tokens else sum(rows.values()) * (data.seq_len - 1),
        language_model_tokens=harvested,
        cached_tokens=cached,
        keeps=keeps,
        language_model_flops=2.0 * model.n_body_params * depth * harvested,
        training_flops=sum(map(training_flops, gang)),
        evaluation_flops=sum(scoring_flops(width, stream) for width in widths)
        + splicing_flops(gang, len(beside), min(setting.n_causal_rows, rows["heldout"])),
        memory_bytes=memory(gang, beside, len(sites) + len(others), setting, harvested > 0, to_convert),
        disk_bytes=(kept_bytes * harvested / max(harvested + cached, 1) if keeps else 0)
        + 4.0 * parameters * (1 + 2 * 3)  # the transcoder, and two checkpoints of weights and moments
        + (4.0 * n_params(model) if to_convert else 0),
    )


def trained(cell: Cell) -> Cell:
    """The cell with no step left to take."""
    return replace(cell, schedule=replace(cell.schedule, steps=0))


def reads(gang: Sequence[Cell], setting: Setting, others: Collection[Site], *, keeps: bool) -> tuple[int, int]:
    """Tokens, BOS counted, whose activations the language model makes, and those that are in the cache.

    `others` are sites that only the held-out rows are read at; they come from the pass that those of the cells do.
    """
    stream = gang[0].stream
    rows, seq_len = row_counts(stream.data), stream.data.seq_len
    epochs = Epochs(rows["train"] // ROWS_PER_BLOCK, seq_len)
    n_steps = max(cell.schedule.steps for cell in gang)
    n_reads = epochs.n_reads(n_steps * stream.batch_size)
    if not n_steps:  # cells that are done are not calibrated again
        rows = {**rows, "calibration": 0}
    if not keeps:
        n_reads += epochs.n_reads(max(map(n_refit_batches, gang)) * stream.batch_size)
        return (n_reads * ROWS_PER_BLOCK + rows["calibration"] + rows["heldout"]) * seq_len, 0
    sites = {cell.site for cell in gang}
    there = setting.cached.n_blocks(stream, sites, setting.processor)
    there["heldout"] = setting.cached.n_blocks(stream, sites | {*others}, setting.processor)["heldout"]
    needed = {**rows, "train": min(n_reads, epochs.n_blocks) * ROWS_PER_BLOCK}
    missing = sum(max(n - there[split] * ROWS_PER_BLOCK, 0) for split, n in needed.items())
    return missing * seq_len, (sum(needed.values()) - missing) * seq_len


def memory(
    gang: Sequence[Cell],
    beside: Sequence[Beside],
    n_sites: int,
    setting: Setting,
    harvests: bool,
    to_convert: bool,
) -> float:
    """Bytes that a job takes where its cells live: on the GPU it has, else in main memory.

    What counts once per job, whatever the number of cells: the process, the language model unless all activations are
    in the cache and no prediction is put into it, a window of activations with its copy.
    """
    stream, processor = gang[0].stream, setting.processor
    model = stream.model
    window = 2 * BLOCKS_PER_WINDOW * ROWS_PER_BLOCK * row_bytes(model, stream.data) * n_sites
    cells = 4.0 * sum(4 * cell.n_train_params for cell in gang)  # weights, two moments, the folded copy at the end
    baselines = 4.0 * sum(one.dict_size * (model.d_in + model.d_out) for one in beside)
    beside_cells = max(max(step_bytes(cell, processor), refit_bytes(cell, n_sites)) for cell in gang)
    training = PROCESS_BYTES + window + cells + baselines + beside_cells
    if harvests or setting.n_causal_rows:
        training += language_model_bytes(stream)
    converting = PROCESS_BYTES + 2 * 4.0 * n_params(model) if to_convert else 0.0
    return training if processor.gpu else max(training, converting)


def step_bytes(cell: Cell, processor: Processor) -> float:
    """What a training step takes beside weights and moments."""
    schedule, capacity, model = cell.schedule, cell.capacity, cell.model
    if processor.gpu:  # the dense step, and the gradients of all weights
        return 4.0 * (DENSE_LATENTS * schedule.batch_size * capacity.dict_size + cell.n_train_params)
    rows = 3 * 4.0 * (len(capacity.groups) + 1) * model.d_out
    return schedule.batch_size * (rows + LATENT_ENTRY_BYTES * (capacity.top_k + cell.revival.top_k_aux))


def refit_bytes(cell: Cell, n_sites: int) -> float:
    """What a refit takes beside weights and moments: activations of all sites and the scaled ones of its own, active
    latents in two orders, and some matrices of the decoder's size."""
    n_tokens, model = n_refit_batches(cell) * cell.schedule.batch_size, cell.model
    if not n_tokens:
        return 0.0
    per_token = 4 * (model.d_in + model.d_out) * (n_sites + 1) + 16 * cell.capacity.top_k
    return n_tokens * per_token + 4.0 * REFIT_MATRICES * cell.capacity.dict_size * model.d_out


def language_model_bytes(stream: StreamConfig) -> float:
    """Weights, and what a pass over one block holds."""
    itemsize = {"float32": 4, "bfloat16": 2}[stream.model.model_dtype]
    in_flight = ACTIVATIONS_IN_FLIGHT * ROWS_PER_BLOCK * stream.data.seq_len * stream.model.d_in
    return float(itemsize * (n_params(stream.model) + in_flight))


def n_params(model: Model) -> int:
    """Parameters of the language model, embeddings included; at most, as its vocabulary is not known here."""
    return model.n_body_params + LARGEST_VOCABULARY * model.d_in


def training_flops(cell: Cell) -> float:
    """Of the encoder's products, the larger part of a sparse step; 2 flops per weight and token.

    A refit takes about as long as training on its sample once does.
    """
    per_token = 2.0 * cell.capacity.dict_size * cell.model.d_in
    return per_token * (cell.schedule.steps + n_refit_batches(cell)) * cell.schedule.batch_size


def scoring_flops(dict_size: int, stream: StreamConfig) -> float:
    """Of encoding and decoding calibration and held-out tokens, and of bounds on all cosines of decoder rows."""
    model, rows = stream.model, row_counts(stream.data)
    n_tokens = (rows["calibration"] + rows["heldout"]) * (stream.data.seq_len - 1)
    return 2.0 * dict_size * ((model.d_in + model.d_out) * n_tokens + dict_size * model.d_out / 6)


def splicing_flops(gang: Sequence[Cell], n_baselines: int, n_rows: int) -> float:
    """Of running the language model with each prediction in it: a whole pass, and for every other the layers above."""
    model = gang[0].model
    hooks = {cell.site.hook_names[1]: cell.site.layer for cell in gang}
    layers = [0, *(layer for layer in hooks.values() for _ in ABLATIONS), *(cell.site.layer for cell in gang)]
    layers += [min(hooks.values())] * n_baselines
    unembedding = LARGEST_VOCABULARY * model.d_in
    params = sum(unembedding + model.n_body_params * (1 - layer / model.n_layers) for layer in layers)
    return 2.0 * params * n_rows * gang[0].data.seq_len


def machine_flops() -> float:
    """Floating-point operations a second of a single-precision matrix product here, the best of a few.

    Takes a tenth of a second.
    """
    import numpy as np

    n = 1024
    a = np.ones((n, n), dtype=np.float32)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        np.matmul(a, a)
        seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / min(seconds)
