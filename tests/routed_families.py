"""Tiny BLOOM, Falcon and GPT-J models, and a naive reference for each.

The reference is a copy of the model that probekit never touches, run text by text without padding, with plain hooks
on its projections. Queries, keys, rotary embedding and ALiBi are made here from those projections in float64, and
checked against what the copy's own output projection reads.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from helpers import D_VOCAB, assert_close, random_weights, texts_of, words_tokenizer
from reference import allowed, attention_maps

from probekit.backends.transformers import TransformersModel
from probekit.core import Batch

LENGTHS = (17, 1, 9, 24)
N_LAYERS = 3
BLOCKS = "transformer.h"


@dataclass(frozen=True)
class Family:
    """One family in one of its forms, with what the reference has to know."""

    config: Any
    n_kv: int
    attention: str = "self_attention"
    dense: str = "self_attention.dense"
    down: str = "mlp.dense_4h_to_h"
    sequential: bool = False
    implementation: str | None = None

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads and d_head."""
        n = self.config.num_attention_heads
        return n, self.n_kv, self.config.hidden_size // n


def _bloom(n_heads: int, d_model: int) -> Family:
    from transformers import BloomConfig

    sizes = {"vocab_size": D_VOCAB, "hidden_size": d_model, "n_layer": N_LAYERS, "n_head": n_heads}
    return Family(BloomConfig(**sizes), n_heads, sequential=True)


def _falcon(n_kv: int, sequential: bool = False, implementation: str | None = None, **form: Any) -> Family:
    from transformers import FalconConfig

    sizes = {"vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
    config = FalconConfig(**sizes, ffn_hidden_size=48, parallel_attn=not sequential, **form)
    return Family(config, n_kv, sequential=sequential, implementation=implementation)


def _gptj() -> Family:
    from transformers import GPTJConfig

    sizes = {"vocab_size": D_VOCAB, "n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64, "n_inner": 48}
    config = GPTJConfig(**sizes, rotary_dim=4, bos_token_id=1, eos_token_id=2)
    return Family(config, 4, "attn", "attn.out_proj", "mlp.fc_out")


ALIBI: dict[str, Any] = {"alibi": True, "multi_query": False, "bias": True}
GROUPED: dict[str, Any] = {"new_decoder_architecture": True, "num_kv_heads": 2}
FAMILIES = {
    "bloom": lambda: _bloom(4, 32),
    "bloom, heads no power of two": lambda: _bloom(3, 36),
    "falcon, one key-value head": lambda: _falcon(1),
    "falcon, one key-value head, eager": lambda: _falcon(1, implementation="eager"),
    "falcon, grouped heads": lambda: _falcon(2, **GROUPED),
    "falcon, grouped heads, one norm": lambda: _falcon(2, num_ln_in_parallel_attn=1, **GROUPED),
    "falcon, grouped heads, eager": lambda: _falcon(2, implementation="eager", **GROUPED),
    "falcon, ALiBi": lambda: _falcon(4, **ALIBI),
    "falcon, ALiBi, sequential": lambda: _falcon(4, sequential=True, **ALIBI),
    "falcon, ALiBi, eager": lambda: _falcon(4, implementation="eager", **ALIBI),
    "gptj": _gptj,
}
FORMS = ["bloom", "falcon, one key-value head", "falcon, grouped heads", "falcon, ALiBi, sequential", "gptj"]


@dataclass(frozen=True)
class Routed:
    """A tiny random model as probekit sees it, and a copy that it never touches."""

    family: Family
    model: TransformersModel
    plain: Any


@functools.cache
def tiny_routed(name: str) -> Routed:
    """The tiny model of a family; built once, and loading it runs the self-check."""
    from transformers import AutoModelForCausalLM

    family = FAMILIES[name]()
    how = {} if family.implementation is None else {"attn_implementation": family.implementation}
    module = random_weights(AutoModelForCausalLM.from_config(family.config, **how)).eval()
    model = TransformersModel.from_loaded(module, words_tokenizer(), name=name).load()
    assert (model.info.n_heads, model.info.n_kv_heads, model.info.d_head) == family.heads
    assert model.architecture.route == family.config.model_type
    return Routed(family, model, copy.deepcopy(module))


def _slopes(n: int) -> np.ndarray:
    """ALiBi's slopes (arXiv 2108.12409): a geometric sequence from 2^(-8/n); for other n, filled up from the next."""
    power = 2 ** int(np.log2(n))
    first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    return np.concatenate([first, 2.0 ** (-8 * np.arange(1, 2 * power + 1) / (2 * power))[::2][: n - power]])


def _turn(x: np.ndarray, n: int, neighbours: bool) -> np.ndarray:
    """Rotary embedding (arXiv 2104.09864) of the first `n` dimensions; x has axes token, head, d_head."""
    angle = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(0, n, 2) / n)
    half = slice(0, n, 2) if neighbours else slice(0, n // 2)
    other = slice(1, n, 2) if neighbours else slice(n // 2, n)
    turned = x.copy()
    turned[..., half] = x[..., half] * np.cos(angle) - x[..., other] * np.sin(angle)
    turned[..., other] = x[..., other] * np.cos(angle) + x[..., half] * np.sin(angle)
    return turned


def _qkv(family: Family, fused: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values of one text as attention uses them; axes token, head, d_head."""
    n, n_kv, d = family.heads
    if family.config.model_type == "gptj":
        q, k, v = (x.reshape(len(x), n, d) for x in fused)
        return _turn(q, 4, neighbours=True), _turn(k, 4, neighbours=True), v
    x = fused[0].reshape(len(fused[0]), n_kv, n // n_kv + 2, d)  # of each key-value head: its queries, key, value
    q, k, v = x[:, :, :-2].reshape(len(x), n, d), x[:, :, -2], x[:, :, -1]
    if family.config.model_type == "bloom" or family.config.alibi:
        return q, k, v
    return _turn(q, d, neighbours=False), _turn(k, d, neighbours=False), v


def _bias(family: Family, n_tokens: int) -> np.ndarray | float:
    """What is added to the scores; axes head, 1, key."""
    alibi = _slopes(family.heads[0])[:, None, None] * np.arange(n_tokens)
    if family.config.model_type == "bloom":
        return alibi
    if getattr(family.config, "alibi", False):
        times = 2 if family.implementation == "eager" else 1  # transformers' eager mathematics adds it twice
        return times * alibi / np.sqrt(family.heads[2])
    return 0.0


def _plain_run(one: Routed, ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What plain hooks see of one text: by site, axes layer (if any), token, others; and `maps`, and projections."""
    family, seen, handles = one.family, dict[str, list[Any]](), []

    def keep(name: str, module: Any, side: str = "output") -> None:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            first = args[0] if args else kwargs.get("hidden_states")
            values = first if side == "input" else output[0] if isinstance(output, tuple) else output
            # Falcon adds to the MLP's output in place, so what is kept is a copy
            seen.setdefault(name, []).append(values.detach()[0].double().numpy().copy())

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    keep("embed", one.plain.get_input_embeddings())
    for block in one.plain.get_submodule(BLOCKS):
        keep("resid_pre", block, "input")
        keep("resid_post", block)
        for name in ("q_proj", "k_proj", "v_proj") if family.attention == "attn" else ("query_key_value",):
            keep("fused", block.get_submodule(f"{family.attention}.{name}"))
        keep("attn_out", block.get_submodule(family.dense))
        keep("z", block.get_submodule(family.dense), "input")
        keep("mlp_act", block.get_submodule(family.down), "input")
        keep("mlp_out", block.get_submodule(family.down))
        if family.sequential:
            keep("resid_mid", block.post_attention_layernorm, "input")
    keep("final_norm", one.plain.transformer.ln_f)
    try:
        with torch.no_grad():
            logits = one.plain(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    fused = seen.pop("fused")
    each = len(fused) // N_LAYERS
    q, k, v = zip(*(_qkv(family, fused[i * each : (i + 1) * each]) for i in range(N_LAYERS)), strict=True)
    run = {site: np.stack(values) for site, values in seen.items()} | {"q": np.stack(q), "k": np.stack(k)}
    run |= {"v": np.stack(v), "logits": logits.double().numpy()[None]}
    run["z"] = run["z"].reshape(*run["z"].shape[:2], *family.heads[::2])
    rule = allowed(len(ids)), family.heads[2] ** -0.5
    bias = _bias(family, len(ids))
    run["maps"] = np.stack(
        [attention_maps(a.swapaxes(0, 1), b.swapaxes(0, 1), *rule, bias=bias) for a, b in zip(q, k, strict=True)]
    )
    assert_close(mixed(run["maps"], run["v"]), run["z"], atol=2e-5, what="the reference against the model itself")
    return run


def mixed(maps: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Per-head output; axes layer, token, head, d_head."""
    return np.einsum("lhqk,lkhd->lqhd", maps, np.repeat(v, maps.shape[1] // v.shape[2], axis=2))


@functools.cache
def routed_batch() -> Batch:
    """Texts of unequal length, one of them a single token."""
    return texts_of(LENGTHS, n_vocab=D_VOCAB)


@functools.cache
def plain_runs(name: str) -> list[dict[str, np.ndarray]]:
    """The reference for each text of the batch."""
    return [_plain_run(tiny_routed(name), text.ids) for text in routed_batch()]
