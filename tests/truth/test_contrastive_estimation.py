"""Contrastive estimation on scripted models whose scores are worked out by hand, and on pairs without a contrast."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import scripted

from probekit.analysis import Result, get_analyses
from probekit.backends.scripted import Script, ScriptedModel, random_play
from probekit.core import Batch, InputError, TextError, TokenText
from probekit.engine import Job, run_jobs
from probekit.methods.contrastive import contrasted
from probekit.plots import TokenStrip
from probekit.stats import rank_correlation

V, PROMPT = 16, (3, 4)
CRITICAL, FINE, LEFT, RIGHT, YES, NO, END = 5, 6, 7, 8, 10, 11, 2
Next = Callable[[Sequence[int]], np.ndarray]


def distribution(**shares: float) -> np.ndarray:
    p = np.full(V, 1e-9)
    for name, share in shares.items():
        p[globals()[name]] = share
    return p / p.sum()


def course(critical: float) -> Next:
    """LEFT or RIGHT, then CRITICAL with this probability or else FINE, then the answer that follows from it."""

    def after(ids: Sequence[int]) -> np.ndarray:
        written = list(ids[len(PROMPT) :])
        if len(written) == 0:
            return distribution(LEFT=0.55, RIGHT=0.45)
        if len(written) == 1:
            return distribution(CRITICAL=critical, FINE=1 - critical)
        if len(written) == 2:
            return distribution(NO=0.9, YES=0.1) if written[1] == CRITICAL else distribution(NO=0.1, YES=0.9)
        return distribution(END=1.0)

    return after


def model_of(after: Next) -> ScriptedModel:
    """Writes by `after`, and its logits are the logarithms of what it writes by."""

    def play(text: TokenText) -> Script:
        rows = np.log(np.stack([after(text.ids[: i + 1]) for i in range(len(text))]))
        script = random_play(2, 2, V)(text)
        return Script(np.stack([np.zeros_like(rows), rows]), script.pattern)

    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": V, "d_vocab": V, "unembedding": np.eye(V)}
    return scripted(play=play, writes=after, ends=frozenset({END}), **sizes)


def text_of(*ids: int, answer: str = "") -> TokenText:
    return TokenText(ids, tuple(f" w{i}" for i in ids), answer=answer)


def score(
    batch: Batch,
    positive: ScriptedModel,
    negative: ScriptedModel,
    study: ScriptedModel | None = None,
    **params: Any,
) -> Result:
    (analysis,) = get_analyses(["contrastive-estimation"])
    how = {"answer_words": "w10,w11", "max_tokens": 6} | params
    job = Job(analysis, analysis.Params.parse(how, analysis.name))
    others = {"positive": positive, "negative": negative}
    return run_jobs([job], study or model_of(course(0.6)), batch, others=others)[analysis.name]


STUDY, POSITIVE, NEGATIVE = (model_of(course(p)) for p in (0.6, 0.05, 0.9))
PROMPTS = Batch((text_of(*PROMPT),))
ANSWER = [LEFT, CRITICAL, NO, END]


def by_hand(beta: float) -> float:
    """Score of CRITICAL: p_positive^(1 + beta) / p_negative^beta, divided by the sum over the vocabulary."""
    weights = [0.05 ** (1 + beta) / 0.9**beta, 0.95 ** (1 + beta) / 0.1**beta]
    return weights[0] / sum(weights)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_scores_are_those_worked_out_by_hand(beta: float) -> None:
    result = score(PROMPTS, POSITIVE, NEGATIVE, beta=beta)
    assert result["token_id"].values.tolist() == ANSWER
    assert result["score"].values == pytest.approx([0.55, by_hand(beta), 0.9, 1.0], rel=1e-5)
    assert result["p_positive"].values == pytest.approx([0.55, 0.05, 0.9, 1.0], rel=1e-5)
    assert result["p_negative"].values == pytest.approx([0.55, 0.9, 0.9, 1.0], rel=1e-5)
    assert result["probability"].values == pytest.approx([0.55, 0.6, 0.9, 1.0], rel=1e-5)
    assert result["log_ratio_nats"].values == pytest.approx([0, np.log(0.05 / 0.9), 0, 0], abs=1e-5)
    lowering = np.log(0.05 / by_hand(beta))
    assert result["lowering_nats"].values == pytest.approx([0, lowering, 0, 0], abs=1e-5)
    assert result["lowest_nats"].values == pytest.approx([lowering], abs=1e-5)


def test_the_planted_token_scores_lowest() -> None:
    result = score(PROMPTS, POSITIVE, NEGATIVE)
    assert result["order"].values.tolist() == [1, 0, 2, 3]
    lowest, leaning = result.findings[:2]
    assert (lowest.where["pos"], lowest.where["token"], lowest.n, lowest.ci95) == (1, "␣w5", 1, None)
    # Exchanged, LEFT scores lowest: there, both models agree.
    assert lowest.value == pytest.approx(np.log(0.05 / by_hand(1.0)), abs=1e-5) and lowest.null == 0
    assert "below its probability" in lowest.claim and "more than with the two models exchanged" in lowest.claim
    assert leaning.value == pytest.approx(np.log(0.05 / 0.9) / 4, abs=1e-5)


def test_exchanged_models_do_not_single_it_out() -> None:
    result = score(PROMPTS, NEGATIVE, POSITIVE)
    assert result["score"].values[1] == pytest.approx(0.9**2 / 0.05 / (0.9**2 / 0.05 + 0.1**2 / 0.95), rel=1e-5)
    lowest = result.findings[0]
    assert lowest.where["pos"] == 0 and lowest.value < 0
    assert "not below its probability" in lowest.claim and "less than with the two models exchanged" in lowest.claim


@pytest.mark.parametrize(("beta", "off"), [(1.0, 0.0), (0.3, 1e-12)])
def test_equal_models_give_the_probability_and_claim_nothing(beta: float, off: float) -> None:
    batch = Batch((text_of(*PROMPT), text_of(4, 3), text_of(9, 9)))
    result = score(batch, POSITIVE, model_of(course(0.05)), beta=beta)
    np.testing.assert_allclose(result["score"].values, result["p_positive"].values, rtol=off, atol=0)
    assert np.abs(result["lowering_nats"].values).max() <= off
    lowest, leaning, *beside = result.findings
    assert (lowest.value, lowest.ci95) == (0.0, (0.0, 0.0)) and "no contrast to see" in lowest.claim
    assert leaning.value == 0 and "as likely under" in leaning.claim
    for f in beside:
        assert "rank correlation" in f.claim and f.value == f.null


def test_without_the_negative_model_the_score_is_the_positive_probability() -> None:
    result = score(PROMPTS, POSITIVE, NEGATIVE, beta=0.0)
    assert np.array_equal(result["score"].values, result["p_positive"].values)
    assert "no contrast to see" in result.findings[0].claim


def test_given_texts_are_scored_from_their_second_token_on() -> None:
    """Scores of the same tokens do not depend on who wrote them; the first token has none."""
    batch = Batch((text_of(*PROMPT, *ANSWER), text_of(*PROMPT, RIGHT, FINE)))
    given = score(batch, POSITIVE, NEGATIVE, answer_from="given")
    written = score(PROMPTS, POSITIVE, NEGATIVE)
    assert given["token_id"].values.tolist() == [*PROMPT, *ANSWER, *PROMPT, RIGHT, FINE]
    first = given["pos"].values == 0
    for name in ("score", "p_positive", "p_negative", "lowering_nats", "probability", "order", "entropy_nats"):
        assert np.array_equal(np.isnan(given[name].values), first), name
    assert np.isnan(given["lens_logprob_nats"].values[:, first]).all() and (given["top_id"].values[first] == -1).all()
    for name in ("score", "p_positive", "probability", "entropy_nats", "sink_share"):
        assert np.array_equal(given[name].values[..., 2:6], written[name].values), name
    assert given["score"].values[9] == pytest.approx(1 - by_hand(1.0), rel=1e-5)
    assert given.findings[0].n_unit == "texts"


def test_given_texts_need_a_token_to_score() -> None:
    with pytest.raises(TextError, match="needs at least 2"):
        score(Batch((text_of(3),)), POSITIVE, NEGATIVE, answer_from="given")


def test_both_models_are_needed() -> None:
    (analysis,) = get_analyses(["contrastive-estimation"])
    job = Job(analysis, analysis.Params.parse({}, analysis.name))
    with pytest.raises(InputError, match="in the role 'negative'"):
        run_jobs([job], STUDY, PROMPTS, others={"positive": POSITIVE})


def test_long_texts_are_widened_piece_by_piece() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(size=(2, 150, 9)).astype(np.float32)
    targets = rng.integers(0, 9, 150)
    found = contrasted(positive, negative, targets, 1.0)
    p, q = (np.exp(z.astype(float)) / np.exp(z.astype(float)).sum(1, keepdims=True) for z in (positive, negative))
    each = (p**2 / q, p, q, q**2 / p)
    expected = [(w / w.sum(1, keepdims=True))[np.arange(150), targets] for w in each]
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-12)


def test_what_cannot_be_stays_impossible() -> None:
    """Tokens that both models rule out take no part in the sum."""
    one = np.array([[0.0, 1.0, -np.inf]], dtype=np.float32)
    other = np.array([[1.0, 0.0, -np.inf]], dtype=np.float32)
    expected = contrasted(one[:, :2], other[:, :2], np.array([1]), 1.0)
    assert np.array_equal(contrasted(one, other, np.array([1]), 1.0), expected)


def noisy(role: str, seed: int, strength: float = 1.0) -> Next:
    """A random language model, and noise on its logits that belongs to one role and seed."""

    def numbers(*what: Any) -> np.ndarray:
        digest = hashlib.sha256(repr(what).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=V)

    def after(ids: Sequence[int]) -> np.ndarray:
        weights = np.exp(1.5 * numbers("base", tuple(ids)) + strength * numbers(role, seed, tuple(ids)))
        return weights / weights.sum()

    return after


def random_texts(seed: int, n: int = 8, length: int = 12) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(tuple(text_of(*map(int, rng.integers(3, V, length))) for _ in range(n)))


def test_models_that_differ_by_chance_alone_are_not_claimed_to_contrast() -> None:
    """Score far below probability everywhere, yet no more than with the models exchanged: 95 % of intervals hold 0."""
    runs, missed = 40, 0
    for seed in range(runs):
        models = (model_of(noisy(role, seed)) for role in ("positive", "negative"))
        lowest = score(random_texts(seed), *models, answer_from="given").findings[0]
        low, high = lowest.ci95 or (0.0, 0.0)
        missed += not low <= 0 <= high
        assert ("no more than exchanging" in lowest.claim) == (low <= 0 <= high)
    assert missed <= 6, missed  # 40 intervals of 95 %: more than 6 misses have a probability of 0.3 %


def test_a_planted_contrast_is_claimed() -> None:
    """The same noise; in each text one token is disliked by the positive model and liked by the negative one."""
    found = 0
    for seed in range(10):
        rng, texts = np.random.default_rng(seed), random_texts(seed)
        where = {t.ids[:at]: t.ids[at] for t, at in zip(texts, rng.integers(3, 12, len(texts)), strict=True)}

        def pushed(role: str, by: float, seed: int = seed, where: dict[Any, int] = where) -> ScriptedModel:
            own = noisy(role, seed)

            def after(ids: Sequence[int]) -> np.ndarray:
                p = own(ids)
                if tuple(ids) in where:
                    p[where[tuple(ids)]] *= np.exp(by)
                return p / p.sum()

            return model_of(after)

        result = score(texts, pushed("positive", -4), pushed("negative", 4), answer_from="given")
        lowest = result.findings[0]
        found += lowest.ci95 is not None and lowest.ci95[0] > 0 and "more than with" in lowest.claim
        places = np.flatnonzero(result["order"].values == 0)
        ends = [t.ids[: p + 1] for t, p in zip(texts, result["pos"].values[places], strict=True)]
        assert sum(where.get(end[:-1]) == end[-1] for end in ends) >= 6, ends
    assert found == 10


def test_wrong_answers_are_told_from_right_ones() -> None:
    """Texts with the critical token are wrong; equal models lower neither."""
    wrong = [text_of(*PROMPT, first, CRITICAL, NO, END, answer="w10") for first in (LEFT, RIGHT, LEFT)]
    right = [text_of(*PROMPT, first, FINE, YES, END, answer="w10") for first in (LEFT, RIGHT)]
    batch = Batch((*wrong, *right, text_of(*PROMPT, LEFT, FINE, YES)))
    result = score(batch, POSITIVE, NEGATIVE, answer_from="given")
    assert result["right"].values.tolist()[:5] == [0, 0, 0, 1, 1] and np.isnan(result["right"].values[5])
    last = result.findings[-1]
    in_wrong, in_right = np.log(0.05 / by_hand(1.0)) / 5, np.log(0.95 / (1 - by_hand(1.0))) / 5
    assert last.value == pytest.approx(in_wrong - in_right, rel=1e-4)
    assert last.n == 5 and "3 wrong and 2 right" in last.claim and "more than" in last.claim
    same = score(batch, POSITIVE, POSITIVE, answer_from="given").findings[-1]
    assert same.value == 0 and same.ci95 == (0, 0) and "alike" in same.claim
    few = score(batch.select([0, 3, 5]), POSITIVE, NEGATIVE, answer_from="given").findings
    assert not any("right" in f.null_meaning for f in few)


def test_outcome_of_the_written_answer_is_compared_with_the_right_one() -> None:
    batch = Batch((text_of(*PROMPT, answer="w10"), text_of(*PROMPT, answer="w11"), text_of(*PROMPT)))
    right = score(batch, POSITIVE, NEGATIVE)["right"].values
    assert right[:2].tolist() == [0, 1] and np.isnan(right[2])


def test_rank_correlations_are_those_of_the_answers() -> None:
    batch = random_texts(3, n=6)
    models = [model_of(noisy(role, 3)) for role in ("positive", "negative", "study")]
    result = score(batch, *models, answer_from="given", k=3)
    text, here = result["text"].values, result["pos"].values > 0
    for finding, name in zip(result.findings[2:4], ("probability", "entropy_nats"), strict=True):
        each, alone = (
            [
                rank_correlation(result[of].values[here & (text == t)], result[name].values[here & (text == t)])
                for t in range(6)
            ]
            for of in ("score", "p_positive")
        )
        assert finding.value == pytest.approx(np.mean(each)) and finding.null == pytest.approx(np.mean(alone))
        assert finding.n == 6 and finding.ci95 is not None
    assert (
        "of the 18 lowest-scoring tokens" in result.findings[2].claim and "(4.91 by chance)" in result.findings[2].claim
    )


def test_corpus_index_and_order_of_given_texts_change_nothing() -> None:
    batch = random_texts(5, n=4)
    models = [model_of(noisy(role, 5)) for role in ("positive", "negative", "study")]
    batch = Batch(tuple(replace(t, answer="w10" if i % 2 else "w11") for i, t in enumerate(batch)))
    whole = score(batch, *models, answer_from="given")
    part = score(batch.select([3, 1]), *models, answer_from="given")
    assert np.array_equal(part["lowest_nats"].values, whole["lowest_nats"].values[[3, 1]])
    assert np.array_equal(part["right"].values, whole["right"].values[[3, 1]], equal_nan=True)
    assert part["text"].values.tolist() == [0] * 12 + [1] * 12


def test_answers_of_given_texts_begin_after_the_words_that_end_the_prompt() -> None:
    batch = Batch((text_of(*PROMPT, *ANSWER, answer="w11"), text_of(*PROMPT, RIGHT, FINE, YES, answer="w10")))
    given = score(batch, POSITIVE, NEGATIVE, answer_from="given", answer_after="w4")
    written = score(PROMPTS, POSITIVE, NEGATIVE)
    assert given["token_id"].values.tolist() == [*ANSWER, RIGHT, FINE, YES] and given["right"].values.tolist() == [1, 1]
    for name in ("score", "lowering_nats", "order", "lens_logprob_nats"):
        assert np.array_equal(given[name].values[..., :4], written[name].values), name
    for words, message in (("w12", "Text 0 does not contain 'w12'"), ("w10", "Text 1 ends with 'w10'")):
        texts = (text_of(3, 10, 4), text_of(3, 4, 10)) if words == "w10" else batch.texts
        with pytest.raises(TextError, match=message):
            score(Batch(tuple(texts)), POSITIVE, NEGATIVE, answer_from="given", answer_after=words)


def test_figures_show_the_lowest_token() -> None:
    for how in ({"answer_from": "given", "answer_after": "w4"}, {}):
        batch = Batch((text_of(*PROMPT, *(ANSWER if how else [])),))
        figures = score(batch, POSITIVE, NEGATIVE, **how).figures()
        assert {"strip", "along", "lowest", "against", "inside-lens", "inside-sinks"} <= set(figures)
        strip = figures["strip"]
        assert isinstance(strip, TokenStrip) and "positive 0.0500, negative 0.900" in strip.notes[-3]
        assert "w5" in figures["inside-lens"].title and "w5" in figures["inside-alternatives"].title
    unlikely = score(Batch((text_of(*PROMPT, *ANSWER),)), POSITIVE, NEGATIVE, answer_from="given")
    assert "not below its probability" in unlikely.findings[0].claim, "a token of the prompt, which is merely unlikely"
    assert unlikely.figures()["strip"].tokens[0] == " w3"
