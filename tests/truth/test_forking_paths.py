"""Forking paths on a language model whose outcomes can be enumerated, and on released draws' definitions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers import run, scripted
from scipy.special import gammaln

from probekit.analysis import Result
from probekit.backends.scripted import Script, ScriptedModel, random_play
from probekit.core import Base, Batch, Branch, Fork, InputError, Sampling, TokenText
from probekit.engine.branches import run_branch
from probekit.engine.journal import Journal
from probekit.sampling import Alternative, Contains, ForkMap, Position, distance, find_changes, sampled_until
from probekit.stats import wilson

V, PROMPT = 16, (3, 4)
GO, STAY, YES, NO, END = 5, 6, 10, 11, 2  # after GO the answer is YES with 0.9, after STAY with 0.1
LEFT, RIGHT = 7, 8  # change nothing
TRUTH = {(): 0.6 * 0.9 + 0.4 * 0.1, (GO,): 0.9, (STAY,): 0.1}  # probability of YES


def after(ids: Sequence[int]) -> np.ndarray:
    """The toy's next-token distribution: one fork, two fillers, the answer, the end."""
    written, p = list(ids[len(PROMPT) :]), np.full(V, 1e-9)
    if not written:
        p[[GO, STAY]] = 0.6, 0.4
    elif len(written) < 3:
        p[[LEFT, RIGHT]] = 0.55, 0.45
    elif len(written) == 3:
        yes = TRUTH[(written[0],)] if written[0] in (GO, STAY) else 0.5
        p[[YES, NO]] = yes, 1 - yes
    else:
        p[END] = 1.0
    return p / p.sum()


def play(text: TokenText) -> Script:
    """Logits are the toy's log-probabilities: the stream is as wide as the vocabulary, the unembedding the identity."""
    rows = np.log(np.stack([after(text.ids[: i + 1]) for i in range(len(text))]))
    script = random_play(2, 2, V)(text)
    return Script(np.stack([np.zeros_like(rows), rows]), script.pattern)


def toy() -> ScriptedModel:
    return scripted(
        play=play,
        n_layers=2,
        n_heads=2,
        d_model=V,
        d_vocab=V,
        unembedding=np.eye(V),
        writes=after,
        ends=frozenset({END}),
    )


def find(**params: Any) -> Result:
    batch = Batch((TokenText(PROMPT, (" w3", " w4")),))
    how = {"answer_words": "w10,w11", "max_tokens": 8, "n": 50, "most": 200, "width": 0.05} | params
    return run("forking-paths", toy(), batch, **how)["forking-paths"]


def test_the_planted_fork_is_found() -> None:
    """The greedy answer is GO LEFT LEFT YES; STAY in the place of GO turns it round, fillers change nothing."""
    result = find()
    assert result["token_id"].values.tolist() == [GO, LEFT, LEFT, YES, END]
    assert result["case"].values.tolist() == ["w10", "w11"] and result["answer_case"].values.tolist() == [0]
    decisive, forks, settled, survival = result.findings
    assert (decisive.where["pos"], decisive.where["token"]) == (0, "␣w6")
    assert decisive.value == pytest.approx(0.8 * np.sqrt(2), abs=0.15) and decisive.ci95 is not None
    assert decisive.ci95[0] > decisive.null
    assert forks.where["n_forks"] == 2, "the fork, and the answer's own word"
    assert result["hazard"].values == pytest.approx([0.4, 0, 0, 0.1, 0], abs=1e-6)
    assert survival.value == pytest.approx(0.6 * 0.9, abs=1e-6)
    assert settled.unit == "share of answers"


def test_outcomes_ahead_are_those_of_the_toy() -> None:
    """o_t against its exact value at every position; skipped positions take the next one's, the end the answer's own."""
    share = find(most=2000, n=2000)["outcome_share"].sel(case="w10").values
    assert share == pytest.approx([TRUTH[()], 0.9, 0.9, 0.9, 1.0], abs=0.03)
    wide = find(spacing=3, most=2000, n=2000)  # positions 0 and 3
    assert wide["sampled"].values.tolist() == [1, 0, 0, 1, 0]
    assert wide["outcome_share"].sel(case="w10").values == pytest.approx([0.58, 0.9, 0.9, 0.9, 1.0], abs=0.03)


def test_intervals_hold_the_truth_at_the_nominal_rate() -> None:
    """Wilson intervals of the share of YES after each token, over 300 seeds, fixed numbers of samples."""
    base = Base((*PROMPT, GO, LEFT, LEFT, YES, END), len(PROMPT))
    forks = {Fork(0, 2): TRUTH[()], Fork(0, 2, GO): 0.9, Fork(0, 2, STAY): 0.1, Fork(0, 5, NO): 0.0}
    inside, n, seeds = dict.fromkeys(forks, 0), 40, 300
    for seed in range(seeds):
        request = Branch((base,), tuple(forks), n, sampling=Sampling(8, seed=seed), outcome=Contains(("w10", "w11")))
        found = run_branch(toy(), request, Journal(None, "toy"))
        for fork, truth in forks.items():
            low, high = wilson(sum(o == "w10" for o in found.outcomes(fork)), n)
            inside[fork] += low <= truth <= high
    rates = {fork: k / seeds for fork, k in inside.items()}
    for fork, rate in rates.items():
        assert rate >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / seeds), (fork, rate)  # Wilson may cover more
    assert rates[Fork(0, 2)] < 1


def test_tokens_weigh_what_they_do_at_the_temperature_of_the_draws() -> None:
    """At temperature 0.5, probabilities are squared and divided by their sum: 0.6 and 0.4 become 0.69 and 0.31."""
    result = find(temperature=0.5)
    assert result["hazard"].values == pytest.approx([0.16 / 0.52, 0, 0, 0, 0], abs=1e-6), (
        "NO has 0.012 now, below p_min"
    )
    assert result["sampled"].values.tolist() == [1, 1, 1, 0, 0]
    yes = 0.81 / 0.82
    ahead = [(0.36 * yes + 0.16 * (1 - yes)) / 0.52, yes, yes]
    assert result["outcome_share"].sel(case="w10").values[:3] == pytest.approx(ahead, abs=0.06)
    with pytest.raises(InputError, match="nothing forks; give a temperature above 0"):
        find(temperature=0.0)


def test_what_few_continuations_give_by_chance_does_not_decide() -> None:
    """Equal probabilities: 0.5 apart on 4 continuations each weighs less than 0.45 apart on 1,000; by hand."""
    import xarray as xr

    from probekit.phenomena.forking_paths import _weight

    share = [
        [0.75, 0.25],
        [0.75 - 0.5 / 2**0.5, 0.25 + 0.5 / 2**0.5],
        [0.75, 0.25],
        [0.75 - 0.45 / 2**0.5, 0.25 + 0.45 / 2**0.5],
    ]
    data = xr.Dataset(
        {
            "branch_place": ("branch", [0, 0, 1, 1]),
            "branch_id": ("branch", [5, 6, 7, 8]),
            "branch_prob": ("branch", [0.6, 0.3, 0.6, 0.3]),
            "branch_n": ("branch", [4, 4, 1000, 1000]),
            "branch_distance": ("branch", [0.0, 0.5, 0.0, 0.45]),
            "branch_share": (("branch", "case"), share),
            "token_id": ("token", [5, 7]),
        }
    )

    class Like:
        dataset = data

        def __getitem__(self, name: str) -> xr.DataArray:
            return data[name]

    weight = _weight(Like())  # type: ignore[arg-type]
    p = share[1][0]
    noise = (2 * 0.75 * 0.25 + 2 * p * (1 - p)) / 3
    assert weight[1] == pytest.approx(0.3 * np.sqrt(max(0.25 - noise, 0))) and weight[1] < weight[3]
    assert weight[3] == pytest.approx(0.3 * 0.45, abs=0.001)


def test_a_text_without_plausible_alternatives_is_silent() -> None:
    result = find(p_min=0.5, max_tokens=3)
    assert result.dataset.sizes["branch"] == 0 and result["survival"].values[-1] == 1
    decisive, forks, settled, _ = result.findings
    assert decisive.value == forks.value == 0 and "only one token is plausible" in decisive.claim
    assert "beyond doubt" in settled.claim
    for drawing in result.figures().values():
        assert drawing.title


def test_more_samples_than_at_first_are_needed() -> None:
    with pytest.raises(InputError, match="less than the 50"):
        find(most=10)


def test_adaptive_rounds_stop_where_enough_is_known() -> None:
    """A sure token needs few samples, a fifty-fifty one the most; nobody gets more than `most`."""
    base = Base((*PROMPT, GO, LEFT, LEFT, YES, END), len(PROMPT))
    request = Branch((base,), (Fork(0, 5, NO), Fork(0, 2)), 10, sampling=Sampling(8), outcome=Contains(("w10", "w11")))
    conversation, reply, asked = sampled_until(request, most=160, width=0.14), None, []
    try:
        while True:
            wanted = conversation.send(reply)
            asked.append((wanted.first, wanted.n, len(wanted.forks)))
            reply = run_branch(toy(), wanted, Journal(None, "toy"))
    except StopIteration as stop:
        draws = stop.value
    assert asked[0] == (0, 10, 2) and all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(asked))
    assert len(draws[Fork(0, 5, NO)]) == 10 and 40 <= len(draws[Fork(0, 2)]) <= 160
    assert [c.sample for c in draws[Fork(0, 2)]] == list(range(len(draws[Fork(0, 2)])))


def position(index: int, *branches: tuple[float, str]) -> Position:
    return Position(index, tuple(Alternative(i, p, tuple(said)) for i, (p, said) in enumerate(branches)))


def test_probabilities_of_tokens_do_not_make_forks() -> None:
    """Two tokens with the same outcomes and different probabilities do not fork (the released code says they do)."""
    same = ForkMap((position(0, (0.9, "AAAB"), (0.06, "AABA")), position(1, (0.5, "AAAA"), (0.4, "BBBB"))))
    assert [f.tolist() for f in same.forked(0.1)] == [[False, False], [False, True]]
    assert same.hazard(0.6) == pytest.approx([0, 4 / 9]) and same.survival(0.6) == pytest.approx([1, 5 / 9])


def test_distributions_by_hand() -> None:
    forks = ForkMap((position(0, (0.6, "AABB"), (0.2, "BBBB")), position(3, (0.3, "AAAA"))))
    assert forks.categories == ("A", "B")
    assert forks.distributions == pytest.approx(np.array([[0.375, 0.625], [1, 0]]))
    assert forks.drift("l2") == pytest.approx([0, 0.625 * np.sqrt(2)]) and forks.drift("l1")[1] == pytest.approx(1.25)
    assert forks.counts().sum(axis=1) == pytest.approx([1 / (0.75**2 / 4 + 0.25**2 / 4), 4])


def test_rare_answers_and_silence_are_other() -> None:
    said = ("A",) * 18 + (None, "C")
    forks = ForkMap((Position(0, (Alternative(1, 0.9, said),)),))
    assert forks.categories == ("A", "other") and forks.distributions == pytest.approx(np.array([[0.9, 0.1]]))
    assert ForkMap((Position(0, (Alternative(1, 0.9, (None,)),)),)).categories == ("other",)
    with pytest.raises(InputError, match="needs positions"):
        ForkMap(())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l1", 2.0),
        ("l2", np.sqrt(2)),
        ("cosine", 1.0),
        ("js", np.log(2)),
        ("kl", (1 - 0) * np.log(1 / 1e-4) + 1e-4 * np.log(1e-4)),
    ],
)
def test_distances_of_opposites(kind: Any, expected: float) -> None:
    one, two = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert distance(one, two, kind) == pytest.approx(expected) and distance(one, one, kind) == pytest.approx(0)


def _log_marginal(counts: np.ndarray) -> float:
    k, total = counts.shape[1], counts.sum(axis=0)
    return float(gammaln(1 + total).sum() + gammaln(k) - gammaln(k + total.sum()))


@pytest.mark.parametrize(("n", "k"), [(9, 3), (8, 2), (5, 4)])
def test_change_points_equal_an_enumeration(n: int, k: int) -> None:
    """Evidence and posterior against the sum over all segmentations."""
    counts = np.random.default_rng(0).multinomial(10, [1 / k] * k, size=n)
    found = find_changes(counts, most=3, shortest=2)
    evidence, places = [], np.zeros(n)
    for m in range(4):
        terms = []
        for cuts in itertools.combinations(range(1, n), m):
            ends = [0, *cuts, n]
            if min(b - a for a, b in itertools.pairwise(ends)) >= 2:
                terms.append((cuts, sum(_log_marginal(counts[a:b]) for a, b in itertools.pairwise(ends))))
        if not terms:
            break
        values = np.array([v for _, v in terms])
        evidence.append(np.logaddexp.reduce(values) - np.log(len(values)))
        for cuts, v in terms:
            places[list(cuts)] += np.exp(v - np.logaddexp.reduce(values)) * np.exp(evidence[-1])
    assert found.log_evidence == pytest.approx(evidence)
    assert found.posterior == pytest.approx(places / np.exp(evidence[1:]).sum())


def test_a_planted_change_is_found_and_none_is_not() -> None:
    rng = np.random.default_rng(0)
    counts = np.concatenate([rng.multinomial(30, [0.9, 0.1], 10), rng.multinomial(30, [0.2, 0.8], 15)])
    found = find_changes(counts)
    assert found.odds > 1e6 and found.best == 10
    alarms = [find_changes(np.random.default_rng(s).multinomial(30, [0.6, 0.3, 0.1], 40)).odds > 9 for s in range(60)]
    assert sum(alarms) <= 3
    assert find_changes(np.ones((1, 2))).odds == 0 and find_changes(np.ones((1, 2))).best == -1
    few = [find_changes(np.random.default_rng(s).multinomial(20, [0.6, 0.4], 4)).odds > 9 for s in range(200)]
    assert sum(few) <= 10, "four positions are enough to look, and no change is found where none is"
    short = find_changes(np.array([[12, 8], [11, 9], [20, 0]]))
    assert short.odds > 9 and short.best == 2


def test_what_follows_the_last_fork_belongs_to_the_course() -> None:
    """Two positions with a half of A each; after the answer's own token at the second, A alone; by hand."""
    forks = ForkMap((position(0, (0.5, "AAAA"), (0.5, "BBBB")), position(1, (0.5, "AAAAA"), (0.5, "BBBBB"))))
    assert forks.categories == ("A", "B")
    assert forks.course() == pytest.approx(np.array([[4, 4], [5, 5], [5, 0]]))
