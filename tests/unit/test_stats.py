"""Estimates and intervals: by hand, and by how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from probekit.stats import BLOCK, Estimate, difference, ratio, text_mean, token_mean, units


def test_text_mean_is_students_interval() -> None:
    """With one number per text and equal weights, the interval is that of the one-sample t-test."""
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 3.0])
    estimate = text_mean(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimate.value == pytest.approx(values.mean()) and (estimate.n, estimate.n_unit) == (6, "texts")
    assert estimate.ci95 == pytest.approx((expected.low, expected.high))


def test_ratio_by_hand() -> None:
    """The linearised ratio estimator on three units, one of them empty."""
    estimate = ratio(np.array([2.0, 9.0, 0.0]), np.array([1.0, 3.0, 0.0]), "texts")
    value = 11 / 4
    residuals = np.array([2 - value, 9 - 3 * value])
    half = t.ppf(0.975, 1) * np.sqrt(2 / 1 * (residuals**2).sum()) / 4
    assert estimate.value == value and estimate.n == 2
    assert estimate.ci95 == pytest.approx((value - half, value + half))


def test_few_units_have_no_interval() -> None:
    assert ratio(np.array([2.0]), np.array([4.0]), "texts") == Estimate(0.5, None, 1, "texts")
    nothing = text_mean(np.array([np.nan, np.nan]))
    assert np.isnan(nothing.value) and nothing.n == 0 and nothing.ci95 is None


def test_nan_is_left_out() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    assert text_mean(values) == text_mean(values[[0, 2, 3]])
    texts, pos = np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6)
    tokens = np.arange(24.0)
    tokens[pos == 3] = np.nan
    kept = pos < 3
    assert token_mean(tokens, texts, pos) == token_mean(tokens[kept], texts[kept], pos[kept])


def test_every_token_weighs_the_same() -> None:
    """The mean over tokens is the mean over tokens, however they are spread over texts; weights are honoured."""
    texts = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 50])
    pos = np.concatenate([np.arange(n) for n in (1, 2, 3, 4, 5, 50)])
    values = np.random.default_rng(0).normal(size=65)
    estimate = token_mean(values, texts, pos)
    assert estimate.value == pytest.approx(values.mean()) and (estimate.n, estimate.n_unit) == (6, "texts")
    weights = np.arange(65.0)
    assert token_mean(values, texts, pos, weights).value == pytest.approx(np.average(values, weights=weights))


def test_blocks_stand_in_for_few_texts() -> None:
    """Below five texts, blocks of tokens within each text; from five on, texts; any text numbers."""
    texts, pos = np.repeat([7, 3], [70, 33]), np.concatenate([np.arange(70), np.arange(33)])
    unit, name = units(texts, pos)
    assert name == f"blocks of {BLOCK} tokens" and len(np.unique(unit)) == 3 + 2
    assert len(unit) == 103 and len(np.unique(unit[:32])) == 1 and unit[31] != unit[32]
    assert set(unit[70:]).isdisjoint(unit[:70])
    unit, name = units(np.repeat([9, 2, 5, 4, 0], 3), np.tile(np.arange(3), 5))
    assert name == "texts" and unit.tolist() == np.repeat([4, 1, 3, 2, 0], 3).tolist()


def test_estimate_shifts_and_clips() -> None:
    estimate = Estimate(0.5, (-0.2, 1.2), 4, "texts")
    assert estimate.within(0, 1) == Estimate(0.5, (0, 1), 4, "texts")
    shifted = estimate.minus(0.5)
    assert shifted.value == 0 and shifted.ci95 == pytest.approx((-0.7, 0.7))
    assert Estimate(1.0, None, 1, "texts").minus(1).within(0, 1) == Estimate(0.0, None, 1, "texts")


@pytest.mark.parametrize("n", [6, 10, 20])
def test_interval_of_a_text_mean_covers_the_truth(n: int) -> None:
    """95 % of 2,000 intervals over n normal texts hold the mean, to 3 standard errors."""
    rng = np.random.default_rng(n)
    held = 0
    for _ in range(2_000):
        ci95 = text_mean(rng.normal(1.0, 2.0, n)).ci95
        assert ci95 is not None
        held += ci95[0] <= 1.0 <= ci95[1]
    assert abs(held / 2_000 - 0.95) < 3 * (0.95 * 0.05 / 2_000) ** 0.5


@pytest.mark.parametrize("n", [6, 10, 20])
def test_interval_of_a_token_mean_covers_the_truth(n: int) -> None:
    """Texts of different lengths with an effect of their own: near 95 % hold the mean over tokens.

    The linearised ratio is a little narrow for few texts of very different lengths; 92 % is asked of lengths that
    differ by a factor of two. Taking tokens as independent would hold it in about half of the cases.
    """
    rng = np.random.default_rng(n)
    held, naive, trials = 0, 0, 800
    for _ in range(trials):
        lengths = rng.integers(30, 60, n)
        texts = np.repeat(np.arange(n), lengths)
        values = np.repeat(rng.normal(size=n), lengths) + rng.normal(size=lengths.sum())
        estimate = token_mean(values, texts, np.concatenate([np.arange(k) for k in lengths]))
        assert estimate.ci95 is not None
        held += estimate.ci95[0] <= 0 <= estimate.ci95[1]
        naive += abs(values.mean()) < 1.96 * values.std() / len(values) ** 0.5
    assert 0.92 < held / trials < 0.985, held / trials
    assert naive / trials < 0.6


def test_the_difference_of_two_estimates_by_hand() -> None:
    """Ends that lie 3 and 4 away make one 5 away; each end takes the side of its own estimate that it depends on."""
    one, other = Estimate(10.0, (7.0, 14.0), 5, "texts"), Estimate(20.0, (16.0, 23.0), 8, "texts")
    found = difference(one, other)
    assert found.value == 10.0 and (found.n, found.n_unit) == (5, "texts")
    assert found.ci95 == pytest.approx((10 - np.hypot(4, 4), 10 + np.hypot(3, 3)))
    assert difference(other, one).ci95 == pytest.approx((-10 - np.hypot(3, 3), -10 + np.hypot(4, 4)))
    assert difference(one, Estimate(1.0, None, 1, "texts")).ci95 is None


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(400):
        a, b = text_mean(rng.normal(1, 1, 12)), text_mean(rng.normal(3, 2, 20))
        low, high = difference(a, b).ci95 or (0.0, 0.0)
        held.append(low <= 2 <= high)
    assert 0.92 <= np.mean(held) <= 0.99
