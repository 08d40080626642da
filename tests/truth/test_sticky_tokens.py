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
    called = [int(run(BagEmbedder(WORDS, seed=s), seed=s, **sizes)["sticky"].values.sum()) for s in range(10)]
    assert sum(n > 0 for n in called) < 3


def test_the_rule_returns_random_tokens_as_well(planted: pk.Result) -> None:
    """The published rule calls some tokens of an embedder that has no sticky ones; the finding says so."""
    results = [run(BagEmbedder(WORDS, seed=seed), seed=seed) for seed in range(4)]
    assert any(r["published"].values.any() for r in results)
    assert "No token is sticky beyond random tokens" in results[0].findings[0].claim


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
        file.write(b'{"model": "bag 79 3.0", "similar')  # the process ended in the middle of a line
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
