"""Estimates with intervals. Texts are the independent unit: intervals come from the spread between texts.

Where there are fewer than five texts, contiguous blocks of tokens stand in for them; neighbouring
blocks are not quite independent, so such intervals are somewhat too narrow, and say what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_TEXTS = 5
BLOCK = 32  # tokens


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Args:
        value: the estimate.
        ci95: 95 % interval; None where there is one unit only.
        n: number of units.
        n_unit: what the units are.
    """

    value: float
    ci95: tuple[float, float] | None
    n: int
    n_unit: str

    def minus(self, constant: float) -> Estimate:
        """The estimate of the difference to a constant."""
        ci95 = None if self.ci95 is None else (self.ci95[0] - constant, self.ci95[1] - constant)
        return Estimate(self.value - constant, ci95, self.n, self.n_unit)

    def within(self, low: float, high: float) -> Estimate:
        """The same with its interval cut to the values that are possible."""
        ci95 = None if self.ci95 is None else (max(low, self.ci95[0]), min(high, self.ci95[1]))
        return Estimate(self.value, ci95, self.n, self.n_unit)


def ratio(sums: np.ndarray, weights: np.ndarray, n_unit: str) -> Estimate:
    """sum(sums) / sum(weights), with the interval that the spread between units gives.

    The linearised ratio estimator of cluster sampling with Student's t on n - 1 degrees of freedom.

    Args:
        sums: one per unit.
        weights: one per unit, such as its number of tokens; units of weight 0 are left out.
        n_unit: what the units are, in the plural.
    """
    from scipy.stats import t

    used = weights > 0
    sums, weights = sums[used].astype(float), weights[used].astype(float)
    n = len(sums)
    if n == 0:
        return Estimate(float("nan"), None, 0, n_unit)
    value = float(sums.sum() / weights.sum())
    if n == 1:
        return Estimate(value, None, 1, n_unit)
    residuals = sums - value * weights
    error = float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / weights.sum())
    half = float(t.ppf(0.975, n - 1)) * error
    return Estimate(value, (value - half, value + half), n, n_unit)


def text_mean(values: np.ndarray, n_unit: str = "texts") -> Estimate:
    """Mean over texts of one number each; NaN is left out."""
    values = np.asarray(values, dtype=float)
    return ratio(np.nan_to_num(values), np.isfinite(values).astype(float), n_unit)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """`other` minus `one`, of independent units; its interval is recovered from theirs.

    With estimates a, b and their ends, the lower end is b - a - sqrt((b - b_low)² + (a_high - a)²), the upper one
    likewise (Zou and Donner 2008, Statistics in Medicine 27, the method of variance estimates recovery). Where units are
    paired or alike, the interval is too wide. None where one of them has no interval.

    Args:
        one: what is subtracted.
        other: what it is subtracted from.
    """
    value, n = other.value - one.value, min(one.n, other.n)
    if one.ci95 is None or other.ci95 is None:
        return Estimate(value, None, n, other.n_unit)
    (a_low, a_high), (b_low, b_high) = one.ci95, other.ci95
    low = float(np.hypot(other.value - b_low, a_high - one.value))
    high = float(np.hypot(b_high - other.value, one.value - a_low))
    return Estimate(value, (value - low, value + high), n, other.n_unit)


def units(texts: np.ndarray, pos: np.ndarray) -> tuple[np.ndarray, str]:
    """The unit that each token belongs to, and what the units are called.

    Args:
        texts: text index of each token.
        pos: position of each token within its text.
    """
    distinct = np.unique(texts)
    if len(distinct) >= MIN_TEXTS:
        return np.searchsorted(distinct, texts), "texts"
    block = np.stack([texts, pos // BLOCK])
    return np.unique(block, axis=1, return_inverse=True)[1].ravel(), f"blocks of {BLOCK} tokens"


def token_mean(values: np.ndarray, texts: np.ndarray, pos: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """Mean over tokens, every token the same weight unless given; NaN is left out.

    Args:
        values: one per token.
        texts: text index of each token.
        pos: position of each token within its text.
        weights: weight of each token; 1 if None.
    """
    unit, name = units(texts, pos)
    values = np.asarray(values, dtype=float)
    weight = np.isfinite(values) * (1.0 if weights is None else weights)
    sums = np.bincount(unit, np.nan_to_num(values) * weight)
    return ratio(sums, np.bincount(unit, weight), name)


def moments(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Six sums over units from which `estimate` makes what `ratio` makes; those of two sets of units add up.

    Args:
        sums: last axis unit; its units of weight 0 are left out.
        weights: likewise.

    Returns:
        n, Σw, Σs, Σw², Σsw, Σs² in place of the last axis.
    """
    w = np.where(weights > 0, weights, 0.0).astype(float)
    s = np.where(weights > 0, sums, 0.0).astype(float)
    w, s = np.broadcast_arrays(w, s)
    return np.stack([x.sum(-1) for x in ((w > 0).astype(float), w, s, w * w, s * w, s * s)], axis=-1)


def text_moments(values: np.ndarray) -> np.ndarray:
    """The moments of one number for each text, last axis; NaN is left out."""
    values = np.asarray(values, dtype=float)
    return moments(np.nan_to_num(values), np.isfinite(values).astype(float))


def both_units(texts: np.ndarray, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text and the block that each token belongs to, both numbered from 0."""
    block = np.unique(np.stack([texts, pos // BLOCK]), axis=1, return_inverse=True)[1].ravel()
    return np.unique(texts, return_inverse=True)[1].ravel(), block


def token_moments(values: np.ndarray, texts: np.ndarray, pos: np.ndarray) -> np.ndarray:
    """The moments of a mean over tokens, by texts and by blocks; NaN is left out.

    Args:
        values: last axis token.
        texts: text index of each token.
        pos: position of each token within its text.

    Returns:
        Axes unit (texts, blocks) and moment in place of the last axis.
    """
    rows = np.asarray(values, dtype=float).reshape(-1, len(texts))
    made = []
    for unit in both_units(texts, pos):
        sums = np.stack([np.bincount(unit, np.nan_to_num(row)) for row in rows])
        made.append(moments(sums, np.stack([np.bincount(unit, np.isfinite(row)) for row in rows])))
    return np.stack(made, axis=1).reshape(*np.shape(values)[:-1], 2, -1)


def estimate(found: np.ndarray) -> Estimate:
    """The ratio whose moments these are, with the interval of `ratio`.

    Args:
        found: from `text_moments` (axis moment), or `token_moments` (axes unit, moment): by texts where there are five
            or more, else by blocks.
    """
    from scipy.stats import t

    found, name = np.asarray(found, dtype=float), "texts"
    if found.ndim == 2:
        few = found[0, 0] < MIN_TEXTS
        found, name = found[int(few)], f"blocks of {BLOCK} tokens" if few else "texts"
    n, w, s, ww, sw, ss = map(float, found)
    if n == 0:
        return Estimate(float("nan"), None, 0, name)
    value = s / w
    if n == 1:
        return Estimate(value, None, 1, name)
    spread = ss - 2 * value * sw + value**2 * ww
    spread = spread if spread > 1e-13 * (ss + value**2 * ww) else 0.0  # what rounding leaves where all units agree
    half = float(t.ppf(0.975, n - 1)) * float(np.sqrt(n / (n - 1) * spread)) / w
    return Estimate(value, (value - half, value + half), int(n), name)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of independent draws (Wilson 1927); it begins at 0 for none, and ends at 1 for all.

    Args:
        successes: draws that count.
        n: all draws, at least one.
    """
    z, p = 1.959963984540054, successes / n
    middle, spread = p + z * z / (2 * n), z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    scale = 1 + z * z / n
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return (low if successes else 0.0), (high if successes < n else 1.0)  # without a rest of rounding at the ends


def held_out_best(values: np.ndarray) -> tuple[int, np.ndarray]:
    """The place with the largest mean over units, and each unit's value at the place that the other units choose.

    Choosing a maximum flatters it; the values at places chosen without the unit itself are not flattered. A single
    unit has no others: its value is then its own maximum.

    Args:
        values: axes unit, place; NaN where undefined.

    Returns:
        The place that all units choose, and the held-out values, axis unit (NaN for units without any value).
    """
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    total, count = filled.sum(axis=0), known.sum(axis=0)
    best = _argmax_mean(total, count)
    held = np.full(len(values), np.nan)
    for i in np.flatnonzero(known.any(axis=1)):
        others = (total - filled[i], count - known[i])
        place = _argmax_mean(*others) if others[1].any() else best
        held[i] = values[i, place]
    return best, held


def _argmax_mean(total: np.ndarray, count: np.ndarray) -> int:
    return int(np.where(count > 0, total / np.maximum(count, 1), -np.inf).argmax())


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN with fewer than three pairs or no spread.

    Args:
        x: numbers; pairs with NaN are left out.
        y: as many.
    """
    from scipy.stats import rankdata

    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3:
        return float("nan")
    a, b = rankdata(x[both]), rankdata(y[both])
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
