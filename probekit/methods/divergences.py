"""How far two next-token distributions are apart, from their log-probabilities; everything in nats.

p is the base's distribution, q that of the model under study, both after the same tokens and at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LN2 = float(np.log(2.0))
SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # of unspecific noise, nats
_ROWS = 16  # at a time; a row is as long as the vocabulary
_TIE = 1e-9  # of cumulative probability


def jensen_shannon(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """JS = ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q) / 2, in nats, 0 to ln 2; the last axis goes.

    Equal rows give exactly 0, rows without a common token ln 2.

    Args:
        log_p: log-probabilities; -inf for what cannot be.
        log_q: the same of the other.
    """
    from scipy.special import rel_entr

    p, q = np.exp(log_p), np.exp(log_q)
    middle = (p + q) / 2
    js = (rel_entr(p, middle).sum(axis=-1) + rel_entr(q, middle).sum(axis=-1)) / 2
    return np.clip(js, 0.0, LN2)


def kullback_leibler(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p‖q) = sum of p (log p - log q), in nats; the last axis goes.

    Infinite where p has a token that q cannot say.

    Args:
        log_p: log-probabilities; -inf for what cannot be.
        log_q: the same of the other.
    """
    known = log_p > -np.inf
    with np.errstate(invalid="ignore"):
        terms = np.where(known, np.exp(log_p) * (log_p - log_q), 0.0)
    return np.maximum(terms.sum(axis=-1), 0.0)


def entropy(log_p: np.ndarray) -> np.ndarray:
    """Shannon entropy in nats; the last axis goes."""
    from scipy.special import entr

    return np.asarray(entr(np.exp(log_p)).sum(axis=-1))


def nucleus(log_p: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of the likeliest tokens that holds `top_p` of the probability, renormalised; -inf elsewhere.

    Tokens of equal probability are taken in the order of their ids. The likeliest is always kept.

    Args:
        log_p: log-probabilities along the last axis.
        top_p: share of probability, above 0; 1 keeps everything.
    """
    if top_p >= 1:
        return log_p
    order = np.argsort(-log_p, axis=-1, kind="stable")
    ranked = np.take_along_axis(log_p, order, axis=-1)
    share = np.exp(ranked)
    before = share.cumsum(axis=-1) - share
    ranked = np.where(before < top_p - _TIE, ranked, -np.inf)
    cut = np.empty_like(log_p)
    np.put_along_axis(cut, order, ranked, axis=-1)
    held = np.exp(cut).sum(axis=-1, keepdims=True)
    return cut - np.log(held)


def top_overlap(log_p: np.ndarray, log_q: np.ndarray, k: int) -> np.ndarray:
    """Share of the k likeliest tokens of one that are among the k likeliest of the other; the last axis goes.

    Args:
        log_p: log-probabilities.
        log_q: the same of the other.
        k: at most as many as there are tokens.
    """
    k = min(k, log_p.shape[-1])
    shared = top_k(log_p, k) & top_k(log_q, k)
    return np.asarray(shared.sum(axis=-1) / k)


def top_k(log_p: np.ndarray, k: int) -> np.ndarray:
    """Which tokens are the k likeliest, of equal ones those with the smaller ids; same axes."""
    least = -np.partition(-log_p, k - 1, axis=-1)[..., k - 1 : k]
    above, level = log_p > least, log_p == least
    room = k - above.sum(axis=-1, keepdims=True)
    return np.asarray(above | (level & (level.cumsum(axis=-1) <= room)))


def compare(
    log_p: np.ndarray, log_q: np.ndarray, ids: Sequence[int], *, top_p: float, top_k: int
) -> dict[str, np.ndarray]:
    """Everything that is said of two models at the tokens of a text, whole and cut to the nuclei.

    The nucleus cut is made in each distribution by itself. It makes JS larger as a rule: nuclei without a common token
    have ln 2, however alike the two are in the rest. KL(q‖p) of the nuclei is infinite as soon as q's holds a token
    that p's does not; it is NaN then, and so is the log-probability difference of a token outside one of the two.

    Args:
        log_p: the base's log-probabilities; axes token, vocab.
        log_q: the model's.
        ids: the token that was written after each row.
        top_p: of the nuclei.
        top_k: how many of the likeliest are compared.

    Returns:
        One array over tokens for each of: js, kl_model_base (q‖p), kl_base_model (p‖q), delta_logprob (log q - log p of
        the token written), entropy_model, entropy_base, top_overlap (with the cut: tokens in both nuclei by tokens in
        either), each also with `_cut`; and argmax_changed, which is the same with the cut.
    """
    parts = []
    for start in range(0, len(ids), _ROWS):
        here = slice(start, start + _ROWS)
        parts.append(_compare(log_p[here], log_q[here], np.asarray(ids[here]), top_p, top_k))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compare(log_p: np.ndarray, log_q: np.ndarray, ids: np.ndarray, top_p: float, k: int) -> dict[str, np.ndarray]:
    cut_p, cut_q = nucleus(log_p, top_p), nucleus(log_q, top_p)
    in_p, in_q = cut_p > -np.inf, cut_q > -np.inf
    return {
        **_apart(log_p, log_q, ids),
        "top_overlap": top_overlap(log_p, log_q, k),
        **{f"{name}_cut": values for name, values in _apart(cut_p, cut_q, ids).items()},
        "top_overlap_cut": (in_p & in_q).sum(axis=-1) / (in_p | in_q).sum(axis=-1),
        "argmax_changed": (log_p.argmax(axis=-1) != log_q.argmax(axis=-1)).astype(np.int64),
    }


def _apart(log_p: np.ndarray, log_q: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    rows = np.arange(len(ids))
    with np.errstate(invalid="ignore"):
        delta = log_q[rows, ids] - log_p[rows, ids]
    found = {
        "js": jensen_shannon(log_p, log_q),
        "kl_model_base": kullback_leibler(log_q, log_p),
        "kl_base_model": kullback_leibler(log_p, log_q),
        "delta_logprob": delta,
        "entropy_model": entropy(log_q),
        "entropy_base": entropy(log_p),
    }
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}


def unspecific(log_p: np.ndarray, seed: int, scales: Sequence[float] = SCALES) -> tuple[np.ndarray, np.ndarray]:
    """What changing every logit by independent Gaussian noise would do to each row: a shift that aims at nothing.

    Args:
        log_p: log-probabilities; axes token, vocab.
        seed: of the noise, which is drawn for each row and then scaled.
        scales: its standard deviations in nats.

    Returns:
        JS in nats between a row and the noisy one, and 1 where its likeliest token changes; axes scale, token.
    """
    rng = np.random.default_rng(seed)
    js, changed = np.zeros((len(scales), len(log_p))), np.zeros((len(scales), len(log_p)))
    for start in range(0, len(log_p), _ROWS):
        here = log_p[start : start + _ROWS].astype(np.float32)
        noise = rng.standard_normal(here.shape, dtype=np.float32)
        for i, scale in enumerate(scales):
            noisy = here + np.float32(scale) * noise
            noisy -= noisy.max(axis=-1, keepdims=True)
            noisy -= np.log(np.exp(noisy).sum(axis=-1, keepdims=True))
            js[i, start : start + _ROWS] = jensen_shannon(here, noisy)
            changed[i, start : start + _ROWS] = here.argmax(axis=-1) != noisy.argmax(axis=-1)
    return js, changed


def matched(js: np.ndarray, changed: np.ndarray, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Unspecific noise of such a strength that its mean JS is the given one.

    Between two scales both are mixed, so that the mean is met exactly; below the smallest, JS goes with the square of
    the scale. A mean above that of the largest scale is not reached.

    Args:
        js: of noise, in ascending order of its scale; axes scale, token.
        changed: 1 where it changes the likeliest token; axes scale, token.
        mean: what the mean JS over all tokens is to be.

    Returns:
        JS and share of changes of each token; axis token.
    """
    js = np.concatenate([np.zeros_like(js[:1]), js])
    changed = np.concatenate([np.zeros_like(changed[:1]), changed])
    means = np.maximum.accumulate(js.mean(axis=1))
    above = int(np.clip(np.searchsorted(means, mean), 1, len(means) - 1))
    low, high = means[above - 1], means[above]
    weight = float(np.clip((mean - low) / (high - low), 0, 1)) if high > low else 0.0
    share = np.sqrt(weight) if above == 1 else weight  # how often the first changes: with the scale, not its square
    return (1 - weight) * js[above - 1] + weight * js[above], (1 - share) * changed[above - 1] + share * changed[above]
