"""Two scripted models whose distributions are known: where they differ, and what exchanging single tokens does."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import scripted

from probekit.analysis import Result
from probekit.backends.scripted import Script, ScriptedModel, random_play
from probekit.core import Base, Batch, Branch, Request, Sampling, TokenText
from probekit.engine import Job, run_jobs
from probekit.engine.branches import run_branch
from probekit.engine.journal import Journal
from probekit.phenomena.model_shift import ModelShift
from probekit.sampling import Contains
from probekit.sampling.crossing import Answer, Desk, Where, at_random, by_rule
from probekit.sampling.recovery import ARMS, difference, rule_for, shares

V, END = 16, 2
PROMPTS = tuple(itertools.product((3, 4, 14, 15), (0, 1, 3, 4)))
LEFT, RIGHT, TURN, UP, DOWN, GO, STAY, YES, NO = 5, 6, 7, 8, 9, 10, 11, 12, 13
Law = Callable[[Sequence[int]], np.ndarray]


def spread(**shares: float) -> np.ndarray:
    p = np.zeros(V)
    for name, share in shares.items():
        p[globals()[name]] = share
    return p


def turning(*, up: float) -> Law:
    """Fillers, now and then a turn; after a turn comes UP or DOWN, and only there do two such models differ."""

    def law(ids: Sequence[int]) -> np.ndarray:
        if len(ids) - 2 >= 20:
            return spread(END=1)
        return spread(UP=up, DOWN=1 - up) if ids[-1] == TURN else spread(LEFT=0.5, RIGHT=0.4, TURN=0.1)

    return law


def deciding(*, go: float) -> Law:
    """Ten tokens, of which the fourth decides what the ninth says; two such models differ at the fourth alone."""

    def law(ids: Sequence[int]) -> np.ndarray:
        written = list(ids[2:])
        if len(written) == 3:
            return spread(GO=go, STAY=1 - go)
        if len(written) == 8:
            return spread(YES=1) if GO in written else spread(NO=1)
        return spread(END=1) if len(written) >= 9 else spread(LEFT=0.6, RIGHT=0.4)

    return law


def model_of(law: Law) -> ScriptedModel:
    def play(text: TokenText) -> Script:
        with np.errstate(divide="ignore"):
            rows = np.log(np.maximum(np.stack([law(text.ids[: i + 1]) for i in range(len(text))]), 1e-30))
        return Script(np.stack([np.zeros_like(rows), rows]), random_play(2, 2, V)(text).pattern)

    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": V, "d_vocab": V}
    return scripted(play=play, unembedding=np.eye(V), writes=law, ends=frozenset({END}), **sizes)


def compared(model: Law, base: Law, *, prompts: int = 1, right: str = "", **params: Any) -> Result:
    texts = tuple(TokenText(ids, (f" w{ids[0]}", f" w{ids[1]}"), answer=right) for ids in PROMPTS[:prompts])
    how = {"answer_words": "w12,w13", "max_tokens": 24, "answers": 8} | params
    job = Job(ModelShift(), ModelShift.Params.parse(how, "model-shift"))
    return run_jobs([job], model_of(model), Batch(texts), others={"base": model_of(base)})["model-shift"]


def finding(result: Result, unit: str) -> Any:
    return next(f for f in result.findings if f.unit == unit)


def test_divergences_are_those_of_the_toy_and_lie_at_the_planted_tokens() -> None:
    """p = (0.9, 0.1), q = (0.1, 0.9) after a turn; equal elsewhere."""
    result = compared(turning(up=0.1), turning(up=0.9), answers=20)
    ids, text = result["token_id"].values, result["text"].values
    turned = np.concatenate([[False], (ids[:-1] == TURN) & (text[:-1] == text[1:]) & (ids[1:] != END)])
    assert 20 < turned.sum() < 60 and set(ids[turned]) <= {UP, DOWN}
    js, kl = 0.9 * np.log(1.8) + 0.1 * np.log(0.2), 0.8 * np.log(9)
    for name, value in {"js_nats": js, "kl_model_base_nats": kl, "kl_base_model_nats": kl}.items():
        assert result[name].values == pytest.approx(np.where(turned, value, 0), abs=1e-6), name
    delta = np.where(ids == DOWN, np.log(9), -np.log(9))
    assert result["delta_logprob_nats"].values == pytest.approx(np.where(turned, delta, 0), abs=1e-6)
    assert result["argmax_changed"].values.tolist() == turned.astype(int).tolist()
    entropy = -(0.5 * np.log(0.5) + 0.4 * np.log(0.4) + 0.1 * np.log(0.1))
    plain = ~turned & (ids != END)
    assert result["entropy_base_nats"].values[plain] == pytest.approx(entropy, abs=1e-6)
    assert result["js_cut_nats"].values == pytest.approx(np.where(turned, np.log(2), 0), abs=1e-6)
    shown = dict(zip(result["vocab"].values.tolist(), result["vocab_str"].values, strict=True))
    assert {shown[i] for i in result["model_top_id"].values[turned]} == {" w9"}
    assert {shown[i] for i in result["base_top_id"].values[turned]} == {" w8"}
    sparse, carriers = result.findings[:2]
    assert sparse.value == pytest.approx(1 - turned.mean()) and sparse.ci95[0] > sparse.null
    assert carriers.value == pytest.approx(min(1, 0.05 / turned.mean())) and carriers.ci95[0] > carriers.null
    assert ids[np.flatnonzero(text == carriers.where["text"])[carriers.where["pos"]]] in (UP, DOWN)
    assert carriers.n_unit == "answers"


def test_place_and_entropy_of_the_shift() -> None:
    """The fourth of ten tokens is the fourth tenth; it is as uncertain as planted."""
    result = compared(deciding(go=0.9), deciding(go=0.1), prompts=6)
    by_place = result["js_by_place"].values
    assert np.flatnonzero(by_place > 1e-6).tolist() == [3] and by_place[3] == pytest.approx(0.3681, abs=1e-3)
    assert (result["js_by_place_low"].values[3], result["js_by_place_high"].values[3]) == pytest.approx(
        [by_place[3]] * 2
    )
    first = finding(result, "× mean JS")
    assert first.value == 0 and first.null > 0.5 and first.ci95 == (0, 0) and first.n_unit == "prompts"
    uncertain = finding(result, "rank correlation")
    assert uncertain.null > 0.5 > 0 > uncertain.value, "noise follows the entropy, this shift does not"


def test_the_same_model_twice_is_silent() -> None:
    result = compared(turning(up=0.4), turning(up=0.4), prompts=5)
    for name in ("js_nats", "js_cut_nats", "kl_model_base_nats", "delta_logprob_nats", "argmax_changed"):
        assert not result[name].values.any(), name
    alike, forward, reverse = result.findings
    assert "say the same at every one" in alike.claim and alike.value == alike.null
    for one in (forward, reverse):
        assert one.value == 0 == one.null and "No token" in one.claim and "nowhere" in one.claim
    assert not result["switched"].values.any() and np.isnan(result["recovery"].values[[1, 2, 4, 5]]).all()
    assert all(drawing.title for drawing in result.figures().values())


@pytest.mark.parametrize("right", ["", "w12"])
def test_one_decisive_token_is_recovered_by_the_rule_and_not_at_random(right: str) -> None:
    result = compared(deciding(go=0.95), deciding(go=0.05), prompts=12, right=right, budget=1)
    share = dict(zip(ARMS, result["hit_share"].values, strict=True))
    alone, rule, random = ARMS[:3]
    assert share[alone] == pytest.approx(0.05, abs=0.09) and share[ARMS[3]] == pytest.approx(0.95, abs=0.09)
    assert share[rule] == pytest.approx(0.95, abs=0.09) and share[random] == pytest.approx(0.05 + 0.09, abs=0.12)
    assert share[ARMS[4]] == pytest.approx(0.05, abs=0.09) and share[ARMS[5]] == pytest.approx(0.95 - 0.09, abs=0.12)
    switched = result["switched"].values
    assert (switched[[1, 2, 4, 5]] == 1).all() and not switched[[0, 3]].any(), "one each, matched exactly"
    forward, reverse = result.findings[-2:]
    assert forward.value > 0.6 and forward.ci95[0] > 0 and reverse.value < -0.6 and reverse.ci95[1] < 0
    recovery = result["recovery"].values
    assert recovery[[1, 4]] == pytest.approx([1, 1], abs=0.15) and (recovery[[2, 5]] < 0.35).all()
    assert result["expected"].values.tolist() == ["w12"] * 12
    words = "are right" if right else "say what the model usually says"
    assert words in forward.claim and "of the gap" in forward.claim
    assert result["expected_given"].values.all() == bool(right)


def test_a_threshold_that_nothing_exceeds_and_no_budget_switch_nothing() -> None:
    for how in ({"theta": 0.6}, {"budget": 0}):
        result = compared(deciding(go=0.95), deciding(go=0.05), **how)
        assert not result["switched"].values.any() and not np.isnan(result["hit"].values).any()
        assert result["hit"].values[1].tolist() == result["hit"].values[0].tolist()
        assert "No token of the base's answers is drawn" in result.findings[-2].claim


def test_the_budget_sets_threshold_and_number() -> None:
    own = [np.arange(10) / 100, np.arange(10, 20) / 100]
    rule = rule_for(own, 0.1, 0.0)
    assert rule.budget == 1 and (np.concatenate(own) > rule.above).mean() == 0.1
    assert rule_for(own, 3, 0.0).budget == 3 and (np.concatenate(own) > rule_for(own, 3, 0.0).above).mean() == 0.3
    assert rule_for(own, 0.1, 0.05).above == 0.05 and rule_for(own, 0.0, 0.0).budget == 0


# The crossing policy against its enumeration.
# Two laws over three tokens and an end, unlike at some prefixes; S holds where they are, at most twice an answer.

A, B, C, STOP = 0, 1, 2, 3


def primary(ids: tuple[int, ...]) -> np.ndarray:
    table = {(): [0.5, 0.3, 0.2, 0.0], A: [0.6, 0.2, 0.1, 0.1], B: [0.1, 0.5, 0.2, 0.2], C: [0.3, 0.3, 0.2, 0.2]}
    return np.array(table[ids[-1] if ids else ()])


def intervening(ids: tuple[int, ...]) -> np.ndarray:
    table = {A: [0.1, 0.1, 0.5, 0.3], B: [0.4, 0.1, 0.4, 0.1]}
    return np.array(table[ids[-1]]) if ids and ids[-1] in table else primary(ids)


def fires(ids: tuple[int, ...]) -> bool:
    return bool(ids) and (ids[-1] == A or (ids[-1] == B and len(ids) % 2 == 0))


LONGEST, BUDGET = 5, 2


def enumerated() -> dict[tuple[int, ...], float]:
    """Probability of each complete answer, token by token."""
    found: Counter[tuple[int, ...]] = Counter()

    def write(ids: tuple[int, ...], used: int, probability: float) -> None:
        switch = used < BUDGET and fires(ids)
        for token, p in enumerate((intervening if switch else primary)(ids)):
            if p == 0:
                continue
            longer = (*ids, token)
            if token == STOP or len(longer) == LONGEST:
                found[longer] += probability * p
            else:
                write(longer, used + switch, probability * p)

    write((), 0, 1.0)
    assert sum(found.values()) == pytest.approx(1)
    return found


def toy(law: Callable[[tuple[int, ...]], np.ndarray]) -> ScriptedModel:
    return scripted(
        play=random_play(2, 2, 4), n_layers=2, n_heads=2, d_model=4, d_vocab=6, ends=frozenset({STOP}),
        writes=lambda ids: np.append(law(tuple(ids[1:])), [0.0, 0.0]),
    )  # fmt: skip


def played(conversation: Generator[Request, Any, Any], asked: list[Branch] | None = None) -> Any:
    """Run a conversation whose only requests are continuations, and keep them."""
    models, reply = {"base": toy(primary), "model": toy(intervening)}, None
    journals = {role: Journal(None, role) for role in models}
    try:
        while True:
            request = conversation.send(reply)
            assert isinstance(request, Branch)
            if asked is not None:
                asked.append(request)
            reply = run_branch(models[request.model], request, journals[request.model])
    except StopIteration as stop:
        return stop.value


def read(base: Base) -> Generator[Request, Any, np.ndarray]:
    yield from ()
    ids = base.ids[base.n_prompt :]
    return np.array([float(fires(ids[:i])) for i in range(len(ids))])


def crossed(n: int, seed: int = 0, where: Where | None = None) -> tuple[list[Answer], list[Answer]]:
    desk = Desk(((5,),), Sampling(LONGEST, seed=seed))
    drafts = played(desk.answers(n, "base"))
    chosen = where or by_rule(desk, read, above=0.5, budget=BUDGET)
    return drafts, played(desk.crossed(drafts, chosen, primary="base", other="model"))


def test_the_policy_is_exact() -> None:
    """Complete answers of the round-by-round sampler against the enumeration, by chi square over 8,000 draws."""
    from scipy.stats import chi2

    truth, n = enumerated(), 8_000
    drafts, answers = crossed(n)
    for found, law in ((answers, truth), (drafts, None)):
        counts = Counter(a.ids for a in found)
        if law is None:
            assert counts.keys() <= plain().keys()
            law = plain()
        assert counts.keys() <= law.keys()
        common = [ids for ids, p in law.items() if n * p >= 5]
        rest = 1 - sum(law[ids] for ids in common)
        statistic = sum((counts[ids] - n * law[ids]) ** 2 / (n * law[ids]) for ids in common)
        statistic += (sum(c for ids, c in counts.items() if ids not in common) - n * rest) ** 2 / (n * rest)
        assert chi2.sf(statistic, len(common)) > 1e-3, statistic
    other = Counter(a.ids for a in drafts)
    apart = sum(abs(other[ids] / n - p) for ids, p in truth.items()) / 2
    assert apart > 0.2, "the primary alone would not have passed"


def plain() -> dict[tuple[int, ...], float]:
    """The primary alone."""
    found: Counter[tuple[int, ...]] = Counter()
    for length in range(1, LONGEST + 1):
        for ids in itertools.product(range(4), repeat=length):
            if STOP in ids[:-1] or (length < LONGEST and ids[-1] != STOP):
                continue
            found[ids] += float(np.prod([primary(ids[:i])[t] for i, t in enumerate(ids)]))
    return {ids: p for ids, p in found.items() if p > 0}


def test_switches_lie_where_the_rule_says_first_come_first_served() -> None:
    for answer in crossed(500)[1]:
        expected = [i for i in range(len(answer.ids)) if fires(answer.ids[:i])][:BUDGET]
        assert list(answer.switched) == expected
        assert len(answer.ids) == LONGEST or answer.ids[-1] == STOP
    assert all(a.ids == b.ids for a, b in zip(*crossed(50, where=never), strict=True)), "without a switch, the drafts"


def never(answers: Sequence[Answer]) -> Generator[Request, Any, list[int | None]]:
    yield from ()
    return [None] * len(answers)


def test_answers_do_not_depend_on_how_many_there_are() -> None:
    few, many = crossed(20)[1], crossed(20)[1]
    assert few == many and crossed(20, seed=1)[1] != few


def test_no_two_draws_share_their_random_numbers() -> None:
    """Within a run of the policy, drafts included: every prefix and number at most once, whoever draws."""
    desk = Desk(((5,),), Sampling(LONGEST))
    for where in (by_rule(desk, read, above=0.5, budget=BUDGET), at_random(desk, {(0, i): 2 for i in range(400)})):
        asked: list[Branch] = []
        drafts = played(desk.answers(400, "base"), asked)
        played(desk.crossed(drafts, where, primary="base", other="model"), asked)
        seen = Counter(
            (r.bases[f.base].ids[: f.position], i)
            for r in asked
            for f in r.forks
            for i in range(r.first, r.first + r.n)
        )
        assert max(seen.values()) == 1 and len(seen) > 800


def test_the_usual_answer_is_chosen_by_answers_that_are_not_judged() -> None:
    """Of a fair coin, one answer each: chosen by itself it would always be as usual."""
    result = compared(deciding(go=0.5), deciding(go=0.5), prompts=16, answers=1)
    assert 0.1 < result["hit_share"].values[3] < 0.9
    assert set(result["expected"].values) == {"w12", "w13"}


def test_random_places_are_as_many_and_anywhere() -> None:
    desk = Desk(((5,),), Sampling(LONGEST))
    drafts = played(desk.answers(3000, "base"))
    counts = {(0, a.number): a.number % 3 for a in drafts}
    answers = played(desk.crossed(drafts, at_random(desk, counts), primary="base", other="model"))
    for answer in answers:
        wanted = counts[0, answer.number]
        assert list(answer.switched) == sorted(set(answer.switched))
        assert len(answer.switched) == wanted or answer.next_place == len(answer.ids), "no room was left"
    exact = np.mean([len(a.switched) == counts[0, a.number] for a in answers])
    assert exact > 0.75, exact
    for wanted, truth in ((1, [0.2] * 5), (2, [0.4, 0.3, 0.2, 0.1, 0])):
        long = [
            a.switched[0]
            for a, d in zip(answers, drafts, strict=True)
            if counts[0, a.number] == wanted and len(d.ids) == 5
        ]
        hits = np.bincount(long, minlength=5) / len(long)
        assert hits == pytest.approx(truth, abs=4 * np.sqrt(0.24 / len(long))), hits


def test_what_answers_say_is_read_off_their_tokens() -> None:
    desk = Desk(((5,),), Sampling(LONGEST))
    answers = [Answer(0, 0, (A, B, STOP)), Answer(0, 1, (C,)), Answer(0, 2, (A, B, STOP))]
    assert played(desk.said(answers, Contains(("w1", "w2")))) == ["w1", "w2", "w1"]


def test_recovery_by_hand_and_where_there_is_nothing_to_recover() -> None:
    rates = (0.0, 0.5, 0.25, 1.0, 0.5, 0.75)  # of the arms
    hit = np.stack([np.tile((np.arange(20) < 20 * rate).astype(float), (8, 1)) for rate in rates])  # arm, text, sample
    found = shares(hit)
    assert found.value == pytest.approx(rates) and found.recovery == pytest.approx([0, 0.5, 0.25, 0, 0.5, 0.25])
    rng = np.random.default_rng(0)
    alike = shares((rng.random((6, 8, 20)) < 0.5).astype(float))
    assert np.isnan(alike.recovery[[1, 2, 4, 5]]).all() and (alike.ends[0] < alike.value).all()
    unscored = hit.copy()
    unscored[:, :4] = np.nan
    assert shares(unscored).value == pytest.approx(rates), "prompts of which nothing is expected are left out"
    assert np.isnan(shares(np.full((6, 2, 2), np.nan)).value).all()


def test_differences_between_arms_have_an_interval_of_some_width() -> None:
    """Agresti and Min: 8 pairs that agree, 8 that all differ; and its coverage over 2,000 draws of 12 pairs."""
    assert difference(np.zeros(8), "answers").ci95 == pytest.approx((-1.96 * 0.1, 1.96 * 0.1), abs=1e-4)
    low, high = difference(np.ones(8), "prompts").ci95 or (0, 0)
    assert low == pytest.approx(0.8 - 1.96 * np.sqrt((0.9 - 0.64) / 10), abs=1e-4) and high == 1
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        found = difference(rng.choice([-1.0, 0.0, 1.0], 12, p=[0.1, 0.5, 0.4]), "answers")
        inside += found.ci95 is not None and found.ci95[0] <= 0.3 <= found.ci95[1]
    assert inside / 2000 > 0.93
    assert difference(np.array([0.5]), "prompts").ci95 is None
