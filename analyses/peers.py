"""The core statistics by other means: naively in any precision, and the way users of other tools get them.

"Core statistics" are attention received, row entropy, row maximum and share on position 0 per layer, head and token;
residual norm and the three largest magnitudes per layer and token; and, for every layer and token, the lens' ten
likeliest tokens, entropy, log-probability and rank of the token that follows, and KL to the final distribution.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Stats = dict[str, list[Tensor]]  # by statistic, one tensor per layer
TOP_K = 10


def attention_stats(pattern: Tensor) -> dict[str, Tensor]:
    """Statistics of one layer's attention; `pattern` has axes head, query, key."""
    n = pattern.shape[-1]
    queries_that_see = torch.arange(n, 0, -1, dtype=pattern.dtype)
    return {
        "received": pattern.sum(-2) / queries_that_see,
        "row_entropy_nats": -(pattern * pattern.clamp_min(1e-45).log()).sum(-1),
        "row_max": pattern.amax(-1),
        "first_share": pattern[..., 0],
    }


def residual_stats(resid: Tensor) -> dict[str, Tensor]:
    """Statistics of one layer's residual stream; `resid` has axes token, d_model."""
    return {"norm": resid.norm(dim=-1), "top_magnitudes": resid.abs().topk(3, dim=-1).values}


def lens_stats(logits: Tensor, final: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Statistics of one layer's readout; `logits` has axes token, vocab, `final` are the last layer's log-probabilities."""
    logprobs = logits.log_softmax(-1)
    wanted = logprobs[:-1].gather(-1, targets[:, None])
    return {
        "entropy_nats": -(logprobs.exp() * logprobs).sum(-1),
        "logprob_nats": wanted[:, 0],
        "target_rank": (logprobs[:-1] > wanted).sum(-1).to(logits.dtype),
        "kl_nats": (final.exp() * (final - logprobs)).sum(-1),
        "top_logprob": logprobs.topk(TOP_K, dim=-1).values,
    }


def all_stats(
    layers: Iterator[tuple[Tensor, Tensor]], unembed: Callable[[Tensor], Tensor], last: Tensor, ids: Tensor
) -> Stats:
    """Every core statistic of every layer.

    Args:
        layers: attention pattern (head, query, key) and residual stream (token, d_model) after each block.
        unembed: from residual rows to logits.
        last: residual stream after the last block.
        ids: the tokens.
    """
    final = unembed(last).log_softmax(-1)
    collected: Stats = {}
    for pattern, resid in layers:
        found = attention_stats(pattern) | residual_stats(resid) | lens_stats(unembed(resid), final, ids[1:])
        for name, values in found.items():
            collected.setdefault(name, []).append(values)
    return collected


def naive(hf_model: Any, ids: Tensor, dtype: torch.dtype) -> Stats:
    """The reference: a copy of the model in `dtype` with eager attention and a hook on every block."""
    model = copy.deepcopy(hf_model).to(dtype)
    model.set_attn_implementation("eager")
    resid: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: resid.append(out[0] if out.ndim == 3 else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        out = model(ids[None], output_attentions=True, use_cache=False)
        for handle in handles:
            handle.remove()
        patterns = [a[0] for a in out.attentions]
        return all_stats(
            zip(patterns, resid, strict=True), lambda h: model.lm_head(model.model.norm(h)), resid[-1], ids
        )


class TransformerLens:
    """What a TransformerLens user does: a filtered cache, then the lens and the statistics."""

    def __init__(self, folder: str) -> None:
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)
        self.n_layers = model.config.num_hidden_layers

    def run(self, ids: Tensor) -> Stats:
        """The core statistics of one text."""

        def wanted(name: str) -> bool:
            return name.endswith("attn.hook_pattern") or bool(re.fullmatch(r"blocks\.\d+\.hook_out", name))

        with torch.no_grad():
            _, cache = self.bridge.run_with_cache(ids[None], names_filter=wanted)
            layers = ((cache["pattern", i][0], cache[f"blocks.{i}.hook_out"][0]) for i in range(self.n_layers))
            last = cache[f"blocks.{self.n_layers - 1}.hook_out"][0]
            return all_stats(layers, lambda h: self.bridge.unembed(self.bridge.ln_final(h[None]))[0], last, ids)


class NNsight:
    """What an nnsight user does: trace the model with eager attention, save, then the lens and the statistics."""

    def __init__(self, folder: str) -> None:
        from nnsight import TransformersModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self.model = TransformersModel(self.hf, tokenizer=AutoTokenizer.from_pretrained(folder))

    def run(self, ids: Tensor) -> Stats:
        """The core statistics of one text."""
        with torch.no_grad():
            with self.model.trace(ids[None]):
                patterns, resid = [].save(), [].save()
                for layer in self.model.model.layers:
                    patterns.append(layer.self_attn.output[1])
                    resid.append(layer.output)
            layers = ((p[0], r[0]) for p, r in zip(patterns, resid, strict=True))
            return all_stats(layers, lambda h: self.hf.lm_head(self.hf.model.norm(h)), resid[-1][0], ids)
