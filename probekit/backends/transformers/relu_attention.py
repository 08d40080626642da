"""ReLU attention under the name by which transformers finds attention functions.

Weights are max(z, 0) / i with z the scaled scores and i the query's position counted from 1 (arXiv 2410.13835,
section 2), in place of a softmax. A model runs with it when its configuration says `attn_implementation: "relu"`, also
in the config.json of a folder.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from probekit.core import CapabilityError
from probekit.reduce.attention_blocks import AttentionMath, whole_attention

RELU = "relu"


def relu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """ReLU attention as transformers' models call attention; differentiable, query × key as a whole.

    Args:
        module: the attention module.
        query: axes text, head, token, d_head.
        key: axes text, key-value head, token, d_head.
        value: axes text, key-value head, token, d_value.
        attention_mask: axes text (or 1), 1, query, key, True where a pair is allowed; None if causal.
        scaling: factor on q · k; 1 / sqrt(d_head) if None.
        dropout: must be 0.
        rest: whatever else the model's file hands to its attention function; not used.

    Returns:
        Output, axes text, token, head, d_value; and None in place of weights.

    Raises:
        CapabilityError: dropout is asked for.
    """
    if dropout:
        raise CapabilityError(f"ReLU attention has no dropout; the model asks for {dropout:g}. Set it to 0.")
    how = AttentionMath(query.shape[-1] ** -0.5 if scaling is None else scaling, mask=attention_mask, relu=True)
    return whole_attention(query, key, value, how).contiguous(), None


AttentionInterface.register(RELU, relu_attention)
AttentionMaskInterface.register(RELU, sdpa_mask)
