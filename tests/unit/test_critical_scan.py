"""The rule for critical tokens, the lazy scan, shared measurements, and what is drawn in the place of a token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from probekit.core import Base, Batch, Branch, Branches, Continuation, Fork, Sampling, TokenText
from probekit.sampling import Contains, LastNumber, Pattern
from probekit.sampling.critical import (
    DRAWN,
    FINISHED,
    NOT_MEASURED,
    SHARED,
    BackwardScan,
    Rollouts,
    Scanned,
    WrongAnswer,
    critical_prefix,
    most_dead,
    scan_answers,
    stand_ins,
)
from probekit.sampling.replacing import kept_and_replaced, other_tokens, pass_at_k, random_places
from probekit.sampling.wrong_answers import Looking, finished_at, fresh_success, own_words, wrong_answers


@pytest.mark.parametrize(
    ("counts", "critical"),
    [
        ([9, 0, 0], 1),
        ([0, 9, 0], 2),  # the first candidate is discarded
        ([9, 0, 3, 0], 1),  # 3 of 64 discard nothing
        ([9, 0, 4, 0], 3),
        ([9, 0, 4, 2], 1),  # none is left: the last that was discarded
        ([0, 4, 0, 0, 4, 1], 2),
        ([0, 4, 2, 4, 1], 0),  # the last alive prefix discards nothing, the one before it does
        ([0, 0], 0),  # the answer's first token may be critical
        ([1, 2, 9], None),
        ([], None),
    ],
)
def test_the_rule_by_hand(counts: list[int], critical: int | None) -> None:
    assert critical_prefix(counts, most_dead(64)) == critical


def test_limits_are_the_same_share_for_any_number() -> None:
    """More than 3 of 64 is 6.25 % at least; so it is of 32, 16 and 128."""
    assert [most_dead(n) for n in (64, 32, 16, 8, 128)] == [3, 1, 0, 0, 6]
    assert all((most_dead(n) + 1) / n > 3 / 64 >= most_dead(n) / n for n in range(1, 300))


def random_counts(rng: np.random.Generator) -> list[int]:
    """Counts with zeros, small and large ones in all orders; the ends vary."""
    n = int(rng.integers(0, 14))
    return rng.choice([0, 0, 1, 3, 4, 9], n, p=rng.dirichlet(np.ones(6))).tolist()


def test_scanning_backward_finds_what_the_forward_rule_finds() -> None:
    rng = np.random.default_rng(0)
    found, fallbacks = Counter[int | None](), 0
    for _ in range(20_000):
        counts, scan = random_counts(rng), BackwardScan(3)
        for place in reversed(range(len(counts))):
            scan.see(place, counts[place])
        assert scan.critical == critical_prefix(counts, 3), counts
        found[scan.critical] += 1
        alive = [i for i, c in enumerate(counts) if c > 3]
        fallbacks += bool(alive and scan.critical is not None and scan.critical < alive[-1])
    assert found[None] > 100 and fallbacks > 500 and len(found) > 8


class Oracle:
    """Continuations whose outcomes are fixed beforehand: sample k of a prefix is right if k is among its successes."""

    def __init__(self, answers: list[WrongAnswer], right: list[np.ndarray]) -> None:
        self.answers, self.right, self.drawn = answers, right, set[tuple[int, int, int]]()

    def __call__(self, request: Branch) -> Branches:
        found = []
        for fork in request.forks:
            base = request.bases[fork.base]
            number = next(i for i, a in enumerate(self.answers) if a.base == base)
            at = fork.position - base.n_prompt - 1
            self.drawn |= {(number, at, k) for k in range(request.first, request.first + request.n)}
            some = self.right[number][at][request.first : request.first + request.n]
            found.append(tuple(_said(k, "yes" if ok else "no") for k, ok in enumerate(some)))
        return Branches(request, tuple(found))


def _said(sample: int, outcome: str) -> Continuation:
    return Continuation(sample, (1,), (0.0,), outcome, "end")


def converse(conversation: Any, reply: Any) -> Any:
    """Drive a conversation to its end; its value."""
    try:
        request = next(conversation)
        while True:
            request = conversation.send(reply(request))
    except StopIteration as stop:
        return stop.value


def random_answers(rng: np.random.Generator, n: int) -> tuple[list[WrongAnswer], list[np.ndarray]]:
    """Answers whose prefixes succeed at random rates, near-sure tokens among them, finished or not."""
    answers, right = [], []
    for i in range(int(rng.integers(1, 5))):
        length = int(rng.integers(1, 30))
        probs = rng.choice([1.0, 0.97, 0.5], length)
        finished = length - int(rng.random() < 0.7)
        stands = stand_ins(probs, 0.95, finished)
        rates = rng.choice([0.0, 0.0, 0.03, 0.3], length, p=rng.dirichlet(np.ones(4)))
        draws = rng.random((length, n)) < rates[:, None]
        answers.append(WrongAnswer(Base(tuple(range(100 * i, 100 * i + 2 + length)), 2), "yes", stands, finished))
        right.append(draws)
    return answers, right


def test_the_lazy_scan_finds_the_critical_token_of_complete_counts() -> None:
    """On random answers, several at a time: prefixes that share count like the one they share with."""
    rng, n = np.random.default_rng(1), 16
    rollouts = Rollouts(Sampling(), Contains(("yes", "no")), n)
    saved, cost = Counter[bool](), np.zeros(2)
    for _ in range(400):
        answers, right = random_answers(rng, n)
        oracle = Oracle(answers, right)
        for number, (answer, scanned) in enumerate(
            zip(answers, converse(scan_answers(answers, rollouts), oracle), strict=True)
        ):
            counts = right[number].sum(axis=1)
            counts[answer.finished :] = 0
            assert scanned.critical == critical_prefix(counts[answer.stands].tolist(), most_dead(n))
            _check_counts(scanned, answer, counts, n)
            saved[bool((scanned.how == NOT_MEASURED).any())] += 1
        cost += np.array([len(oracle.drawn), n * sum(a.finished for a in answers)])
    assert saved[True] > 100 and saved[False] > 100
    assert cost[0] < 0.5 * cost[1], "measuring every prefix would cost more than twice as much"


def _check_counts(scanned: Scanned, answer: WrongAnswer, counts: np.ndarray, n: int) -> None:
    """A prefix that counts as lost has all its draws; a measured one has no more right ones than there are."""
    places = np.arange(len(answer.stands))
    known = scanned.how != NOT_MEASURED
    assert np.array_equal(known, np.isfinite(scanned.share))
    assert set(scanned.how[known & (places >= answer.finished)]) <= {FINISHED}
    assert np.array_equal(scanned.how == SHARED, known & (answer.stands != places))
    lost = (scanned.how == DRAWN) & (scanned.right <= most_dead(n))
    assert np.array_equal(scanned.right[lost], counts[lost]) and set(scanned.drawn[lost]) <= {n}
    assert (scanned.right[known] <= counts[answer.stands][known]).all()


def test_a_whole_scan_measures_every_prefix_and_finds_the_same() -> None:
    rng, n = np.random.default_rng(2), 16
    for _ in range(100):
        answers, right = random_answers(rng, n)
        lazy, whole = (
            converse(scan_answers(answers, Rollouts(Sampling(), LastNumber(), n, every)), Oracle(answers, right))
            for every in (False, True)
        )
        assert [s.critical for s in lazy] == [s.critical for s in whole]
        assert all(np.isfinite(s.share).all() for s in whole)


def test_near_sure_tokens_share_a_measurement_up_to_a_bound() -> None:
    """0.97 * 0.98 exceeds 0.95, and one more 0.97 does not; a finished answer stands for itself and may be shared."""
    probs = np.array([0.3, 0.97, 0.97, 0.98, 0.5, 0.99])
    assert stand_ins(probs, 0.95, 6).tolist() == [0, 3, 3, 3, 5, 5]
    assert stand_ins(probs, 0.95, 3).tolist() == [0, 3, 3, 3, 4, 5]
    assert stand_ins(probs, 1.0, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert stand_ins(np.array([0.2]), 0.95, 0).tolist() == [0]


def test_tokens_in_the_place_of_one_follow_the_distribution_without_it() -> None:
    probs = np.array([0.6, 0.2, 0.15, 0.05])
    base = Base((7, 8), 1)
    drawn = other_tokens(np.log(probs), 0, 20_000, sampling=Sampling(), base=base)
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert shares == pytest.approx([0, 0.5, 0.375, 0.125], abs=0.012)
    assert other_tokens(np.log(probs), 0, 50, sampling=Sampling(), base=base).tolist() == drawn[:50].tolist(), (
        "more extend fewer"
    )
    assert (other_tokens(np.log(probs), 0, 50, sampling=Sampling(seed=1), base=base) != drawn[:50]).any()
    assert (other_tokens(np.log(probs), 0, 50, sampling=Sampling(), base=Base((7, 9), 1)) != drawn[:50]).any()
    cold = other_tokens(np.log(probs), 0, 20_000, sampling=Sampling(temperature=0.5), base=base)
    assert np.bincount(cold, minlength=4)[1] / len(cold) == pytest.approx(
        0.2**2 / (0.2**2 + 0.15**2 + 0.05**2), abs=0.012
    )
    assert set(other_tokens(np.log(probs), 0, 500, sampling=Sampling(top_p=0.8), base=base)) == {1, 2}
    assert set(other_tokens(np.log(probs), 0, 500, sampling=Sampling(top_p=0.1), base=base)) == {1}


def test_every_drawn_token_gets_a_continuation_of_its_own() -> None:
    """Repeated tokens take samples 0, 1, 2, … of their fork; the own token takes n."""
    base, drawn = Base((1, 2, 3), 1), {(0, 1): np.array([7, 7, 8, 7, 9, 7])}
    asked = Counter[tuple[int | None, int]]()

    def reply(request: Branch) -> Branches:
        found = []
        for fork in request.forks:
            numbers = range(request.first, request.first + request.n)
            asked.update((fork.token, k) for k in numbers)
            found.append(tuple(_said(k, f"{fork.token}:{k}") for k in numbers))
        return Branches(request, tuple(found))

    found = converse(kept_and_replaced((base,), drawn, sampling=Sampling(), outcome=LastNumber()), reply)
    kept, replaced = found[0, 1]
    assert kept == [f"2:{k}" for k in range(6)]
    assert replaced == ["7:0", "7:1", "8:0", "7:2", "9:0", "7:3"]
    assert max(asked.values()) == 1 and asked[8, 1] == 0


def test_random_places_are_uniform_and_more_extend_fewer() -> None:
    base, allowed = Base(tuple(range(12)), 2), np.array([1, 1, 1, 0, 1, 1, 1, 0, 0, 0], dtype=bool)
    places = random_places(base, 20, allowed, 0)
    assert sorted(places) == [0, 1, 2, 4, 5, 6]
    assert random_places(base, 2, allowed, 0) == places[:2]
    counts = Counter(random_places(base, 1, allowed, seed)[0] for seed in range(1200))
    assert all(abs(counts[at] - 200) < 60 for at in places), counts


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k([0, 1, 4], 4, 1) == pytest.approx([0, 0.25, 1])
    assert pass_at_k([0, 1, 2], 4, 2) == pytest.approx([0, 0.5, 1 - 1 / 6])
    assert pass_at_k([1], 4, 4) == pytest.approx([1])


def test_where_an_answer_is_finished_and_which_tokens_say_it() -> None:
    strings = ("5", " +", " 1", "3", " is", " ", "1", "8", ".", "<end>")
    ended = Continuation(0, tuple(range(10)), (0.0,) * 10, "18", "end")
    cut = Continuation(0, tuple(range(10)), (0.0,) * 10, "18", "length")
    assert finished_at(strings, ended, LastNumber()) == 9 and finished_at(strings, cut, LastNumber()) == 10
    assert finished_at(strings, cut, Pattern(r"is (\d+)")) == 8, "the point shows that the number is over"
    assert own_words(strings, "18", LastNumber()) == (6, 7)
    assert own_words(strings, "18", Pattern(r"is\s+(\d+)")) == (6, 7)
    assert own_words(strings, None, LastNumber()) == own_words(strings, "7", LastNumber()) == (-1, -1)
    assert own_words(("5",), "5", LastNumber()) == (0, 0)


def test_a_fork_leaves_after_the_token() -> None:
    answer = WrongAnswer(Base((1, 2, 3, 4), 2), "yes", np.arange(2), 2)
    assert answer.fork(5, 0) == Fork(5, 3) and answer.fork(0, 1) == Fork(0, 4)


def test_wrong_answers_are_greedy_ones_or_else_the_first_and_prompts_are_judged_by_others() -> None:
    """40 prompts, more than run together. Prompt i is answered rightly from sample i on, prompts 0 and 3 greedily too."""
    batch = Batch(tuple(TokenText((i, 1), ("a", "b")) for i in range(40)))
    looking = Looking(8, 0.2, False, Sampling(), Contains(("yes", "no")))
    asked: list[tuple[float, int, int]] = []

    def reply(request: Branch) -> Branches:
        asked.append((request.sampling.temperature, request.first, request.n))
        found = []
        for fork in request.forks:
            prompt, greedy = request.bases[fork.base].ids[0], request.sampling.temperature == 0
            numbers = range(request.first, request.first + request.n)
            right = greedy and prompt == 3
            found.append(tuple(_said(k, "yes" if right or k >= prompt else "no") for k in numbers))
        return Branches(request, tuple(found))

    tried = converse(wrong_answers(batch, ["yes"] * 40, looking), reply)
    assert tried.success[:9].tolist() == [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    assert np.flatnonzero(tried.enough).tolist() == list(range(7))
    assert sorted(tried.wrong) == [1, 2, 3, 4, 5, 6] and tried.greedy == {1, 2, 4, 5, 6}
    assert asked == [(1, 0, 8), (1, 0, 8), (0, 0, 1)], "two lots of prompts, then the greedy answers of seven"
    asked.clear()
    assert converse(fresh_success(batch.select([7, 12]), ["yes"] * 2, looking, 8), reply).tolist() == [1, 4 / 8]
    assert asked == [(1, 8, 8)], "not those by which prompts were chosen"
