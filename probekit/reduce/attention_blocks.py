"""Exact attention, a block of queries at a time: the output and the probabilities, never query × key as a whole.

Peak memory is two buffers of head × block × key, whatever the length of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sizes import BLOCK, BLOCK_BYTES, SMALLEST_BLOCK

MASKED = -1e30  # instead of -inf, so that probability × score is 0 and not NaN


@dataclass(frozen=True)
class AttentionBlock:
    """Attention probabilities of some consecutive queries.

    Args:
        probs: axes text, head, query, key; keys run from 0 to the last one any of these queries sees.
            Rows of padding are zero. With a learned sink, rows sum to less than 1. With ReLU attention these are the
            weights that multiply the values, and a row sums to anything from 0 on.
        entropy_nats: entropy of each row, a learned sink counted as one more outcome; axes text, head, query. With
            ReLU attention that of the row divided by its sum, and 0 for a row of zeros.
        max: largest entry of each row; axes text, head, query.
        start: position of the first query.
        lengths: tokens per text.
        visible: axes text, query, key: which pairs the mask allows; None for plain causal attention.
        first_head: head that the head axis begins with.
        n_heads: heads of the layer; those of `probs` if None.
        counts: remembers `seen` of plain causal blocks, which are the same in every layer of a pass.
        scores: what the softmax (or ReLU) read, in the axes of `probs`; `MASKED` or less where the mask hides a pair. None
            unless they were asked for, and where a backend knows probabilities only.
        normalised: whether each row is a distribution over its keys (and a learned sink); False with ReLU attention.
    """

    probs: Tensor
    entropy_nats: Tensor
    max: Tensor
    start: int
    lengths: tuple[int, ...]
    visible: Tensor | None = None
    first_head: int = 0
    n_heads: int | None = None
    counts: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    normalised: bool = True

    def column_sums(self, before: int | None = None) -> Tensor:
        """Attention each key receives from these queries; axes text, head, key.

        Args:
            before: count only queries at positions below this one.
        """
        n_queries = self.probs.shape[2]
        counted = n_queries if before is None else min(n_queries, max(0, before - self.start))
        # As a product with a row of ones, which is twice as fast as a sum over this axis.
        flat = self.probs.flatten(0, 1)[:, :counted]
        return torch.bmm(flat.new_ones(len(flat), 1, counted), flat).view(*self.probs.shape[:2], -1)

    def seen(self, before: int | None = None) -> Tensor:
        """How many of these queries see each key; axes text, key; float32.

        Args:
            before: count only queries at positions below this one.
        """
        n_queries, n_keys = self.probs.shape[2:]
        stop = self.start + n_queries
        if before is not None:
            stop = max(self.start, min(stop, before))
        remembered = (self.start, stop, n_keys)
        if self.visible is None and remembered in self.counts:
            return self.counts[remembered]
        device = self.probs.device
        ends = torch.tensor(self.lengths, device=device).clamp(max=stop)[:, None]
        key = torch.arange(n_keys, device=device)[None]
        if self.visible is None:
            self.counts[remembered] = (ends - key.clamp(min=self.start)).clamp(min=0).float()
            return self.counts[remembered]
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
        log_sum: if known (a flash kernel returns it), axes text, head, query: log of the sum of
            exp(scores); saves the passes that would find it.
        bias: if set, axes text (or 1), head (or 1), query (or 1), key: added to the scores before the
            softmax, after any soft-cap (ALiBi, arXiv 2108.12409, and relative-position biases).
        sinks: if set, axis head: a learned logit that takes part in the softmax without being a key,
            as in gpt-oss (arXiv 2508.10925).
        cut: if set, is given a block's scores (text, head, query, key), its heads and its first query,
            and sets the edges that are knocked out to `MASKED`.
        keep_scores: whether blocks carry their scores.
        relu: weights are max(score, 0) / (query + 1), with the query's position counted from 0, instead of a softmax
            (arXiv 2410.13835, section 2). Masked and cut pairs weigh 0, and no other weight changes with them.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None
    mask: Tensor | None = None
    log_sum: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    cut: Callable[[Tensor, slice, int], None] | None = None
    keep_scores: bool = False
    relu: bool = False

    def added(self, heads: slice, start: int, stop: int) -> Tensor | None:
        """The bias of a block; axes text (or 1), head (or 1), query (or 1), key up to `stop`."""
        if self.bias is None:
            return None
        queries = slice(None) if self.bias.shape[2] == 1 else slice(start, stop)
        return self.bias[:, slice(None) if self.bias.shape[1] == 1 else heads, queries, :stop]

    def visible(self, start: int, stop: int, n_keys: int, device: torch.device) -> Tensor | None:
        """Axes text (or 1), query, key: allowed pairs of a block; None if plain causal."""
        if self.mask is not None:
            return self.mask[:, 0, start:stop, :n_keys]
        if self.window is None or self.window >= stop:
            return None
        query = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(n_keys, device=device)[None]
        return ((key <= query) & (key > query - self.window))[None]


class Scratch:
    """Buffers that grow to the largest block and are used again for every block and layer."""

    def __init__(self) -> None:
        self._flat: dict[int, Tensor] = {}
        self.counts: dict[tuple[int, int, int], Tensor] = {}
        self._future: Tensor | None = None

    def view(self, which: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """A float32 buffer of this shape; equal `which`, equal memory."""
        n = math.prod(shape)
        flat = self._flat.get(which)
        if flat is None or flat.numel() < n or flat.device != device:
            flat = self._flat[which] = torch.empty(n, dtype=torch.float32, device=device)
        return flat[:n].view(shape)

    def future(self, n: int, device: torch.device) -> Tensor:
        """What to add to the scores of `n` queries against their own `n` keys: MASKED above the diagonal."""
        if self._future is None or len(self._future) < n or self._future.device != device:
            self._future = torch.full((n, n), MASKED, device=device).triu_(1)
        return self._future[:n, :n]


def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: AttentionMath,
    lengths: tuple[int, ...],
    on_block: Callable[[AttentionBlock], None],
    *,
    block: int | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Causal attention in float32, showing the probabilities of each block of queries to `on_block`.

    Grouped-query heads share keys and values without repeating them: head h uses key-value head
    h // (n_heads / n_kv_heads). Long texts run some heads at a time, so that a block stays in the cache.

    Args:
        query: axes text, head, token, d_head.
        key: axes text, key-value head, token, d_head.
        value: axes text, key-value head, token, d_value; d_value may be 0 where no output is needed.
        how: scaling, soft-cap, window and mask.
        lengths: tokens per text; positions past a text's end are padding.
        on_block: is shown every block, for some heads after others; must not keep `probs`, which is overwritten.
        block: queries per block; what suits the cache if None.
        scratch: buffers to use again.

    Returns:
        Attention output, axes text, head, token, d_value, in the type of `value`.
    """
    n_text, n_heads, n_tokens, d_head = query.shape
    group = n_heads // key.shape[1]
    scratch = scratch or Scratch()
    n_kv, block = _cut(n_text * group * n_tokens, key.shape[1], block, on_cpu=query.device.type == "cpu")
    output = value.new_empty(n_text, n_tokens, n_heads, value.shape[-1])  # as the projection after it wants it
    for first in range(0, key.shape[1], n_kv):
        kv, heads = slice(first, first + n_kv), slice(first * group, (first + n_kv) * group)
        q = (query[:, heads].float() * how.scaling).unflatten(1, (-1, group))
        k = key[:, kv].float().flatten(0, 1).transpose(1, 2).contiguous()  # this way round the product is faster
        v = value[:, kv].float().flatten(0, 1)
        for start in range(0, n_tokens, block):
            stop = min(start + block, n_tokens)
            rows = q[:, :, :, start:stop].reshape(len(k), -1, d_head)
            scores = scratch.view(0, (*rows.shape[:2], stop), k.device)
            torch.bmm(rows, k[:, :, :stop], out=scores)
            by_head = scores.view(n_text, -1, stop - start, stop)
            seen = _normalise(by_head, how, (start, heads, n_heads), lengths, scratch)
            if v.shape[-1]:
                mixed = torch.bmm(seen.probs.view(scores.shape), v[:, :stop])
                output[:, start:stop, heads] = mixed.view(*by_head.shape[:3], -1).transpose(1, 2)
            if min(lengths) < stop:
                for i, n in enumerate(lengths):
                    seen.probs[i, :, max(0, n - start) :] = 0
            on_block(seen)
    return output.transpose(1, 2)


def whole_attention(query: Tensor, key: Tensor, value: Tensor, how: AttentionMath) -> Tensor:
    """The same attention in plain operations that can be differentiated; holds query × key as a whole.

    Args:
        query: axes text, head, token, d_head; the last ones, where keys of earlier tokens come from a cache.
        key: axes text, key-value head, token, d_head.
        value: axes text, key-value head, token, d_value.
        how: scaling, soft-cap, window, mask, bias, sinks and cut edges.

    Returns:
        Attention output, axes text, token, head, d_value.
    """
    n_keys, group = key.shape[2], query.shape[1] // key.shape[1]
    start = n_keys - query.shape[2]
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.float() @ key.transpose(2, 3) * how.scaling
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if how.bias is not None:
        scores = scores + how.bias
    visible = how.visible(start, n_keys, n_keys, scores.device) if how.mask is None else how.mask[:, 0, :, :n_keys]
    causal = torch.ones(query.shape[2], n_keys, dtype=torch.bool, device=scores.device).tril(start)
    allowed = causal if visible is None else visible[:, None]
    scores = scores.masked_fill(~allowed, MASKED)
    if how.cut is not None:
        scores = scores.clone()
        how.cut(scores, slice(0, query.shape[1]), start)
    if how.relu:
        probs = torch.relu(scores) / _row_numbers(start, query.shape[2], scores.device)
    elif how.sinks is not None:
        column = how.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        probs = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        probs = torch.softmax(scores, -1)
    return (probs @ value).to(query.dtype).transpose(1, 2)


def _cut(rows_of_a_kv_head: int, n_kv: int, block: int | None, *, on_cpu: bool) -> tuple[int, int]:
    """Key-value heads at a time and queries per block, so that a block of scores stays in the cache of a CPU."""
    if not on_cpu:
        return n_kv, block or BLOCK
    if block is None:
        block = BLOCK
        while block > SMALLEST_BLOCK and 4 * rows_of_a_kv_head * block > BLOCK_BYTES:
            block //= 2
    return max(1, min(n_kv, BLOCK_BYTES // (4 * rows_of_a_kv_head * block))), block


def _normalise(
    scores: Tensor, how: AttentionMath, place: tuple[int, slice, int], lengths: tuple[int, ...], scratch: Scratch
) -> AttentionBlock:
    """Probabilities of one block; `scores` (text, head, query, key) is overwritten.

    Args:
        scores: scaled products of queries and keys.
        how: soft-cap, window, mask, known log-sums.
        place: first query, which heads, and how many heads the layer has.
        lengths: tokens per text.
        scratch: buffers.
    """
    start, heads, n_heads = place
    n_queries, n_keys = scores.shape[2:]
    if how.softcap is not None:
        scores.div_(how.softcap).tanh_().mul_(how.softcap)
    bias = how.added(heads, start, start + n_queries)
    if bias is not None:
        scores += bias
    visible = how.visible(start, start + n_queries, n_keys, scores.device)
    if visible is not None:
        scores.masked_fill_(~visible[:, None], MASKED)
    else:
        scores[..., start:] += scratch.future(n_queries, scores.device)
    if how.cut is not None:
        how.cut(scores, heads, start)
    probs = scratch.view(1, tuple(scores.shape), scores.device)
    kept = scores if how.keep_scores else None
    if how.relu:
        entropy, largest = _rectify(scores, start, probs)
        place_and_texts = (start, lengths, visible, heads.start, n_heads, scratch.counts)
        return AttentionBlock(probs, entropy, largest, *place_and_texts, kept, normalised=False)
    if how.log_sum is not None:
        log_sum = how.log_sum[:, heads, start : start + n_queries]
        torch.sub(scores, log_sum[..., None], out=probs).exp_()
        largest = probs.amax(-1)
    else:
        top = scores.amax(-1)
        torch.softmax(scores, dim=-1, out=probs)
        largest = probs.amax(-1)
        log_sum = top - largest.log()  # p_max = exp(s_max) / Z
    by_sink: Tensor | float = 0.0
    if how.sinks is not None:
        sink = how.sinks[heads].float()[None, :, None]
        of_keys, log_sum = log_sum, torch.logaddexp(log_sum, sink)
        left = (of_keys - log_sum).exp()  # the share that the sink leaves to the keys
        probs *= left[..., None]
        largest, by_sink = largest * left, (sink - log_sum).exp() * sink
    # H = log Z - sum p s; masked entries add p s = 0.
    products = torch.mul(scores, probs) if how.keep_scores else scores.mul_(probs)
    entropy = (log_sum - products.sum(-1) - by_sink).clamp_(min=0)
    return AttentionBlock(probs, entropy, largest, start, lengths, visible, heads.start, n_heads, scratch.counts, kept)


def _rectify(scores: Tensor, start: int, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of ReLU attention into `probs`; entropy and largest weight of each row."""
    torch.div(scores.clamp(min=0), _row_numbers(start, scores.shape[2], scores.device), out=probs)
    total = probs.sum(-1, keepdim=True)
    share = probs / total.where(total > 0, 1)
    return torch.special.entr(share).sum(-1), probs.amax(-1)


def _row_numbers(start: int, n: int, device: torch.device) -> Tensor:
    """Start + 1, start + 2, … of `n` queries; axes query, 1."""
    return torch.arange(start + 1, start + n + 1, device=device, dtype=torch.float32)[:, None]
