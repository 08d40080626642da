"""Sticky tokens of text-embedding models: what inserting a token does to the similarity of two sentences.

The procedure is that of the code released with arXiv 2507.18171 (StickyToken). It asks whether a token pulls sentences
of low similarity together; the definition in words, that the similarity comes near a fixed value from both sides, is
measured beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PLACES = ("prefix", "suffix", "random")
SCORE_WEIGHTS = np.array([0.35, 0.35, 0.30])  # of the places, in the score
HIT_WEIGHTS = np.array([4, 4, 3]) / 11  # in the validation
_BELOW = 0.8  # pairs are taken from the lower part of the range up to the mean similarity


def mean_similarity(unit_rows: np.ndarray) -> float:
    """u, the mean cosine over all pairs of embeddings, each with itself included.

    The mean over V x V cosines is the squared norm of the mean embedding.

    Args:
        unit_rows: embeddings of unit length; axes token, d_model.
    """
    mean = unit_rows.astype(np.float64).mean(axis=0)
    return float(mean @ mean)


def even_pairs(similarity: np.ndarray, u: float, n: int, *, above: bool = False) -> np.ndarray:
    """Pairs on an even grid of similarities below u: from the least, m, to m + 0.8 (u - m).

    For each of n values the pair that lies nearest, so that a pair may be taken twice.

    Args:
        similarity: cosine of each pair.
        u: mean similarity of the vocabulary.
        n: pairs to take.
        above: take them above u instead, from the largest down by as much of the range.

    Returns:
        Places in `similarity`; none if no pair lies on that side.
    """
    side = np.flatnonzero(similarity > u if above else similarity < u)
    if not side.size:
        return side
    n = min(n, side.size)  # as released: no more targets than there are pairs
    end = similarity[side].max() if above else similarity[side].min()
    targets = np.linspace(end, end + _BELOW * (u - end), n)
    return side[np.abs(similarity[side][None] - targets[:, None]).argmin(axis=1)]


@dataclass(frozen=True)
class Insertions:
    """A sentence with a token's text put in, several times over.

    Args:
        counts: how many copies, ascending.
        seed: of the random places; each token and sentence has its own draws.
    """

    counts: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    seed: int = 0

    @property
    def last(self) -> Insertions:
        """The largest count alone."""
        return Insertions(self.counts[-1:], self.seed)

    def of(self, token: str, sentence: str) -> list[str]:
        """The sentence with the token in front, behind, and at random places between words; axes place, count.

        Copies in front and behind are put there directly, without a space (the released code does so, and the token may
        merge with its neighbour: see the survival rate). At random places, one more copy each time, kept apart by
        spaces; the sentence is split at white space anew before each. (The released code does not fix these places;
        here they depend on seed, token and sentence alone.)

        Returns:
            Places one after another, of each the counts.
        """
        front = [token * n + sentence for n in self.counts]
        behind = [sentence + token * n for n in self.counts]
        digest = hashlib.sha256(f"{self.seed} {token!r} {sentence!r}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        text, scattered, have = sentence, [], 0
        for n in self.counts:
            for _ in range(n - have):
                words = text.split()
                words.insert(int(rng.integers(0, len(words) + 1)), token)
                text = " ".join(words)
            have = n
            scattered.append(text)
        return [*front, *behind, *scattered]


def sticky_score(distance: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(F + 0.1 f + 0.1 delta) / (R + 0.05 r + 0.01) of one pair and place.

    With the changes of the cosine distance from one count to the next: F the sum of the falls, f their number, R the
    sum of the rises, r their number; delta the distance between the first sentence and the token alone. A run that only
    falls scores 80 to 100, so that the score tells how steadily it falls rather than how far.

    Args:
        distance: cosine distance of the pair without and with 1, 2, … copies; the last axis is the count.
        own: delta; without that axis.
    """
    change = np.diff(distance, axis=-1)
    falls, rises = np.minimum(change, 0), np.maximum(change, 0)
    top = -falls.sum(-1) + 0.1 * (change < 0).sum(-1) + 0.1 * own
    return top / (rises.sum(-1) + 0.05 * (change > 0).sum(-1) + 0.01)


def token_score(distance: np.ndarray, own: np.ndarray) -> float:
    """Score of one token: mean over pairs, weighed over places.

    Args:
        distance: axes pair, place, count (0 copies first).
        own: axis pair.
    """
    return float(sticky_score(distance, own[:, None]).mean(axis=0) @ SCORE_WEIGHTS)


def hits(distance: np.ndarray) -> np.ndarray:
    """Whether copies bring a pair nearer on average than none does; axes pair, place."""
    return distance[..., 1:].mean(axis=-1) < distance[..., 0]


def hit_share(distance: np.ndarray) -> float:
    """p: share of pairs that come nearer, weighed over places."""
    return float(hits(distance).mean(axis=0) @ HIT_WEIGHTS)


def outlier_cut(p: Sequence[float] | np.ndarray) -> float:
    """Q3 + 0.7 (Q3 - Q1) of one model's candidates, above which a token is called sticky in the published lists."""
    low, high = np.quantile(np.asarray(p, dtype=float), [0.25, 0.75])
    return float(high + 0.7 * (high - low))


def two_sided(with_token: np.ndarray, without: np.ndarray, u: float) -> tuple[float, float]:
    """How near the similarity comes to u from both sides: mean |cos_n - u| / mean |cos_0 - u|, and that of variances.

    Both far below 1: sticky by the definition in words. 1: nothing happens.

    Args:
        with_token: cosines with copies of the token, of pairs on both sides of u; any shape.
        without: cosines of the same pairs without it, broadcastable.
        u: mean similarity of the vocabulary.
    """
    start = np.broadcast_to(without, with_token.shape)
    spread = float(np.var(start))
    return (
        float(np.abs(with_token - u).mean() / np.abs(start - u).mean()),
        float(np.var(with_token) / spread) if spread > 0 else float("nan"),
    )


def beyond_random(p: np.ndarray, random: np.ndarray, n_pairs: int, level: float = 0.05) -> np.ndarray:
    """Whether each p lies where random tokens are not expected, all together at the given level.

    The log-odds of p, half a pair added on both sides, above the upper prediction limit for one more random token:
    mean + t(1 - level / n, m - 1) sd sqrt(1 + 1/m) of the m random tokens, for n tokens that are asked about.

    Args:
        p: of the tokens asked about.
        random: of random tokens, validated on the same pairs; at least two.
        n_pairs: pairs that each p is a share of.
        level: probability with which at least one of n random tokens would be called.
    """
    from scipy.stats import t

    m = len(random)
    if m < 2 or not len(p):
        return np.zeros(len(p), dtype=bool)
    odds, null = _log_odds(p, n_pairs), _log_odds(random, n_pairs)
    reach = float(t.ppf(1 - level / len(p), m - 1)) * null.std(ddof=1) * np.sqrt(1 + 1 / m)
    return np.asarray(odds > null.mean() + max(reach, 1e-9))


def _log_odds(p: np.ndarray, n: int) -> np.ndarray:
    share = (np.asarray(p, dtype=float) * n + 0.5) / (n + 1)
    return np.asarray(np.log(share / (1 - share)))
