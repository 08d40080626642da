"""How transformers lays out each family of decoders: data, one row per family.

To add a family, add its `config.model_type` to `ARCHITECTURES` with the paths of its parts. The
self-check that runs at load (`probekit.backends.self_check`) tells whether the row is right: it
compares residual sums, attention, lens and patches with what the model itself computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from probekit.core import ModelError


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its parts.

    Args:
        layers: path of the list of blocks, from the causal model.
        attention: path of the attention sub-layer, within a block.
        mlp: path of the MLP sub-layer, within a block.
        mid_norm: path of the norm that reads the stream between attention and MLP, within a block.
        final_norm: path of the last norm, from the causal model.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    mid_norm: str = "post_attention_layernorm"
    final_norm: str = "model.norm"


LLAMA = Architecture()
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gpt2": replace(LLAMA, layers="transformer.h", attention="attn", mid_norm="ln_2", final_norm="transformer.ln_f"),
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
