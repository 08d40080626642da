"""The branching factor on language models whose entropies are known, and the cut distribution against a naive one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run, scripted, see, texts_of, tiny_model
from scipy.special import log_softmax

from probekit.analysis import Result
from probekit.backends.scripted import Script, ScriptedModel, random_play
from probekit.core import Batch, Capture, InputError, TokenText
from probekit.reduce import Keep, NextToken, Nucleus, Tempered
from probekit.sampling.drawn import jackknife
from probekit.sampling.factor import SampledAnswers

V, END = 32, 31
After = Callable[[Sequence[int]], np.ndarray]  # weights of the next token after some


def toy(after: After) -> ScriptedModel:
    """Writes by `after` and shows just these log-probabilities."""

    def probs(ids: Sequence[int]) -> np.ndarray:
        p = after(ids) + 1e-14  # below what counts
        return p / p.sum()

    def play(text: TokenText) -> Script:
        rows = np.log(np.stack([probs(text.ids[: i + 1]) for i in range(len(text))]))
        script = random_play(2, 2, V)(text)
        return Script(np.stack([np.zeros_like(rows), rows]), script.pattern)

    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": V, "d_vocab": V}
    return scripted(play=play, unembedding=np.eye(V), writes=probs, ends=frozenset({END}), **sizes)


def prompts(*first: int) -> Batch:
    return Batch(tuple(TokenText((i, 30), (f" w{i}", " w30")) for i in first))


def find(after: After, batch: Batch | None = None, **params: Any) -> Result:
    how: dict[str, Any] = {"n_samples": 8, "max_tokens": 12} | params
    return run("branching-factor", toy(after), batch or prompts(3), **how)["branching-factor"]


def uniform(k: int) -> After:
    return lambda ids: (np.arange(V) < k).astype(float)


def naive(logits: np.ndarray, next_ids: np.ndarray, reducer: Nucleus) -> dict[str, np.ndarray]:
    """The cut distribution, a row at a time."""
    rows: dict[str, list[float]] = {n: [] for n in ("entropy_nats", "logprob_nats", "n_kept", "forced")}
    for row, target in zip(logits.astype(np.float64), next_ids, strict=True):
        p = np.exp(log_softmax(row / reducer.temperature))
        kept: list[int] = []
        for i in np.argsort(-p, kind="stable"):
            if p[i] < max(1e-12, reducer.min_p * p.max()) or (reducer.top_p < 1 and p[kept].sum() >= reducer.top_p):
                break
            kept.append(int(i))
        forced = bool(target >= 0 and int(target) not in kept)
        kept += [int(target)] * forced
        q = p[kept] / p[kept].sum()
        rows["entropy_nats"].append(float(-(q * np.log(q)).sum()))
        rows["logprob_nats"].append(float(np.log(q[kept.index(int(target))])) if target >= 0 else np.nan)
        rows["n_kept"].append(len(kept))
        rows["forced"].append(float(forced))
    return {name: np.array(values) for name, values in rows.items()}


@pytest.mark.parametrize(
    "reducer",
    [Nucleus(), Nucleus(1.0), Nucleus(0.99, 0.0, 1.7), Nucleus(1.0, min_p=0.1), Nucleus(0.5, 0.3, 0.6)],
    ids=lambda r: r.key,
)
@pytest.mark.parametrize("scale", [0.05, 1.5], ids=["flat", "peaked"])
def test_cut_distribution_is_the_naive_one(reducer: Nucleus, scale: float) -> None:
    """Of flat distributions, more tokens are kept than are sorted at first."""
    weights = scale * np.random.default_rng(1).normal(size=(3000, 16))
    model, batch = scripted(d_vocab=3000, unembedding=weights), texts_of([9, 5])
    found, logits = see(model, [Capture("logits", reducer), Capture("logits", Keep())], batch)
    expected = naive(logits["value"].values, batch.next_ids, reducer)
    assert np.nanmax(expected["n_kept"]) > (256 if scale < 1 and reducer.top_p > 0.6 else 1)
    for name, values in expected.items():
        assert_close(found[name].values, values, atol=1e-5, what=name)


def test_cut_distribution_of_a_real_pass_and_beside_other_readers() -> None:
    """Reducers that share a pass do not spoil each other's numbers."""
    batch, reducers = texts_of([20, 9], 120), (Nucleus(0.8), NextToken(5), Tempered(0.5, 5), Tempered(1.0, 5), Keep())
    seen = see(tiny_model("llama-grouped").model, [Capture("logits", r) for r in reducers], batch)
    cut, own, cool, same, logits = seen
    for name, values in naive(logits["value"].values, batch.next_ids, Nucleus(0.8)).items():
        assert_close(cut[name].values, values, atol=2e-5, what=name)
    for name in ("entropy_nats", "logprob_nats", "top_logprob", "top_id"):
        assert_close(same[name].values, own[name].values, atol=2e-5, what=name)
    p = np.exp(log_softmax(logits["value"].values.astype(float) / 0.5, axis=-1))
    assert_close(cool["entropy_nats"].values, -(p * np.log(p)).sum(-1), atol=2e-5)
    assert_close(np.exp(cool["top_logprob"].values[:, 0]), p.max(-1), atol=1e-5)


def test_reducers_refuse_what_is_no_distribution() -> None:
    for make in (lambda: Nucleus(0.0), lambda: Nucleus(0.9, 2.0), lambda: Nucleus(temperature=0), lambda: Tempered(-1)):
        with pytest.raises(InputError, match="found"):
            make()


@pytest.mark.parametrize(
    ("k", "params", "expected"),
    [(10, {}, 9), (8, {}, 8), (20, {"top_p": 0.5}, 10), (10, {"top_p": 1.0}, 10), (7, {"top_p": 1.0, "min_p": 0.5}, 7)],
)
@pytest.mark.parametrize("length", [12, 60])
def test_uniform_over_k_tokens(k: int, params: dict[str, Any], expected: int, length: int) -> None:
    """ceil(top_p k) tokens are kept, all k without a cut; in both regimes."""
    result = find(uniform(k), max_tokens=length, **params)
    for name in ("bf", "bf_entropy", "bf_likelihood", "n_kept", "perplexity"):
        assert result[name].values == pytest.approx(expected, rel=1e-5), name
    assert result["forced_share"].values == 0 and result["n_positions"].values == length
    assert result["sequences_nats"].values == pytest.approx(length * np.log(expected), rel=1e-5)
    assert result["product_nats"].values == pytest.approx(length * np.log(expected), rel=1e-5)
    assert [f.value for f in result.findings] == pytest.approx([expected, 0, 0, 1], abs=1e-4)


def test_a_deterministic_model_has_one() -> None:
    result = find(lambda ids: np.eye(V)[5])
    assert result["bf"].values == pytest.approx(1) and result.findings[0].value == pytest.approx(
        result.findings[0].null
    )
    assert "neither falls nor rises" in result.findings[1].claim


def test_the_mean_over_prompts_is_not_that_of_logs() -> None:
    """Prompts with 2 and 8 equally likely tokens have 5 on average, not 4."""
    result = find(lambda ids: uniform(2 if ids[0] == 3 else 8)(ids), prompts(3, 4), top_p=1.0)
    assert result["bf"].values == pytest.approx([2, 8]) and result.findings[0].value == pytest.approx(5)
    assert result["step_bf"].values == pytest.approx(5) and result["upto_likelihood_bf"].values == pytest.approx(5)


def markov(ids: Sequence[int]) -> np.ndarray:
    """Even tokens are followed by one of two, odd ones by one of eight; the second of two is odd with 0.3."""
    weights = np.zeros(V)
    if ids[-1] % 2 == 0:
        weights[[10, 11]] = 0.7, 0.3
    else:
        weights[[0, 1, 2, 3, 4, 5, 6, 7]] = 0.2, 0.05, 0.2, 0.05, 0.2, 0.05, 0.2, 0.05
    return weights


def markov_log_bf(n: int) -> float:
    """Exact mean entropy of the first n steps from an even token."""
    even, odd = (-(p * np.log(p)).sum() for p in (np.array([0.7, 0.3]), np.array([0.2] * 4 + [0.05] * 4)))
    share, total = 1.0, 0.0
    for _ in range(n):
        total += share * even + (1 - share) * odd
        share = 0.7 * share + 0.8 * (1 - share)
    return total / n


@pytest.mark.parametrize("n", [20, 60])
def test_markov_model_with_known_entropy(n: int) -> None:
    """Both regimes; the exact value lies in the interval at about the nominal rate, and estimates are unbiased."""
    truth, inside, values = markov_log_bf(n), 0, []
    seeds = 60 if n <= 50 else 25
    for seed in range(seeds):
        result = find(markov, top_p=1.0, max_tokens=n, seed=seed, n_samples=10)
        low, high = float(result["bf_low"].values[0]), float(result["bf_high"].values[0])
        inside += low <= np.exp(truth) <= high
        values.append(np.log(result["bf"].values[0]))
    assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values) / np.sqrt(seeds))
    assert inside >= seeds * (0.95 - 3 * np.sqrt(0.95 * 0.05 / seeds))


def test_the_estimators_meet_in_the_limit() -> None:
    """|likelihood - entropy| shrinks with the length, and is 0 on average."""
    size = {}
    for n in (5, 80):
        result = find(markov, prompts(*range(2, 30, 2)), top_p=1.0, max_tokens=n, n_samples=5)
        gap = result["gap_nats"].values
        size[n] = float(np.abs(gap).mean())
        finding = result.findings[2]
        assert finding.ci95 is not None and finding.ci95[0] <= 0 <= finding.ci95[1]
    assert size[80] < size[5] / 2.5  # the law says 4
    assert "entropy is reported" in find(markov).findings[2].claim
    assert "likelihood is reported" in find(markov, max_tokens=60).findings[2].claim


def test_temperature_and_min_p_measure_what_is_drawn() -> None:
    """At T = 0.5 the squares of the probabilities count; min_p leaves out the rare tokens, and forces drawn ones."""

    def skewed(ids: Sequence[int]) -> np.ndarray:
        weights = np.zeros(V)
        weights[:3] = 0.6, 0.38, 0.02
        return weights

    p = np.array([0.6, 0.38, 0.02]) ** 2 / (np.array([0.6, 0.38, 0.02]) ** 2).sum()
    cool = find(skewed, top_p=1.0, temperature=0.5)
    assert cool["bf"].values == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    cut = find(skewed, top_p=1.0, min_p=0.1, n_samples=40)
    q = np.array([0.6, 0.38]) / 0.98
    assert cut["entropy_nats"].values.min() == pytest.approx(-(q * np.log(q)).sum(), rel=1e-4)
    assert cut["forced_share"].values == pytest.approx(0.02, abs=0.02) and cut["forced_share"].values > 0
    assert "kept because they were drawn" in cut.findings[2].claim
    with pytest.raises(InputError, match=r"from 0\.01 to 5"):
        find(skewed, temperature=0)


def falling(ids: Sequence[int]) -> np.ndarray:
    """The entropy falls by 0.02 nats per token."""
    entropy = 1.6 - 0.02 * (len(ids) - 2)
    k = np.arange(V)
    scales = np.linspace(0.01, 5, 2000)
    p = np.exp(-k[None] / scales[:, None])
    p /= p.sum(axis=1, keepdims=True)
    h = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
    return np.asarray(p[int(np.abs(h - entropy).argmin())])


def test_a_planted_fall_is_found_as_strong_as_it_is() -> None:
    result = find(falling, prompts(3, 4, 5), top_p=1.0, max_tokens=40)
    trend = result.findings[1]
    assert trend.value == pytest.approx(-2, abs=0.05) and trend.ci95 is not None and trend.ci95[1] < 0
    assert "falls by" in trend.claim
    assert result["step_bf"].values[[0, 39]] == pytest.approx(np.exp([1.6, 0.82]), rel=0.02)


def test_trend_is_silent_without_one() -> None:
    """Independent entropies, answers of different lengths and levels: false alarms at the nominal rate."""
    alarms, seeds = 0, 400
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        entropy = rng.gamma(2.0, 0.5, size=(12, 30)) + rng.normal(size=(12, 1))
        for row, end in zip(entropy, rng.integers(8, 31, 12), strict=True):
            row[end:] = np.nan
        low, high = SampledAnswers(entropy, entropy).slope().ci95 or (0, 0)
        alarms += not low <= 0 <= high
    assert alarms / seeds <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / seeds)
    assert alarms > 0


def test_survivors_do_not_pass_for_a_trend() -> None:
    """After 20 answers go on with six choices to the end, after 21 with two and end early."""

    def after(ids: Sequence[int]) -> np.ndarray:
        weights = np.zeros(V)
        if len(ids) <= 2:
            weights[[20, 21]] = 1
        elif ids[2] == 20:
            weights[:6] = 1
        else:
            weights[[0, 1] if len(ids) < 8 else [END]] = 1
        return weights

    result = find(after, prompts(3, 4, 5), top_p=1.0, max_tokens=40, n_samples=20)
    entropy = result["entropy_nats"].values
    long = np.isfinite(entropy[:, :, -1])
    inner = [SampledAnswers(e[k][:, 1:], e[k][:, 1:]).slope().value for e, k in zip(entropy, long, strict=True)]
    assert inner == pytest.approx([0, 0, 0], abs=1e-6)
    assert (result["slope_alive_nats"].values > result["slope_nats"].values + 0.3).all()
    assert "which answers are left" in result.findings[3].claim and result.findings[3].value < 0.7
    assert result["alive_share"].values[-1] == pytest.approx(long.mean())


def test_by_hand() -> None:
    """Means over answers alive, positions to the quantile of lengths and while more than three are alive."""
    nan = np.nan
    entropy = np.array([[1, 2, 3, 4.0], [3, 4, 5, nan], [1, 0, nan, nan], [3, 2, 1, 8], [2, 2, 1, nan]])
    answers = SampledAnswers(entropy, -2 * entropy)
    assert answers.lengths.tolist() == [4, 3, 2, 4, 3] and answers.n == 3, "two are alive at the fourth"
    assert answers.step_nats == pytest.approx([2, 2, 2.5])
    assert answers.by_entropy == pytest.approx([2, 2, 6.5 / 3])
    assert answers.by_likelihood == pytest.approx([4, 4, 2 * np.mean([6, 12, 6, 5]) / 3])
    assert np.exp(answers.log_factor) == pytest.approx(np.exp([2, 2, 6.5 / 3]))
    assert answers.perplexity == pytest.approx(np.exp([2.5, 4, 0.5, 3.5, 5 / 3]).mean())
    assert answers.log_product_nats == pytest.approx(
        sum(np.log(np.exp(c[np.isfinite(c)]).mean()) for c in entropy.T[:3])
    )
    slopes = [(2, 2), (2, 2), (-0.5, 0.5), (-2, 2), (-1, 2)]  # sum of products, of squares, of each answer
    assert answers.slope().value == pytest.approx(100 * sum(a for a, _ in slopes) / sum(b for _, b in slopes))
    assert answers.slope_alive() == pytest.approx(100 * np.polyfit([1, 2, 3], [2, 2, 2.5], 1, w=np.sqrt([5, 5, 4]))[0])
    ones = np.where(np.arange(100) < np.array([[10]] * 96 + [[100]] * 4), 1.0, nan)
    assert SampledAnswers(ones, ones).n == 10, "four of a hundred answers lie beyond the quantile"


def test_the_regime_changes_after_fifty_positions() -> None:
    answers = SampledAnswers(np.ones((4, 60)), np.full((4, 60), -3.0))
    assert answers.log_factor[[0, 49, 50, 59]] == pytest.approx([1, 1, 3, 3]) and answers.gap_nats == pytest.approx(2)


def test_jackknife_of_a_mean_is_students_interval() -> None:
    from scipy.stats import t

    values = np.random.default_rng(0).normal(size=9)
    found = jackknife(lambda kept: float(values[kept].mean()), 9, "values")
    assert found.ci95 == pytest.approx(t.interval(0.95, 8, values.mean(), values.std(ddof=1) / 3))
    assert jackknife(lambda kept: 1.0, 1, "values").ci95 is None
    assert jackknife(lambda kept: 1.0 if kept.all() else np.nan, 4, "values").ci95 == (-np.inf, np.inf)
