"""Places that do one thing in one domain of texts and another in another, against labels that mean nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial, prod

import numpy as np

from probekit.core import Batch

_CHUNK = 200  # draws at a time
_TIE = 1e-9  # rounding that does not tell two differences apart


@dataclass(frozen=True)
class Rule:
    """When a place, such as a head, switches between domains.

    Args:
        high: its mean in one domain is above this.
        low: its mean in another domain is below this.
        alpha: family-wise error rate of the difference.
    """

    high: float
    low: float
    alpha: float


@dataclass(frozen=True)
class Switching:
    """Which places switch, and how many would if the domains meant nothing.

    Args:
        means: mean over the texts of each domain, each text alike; axes domain, place.
        spread: largest minus smallest mean of any domain; axis place.
        p: share of permutations of the labels, the given one among them, in which any place's spread is as large.
        switches: which places pass the rule; axis place.
        null_spread: largest spread of any place; axis permutation.
        null_count: places that pass the same rule; axis permutation.
        resampled_count: places that pass it when texts are resampled within domains; axis draw.
    """

    means: np.ndarray
    spread: np.ndarray
    p: np.ndarray
    switches: np.ndarray
    null_spread: np.ndarray
    null_count: np.ndarray
    resampled_count: np.ndarray


def in_own_order(batch: Batch) -> list[int]:
    """The texts in an order that does not depend on the one they were given in, so that draws belong to texts."""
    return sorted(range(len(batch)), key=lambda i: (batch.domains[i], batch.texts[i].ids))


def find_switching(values: np.ndarray, labels: np.ndarray, rule: Rule, *, n_draws: int, seed: int) -> Switching:
    """Compare domains, place by place.

    The labels are permuted over texts; p compares a place's spread with the largest spread of any place, so that the
    chance that any place passes where labels mean nothing is at most `alpha` (Westfall and Young 1993). Exact up to
    the draws if the texts are exchangeable between domains. Resampling keeps the permutations as they were found.

    Args:
        values: axes text, place.
        labels: domain of each text, 0 to the number of domains less one.
        rule: when a place switches.
        n_draws: permutations, and as many resamplings.
        seed: of both.
    """
    rng, domains = np.random.default_rng(seed), np.arange(labels.max() + 1)[:, None]
    own = (labels == domains).astype(float)
    shuffled = rng.permuted(np.tile(labels, (n_draws, 1)), axis=1)
    low, high = _ends((shuffled[:, None] == domains).astype(float), values)
    null = (high - low).max(axis=1)
    means = _means(own[None], values)[0]
    spread = np.ptp(means, axis=0)
    ordered = np.sort(np.append(null, spread.max()))

    def p_of(spreads: np.ndarray) -> np.ndarray:
        return np.asarray(1 - np.searchsorted(ordered, spreads - _TIE) / (n_draws + 1))

    def passing(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.asarray((high > rule.high) & (low < rule.low) & (p_of(high - low) <= rule.alpha + _TIE))

    weights = np.stack([rng.multinomial(int(d.sum()), d / d.sum(), size=n_draws) for d in own], axis=1)
    return Switching(
        means,
        spread,
        p_of(spread),
        passing(means.min(axis=0), means.max(axis=0)),
        null,
        passing(low, high).sum(axis=1),
        passing(*_ends(weights.astype(float), values)).sum(axis=1),
    )


def _means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means of each domain; axes draw, domain, place from draw, domain, text and text, place."""
    return np.asarray((weights / weights.sum(axis=-1, keepdims=True)) @ values)


def _ends(weights: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest mean of any domain; axes draw, place."""
    means = (_means(weights[a : a + _CHUNK], values) for a in range(0, len(weights), _CHUNK))
    low, high = zip(*((m.min(axis=1), m.max(axis=1)) for m in means), strict=True)
    return np.concatenate(low), np.concatenate(high)


def smallest_p(sizes: list[int]) -> float:
    """What p is at least with so many texts per domain: the labellings that part the texts alike, over all of them."""
    alike = prod(factorial(sizes.count(s)) for s in set(sizes))
    return alike * prod(map(factorial, sizes)) / factorial(sum(sizes))
