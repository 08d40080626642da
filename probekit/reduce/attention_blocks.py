"""Exact attention, a block of queries at a time: the output and the probabilities, never query × key as a whole.

Peak memory is two buffers of head × block × key, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .sizes import BLOCK


@dataclass(frozen=True)
class AttentionBlock:
    """Attention probabilities of some consecutive queries.

    Args:
        probs: axes text, head, query, key; keys run from 0 to the last one any of these queries sees.
            Rows of padding are zero.
        entropy_nats: entropy of each row; axes text, head, query.
        max: largest entry of each row; axes text, head, query.
        start: position of the first query.
        lengths: tokens per text.
        visible: axes text, query, key: which pairs the mask allows; None for plain causal attention.
    """

    probs: Tensor
    entropy_nats: Tensor
    max: Tensor
    start: int
    lengths: tuple[int, ...]
    visible: Tensor | None = None

    def column_sums(self, before: int | None = None) -> Tensor:
        """Attention each key receives from these queries; axes text, head, key.

        Args:
            before: count only queries at positions below this one.
        """
        if before is None or before >= self.start + self.probs.shape[2]:
            return self.probs.sum(2)
        return self.probs[:, :, : max(0, before - self.start)].sum(2)

    def seen(self, before: int | None = None) -> Tensor:
        """How many of these queries see each key; axes text, key; float32.

        Args:
            before: count only queries at positions below this one.
        """
        n_queries, n_keys = self.probs.shape[2:]
        stop = self.start + n_queries
        if before is not None:
            stop = max(self.start, min(stop, before))
        device = self.probs.device
        ends = torch.tensor(self.lengths, device=device).clamp(max=stop)[:, None]
        key = torch.arange(n_keys, device=device)[None]
        if self.visible is None:
            return (ends - key.clamp(min=self.start)).clamp(min=0).float()
        query = torch.arange(self.start, self.start + n_queries, device=device)
        counted = (query[None] < ends)[:, :, None] & self.visible
        return counted.sum(1).float()


@dataclass(frozen=True)
class AttentionMath:
    """How a layer turns queries and keys into probabilities.

    Args:
        scaling: factor on q · k.
        softcap: if set, scores become softcap · tanh(score / softcap).
        window: if set, a query sees itself and the `window` - 1 keys before it.
        mask: if set, axes text (or 1), 1, query, key: which pairs are allowed; takes the place of
            the causal rule and the window.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None
    mask: Tensor | None = None

    def visible(self, start: int, stop: int, n_keys: int, device: torch.device) -> Tensor | None:
        """Axes text (or 1), query, key: allowed pairs of a block; None if plain causal."""
        if self.mask is not None:
            return self.mask[:, 0, start:stop, :n_keys]
        if self.window is None or self.window >= stop:
            return None
        query = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(n_keys, device=device)[None]
        return ((key <= query) & (key > query - self.window))[None]


class _Scratch:
    """Two buffers that grow to the largest block and are used again for every block and layer."""

    def __init__(self) -> None:
        self._flat: dict[int, Tensor] = {}

    def view(self, which: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        n = 1
        for s in shape:
            n *= s
        flat = self._flat.get(which)
        if flat is None or flat.numel() < n or flat.device != like.device:
            flat = self._flat[which] = torch.empty(n, dtype=torch.float32, device=like.device)
        return flat[:n].view(shape)


def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    math: AttentionMath,
    lengths: tuple[int, ...],
    on_block: Callable[[AttentionBlock], None],
    *,
    block: int = BLOCK,
    scratch: _Scratch | None = None,
) -> Tensor:
    """Causal attention in float32, showing the probabilities of each block of queries to `on_block`.

    Grouped-query heads share keys and values without repeating them: head h uses key-value head
    h // (n_heads / n_kv_heads).

    Args:
        query: axes text, head, token, d_head.
        key: axes text, key-value head, token, d_head.
        value: axes text, key-value head, token, d_value.
        math: scaling, soft-cap, window and mask.
        lengths: tokens per text; positions past a text's end are padding.
        on_block: is shown every block, in order; must not keep `probs`, which is overwritten.
        block: queries per block.
        scratch: buffers to use again.

    Returns:
        Attention output, axes text, head, token, d_value, in the type of `value`.
    """
    n_text, n_heads, n_tokens, d_head = query.shape
    n_kv = key.shape[1]
    scratch = scratch or _Scratch()
    q = (query.float() * math.scaling).reshape(n_text, n_kv, n_heads // n_kv, n_tokens, d_head)
    k = key.float().reshape(n_text * n_kv, n_tokens, d_head)
    # Values and keys side by side: one product gives the output and P K, and with it the entropy (see _block).
    vk = torch.cat([value.float().reshape(n_text * n_kv, n_tokens, -1), k], dim=-1)
    output = value.new_empty(n_text, n_heads, n_tokens, value.shape[-1])
    for start in range(0, n_tokens, block):
        stop = min(start + block, n_tokens)
        rows = q[:, :, :, start:stop].reshape(n_text * n_kv, -1, d_head)
        seen = _block(rows, k[:, :stop], vk[:, :stop], math, (n_text, n_heads, start, stop), scratch)
        probs, out, entropy, largest, visible = seen
        output[:, :, start:stop] = out
        for i, n in enumerate(lengths):
            if n < stop:
                probs[i, :, max(0, n - start) :] = 0
        on_block(AttentionBlock(probs, entropy, largest, start, lengths, visible))
    return output


def _block(
    rows: Tensor, k: Tensor, vk: Tensor, math: AttentionMath, place: tuple[int, int, int, int], scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Probabilities, output, entropy, maximum and visibility of one block of queries."""
    n_text, n_heads, start, stop = place
    n_queries, n_keys, d_value = stop - start, k.shape[1], vk.shape[2] - k.shape[2]
    shape = (rows.shape[0], rows.shape[1], n_keys)
    scores = torch.bmm(rows, k.transpose(1, 2), out=scratch.view(0, shape, rows))
    if math.softcap is not None:
        scores.div_(math.softcap).tanh_().mul_(math.softcap)
    by_head = scores.view(n_text, n_heads, n_queries, n_keys)
    visible = math.visible(start, stop, n_keys, rows.device)
    if visible is not None:
        by_head.masked_fill_(~visible[:, None], float("-inf"))
    else:
        future = torch.ones(n_queries, n_queries, dtype=torch.bool, device=rows.device).triu_(1)
        by_head[..., start:].masked_fill_(future, float("-inf"))
    top = scores.amax(-1)
    probs = torch.softmax(scores, dim=-1, out=scratch.view(1, shape, rows))
    largest = probs.amax(-1)
    mixed = torch.bmm(probs, vk)
    log_sum = top - largest.log()
    # H = log Z - sum_k p_k s_k, and sum_k p_k s_k = q · (P K) as long as the score is linear in the key.
    if math.softcap is None:
        mean_score = (rows * mixed[..., d_value:]).sum(-1)
    else:
        mean_score = (probs * scores.masked_fill(scores == float("-inf"), 0)).sum(-1)
    entropy = (log_sum - mean_score).clamp_(min=0)
    heads = (n_text, n_heads, n_queries)
    return (
        probs.view(*heads, n_keys),
        mixed[..., :d_value].reshape(*heads, d_value),
        entropy.view(heads),
        largest.view(heads),
        visible,
    )
