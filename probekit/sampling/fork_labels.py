"""Which of some sampled positions fork, how often that is chance, and how well a number tells them from the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probekit.stats import Estimate, ratio

from .drawn import jackknife
from .forks import OTHER, Alternative, ForkMap, Position, distance
from .minority import n_of

_DEALS = 200
_Z = 1.959963984540054
_CLOSE = 1e-12  # distances that equal epsilon but for rounding


def stratified(
    values: np.ndarray, inside: np.ndarray, eligible: np.ndarray, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A sample of places, spread over what is high and low, with weights that undo the spreading.

    Strata: the eligible places inside and outside the minority, each cut into a lower and an upper half by value. Each
    stratum gives the same number of places, drawn without replacement, or all it has; what it lacks, the others give. A
    place stands for as many of its stratum as were not drawn: its weight is the stratum's size divided by the number
    drawn from it (the inverse of its probability of being drawn), so weights sum to the number of eligible places.

    Args:
        values: one per token of the corpus.
        inside: which are in the minority.
        eligible: which may be drawn.
        n: places wanted.
        seed: of the draws.

    Returns:
        Places, ascending, and their weights.
    """
    strata = []
    for side in (inside, ~inside):
        members = np.flatnonzero(eligible & side)
        members = members[np.argsort(values[members], kind="stable")]
        strata += [s for s in np.array_split(members, 2) if len(s)]
    take = _evenly([len(s) for s in strata], n)
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(s, k, replace=False) for s, k in zip(strata, take, strict=True)]
    weights = [np.full(k, len(s) / k) for s, k in zip(strata, take, strict=True) if k]
    if not weights:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    places = np.concatenate(drawn)
    order = np.argsort(places)
    return places[order], np.concatenate(weights)[order]


def _evenly(sizes: list[int], n: int) -> list[int]:
    """How many each stratum gives: equal numbers, as far as they reach."""
    take = [0] * len(sizes)
    left = min(n, sum(sizes))
    while left:
        open_ = [i for i, size in enumerate(sizes) if take[i] < size]
        for i in open_:
            more = min(max(1, left // len(open_)), sizes[i] - take[i], left)
            take[i] += more
            left -= more
    return take


@dataclass(frozen=True)
class ForkLabel:
    """Whether another token at one position leads elsewhere than the answer's own.

    Args:
        distances: L2 distance of each alternative's outcomes from those of the own token, which comes first (0).
        fork: whether one of them is epsilon or more.
        dealt: how often that would be if all tokens led to the same: the share of 200 random deals of all the
            position's continuations to its tokens, each getting as many as it had.
        halved: whether one alternative's own continuations of even and odd number lie that far apart; None if no
            alternative has four. Halves hold half as many, so this happens more often than a false fork.
    """

    distances: np.ndarray
    fork: bool
    dealt: float
    halved: bool | None


def fork_label(forks: ForkMap, position: Position, epsilon: float, seed: int = 0) -> ForkLabel:
    """The label of one position of an answer.

    Args:
        forks: all sampled positions of the answer; its categories are those that count.
        position: one of them, with two tokens or more.
        epsilon: distance from which an alternative forks.
        seed: of the deals.
    """
    shares = forks.branch(position)
    distances = np.array([distance(shares[0], row, "l2") for row in shares])
    names = [c for c in forks.categories if c != OTHER]
    coded = [_coded(a, names) for a in position.alternatives]
    pooled, sizes = np.concatenate(coded), [len(c) for c in coded]
    deals = np.random.default_rng(seed).permuted(np.tile(pooled, (_DEALS, 1)), axis=1)
    parts = [_shares(part, len(names)) for part in np.split(deals, np.cumsum(sizes)[:-1], axis=1)]
    far = np.max([np.sqrt(((p - parts[0]) ** 2).sum(axis=1)) for p in parts[1:]], axis=0)
    halves = [(_shares(c[None, ::2], len(names)), _shares(c[None, 1::2], len(names))) for c in coded[1:] if len(c) >= 4]
    apart = [float(np.sqrt(((a - b) ** 2).sum())) >= epsilon - _CLOSE for a, b in halves]
    return ForkLabel(
        distances,
        bool((distances[1:] >= epsilon - _CLOSE).any()),
        float((far >= epsilon - _CLOSE).mean()),
        any(apart) if apart else None,
    )


def _coded(alternative: Alternative, names: list[str]) -> np.ndarray:
    """Outcomes as places in `names`, everything else after them."""
    place = {name: i for i, name in enumerate(names)}
    return np.array([place.get(o, len(names)) if o is not None else len(names) for o in alternative.outcomes])


def _shares(coded: np.ndarray, n: int) -> np.ndarray:
    """Share of each category in each row; axes row, category."""
    return np.stack([(coded == k).mean(axis=1) for k in range(n + 1)], axis=1)


def auroc(values: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """Probability that a positive place has the larger value than another, ties half; NaN without both kinds.

    Args:
        values: one per place.
        positive: which are positive.
        weights: how many places each stands for.
    """
    if not (positive.any() and (~positive).any()):
        return float("nan")
    above = np.sign(values[positive][:, None] - values[~positive][None]) / 2 + 0.5
    pairs = weights[positive][:, None] * weights[~positive][None]
    return float((above * pairs).sum() / pairs.sum())


def effective(weights: np.ndarray) -> float:
    """How many equally weighted places tell as much: (sum of weights)² / sum of squares; 0 for none."""
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.size else 0.0


def auroc_estimate(
    values: np.ndarray, positive: np.ndarray, weights: np.ndarray, unit: np.ndarray, n_unit: str
) -> Estimate:
    """`auroc` with a 95 % interval; NaN, and the interval 0 to 1, without both kinds.

    The interval is the wider at each end of a jackknife over units, which knows that places of one unit are alike, and
    Newcombe's (2006, method 5) for the effective numbers of both kinds, which does not shrink to a point where the two
    kinds happen to be told apart without error.
    """
    _, place = np.unique(unit, return_inverse=True)
    n = int(place.max()) + 1 if len(place) else 0
    value = auroc(values, positive, weights)
    if not np.isfinite(value):
        return Estimate(value, (0.0, 1.0), n, n_unit)
    spread = jackknife(lambda k: auroc(values[k[place]], positive[k[place]], weights[k[place]]), n, n_unit)
    ends = newcombe(value, effective(weights[positive]), effective(weights[~positive]))
    return _wider(spread, ends)


def newcombe(value: float, n_positive: float, n_negative: float) -> tuple[float, float]:
    """95 % interval of an AUROC: the values whose own standard error (Hanley-McNeil, sizes averaged) reaches it."""
    grid = np.linspace(0, 1, 2001)
    mean = (n_positive + n_negative) / 2 - 1
    spread = 1 + mean * (1 - grid) / (2 - grid) + mean * grid / (1 + grid)
    error = np.sqrt(np.maximum(grid * (1 - grid) * spread, 0) / (n_positive * n_negative))
    inside = grid[np.abs(grid - value) <= _Z * error + 1e-9]
    return min(value, float(inside.min(initial=value))), max(value, float(inside.max(initial=value)))


def share_estimate(hits: np.ndarray, weights: np.ndarray, unit: np.ndarray, n_unit: str) -> Estimate:
    """Weighted share of places that are hits; the wider of the interval between units and Wilson's for the effective n.

    NaN, and the interval 0 to 1, without places.
    """
    _, place = np.unique(unit, return_inverse=True)
    if not len(place) or not weights.sum():
        return Estimate(float("nan"), (0.0, 1.0), 0, n_unit)
    spread = ratio(np.bincount(place, weights * hits), np.bincount(place, weights), n_unit)
    n, p = effective(weights), spread.value
    middle, half = p + _Z**2 / (2 * n), _Z * float(np.sqrt(max(p * (1 - p), 0) / n + _Z**2 / (4 * n * n)))
    scale = 1 + _Z**2 / n
    return _wider(spread, (min((middle - half) / scale, p), max((middle + half) / scale, p)))


def _wider(spread: Estimate, ends: tuple[float, float]) -> Estimate:
    if spread.ci95 is None:
        return spread
    low, high = min(spread.ci95[0], ends[0]), max(spread.ci95[1], ends[1])
    return Estimate(spread.value, (low, high), spread.n, spread.n_unit).within(0, 1)


@dataclass(frozen=True)
class Rule:
    """How the rule "the tokens with the highest entropy fork" does, for growing shares of tokens; axis share.

    Args:
        recall: share of forks that it names; NaN without forks.
        chance: share of the eligible places that it names, which is the recall of a rule that knows only these.
        precision: share of the eligible places that it names that fork; NaN where no sampled one is named.
    """

    recall: np.ndarray
    chance: np.ndarray
    precision: np.ndarray


def rule(
    values: np.ndarray,
    eligible: np.ndarray,
    places: np.ndarray,
    fork: np.ndarray,
    weights: np.ndarray,
    shares: np.ndarray,
) -> Rule:
    """The rule's recall and precision from a weighted sample, and its chance level, which is exact.

    Args:
        values: one per token of the corpus.
        eligible: which tokens may fork at all.
        places: those that were sampled.
        fork: which of these fork.
        weights: how many eligible places each stands for.
        shares: of all tokens that the rule names.
    """
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
    rows = []
    for share in shares:
        named = rank < n_of(float(share), len(values))
        hit, forks = named[places], weights * fork
        rows.append(
            (
                forks[hit].sum() / forks.sum() if forks.sum() else np.nan,
                named[eligible].mean() if eligible.any() else np.nan,
                forks[hit].sum() / weights[hit].sum() if hit.any() else np.nan,
            )
        )
    return Rule(*np.array(rows).T)
