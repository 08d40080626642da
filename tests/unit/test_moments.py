"""Sums that add up give the estimates of all units at once; shares and tenths on levels are those of sorted tokens."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import probekit as pk
from probekit.analysis import Statistic, check_summary, get_analysis, merge_summaries
from probekit.methods import levels
from probekit.stats import Estimate, estimate, ratio, text_mean, text_moments, token_mean, token_moments, units

LENGTHS = (40, 7, 90, 33, 12, 65, 5)


def tokens(lengths: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values that differ between texts, some NaN, with their texts and positions."""
    rng = np.random.default_rng(seed)
    texts = np.repeat(np.arange(len(lengths)) + 10, lengths)
    pos = np.concatenate([np.arange(n) for n in lengths])
    values = rng.gamma(2.0, size=len(texts)) + 0.3 * (texts % 3)
    values[rng.random(len(texts)) < 0.1] = np.nan
    return values, texts, pos


def assert_same(found: Estimate, expected: Estimate) -> None:
    assert (found.n, found.n_unit) == (expected.n, expected.n_unit)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert (found.ci95 is None) == (expected.ci95 is None)
    if found.ci95 is not None:
        assert found.ci95 == pytest.approx(expected.ci95, rel=1e-9)


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:3], LENGTHS[:1], (7,)], ids=str)
def test_moments_give_the_estimates_of_all_units(lengths: tuple[int, ...]) -> None:
    """Texts where there are five or more, else blocks; also when they come in parts."""
    values, texts, pos = tokens(lengths)
    assert_same(estimate(token_moments(values, texts, pos)), token_mean(values, texts, pos))
    parts = [token_moments(values[texts == t], texts[texts == t], pos[texts == t]) for t in np.unique(texts)]
    assert_same(estimate(np.sum(parts, axis=0)), token_mean(values, texts, pos))
    several = token_moments(np.stack([values, 2 * values]), texts, pos)
    assert several.shape == (2, 2, 6)
    np.testing.assert_array_equal(several[0], parts[0] if len(parts) == 1 else token_moments(values, texts, pos))


def test_moments_of_one_number_for_each_text() -> None:
    values = np.array([1.0, 2.0, np.nan, 8.0, 16.0, 3.0])
    assert_same(estimate(text_moments(values)), text_mean(values))
    assert estimate(text_moments(np.full(9, 0.1))).ci95 == (pytest.approx(0.1), pytest.approx(0.1))
    assert estimate(text_moments(np.full(9, 0.1))).ci95[0] == estimate(text_moments(np.full(9, 0.1))).value  # type: ignore[index]
    assert estimate(text_moments(np.array([np.nan]))).n == 0


def test_the_high_share_and_tenths_are_those_of_sorted_tokens() -> None:
    """A fifth of 3,000 tokens by sorting, and by levels of 0.005 nats; the interval over texts likewise."""
    rng = np.random.default_rng(1)
    texts = np.repeat(np.arange(60), 50)
    pos, limit = np.tile(np.arange(50), 60), 5.0
    entropy = np.clip(rng.gamma(2.0, 0.6, size=3000) * (1 + 0.5 * (texts % 2)), 0, limit)
    surprisal = entropy + rng.normal(size=3000)
    surprisal[pos == 49] = np.nan
    found = levels.ladder(entropy, surprisal, texts, pos, limit)
    held, share, least = levels.top_share(found, 0.2)
    high = np.zeros(3000, dtype=bool)
    high[np.argsort(-entropy)[:600]] = True
    unit, name = units(texts, pos)
    expected = ratio(np.bincount(unit, entropy * high), np.bincount(unit, entropy), name)
    assert share == 0.2 and least * limit == pytest.approx(entropy[high].min(), abs=limit / levels.N_LEVELS)
    assert held.value == pytest.approx(expected.value, abs=1e-4)
    assert held.ci95 == pytest.approx(expected.ci95, abs=2e-3)
    means = levels.tenths(found, 10)
    known = np.isfinite(surprisal)
    order = np.argsort(entropy[known]).reshape(10, -1)
    np.testing.assert_allclose(
        means["binned_entropy_nats"], entropy[known][order].mean(1), atol=limit / levels.N_LEVELS
    )
    np.testing.assert_allclose(means["binned_surprisal_nats"], surprisal[known][order].mean(1), atol=0.03)


def test_ties_share_a_level_evenly() -> None:
    """All tokens alike: any share of them holds that share."""
    texts, pos = np.repeat(np.arange(6), 10), np.tile(np.arange(10), 6)
    found = levels.ladder(np.full(60, 2.0), np.full(60, 2.0), texts, pos, 3.0)
    for share in (0.05, 0.5):
        assert levels.top_share(found, share)[0].value == pytest.approx(share)


def test_summaries_merge_as_declared() -> None:
    """Sum, maximum, tally in order of appearance, the best and the earlier of two that tie."""

    class Kinds(pk.Analysis):
        name, title, measures = "kinds", "Kinds", {}
        statistics = {
            "sum": Statistic(("layer",), "a"),
            "max": Statistic(("layer",), "a", "max"),
            "tally": Statistic((), "a", "tally"),
            "best": Statistic((), "a", "best"),
        }

    def made(values: list[float], tally: dict[str, int], best: float, who: str) -> xr.Dataset:
        held = {"tally": tally, "best": {"value": best, "who": who}}
        arrays = {k: ((), np.array(v, dtype=object)) for k, v in held.items()}
        return check_summary(Kinds(), xr.Dataset({"sum": ("layer", values), "max": ("layer", values), **arrays}))

    both = merge_summaries(
        Kinds(), made([1, 5], {"a": 1, "b": 2}, 3.0, "first"), made([2, 4], {"c": 1, "a": 4}, 3.0, "second")
    )
    assert both["sum"].values.tolist() == [3, 9] and both["max"].values.tolist() == [2, 5]
    assert list(both["tally"].item().items()) == [("a", 5), ("b", 2), ("c", 1)]
    assert both["best"].item()["who"] == "first"
    with pytest.raises(ValueError, match="other statistics than declared"):
        check_summary(Kinds(), xr.Dataset({"sum": ("head", [1.0])}))
    with pytest.raises(ValueError, match="grows with the texts"):
        Statistic(("token",), "a")
    assert "n_made" in get_analysis("attention-sinks").cannot_stream(get_analysis("attention-sinks").Params(n_made=3))  # type: ignore[call-arg]
