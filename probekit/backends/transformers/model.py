"""A transformers decoder behind probekit's model protocol."""

from __future__ import annotations

import hashlib
import importlib.metadata
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from probekit.backends.self_check import self_check
from probekit.core import Batch, BosPolicy, CapabilityError, Forward, ModelError, ModelInfo, Progress, Request
from probekit.reduce import Partial

from .architectures import Architecture, architecture_of
from .forward_pass import evaluating, run_pass
from .tokens import token_strings, tokenize, tokenizer_hash

_FULL_HASH_LIMIT = 4 << 30  # bytes of weights up to which the hash reads every one of them
_SAMPLE = 1 << 16  # entries that the hash reads of each tensor beyond that


class TransformersModel:
    """A causal decoder of transformers, seen through probekit's points.

    Build it with `probekit.open_model`. Weights, configuration, attention implementation, training
    mode and other people's hooks are the same after every pass, also after an exception.
    """

    def __init__(self, config: Any, tokenizer: Any, name: str, revision: str, loader: Callable[[], Any]) -> None:
        self.tokenizer = tokenizer
        self.architecture: Architecture = architecture_of(config, name)
        self._config, self._loader = config.get_text_config(), loader
        self._name, self._revision = name, revision
        self.folder: Path | None = None  # where it was loaded from
        self._module: Any = None
        self._lock = threading.RLock()
        self._weights_hash: str | None = None

    @classmethod
    def from_folder(
        cls, folder: Path, *, name: str, revision: str = "", dtype: str | None = None, device: str | None = None
    ) -> Self:
        """A model saved in a folder; reads configuration and tokenizer now, the weights at `load`.

        Args:
            folder: holds config.json, weights and tokenizer files.
            name: the spelling under which it was opened.
            revision: commit or version of the weights.
            dtype: type of the weights, such as "float32"; as stored if None.
            device: where to put them; the first accelerator, or else the CPU, if None.

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
            wanted = getattr(torch, dtype) if dtype else "auto"
            try:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, local_files_only=True)
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise ModelError(f"The weights of {name!r} cannot be loaded: {error}") from error
            return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

        model = cls(config, tokenizer, name, revision, loader)
        model.folder = folder
        return model

    @classmethod
    def from_loaded(cls, model: Any, tokenizer: Any, *, name: str | None = None) -> Self:
        """A model that the caller holds already; it is never changed."""
        named = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        revision = getattr(model.config, "_commit_hash", None) or ""
        return cls(model.config, tokenizer, named, revision, lambda: model)

    def load(self) -> Self:
        """Load the weights and check that what is captured is what the model computes.

        Raises:
            ModelError: the weights cannot be loaded.
            SelfCheckError: the captured activations contradict the model's own output.
        """
        with self._lock:
            if self._module is None:
                self._module = self._loader()
                try:
                    self_check(self)
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
        c, heads = self._config, self._config.num_attention_heads
        parameter = next(self._module.parameters()) if self._module is not None else None
        dtype = parameter.dtype if parameter is not None else getattr(c, "dtype", None) or torch.float32
        return ModelInfo(
            name=self._name,
            kind="decoder",
            architecture=c.model_type,
            n_layers=c.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            d_model=c.hidden_size,
            d_head=getattr(c, "head_dim", None) or c.hidden_size // heads,
            d_mlp=getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * c.hidden_size,
            d_vocab=c.vocab_size,
            n_params=self._count_parameters(),
            context_length=getattr(c, "max_position_embeddings", None),
            dtype=str(dtype).removeprefix("torch."),
            device=str(parameter.device) if parameter is not None else "cpu",
            sites=self.architecture.sites,
            has_bos=self.tokenizer.bos_token_id is not None,
            revision=self._revision,
        )

    def _count_parameters(self) -> int:
        if self._module is not None:
            return sum(p.numel() for p in self._module.parameters())
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(self._config).parameters())

    def tokenize(self, texts: Sequence[str], bos: BosPolicy = "model") -> Batch:
        """The exact token ids that will run.

        Args:
            texts: the texts.
            bos: "model" adds what the tokenizer adds by itself, "always" a beginning-of-sequence
                token, "never" nothing.
        """
        return tokenize(self.tokenizer, texts, bos)

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each id shows as."""
        return token_strings(self.tokenizer, ids)

    def provenance(self) -> dict[str, Any]:
        """What fixes this model's numbers."""
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "tokenizers", "numpy")}
        own = getattr(self.module.config, "_attn_implementation", None) or "eager"
        return {
            "model": self.info.as_dict(),
            "weights_hash": self.weights_hash(),
            "weights": "raw (nothing folded or centred)",
            "attention": f"{own}; where attention is captured, exact float32 softmax over blocks of queries",
            "tokenizer_hash": self._tokenizer_hash,
            "versions": versions,
            "backend": "transformers",
        }

    @cached_property
    def _tokenizer_hash(self) -> str:
        return tokenizer_hash(self.tokenizer)

    def weights_hash(self, *, fresh: bool = False) -> str:
        """sha256 over the weights; over an even sample of each tensor where they exceed 4 GiB.

        Args:
            fresh: compute it anew instead of answering from memory.
        """
        if self._weights_hash is None or fresh:
            self._weights_hash = _hash(self.module)
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
        if not isinstance(request, Forward):
            raise CapabilityError(
                f"{self._name!r} is a decoder and cannot serve {type(request).__name__}; "
                "open a text-embedding model such as 'all-minilm-l6-v2' for that."
            )
        with self._lock:
            return run_pass(self, request, batch, progress)

    def own_logits(self, batch: Batch) -> np.ndarray:
        """The model's own logits for one text, computed without probekit's hooks; axes token, vocab."""
        ids = torch.tensor([batch.texts[0].ids], device=self.module.get_input_embeddings().weight.device)
        with self._lock, torch.no_grad(), evaluating(self.module):
            return self.module(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()

    def part(self, path: str, layer: int | None = None) -> nn.Module:
        """A sub-module by its path, from the model or from one of its blocks."""
        if layer is None:
            return self.module.get_submodule(path)
        return self.module.get_submodule(self.architecture.layers)[layer].get_submodule(path)

    @property
    def unembed(self) -> NativeUnembed:
        """The way from a residual row to logits."""
        return NativeUnembed(self)


class NativeUnembed:
    """Final norm and unembedding of a transformers model, past other people's hooks."""

    def __init__(self, model: TransformersModel) -> None:
        head = model.module.get_output_embeddings()
        self.weight, self.bias = head.weight, head.bias
        self._norm = model.part(model.architecture.final_norm)

    def norm(self, rows: Tensor) -> Tensor:
        """The final norm."""
        return self._norm.forward(rows)

    def finish(self, logits: Tensor) -> Tensor:
        """Nothing follows the unembedding in the families of the table."""
        return logits


def _hash(module: nn.Module) -> str:
    state = dict(sorted(module.state_dict(keep_vars=True).items()))
    sampled = sum(t.numel() * t.element_size() for t in state.values()) > _FULL_HASH_LIMIT
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        if sampled and flat.numel() > _SAMPLE:
            flat = flat[:: flat.numel() // _SAMPLE]
        digest.update(memoryview(flat.contiguous().cpu().view(torch.uint8).numpy()))
    return f"sha256{'-sample' if sampled else ''}:{digest.hexdigest()}"
