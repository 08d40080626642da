"""How transformers lays out each family of decoders: data, one row per family.

To add a family, add its `config.model_type` to `ARCHITECTURES` with the paths of its parts. The
self-check that runs at load (`probekit.backends.self_check`) tells whether the row is right: it
compares residual sums, attention, lens and patches with what the model itself computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from probekit.core import ModelError


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its parts.

    Args:
        layers: path of the list of blocks, from the causal model.
        attention: path of the attention sub-layer, within a block; its output is `attn_out`.
        mlp: path of the MLP sub-layer, within a block; its output is `mlp_out`.
        mid: path within a block, and side ("input" or "output"), where the stream between attention and MLP
            passes; None for families whose attention and MLP run side by side.
        down: path of the MLP's last projection, within a block, whose input is `mlp_act`; None where there is none.
        final_norm: path of the last norm, from the causal model.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    mid: tuple[str, str] | None = ("post_attention_layernorm", "input")
    down: str | None = "mlp.down_proj"
    final_norm: str = "model.norm"

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
        return taps

    @property
    def sites(self) -> frozenset[str]:
        """The sites that can be captured."""
        return frozenset({*self.taps, "q", "k", "v", "z", "pattern", "logits"})


LLAMA = Architecture()
GPT2 = Architecture(
    layers="transformer.h",
    attention="attn",
    mid=("ln_2", "input"),
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gpt2": GPT2,
}
_ENCODERS = ("bert", "roberta", "mpnet", "electra", "deberta", "distilbert", "albert", "camembert", "modernbert")


def architecture_of(config: Any, name: str) -> Architecture:
    """The row of the table for a model's configuration.

    Raises:
        ModelError: the model is an encoder, or a decoder that the table does not hold.
    """
    kind = getattr(config.get_text_config(), "model_type", "")
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    known = f"Families that probekit captures: {', '.join(ARCHITECTURES)}."
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name!r} is an encoder-decoder ({kind}); expected a decoder. {known}")
    if any(e in kind for e in _ENCODERS):
        raise ModelError(
            f"{name!r} is an encoder ({kind}); expected a decoder, which predicts the next token. {known} "
            "The embedded decoder is 'smollm2-135m-instruct'."
        )
    raise ModelError(f"{name!r} is of the family {kind!r}, which probekit cannot capture yet. {known}")
