"""A transformers decoder behind probekit's model protocol."""

from __future__ import annotations

import copy
import importlib.metadata
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from probekit.backends.capture_pass import require_forward
from probekit.backends.continuations import Done, There
from probekit.backends.self_check import self_check
from probekit.core import (
    Batch,
    BosPolicy,
    Branch,
    CapabilityError,
    Chat,
    Generated,
    ModelError,
    ModelInfo,
    Patch,
    Progress,
    Request,
    VocabularyTable,
    VocabularyWeights,
)
from probekit.reduce import Partial

from .architectures import Architecture, architecture_of
from .branching import write_branches
from .forward_pass import evaluating, run_pass
from .generation import generate
from .native_unembed import NativeUnembed
from .relu_attention import RELU
from .tokens import token_strings, tokenize, tokenizer_hash
from .vocabulary import headers_hash, ids_of, vocabulary_table, vocabulary_weights
from .weights import devices_of, hash_of, input_device, is_quantised, output_gram, state_of

_D_MLP = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # first that is set; else 4 · d_model


class TransformersModel:
    """A causal decoder of transformers, seen through probekit's points.

    Build it with `probekit.open_model`. Weights, configuration, attention implementation, training
    mode and other people's hooks are the same after every pass, also after an exception.
    """

    def __init__(self, config: Any, tokenizer: Any, name: str, revision: str, loader: Callable[[], Any]) -> None:
        self.tokenizer = tokenizer
        self.architecture: Architecture = architecture_of(config, name)
        self._whole_config, self._config, self._loader = config, config.get_text_config(), loader
        self._name, self._revision = name, revision
        self.folder: Path | None = None  # where it was loaded from
        self.weights_note = "raw (nothing folded or centred)"
        self._module: Any = None
        self._lock = threading.RLock()
        self._weights_hash: str | None = None
        self._n_params: int | None = None

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        name: str,
        revision: str = "",
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
    ) -> Self:
        """A model saved in a folder; reads configuration and tokenizer now, the weights at `load`.

        Args:
            folder: holds config.json, weights and tokenizer files.
            name: the spelling under which it was opened.
            revision: commit or version of the weights.
            dtype: type of the weights, such as "float32"; as stored if None.
            device: where to put them; the first accelerator, or else the CPU, if None.
            device_map: how to spread blocks over devices, as transformers takes it; in place of `device`.

        Raises:
            ModelError: the folder holds no decoder that probekit knows.
        """
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ModelError(f"Unknown dtype {dtype!r}; expected float32, bfloat16 or float16.")
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            architecture_of(config, name)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{name!r} cannot be read as a transformers model: {error}") from error

        def loader() -> nn.Module:
            there = device or ("cuda" if torch.cuda.is_available() else "cpu")
            packed = getattr(config, "quantization_config", None) is not None  # such weights cannot be moved later
            options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype else "auto"}
            if device_map is not None or packed:
                options["device_map"] = {"": there} if device_map is None else device_map
            try:
                model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
            except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
                raise ModelError(f"The weights of {name!r} cannot be loaded: {error}") from error
            return model.eval() if "device_map" in options else model.eval().to(there)

        model = cls(config, tokenizer, name, revision, loader)
        model.folder = folder
        return model

    @classmethod
    def from_loaded(cls, model: Any, tokenizer: Any, *, name: str | None = None) -> Self:
        """A model that the caller holds already; it is never changed."""
        named = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        revision = getattr(model.config, "_commit_hash", None) or ""
        return cls(model.config, tokenizer, named, revision, lambda: model)

    def changed(self, name: str, change: Callable[[Any], Any], note: str) -> Self:
        """Another model of the same kind: the weights are loaded anew and changed before anything else sees them.

        Args:
            name: how it is called.
            change: takes the loaded transformers model and returns the one to use.
            note: what was changed, for the record.
        """
        model = type(self)(self._whole_config, self.tokenizer, name, self._revision, lambda: change(self._loader()))
        model.weights_note = f"{self.weights_note}; {note}"
        return model

    def load(self) -> Self:
        """Load the weights and check that what is captured is what the model computes.

        Raises:
            ModelError: the weights cannot be loaded.
            SelfCheckError: the captured activations contradict the model's own output.
        """
        with self._lock:
            if self._module is None:
                self._module, self._n_params = self._loader(), None
                try:
                    self_check(self, self._added, sinks=self.architecture.sinks)
                except BaseException:
                    self._module = None
                    raise
        return self

    @property
    def module(self) -> Any:
        """The transformers model itself; loads the weights if they are not loaded yet."""
        if self._module is None:
            self.load()
        return self._module

    @property
    def info(self) -> ModelInfo:
        """Sizes and capabilities."""
        c, heads, kv_heads = self._config, self._config.num_attention_heads, self.architecture.kv_heads
        parameter = None
        if self._module is not None:
            parameter = next((p for p in self._module.parameters() if p.is_floating_point()), None)
        dtype = parameter.dtype if parameter is not None else getattr(c, "dtype", None) or torch.float32
        return ModelInfo(
            name=self._name,
            kind="decoder",
            architecture=c.model_type,
            n_layers=c.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=kv_heads(c) if kv_heads else getattr(c, "num_key_value_heads", None) or heads,
            d_model=c.hidden_size,
            d_head=getattr(c, "head_dim", None) or c.hidden_size // heads,
            d_mlp=next((n for n in (getattr(c, name, None) for name in _D_MLP) if n), 4 * c.hidden_size),
            d_vocab=self._d_vocab(),
            n_params=self._count_parameters(),
            context_length=getattr(c, "max_position_embeddings", None),
            dtype=str(dtype).removeprefix("torch."),
            device="cpu" if self._module is None else devices_of(self._module),
            sites=self.architecture.sites,
            bos_id=self.tokenizer.bos_token_id,
            revision=self._revision,
        )

    def _count_parameters(self) -> int:
        if self._n_params is None:
            if self._module is not None and not is_quantised(self._module):
                self._n_params = sum(p.numel() for p in self._module.parameters())
            else:  # packed weights have fewer entries than parameters
                self._n_params = sum(p.numel() for p in self.skeleton().parameters())
        return self._n_params

    def _d_vocab(self) -> int:
        weight = None if self._module is None else getattr(self._module.get_output_embeddings(), "weight", None)
        return len(weight) if isinstance(weight, Tensor) else int(self._config.vocab_size)

    def tokenize(self, texts: Sequence[Any], bos: BosPolicy = "model", chat: Chat = False) -> Batch:
        """The exact token ids that will run.

        Args:
            texts: the texts.
            bos: "model" adds what the tokenizer adds by itself, "always" a beginning-of-sequence
                token, "never" nothing.
            chat: make each text a turn in the tokenizer's chat template; a string is the system message. A text
                may then be a list of messages ({"role": …, "content": …}).
        """
        return tokenize(self.tokenizer, texts, bos, chat)

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each id shows as."""
        return token_strings(self.tokenizer, ids)

    def provenance(self) -> dict[str, Any]:
        """What fixes this model's numbers; while it is not loaded, what its safetensors files say without their values."""
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "tokenizers", "numpy")}
        headers = None if self.loaded else headers_hash(self.folder)
        if headers is not None:
            digest, note = headers, "not loaded; the hash is of the files' headers, without values"
            attention = "none; the model was not run"
        else:
            own = getattr(self.module.config, "_attn_implementation", None) or "eager"
            digest, note = self.weights_hash(), self.weights_note
            attention = f"{own}; where attention is captured, exact float32 {_kernel(own)} over blocks of queries"
        return {
            "model": self.info.as_dict(),
            "weights_hash": digest,
            "weights": note,
            "attention": attention,
            "tokenizer_hash": self._tokenizer_hash,
            "versions": versions,
            "backend": "transformers",
        }

    @cached_property
    def _tokenizer_hash(self) -> str:
        return tokenizer_hash(self.tokenizer)

    def weights_hash(self, *, fresh: bool = False) -> str:
        """sha256 over the weights; over an even sample of each tensor where they exceed 4 GiB.

        Quantised weights are hashed as they are packed.

        Args:
            fresh: compute it anew instead of answering from memory.
        """
        if self._weights_hash is None or fresh:
            self._weights_hash = hash_of(state_of(self.module))
        return self._weights_hash

    def execute(self, request: Request, batch: Batch, progress: Progress | None = None) -> list[Partial]:
        """One forward pass over the texts of a micro-batch.

        Args:
            request: a `Forward`.
            batch: the texts.
            progress: is told the work done, in GFLOP.

        Returns:
            One partial per capture, in order.

        Raises:
            CapabilityError: the request is no `Forward`, or this model lacks a point of it.
        """
        request = require_forward(request, self._name)
        with self._lock:
            return run_pass(self, request, batch, progress)

    def to_transformer_lens(self) -> Any:
        """A TransformerLens `TransformerBridge` of its own on these very weights; this model stays as it is.

        Do not train it, and do not let it fold weights in place: the tensors are shared.

        Raises:
            ModelError: TransformerLens is not installed, or does not know this architecture.
        """
        self._require_softmax("TransformerLens")
        from probekit.backends.transformer_lens import build_bridge

        return build_bridge(self.module, self.tokenizer, self._name)

    def to_nnsight(self) -> Any:
        """An `nnsight.TransformersModel` of its own on these very weights; this model stays as it is.

        Do not train it: the tensors are shared.

        Raises:
            ModelError: nnsight is not installed.
        """
        self._require_softmax("nnsight")
        from probekit.backends.nnsight import nnsight_twin

        return nnsight_twin(self.module, self.tokenizer)

    def _require_softmax(self, who: str) -> None:
        if self._config._attn_implementation == RELU:
            raise CapabilityError(
                f"{self._name!r} has ReLU in the place of the softmax, which {who} would not run; use the transformers "
                "backend."
            )

    def generate(
        self,
        batch: Batch,
        n_tokens: int,
        patches: Sequence[Patch] = (),
        **options: Any,
    ) -> Generated:
        """Continue each text, while patches change activations; see `generation.generate`."""
        with self._lock:
            return generate(self, batch, n_tokens, patches, **options)

    def branch(self, request: Branch, done: Done, *, memory_limit: int, there: There | None = None) -> None:
        """Write continuations of shared prefixes; see `branching.write_branches`."""
        with self._lock:
            write_branches(self, request, done, memory_limit=memory_limit, there=there)

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._module is not None

    def skeleton(self) -> nn.Module:
        """The model without values, to read names and shapes off."""
        config = copy.deepcopy(self._whole_config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    def vocabulary(self) -> VocabularyTable:
        """Every id of the tokenizer, decoded and encoded again; see `vocabulary.vocabulary_table`."""
        return vocabulary_table(self.tokenizer, self.info.d_vocab)

    def ids_of(self, texts: Sequence[str], *, special: bool = False) -> tuple[tuple[int, ...], ...]:
        """Token ids of texts, with the special tokens that the tokenizer adds by itself if wanted."""
        return ids_of(self.tokenizer, texts, special=special)

    def vocabulary_weights(self) -> VocabularyWeights:
        """Rows of embedding and unembedding; see `vocabulary.vocabulary_weights`."""
        with self._lock:
            return vocabulary_weights(self)

    def own_logits(self, batch: Batch) -> np.ndarray:
        """The model's own logits for one text, computed without probekit's hooks; axes token, vocab."""
        ids = torch.tensor([batch.texts[0].ids], device=input_device(self.module))
        with self._lock, torch.no_grad(), evaluating(self.module):
            return self.module(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()

    def part(self, path: str, layer: int | None = None) -> nn.Module:
        """A sub-module by its path, from the model or from one of its blocks."""
        if layer is None:
            return self.module.get_submodule(path)
        return self.module.get_submodule(self.architecture.layers)[layer].get_submodule(path)

    def _added(self, site: str, values: np.ndarray) -> np.ndarray:
        """What a sub-layer adds to the residual stream; axes layer, token, d_model."""
        dtype = self.module.get_input_embeddings().weight.dtype
        rows = torch.as_tensor(values).to(input_device(self.module), dtype)
        with torch.no_grad():
            done = [self.architecture.added(self.module, self._config, site, i, x) for i, x in enumerate(rows)]
        return torch.stack([x.float().cpu() for x in done]).numpy()

    def output_gram(self, layer: int) -> Tensor:
        """W_O^h (W_O^h)^T of each query head of a block; axes head, d_head, d_head."""
        info = self.info
        return output_gram(self.part(self.architecture.attention, layer), info.n_heads, info.d_head)

    @property
    def unembed(self) -> NativeUnembed:
        """The way from a residual row to logits."""
        return NativeUnembed(self)


def _kernel(own: str) -> str:
    return "ReLU" if own == RELU else "softmax"
