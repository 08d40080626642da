"""The high-entropy minority of a corpus' tokens, and which tokens it is made of (arXiv 2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probekit.stats import Estimate, ratio

from .drawn import jackknife

_SHUFFLES = 200


def n_of(share: float, n: int) -> int:
    """How many of `n` a share of them is, rounded up; at least one."""
    return max(1, int(np.ceil(share * n - 1e-9)))


def high_entropy(values: np.ndarray, share: float) -> np.ndarray:
    """Which tokens are among the `share` of all with the largest values: exactly ceil(share * n) of them.

    One cut for the whole corpus, not one per text. Of tokens that tie at the cut, the earlier ones are in.

    Args:
        values: one per token of the corpus.
        share: above 0, up to 1.
    """
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[: n_of(share, len(values))]] = True
    return chosen


def cuts(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The smallest value among the top ones, for each share of them; falls from the largest to the smallest value."""
    ranked = np.sort(values)[::-1]
    return ranked[[n_of(float(s), len(values)) - 1 for s in shares]]


def carried(values: np.ndarray, share: float) -> float:
    """Share of the sum that the top `share` of the values carry; NaN if all are 0."""
    total = float(values.sum())
    return float(np.sort(values)[::-1][: n_of(share, len(values))].sum()) / total if total > 0 else float("nan")


@dataclass(frozen=True)
class Types:
    """Mean values per token type, of the types that occur often enough.

    Args:
        ids: token ids, ascending.
        n: how often each occurs.
        mean: mean value at its occurrences.
        low: lower end of the 95 % interval, from the spread between units.
        high: upper end.
        null_low: 2.5 % quantile of the mean with values shuffled over all tokens of the corpus.
        null_high: 97.5 % quantile of the same.
        explained: share of the variance over occurrences of these types that lies between types (eta squared), with a
            jackknife interval over units.
        explained_null: its mean after shuffling.
    """

    ids: np.ndarray
    n: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    explained: Estimate
    explained_null: float


def token_types(
    ids: np.ndarray, values: np.ndarray, unit: np.ndarray, *, least: int, n_unit: str, seed: int = 0
) -> Types | None:
    """What kinds of tokens have high and low values; None if no two types occur often enough.

    Args:
        ids: token id of each token.
        values: one per token.
        unit: the answer or prompt that each token belongs to, 0 to the number of them.
        least: a type counts from so many occurrences on, in two units at least.
        n_unit: what the units are, in the plural.
        seed: of the shuffles.
    """
    known, place, n = np.unique(ids, return_inverse=True, return_counts=True)
    spread = np.unique(np.stack([place, unit]), axis=1)[0]
    chosen = np.flatnonzero((n >= least) & (np.bincount(spread, minlength=len(known)) >= 2))
    if len(chosen) < 2:
        return None
    rank = np.full(len(known), -1)
    rank[chosen] = np.arange(len(chosen))
    kind = rank[place]  # -1 for tokens of other types
    here = kind >= 0
    n_units = int(unit.max()) + 1
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(values) for _ in range(_SHUFFLES)]
    means = np.stack([np.bincount(kind[here], v[here]) / n[chosen] for v in shuffled])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    by_type = [_mean(unit[kind == k], values[kind == k], n_units, n_unit) for k in range(len(chosen))]
    ends = np.array([e.ci95 for e in by_type], dtype=float)
    explained = jackknife(
        lambda kept: between(kind[here & kept[unit]], values[here & kept[unit]]), n_units, n_unit
    ).within(0, 1)
    return Types(
        known[chosen],
        n[chosen],
        np.array([e.value for e in by_type]),
        np.maximum(ends[:, 0], 0),
        ends[:, 1],
        low,
        high,
        explained,
        float(np.mean([between(kind[here], v[here]) for v in shuffled])),
    )


def between(kind: np.ndarray, values: np.ndarray) -> float:
    """Eta squared: share of the variance of values that lies between kinds; NaN where values do not vary."""
    n = np.bincount(kind)
    sums = np.bincount(kind, values)
    total = float(((values - values.mean()) ** 2).sum())
    within = float((values**2).sum() - (sums[n > 0] ** 2 / n[n > 0]).sum())
    return 1 - within / total if total > 1e-12 * float((values**2).sum()) else float("nan")


def _mean(unit: np.ndarray, values: np.ndarray, n_units: int, n_unit: str) -> Estimate:
    return ratio(np.bincount(unit, values, n_units), np.bincount(unit, minlength=n_units), n_unit)
