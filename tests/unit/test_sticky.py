"""The maths of sticky tokens by hand: u, pairs, insertions, score, validation, cut, both sides, random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sticky_model import BagEmbedder

from probekit.core import Batch, InputError, Similarities, TextError, TokenText, VocabularyTable
from probekit.engine.journal import Journal
from probekit.engine.look_up import answer
from probekit.methods.sentences import SENTENCES, built_in
from probekit.methods.sticky import (
    Insertions,
    beyond_random,
    even_pairs,
    hit_share,
    mean_similarity,
    outlier_cut,
    sticky_score,
    token_score,
    two_sided,
)
from probekit.methods.sticky_harm import clusters, difference, nearest_of_topic, v_measure
from probekit.methods.sticky_trials import pairs_of, usable_tokens
from probekit.methods.token_categories import categories
from probekit.stats import wilson
from probekit.texts import read_texts


def test_mean_similarity_counts_every_pair_and_each_with_itself() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert mean_similarity(rows) == pytest.approx((rows @ rows.T).mean())
    assert mean_similarity(rows) == pytest.approx((3 + 2 * (0 + 0.6 + 0.8)) / 9)


def test_pairs_lie_on_an_even_grid_below_u() -> None:
    """m = -0.2, u = 0.3: targets -0.2, -0.1, 0, 0.1, 0.2, of which the nearest pairs are taken, one of them twice."""
    similarity = np.array([0.29, -0.2, 0.9, 0.04, -0.11, 0.31, 0.19, 0.3])
    assert even_pairs(similarity, 0.3, 5).tolist() == [1, 4, 3, 3, 6]
    assert even_pairs(similarity, -0.5, 5).size == 0
    assert even_pairs(similarity, 0.0, 5).tolist() == [1, 4]  # no more targets than pairs
    assert even_pairs(similarity, 0.3, 2, above=True).tolist() == [2, 5]  # from 0.9 down to 0.42


def test_copies_go_in_front_behind_and_between_words() -> None:
    texts = Insertions((1, 3), seed=4).of("zz", "a b  c")
    assert texts[:4] == ["zza b  c", "zzzzzza b  c", "a b  czz", "a b  czzzzzz"]
    for text, n in zip(texts[4:], (1, 3), strict=True):
        assert text.split().count("zz") == n and [w for w in text.split() if w != "zz"] == ["a", "b", "c"]
    assert texts == Insertions((1, 3), seed=4).of("zz", "a b  c")
    drawn = {tuple(Insertions((1, 3), seed=s).of("zz", "a b  c")) for s in range(20)}
    assert len(drawn) > 3
    one = Insertions((1, 2), 0).of("q", "a b c d e f")
    assert [w for w in one[5].split() if w != "q"] == one[4].replace(" q", "").replace("q ", "").split()


def test_the_score_by_hand() -> None:
    """Distances 0.9, 0.7, 0.8, 0.5: falls 0.2 and 0.3, one rise of 0.1, and the token alone at 0.6."""
    expected = (0.5 + 0.1 * 2 + 0.1 * 0.6) / (0.1 + 0.05 * 1 + 0.01)
    assert sticky_score(np.array([0.9, 0.7, 0.8, 0.5]), np.array(0.6)) == pytest.approx(expected)
    only_falls = sticky_score(np.linspace(0.9, 0.5, 9), np.array(0.8))
    assert only_falls == pytest.approx((0.4 + 0.8 + 0.08) / 0.01)
    assert sticky_score(np.full(9, 0.5), np.array(0.0)) == 0.0


def test_the_token_score_weighs_places_and_means_over_pairs() -> None:
    rng = np.random.default_rng(0)
    distance, own = rng.uniform(0, 1, (4, 3, 9)), rng.uniform(0, 1, 4)
    by_hand = np.mean(
        [sum(w * sticky_score(d[k], o) for k, w in enumerate((0.35, 0.35, 0.30))) for d, o in zip(distance, own, strict=True)]
    )  # fmt: skip
    assert token_score(distance, own) == pytest.approx(by_hand)


def test_a_hit_needs_the_mean_over_counts_below_none() -> None:
    """Pair one: nearer in front and behind; pair two: only at random places; a tie is no hit."""
    distance = np.array(
        [[[0.5, 0.2, 0.7], [0.5, 0.1, 0.8], [0.5, 0.6, 0.7]], [[0.5, 0.5, 0.5], [0.5, 0.9, 0.9], [0.5, 0.1, 0.1]]]
    )
    assert hit_share(distance) == pytest.approx((4 / 11 + 4 / 11 + 3 / 11) / 2)
    assert hit_share(distance[1:]) == pytest.approx(3 / 11)


def test_the_cut_is_that_of_the_published_quartiles() -> None:
    """The quartiles of the log released for all-MiniLM-L6-v2 give its cut."""
    assert outlier_cut([0.7, 0.7487, 0.7753, 0.7967, 0.85]) == pytest.approx(0.7967 + 0.7 * (0.7967 - 0.7487))
    assert outlier_cut([0.7, 0.7487, 0.7753, 0.7967, 0.85]) == pytest.approx(0.8303, abs=1e-4)


def test_both_sides() -> None:
    before = np.array([[-0.1], [0.1], [0.3], [0.5]])
    assert two_sided(np.full((4, 3), 0.2), before, 0.2) == pytest.approx((0.0, 0.0))
    assert two_sided(np.broadcast_to(before, (4, 3)), before, 0.2) == pytest.approx((1.0, 1.0))
    assert two_sided(np.broadcast_to(0.2 + (before - 0.2) / 2, (4, 3)), before, 0.2) == pytest.approx((0.5, 0.25))
    assert two_sided(np.full((4, 3), 0.9), before, 0.2)[0] == pytest.approx(3.5)  # one value, and the wrong one


def test_random_tokens_are_rarely_called() -> None:
    """At 5 % for twenty tokens together, about one run in twenty calls one or more; a token of p = 1 is always called."""
    rng, runs, called = np.random.default_rng(1), 400, 0
    for _ in range(runs):
        p = rng.binomial(60, 0.6, 20 + 16) / 60
        called += bool(beyond_random(p[:20], p[20:], 60).any())
        assert beyond_random(np.append(p[:20], 1.0), p[20:], 60)[-1]
    assert called / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert called > 0


def test_equal_random_tokens_leave_room_above_only() -> None:
    assert beyond_random(np.array([0.5, 0.6]), np.full(5, 0.5), 40).tolist() == [False, True]
    assert not beyond_random(np.array([1.0]), np.array([0.5]), 40).any()  # one random token gives no spread


def test_white_space_is_not_usable() -> None:
    table = VocabularyTable(
        ("a", "▁", "b", ""), ("a", " ", "b", ""), ("a", " ", "b", ""), ((0,), (1,), (9,), ()), np.zeros(4)
    )
    assert usable_tokens(table, categories(table)).tolist() == [0]


def test_built_in_sentences_are_five_of_twelve_topics() -> None:
    sentences, topics = built_in()
    assert len(set(sentences)) == 60 and [topics.count(t) for t in SENTENCES] == [5] * 12
    assert all(s in SENTENCES[t] for s, t in zip(sentences, topics, strict=True))


def test_neighbours_of_the_topic_by_hand() -> None:
    angle = np.array([0.0, 0.1, 0.2, 3.0])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_array_equal(nearest_of_topic(rows, rows, np.array(["x", "y", "x", "y"]), k=1), [0, 0, 0, 0])
    np.testing.assert_array_equal(nearest_of_topic(rows, rows, np.array(["x", "x", "y", "y"]), k=1), [1, 1, 0, 1])


def test_k_means_and_v_measure_by_hand() -> None:
    """Two topics of four rows, one row of the second among the first: homogeneity and completeness from entropies."""
    rows = np.array([[0, 0], [0, 0.1], [0.1, 0], [0, 0], [0, 0], [5, 5], [5, 5.1], [5, 5.0]])
    found = clusters(rows, 2)
    assert len(set(found[:5].tolist())) == len(set(found[5:].tolist())) == 1 and found[0] != found[5]
    h_topic, h_cluster = np.log(2), -(5 / 8) * np.log(5 / 8) - (3 / 8) * np.log(3 / 8)
    shared = 0.5 * np.log(0.5 / (0.5 * 5 / 8)) + 1 / 8 * np.log(1 / 8 / (0.5 * 5 / 8)) + 3 / 8 * np.log(1 / 0.5)
    homogeneity, completeness = shared / h_topic, shared / h_cluster
    expected = 2 * homogeneity * completeness / (homogeneity + completeness)
    assert v_measure(["a"] * 4 + ["b"] * 4, found) == pytest.approx(expected)
    assert v_measure(["a"] * 4 + ["b"] * 4, clusters(np.zeros((8, 2)), 2)) == 0.0  # all texts are one


def test_the_difference_of_means_has_welchs_interval() -> None:
    from scipy.stats import ttest_ind

    a, b = np.array([0.1, 0.3, 0.2, 0.5]), np.array([0.6, 0.4, 0.5])
    value, ci95 = difference(a, b)
    assert value == pytest.approx(-0.225)
    assert ci95 == pytest.approx(tuple(ttest_ind(a, b, equal_var=False).confidence_interval()))
    assert difference(a[:1], b) == (pytest.approx(-0.4), None)
    assert difference(np.ones(3), np.zeros(2)) == (1.0, (1.0, 1.0))


def test_the_interval_of_a_share_ends_at_0_and_1_exactly() -> None:
    for n in (1, 7, 30, 60, 1000):
        assert wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0
        assert wilson(0, n)[1] == pytest.approx(1 - wilson(n, n)[0])
    assert wilson(3, 10) == pytest.approx((0.10779, 0.60322), abs=1e-5)


def batch(*texts: tuple[str, str]) -> Batch:
    return Batch(tuple(TokenText((1,), ("x",), domain=d, text=t) for t, d in texts), "model")


def pairs(of: Batch) -> object:
    flow = pairs_of(of)
    request = next(flow)
    rows = np.eye(len(request.texts), dtype=np.float32)

    class Found:
        values = rows

    try:
        flow.send(Found())
    except StopIteration as stop:
        return [(a, b) for a, b in zip(stop.value.first, stop.value.second, strict=True)]
    raise AssertionError


def test_pairs_are_given_or_made() -> None:
    given = batch(("a", "sentence1"), ("b", "sentence1"), ("c", "sentence2"), ("a", "sentence2"))
    assert pairs(given) == [("a", "c"), ("b", "a")]
    assert pairs(batch(("a", ""), ("b", ""), ("c", ""))) == [("a", "b"), ("a", "c"), ("b", "c")]
    made = pairs(Batch(()))
    assert isinstance(made, list) and len(made) == 60 * 59 // 2
    with pytest.raises(InputError, match="as many first as second sentences; found 1 and 2"):
        pairs(batch(("a", "sentence1"), ("b", "sentence2"), ("c", "sentence2")))
    with pytest.raises(InputError, match=r"made of 3 to 2,000 sentences; found 2"):
        pairs(batch(("a", ""), ("b", ""), ("b", "")))


def test_similarities_are_cosines_with_the_anchor_named(tmp_path: Path) -> None:
    """Equal texts are embedded once, occurrences counted, and a journal gives back exactly what was found."""
    model = BagEmbedder(["red", "blue"])
    texts, anchors = ("red x", "y blue blue", "red x", "z"), ("a red", "b")
    request = Similarities(texts, anchors, (0, 1, 1, 0), (2, 3, 3, 2))
    path = tmp_path / "j.jsonl"
    with Journal(path, "m") as journal:
        found = answer(model, request, journal=journal)
    assert model.embedded == ["a red", "b", "red x", "y blue blue", "z"]
    rows = {t: model.embed_texts([t]).values[0] for t in (*texts, *anchors)}
    expected = [rows[t] @ rows[anchors[to]] for t, to in zip(texts, request.to, strict=True)]
    np.testing.assert_allclose(found.cosine, expected, rtol=1e-6)
    assert found.count.tolist() == [1, 2, 0, 0] and found.tokens.tolist() == [4, 5, 4, 3] and found.n_cut == 0
    model.embedded = []
    with Journal(path, "m") as journal:
        again = answer(model, request, journal=journal)
        assert not model.embedded
        answer(model, Similarities(texts, anchors, (1, 1, 1, 0)), journal=journal)
    for name in ("cosine", "count", "tokens"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    with Journal(path, "another model") as journal:
        answer(model, request, journal=journal)
    assert len(model.embedded) == 10


@pytest.mark.parametrize(("to", "watched"), [((0,), ()), ((0, 2), ()), ((0, 1), (5,))])
def test_similarities_need_an_anchor_for_each_text(to: tuple[int, ...], watched: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        Similarities(("a", "b"), ("c", "d"), to, watched)


def test_a_csv_file_gives_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('number,sentence1,sentence2\n1,One.,"Two, and\nthree."\n2,Four.,Five.\n', encoding="utf-8")
    assert read_texts(path) == {"sentence1": ["One.", "Four."], "sentence2": ["Two, and\nthree.", "Five."]}
    path.write_text("a,sentence2\n1,2\n", encoding="utf-8")
    with pytest.raises(InputError, match="columns 'sentence1' and 'sentence2'; found 'a', 'sentence2'"):
        read_texts(path)
    path.write_text("sentence1,sentence2\n", encoding="utf-8")
    with pytest.raises(InputError, match="no line below the first"):
        read_texts(path)
    path.write_text("sentence1,sentence2\nOne.,\n", encoding="utf-8")
    with pytest.raises(TextError, match="pair 1: a sentence is empty"):
        read_texts(path)
