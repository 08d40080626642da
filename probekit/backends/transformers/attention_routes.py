"""Attention of families that do not ask transformers' registry for their attention function: BLOOM, Falcon, GPT-J.

Their attention modules do their own mathematics, so there is no function to switch. Instead, while a
pass watches, taps or cuts a layer, that layer's attention module has a `forward` of its own here: it
makes queries, keys and values with the module's own projections and rotary embedding, shows them,
and goes through the same streamed attention as everybody (`attention_switch.attend`). A layer that
is only tapped does its softmax as the module does, operation for operation, so that a tap that
changes nothing changes no bit. Afterwards the module's own `forward` is back, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probekit.core import CapabilityError
from probekit.reduce.attention_blocks import AttentionMath

from .attention_switch import Watch, attend

Forward = Callable[..., tuple[Tensor, None]]


@dataclass
class Seat:
    """One attention module while a pass looks into it.

    Args:
        module: the attention module.
        layer: its block number.
        watch: who looks.
        causal: the last mask that was looked at, and whether it is the plain causal one.
    """

    module: Any
    layer: int
    watch: Watch
    causal: list[tuple[Tensor, bool]] = field(default_factory=list)

    def tap(self, site: str, values: Tensor) -> Tensor:
        """Show queries, keys or values, and take back what the taps make of them.

        Args:
            site: "q", "k" or "v".
            values: axes text, head, token, d_head.
        """
        return self.watch.tapped(site, self.layer, values.transpose(1, 2)).transpose(1, 2)

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """Axes text (or 1), 1, query, key: pairs that the module's mask allows; None where it is plain causal.

        Args:
            mask: as the module gets it: True where a pair is allowed, or a large negative number where it is not.
        """
        if mask is None:
            return None
        if not self.causal or self.causal[0][0] is not mask:
            allowed = _allowed(mask[:, :1])
            n_queries, n_keys = allowed.shape[-2:]
            plain = torch.ones(n_queries, n_keys, dtype=torch.bool, device=mask.device).tril(n_keys - n_queries)
            self.causal[:] = [(mask, n_queries == n_keys and bool((allowed == plain).all()))]
        return None if self.causal[0][1] else _allowed(mask[:, :1])

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], how: AttentionMath, own: Callable[[], Tensor]) -> Tensor:
        """Attention as the watch wants it, or as the module does it, and its output shown.

        Args:
            qkv: queries (text, head, token, d_head), keys and values (text, key-value head, token, d_head).
            how: scaling, bias and mask.
            own: the module's own mathematics; axes text, head, token, d_head.

        Returns:
            Axes text, token, d_model: the heads side by side, as the output projection reads them.
        """
        how = AttentionMath(how.scaling, mask=how.mask, bias=how.bias, cut=self.watch.cuts.get(self.layer))
        output = attend(self.watch, self.layer, *qkv, how)
        if output is None:
            output = own().transpose(1, 2)
        return self.watch.tapped("z", self.layer, output).flatten(2)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def bloom(
    seat: Seat,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """BLOOM (arXiv 2211.05100): one projection for all three, ALiBi (arXiv 2108.12409), residual added inside.

    Args:
        seat: the module and who looks.
        hidden_states: axes text, token, d_model.
        residual: what the module adds to its output; axes text, token, d_model.
        alibi: axes text × head, 1, key.
        attention_mask: axes text, 1, query, key; added to the scores.
        layer_past: keys and values of earlier tokens.

    Returns:
        Output plus residual, axes text, token, d_model; and None in place of probabilities.
    """
    module, n_text = seat.module, len(hidden_states)
    parts = module._reshape(module.query_key_value(hidden_states))
    query, key, value = (seat.tap(site, x) for site, x in zip("qkv", parts, strict=True))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)

    def own() -> Tensor:
        q, k, v = (x.reshape(n_text * module.num_heads, -1, module.head_dim) for x in (query, key, value))
        scores = alibi.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=module.beta, alpha=module.inv_norm_factor)
        scores = scores.view(n_text, module.num_heads, q.shape[1], -1)
        if attention_mask is not None:
            scores = scores + attention_mask
        probs = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.bmm(probs.view(len(q), q.shape[1], -1), v).view(query.shape)

    bias = module.beta * alibi.view(n_text, module.num_heads, 1, -1)
    how = AttentionMath(module.inv_norm_factor, mask=seat.visible(attention_mask), bias=bias)
    return residual + module.dense(seat.attend((query, key, value), how, own)), None


def falcon(
    seat: Seat,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Falcon (arXiv 2311.16867): one, grouped or all key-value heads; rotary embedding or ALiBi.

    With ALiBi the mask already holds the bias, and transformers' eager mathematics adds it once more:
    a Falcon with ALiBi that was loaded with eager attention has twice the slopes, and so it has here.

    Args:
        seat: the module and who looks.
        hidden_states: axes text, token, d_model.
        alibi: axes text, head, 1, key, before division by the root of d_head; None with rotary embedding.
        attention_mask: axes text, 1 (or head, with ALiBi), query, key.
        layer_past: keys and values of earlier tokens.
        output_attentions: makes the module leave SDPA.
        position_embeddings: cosines and sines, axes text (or 1), token, d_head.

    Returns:
        Output, axes text, token, d_model; and None in place of probabilities.
    """
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    module = seat.module
    parts = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in parts)
    group = module.num_heads // module.num_kv_heads if module.new_decoder_architecture else 1
    key, value = key[:, ::group], value[:, ::group]  # the module repeats them, one per query head
    if alibi is None:
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    query, key, value = (seat.tap(site, x) for site, x in (("q", query), ("k", key), ("v", value)))
    if group > 1:
        own_key, own_value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    else:
        own_key, own_value = key, value
    if layer_past is not None:
        key, value = own_key, own_value = layer_past.update(own_key, own_value, module.layer_idx)
    sdpa = module.config._attn_implementation == "sdpa" and not output_attentions

    def own() -> Tensor:
        if sdpa:
            causal = module.is_causal and attention_mask is None and query.shape[2] > 1
            return nn.functional.scaled_dot_product_attention(
                query, own_key, own_value, attn_mask=attention_mask, is_causal=causal
            )
        scores = query @ own_key.transpose(-1, -2)
        if alibi is None:
            scores = scores / module.head_dim**0.5
        else:
            scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
            scores = (scores + alibi) * module.inv_norm_factor
        return nn.functional.softmax(scores + attention_mask, dim=-1, dtype=hidden_states.dtype) @ own_value

    bias = None
    if alibi is not None:
        alibi = alibi.view(len(query), module.num_heads, 1, -1)
        bias = alibi / module.head_dim**0.5  # as the mask has it
        if not sdpa:
            bias = bias.float() + alibi.float() * module.inv_norm_factor
    how = AttentionMath(module.inv_norm_factor, mask=seat.visible(attention_mask), bias=bias)
    return module.dense(seat.attend((query, key, value), how, own)), None


def gptj(
    seat: Seat,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """GPT-J: rotary embedding of neighbouring pairs on the first `rotary_dim` dimensions of each head.

    Args:
        seat: the module and who looks.
        hidden_states: axes text, token, d_model.
        layer_past: keys and values of earlier tokens.
        attention_mask: axes text, 1, query, key; added to the scores.
        position_ids: axes text (or 1), token.

    Returns:
        Output, axes text, token, d_model; and None in place of probabilities.
    """
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    module = seat.module
    assert position_ids is not None
    positions = module._get_embed_positions(position_ids)
    places = position_ids.unsqueeze(-1).repeat(1, 1, positions.shape[-1])
    projected = [
        projection(hidden_states).unflatten(-1, (module.num_attention_heads, module.head_dim))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    ]
    sin, cos = torch.gather(positions, 1, places).to(projected[1].dtype).chunk(2, dim=-1)
    n = projected[0].shape[-1] if module.rotary_dim is None else module.rotary_dim
    for i in (0, 1):
        turned = apply_rotary_pos_emb(projected[i][..., :n], sin, cos)
        projected[i] = torch.cat([turned, projected[i][..., n:]], dim=-1)
    query, key, value = (seat.tap(s, x.transpose(1, 2)) for s, x in zip("qkv", projected, strict=True))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)

    def own() -> Tensor:
        output: Tensor = module._attn(query, key, value, attention_mask)[0]
        return output

    how = AttentionMath(1 / module.scale_attn, mask=seat.visible(attention_mask))
    return module.out_proj(seat.attend((query, key, value), how, own)), None


@dataclass(frozen=True)
class Route:
    """Where a family's attention modules are, which class they have, and what stands in for their `forward`."""

    path: str  # within a block
    kind: str  # a module of another class, such as the one for flash attention, does other mathematics
    forward: Forward


ROUTES: dict[str, Route] = {
    "bloom": Route("self_attention", "BloomAttention", bloom),
    "falcon": Route("self_attention", "FalconAttention", falcon),
    "gptj": Route("attn", "GPTJAttention", gptj),
}


@contextmanager
def routed(blocks: nn.ModuleList, name: str, watch: Watch) -> Iterator[None]:
    """Let `watch` see into these blocks' attention while the block runs; then all is as before.

    Args:
        blocks: the model's blocks.
        name: the route, a name from `ROUTES`.
        watch: who looks at what. Layers that nobody looks at are left alone.

    Raises:
        CapabilityError: an attention module is of another kind than the route knows, or another tool has
            replaced its `forward`.
    """
    route = ROUTES[name]
    layers = watch.layers | set(watch.cuts) | {layer for _, layer in watch.taps}
    before: list[tuple[Any, str, bool, Any]] = []
    try:
        for layer in sorted(layers):
            module = blocks[layer].get_submodule(route.path)
            slot = _slot(module, route, layer)
            before.append((module, slot, slot in module.__dict__, module.__dict__.get(slot)))
            setattr(module, slot, partial(route.forward, Seat(module, layer, watch)))
        yield
    finally:
        for module, slot, had, was in before:
            if had:
                setattr(module, slot, was)
            else:
                delattr(module, slot)


def _slot(module: Any, route: Route, layer: int) -> str:
    """The attribute of a module that holds the mathematics."""
    if type(module).__name__ != route.kind:
        raise CapabilityError(
            f"The attention of layer {layer} is a {type(module).__name__}; probekit sees into {route.kind} here. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    if "forward" not in module.__dict__:
        return "forward"
    if "_old_forward" in module.__dict__:  # accelerate moves weights in `forward` and calls this one inside
        return "_old_forward"
    raise CapabilityError(
        f"Another tool has replaced `forward` of the attention of layer {layer}, and seeing into it would pass that "
        "tool by. Remove its change first."
    )
