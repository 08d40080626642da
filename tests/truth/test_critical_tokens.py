"""Critical tokens of a language model whose success rates can be enumerated: a trap that no continuation leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import run, scripted

from probekit.analysis import Result, get_analysis
from probekit.backends.scripted import Script, ScriptedModel, random_play
from probekit.core import Batch, InputError, TextError, TokenText
from probekit.plots import TokenStrip

V, ASK = 20, 3
TRAP, SAFE, YES, NO, END = 5, 6, 10, 11, 2  # after TRAP the answer is NO, after SAFE it is YES at the prompt's rate
LEFT, RIGHT = 7, 8  # change nothing
RATES = {12: 0.6, 13: 0.8, 14: 1.0}  # by the prompt's last token
EASY, HARD, NULL, LEAKY = 15, 16, 17, 18  # never wrong; never right; without a trap; TRAP leaves a small chance
IN_TRAP, NULL_RATE, LEAK = 0.52, 0.35, 0.02
NAME = "critical-tokens"
Next = Callable[[Sequence[int]], np.ndarray]


def after(ids: Sequence[int]) -> np.ndarray:
    """LEFT or RIGHT twice, TRAP or SAFE, LEFT or RIGHT twice, YES or NO, the end."""
    kind, written = ids[1], list(ids[2:])
    p = np.full(V, 1e-9)
    if len(written) == 2 and kind in (*RATES, LEAKY):
        p[[TRAP, SAFE]] = IN_TRAP, 1 - IN_TRAP
    elif len(written) < 5:
        p[[LEFT, RIGHT]] = 0.55, 0.45
    elif len(written) == 5:
        fixed = {EASY: 1.0, HARD: 0.0, NULL: NULL_RATE}
        in_trap = LEAK if kind == LEAKY else 0.0
        yes = fixed[kind] if kind in fixed else RATES.get(kind, 0.8) if SAFE in written else in_trap
        p[[YES, NO]] = yes + 1e-9, 1 - yes + 1e-9
    else:
        p[END] = 1.0
    return p / p.sum()


def model(next_: Next = after) -> ScriptedModel:
    """Logits are the toy's log-probabilities: the stream is as wide as the vocabulary, the unembedding the identity."""

    def play(text: TokenText) -> Script:
        rows = np.log(np.stack([next_(text.ids[: i + 1]) if i else np.ones(V) for i in range(len(text))]))
        return Script(np.stack([np.zeros_like(rows), rows]), random_play(2, 2, V)(text).pattern)

    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": V, "d_vocab": V}
    return scripted(play=play, unembedding=np.eye(V), writes=next_, ends=frozenset({END}), **sizes)


def prompts(*kinds: int, answer: str = "w10") -> Batch:
    return Batch(tuple(TokenText((ASK, kind), (f" w{ASK}", f" w{kind}"), answer=answer) for kind in kinds))


def find(batch: Batch, toy: ScriptedModel | None = None, **params: Any) -> Result:
    how = {"answer_words": "w10,w11", "max_tokens": 8, "tries": 16, "n": 32} | params
    return run(NAME, toy or model(), batch, **how)[NAME]


def test_the_token_that_enters_the_trap_is_critical_for_nearly_every_seed() -> None:
    """The greedy answer is LEFT LEFT TRAP LEFT LEFT NO; after its first two tokens, 0.48 times 0.8 are right."""
    places = []
    for seed in range(24):
        result = find(prompts(13), seed=seed, n=16, controls=1)
        assert result["token_id"].values.tolist() == [LEFT, LEFT, TRAP, LEFT, LEFT, NO, END]
        places += result["critical_place"].values.tolist()
    assert np.mean(np.array(places) == 2) >= 0.95, places


def test_shares_kept_and_replaced_are_those_of_the_toy() -> None:
    """With TRAP none is right; without it SAFE is drawn, and 0.8 are. A token before the trap changes nothing."""
    result = find(prompts(13), n=400, controls=4, sure=1.0)
    share, how = result["success_share"].values, result["how"].values
    assert share[2:].tolist() == [0] * 5 and how.tolist()[:2] == [0, 1] and how[-1] == 3
    assert share[1] == pytest.approx(0.48 * 0.8, abs=0.15)  # a quarter of the draws showed that it is alive
    kept, replaced = (result[name].mean("sample").values for name in ("kept_right", "replaced_right"))
    assert result["branch_place"].values[0] == 2 and result["branch_group"].values.tolist() == [0] + [1] * 4 + [2] * 4
    assert kept[0] == 0 and replaced[0] == pytest.approx(0.8, abs=0.06)
    assert set(result["replaced_id"].values[0]) == {SAFE}
    free = result["branch_group"].values == 1
    for place, k, r in zip(result["branch_place"].values[free], kept[free], replaced[free], strict=True):
        truth = 0.48 * 0.8 if place < 2 else 0.0
        assert (k, r) == pytest.approx((truth, truth), abs=0.08), place
    whole = find(prompts(13), whole=True, n=64, controls=1, sure=1.0)
    assert np.isfinite(whole["success_share"].values).all() and whole["critical_place"].values.tolist() == [2]
    clearest, compared, *_ = result.findings
    assert "token 2" in clearest.claim and "none of 400 fresh continuations are right" in clearest.claim
    assert clearest.value == pytest.approx(0.8, abs=0.06) and clearest.ci95 is not None and clearest.ci95[0] > 0.65
    assert compared.value == pytest.approx(0.8, abs=0.1) and compared.n == 1


def test_the_rule_counts_the_first_token_and_64_continuations() -> None:
    """A trap at the very first token is found there; the released code never looks at it."""

    def shifted(ids: Sequence[int]) -> np.ndarray:
        return after([*ids[:2], LEFT, LEFT, *ids[2:]])

    result = find(prompts(13), model(shifted), controls=1, **get_analysis(NAME).Params.presets["published"])
    assert result["critical_place"].values.tolist() == [0] and result.dataset.sizes["sample"] == 64
    assert result["drawn"].values[:2].tolist() == [64, 64]
    assert "from the prompt" in result.findings[0].claim


def test_null_where_nothing_is_decided_before_the_last_word() -> None:
    """Every token leads to the same rate: the wrong word itself is critical, and random tokens gain nothing."""
    gains, own = [], []
    for seed in range(16):
        result = find(prompts(NULL), seed=seed)
        assert result["critical_place"].values.tolist() == [5] and result["token_id"].values[5] == NO
        free = result["branch_group"].values == 1
        gains.append(result["gain"].values[free].mean())
        own.append(next(f for f in result.findings if f.unit == "share of critical tokens").value)
    assert np.mean(own) == 1
    assert abs(np.mean(gains)) < 3 * np.std(gains, ddof=1) / np.sqrt(len(gains))


def test_what_a_kept_token_leads_to_is_not_biased_by_the_choice() -> None:
    """TRAP leaves a chance of 2 %. The draws that chose a critical token are all wrong; those that are reported are not."""
    kept = []
    for seed in range(24):
        result = find(prompts(LEAKY), seed=seed, controls=1)
        if result["critical_place"].values[0] in (2, 3, 4):
            assert result["success_share"].values[result["critical"].values == 1] == 0
            kept.append(result["kept_right"].values[0])
    assert len(kept) > 10
    assert abs(np.mean(kept) - LEAK) < 3 * np.sqrt(LEAK / np.size(kept)) and np.mean(kept) > 0


def test_the_interval_of_the_difference_holds_the_truth_at_the_nominal_rate() -> None:
    """Prompts of three kinds, drawn anew for each seed: the gain is 0.8 on average, that of free tokens 0."""
    rng, inside, seeds, width = np.random.default_rng(0), 0, 24, []
    for seed in range(seeds):
        batch = prompts(*rng.choice(list(RATES), 6).tolist())
        result = find(batch, seed=seed, n=12, tries=8, controls=1, least_success=0.0)
        compared = next(f for f in result.findings if f.where.get("group") == "free")
        assert compared.ci95 is not None and compared.n_unit == "answers"
        inside += compared.ci95[0] <= np.mean(list(RATES.values())) <= compared.ci95[1]
        width.append(compared.ci95[1] - compared.ci95[0])
    assert inside / seeds >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / seeds), inside
    assert np.median(width) < 0.6


def test_prompts_without_a_critical_token_are_counted() -> None:
    batch = prompts(13, EASY, HARD, 14)
    result = find(batch, controls=1)
    assert result["status"].values.tolist() == [0, 1, 2, 0]
    assert sorted(set(result["text"].values.tolist())) == [0, 3]
    assert result["tried_success"].values[[1, 2]].tolist() == [1, 0]
    assert np.isfinite(result["prompt_success"].values).tolist() == [True, False, False, True]
    counted = result.findings[-1]
    assert "2 with a critical token; 1 never wrong; 1 too rarely right" in counted.claim and counted.value == 0.5
    lost = find(batch, controls=1, least_success=0.0)
    assert lost["status"].values.tolist() == [0, 1, 3, 0] and lost["critical_place"].values[2] == -1
    assert set(lost["text"].values.tolist()) == {0, 3}
    with pytest.raises(InputError, match=r"no wrong answer to look at .* of 1, 1 or less of 32 more"):
        find(prompts(HARD), least_success=0.0)


def test_unfinished_answers_are_wrong_only_if_asked_for() -> None:
    """A toy that puts YES off: cut off before it, an answer says nothing, and all its prefixes are still open."""

    def put_off(ids: Sequence[int]) -> np.ndarray:
        p = np.full(V, 1e-9)
        p[[END] if YES in ids else [LEFT, YES]] = 1.0 if YES in ids else (0.55, 0.45)
        return p / p.sum()

    how: dict[str, Any] = {"max_tokens": 5, "n": 16}
    with pytest.raises(InputError, match=r"no wrong answer to look at .*unfinished=true"):
        find(prompts(13), model(put_off), **how)
    result = find(prompts(13), model(put_off), unfinished=True, **how)
    assert result["token_id"].values.tolist() == [LEFT] * 5 and result["how"].values.tolist()[-1] == 1
    assert result["says"].values.tolist() == [""] and result["words_from"].values.tolist() == [-1]
    assert result["status"].values.tolist() == [4] and result["critical_place"].values.tolist() == [-1]
    assert result.dataset.sizes["branch"] == 0 and np.isnan(result["pass_share"].values).all()
    assert [f.claim for f in result.findings] == ["Of 1 prompt: 1 never lost."]
    assert all(d.title for d in result.figures().values())


def test_more_continuations_extend_fewer() -> None:
    few, many = (find(prompts(13), n=n, controls=1) for n in (16, 32))
    for name in ("kept_right", "replaced_right", "replaced_id"):
        assert np.array_equal(many[name].values[0, :16], few[name].values[0]), name


def test_pass_at_k_of_the_table() -> None:
    """By hand from the counts, places of an answer averaged first."""
    result = find(prompts(12, 13), n=16, controls=2)
    right = result["replaced_right"].values.sum(axis=1)
    crit = right[result["branch_group"].values == 0]
    assert result["pass_share"].sel(case="critical, replaced", threshold=1).item() == pytest.approx(crit.mean() / 16)
    assert result["pass_share"].sel(case="critical, kept", threshold=16).item() == 0
    assert result["threshold"].values.tolist() == [1, 2, 4, 8, 16]
    assert (result["pass_low"] <= result["pass_share"]).all() and (result["pass_share"] <= result["pass_high"]).all()


def test_the_comparison_is_paired_within_answers() -> None:
    result = find(prompts(12, 13, 14), n=16, controls=2)
    texts = result["text"].values[result["branch_place"].values]
    gain, group = result["gain"].values, result["branch_group"].values
    for number, name in ((1, "free"), (2, "any")):
        pairs = [
            gain[(texts == t) & (group == 0)].mean() - gain[(texts == t) & (group == number)].mean() for t in range(3)
        ]
        found = next(f for f in result.findings if f.where.get("group") == name)
        assert found.value == pytest.approx(np.mean(pairs)) and found.n == 3 and found.null == 0
        assert name == "any" or found.value != pytest.approx(gain[group == 0].mean()), "random tokens count"


def test_prompts_say_what_is_right() -> None:
    with pytest.raises(TextError, match="Text 1 does not say what a right answer"):
        find(Batch((*prompts(13), *prompts(13, answer=""))))
    assert find(prompts(13, answer=""), correct="w10", controls=1)["right_answer"].values.tolist() == ["w10"]
    with pytest.raises(TextError, match="'w9', and no answer is ever read as that"):
        find(prompts(13, answer="w9"))
    with pytest.raises(InputError, match="at temperature 0 all are the same"):
        find(prompts(13), temperature=0)


def test_figures_show_the_critical_token() -> None:
    result = find(prompts(13, 14))
    drawn = result.figures()
    assert {"strip", "rate", "alternatives", "pass", "gains", "places", "inside-lens", "prompts"} <= set(drawn)
    strip = drawn["strip"]
    assert isinstance(strip, TokenStrip) and strip.notes[2].startswith("critical; right: none of 32")
    assert strip.notes[6] == "the wrong answer is over"
