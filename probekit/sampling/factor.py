"""The branching factor of sampled answers, from the entropies and log-probabilities of their cut distributions.

Definitions of arXiv 2506.17871 as its released code has them; positions are counted from the answer's first token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probekit.stats import Estimate, ratio

from .drawn import jackknife

LIMIT = 50  # tokens up to which entropies are averaged; beyond, the likelihood is
LEAST_ALIVE = 3  # positions with so few answers, or fewer, do not count
_QUANTILE = 0.95  # of the answers' lengths, at which positions end


@dataclass(frozen=True)
class SampledAnswers:
    """Sampled answers to one prompt, token by token.

    Args:
        entropy: of the cut distribution that each token was drawn from; axes sample, position; NaN past an answer's end.
        logprob: of each token in it; the same axes.
        positions: how many of them count; by the rule of `n` if 0.
    """

    entropy: np.ndarray
    logprob: np.ndarray
    positions: int = 0

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer."""
        return np.asarray(np.isfinite(self.entropy).sum(axis=1))

    @cached_property
    def alive(self) -> np.ndarray:
        """Answers that have a token at each position; axis position."""
        return np.asarray(np.isfinite(self.entropy).sum(axis=0))

    @cached_property
    def n(self) -> int:
        """Positions that count: up to the .95-quantile of lengths, and while more than three answers are alive."""
        if self.positions:
            return self.positions
        longest = int(np.quantile(self.lengths, _QUANTILE))
        return int((self.alive[:longest] > LEAST_ALIVE).sum())

    @cached_property
    def step_nats(self) -> np.ndarray:
        """Mean entropy at each position over the answers alive there."""
        return np.asarray(np.nanmean(self.entropy[:, : self.n], axis=0))

    @cached_property
    def by_entropy(self) -> np.ndarray:
        """Log of the branching factor of the first 1, 2, … positions: the mean of `step_nats` over them."""
        return np.cumsum(self.step_nats) / np.arange(1, self.n + 1)

    @cached_property
    def by_likelihood(self) -> np.ndarray:
        """The same by likelihood: -(1/t) of the log-probability of the first t tokens, mean over answers alive at t."""
        return -np.nanmean(np.cumsum(self.logprob[:, : self.n], axis=1), axis=0) / np.arange(1, self.n + 1)

    @cached_property
    def log_factor(self) -> np.ndarray:
        """Log of the branching factor of the first 1, 2, … positions: by entropy up to 50 of them, then by likelihood."""
        return np.where(np.arange(1, self.n + 1) <= LIMIT, self.by_entropy, self.by_likelihood)

    @property
    def gap_nats(self) -> float:
        """By likelihood minus by entropy, over all positions that count."""
        return float(self.by_likelihood[-1] - self.by_entropy[-1])

    @property
    def perplexity(self) -> float:
        """Mean over answers of exp(the answer's own mean entropy), each over its whole length.

        (The released code cuts every answer to the shortest of those before it.)
        """
        return float(np.exp(np.nanmean(self.entropy, axis=1)).mean())

    @property
    def log_product_nats(self) -> float:
        """Log of the product over positions of mean exp(entropy): an upper companion of the sum of `step_nats`."""
        return float(np.log(np.nanmean(np.exp(self.entropy[:, : self.n]), axis=0)).sum())

    def some(self, kept: np.ndarray) -> SampledAnswers:
        """Some of the answers, over the same positions."""
        return SampledAnswers(self.entropy[kept], self.logprob[kept], self.n)

    def factor(self) -> Estimate:
        """The branching factor, with an interval over answers: a jackknife of its log."""
        log = jackknife(lambda kept: float(self.some(kept).log_factor[-1]), len(self.entropy), "answers")
        assert log.ci95 is not None
        low, high = np.exp(log.ci95)
        return Estimate(float(np.exp(log.value)), (float(low), float(high)), log.n, log.n_unit)

    def gap(self) -> Estimate:
        """`gap_nats`, with a jackknife interval over answers."""
        return jackknife(lambda kept: self.some(kept).gap_nats, len(self.entropy), "answers")

    def slope(self) -> Estimate:
        """How entropy changes along an answer, in nats per 100 tokens, by least squares with a level for each answer.

        Answers with other levels that end at other places do not pass for a trend, as they do in `slope_alive`. With
        positions shuffled within each answer it is 0 on average. NaN if no answer has two positions.
        """
        entropy = self.entropy[:, : self.n]
        place = np.where(np.isfinite(entropy), np.arange(1, self.n + 1, dtype=float), np.nan)
        off = place - np.nanmean(place, axis=1, keepdims=True)
        found = ratio(np.nansum(off * entropy, axis=1), np.nansum(off**2, axis=1), "answers")
        ends = None if found.ci95 is None else (100 * found.ci95[0], 100 * found.ci95[1])
        return Estimate(100 * found.value, ends, found.n, found.n_unit)

    def slope_alive(self) -> float:
        """The slope of `step_nats`, positions weighed by the answers alive there, in nats per 100 tokens; NaN for one."""
        weight, place = self.alive[: self.n].astype(float), np.arange(1, self.n + 1, dtype=float)
        off = place - np.average(place, weights=weight)
        spread = float((weight * off**2).sum())
        return 100 * float((weight * off * self.step_nats).sum()) / spread if spread > 0 else float("nan")
