"""A loaded language model, and what its MLPs read and write: the source and target of transcoders.

1. `model_files.ensure_model_folder` gives a local folder.
2. `load_tokenizer` and `load_language_model` load it; nothing goes to a network from here on.
3. `LanguageModel.check` holds a site's hooks against the loaded model, before the first step.
4. `LanguageModel.harvest` runs rows of tokens once and returns the activations of all sites.
5. `LanguageModel.run` runs them to the last layer's end, `LanguageModel.rerun` again with one activation replaced, and
   `LanguageModel.logits` says what comes out, for some words at a time.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sweep.config import Model, Site
from sweep.devices import settle
from sweep.errors import ModelError, first_line
from sweep.model_files import ensure_model_folder, quiet_transformers
from sweep.provenance import multiplies_bfloat16

__all__ = [
    "Activations",
    "Forward",
    "LanguageModel",
    "Pieces",
    "Tokenizer",
    "ensure_model_folder",
    "load_language_model",
    "load_tokenizer",
]

NEAR_MLP = ("hook_resid_mid", "ln2.hook_normalized", "ln2.hook_out", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out")
"""Hooks of a block that a transcoder of its MLP might read or predict, from the first to fire to the last."""

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")
"""Files that hold a tokenizer. Without one, transformers gives some models a tokenizer that knows no word at all."""

SLOW_BFLOAT16 = (
    "model_dtype=bfloat16: this processor has no units for it, and the language model takes about 1.5 to 4 "
    "times as long as in float32 (measured with units switched off); set model_dtype=float32"
)
"""What a user should know; docs/log.md has the measurement."""

log = logging.getLogger(__name__)


class Activations(NamedTuple):
    """What a transcoder reads and what it predicts, one row per token."""

    source: Float[Tensor, "tokens d_in"]
    target: Float[Tensor, "tokens d_out"]


@dataclass(frozen=True)
class Forward:
    """A pass over whole rows, up to the map onto the vocabulary, and what is needed to run its end again."""

    rows: Int[Tensor, "rows seq"]
    outputs: Any
    """What all layers together gave, as whatever kind of object the map onto the vocabulary takes."""
    activations: dict[str, Float[Tensor, "tokens width"]]
    """By full hook name, as `LanguageModel.harvest` gives them."""
    entering: dict[int, Any]
    """By layer from 1 on: what the layer below handed to it."""

    @property
    def leaving(self) -> Float[Tensor, "rows seq width"]:
        """What enters the map onto the vocabulary."""
        leaving: Tensor = self.outputs.last_hidden_state
        return leaving


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids, without special tokens: what looks like one in a text is read as plain text."""

    bos_token_id: int
    _backend: Any

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text."""
        if not texts:
            return []
        encoded = self._backend(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens by name; bytes that are no character come out as \ufffd."""
        text: str = self._backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class Pieces(dict[int, str]):
    """The text of single tokens by id, as it stands inside a sentence; decoded once each.

    Tokenizers drop the space before the first word of a text, so a token is decoded after another one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        (self._before,) = tokenizer.encode_batch(["a"])
        self._n_before = len(tokenizer.decode(self._before))

    def __missing__(self, token: int) -> str:
        self[token] = self._tokenizer.decode([*self._before, token])[self._n_before :]
        return self[token]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in a model's folder. Without a BOS token, EOS takes its place, as in GPT-2.

    Raises:
        ModelError: no tokenizer can be read there, or it has neither token.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
        raise ModelError(f"{folder} has no tokenizer that can be read (no {', '.join(VOCABULARIES)}); save one there")
    try:
        with quiet_transformers():
            backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be read ({first_line(error)})") from error
    bos = backend.bos_token_id if backend.bos_token_id is not None else backend.eos_token_id
    if bos is None:
        raise ModelError(f"{folder}: its tokenizer has neither a BOS nor an EOS token to begin rows with")
    return Tokenizer(bos, backend)


class LanguageModel:
    """A frozen language model on one device. Its weights never change and no gradient reaches them.

    Attributes:
        n_tokens_seen: tokens that `harvest` has run through it so far.
        device: where it runs, and where activations come out.
    """

    def __init__(self, bridge: Any, model: Model, activation_dtype: torch.dtype) -> None:
        self.n_tokens_seen = 0
        self.device = torch.device(bridge.cfg.device)
        self._bridge = bridge
        self._name = model.model
        self._activation_dtype = activation_dtype

    def check(self, site: Site, d_in: int, d_out: int) -> None:
        """Hold a site against the loaded model, with a pass over two tokens that are not counted.

        Raises:
            ModelError: a hook does not exist, does not fire or has another width.
        """
        captured = self._capture(torch.zeros(1, 2, dtype=torch.int64), self._hooks.intersection(site.hook_names))
        source, target = site.hook_names
        for key, hook, name, width_key, width in (
            ("hook_in", site.hook_in, source, "d_in", d_in),
            ("hook_out", site.hook_out, target, "d_out", d_out),
        ):
            if name not in captured:
                raise self._no_such_hook(name, f"{key}={hook}: ")
            if (shape := tuple(captured[name].shape)) != (1, 1, width):
                raise ModelError(
                    f"{key}={hook}: {name} of {self._name} holds {'x'.join(map(str, shape[2:]))} numbers per token, "
                    f"not {width_key}={width}; {self._mlp_hooks(name)}"
                )

    def harvest(self, rows: Int[Tensor, "rows seq"], sites: Collection[Site]) -> dict[Site, Activations]:
        """Run rows of tokens through the model once, no further than the deepest hook asked for.

        Position 0 (BOS) is dropped; position t of row r is at r * (seq - 1) + t - 1. Sites that share a hook
        share its tensor. A site's numbers do not depend on which other sites are asked for.

        Raises:
            ModelError: a hook does not exist or does not fire; `check` says so before the first step.
        """
        names = {name for site in sites for name in site.hook_names}
        captured = self._capture(rows, names)
        if missing := sorted(names - captured.keys()):
            raise self._no_such_hook(missing[0])
        self.n_tokens_seen += rows.numel()
        flat = {name: tensor.flatten(0, 1) for name, tensor in captured.items()}
        return {site: Activations(*(flat[name] for name in site.hook_names)) for site in sites}

    @property
    def vocabulary(self) -> int:
        """Numbers in the logits of a token."""
        return int(self._bridge.cfg.d_vocab)

    @torch.no_grad()
    def run(self, rows: Int[Tensor, "rows seq"], names: Collection[str], layers: Collection[int]) -> Forward:
        """Run rows of tokens through all layers, keeping activations by full hook name and what enters some layers.

        Raises:
            ModelError: a hook does not exist or does not fire.
        """
        rows, entering = rows.to(self.device), dict[int, Any]()
        if missing := sorted(set(names) - self._hooks):
            raise self._no_such_hook(missing[0])
        captured: dict[str, Tensor] = {}
        hooks = [(name, lambda tensor, hook, name=name: captured.update({name: self._kept(tensor)})) for name in names]
        with contextlib.ExitStack() as stack:
            for layer in set(layers) - {0}:
                below = self._bridge.blocks[layer - 1].original_component
                stack.enter_context(
                    below.register_forward_hook(
                        lambda module, inputs, output, layer=layer: entering.update({layer: output})
                    )
                )
            outputs = self._outputs(rows, hooks)
        if missing := sorted(set(names) - captured.keys()):
            raise self._no_such_hook(missing[0])
        return Forward(rows, outputs, {name: tensor.flatten(0, 1) for name, tensor in captured.items()}, entering)

    @torch.no_grad()
    def rerun(
        self, forward: Forward, name: str, values: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "rows seq d_model"]:
        """What leaves the layers with `values` (broadcast) for the activation `name` at every position but 0.

        Position 0 keeps what the model computes there. Only the layer of `name` and those above it run: the layers
        below give what they gave in `forward`, which `run` must have kept for that layer.
        """

        def replace_rest(tensor: Tensor, hook: Any) -> Tensor:
            replaced, rest = tensor.clone(), tensor[:, 1:]
            replaced[:, 1:] = values.to(tensor).expand(rest.shape[:2].numel(), -1).view_as(rest)
            return replaced

        layer = int(name.split(".")[1])
        below = [block.original_component for block in self._bridge.blocks[:layer]]
        with answering(below, forward.entering.get(layer)):
            leaving: Tensor = self._outputs(forward.rows, [(name, replace_rest)]).last_hidden_state
        return leaving

    @torch.no_grad()
    def logits(
        self, forward: Forward, leaving: Float[Tensor, "tokens d_model"], words: slice
    ) -> Float[Tensor, "tokens words"]:
        """Of some words of the vocabulary, for tokens of which this leaves the layers.

        By the model's own code, which may scale or cap what the map onto the vocabulary gives. `forward` may be of
        other rows.
        """
        unembed = self._unembed
        bias = None if unembed.bias is None else unembed.bias[words]
        some = torch.nn.functional.linear(leaving, unembed.weight[words], bias).unsqueeze(0)
        outputs = replace(forward.outputs, last_hidden_state=leaving.unsqueeze(0))
        tokens = forward.rows.new_zeros(1, len(leaving))
        with answering(self._all_layers, outputs), answering([unembed], some):
            logits: Tensor = self._bridge.original_model(input_ids=tokens, use_cache=False).logits
        return logits.squeeze(0)

    def _outputs(self, rows: Int[Tensor, "rows seq"], hooks: list[tuple[str, Callable[..., Any]]]) -> Any:
        """What all layers give together; the map onto the vocabulary is not run."""
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        found: list[Any] = []

        def stop(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise StopAtLayerException(*inputs)

        with contextlib.ExitStack() as stack:
            for module in self._all_layers:
                stack.enter_context(module.register_forward_hook(lambda module, inputs, output: found.append(output)))
            stack.enter_context(self._unembed.register_forward_pre_hook(stop))
            self._bridge.run_with_hooks(rows, return_type=None, fwd_hooks=hooks, use_cache=False)
        return found[-1]

    @property
    def _unembed(self) -> Any:
        return self._bridge.unembed.original_component

    @property
    def _all_layers(self) -> list[torch.nn.Module]:
        """Modules that hold all layers, each inside the one before it: a model calls one of them."""
        network = self._bridge.original_model
        return list(dict.fromkeys([network.base_model, network.get_decoder()]))  # most have one

    def _kept(self, tensor: Float[Tensor, "rows seq *width"]) -> Float[Tensor, "rows seq-1 *width"]:
        """A contiguous copy without position 0, in the dtype of activations."""
        return tensor[:, 1:].to(self._activation_dtype, copy=True, memory_format=torch.contiguous_format)

    def _capture(
        self, rows: Int[Tensor, "rows seq"], names: Collection[str]
    ) -> dict[str, Float[Tensor, "rows seq-1 *width"]]:
        """Contiguous copies of the named activations without position 0; the pass ends when it has them all.

        A name the model lacks, or that never fires, is missing from the result.
        """
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        captured: dict[str, Tensor] = {}
        if not self._hooks.issuperset(names):
            return captured

        def keep(name: str) -> Callable[[Tensor, Any], None]:
            def copy(tensor: Tensor, hook: Any) -> None:
                captured[name] = self._kept(tensor)
                if len(captured) == len(names):
                    raise StopAtLayerException(tensor)

            return copy

        with torch.no_grad():  # not inference_mode: tensors made there may not enter autograd
            self._bridge.run_with_hooks(
                rows.to(self.device), return_type=None, fwd_hooks=[(name, keep(name)) for name in names]
            )
        return captured

    @cached_property
    def _hooks(self) -> frozenset[str]:
        """Names of the activations that can be read, without those transformer_lens has switched off."""
        names = set()
        for name, point in self._bridge.hook_dict.items():
            with contextlib.suppress(ValueError):
                self._bridge.check_hooks_to_add(point, name, print)
                names.add(name)
        return frozenset(names)

    def _no_such_hook(self, name: str, prefix: str = "") -> ModelError:
        return ModelError(f"{prefix}{self._name} has no activation {name}; {self._mlp_hooks(name)}")

    def _mlp_hooks(self, name: str) -> str:
        """What can be read near the MLP of the layer that a hook names."""
        block = ".".join(name.split(".")[:2])
        near = [hook for part in NEAR_MLP if (hook := f"{block}.{part}") in self._hooks]
        return f"near that MLP there are {', '.join(near)}" if near else f"it has no MLP hooks in {block}"


def load_language_model(
    model: Model, folder: Path, device: str, activation_dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load the model saved in `folder` onto a device (cpu, cuda or cuda:<n>), frozen, in its `model_dtype`.

    Args:
        activation_dtype: what `harvest` casts activations to.

    Side effects: warns where the processor has no units for bfloat16.

    Raises:
        ModelError: the folder cannot be loaded, or has another number of layers than declared.
    """
    settle()
    if model.model_dtype == "bfloat16" and torch.device(device).type == "cpu" and not multiplies_bfloat16():
        log.warning(SLOW_BFLOAT16)
    if not any(folder.glob("*.safetensors")):  # without one, transformers would unpickle a .bin file
        raise ModelError(f"{folder} holds no *.safetensors; save the model there with save_pretrained")
    from safetensors import SafetensorError
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    without_words = PreTrainedTokenizerFast(tokenizer_object=Backend(BPE()))  # the model's own takes seconds to load
    try:
        with quiet_transformers():
            bridge = TransformerBridge.boot_transformers(
                str(folder.absolute()),
                device=device,
                dtype=getattr(torch, model.model_dtype),
                tokenizer=without_words,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        again = (
            "" if model.model_format == "directory" else "; if a file is damaged, delete the folder: it is made again"
        )
        raise ModelError(
            f"model={model.model}: {folder} cannot be loaded on {device} ({first_line(error)}){again}"
        ) from error
    if bridge.cfg.n_layers != model.n_layers:
        raise ModelError(f"n_layers={model.n_layers}: model={model.model} in {folder} has {bridge.cfg.n_layers} layers")
    bridge.eval()
    bridge.requires_grad_(False)
    return LanguageModel(bridge, model, activation_dtype)


@contextlib.contextmanager
def answering(modules: Collection[torch.nn.Module], answer: Any) -> Iterator[None]:
    """Let modules compute nothing and hand on `answer`, whatever kind of object it is."""
    for module in modules:
        module.forward = lambda *inputs, **options: answer
    try:
        yield
    finally:
        for module in modules:
            del module.forward
