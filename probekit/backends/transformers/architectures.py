"""How transformers lays out each family of decoders: data, one row per family.

To add a family:

1. Read the `forward` of its decoder layer in transformers. If it reads q and k through `ALL_ATTENTION_FUNCTIONS`,
   it needs a row of `ARCHITECTURES` under its `config.model_type` and nothing else. `LLAMA` is the row of
   the usual layout (sequential, pre-norm, `model.layers`, `self_attn`, `mlp.down_proj`); give what differs.
2. Say what the residual stream is made of: a norm between a sub-layer and the stream (`attn_post_norm`,
   `mlp_post_norm`), a factor on it (`residual_multiplier`), blocks whose attention and MLP read the same stream
   (`mid=None`, or `parallel` if the config decides). `attn_out` and `mlp_out` stay the raw outputs of the sub-layers.
3. Say what follows the unembedding (`logit_softcap`, `logit_divisor`, `logit_multiplier`), and what variants of the
   family are laid out in another way (`refuses`).
4. Add a tiny configuration to `tests/tiny_configs.py`; `tests/contract/test_architectures.py` runs it against eager
   attention and plain hooks.

The self-check that runs at load (`probekit.backends.self_check`) tells whether the row is right: it compares residual
sums, attention, lens and patches with what the model itself computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from probekit.core import ModelError

Refusal = tuple[str, Callable[[Any], bool]]  # what is not supported, in words; whether a config has it


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its parts, and what it does between them.

    Args:
        layers: path of the list of blocks, from the causal model.
        attention: path of the attention sub-layer, within a block; its output is `attn_out`.
        mlp: path of the MLP sub-layer, within a block; its output is `mlp_out`. The last projection where a
            block has no MLP module.
        mid: path within a block, and side ("input" or "output"), where the stream between attention and MLP
            passes; None for families whose attention and MLP run side by side.
        down: path of the MLP's last projection, within a block, whose input is `mlp_act`; None where there is none
            (mixtures of experts).
        final_norm: path of the last norm, from the causal model.
        attn_post_norm: path of a norm between `attn_out` and the residual stream, within a block; None for none.
        mlp_post_norm: the same for `mlp_out`.
        parallel: name of the config's switch under which attention and MLP run side by side (`mid` is None then).
        residual_multiplier: name of the config's factor on what a sub-layer adds to the stream.
        logit_softcap: name of the config's c, where logits become c · tanh(logit / c).
        logit_divisor: name of the config's number by which logits are divided.
        logit_multiplier: name of the config's number by which logits are multiplied.
        sinks: whether heads have a learned logit that is no key, so that attention rows sum to less than one.
        route: name of the way into attention (`attention_routes.ROUTES`) of families that do not ask transformers'
            registry for their attention function; None for those that do.
        router: path of the router of a mixture of experts, within a block, whose output begins with the logits of all
            experts; None where there is none.
        kv_heads: how many key-value heads a config means, where that is not its `num_key_value_heads`.
        refuses: variants of the family that this row does not describe.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    mid: tuple[str, str] | None = ("post_attention_layernorm", "input")
    down: str | None = "mlp.down_proj"
    final_norm: str = "model.norm"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel: str | None = None
    residual_multiplier: str | None = None
    logit_softcap: str | None = None
    logit_divisor: str | None = None
    logit_multiplier: str | None = None
    sinks: bool = False
    route: str | None = None
    router: str | None = None
    kv_heads: Callable[[Any], int] | None = None
    refuses: tuple[Refusal, ...] = ()

    @property
    def taps(self) -> dict[str, tuple[str, str]]:
        """By site: path (within a block; `final_norm` from the model) and side where its activation passes."""
        taps = {
            "embed": ("", "output"),
            "resid_pre": ("", "input"),
            "resid_post": ("", "output"),
            "attn_out": (self.attention, "output"),
            "mlp_out": (self.mlp, "output"),
            "final_norm": (self.final_norm, "output"),
        }
        if self.mid is not None:
            taps["resid_mid"] = self.mid
        if self.down is not None:
            taps["mlp_act"] = (self.down, "input")
        if self.router is not None:
            taps["router"] = (self.router, "output")
        return taps

    @property
    def sites(self) -> frozenset[str]:
        """The sites that can be captured."""
        return frozenset({*self.taps, "q", "k", "v", "z", "pattern", "logits"})

    def added(self, model: nn.Module, config: Any, site: str, layer: int, values: Tensor) -> Tensor:
        """What a sub-layer adds to the residual stream, given its raw output.

        Args:
            model: the causal model.
            config: its (text) configuration.
            site: "attn_out" or "mlp_out".
            layer: the block number.
            values: the raw output; the last axis is d_model.
        """
        path = self.attn_post_norm if site == "attn_out" else self.mlp_post_norm
        if path is not None:
            # Its own forward, past other people's hooks.
            values = model.get_submodule(f"{self.layers}.{layer}.{path}").forward(values)
        return values if self.residual_multiplier is None else values * getattr(config, self.residual_multiplier)


LLAMA = Architecture()
SANDWICH = Architecture(  # a norm before and after each sub-layer
    mid=("pre_feedforward_layernorm", "input"),
    attn_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
POST_NORM = replace(SANDWICH, mid=("mlp", "input"))  # a norm after each sub-layer only, inside its residual branch
PARALLEL = replace(LLAMA, mid=None)
GRANITE = replace(LLAMA, residual_multiplier="residual_multiplier", logit_divisor="logits_scaling")
GEMMA2 = replace(SANDWICH, logit_softcap="final_logit_softcapping")
GEMMA3 = replace(
    GEMMA2,
    refuses=(
        (
            "attention that looks ahead (use_bidirectional_attention)",
            lambda c: bool(getattr(c, "use_bidirectional_attention", False)),
        ),
    ),
)
GPT2 = Architecture(
    layers="transformer.h",
    attention="attn",
    mid=("ln_2", "input"),
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
    refuses=(("cross-attention (add_cross_attention)", lambda c: bool(getattr(c, "add_cross_attention", False))),),
)
GPT_NEOX = Architecture(
    layers="gpt_neox.layers",
    attention="attention",
    down="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    parallel="use_parallel_residual",
)
OPT = Architecture(
    layers="model.decoder.layers",
    mlp="fc2",
    mid=("final_layer_norm", "input"),
    down="fc2",
    final_norm="model.decoder.final_layer_norm",
    refuses=(
        ("norms after the residual sums, as in opt-350m (do_layer_norm_before)", lambda c: not c.do_layer_norm_before),
        ("no final norm (_remove_final_layer_norm)", lambda c: bool(c._remove_final_layer_norm)),
        (
            "embeddings of another width than the stream (word_embed_proj_dim)",
            lambda c: c.word_embed_proj_dim != c.hidden_size,
        ),
    ),
)
BLOOM = Architecture(
    layers="transformer.h",
    attention="self_attention.dense",  # the modules around these two projections add the residual stream
    mlp="mlp.dense_4h_to_h",
    down="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
    route="bloom",
    refuses=(
        (
            "the stream taken after the norms (apply_residual_connection_post_layernorm)",
            lambda c: bool(c.apply_residual_connection_post_layernorm),
        ),
        ("projections in slices (slow_but_exact)", lambda c: c.slow_but_exact and c.pretraining_tp > 1),
    ),
)
FALCON = Architecture(
    layers="transformer.h",
    attention="self_attention",
    down="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
    parallel="parallel_attn",
    route="falcon",
    kv_heads=lambda c: c.num_kv_heads if c.new_decoder_architecture or not c.multi_query else 1,
)
GPTJ = replace(GPT2, mid=None, down="mlp.fc_out", route="gptj", refuses=())
MIXTURE = replace(LLAMA, down=None, router="mlp.gate")
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "olmo": LLAMA,
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "exaone4": POST_NORM,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    # The multimodal model leaves the soft-cap out.
    "gemma3": replace(
        GEMMA3, layers="model.language_model.layers", final_norm="model.language_model.norm", logit_softcap=None
    ),
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "phi": replace(PARALLEL, down="mlp.fc2", final_norm="model.final_layernorm"),
    "phi3": LLAMA,
    "stablelm": replace(LLAMA, parallel="use_parallel_residual"),
    "starcoder2": replace(LLAMA, down="mlp.c_proj"),
    "granite": GRANITE,
    "cohere": replace(PARALLEL, logit_multiplier="logit_scale"),
    "cohere2": replace(PARALLEL, logit_multiplier="logit_scale"),
    "mixtral": MIXTURE,
    "qwen2_moe": MIXTURE,
    "qwen3_moe": MIXTURE,
    "olmoe": MIXTURE,
    "gpt_oss": replace(MIXTURE, router="mlp.router", sinks=True),
    "bloom": BLOOM,
    "falcon": FALCON,
    "gptj": GPTJ,
    "helium": LLAMA,
    "glm": LLAMA,
    "glm4": replace(LLAMA, attn_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
    "nemotron": LLAMA,
    "apertus": replace(LLAMA, mid=("feedforward_layernorm", "input")),
    "seed_oss": LLAMA,
    "arcee": LLAMA,
    "persimmon": replace(LLAMA, down="mlp.dense_4h_to_h", final_norm="model.final_layernorm"),
}
_ENCODERS = ("bert", "roberta", "mpnet", "electra", "deberta", "distilbert", "albert", "camembert", "modernbert")


def architecture_of(config: Any, name: str) -> Architecture:
    """The row of the table for a model's configuration, with the config's own switches settled.

    Args:
        config: the model's configuration; of a multimodal one, the part for text counts.
        name: how the model is called in messages.

    Raises:
        ModelError: the model is an encoder, a decoder that the table does not hold, or a variant of a family
            that the family's row does not describe.
    """
    text = config.get_text_config()
    kind = getattr(text, "model_type", "")
    known = f"Families that probekit captures: {', '.join(sorted(ARCHITECTURES))}."
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name!r} is an encoder-decoder ({kind}); expected a decoder. {known}")
    # A multimodal model keeps its decoder under another path, so its own row comes first.
    whole = getattr(config, "model_type", "")
    row = ARCHITECTURES.get(whole, ARCHITECTURES.get(kind) if whole == kind else None)
    if row is None and kind in ARCHITECTURES:
        raise ModelError(
            f"{name!r} is of the family {whole!r}, a {kind!r} decoder inside a larger model, which probekit cannot "
            f"capture yet; expected the decoder by itself. {known}"
        )
    if row is None and any(e in kind for e in _ENCODERS):
        raise ModelError(
            f"{name!r} is an encoder ({kind}); expected a decoder, which predicts the next token. {known} "
            "The embedded decoder is 'smollm2-135m-instruct'."
        )
    if row is None:
        raise ModelError(f"{name!r} is of the family {kind!r}, which probekit cannot capture yet. {known}")
    for what, applies in row.refuses:
        if applies(text):
            raise ModelError(
                f"{name!r} is of the family {kind!r} with {what}, a variant that probekit cannot capture yet; "
                f"expected the family's usual layout. {known}"
            )
    if row.parallel is not None and getattr(text, row.parallel):
        return replace(row, mid=None)
    return row
