"""A TransformerLens bridge behind probekit's model protocol.

TransformerLens 4 wraps a transformers model in a `TransformerBridge`, whose hook points see activations
and may change them. This backend fills the same `CapturePass` from these hook points as the native one
does from transformers' modules, so analyses run unchanged and the two can be held against each other.
Raw weights only: nothing is folded or centred. Attention is the bridge's own, eager: it holds query × key
of a layer as a whole, so memory grows with the square of a text's length, which plans do not count.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from probekit.backends.capture_pass import CapturePass, require_forward
from probekit.backends.self_check import self_check
from probekit.backends.transformers.tokens import token_strings, tokenize, tokenizer_hash
from probekit.backends.transformers.weights import hash_of, output_gram
from probekit.core import Batch, BosPolicy, CapabilityError, Chat, ModelInfo, Progress, Request
from probekit.reduce import Partial

from .bridge import BridgeUnembed, added, check_bridge, own_weights
from .hooks import HOOKS, SCORES, add_hooks, as_found, served

if TYPE_CHECKING:
    from probekit.backends.transformers import TransformersModel

_SITES = frozenset({*HOOKS, "logits"} - {SCORES})


class TransformerLensModel:
    """A decoder in a TransformerLens bridge, seen through probekit's points.

    Build it with `probekit.open_model(bridge)` or `probekit.open_model(name, backend="transformer_lens")`.
    Weights, configuration, training mode, what components keep and other people's hooks are the same after
    every pass, also after an exception.

    Args:
        bridge: a bridge that the caller holds, or None.
        source: the native model around whose weights a bridge is built, or None.
        name: what it is called in results.
    """

    def __init__(self, bridge: Any, source: TransformersModel | None, name: str) -> None:
        self._bridge, self._source, self._name = bridge, source, name
        self._lock = threading.RLock()
        self._hooks: dict[str, str] | None = None  # by site, the hook point that shows it; None before `load`
        self._weights_hash: str | None = None

    @classmethod
    def from_bridge(cls, bridge: Any, *, name: str | None = None) -> Self:
        """A bridge that the caller holds already; it is never changed.

        Its tokenizer is used as it is. TransformerLens makes tokenizers put the beginning-of-sequence token
        in front by themselves, so `bos="model"` may run one more token than the same model opened by name.

        Args:
            bridge: a `TransformerBridge` around a decoder of transformers.
            name: what it is called in results; as the bridge calls it if None.

        Raises:
            ModelError: the bridge holds no decoder of transformers, or it is in compatibility mode.
        """
        check_bridge(bridge)
        return cls(bridge, None, name or str(bridge.cfg.model_name))

    @classmethod
    def from_model(cls, source: TransformersModel) -> Self:
        """A bridge around the weights of a native model, which stays as it is; built at `load`."""
        return cls(None, source, source.info.name)

    def load(self) -> Self:
        """Build the bridge if there is none, find out its sites, and check that captures are what it computes.

        Raises:
            ModelError: TransformerLens is not installed or does not know the model, or the weights cannot be loaded.
            SelfCheckError: the captured activations contradict the bridge's own output.
        """
        with self._lock:
            if self._hooks is None:
                if self._bridge is None:
                    assert self._source is not None
                    self._bridge = self._source.to_transformer_lens()
                try:
                    self._hooks = served(self._bridge, self.info)
                    attention = self._bridge.blocks[0].attn.original_component
                    sinks = getattr(attention, "sinks", None) is not None
                    self_check(self, partial(added, self._bridge), sinks=sinks)
                except BaseException:
                    self._hooks = None
                    raise
        return self

    @property
    def bridge(self) -> Any:
        """The `TransformerBridge` itself; built if it is not there yet."""
        if self._bridge is None:
            self.load()
        return self._bridge

    @property
    def tokenizer(self) -> Any:
        """The native model's tokenizer, or that of a bridge that was handed over."""
        return self._bridge.tokenizer if self._source is None else self._source.tokenizer

    @property
    def info(self) -> ModelInfo:
        """Sizes and capabilities; before `load`, the sites are those that may turn out to be served."""
        sites = _SITES if self._hooks is None else (self._hooks.keys() & _SITES) | {"logits"}
        if self._source is not None:
            own = self._source.info
            return replace(own, sites=own.sites & sites if self._hooks is None else frozenset(sites))
        c, config = self._bridge.cfg, self._bridge.original_model.config.get_text_config()
        weight = self._bridge.unembed.original_component.weight
        return ModelInfo(
            name=self._name,
            kind="decoder",
            architecture=config.model_type,
            n_layers=c.n_layers,
            n_heads=c.n_heads,
            n_kv_heads=c.n_key_value_heads or c.n_heads,
            d_model=c.d_model,
            d_head=c.d_head,
            d_mlp=c.d_mlp or 4 * c.d_model,
            d_vocab=len(weight),
            n_params=self._bridge.n_params_total,
            context_length=c.n_ctx,
            dtype=str(weight.dtype).removeprefix("torch."),
            device=str(weight.device),
            sites=frozenset(sites),
            bos_id=self._bridge.tokenizer.bos_token_id,
            revision=getattr(config, "_commit_hash", None) or "",
        )

    def tokenize(self, texts: Sequence[Any], bos: BosPolicy = "model", chat: Chat = False) -> Batch:
        """The exact token ids that will run.

        Args:
            texts: the texts.
            bos: "model" adds what the tokenizer adds by itself, "always" a beginning-of-sequence
                token, "never" nothing.
            chat: make each text a turn in the tokenizer's chat template; a string is the system message.
        """
        return tokenize(self.tokenizer, texts, bos, chat)

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each id shows as."""
        return token_strings(self.tokenizer, ids)

    def provenance(self) -> dict[str, Any]:
        """What fixes this model's numbers."""
        packages = ("torch", "transformers", "transformer-lens", "tokenizers", "numpy")
        return {
            "model": self.load().info.as_dict(),
            "weights_hash": self.weights_hash(),
            "weights": self._source.weights_note if self._source is not None else "raw (nothing folded or centred)",
            "attention": "eager, by TransformerLens; statistics in float32 from the probabilities it shows",
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "versions": {p: importlib.metadata.version(p) for p in packages},
            "backend": "transformer_lens",
        }

    def weights_hash(self, *, fresh: bool = False) -> str:
        """sha256 over the weights, the same as in the native backend.

        Args:
            fresh: compute it anew instead of answering from memory.
        """
        if self._weights_hash is None or fresh:
            self._weights_hash = hash_of(own_weights(self.bridge))
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
            CapabilityError: the request is no `Forward`, or the bridge does not serve a point or a change of it.
        """
        request = require_forward(request, self._name)
        with self._lock:
            if self._hooks is None:
                self.load()
            hooks, module = self._hooks or {}, self._bridge.original_model
            want = CapturePass(self, request, batch, progress, module.get_input_embeddings().weight.device)
            self._check_served(want, hooks)
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad() if request.gradient_of is not None else torch.no_grad())
                stack.enter_context(as_found(self._bridge))
                add_hooks(stack, self._bridge, hooks, want)
                module.base_model(input_ids=want.ids, use_cache=False)
                return want.finish()

    def _check_served(self, want: CapturePass, hooks: dict[str, str]) -> None:
        if want.cuts and SCORES not in hooks:
            raise CapabilityError(
                f"The bridge of {self._name!r} does not show attention scores before the softmax, so no attention edge "
                "can be knocked out there. Open the model with probekit's own backend for that."
            )
        if want.request.gradient_of is not None and "embed" not in hooks:
            raise CapabilityError(
                f"The bridge of {self._name!r} does not show its raw embedding, where gradients would begin. "
                "Open the model with probekit's own backend for that."
            )

    def own_logits(self, batch: Batch) -> np.ndarray:
        """The bridge's own logits for one text, computed without probekit's hooks; axes token, vocab."""
        device = self.bridge.original_model.get_input_embeddings().weight.device
        ids = torch.tensor([batch.texts[0].ids], device=device)
        with self._lock, torch.no_grad(), as_found(self._bridge):
            logits: np.ndarray = self._bridge(ids, return_type="logits")[0].float().cpu().numpy()
            return logits

    @property
    def unembed(self) -> BridgeUnembed:
        """The way from a residual row to logits."""
        return BridgeUnembed(self.bridge)

    def output_gram(self, layer: int) -> Tensor:
        """W_O^h (W_O^h)^T of each query head of a block; axes head, d_head, d_head.

        Raises:
            CapabilityError: the bridge has no output projection of its own.
        """
        projection = getattr(self.bridge.blocks[layer].attn, "o", None)
        if projection is None:
            raise CapabilityError(f"The bridge of {self._name!r} shows no output projection of its heads.")
        return output_gram(projection.original_component, self.info.n_heads, self.info.d_head)

    def to_transformer_lens(self) -> Any:
        """The bridge."""
        return self.bridge
