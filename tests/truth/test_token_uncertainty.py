"""Token uncertainty: distributions written by hand give the numbers worked out by hand; a calibrated model has no gap.

The unembedding is the identity, so that a residual row is its own logits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import assert_close, run, scripted, texts_of
from scipy.special import softmax

from probekit.analysis import Result
from probekit.backends.scripted import Play, Script
from probekit.core import Batch, TokenText

V = 32
LN = np.log


def rows(logits: Callable[[TokenText], np.ndarray]) -> Play:
    """A script of one layer whose residual rows are these logits."""
    return lambda text: Script(logits(text)[None], np.zeros((1, 1, len(text), len(text))))


def find(play: Play, batch: Batch, **params: float) -> Result:
    model = scripted(play=play, n_layers=1, n_heads=1, d_model=V, d_vocab=V, unembedding=np.eye(V))
    return run("token-uncertainty", model, batch, **params)["token-uncertainty"]


def one_text(*ids: int) -> Batch:
    return Batch((TokenText(ids, tuple(map(str, ids))),))


def test_distributions_by_hand() -> None:
    """Uniform, one-hot, two-point and four-point: entropy, varentropy, surprisal, margin and rank in closed form."""
    p = 0.8
    table = np.full((5, V), -200.0)
    table[0] = 3.0  # uniform over the vocabulary
    table[1, 7] = 0.0  # certain of 7
    table[2, [4, 9]] = LN([p, 1 - p])  # two candidates
    table[3, [1, 2, 3, 5]] = LN([0.4, 0.3, 0.2, 0.1])
    table[4, 0] = 0.0
    result = find(rows(lambda text: table[: len(text)]), one_text(5, 6, 7, 9, 2))
    two, four = np.array([p, 1 - p]), np.array([0.4, 0.3, 0.2, 0.1])
    entropy = [LN(V), 0, -(two * LN(two)).sum(), -(four * LN(four)).sum(), 0]
    assert_close(result["entropy_nats"], entropy, atol=2e-5)
    varentropy = [0, 0, p * (1 - p) * LN(p / (1 - p)) ** 2, (four * LN(four) ** 2).sum() - entropy[3] ** 2, 0]
    assert_close(result["varentropy_nats2"], varentropy, atol=5e-5)
    assert_close(result["surprisal_nats"], [LN(V), 0, -LN(1 - p), -LN(0.3), np.nan], atol=2e-5)
    assert_close(result["target_rank"], [0, 0, 1, 1, np.nan])
    assert_close(result["margin_nats"], [0, 200, LN(p / (1 - p)), LN(0.4 / 0.3), 200], atol=2e-5)
    assert result["top_id"].values[2, :2].tolist() == [4, 9]
    assert result["top_id"].values[3, :4].tolist() == [1, 2, 3, 5]
    assert str(result["vocab_str"].sel(vocab=9).values) == " w9"


def test_uniform_model_is_at_its_null() -> None:
    """Every finding of a uniform model is its null: no gap, entropy ln V, uncertainty spread evenly."""
    gap, mean, held = find(rows(lambda text: np.zeros((len(text), V))), texts_of((20,) * 6, V)).findings
    assert gap.value == pytest.approx(0, abs=1e-6) and gap.null == 0
    assert mean.value == pytest.approx(LN(V), rel=1e-6) and mean.null == pytest.approx(LN(V), rel=1e-12)
    assert held.value == pytest.approx(0.2, rel=1e-6) and held.null == pytest.approx(0.2, rel=1e-12)


def test_rank_counts_only_likelier_tokens() -> None:
    """Ties with the token that follows do not count against it; the least likely of V has rank V - 1."""
    falling = -np.arange(V, dtype=float)
    tied = np.zeros(V)
    tied[3] = 1.0
    result = find(rows(lambda text: np.stack([falling, falling, tied, tied])), one_text(9, V - 1, 0, 6))
    assert_close(result["target_rank"], [V - 1, 0, 1, np.nan])


def test_high_entropy_share_by_hand() -> None:
    """A tenth of the tokens uncertain by ln V, the others certain: the top fifth hold everything; all hold it evenly."""

    def some(text: TokenText) -> np.ndarray:
        logits = np.zeros((len(text), V))
        logits[np.arange(len(text)) % 10 != 0, 5] = 300.0
        return logits

    batch = texts_of((40,) * 6, V)
    held = find(rows(some), batch).findings[2]
    assert held.value == pytest.approx(1) and held.null == pytest.approx(0.2)
    assert find(rows(some), batch, high_share=0.05).findings[2].value == pytest.approx(0.5)


def test_a_model_that_is_always_certain_still_has_finite_findings() -> None:
    def certain(text: TokenText) -> np.ndarray:
        logits = np.zeros((len(text), V))
        logits[:, 5] = 300.0
        return logits

    assert all(np.isfinite(f.value) for f in find(rows(certain), texts_of((40,) * 6, V)).findings)


def chain(seed: int, n_texts: int, length: int, temperature: float = 1.0) -> tuple[Play, Batch]:
    """A first-order model and texts drawn from it; a temperature other than 1 makes model and texts disagree."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(V, V))
    p = np.cumsum(softmax(logits * temperature, axis=1), axis=1)
    texts = []
    for _ in range(n_texts):
        ids = [int(rng.integers(V))]
        while len(ids) < length:
            ids.append(min(int(np.searchsorted(p[ids[-1]], rng.random())), V - 1))
        texts.append(TokenText(tuple(ids), tuple(map(str, ids))))
    return rows(lambda text: logits[list(text.ids)]), Batch(tuple(texts))


def test_calibrated_model_shows_no_gap_at_the_nominal_rate() -> None:
    """Texts drawn from the model itself: the gap's 95 % interval holds 0 in 95 % of 150 models, give or take 3 s.e."""
    values, covered = [], 0
    for seed in range(150):
        gap = find(*chain(seed, 8, 40)).findings[0]
        assert gap.ci95 is not None and gap.n == 8
        values.append(gap.value)
        covered += gap.ci95[0] <= 0 <= gap.ci95[1]
    assert abs(np.mean(values)) < 3 * np.std(values, ddof=1) / len(values) ** 0.5
    assert covered / 150 > 0.95 - 3 * (0.95 * 0.05 / 150) ** 0.5, covered


@pytest.mark.parametrize(("temperature", "sign", "word"), [(0.3, 1, "overconfident"), (3.0, -1, "underconfident")])
def test_miscalibrated_model_shows_its_gap(temperature: float, sign: int, word: str) -> None:
    """Texts flatter than the model: overconfident; sharper: underconfident; the interval excludes 0."""
    gap = find(*chain(1, 8, 60, temperature)).findings[0]
    assert gap.ci95 is not None and gap.ci95[0] * gap.ci95[1] > 0
    assert np.sign(gap.value) == sign and word in gap.claim


def test_calibration_curve_is_the_mean_in_tenths() -> None:
    """Bins sorted by entropy, over tokens that have a next one, each mean by hand."""
    result = find(*chain(3, 4, 26))
    entropy, surprisal = result["entropy_nats"].values, result["surprisal_nats"].values
    known = np.isfinite(surprisal)
    assert known.sum() == 100
    order = np.argsort(entropy[known], kind="stable").reshape(10, 10)
    assert_close(result["binned_entropy_nats"], entropy[known][order].mean(1), rtol=1e-6)
    assert_close(result["binned_surprisal_nats"], surprisal[known][order].mean(1), rtol=1e-6)
    assert_close(result["bin"], np.arange(0.05, 1, 0.1), atol=1e-12)
