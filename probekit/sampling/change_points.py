"""Where counts along a text change: exact Bayesian segmentation of multinomial counts.

Positions between two changes share one distribution, drawn from a uniform Dirichlet; given their number, all places of
the changes are equally likely. The evidence for every number of changes and the posterior of every place follow by
dynamic programming over segments, without sampling (Fearnhead 2006, Exact and efficient Bayesian inference for multiple
changepoint problems). The paper on forking paths uses BEAST on the drift, and reports a change where the odds of at
least one against none exceed 9; the same rule holds here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST = 6  # changes at most
SHORTEST = 1  # positions of a segment at least
STRONG = 9.0  # odds that count as evidence


@dataclass(frozen=True)
class Changes:
    """What counts along a text say of changes.

    Args:
        log_evidence: log marginal likelihood of 0, 1, 2, … changes; axis number.
        posterior: probability that a change lies just before each position, given at least one; axis position.
    """

    log_evidence: np.ndarray
    posterior: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """Posterior of the number of changes under a uniform prior; axis number."""
        p = np.exp(self.log_evidence - self.log_evidence.max())
        return p / p.sum()

    @property
    def odds(self) -> float:
        """Odds of at least one change against none, each number of changes equally likely beforehand; at most e^700."""
        if len(self.log_evidence) < 2:
            return 0.0
        return float(np.exp(min(np.logaddexp.reduce(self.log_evidence[1:]) - self.log_evidence[0], 700.0)))

    @property
    def best(self) -> int:
        """The likeliest place of a change; -1 where there is room for none."""
        return int(self.posterior.argmax()) if self.posterior.any() else -1


def find_changes(counts: np.ndarray, most: int = MOST, shortest: int = SHORTEST) -> Changes:
    """Evidence for changes in multinomial counts, and where they lie.

    Args:
        counts: draws per category; axes position, category. They need not be whole numbers.
        most: changes at most.
        shortest: positions of a segment at least.

    Returns:
        With fewer positions than two segments need, evidence for no change alone.
    """
    n = len(counts)
    most = max(0, min(most, n // shortest - 1))
    segment = _segments(np.asarray(counts, dtype=float), shortest)
    if n < shortest:
        return Changes(np.zeros(1), np.zeros(n))
    ahead = _forward(segment, most)  # number of changes, end: the first `end` positions
    behind = _forward(segment[::-1, ::-1].T, most)[:, ::-1]  # number of changes, start: the positions from `start` on
    ways = _forward(np.where(np.isfinite(segment), 0.0, -np.inf), most)[:, n]  # log number of segmentations
    evidence = ahead[:, n] - ways
    posterior, weights = np.zeros(n), np.exp(evidence - evidence.max())
    for m in range(1, most + 1):
        both = np.stack([ahead[i] + behind[m - 1 - i] for i in range(m)])  # changes before, place
        here = np.exp(np.logaddexp.reduce(both, axis=0) - ahead[m, n])
        posterior += weights[m] * here[:n]
    total = weights[1:].sum()
    return Changes(evidence, posterior / total if total > 0 else posterior)


def _segments(counts: np.ndarray, shortest: int) -> np.ndarray:
    """Log marginal likelihood of positions [start, end) sharing one distribution; -inf where too short."""
    from scipy.special import gammaln

    n, k = counts.shape
    sums = np.concatenate([np.zeros((1, k)), counts.cumsum(axis=0)])
    found = np.full((n + 1, n + 1), -np.inf)
    for start in range(n):
        ends = np.arange(start + shortest, n + 1)
        inside = sums[ends] - sums[start]
        found[start, ends] = gammaln(1 + inside).sum(axis=1) + gammaln(k) - gammaln(k + inside.sum(axis=1))
    return found


def _forward(segment: np.ndarray, most: int) -> np.ndarray:
    """Log of the sum over all segmentations with so many changes of the first positions; axes number, end."""
    n = len(segment) - 1
    found = np.full((most + 1, n + 1), -np.inf)
    found[0] = segment[0]
    for m in range(1, most + 1):
        found[m] = np.logaddexp.reduce(found[m - 1][:, None] + segment, axis=0)
    return found
