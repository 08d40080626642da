"""Every statistic once more, naively, in float64, from whole attention maps and whole logits."""

from __future__ import annotations

import numpy as np
from scipy.special import entr, log_softmax, softmax


def allowed(n: int, window: int | None = None) -> np.ndarray:
    """Which pairs causal attention sees; axes query, key."""
    seen = np.tril(np.ones((n, n), dtype=bool))
    return seen if window is None else seen & ~np.tril(seen, -window)


def attention_maps(
    q: np.ndarray,
    k: np.ndarray,
    seen: np.ndarray,
    scaling: float,
    softcap: float | None = None,
    bias: np.ndarray | float = 0.0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attention of one text; q has axes head, token, d_head, k fewer heads where they are grouped.

    `bias` is added to the scores; `sinks` (axis head) are logits that are no key: rows then sum to less than 1.
    """
    q, k = q.astype(np.float64), np.repeat(k.astype(np.float64), len(q) // len(k), axis=0)
    scores = np.einsum("hqd,hkd->hqk", q, k) * scaling
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen, scores + bias, -np.inf)
    if sinks is None:
        return softmax(scores, axis=-1)
    column = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (*scores.shape[:2], 1))
    return softmax(np.concatenate([scores, column], -1), axis=-1)[..., :-1]


def attention_stats(maps: np.ndarray, seen: np.ndarray) -> dict[str, np.ndarray]:
    """What AttentionStats makes of the maps of one text; axes head, query, key."""
    maps = maps.astype(np.float64)
    to_sink = np.maximum(1 - maps.sum(-1), 0)
    return {
        "received": maps.sum(1) / seen.sum(0),
        "entropy_nats": entr(maps).sum(-1) + entr(to_sink),
        "max": maps.max(-1),
        "first_share": maps[:, :, 0],
        "seen": seen.sum(0).astype(np.float64),
    }


def received_within(maps: np.ndarray, seen: np.ndarray, horizon: int) -> dict[str, np.ndarray]:
    """What ReceivedWithin makes of the maps of one text."""
    maps = maps.astype(np.float64)
    n = maps.shape[-1]
    received = np.full((len(maps), n), np.nan)
    if n >= horizon:
        column = maps[:, :horizon, :horizon].sum(1) / np.maximum(seen[:horizon, :horizon].sum(0), 1)
        received[:, :horizon] = column
    return {"received": received, "seen": seen[:horizon].sum(0).astype(np.float64)}


def readout(logits: np.ndarray, next_ids: np.ndarray, k: int, final: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What Readout and NextToken make of logits; axes token, vocab. `final` are the model's own logits."""
    logits = logits.astype(np.float64)
    log_p = log_softmax(logits, axis=-1)
    p = np.exp(log_p)
    own = log_p if final is None else log_softmax(final.astype(np.float64), axis=-1)
    at, there = np.maximum(next_ids, 0), next_ids >= 0
    target = np.take_along_axis(log_p, at[:, None], 1)[:, 0]
    logit = np.take_along_axis(logits, at[:, None], 1)
    entropy = entr(p).sum(-1)
    return {
        "entropy_nats": entropy,
        "varentropy_nats2": (p * (log_p + entropy[:, None]) ** 2).sum(-1),
        "logprob_nats": np.where(there, target, np.nan),
        "target_rank": np.where(there, (logits > logit).sum(-1).astype(float), np.nan),
        "kl_nats": (np.exp(own) * (own - log_p)).sum(-1),
        "top_logprob": -np.sort(-log_p, axis=-1)[:, :k],
    }


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines along the last axis."""
    a, b = a.astype(float), b.astype(float)
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))
