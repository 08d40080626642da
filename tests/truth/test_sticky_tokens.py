"""Sticky tokens: one made sticky on purpose is found, its harmless twin is not, and a broken run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sticky_model import BagEmbedder

import probekit as pk
from probekit.core import InputError

WORDS = [f"w{i}" for i in range(160)]
PLANTED = 79  # id of w77
FIVE = "w77 w20 w31 w44 w58"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SENTENCES = [f"The {a} sees the {b}." for a, b in zip(LETTERS, LETTERS[13:] + LETTERS[:13], strict=True)]
SIZES: dict[str, Any] = {"n_scored": 0, "n_candidates": 20, "n_validation": 40, "n_random": 30, "n_above": 12}


def run(model: BagEmbedder, texts: Any = None, **params: Any) -> pk.Result:
    return pk.run("sticky-tokens", model, SENTENCES if texts is None else texts, **SIZES | params)


@pytest.fixture(scope="module")
def planted() -> pk.Result:
    return run(BagEmbedder(WORDS, sticky="w77"))


def test_the_planted_token_is_found_and_no_other(planted: pk.Result) -> None:
    data = planted.dataset
    assert np.flatnonzero(data["sticky"].values).tolist() == [PLANTED]
    assert data["published"].values[PLANTED] == 1 and data["p"].values[PLANTED] == 1.0
    first = planted.findings[0]
    assert f"'w77' ({PLANTED}) p = 1.000" in first.claim and "strip these" in first.claim
    assert first.value == 1 / 20 and str(PLANTED) in first.where


def test_it_is_sticky_from_both_sides_and_random_tokens_are_not(planted: pk.Result) -> None:
    """Eight copies of strength 3 leave next to nothing of what a sentence says: all pairs come near one value.

    That value is the cosine of a sentence with the shared direction, 0.5 / sqrt(1.25) = 0.447, and not u = 0.2; it
    differs between first sentences by what they have of that direction.
    """
    data = planted.dataset
    random = data["asked"].values == 2
    assert data["variance_ratio"].values[PLANTED] < 0.4
    assert data["variance_ratio"].values[random] == pytest.approx(1.0, abs=0.1)
    assert data["two_sided"].values[random] == pytest.approx(1.0, abs=0.1)
    model = BagEmbedder(WORDS, sticky="w77")
    shared = model.embed_texts(SENTENCES).values @ model.middle
    assert shared.mean() == pytest.approx(0.5 / np.sqrt(1.25), abs=0.05)
    assert abs(data["after"].values[:, None] - shared).min(axis=1).max() < 0.02
    np.testing.assert_allclose(data["after_random"], data["before"], atol=0.03)


def test_u_and_the_usable_tokens(planted: pk.Result) -> None:
    model = BagEmbedder(WORDS, sticky="w77")
    rows = model.embed_texts(model.words).values.astype(np.float64)
    assert float(planted["similarity"]) == pytest.approx((rows @ rows.T).mean(), abs=1e-7)
    assert planted["usable"].values.sum() == len(model.words)


def test_p_and_score_by_hand(planted: pk.Result) -> None:
    """Of one token, from embeddings of texts that this test builds itself."""
    from probekit.methods.sticky import Insertions, even_pairs

    model = BagEmbedder(WORDS, sticky="w77")
    left, right = np.triu_indices(len(SENTENCES), 1)
    e = model.embed_texts(SENTENCES).values
    similarity = (e[left] * e[right]).sum(axis=1)
    token = int(np.flatnonzero(planted["asked"].values == 1)[3])
    word = model.vocabulary().decoded[token]
    places = even_pairs(similarity, float(planted["similarity"]), 40)
    hits = []
    for i in places:
        texts = Insertions((1, 2, 4, 8), 0).of(word, SENTENCES[right[i]])
        d = 1 - (model.embed_texts(texts).values @ e[left[i]]).reshape(3, 4)
        hits.append((d.mean(axis=1) < 1 - similarity[i]) @ np.array([4, 4, 3]) / 11)
    assert planted["p"].values[token] == pytest.approx(np.mean(hits))


def test_nothing_is_called_where_nothing_was_planted() -> None:
    """Over seeds: at 5 % for all tokens together, three of ten embedders or more would be one chance in ninety."""
    sizes = {"n_scored": 60, "n_candidates": 12, "n_random": 20, "n_validation": 24}
    called = {"sticky": 0, "retrieval": 0, "clustering": 0}
    for seed in range(10):
        result = run(BagEmbedder(WORDS, seed=seed, topics=True), seed=seed, **sizes)
        called["sticky"] += bool(result["sticky"].values.any())
        for finding in result.findings:
            if "measure" in finding.where and finding.ci95 is not None:
                called[finding.where["measure"]] += not finding.ci95[0] <= 0 <= finding.ci95[1]
    assert max(called.values()) < 3, called


def test_the_rule_returns_random_tokens_as_well(planted: pk.Result) -> None:
    """The published rule calls some tokens of an embedder that has no sticky ones; the finding says so."""
    results = [run(BagEmbedder(WORDS, seed=seed), seed=seed) for seed in range(4)]
    assert any(r["published"].values.any() for r in results)
    assert "No token is sticky beyond random tokens" in results[0].findings[0].claim


@pytest.fixture(scope="module")
def harmful() -> pk.Result:
    """Sentences of a topic lie together; five sticky tokens are attended to at layer 1."""
    return run(BagEmbedder(WORDS, sticky=FIVE, topics=True, blur=0.3, gain=1.5))


def test_what_is_put_into_topics_are_the_strongest_candidates_and_benign_tokens(harmful: pk.Result) -> None:
    tried = harmful["tried"].values
    assert np.flatnonzero(tried == 2).tolist() == sorted(WORDS.index(w) + 2 for w in FIVE.split())
    assert (tried == 1).sum() == 5 and not (harmful["asked"].values[tried == 1] == 1).any()
    for name in ("retrieval", "clustering"):
        assert (np.isfinite(harmful[name].values) == (tried > 0)).all()


def test_harm_is_found_by_tokens(harmful: pk.Result) -> None:
    """Eight copies of a sticky token drown what a sentence says in noise; a benign one leaves all of it."""
    tried = harmful["tried"].values
    assert float(harmful["retrieval_without"]) > 0.5 and float(harmful["clustering_without"]) > 0.8
    by_claim = {f.where["measure"]: f for f in harmful.findings if "measure" in f.where}
    for name, finding in by_claim.items():
        benign, sticky = (harmful[name].values[tried == kind] for kind in (1, 2))
        assert benign == pytest.approx(float(harmful[f"{name}_without"]), abs=0.1)
        assert finding.value == pytest.approx(sticky.mean() - benign.mean()) and finding.n == 10
        assert finding.ci95 is not None and finding.ci95[1] < -0.1
        assert finding.n_unit == "tokens"
    assert set(by_claim) == {"retrieval", "clustering"}
    assert harmful["retrieval_by_sentence"].values[2].mean() == pytest.approx(
        harmful["retrieval"].values[tried == 2].mean()
    )
    assert set(harmful.figures()) >= {"retrieval", "clustering", "attention", "distance"}


def test_retrieval_and_clustering_of_one_token_by_hand(harmful: pk.Result) -> None:
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    from probekit.methods.sentences import built_in
    from probekit.methods.sticky import Insertions

    model = BagEmbedder(WORDS, sticky=FIVE, topics=True, blur=0.3)
    sentences, topics = built_in()
    clean = model.embed_texts(sentences).values
    changed = model.embed_texts([Insertions((8,), 0).of(" w20 ", s)[-1] for s in sentences]).values
    hits = []
    for i in range(60):
        order = sorted((j for j in range(60) if j != i), key=lambda j: -float(changed[i] @ clean[j]))
        hits.append(np.mean([topics[j] == topics[i] for j in order[:4]]))
    assert harmful["retrieval"].values[22] == pytest.approx(np.mean(hits))
    found = KMeans(12, n_init=10, random_state=0).fit_predict(changed.astype(float))
    assert harmful["clustering"].values[22] == pytest.approx(v_measure_score(topics, found))


def test_planted_attention_is_found_where_it_is(harmful: pk.Result) -> None:
    finding = next(f for f in harmful.findings if "Attention paid" in f.claim)
    assert finding.where["layer"] == 1 and "lies beyond" in finding.claim and "0 of 39 pairs" in finding.claim
    assert finding.ci95 is not None and finding.ci95[0] > finding.null and finding.n == 10
    _, benign, sticky = harmful["received"].values
    assert sticky[1] > 1.7 * benign[1] and sticky[0] < 1.5 * benign[0]
    looked, left = int(harmful["attention_texts"]), int(harmful["attention_left_out"])
    assert float(harmful["attention_p"]) == 1 / 40 and looked + left == 60 * (5 + 5 + 30)
    assert left in (0, 60, 120)  # the special tokens are not tokens of their own behind a sentence


def test_an_embedder_that_shows_no_attention_still_runs() -> None:
    model = BagEmbedder(WORDS, sticky="w77")
    model.attention_columns = None  # type: ignore[assignment]
    result = run(model, n_scored=30, n_candidates=8, n_validation=10)
    assert np.isnan(result["attention_w1"]).all() and np.isnan(result["received"]).all()
    assert result["received"].sizes == {"case": 3, "layer": 3}
    assert "Attention was not compared: 'bag' (BagEmbedder) cannot show attention" in result.findings[-1].claim
    assert not any("Attention paid" in f.claim for f in result.findings)
    assert not {"attention", "distance"} & set(result.figures())


def test_named_tokens_are_validated_whatever_their_score() -> None:
    result = run(BagEmbedder(WORDS, sticky="w77"), tokens="5, 9", n_scored=30)
    assert set(result["asked"].values[[5, 9]].tolist()) == {3, 1}  # 5 is a candidate by its score, too
    assert np.isfinite(result["p"].values[[5, 9]]).all()
    with pytest.raises(InputError, match="ids separated by commas; found 'five'"):
        run(BagEmbedder(WORDS), tokens="five")
    with pytest.raises(InputError, match="ids from 0 to 162"):
        run(BagEmbedder(WORDS), tokens="163")
    with pytest.raises(InputError, match="ascending numbers of copies"):
        run(BagEmbedder(WORDS), counts="2,1")


def test_pairs_may_be_given() -> None:
    turns = (1, 4, 7, 10)
    given = {"sentence1": SENTENCES * 4, "sentence2": [s for n in turns for s in SENTENCES[n:] + SENTENCES[:n]]}
    result = run(BagEmbedder(WORDS, sticky="w77"), given)
    assert np.flatnonzero(result["sticky"].values).tolist() == [PLANTED]
    assert int(result["n_pairs"]) <= 4 * len(SENTENCES)


def test_sentences_that_are_all_alike_are_refused() -> None:
    with pytest.raises(InputError, match="No two sentences are less similar"):
        run(BagEmbedder(WORDS), ["a", "a w1", "a w2"])


def test_a_run_that_broke_off_goes_on_and_embeds_nothing_twice(tmp_path: Path) -> None:
    whole = BagEmbedder(WORDS, sticky="w77")
    expected = run(whole)
    journal, model = tmp_path / "parts.jsonl", BagEmbedder(WORDS, sticky="w77")
    calls = iter(range(12))

    def stop() -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    model.stop = stop
    with pytest.raises(KeyboardInterrupt):
        run(model, journal=journal)
    first = len(model.embedded)
    with journal.open("ab") as file:
        file.write(b'{"model": "bag [79] 3.0", "similar')  # the process ended in the middle of a line
    model.stop, model.embedded = (lambda: None), []
    found = run(model, journal=journal)
    assert found.dataset.equals(expected.dataset)
    assert first > 8000 and len(model.embedded) < len(whole.embedded) - 0.8 * first
    model.embedded = []
    assert run(model, journal=journal).dataset.equals(expected.dataset)
    assert len(model.embedded) < 4000  # the vocabulary, the sentences and their topics, but no trial
    other = BagEmbedder(WORDS, sticky="w77", strength=1.0)
    run(other, journal=journal)
    assert len(other.embedded) > 0.9 * len(whole.embedded)  # another model's parts are not its own


def test_chunks_do_not_change_the_result(planted: pk.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probekit.methods.sticky_trials._PART", 700)
    again = run(BagEmbedder(WORDS, sticky="w77"))
    for name in ("score", "p", "two_sided", "survival"):
        np.testing.assert_allclose(again[name], planted[name], rtol=1e-6, atol=1e-7)
