"""Attention of many continuations on the prefixes that they share: each prefix is kept once, whoever continues it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from probekit.reduce.attention_blocks import MASKED, AttentionMath, Scratch, stream_attention

from .implementation import attention_by

NAME = "probekit-branches"


@dataclass
class Slots:
    """Rows that are being written on, with the keys and values of what they share and of what is their own.

    Args:
        prefixes: for each base, by layer: keys and values; axes key-value head, token, d_head.
        room: tokens that a row may write.
    """

    prefixes: list[dict[int, tuple[Tensor, Tensor]]]
    room: int
    base: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # of each row
    start: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # shared tokens of each row
    step: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # own tokens before the current one
    filling: int | None = None  # the base whose prefix is being read
    scratch: Scratch = field(default_factory=Scratch)
    _own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer; row, key-value head, step, d_head
    _groups: list[tuple[int, Tensor]] = field(default_factory=list)

    def open(self, n_rows: int, device: torch.device) -> None:
        """Rows that write nothing yet."""
        self.base = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.start, self.step = torch.ones_like(self.base), torch.zeros_like(self.base)
        self._own.clear()

    def place(self, row: int, base: int, start: int) -> None:
        """Let a row write on from a base's first `start` tokens."""
        self.base[row], self.start[row], self.step[row] = base, start, 0

    def settle(self, rows: Sequence[int]) -> None:
        """Before each step: which rows count. The others keep their places and are computed for nothing."""
        chosen = torch.tensor(list(rows), device=self.base.device)
        bases = self.base[chosen]
        self._groups = [(int(b), chosen[bases == b]) for b in bases.unique()]

    def shrink(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order."""
        keep = torch.tensor(list(rows), device=self.base.device)
        self.base, self.start, self.step = self.base[keep], self.start[keep], self.step[keep]
        self._own = {layer: (k[keep], v[keep]) for layer, (k, v) in self._own.items()}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: AttentionMath) -> Tensor:
        """Attention of one layer; answers with axes row, token, head, d_head."""
        if self.filling is not None:
            self.prefixes[self.filling][layer] = (key[0], value[0])
            length = query.shape[2]
            out = stream_attention(query, key, value, how, (length,), lambda _: None, scratch=self.scratch)
            return out.transpose(1, 2)
        return self._step(layer, query, key, value, how)

    def _step(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: AttentionMath) -> Tensor:
        n_rows, n_heads, _, d_head = query.shape
        n_kv, rows = key.shape[1], torch.arange(n_rows, device=query.device)
        if layer not in self._own:
            shape = (n_rows, n_kv, self.room)
            self._own[layer] = (key.new_zeros(*shape, key.shape[-1]), value.new_zeros(*shape, value.shape[-1]))
        own_keys, own_values = self._own[layer]
        own_keys[rows, :, self.step], own_values[rows, :, self.step] = key[:, :, 0], value[:, :, 0]
        reach = int(self.step.max()) + 1
        q = (query.float() * how.scaling).view(n_rows, n_kv, n_heads // n_kv, d_head)  # row, kv head, group, d_head
        own = torch.matmul(q, own_keys[:, :, :reach].float().transpose(2, 3))  # row, kv head, group, step
        steps = torch.arange(reach, device=q.device)
        hidden = steps[None] > self.step[:, None]
        if how.window is not None:
            hidden = hidden | (self.step[:, None] - steps[None] >= how.window)
        out = value.new_zeros((n_rows, n_kv, n_heads // n_kv, value.shape[-1]), dtype=torch.float32)
        for base, chosen in self._groups:
            out[chosen] = self._mix(layer, base, chosen, q, (own, hidden, own_values[:, :, :reach].float()), how)
        return out.reshape(n_rows, 1, n_heads, -1).to(query.dtype)

    def _mix(
        self, layer: int, base: int, chosen: Tensor, q: Tensor, own: tuple[Tensor, Tensor, Tensor], how: AttentionMath
    ) -> Tensor:
        """What rows of one base see: one product with the keys they share, one with their own."""
        keys, values = (x.float() for x in self.prefixes[base][layer])
        start, step = self.start[chosen], self.step[chosen]
        longest = int(start.max())
        mine = q[chosen].transpose(0, 1)  # kv head, row, group, d_head
        n_kv, n_rows, group, _ = mine.shape
        shared = torch.bmm(mine.flatten(1, 2), keys[:, :longest].transpose(1, 2)).view(n_kv, n_rows, group, longest)
        places = torch.arange(longest, device=q.device)
        out_of_sight = places[None] >= start[:, None]
        if how.window is not None:
            out_of_sight = out_of_sight | ((start + step)[:, None] - places[None] >= how.window)
        own_scores = own[0][chosen].transpose(0, 1)
        scores = torch.cat([shared, own_scores], -1)  # kv head, row, group, key
        if how.softcap is not None:
            scores = how.softcap * torch.tanh(scores / how.softcap)
        scores = scores.masked_fill(torch.cat([out_of_sight, own[1][chosen]], -1)[None, :, None], MASKED)
        if how.sinks is not None:
            sink = how.sinks.float().view(n_kv, 1, group, 1).expand(-1, n_rows, -1, 1)
            probs = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
        else:
            probs = torch.softmax(scores, -1)
        from_prefix = torch.bmm(probs[..., :longest].flatten(1, 2), values[:, :longest])
        from_own = torch.matmul(probs[..., longest:].transpose(0, 1), own[2][chosen])  # row, kv head, group, d
        return from_prefix.view(n_kv, n_rows, group, -1).transpose(0, 1) + from_own


_SLOTS: ContextVar[Slots | None] = ContextVar("probekit_slots", default=None)


def branch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it, while continuations are written.

    Args:
        module: the attention module; its `layer_idx` is the block number.
        query: axes row, head, token, d_head.
        key: axes row, key-value head, token, d_head.
        value: axes row, key-value head, token, d_value.
        attention_mask: none is made for this function.
        scaling: factor on q · k.
        dropout: zero while continuations are written.
        rest: whatever else the model's file hands to its attention function.
    """
    slots = _SLOTS.get()
    assert slots is not None
    how = AttentionMath(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=rest.get("softcap"),
        window=rest.get("sliding_window"),
        sinks=rest.get("s_aux"),
    )
    return slots.attend(int(getattr(module, "layer_idx", 0)), query, key, value, how).contiguous(), None


AttentionInterface.register(NAME, branch_attention)  # and no mask interface: models then make no mask


@contextmanager
def writing(module: nn.Module, slots: Slots) -> Iterator[None]:
    """Let a model's attention read and fill these slots; afterwards its configuration says what it said."""
    token = _SLOTS.set(slots)
    try:
        with attention_by(module, NAME):
            yield
    finally:
        _SLOTS.reset(token)
