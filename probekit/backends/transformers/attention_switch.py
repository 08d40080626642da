"""One attention function, registered with transformers, that shows probabilities to whoever is watching.

While a pass watches, the model's attention implementation is this function; afterwards it is what
it was. Watched layers run in streamed float32 blocks (`probekit.reduce.attention_blocks`), all
others in SDPA, or streamed too where the model was loaded with eager attention. Nothing ever holds
query × key as a whole. A model whose own attention is ReLU attention (`relu_attention`) keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from probekit.backends.block_taps import Tap
from probekit.backends.capture_pass import through
from probekit.backends.edits import Cut
from probekit.reduce.attention_blocks import (
    AttentionBlock,
    AttentionMath,
    Scratch,
    stream_attention,
    whole_attention,
)

from .implementation import attention_by
from .relu_attention import RELU

NAME = "probekit"
OnBlock = Callable[[int, AttentionBlock], None]


@dataclass
class Watch:
    """Who looks at which layers during one pass, and what is changed inside attention.

    Args:
        layers: block numbers whose probabilities are wanted.
        lengths: tokens per text of the batch that will run.
        on_block: is called with the block number and each `AttentionBlock`.
        taps: by site ("q", "k", "v", "z") and layer, what to call with axes text, position, head, d_head.
        cuts: by layer, what knocks edges out of a block of scores.
        scores: whether blocks carry their scores.
    """

    layers: frozenset[int]
    lengths: tuple[int, ...]
    on_block: OnBlock
    taps: Mapping[tuple[str, int], list[Tap]] = field(default_factory=dict)
    cuts: Mapping[int, Cut] = field(default_factory=dict)
    scores: bool = False
    own: str = "sdpa"
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def idle(self) -> bool:
        """Whether attention is left to the model altogether."""
        return not (self.layers or self.taps or self.cuts)

    def tapped(self, site: str, layer: int, values: Tensor) -> Tensor:
        """What the taps make of queries, keys, values or outputs; axes text, position, head, d_head."""
        changed = through(self.taps.get((site, layer), ()), values)
        return values if changed is None else changed


_WATCH: ContextVar[Watch | None] = ContextVar("probekit_watch", default=None)


def watched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' models call it; streamed where a pass watches this layer.

    Args:
        module: the attention module; its `layer_idx` is the block number.
        query: axes text, head, token, d_head.
        key: axes text, key-value head, token, d_head.
        value: axes text, key-value head, token, d_value.
        attention_mask: axes text (or 1), 1, query, key, True where a pair is allowed; None if causal.
        scaling: factor on q · k.
        dropout: passed on; zero while a pass watches.
        rest: whatever else the model's file hands to its attention function.

    Returns:
        Output, axes text, token, head, d_value; and None in place of probabilities.
    """
    watch = _WATCH.get()
    layer = getattr(module, "layer_idx", None)
    relu = watch is not None and watch.own == RELU
    kernel = AttentionInterface()[RELU if relu else "sdpa"]
    if watch is None or layer is None:
        return kernel(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest)
    query, key, value = (
        watch.tapped(site, layer, x.transpose(1, 2)).transpose(1, 2)
        for site, x in (("q", query), ("k", key), ("v", value))
    )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    how = AttentionMath(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=rest.get("softcap"),
        mask=attention_mask,
        bias=rest.get("position_bias"),
        sinks=rest.get("s_aux"),
        cut=watch.cuts.get(layer),
        relu=relu,
    )
    output = attend(watch, layer, query, key, value, how)
    if output is None:
        output = kernel(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest)[0]
    return watch.tapped("z", layer, output).contiguous(), None


def attend(watch: Watch, layer: int, query: Tensor, key: Tensor, value: Tensor, how: AttentionMath) -> Tensor | None:
    """Attention of one layer as the watch wants it: shown, cut, or neither.

    Args:
        watch: who looks.
        layer: the block number.
        query: axes text, head, token, d_head.
        key: axes text, key-value head, token, d_head.
        value: axes text, key-value head, token, d_value.
        how: scaling, soft-cap, bias, sinks, mask and cut edges.

    Returns:
        Output, axes text, token, head, d_value; None where the model's own kernel has to make it.
    """
    how = replace(how, keep_scores=watch.scores)
    sees, own_kernel = layer in watch.layers, watch.own != "eager" and how.cut is None
    cached = query.shape[2] != key.shape[2]  # earlier keys come from a cache: a step of generation, which nobody sees
    if (torch.is_grad_enabled() or cached) and not own_kernel:
        return whole_attention(query, key, value, how)
    if own_kernel and not sees:
        return None

    def show(shown: Tensor, how: AttentionMath) -> Tensor:
        def on_block(block: AttentionBlock) -> None:
            if sees:
                watch.on_block(layer, block)

        return stream_attention(query, key, shown, how, watch.lengths, on_block, scratch=watch.scratch)

    if query.dtype == torch.float32 or not own_kernel:
        return show(value, how).transpose(1, 2)
    # In half precision a kernel makes the output, and statistics are a second pass in float32 over its log-sums.
    flash = _flash(query, key, value, how)
    if flash is None:
        show(value[..., :0], how)
        return None
    output, log_sum = flash
    show(value[..., :0], replace(how, log_sum=log_sum))
    return output.transpose(1, 2)


def _flash(query: Tensor, key: Tensor, value: Tensor, how: AttentionMath) -> tuple[Tensor, Tensor] | None:
    """Output and log-sums of plain causal attention from the flash kernel; None where it does not apply."""
    special = (how.mask, how.softcap, how.bias, how.sinks)
    if how.relu or any(x is not None for x in special) or query.shape[2] != key.shape[2]:
        return None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    aten = torch.ops.aten
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=how.scaling)
    if query.device.type == "cuda" and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=how.scaling)[:2]
    return None


AttentionInterface.register(NAME, watched_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def watching(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Let `watch` see into the model's attention while the block runs; then all is as before.

    Args:
        model: the transformers model.
        watch: who looks at what; if it is idle, nothing is switched.
    """
    if watch.idle:
        yield
        return
    token = _WATCH.set(watch)
    try:
        with attention_by(model, NAME) as own:
            watch.own = own
            yield
    finally:
        _WATCH.reset(token)
