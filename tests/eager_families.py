"""Tiny models of every family beside their eager twins, whose attention functions are watched.

The twin has the same weights under transformers' eager attention and runs text by text without padding. What its
attention functions are given and return is recorded, so that every statistic can be computed from that in float64.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from helpers import D_VOCAB, assert_close, random_weights, see, texts_of, words_tokenizer
from tiny_configs import KINDS

from probekit.backends.transformers import TransformersModel
from probekit.core import Capture
from probekit.reduce import Keep

LENGTHS = (21, 1, 13, 34)
BATCH = texts_of(LENGTHS, D_VOCAB - 4)  # the last ids are the image tokens of the multimodal configuration
HEADS = ("q", "k", "v", "z")


@dataclass
class Naive:
    """What one run of the reference shows; lists have one entry per layer."""

    blocks: list[np.ndarray] = field(default_factory=list)  # block outputs; text, position, d_model
    heads: list[dict[str, np.ndarray]] = field(default_factory=list)  # q, k, v, z; text, position, head, d_head
    how: list[dict[str, Any]] = field(default_factory=list)  # scaling, softcap, sinks
    maps: list[np.ndarray] = field(default_factory=list)  # text, head, query, key
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def run(self, module: Any, layers: Any, **inputs: Any) -> Naive:
        """Fill this from one run of an eager model."""

        def keep(_: Any, __: Any, output: Any) -> None:
            self.blocks.append((output[0] if isinstance(output, tuple) else output).numpy())

        handles = [layer.register_forward_hook(keep) for layer in layers]
        with torch.no_grad(), self._spying(type(layers[0]).__module__):
            self.logits = module(**inputs, use_cache=False).logits.numpy()
        for handle in handles:
            handle.remove()
        return self

    @contextmanager
    def _spying(self, name: str) -> Iterator[None]:
        family: Any = sys.modules[name]
        own = family.eager_attention_forward

        def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
            output, weights = own(module, query, key, value, mask, **rest)
            shown = {n: x.transpose(1, 2).numpy() for n, x in (("q", query), ("k", key), ("v", value))}
            self.heads.append(shown | {"z": output.numpy()})
            scaling, sinks = rest.get("scaling"), rest.get("s_aux")
            self.how.append(
                {
                    "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
                    "softcap": rest.get("softcap"),
                    "sinks": None if sinks is None else sinks.numpy(),
                }
            )
            self.maps.append(weights.numpy())
            return output, weights

        family.eager_attention_forward = spy
        try:
            yield
        finally:
            family.eager_attention_forward = own


@dataclass(frozen=True)
class Family:
    """One configuration, as probekit sees it and as transformers computes it."""

    name: str
    model: TransformersModel
    reference: Any

    @property
    def layers(self) -> Any:
        """The reference's blocks."""
        return self.reference.get_submodule(self.model.architecture.layers)

    @functools.cached_property
    def naive(self) -> list[Naive]:
        """The reference's runs, one per text."""
        return [Naive().run(self.reference, self.layers, input_ids=torch.tensor([t.ids])) for t in BATCH]

    @functools.cached_property
    def values(self) -> dict[str, np.ndarray]:
        """`Keep` of every site with rows, all texts in one padded batch."""
        sites = sorted(self.model.info.sites - {"pattern", "router"})
        seen = see(self.model, [Capture(s, Keep()) for s in sites], BATCH)
        return {s: d["value"].values for s, d in zip(sites, seen, strict=True)}

    def packed(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The texts' arrays (1, position, …) end to end."""
        return np.concatenate([a[0] for a in arrays])


@functools.cache
def family_of(name: str, **more: Any) -> Family:
    """A tiny model of a family, self-checked, and its eager twin."""
    from transformers import AutoModelForCausalLM

    kind = KINDS[name]
    module = random_weights(AutoModelForCausalLM.from_config(kind.config(**more))).eval()
    assert module.config._attn_implementation == ("eager" if kind.eager else "sdpa")
    reference = AutoModelForCausalLM.from_config(kind.config(**more), attn_implementation="eager").eval()
    reference.load_state_dict(module.state_dict())
    for parameter in [*module.parameters(), *reference.parameters()]:
        parameter.requires_grad_(False)
    return Family(name, TransformersModel.from_loaded(module, words_tokenizer(), name=name).load(), reference)


def relative(found: np.ndarray, expected: np.ndarray, within: float = 2e-5, what: str = "") -> None:
    """Differences up to a share of the largest entry."""
    assert_close(found, expected, atol=within * float(np.abs(expected).max()), what=what)
