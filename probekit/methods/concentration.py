"""How unevenly a quantity is spread over tokens: who carries it, and where along a text it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from probekit.stats import MIN_TEXTS, ratio

HUNDREDTHS = 100
Z95 = 1.959963984540054
_DRAWS = 500


def carried(values: np.ndarray) -> np.ndarray:
    """Share of the total that the largest values carry: the largest 1 %, 2 %, … 100 % of them; axis of 100.

    With fewer than a hundred values, or a number that a hundred does not divide, between two values the share grows
    evenly. Where all values are 0, nothing is carried; the curve is then that of an even spread.

    Args:
        values: not negative.
    """
    total, n = values.sum(), len(values)
    shares = np.arange(1, HUNDREDTHS + 1) / HUNDREDTHS
    if not total > 0:
        return shares
    up_to = np.concatenate([[0.0], np.sort(values)[::-1].cumsum() / total])
    return np.interp(shares * n, np.arange(n + 1), up_to)


@dataclass(frozen=True)
class Units:
    """What is resampled: prompts, or answers where there are fewer than five prompts.

    Answers to the same prompt are independent draws given the prompt: an interval over answers speaks of these prompts,
    one over prompts of prompts like them.

    Args:
        of: unit of each token.
        names: what they are, in the plural.
    """

    of: np.ndarray
    names: str

    @classmethod
    def choose(cls, prompts: np.ndarray, answers: np.ndarray) -> Units:
        """The units of tokens.

        Args:
            prompts: the prompt of each token.
            answers: the answer of each token, numbered over all prompts.
        """
        many = len(np.unique(prompts)) >= MIN_TEXTS
        of = np.unique(prompts if many else answers, return_inverse=True)[1]
        return cls(of, "prompts" if many else "answers")

    @property
    def n(self) -> int:
        """How many there are."""
        return int(self.of.max()) + 1

    def interval(
        self, statistic: Callable[[np.ndarray], np.ndarray], *, low: float = -np.inf, high: float = np.inf
    ) -> np.ndarray | None:
        """95 % interval of a statistic by resampling units whole (percentile bootstrap, 500 draws, seed 0).

        Its ends are moved away from the statistic of all tokens by the factor t sqrt(n / (n - 1)) / 1.96, t the 97.5 %
        quantile of Student's t on n - 1 degrees of freedom: resampling few units shows too little spread. It holds that
        statistic in any case, which a bootstrap of an unevenness can miss, since samples with repeats are more uneven.

        Args:
            statistic: of some tokens, given by their places; NaN entries are left out.
            low: the least value that is possible.
            high: the largest.

        Returns:
            Lower and upper ends, axis 0; None with fewer than two units. NaN where the statistic never is a number.
        """
        from scipy.stats import t

        if self.n < 2:
            return None
        members = [np.flatnonzero(self.of == u) for u in range(self.n)]
        rng = np.random.default_rng(0)
        draws = [
            statistic(np.concatenate([members[u] for u in rng.integers(0, self.n, self.n)])) for _ in range(_DRAWS)
        ]
        value = np.asarray(statistic(np.arange(len(self.of))), dtype=float)
        here, values = value.ravel(), np.array(draws, dtype=float).reshape(_DRAWS, value.size)
        ends, known = np.full((2, value.size), np.nan), np.isfinite(values).any(axis=0)
        ends[:, known] = np.nanquantile(values[:, known], [0.025, 0.975], axis=0)
        ends = here + (ends - here) * float(t.ppf(0.975, self.n - 1)) / Z95 * np.sqrt(self.n / (self.n - 1))
        held = np.stack([np.fmin(ends[0], here), np.fmax(ends[1], here)])
        return np.clip(held, low, high).reshape(2, *value.shape)


def tenths(place: np.ndarray) -> np.ndarray:
    """In which tenth each of some places between 0 and 1 lies, 0 to 9."""
    return np.clip((place * 10).astype(np.int64), 0, 9)


def ranked(values: np.ndarray) -> np.ndarray:
    """The place of each value among all, between 0 and 1; equal values share the mean of their places."""
    from scipy.stats import rankdata

    return np.asarray((rankdata(values) - 0.5) / len(values))


def by_tenth(values: np.ndarray, tenth: np.ndarray, units: Units) -> np.ndarray:
    """Mean over the tokens of each tenth with its 95 % interval from the spread between units.

    Args:
        values: one per token, not negative.
        tenth: of each token.
        units: what the interval is over.

    Returns:
        Axes (mean, lower end, upper end), tenth; NaN for a tenth without tokens, and ends from a single unit.
    """
    found = np.full((3, 10), np.nan)
    for i in range(10):
        here = tenth == i
        sums = np.bincount(units.of, values * here, units.n)
        one = ratio(sums, np.bincount(units.of, here.astype(float), units.n), units.names)
        found[0, i] = one.value
        if one.ci95 is not None:
            found[1:, i] = max(one.ci95[0], 0.0), one.ci95[1]
    return found
