"""Sinks, massive entries and norms of values and keys, aligned block by block, as it is and under edits of the entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from probekit.core import Batch, Capture, Patch, Trace
from probekit.methods.extremes import Entry, Largest, averaged, other_dims, zeroed
from probekit.reduce import (
    AttentionStats,
    MedianMagnitude,
    NextToken,
    Norm,
    OutputNorm,
    ReceivedWithin,
    SinkLogitGap,
    TopMagnitudes,
)
from probekit.stats import Estimate, ratio

Numbers = dict[str, tuple[tuple[str, ...], np.ndarray]]  # by variable: axes and values

STATS = Capture("pattern", AttentionStats())
BESIDE = (Capture("pattern", SinkLogitGap()), Capture("v", OutputNorm()))  # of the model as it is only
_GAP, _OUTPUT = BESIDE
_MEDIAN, _STREAM = Capture("resid_post", MedianMagnitude()), Capture("resid_post", Norm())
_KEY, _VALUE, _LOSS = Capture("k", Norm()), Capture("v", Norm()), Capture("logits", NextToken(1))


@dataclass(frozen=True)
class SinkSpec:
    """What counts as a sink, as a massive entry, and as a phase of such entries.

    Args:
        epsilon: a key is a sink of a head if it receives more attention than this, mean over queries that see it.
        horizon: length at which the sink rate of position 0 is measured.
        tail: last positions of a text that do not count as sinks.
        min_magnitude: magnitude that a massive entry exceeds.
        ratio: multiple of the layer's median that some entry of a phase exceeds.
        loose: multiple that all its entries exceed; at most `ratio`.
        top_k: largest entries of each token that are seen.
    """

    epsilon: float
    horizon: int
    tail: int
    min_magnitude: float
    ratio: float
    loose: float
    top_k: int

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What is looked at in every case."""
        return self._within, self._top, STATS, _MEDIAN, _STREAM, _KEY, _VALUE, _LOSS

    @property
    def _within(self) -> Capture:
        return Capture("pattern", ReceivedWithin(self.horizon))

    @property
    def _top(self) -> Capture:
        return Capture("resid_post", TopMagnitudes(self.top_k))

    def largest(self, trace: Trace) -> Largest:
        """The largest entries that leave each block."""
        top = trace[self._top]
        return Largest(top["value"].values, top["dim"].values, trace[_MEDIAN]["median"].values, trace.batch)

    def entries(self, largest: Largest, layer: int) -> tuple[Entry, ...]:
        """The entries that leave a block and count as massive."""
        return largest.entries(layer, self.min_magnitude, self.loose)

    def phases(self, largest: Largest, most: int) -> list[tuple[int, int]]:
        """Phases of massive entries in the order of depth: their writer, and the last block that reads them.

        A phase is a run of blocks after which some entry passes `loose`, if one of them passes `ratio`; its writer is
        the block in the run after which the largest entry of a text, mean over texts, has grown most. A phase that no
        block reads is left out.

        Args:
            largest: the model as it is.
            most: so many at most, those with the largest entries over the median at their writers.
        """
        n_layers, layers = len(largest.value), np.array(largest.layers(self.min_magnitude, self.loose), dtype=int)
        strict = set(largest.layers(self.min_magnitude, self.ratio))
        size = np.maximum.reduceat(np.abs(largest.value[..., 0]), largest.batch.starts, axis=1)  # layer, text
        grown, level = np.diff(size.mean(axis=1), prepend=0.0), _over(size, largest.median).mean(axis=1)
        found = []
        for run in np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1):
            inside = run[run < n_layers - 1]
            if inside.size and strict & set(run.tolist()):
                writer = int(inside[np.argmax(grown[inside])])
                found.append((writer, min(int(run[-1]) + 1, n_layers - 1)))
        return sorted(sorted(found, key=lambda phase: -level[phase[0]])[:most])

    def case(self, trace: Trace, sinks: np.ndarray, changed: np.ndarray | None = None) -> Numbers:
        """What is compared between cases.

        Args:
            trace: of one case.
            sinks: what is a sink in the model as it is; axes layer, head, token.
            changed: texts in which the case changes anything; the others are NaN. None for all.
        """
        batch, largest = trace.batch, self.largest(trace)
        received = trace[STATS]["received"].values
        size = np.maximum.reduceat(np.abs(largest.value[..., 0]), batch.starts, axis=1)
        kept, pairs = (np.add.reduceat(x.sum(axis=1), batch.starts, axis=-1) for x in (received * sinks, sinks))
        by_text = {
            "sink_rate": self._first_is_sink(trace).mean(axis=1),
            "at_sinks": _over(kept, pairs),
            "largest": _entering(_over(size, largest.median)),
            "stream_ratio": _entering(_first_over_later(_norms(trace, _STREAM), batch)),
            "key_ratio": _first_over_later(_norms(trace, _KEY).mean(axis=1), batch),
            "value_ratio": _first_over_later(_norms(trace, _VALUE).mean(axis=1), batch),
        }
        known = np.ones(len(batch), bool) if changed is None else changed
        found: Numbers = {k: (("layer", "text"), np.where(known, v, np.nan)) for k, v in by_text.items()}
        found["received"] = ("layer", "token"), received.mean(axis=1)
        loss = _text_means(-trace[_LOSS]["logprob_nats"].values, batch)
        return {**found, "loss_nats": (("text",), np.where(known, loss, np.nan))}

    def _first_is_sink(self, trace: Trace) -> np.ndarray:
        return trace[self._within]["received"].values[..., list(trace.batch.starts)] > self.epsilon

    def joint(self, trace: Trace) -> tuple[Numbers, np.ndarray]:
        """The variables of the model as it is, and which (layer, head, token) are sinks."""
        batch, largest, received = trace.batch, self.largest(trace), trace[STATS]["received"].values
        counted = batch.pos < np.repeat(batch.lengths, batch.lengths) - self.tail
        sinks = (received > self.epsilon) & counted
        times = _over(np.abs(largest.value[..., 0]), np.repeat(largest.median, batch.lengths, axis=1))
        massive = largest.passing(self.min_magnitude, self.loose).max(axis=-1) * 1.0
        by_head, by_token = ("layer", "head", "text"), ("layer", "token")
        data: Numbers = {
            "sink_share": (by_token, np.where(counted, sinks.mean(axis=1), np.nan)),
            "massive": (by_token, _entering(massive)),
            "times_median": (by_token, _entering(times)),
            "dim": (by_token, np.nan_to_num(_entering(largest.dim[..., 0]), nan=-1).astype(int)),
            "sink_at_first": (by_head, self._first_is_sink(trace) * 1.0),
            "drain": (by_head, _first_over_later(trace[_OUTPUT]["output_norm"].values, batch)),
            "gap_nats": (by_head, _text_means(trace[_GAP]["gap_nats"].values, batch)),
        }
        keys, values, stream = (_norms(trace, c) for c in (_KEY, _VALUE, _STREAM))
        group = received.shape[1] // keys.shape[1]
        beside = {"entry": _entering(times)[:, None], "stream": _entering(stream)[:, None]}
        beside |= {"key": np.repeat(keys, group, axis=1), "value": np.repeat(values, group, axis=1)}
        for name, numbers in beside.items():
            for suffix, first in (("", 0), ("_rest", 1)):
                spans = [slice(s + first, s + n - self.tail) for s, n in zip(batch.starts, batch.lengths, strict=True)]
                rho = [rank_correlations(received[..., at], numbers[..., at]) for at in spans]
                data[f"rho_{name}{suffix}"] = by_head, np.stack(rho, axis=-1)
        return data, sinks


def edits(entries: tuple[Entry, ...], batch: Batch, d_model: int) -> Iterator[tuple[str, tuple[Patch, ...]]]:
    """Patches by edit: entries "removed", set to their "mean" over other texts, and as many other dimensions removed.

    The mean and the control are left out where there is nothing to change.
    """
    yield "removed", zeroed(entries, batch)
    for edit, patches in (("mean", averaged(entries, batch)), ("control", other_dims(entries, batch, d_model))):
        if patches:
            yield edit, patches


def overlap(share: np.ndarray, massive: np.ndarray, pos: np.ndarray, first: int = 0) -> tuple[Estimate, float, float]:
    """How far sinks and tokens with massive entries are the same.

    Args:
        share: share of heads for which a token is a sink, NaN where it does not count; axes layer, token.
        massive: 1 if it enters the block with a massive entry, NaN where unknown; axes layer, token.
        pos: position of each token in its text.
        first: positions before this one do not count.

    Returns:
        The share of sinks (layer, head, token) on a token with a massive entry; the same if the sinks of each layer
        and text were at random tokens of it; and the share of heads whose sink such a token is.
    """
    known, starts = np.isfinite(share) & np.isfinite(massive) & (pos >= first), np.flatnonzero(pos == 0)
    sinks, entries = (np.where(known, x, 0.0) for x in (share, massive))
    by_text = (np.add.reduceat(x, starts, axis=1) for x in (sinks, entries, known * 1.0, sinks * entries))
    n_sinks, n_entries, n, both = by_text  # layer, text
    expected = np.nan_to_num(_over(n_sinks * n_entries, n)).sum(axis=0)
    weight = n_sinks.sum(axis=0)
    chance = float(expected.sum() / max(weight.sum(), 1e-30))
    excess = ratio(both.sum(axis=0) - expected, weight, "texts")  # the interval is that of the excess over chance
    return excess.minus(-chance).within(0, 1), chance, float(both.sum() / max(n_entries.sum(), 1e-30))


def largest_dims(share: np.ndarray, dim: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of sinks, and of tokens that are no head's sink, whose largest entry is in each dimension.

    Args:
        share: share of heads for which a token is a sink, NaN where it does not count; axes layer, token.
        dim: dimension of the largest entry that enters the block, -1 where unknown; axes layer, token.
        text: text of each token.

    Returns:
        Axes text, d_model; NaN for texts without such tokens. Sinks are (layer, head, token) triples, block 0 left out.
    """
    layer, token = np.nonzero(dim >= 0)
    names, place = np.unique(text, return_inverse=True)
    shares = []
    for weight in (np.nan_to_num(share), (share == 0) * 1.0):
        counts = np.zeros((len(names), int(dim.max(initial=0)) + 1))
        np.add.at(counts, (place[token], dim[layer, token]), weight[layer, token])
        shares.append(_over(counts, counts.sum(axis=1, keepdims=True)))
    return shares[0], shares[1]


def dims_by_layer(share: np.ndarray, dim: np.ndarray, text: np.ndarray, dims: np.ndarray) -> np.ndarray:
    """The same for sinks and some dimensions, layer by layer, mean over texts that have sinks; axes layer, d_model.

    Args:
        share: as in `largest_dims`.
        dim: as in `largest_dims`.
        text: as in `largest_dims`.
        dims: the dimensions.
    """
    weight = np.where(dim >= 0, np.nan_to_num(share), 0.0)
    totals = {t: weight[:, text == t].sum() for t in np.unique(text)}
    even = weight / np.array([max(totals[t], 1e-30) for t in text]) / max(sum(n > 0 for n in totals.values()), 1)
    return np.stack([(even * (dim == d)).sum(axis=1) for d in dims], axis=1)


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis, ties at their mean rank; NaN where either has no spread."""
    from scipy.stats import rankdata

    a, b = (rankdata(v, axis=-1) for v in (x, y))
    a, b = (v - v.mean(axis=-1, keepdims=True) for v in (a, b))
    return _over((a * b).sum(axis=-1), np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1)))


def over_layers(values: np.ndarray) -> np.ndarray:
    """Mean over all axes but the last, NaN left out; NaN where nothing is left."""
    flat = values.reshape(-1, values.shape[-1])
    return _over(np.nansum(flat, axis=0), np.isfinite(flat).sum(axis=0))


def _entering(leaving: np.ndarray) -> np.ndarray:
    """What enters each block, from what leaves each; NaN at block 0, which reads the embedding."""
    return np.concatenate([np.full(leaving[:1].shape, np.nan), leaving[:-1]])


def _over(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Quotients in float64; NaN where nothing is counted."""
    return np.where(counts > 0, sums / np.where(counts > 0, counts, 1.0), np.nan)


def _text_means(values: np.ndarray, batch: Batch) -> np.ndarray:
    """Mean over each text of what is not NaN; the last axis goes from token to text."""
    known = np.isfinite(values)
    sums = (np.add.reduceat(v.astype(float), batch.starts, axis=-1) for v in (np.where(known, values, 0), known))
    return _over(*sums)


def _first_over_later(values: np.ndarray, batch: Batch) -> np.ndarray:
    """Position 0 over the mean of later positions, NaN where that is 0; the last axis goes from token to text."""
    values = values.astype(float)
    first, total = values[..., list(batch.starts)], np.add.reduceat(values, batch.starts, axis=-1)
    return _over(first, (total - first) / (np.array(batch.lengths) - 1))


def _norms(trace: Trace, capture: Capture) -> np.ndarray:
    norms: np.ndarray = trace[capture]["norm"].transpose("layer", ..., "token").values.astype(float)
    return norms


def verdict(gap: Estimate, control: float) -> str:
    """What the difference of sinks between removed and control, paired by text, says of them."""
    low, high = gap.ci95 or (-np.inf, np.inf)
    if max(-low, high) <= 0.1 * control:
        return "the sinks stay"
    if low <= 0 <= high:
        return "no difference is resolved"
    return "the sinks grow" if gap.value > 0 else f"{-gap.value / control:.0%} of the sinks go with them"
