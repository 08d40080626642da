"""Attention that appended tokens receive: where they are, distances by hand, groups beside random groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sticky_model import ATTENDED, N_HEADS, N_LAYERS, BagEmbedder

from probekit.core import Columns
from probekit.engine.look_up import answer
from probekit.methods.sentences import built_in
from probekit.methods.sticky_attention import (
    SPLITS,
    Received,
    compared,
    histogram_kl_nats,
    place_of,
    received,
    specials_behind,
    wasserstein,
)
from probekit.methods.sticky_choice import CANDIDATE, NAMED, RANDOM, ordinary


def test_wasserstein_by_hand() -> None:
    assert wasserstein(np.array([0.0, 1.0, 3.0]), np.array([5.0, 6.0, 8.0])) == pytest.approx(5)
    assert wasserstein(np.array([0.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0])) == pytest.approx(0)
    assert wasserstein(np.array([0.0, 0.0]), np.array([0.0, 0.4])) == pytest.approx(0.2)


def test_kl_by_hand() -> None:
    """Bins of width 0.1 from 0 to 3; `a` has 3/4 in the first and 1/4 in the last, `b` half in each."""
    a, b = np.array([0.0, 0.01, 0.02, 3.0]), np.array([0.0, 3.0])
    assert histogram_kl_nats(a, b) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-6)
    assert histogram_kl_nats(a, a) == 0.0 and histogram_kl_nats(a[:1], a[:1]) == 0.0
    apart = histogram_kl_nats(np.array([0.0, 0.0]), np.array([3.0]))  # densities 10 and 1e-10
    assert apart == pytest.approx(np.log(10 / 1e-10), rel=1e-6)


def test_the_place_of_an_appended_token() -> None:
    """Specials 101 in front and 102 behind; the text is 5 6."""
    assert specials_behind((101, 5, 6, 102), (5, 6)) == 1
    assert specials_behind((5, 6), (5, 6)) == 0 and specials_behind((5, 6, 1, 2), (5, 6)) == 2
    assert specials_behind((101, 102), ()) == 2  # of an empty text all follow
    assert place_of(7, (101, 5, 6, 7, 102), (101, 5, 6, 102), 1) == 3
    assert place_of(6, (101, 5, 6, 6, 102), (101, 5, 6, 102), 1) == 3  # the second of two
    assert place_of(102, (101, 5, 6, 102, 102), (101, 5, 6, 102), 1) == 3  # the special that was put in, not the last
    assert place_of(7, (5, 6, 7), (5, 6), 0) == 2 and place_of(7, (5, 6, 7, 1, 2), (5, 6, 1, 2), 2) == 2
    assert place_of(7, (101, 5, 8, 102), (101, 5, 6, 102), 1) is None  # merged with its neighbour
    assert place_of(7, (101, 5, 6, 7, 7, 102), (101, 5, 6, 102), 1) is None  # two instead of one
    assert place_of(7, (101, 5, 6, 9, 102), (101, 5, 6, 102), 1) is None
    assert place_of(7, (101, 5, 9, 7, 102), (101, 5, 6, 102), 1) is None  # the text before it changed


def look(model: Any, tokens: Sequence[int]) -> Received:
    flow = received(tokens, model.vocabulary())
    request = next(flow)
    while True:
        try:
            request = flow.send(answer(model, request))
        except StopIteration as stop:
            found: Received = stop.value
            return found


class Merging(BagEmbedder):
    """Makes something else of w5 behind a sentence that ends in `d.`, and of w6 everywhere."""

    def ids_of(self, texts: Sequence[str], *, special: bool = False) -> tuple[tuple[int, ...], ...]:
        found = super().ids_of(texts, special=special)
        merged = [t.strip().endswith("w6") or t.strip().endswith("d. w5") for t in texts]
        return tuple((*ids[:-2], 3, 3, *ids[-1:]) if m else ids for ids, m in zip(found, merged, strict=True))


def test_columns_are_pooled_by_token_and_changed_texts_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sentences = Merging([f"w{i}" for i in range(9)]), built_in()[0]
    w4, w5, w6 = (model.place[w] for w in ("w4", "w5", "w6"))
    out = sum(s.endswith("d.") for s in sentences)
    assert out
    found = look(model, [w4, w5, w6])
    assert sorted(found.values) == [w4, w5]
    assert (found.n_texts, found.n_left_out) == (120 - out, 60 + out)
    texts = [s + " w4 " for s in sentences]
    ids = model.ids_of(texts, special=True)
    columns = answer(model, Columns(tuple(texts), tuple(len(i) - 2 for i in ids)))
    assert [i[-2] for i in ids] == [w4] * 60
    assert found.values[w4].shape == (N_LAYERS, N_HEADS * sum(map(len, ids)))
    np.testing.assert_allclose(np.sort(found.values[w4], axis=1), np.sort(columns.values.reshape(3, -1), axis=1))
    monkeypatch.setattr("probekit.methods.sticky_attention._PART", 50)
    again = look(model, [w4, w5, w6])
    for token in (w4, w5):
        np.testing.assert_array_equal(again.values[token], found.values[token])


def drawn(n: int, rng: np.random.Generator, *, layers: int = 2, entries: int = 40, spread: float = 0.3) -> Received:
    """Tokens 0 to n - 1, each with its own level."""
    own = np.exp(spread * rng.standard_normal((n, layers, 1)))
    values = 0.1 * own * np.exp(0.3 * rng.standard_normal((n, layers, entries)))
    return Received({i: v for i, v in enumerate(values)}, n, 0)


GROUPS = np.arange(10, 40), np.arange(5), np.arange(5, 10)


def compare(found: Received, groups: Any = GROUPS, *, n_layers: int = 2, seed: int = 0) -> xr.Dataset:
    return compared(found, groups, n_layers=n_layers, n_vocab=55, seed=seed)


def test_comparison_by_hand() -> None:
    found = drawn(40, np.random.default_rng(0))
    data = compare(found, seed=3)
    random, benign, sticky = [np.stack([found.values[int(t)] for t in g]) for g in GROUPS]
    for layer in range(2):
        a, b = sticky[:, layer].ravel(), benign[:, layer].ravel()
        distance = abs(np.sort(a) - np.sort(b)).mean()  # Wasserstein-1 of samples of one size
        assert data["attention_w1"].values[layer] == pytest.approx(distance)
        assert data["attention_kl_nats"].values[layer] == pytest.approx(histogram_kl_nats(a, b))
        left = [[wasserstein(np.delete(sticky[:, layer], i, 0).ravel(), b) for i in range(5)],
                [wasserstein(a, np.delete(benign[:, layer], i, 0).ravel()) for i in range(5)]]  # fmt: skip
        error = np.sqrt(sum(4 / 5 * ((x - np.mean(x)) ** 2).sum() for x in map(np.array, left)))
        assert data["attention_w1_error"].values[layer] == pytest.approx(error)
    means = [x.mean(axis=(0, 2)) for x in (random, benign, sticky)]
    np.testing.assert_allclose(data["received"], means)
    assert data["attention_tokens"] == 10 and data["attention_missing"].item() == ""
    rng, splits = np.random.default_rng([3, 4]), []
    for _ in range(SPLITS):
        order = rng.permutation(np.arange(10, 40)) - 10
        splits.append(
            [wasserstein(random[order[:5], k].ravel(), random[order[5:10], k].ravel()) for k in range(2)]
        )  # fmt: skip
    null = np.sort(splits, axis=0)
    np.testing.assert_allclose(data["attention_w1_null"], null[19])
    np.testing.assert_allclose(data["attention_w1_null_95"], null[37])
    multiple = data["attention_w1"].values / null[19]
    layer, largest = int(multiple.argmax()), multiple.max()
    own = [float(found.values[i][layer].mean()) for i in range(40)]
    np.testing.assert_allclose(data["received_there"].values[:40], own)
    assert np.isnan(data["received_there"].values[40:]).all()
    beyond = sum((np.array(s) / null[19]).max() >= largest for s in splits)
    assert float(data["attention_p"]) == pytest.approx((1 + beyond) / 40)


def test_groups_that_differ_are_found_and_groups_that_do_not_are_not() -> None:
    """p at most 0.05 in about one of twenty pairs of ordinary groups; nearly always where attention is doubled."""
    called, found = 0, 0
    for seed in range(60):
        values = drawn(40, np.random.default_rng(seed))
        called += float(compare(values, seed=seed)["attention_p"]) <= 0.05
        for token in GROUPS[2]:
            values.values[int(token)][1] *= 2
        data = compare(values, seed=seed)
        found += float(data["attention_p"]) <= 0.05 and int(data["attention_w1"].values.argmax()) == 1
    assert called <= 60 * 0.05 + 3 * np.sqrt(60 * 0.05 * 0.95)
    assert found > 54


def test_what_is_missing_is_nan() -> None:
    none = compare(Received({}, 0, 0, "shows nothing"), n_layers=3)
    assert none.sizes["layer"] == 3 and none["attention_missing"].item() == "shows nothing"
    by_layer = [name for name in none if "layer" in none[name].dims]
    assert by_layer and all(np.isnan(none[name]).all() for name in by_layer) and np.isnan(none["attention_p"])
    values = drawn(40, np.random.default_rng(0))
    few = compare(values, (np.arange(10, 19), *GROUPS[1:]))
    assert np.isfinite(few["attention_w1"]).all() and np.isnan(few["attention_w1_null"]).all()
    one = compare(values, (GROUPS[0], np.array([1]), GROUPS[2]))
    assert np.isnan(one["attention_w1"]).all() and np.isfinite(one["received"]).all()


def test_an_embedder_with_planted_attention() -> None:
    model = BagEmbedder([f"w{i}" for i in range(50)], sticky="w0 w1 w2 w3 w4", gain=1.5)
    groups = np.arange(12, 42), np.arange(7, 12), np.arange(2, 7)
    data = compare(look(model, [int(t) for g in groups for t in g]), groups, n_layers=N_LAYERS)
    assert int((data["attention_w1"] / data["attention_w1_null"]).values.argmax()) == ATTENDED
    assert (data["attention_w1"] > data["attention_w1_null_95"]).values.tolist()[ATTENDED]
    assert float(data["attention_p"]) == 1 / (SPLITS + 1)
    _, benign, sticky = data["received"].values[:, ATTENDED]
    assert sticky / benign == pytest.approx(2.5, rel=0.4)  # 1 + gain, and each token's own level
    assert data["attention_w1"].values[ATTENDED] == pytest.approx(sticky - benign, rel=0.05)


def test_ordinary_tokens_are_no_candidates() -> None:
    asked = np.zeros(60, dtype=int)
    asked[:10], asked[10:14], asked[14:20] = CANDIDATE, NAMED, RANDOM
    found = ordinary(np.arange(50), asked, np.arange(20, 25), seed=1)
    assert len(set(found.tolist())) == 30 and set(found.tolist()) <= {*range(14, 20), *range(25, 50)}
    assert len(ordinary(np.arange(20), asked, np.arange(20, 25), seed=1)) == 6
