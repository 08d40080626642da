"""Forking tokens on language models whose forks and entropies are planted, and the statistics by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import run, scripted
from scipy.stats import hypergeom

from probekit.analysis import Result
from probekit.backends.scripted import Script, ScriptedModel, random_play
from probekit.core import Batch, InputError, TokenText
from probekit.sampling import Alternative, ForkMap, Position
from probekit.sampling.fork_labels import (
    auroc,
    auroc_estimate,
    effective,
    fork_label,
    newcombe,
    rule,
    share_estimate,
    stratified,
)
from probekit.sampling.minority import between, carried, cuts, high_entropy, n_of, token_types

V, END = 32, 31
FORKS, LENGTH = (2, 6), 10  # places of the answer that decide, and how many there are before its last word
A, B, LEFT, RIGHT = 20, 21, 7, 8
WORDS = (10, 11, 12, 13)  # what the answer says: one for each way through the two forks
Split = Callable[[Sequence[int]], float]  # probability of the first of two tokens


def toy(split: Split) -> ScriptedModel:
    """Two forks and eight fillers, each a choice of two tokens; then a word that the forks determine; then the end."""

    def after(ids: Sequence[int]) -> np.ndarray:
        written, p = list(ids[2:]), np.full(V, 1e-13)
        place = len(written)
        if place < LENGTH:
            p[[A, B] if place in FORKS else [LEFT, RIGHT]] = split(ids), 1 - split(ids)
        elif place == LENGTH:
            p[WORDS[2 * (written[FORKS[0]] == A) + (written[FORKS[1]] == A)]] = 1
        else:
            p[END] = 1
        return p / p.sum()

    def play(text: TokenText) -> Script:
        rows = np.log(np.stack([after(text.ids[: i + 1]) for i in range(len(text))]))
        script = random_play(2, 2, V)(text)
        return Script(np.stack([np.zeros_like(rows), rows]), script.pattern)

    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": V, "d_vocab": V}
    return scripted(play=play, unembedding=np.eye(V), writes=after, ends=frozenset({END}), **sizes)


def planted(ids: Sequence[int]) -> float:
    """Forks have the highest entropy: 50 to 50 against 90 to 10."""
    return 0.5 if len(ids) - 2 in FORKS else 0.9


def unrelated(seed: int) -> Split:
    """Entropy depends on what was written, not on whether a token decides."""

    def split(ids: Sequence[int]) -> float:
        return 0.5 + 0.4 * hashlib.sha256(repr((seed, tuple(ids))).encode()).digest()[0] / 255

    return split


def find(split: Split = planted, prompts: Sequence[int] = (3, 4), **params: Any) -> Result:
    batch = Batch(tuple(TokenText((i, 30), (f" w{i}", " w30")) for i in prompts))
    words = ",".join(f"w{w}" for w in WORDS)
    how = {"answer_words": words, "max_tokens": 14, "answers": 5, "n_sampled": 24, "n": 12, "most": 12} | params
    return run("forking-tokens", toy(split), batch, **how)["forking-tokens"]


def test_planted_forks_are_told_by_their_entropy() -> None:
    """Everything is known: 10 answers of 12 tokens, 20 forks among 100 positions, the minority holds 24 tokens."""
    result = find(n_sampled=100, n=40, most=40)
    where = np.isin(result["pos"].values, FORKS)
    assert (result.dataset.sizes["token"], result.dataset.sizes["text"]) == (120, 10)
    assert np.array_equal(result["fork"].values == 1, where)
    assert np.isnan(result["fork"].values[result["pos"].values >= LENGTH]).all(), "one plausible token"
    assert result["weight"].values.sum() == 100 and set(result["n_plausible"].values) == {1, 2}
    assert result["minority"].values.sum() == 24 and result["minority"].values[where].all()
    predicts, recall, precision, forks, concentrated, _ = result.findings
    assert predicts.value == 1 and "better than chance" in predicts.claim and predicts.ci95 is not None
    assert 0.5 < predicts.ci95[0] < 1, "no interval of width 0"
    assert (recall.value, recall.null) == pytest.approx((1, 0.24))
    assert (precision.value, precision.null) == pytest.approx((20 / 24, 0.2))
    assert forks.value == pytest.approx(0.2) and forks.null < 0.05
    low, high = (-(p * np.log(p)).sum() for p in (np.array([0.9, 0.1]), np.array([0.5, 0.5])))
    assert result["entropy_nats"].values[where] == pytest.approx(high, abs=1e-5)
    assert concentrated.value == pytest.approx((20 * high + 4 * low) / (20 * high + 80 * low), abs=1e-4)
    assert concentrated.where["cut_nats"] == pytest.approx(low, abs=1e-4)
    assert result["branch_distance"].values.max() == pytest.approx(1, abs=0.45)


def test_a_sample_of_the_positions_is_weighed_to_stand_for_all() -> None:
    """24 of 100: a dozen from inside the minority, where 20 of 24 fork, and a dozen from the 76 outside."""
    result = find(n_sampled=24)
    weight = result["weight"].values
    assert (weight > 0).sum() == 24 and weight.sum() == pytest.approx(100)
    inside = result["minority"].values == 1
    assert weight[inside].sum() == pytest.approx(24) and weight[~inside].sum() == pytest.approx(76)
    _, recall, precision, forks, *_ = result.findings
    assert (recall.value, recall.null) == pytest.approx((1, 0.24))
    assert precision.value == pytest.approx(20 / 24, abs=0.2) and forks.value == pytest.approx(0.2, abs=0.06)
    assert {str(n)[:5] for n in np.array(result.figures()["strip"].notes)[weight > 0]} <= {"FORK:", "no fo"}  # type: ignore[union-attr]


def test_entropy_that_has_nothing_to_do_with_forks_is_silent() -> None:
    """Alarms at no more than the nominal rate, AUROC 0.5 and recall at chance on average."""
    alarms, values, excess, seeds = 0, [], [], 24
    for seed in range(seeds):
        result = find(unrelated(seed), (3, 4, 5, 6, 7), seed=seed, answers=2, n_sampled=30, n=8, most=8)
        predicts, recall, *_ = result.findings
        assert predicts.ci95 is not None
        alarms += not predicts.ci95[0] <= 0.5 <= predicts.ci95[1]
        values.append(predicts.value)
        excess.append(recall.value - recall.null)
    assert alarms / seeds <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / seeds)
    for found, truth in ((values, 0.5), (excess, 0.0)):
        assert np.mean(found) == pytest.approx(truth, abs=3 * np.std(found) / np.sqrt(seeds))


def test_what_cannot_be_told_is_not_told() -> None:
    """No forks, hardly any, and no plausible alternatives at all."""
    none = find(answer_words="never said")
    assert "could not be told: only 0 forks among 24" in none.findings[0].claim
    assert none.findings[0].value == 0.5 and none.findings[0].ci95 == (0, 1)
    assert "forks" not in {f.unit for f in none.findings} and len(none.findings) == 5
    alone = find(lambda ids: 1 - 1e-9)
    assert "at no token of the answers is another one plausible" in alone.findings[0].claim
    assert alone.dataset.sizes["branch"] == 0 and len(alone.findings) == 3
    noisy = find(epsilon=0.05, n=2, most=2)
    assert "could not be told" in noisy.findings[0].claim and "would by chance" in noisy.findings[0].claim
    for result in (none, alone, noisy):
        for name, drawing in result.figures().items():
            assert drawing.title and drawing.alt, name


def test_entropy_is_that_of_the_temperature_of_the_draws() -> None:
    """At T = 0.5 the odds of 9 to 1 are 81 to 1: a filler has an alternative only where the rare token was drawn."""
    result = find(temperature=0.5, n_sampled=30)
    p = np.array([81, 1]) / 82
    fillers = result["entropy_nats"].values[~np.isin(result["pos"].values, FORKS) & (result["pos"].values < LENGTH)]
    assert fillers == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
    rare = result["token_id"].values == RIGHT
    assert np.array_equal(result["n_plausible"].values > 1, rare | np.isin(result["pos"].values, FORKS))
    own = result["probability"].values[result["pos"].values == 0]
    assert own == pytest.approx(np.where(result["token_id"].values[result["pos"].values == 0] == LEFT, *p), abs=1e-5)
    with pytest.raises(InputError, match="temperature"):
        find(temperature=0)
    with pytest.raises(InputError, match="less than the 12"):
        find(most=4)


def test_the_cut_is_one_for_all_answers() -> None:
    """Answers to one prompt have no entropy, so the minority lies in those to the other."""
    result = find(lambda ids: 0.6 if ids[0] == 3 else 0.97, share=0.2)
    prompt = result["prompt"].values[result["text"].values.astype(int)]
    assert set(prompt[result["minority"].values == 1]) == {0} and result["minority"].values.sum() == 24


def test_words_with_high_and_low_entropy() -> None:
    """The forks' tokens have the highest mean, the end has none; the share of variance is above its null."""
    result = find(prompts=(3, 4, 5, 6, 7), answers=4, n_sampled=4)
    table = dict(zip(result["vocab"].values.tolist(), result["word_mean"].values, strict=True))
    assert table[A] == pytest.approx(np.log(2), abs=1e-4) and table[LEFT] == pytest.approx(0.325, abs=1e-3)
    assert table[END] == pytest.approx(0, abs=1e-5) and np.isnan(table[30])
    types = result.findings[-1]
    assert types.value > 0.99 and types.null < 0.3 and types.n_unit == "prompts" and types.n == 5
    assert "highest '␣w20'" in types.claim or "highest '␣w21'" in types.claim


def test_top_share_and_its_cut_by_hand() -> None:
    values = np.array([0.0, 3, 1, 1, 2, 1, 0, 0, 0, 5])
    assert high_entropy(values, 0.4).nonzero()[0].tolist() == [1, 2, 4, 9], "of the ties at 1 the first is in"
    assert high_entropy(values, 0.01).sum() == 1 and n_of(0.07, 100) == 7 and n_of(0.2, 11) == 3
    grid = cuts(values, np.array([0.1, 0.2, 0.4, 0.45, 1.0]))
    assert grid.tolist() == [5, 3, 1, 1, 0]
    assert carried(values, 0.2) == pytest.approx(8 / 13) and np.isnan(carried(np.zeros(3), 0.2))
    rng = np.random.default_rng(0)
    curve = cuts(rng.gamma(0.3, size=1000), np.arange(1, 101) / 100)
    assert (np.diff(curve) <= 0).all()


def test_types_without_an_effect_are_silent() -> None:
    """Entropies that have nothing to do with types: shuffled and real shares agree, 5 % of means lie outside."""
    outside, shares = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ids, values, unit = rng.integers(0, 20, 800), rng.gamma(0.5, size=800), np.arange(800) // 40
        found = token_types(ids, values, unit, least=10, n_unit="answers", seed=seed)
        assert found is not None
        outside += ((found.mean < found.null_low) | (found.mean > found.null_high)).tolist()
        shares.append(found.explained.value - found.explained_null)
    assert np.mean(outside) == pytest.approx(0.05, abs=0.03)
    assert np.mean(shares) == pytest.approx(0, abs=3 * np.std(shares) / np.sqrt(30))


def test_type_table_by_hand() -> None:
    ids, values = np.array([1, 1, 2, 2, 1, 2, 3, 3]), np.array([1.0, 2, 5, 6, 3, 7, 9, 9])
    unit = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = token_types(ids, values, unit, least=2, n_unit="answers")
    assert found is not None and found.ids.tolist() == [1, 2], "3 occurs in one answer only"
    assert found.mean.tolist() == [2, 6] and found.n.tolist() == [3, 3]
    assert found.explained.value == pytest.approx(24 / 28) and between(np.array([0, 0]), np.ones(2)) != 0
    assert token_types(ids, values, unit, least=4, n_unit="answers") is None


def test_inverse_inclusion_weights_are_unbiased() -> None:
    """Totals over places come out right on average, whatever they are of; every stratum gives what it can."""
    rng = np.random.default_rng(0)
    values = rng.gamma(0.5, size=200)
    eligible, inside = rng.random(200) < 0.6, high_entropy(values, 0.1)
    numbers, totals, drawn = rng.normal(1, 1, 200), [], np.zeros(200)
    for seed in range(1500):
        places, weights = stratified(values, inside, eligible, 30, seed)
        assert len(places) == 30 and eligible[places].all() and weights.sum() == pytest.approx(eligible.sum())
        totals.append((weights * numbers[places]).sum())
        drawn[places] += weights / 1500
    assert np.mean(totals) == pytest.approx(numbers[eligible].sum(), abs=3 * np.std(totals) / np.sqrt(1500))
    assert drawn[eligible] == pytest.approx(1, abs=0.35) and not drawn[~eligible].any()
    few = int((inside & eligible).sum())
    places, weights = stratified(values, inside, eligible, 60, 0)
    assert inside[places].sum() == few and (weights[inside[places]] == 1).all(), "all of a small stratum"
    assert len(stratified(values, inside, eligible, 1000, 0)[0]) == eligible.sum()
    assert len(stratified(values, inside, np.zeros(200, dtype=bool), 9, 0)[0]) == 0


def label(own: str, *others: str, epsilon: float = 0.6, seed: int = 0) -> Any:
    position = Position(0, tuple(Alternative(i, 0.5, tuple(said)) for i, said in enumerate((own, *others))))
    return fork_label(ForkMap((position,)), position, epsilon, seed)


def test_labels_by_hand() -> None:
    far = label("A" * 8, "B" * 8, "AAAAAAAB")
    assert far.fork and far.distances == pytest.approx([0, np.sqrt(2), np.sqrt(2) / 8]) and far.halved is False
    two = label("A" * 8, "B" * 8)
    exact = sum(hypergeom.pmf(k, 16, 8, 8) for k in range(9) if np.sqrt(2) * abs(2 * k - 8) / 8 >= 0.6)
    assert two.dealt == pytest.approx(exact, abs=0.1) and 0 < two.dealt < 0.3
    same = label("A" * 8, "A" * 8)
    assert not same.fork and same.dealt == 0
    assert label("AB", "BA").halved is None and label("AABB" * 2, "ABABABAB").halved is True


def test_dealing_gives_the_rate_of_false_forks() -> None:
    """Tokens that make no difference: as many labels are wrong as deals say; halves say more."""
    rng = np.random.default_rng(0)
    found = [label(*("".join(row) for row in rng.choice(["A", "B"], (3, 8))), seed=s) for s in range(400)]
    rate = float(np.mean([f.fork for f in found]))
    assert rate == pytest.approx(float(np.mean([f.dealt for f in found])), abs=3 * np.sqrt(rate * (1 - rate) / 400))
    assert np.mean([f.halved for f in found]) > rate > 0.02


def test_auroc_by_hand_and_its_interval() -> None:
    values, fork = np.array([3.0, 1, 2, 2, 0]), np.array([True, False, True, False, False])
    assert auroc(values, fork, np.ones(5)) == pytest.approx((3 + 2.5) / 6)
    assert auroc(values, fork, np.array([1, 1, 3, 1, 1.0])) == pytest.approx((3 + 3 * 2.5) / 12)
    assert np.isnan(auroc(values, np.zeros(5, dtype=bool), np.ones(5)))
    assert effective(np.array([1.0, 1, 1, 1])) == 4 and effective(np.array([3.0, 1])) == 1.6
    low, high = newcombe(1.0, 10, 10)
    assert high == 1 and 0.6 < low < 0.9, "a perfect order of twenty is no proof"
    inside, reps = 0, 300
    for seed in range(reps):
        rng = np.random.default_rng(seed)
        unit = np.repeat(np.arange(10), 6)
        shift = np.repeat(rng.normal(size=10), 6)
        found = auroc_estimate(
            rng.normal(size=60) + shift, rng.random(60) < 0.3, rng.integers(1, 4, 60).astype(float), unit, "answers"
        )
        assert found.ci95 is not None
        inside += found.ci95[0] <= 0.5 <= found.ci95[1]
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / reps) <= inside / reps < 1


def test_shares_of_sampled_places() -> None:
    everything = share_estimate(np.ones(4), np.ones(4), np.arange(4), "answers")
    assert everything.value == 1 and everything.ci95 is not None and everything.ci95[0] == pytest.approx(0.51, abs=0.01)
    assert np.isnan(share_estimate(np.ones(0), np.ones(0), np.ones(0), "answers").value)
    weighed = share_estimate(np.array([1.0, 0, 0]), np.array([2.0, 1, 1]), np.array([0, 0, 1]), "answers")
    assert weighed.value == 0.5 and weighed.n == 2


def test_the_rule_against_an_enumeration() -> None:
    """With every eligible place sampled, recall and precision are those of the population."""
    rng = np.random.default_rng(1)
    values, eligible = rng.normal(size=50), rng.random(50) < 0.7
    places = np.flatnonzero(eligible)
    fork = rng.random(len(places)) < 0.4
    found = rule(values, eligible, places, fork.astype(float), np.ones(len(places)), np.array([0.2, 1.0]))
    named = set(np.argsort(-values)[:10].tolist()) & set(places.tolist())
    hits = named & set(places[fork].tolist())
    assert found.recall == pytest.approx([len(hits) / fork.sum(), 1])
    assert found.chance == pytest.approx([len(named) / len(places), 1])
    assert found.precision == pytest.approx([len(hits) / len(named), fork.mean()])
