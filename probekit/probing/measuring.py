"""How well held-out rows are told apart, with intervals that resample prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, rankdata

from .logistic import probabilities, standardised

N_BOOT = 1000
N_BINS = 15
WIDEN = float(np.sqrt(2))
Fold = np.ndarray  # the rows that are tested together


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def ends(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high


def resampled(groups: np.ndarray, seed: int, n: int = N_BOOT) -> np.ndarray:
    """How often each row is drawn when its group is: as many groups are drawn with replacement as there are.

    Returns:
        Axes draw, row; all rows of a group have the same count.
    """
    distinct, member = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=n)
    return counts.astype(np.float64)[:, member]


def auroc(scores: np.ndarray, y: np.ndarray, folds: Sequence[Fold], weights: np.ndarray | None = None) -> np.ndarray:
    """Share of pairs (positive row, negative row) of one fold that are ranked right; ties count half.

    Pairs of different folds were judged by different probes and are not compared. Rows of one class alone in a fold
    take no part. 0.5 where no fold has both classes.

    Args:
        scores: axis row.
        y: whether each row is positive.
        folds: rows of each fold.
        weights: axes draw, row; every row once if None.

    Returns:
        One value for each draw.
    """
    weights = np.ones((1, len(y))) if weights is None else weights
    right, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for rows in folds:
        order = rows[np.argsort(scores[rows], kind="stable")]
        positive = y[order]
        starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
        w = weights[:, order]
        up = np.add.reduceat(w * positive, starts, axis=1)
        down = np.add.reduceat(w * ~positive, starts, axis=1)
        below = np.cumsum(down, axis=1) - down
        right += (up * (below + down / 2)).sum(axis=1)
        pairs += up.sum(axis=1) * down.sum(axis=1)
    return np.divide(right, pairs, out=np.full(len(right), 0.5), where=pairs > 0)


def balanced_accuracy(correct: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over both classes of the share of rows that are right; one value for each draw."""
    weights = np.ones((1, len(y))) if weights is None else weights
    shares = []
    for chosen in (y, ~y):
        total = weights[:, chosen].sum(axis=1)
        hits = (weights[:, chosen] * correct[chosen]).sum(axis=1)
        shares.append(np.divide(hits, total, out=np.full(len(weights), 0.5), where=total > 0))
    return (shares[0] + shares[1]) / 2


def interval(measure: Callable[[np.ndarray | None], np.ndarray], weights: np.ndarray) -> Interval:
    """A held-out value with the interval that resampling groups gives, √2 wider.

    Every label serves in one test fold and in all other folds' training. Where there is nothing to find, the value is
    then a degenerate U-statistic whose variance is twice what resampling fixed held-out scores shows; an interval
    without the factor covers 0.5 in about 83 of 100 cases. Where there is something to find the factor is
    conservative.

    Args:
        measure: the value for each draw of weights, or for none.
        weights: axes draw, row.
    """
    value = float(measure(None)[0])
    low, high = value + WIDEN * (np.quantile(measure(weights), (0.025, 0.975)) - value)
    return Interval(value, min(float(low), value), max(float(high), value))


def share_interval(measure: Callable[[np.ndarray | None], np.ndarray], weights: np.ndarray, units: int) -> Interval:
    """`interval` of a share between 0 and 1, which also holds where hardly anything is wrong, or right.

    Where less than one unit's worth is wrong, draws hardly differ; the interval then reaches at least as far as the
    Clopper-Pearson interval of that share of `units` trials: for none wrong of 24, down to 0.86.

    Args:
        measure: as there.
        weights: as there.
        units: groups that the value rests on.
    """
    found = interval(measure, weights)
    low, high = max(found.low, 0.0), min(found.high, 1.0)
    wrong, right = (1 - found.value) * units, found.value * units
    if wrong < 1 and units:
        low = min(low, float(beta.ppf(0.025, right, wrong + 1)))
    if right < 1 and units:
        high = max(high, float(beta.ppf(0.975, right + 1, wrong)))
    return Interval(found.value, low, high)


def rare_groups(y: np.ndarray, groups: np.ndarray) -> int:
    """Groups with a row of the rarer class."""
    return min(len(np.unique(groups[y])), len(np.unique(groups[~y])))


@dataclass(frozen=True)
class Calibration:
    """How probabilities compare with shares.

    Args:
        ece: expected calibration error: mean over rows of |mean probability − share of positives| in its bin.
        brier: mean squared difference of probability and outcome.
        predicted: mean probability of each bin; NaN for empty ones.
        observed: share of positive rows of each bin; NaN for empty ones.
        count: rows of each bin.
    """

    ece: float
    brier: float
    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


def calibration(scores: np.ndarray, y: np.ndarray, n_bins: int = N_BINS) -> Calibration:
    """Calibration of log-odds: 15 bins of equal width over the probability of the positive class (ECE-15).

    Guo et al. 2017 (arXiv 1706.04599) bin the confidence in the predicted class; for two classes the probability of the
    positive one says the same and shows on which side it errs.

    Args:
        scores: log-odds, axis row.
        y: whether each row is positive.
        n_bins: bins between 0 and 1.
    """
    p = probabilities(scores)[:, 1]
    place = np.minimum((p * n_bins).astype(int), n_bins - 1)
    count = np.bincount(place, minlength=n_bins)
    filled = np.where(count > 0, count, 1)
    predicted = np.bincount(place, p, n_bins) / filled
    observed = np.bincount(place, y, n_bins) / filled
    ece = float((np.abs(predicted - observed) * count).sum() / len(y))
    empty = count == 0
    means = [np.where(empty, np.nan, m) for m in (predicted, observed)]
    return Calibration(ece, float(((p - y) ** 2).mean()), means[0], means[1], count)


def r_squared(predicted: np.ndarray, y: np.ndarray, mean: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """1 − squared error / squared error of the training folds' means, over held-out rows; one value for each draw."""
    weights = np.ones((1, len(y))) if weights is None else weights
    return 1 - (weights @ (predicted - y) ** 2) / (weights @ (mean - y) ** 2)


def adjusted(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p-values of several tests, corrected: Bonferroni, and Benjamini and Hochberg's step-up (1995). NaN stays."""
    known = np.isfinite(p)
    own, n = p[known], int(known.sum())
    order = np.argsort(own)
    steps = own[order] * n / np.arange(1, n + 1)
    bh = np.empty(n)
    bh[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1.0)
    done = np.full((2, *p.shape), np.nan)
    done[0][known], done[1][known] = np.minimum(own * n, 1.0), bh
    return done[0], done[1]


def permutation_p(
    X: np.ndarray, y: np.ndarray, permuted: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, np.ndarray]:
    """One-sided p-value that rows say nothing of labels, refitting for every permutation of the labels.

    The statistic is the held-out association of a least-squares probe with a fixed penalty (the mean eigenvalue of the
    training rows' Gram matrix): AUROC for booleans, the covariance of predictions and labels within folds, over the
    labels' variance, for numbers. Its predictions are linear in the labels, so that all permutations are fitted at
    once. p = (1 + permutations at least as large) / (1 + permutations).

    Args:
        X: rows, axes row, feature.
        y: booleans or numbers, axis row.
        permuted: labels exchanged between groups, axes permutation, row.
        folds: train and test rows of each fold.

    Returns:
        The p-value and the statistic of each permutation.
    """
    targets = np.concatenate([y[None], permuted]).astype(np.float64).T
    total, pairs = np.zeros(targets.shape[1]), np.zeros(targets.shape[1])
    for train, test in folds:
        Z, mean, scale = standardised(X[train].astype(np.float64))
        held = (X[test] - mean) / scale
        centred = targets[train] - targets[train].mean(axis=0)
        if len(Z) <= Z.shape[1]:
            gram = Z @ Z.T
            gram.flat[:: len(gram) + 1] += np.trace(gram) / len(gram)
            scores = (held @ Z.T) @ np.linalg.solve(gram, centred)
        else:
            gram = Z.T @ Z
            gram.flat[:: len(gram) + 1] += np.trace(gram) / len(Z)
            scores = held @ np.linalg.solve(gram, Z.T @ centred)
        own = targets[test]
        if y.dtype == bool:
            ranks = rankdata(scores, axis=0)
            n = own.sum(axis=0)
            total += (ranks * own).sum(axis=0) - n * (n + 1) / 2
            pairs += n * (len(test) - n)
        else:
            total += ((scores - scores.mean(axis=0)) * (own - own.mean(axis=0))).sum(axis=0)
            pairs += ((own - own.mean(axis=0)) ** 2).sum(axis=0)
    found = np.divide(total, pairs, out=np.full(len(total), 0.5 if y.dtype == bool else 0.0), where=pairs > 0)
    return float((1 + (found[1:] >= found[0] - 1e-12).sum()) / len(found)), found[1:]
