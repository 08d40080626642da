"""A tiny random configuration of every family whose attention goes through transformers' registry, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from helpers import D_MODEL, N_HEADS, N_LAYERS, SIZES, WINDOW

N_EXPERTS = 4
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
ONE_FULL = ["full_attention", "sliding_attention", "sliding_attention"]


@dataclass(frozen=True)
class TinyKind:
    """One configuration.

    Args:
        family: the `config.model_type`.
        own: what it sets beside `helpers.SIZES`.
        windows: the sliding window of each layer; None where a query sees all that precedes it.
        eager: whether transformers gives the family eager attention unless told otherwise.
        d_head: width of a head.
        d_mlp: hidden width of the MLP.
    """

    family: str
    own: dict[str, Any] = field(default_factory=dict)
    windows: tuple[int | None, ...] = (None,) * N_LAYERS
    eager: bool = False
    d_head: int = D_MODEL // N_HEADS
    d_mlp: int = SIZES["intermediate_size"]

    @property
    def takes_n_kv(self) -> bool:
        """Whether the number of key-value heads can be chosen."""
        return "num_key_value_heads" in self.own

    def config(self, **more: Any) -> Any:
        """The configuration; `more` overrides."""
        from transformers import AutoConfig

        sizes = SIZES | self.own | more
        if self.family in ("gpt2", "opt"):  # they have other names for it
            del sizes["intermediate_size"]
        if self.family == "gemma3":
            text = AutoConfig.for_model("gemma3_text", **sizes)
            eyes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
            vision = AutoConfig.for_model("siglip_vision_model", **eyes, image_size=8, patch_size=4)
            special = {"image_token_index": 127, "boi_token_index": 126, "eoi_token_index": 125}
            return AutoConfig.for_model(
                "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **special
            )
        return AutoConfig.for_model(self.family, **sizes)


def _windows(layer_types: list[str]) -> tuple[int | None, ...]:
    return tuple(WINDOW if kind == "sliding_attention" else None for kind in layer_types)


def _alternating(**own: Any) -> dict[str, Any]:
    return {"layer_types": ALTERNATING, "sliding_window": WINDOW} | own


_ONE_KV, _TWO_KV, _WIDE = {"num_key_value_heads": 1}, {"num_key_value_heads": 2}, {"head_dim": 16}
_EVERY = (WINDOW,) * N_LAYERS
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 10}
_MULTIPLIERS = {
    "residual_multiplier": 0.6,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.5,
    "logits_scaling": 4.0,
}
_GEMMA3 = _alternating(**_TWO_KV, **_WIDE, final_logit_softcapping=3.0, query_pre_attn_scalar=10)

KINDS: dict[str, TinyKind] = {
    "gpt2": TinyKind("gpt2", d_mlp=4 * D_MODEL),
    "gpt_neox": TinyKind("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-sequential": TinyKind("gpt_neox", {"use_parallel_residual": False}),
    "opt": TinyKind("opt", {"ffn_dim": 40, "word_embed_proj_dim": D_MODEL}, d_mlp=40),
    "llama": TinyKind("llama", _TWO_KV),
    "mistral": TinyKind("mistral", _TWO_KV | {"sliding_window": WINDOW}, _EVERY),
    "ministral": TinyKind("ministral", _alternating(**_TWO_KV, **_WIDE), _windows(ALTERNATING), d_head=16),
    "mixtral": TinyKind("mixtral", _TWO_KV | {"num_local_experts": N_EXPERTS, "sliding_window": WINDOW}, _EVERY),
    "qwen2_moe": TinyKind("qwen2_moe", _TWO_KV | {"num_experts": N_EXPERTS, "moe_intermediate_size": 24}),
    "qwen3_moe": TinyKind(
        "qwen3_moe", _TWO_KV | _WIDE | {"num_experts": N_EXPERTS, "num_experts_per_tok": 2}, d_head=16
    ),
    "olmoe": TinyKind("olmoe", _TWO_KV | {"num_experts": N_EXPERTS, "num_experts_per_tok": 2}),
    "qwen2": TinyKind(
        "qwen2",
        _TWO_KV | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        _windows(ONE_FULL),
    ),
    "qwen3": TinyKind("qwen3", _TWO_KV | _WIDE, d_head=16),
    "gemma": TinyKind("gemma", _ONE_KV | _WIDE, d_head=16),
    "gemma2": TinyKind("gemma2", _alternating(**_TWO_KV, **_WIDE, **_CAPS), _windows(ALTERNATING), True, d_head=16),
    "gemma3": TinyKind("gemma3_text", _GEMMA3, _windows(ALTERNATING), d_head=16),
    "gemma3-multimodal": TinyKind("gemma3", _GEMMA3, _windows(ALTERNATING), d_head=16),
    "olmo": TinyKind("olmo", _TWO_KV | {"clip_qkv": 0.5}),
    "olmo2": TinyKind("olmo2", _TWO_KV),
    "olmo3": TinyKind("olmo3", _alternating(**_TWO_KV), _windows(ALTERNATING)),
    "exaone4": TinyKind("exaone4", _alternating(**_TWO_KV), _windows(ALTERNATING)),
    "phi": TinyKind("phi", _TWO_KV | {"qk_layernorm": True}),
    "phi3": TinyKind("phi3", _TWO_KV | {"sliding_window": WINDOW}, _EVERY),
    "stablelm": TinyKind("stablelm", _TWO_KV | {"use_parallel_residual": False, "qk_layernorm": True}),
    "stablelm-parallel": TinyKind("stablelm", _TWO_KV | {"use_parallel_residual": True, "use_qkv_bias": True}),
    "granite": TinyKind("granite", _TWO_KV | _MULTIPLIERS),
    "cohere": TinyKind("cohere", _TWO_KV | {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": TinyKind("cohere2", _alternating(**_TWO_KV, logit_scale=0.25), _windows(ALTERNATING)),
    "gpt_oss": TinyKind(
        "gpt_oss",
        _alternating(**_TWO_KV, **_WIDE, num_local_experts=N_EXPERTS, num_experts_per_tok=2),
        _windows(ALTERNATING),
        True,
        d_head=16,
    ),
    "starcoder2": TinyKind("starcoder2", _TWO_KV | {"sliding_window": WINDOW}, _EVERY),
    "smollm3": TinyKind("smollm3", _TWO_KV | {"no_rope_layers": [1, 0, 1]}),
    "helium": TinyKind("helium", _TWO_KV | {"head_dim": 8}),
    "glm": TinyKind("glm", _TWO_KV | _WIDE, d_head=16),
    "glm4": TinyKind("glm4", _TWO_KV | _WIDE, d_head=16),
    "nemotron": TinyKind("nemotron", _TWO_KV),
    "apertus": TinyKind("apertus", _TWO_KV),
    "seed_oss": TinyKind("seed_oss", _TWO_KV | _WIDE, d_head=16),
    "arcee": TinyKind("arcee", _TWO_KV),
    "persimmon": TinyKind("persimmon"),
}
