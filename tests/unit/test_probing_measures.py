"""The figures of a sweep against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

import probekit as pk
from probekit.probing import codelength
from probekit.probing.baselines import control_labels
from probekit.probing.codelength import block_ends, online_code
from probekit.probing.logistic import log_loss, temperature
from probekit.probing.measuring import (
    adjusted,
    auroc,
    balanced_accuracy,
    calibration,
    interval,
    r_squared,
    resampled,
    share_interval,
)
from probekit.probing.splits import group_folds, shuffled_labels


def test_folds_keep_groups_whole() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        groups = rng.integers(0, 13, 60)
        folds = group_folds(groups, 5, seed)
        assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(60))
        for train, test in folds:
            assert not set(groups[train]) & set(groups[test]) and len(train) + len(test) == 60
    assert [t.tolist() for _, t in group_folds(groups, 5, 1)] != [t.tolist() for _, t in group_folds(groups, 5, 2)]
    for n_groups, n_folds in ((1, 2), (4, 5), (4, 1)):
        with pytest.raises(pk.ProbekitError, match="Give more different prompts"):
            group_folds(np.arange(n_groups), n_folds, 0)


def test_auroc_compares_within_folds() -> None:
    rng = np.random.default_rng(1)
    scores, y = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
    one = [np.arange(50)]
    assert auroc(scores, y, one)[0] == pytest.approx(roc_auc_score(y, scores))
    folds = [np.arange(20), np.arange(20, 50)]
    pairs = [int(y[f].sum() * (~y[f]).sum()) for f in folds]
    expected = np.average([roc_auc_score(y[f], scores[f]) for f in folds], weights=pairs)
    assert auroc(scores, y, folds)[0] == pytest.approx(expected)
    weights = rng.integers(0, 3, (4, 50)).astype(float)
    for w, found in zip(weights, auroc(scores, y, one, weights), strict=True):
        assert found == pytest.approx(roc_auc_score(y, scores, sample_weight=w))
    assert auroc(scores, np.ones(50, bool), one)[0] == 0.5


def test_resampling_draws_whole_groups() -> None:
    weights = resampled(np.array([7, 7, 2, 9, 9, 9]), 0, 200)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all() and np.abs(weights.mean(axis=0) - 1).max() < 0.2


def test_intervals_are_widened_and_reach_beyond_perfection() -> None:
    draws = np.linspace(0.6, 0.8, 1001)
    found = interval(lambda w: np.array([0.7]) if w is None else draws, np.ones((1, 1)))
    assert found.low == pytest.approx(0.7 - 2**0.5 * 0.095) and found.high == pytest.approx(0.7 + 2**0.5 * 0.095)
    perfect = share_interval(lambda w: np.ones(1 if w is None else 100), np.ones((1, 1)), 24)
    assert perfect.ends() == pytest.approx((0.025 ** (1 / 24), 1.0))
    nothing = share_interval(lambda w: np.zeros(1 if w is None else 100), np.ones((1, 1)), 24)
    assert nothing.ends() == pytest.approx((0.0, 1 - 0.025 ** (1 / 24)))


def test_calibration_by_hand() -> None:
    """Probabilities 0.1, 0.1, 0.9, 0.5 in bins 1, 1, 13 and 7 of 15; shares 0.5, 1, 0."""
    found = calibration(logit(np.array([0.1, 0.1, 0.9, 0.5])), np.array([True, False, True, False]))
    assert found.count[[1, 13, 7]].tolist() == [2, 1, 1] and found.count.sum() == 4
    assert found.ece == pytest.approx((2 * 0.4 + 0.1 + 0.5) / 4)
    assert found.brier == pytest.approx((0.9**2 + 0.1**2 + 0.1**2 + 0.5**2) / 4)
    assert np.isnan(found.predicted[0]) and found.observed[1] == 0.5
    top = calibration(np.array([800.0, -800.0]), np.array([True, True]))
    assert top.count[[0, 14]].tolist() == [1, 1] and top.ece == pytest.approx(0.5)


def test_temperature_undoes_a_factor() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=40_000) * 2
    y = (rng.random(40_000) < expit(scores)).astype(int)
    assert temperature(3 * scores, y) == pytest.approx(3, rel=0.05)
    assert temperature(scores, np.ones(40_000, int)) == 1.0
    few = temperature(np.array([-1.0, 1.0, 2.0, -2.0]), np.array([0, 1, 1, 0]))  # told apart, but only four
    assert 0.5 < few < 1.5
    assert log_loss(np.array([np.log(3)]), np.array([1])) == pytest.approx(-np.log(0.75))
    assert log_loss(np.log([[1.0, 2, 1]]), np.array([1])) == pytest.approx(np.log(2))


def test_corrections_by_hand() -> None:
    bonferroni, bh = adjusted(np.array([[0.01, 0.04], [0.03, np.nan]]))
    np.testing.assert_allclose(bonferroni, [[0.03, 0.12], [0.09, np.nan]])
    np.testing.assert_allclose(bh, [[0.03, 0.04], [0.04, np.nan]])  # 0.01·3/1, min(0.03·3/2, 0.04·3/3), 0.04


def test_shares_by_hand() -> None:
    y = np.array([True, True, True, False])
    assert balanced_accuracy(np.array([True, False, False, True]), y)[0] == pytest.approx((1 / 3 + 1) / 2)
    values, mean = np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 2.0])
    assert r_squared(np.array([1.0, 1.0, 4.0]), values, mean)[0] == pytest.approx(1 - 1 / 5)


def test_blocks_of_the_online_code() -> None:
    """1,000 prompts of one row: 1, 2, 4, 8, 16, 32, 63, 125, 250, 500, 1000; and whole prompts of ten rows."""
    assert block_ends(np.ones(1000)) == [1, 2, 4, 8, 16, 32, 63, 125, 250, 500, 1000]
    assert block_ends(np.full(8, 10)) == [1, 2, 4, 8]
    assert block_ends(np.array([50, 1, 1, 48])) == [1, 4]


def test_codelength_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that say 3/4 for the true class: n₁ bits, then log₂(4/3) for each row after both classes were seen."""

    class Sure:
        def __init__(self, **_: object) -> None:
            pass

        def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Sure:
            self.seen = len(y)
            return self

        def decision_function(self, X: np.ndarray) -> np.ndarray:
            return np.log(3) * X[:, 0]

    monkeypatch.setattr(codelength, "LogisticProbe", Sure)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 64)
    found = online_code((2 * y[:, None] - 1).astype(float), y, np.repeat(np.arange(32), 2))
    order = np.random.default_rng(0).permutation(32)
    sent = np.concatenate([y[2 * g : 2 * g + 2] for g in order])
    plain = next(end for end in np.cumsum(found.blocks) if len(set(sent[:end])) == 2)
    assert found.blocks == (2, 2, 4, 8, 16, 32) and sum(found.blocks) == 64
    assert found.bits == pytest.approx(plain + (64 - plain) * np.log2(4 / 3))
    assert found.compression == pytest.approx(64 / found.bits)


def test_labels_are_exchanged_between_groups() -> None:
    rng = np.random.default_rng(0)
    groups, texts = np.repeat(np.arange(10), 3), np.repeat(np.arange(10), 3)
    y = np.repeat(rng.random(10) < 0.5, 3)
    for _ in range(20):
        other = shuffled_labels(y, groups, texts, rng)
        assert other.reshape(10, 3).std(axis=1).max() == 0 and other.sum() == y.sum()
    assert any((shuffled_labels(y, groups, texts, rng) != y).any() for _ in range(5))
    pairs, texts = np.repeat(np.arange(10), 2), np.arange(20)
    swapped = [shuffled_labels(np.tile([True, False], 10), pairs, texts, rng).reshape(10, 2) for _ in range(50)]
    assert all((s.sum(axis=1) == 1).all() for s in swapped)
    assert 0.3 < np.mean([s[:, 0] for s in swapped]) < 0.7
    tokens = np.tile([True, False, False, False], 10)
    moved = shuffled_labels(tokens, np.repeat(np.arange(10), 4), np.repeat(np.arange(10), 4), rng)
    assert (moved.reshape(10, 4).sum(axis=1) == 1).all() and (moved != tokens).any()


def test_control_labels_belong_to_keys() -> None:
    keys = np.random.default_rng(0).integers(0, 50, 400)
    labels = control_labels(keys, np.arange(400) < 100, 0)
    assert all(len(set(labels[keys == k])) == 1 for k in range(50)) and 0.05 < labels.mean() < 0.5
