"""Divergences of two next-token distributions by hand, and how unevenly a quantity is spread over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from probekit.methods.concentration import Units, by_tenth, carried, ranked, tenths
from probekit.methods.divergences import (
    LN2,
    compare,
    entropy,
    jensen_shannon,
    kullback_leibler,
    matched,
    nucleus,
    top_k,
    top_overlap,
    unspecific,
)
from probekit.methods.two_models import log_softmax


def log(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array([probabilities]))


def random_rows(n: int, v: int, seed: int = 0) -> np.ndarray:
    """Distributions from nearly sure to nearly uniform."""
    rng = np.random.default_rng(seed)
    return log_softmax(rng.normal(size=(n, v)) * rng.uniform(0.1, 6, (n, 1)))


def test_values_by_hand() -> None:
    p, q = log(0.9, 0.1), log(0.1, 0.9)  # m is uniform
    assert jensen_shannon(p, q) == pytest.approx([0.9 * np.log(1.8) + 0.1 * np.log(0.2)])
    assert kullback_leibler(p, q) == pytest.approx([0.8 * np.log(9)])
    p, q = log(0.5, 0.5, 0.0), log(0.25, 0.25, 0.5)  # m = 0.375, 0.375, 0.25
    expected = 0.5 * np.log(0.5 / 0.375) + 0.5 * (0.5 * np.log(0.25 / 0.375) + 0.5 * np.log(2))
    assert jensen_shannon(p, q) == pytest.approx([expected])
    assert kullback_leibler(p, q) == pytest.approx([np.log(2)]) and np.isinf(kullback_leibler(q, p))
    assert entropy(log(0.25, 0.25, 0.5)) == pytest.approx([1.5 * np.log(2)])


def test_the_ends_of_the_scale() -> None:
    uniform = np.full((3, 7), -np.log(7))
    assert entropy(uniform) == pytest.approx(np.log(7)) and (jensen_shannon(uniform, uniform) == 0).all()
    assert jensen_shannon(log(1, 0), log(0, 1)) == pytest.approx([LN2])
    rows = random_rows(200, 50)
    assert (jensen_shannon(rows, rows.copy()) == 0).all() and (kullback_leibler(rows, rows.copy()) == 0).all()
    other = random_rows(200, 50, seed=1)
    js = jensen_shannon(rows, other)
    assert ((js > 0) & (js <= LN2)).all() and js == pytest.approx(jensen_shannon(other, rows))
    assert (kullback_leibler(rows, other) > 0).all()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.7, [0.625, 0.375, 0]),
        (0.5, [1, 0, 0]),
        (0.8, [0.625, 0.375, 0]),
        (0.81, [0.5, 0.3, 0.2]),
        (1, [0.5, 0.3, 0.2]),
    ],
)
def test_nuclei_by_hand(top_p: float, expected: list[float]) -> None:
    assert np.exp(nucleus(log(0.5, 0.3, 0.2), top_p)[0]) == pytest.approx(expected)
    shuffled = np.exp(nucleus(log(0.2, 0.5, 0.3), top_p)[0])
    assert shuffled == pytest.approx([expected[2], expected[0], expected[1]])


def test_a_nucleus_is_the_smallest_set_that_holds_its_share() -> None:
    rows = random_rows(300, 40)
    cut = nucleus(rows, 0.7)
    kept, p = cut > -np.inf, np.exp(rows)
    held, least = (p * kept).sum(axis=1), np.where(kept, p, np.inf).min(axis=1)
    assert (held >= 0.7 - 1e-9).all() and (held - least < 0.7).all()
    assert (least >= np.where(kept, 0, p).max(axis=1)).all()
    assert np.exp(cut).sum(axis=1) == pytest.approx(1) and np.exp(cut[kept]) == pytest.approx((p / held[:, None])[kept])


def test_of_equal_tokens_the_first_are_taken() -> None:
    level = np.full((1, 4), -np.log(4))
    assert np.exp(nucleus(level, 0.5)) == pytest.approx(np.array([[0.5, 0.5, 0, 0]]))
    assert top_k(level, 3).tolist() == [[True, True, True, False]]
    assert top_k(log(0.1, 0.4, 0.4, 0.1), 3).tolist() == [[True, True, True, False]]
    assert top_overlap(log(0.4, 0.3, 0.2, 0.1), log(0.4, 0.1, 0.3, 0.2), 2) == pytest.approx([0.5])
    assert top_overlap(log(0.9, 0.1), log(0.1, 0.9), 10) == pytest.approx([1])


def test_cutting_makes_disjoint_of_what_is_alike() -> None:
    """0.71 against 0.29 and the reverse: whole they share much, their nuclei hold one token each."""
    found = compare(log(0.71, 0.29), log(0.29, 0.71), [1], top_p=0.7, top_k=1)
    assert found["js"][0] == pytest.approx(0.71 * np.log(1.42) + 0.29 * np.log(0.58))
    assert found["js_cut"][0] == pytest.approx(LN2)
    assert found["delta_logprob"][0] == pytest.approx(np.log(0.71 / 0.29)) and np.isnan(found["delta_logprob_cut"][0])
    assert np.isnan([found["kl_model_base_cut"][0], found["kl_base_model_cut"][0]]).all(), "infinite"
    assert found["kl_model_base"][0] == pytest.approx(0.42 * np.log(0.71 / 0.29))
    assert (found["argmax_changed"][0], found["top_overlap"][0], found["top_overlap_cut"][0]) == (1, 0, 0)
    assert found["entropy_model_cut"][0] == 0


def test_kl_of_nuclei_is_known_one_way_if_one_holds_the_other() -> None:
    found = compare(log(0.5, 0.3, 0.2), log(0.8, 0.1, 0.1), [0], top_p=0.7, top_k=1)
    assert found["kl_model_base_cut"][0] == pytest.approx(np.log(1 / 0.625)) and np.isnan(found["kl_base_model_cut"][0])
    assert found["top_overlap_cut"][0] == 0.5 and found["delta_logprob_cut"][0] == pytest.approx(np.log(1.6))
    assert found["argmax_changed"][0] == 0


def test_rows_are_told_alike_however_many_there_are() -> None:
    p, q = random_rows(37, 20), random_rows(37, 20, seed=1)
    ids = np.arange(37) % 20
    whole = compare(p, q, ids.tolist(), top_p=0.7, top_k=5)
    for row in (0, 15, 16, 36):
        one = compare(p[[row]], q[[row]], [int(ids[row])], top_p=0.7, top_k=5)
        for name, values in one.items():
            np.testing.assert_allclose(whole[name][row], values[0], rtol=1e-12, err_msg=name)


def test_unspecific_noise_moves_uncertain_tokens_and_leaves_sure_ones() -> None:
    rows = np.concatenate([np.tile(log(*[0.01] * 100), (50, 1)), np.tile(log(1.0, *[0.0] * 99), (50, 1))])
    js, changed = unspecific(rows, seed=0)
    assert (js[:, 50:] == 0).all() and (changed[:, 50:] == 0).all()
    assert (np.diff(js[:, :50].mean(axis=1)) > 0).all() and changed[-1, :50].mean() > 0.9
    small = unspecific(random_rows(100, 500), seed=0, scales=(0.02, 0.04))[0]
    assert small[1].mean() / small[0].mean() == pytest.approx(4, rel=0.02), "with the square of the scale"


@pytest.mark.parametrize("mean", [0.0, 1e-6, 1e-3, 0.02, 0.1])
def test_matched_noise_has_the_mean(mean: float) -> None:
    js, changed = unspecific(random_rows(200, 50), seed=0)
    null, share = matched(js, changed, mean)
    assert null.mean() == pytest.approx(mean, rel=1e-9) and ((share >= 0) & (share <= 1)).all()
    assert matched(js, changed, LN2)[0] == pytest.approx(js[-1]), "more than the largest scale gives"
    assert matched(np.zeros((2, 3)), np.zeros((2, 3)), 0.1)[0].tolist() == [0, 0, 0]


def test_what_is_unspecific_looks_so_and_what_is_sparse_does_not() -> None:
    """The curve of a model that is its base with noise on all logits, beside that of matched noise, over seeds."""
    excess = []
    for seed in range(12):
        p = random_rows(300, 60, seed)
        q = log_softmax(p + 0.7 * np.random.default_rng(100 + seed).normal(size=p.shape))
        js = jensen_shannon(p, q)
        null = matched(*unspecific(p, seed=seed), js.mean())[0]
        excess.append(carried(js)[4] - carried(null)[4])
    assert abs(np.mean(excess)) < 3 * np.std(excess) / np.sqrt(12) + 0.01 and np.abs(excess).max() < 0.08
    q = p.copy()
    q[::25] = np.roll(p[::25], 7, axis=1)  # 4 % of the rows are others
    js = jensen_shannon(p, q)
    assert carried(js)[4] == 1 and carried(matched(*unspecific(p, seed=0), js.mean())[0])[4] < 0.4


def test_what_the_largest_carry() -> None:
    assert carried(np.array([0, 0, 3.0, 0, 1]))[[9, 19, 29, 39, 99]] == pytest.approx([0.375, 0.75, 0.875, 1, 1])
    assert carried(np.ones(37)) == pytest.approx(np.arange(1, 101) / 100)
    assert carried(np.zeros(5)) == pytest.approx(np.arange(1, 101) / 100), "nothing to carry: an even spread"
    x = np.arange(1, 101) / 100
    exponential = np.random.default_rng(0).exponential(size=200_000)
    assert carried(exponential) == pytest.approx(x * (1 - np.log(x)), abs=0.005)


def test_units_are_prompts_or_answers() -> None:
    prompts, answers = np.repeat(np.arange(6), 4), np.repeat(np.arange(12), 2)
    many = Units.choose(prompts, answers)
    assert (many.names, many.n, many.of.tolist()) == ("prompts", 6, prompts.tolist())
    few = Units.choose(prompts[:16], answers[:16])
    assert (few.names, few.n) == ("answers", 8)
    assert Units.choose(np.zeros(3), np.zeros(3)).interval(np.mean) is None


@pytest.mark.parametrize(("n", "least"), [(3, 0.88), (8, 0.88), (25, 0.9)])
def test_intervals_hold_the_truth_at_the_nominal_rate(n: int, least: float) -> None:
    """Means of values that belong together in few units, which tokens alone would make look sure."""
    inside, seeds = 0, 150
    of = np.repeat(np.arange(n), 20)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=n)[of] + rng.normal(size=20 * n)
        ends = Units(of, "answers").interval(lambda rows, v=values: v[rows].mean())
        assert ends is not None
        inside += bool(ends[0] <= 0 <= ends[1])
    assert inside / seeds >= least, (
        inside / seeds
    )  # 0.95, less three standard errors of 150 draws and a percentile's own


def test_tenths_by_hand() -> None:
    assert tenths(np.array([0.0, 0.099, 0.1, 0.95, 1.0])).tolist() == [0, 0, 1, 9, 9]
    assert ranked(np.array([5.0, 1.0, 1.0, 9.0])) == pytest.approx([0.625, 0.25, 0.25, 0.875])
    units = Units(np.array([0, 0, 1, 1]), "answers")
    mean, low, high = by_tenth(np.array([1.0, 9.0, 3.0, 9.0]), np.array([0, 9, 0, 9]), units)
    assert mean[[0, 9]].tolist() == [2, 9] and np.isnan(mean[1:9]).all()
    assert low[0] == 0 < mean[0] < high[0] and low[9] == high[9] == 9


def test_softmax_is_undone() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32) * 20
    assert np.exp(log_softmax(logits)) == pytest.approx(softmax(logits.astype(float), axis=-1))
