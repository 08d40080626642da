"""The per-token shift of two models by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_close, copy_of, random_weights, scripted, tiny_model, words_tokenizer

import probekit as pk
from probekit.backends.scripted import Script, random_play
from probekit.backends.transformers import TransformersModel
from probekit.core import CapabilityError, InputError, PlanError, TextError, TokenText

V = 4
LN2 = np.log(2.0)


def says(*rows: tuple[float, ...]) -> Any:
    """A model that predicts a given distribution after each token, over a vocabulary of four."""

    def play(text: TokenText) -> Script:
        logits = np.log(np.array(rows, dtype=np.float64)[: len(text)] + 1e-30)
        return Script(np.stack([np.zeros_like(logits), logits]), random_play(2, 2, V)(text).pattern)

    return scripted(play=play, unembedding=np.eye(V), n_layers=2, n_heads=2, d_model=V, d_vocab=V)


ONE = says((0.5, 0.5, 0, 0), (1, 0, 0, 0), (0.1, 0.2, 0.3, 0.4))
TWO = says((0.25, 0.25, 0.5, 0), (0, 0, 1, 0), (0.1, 0.2, 0.3, 0.4))


def test_values_by_hand() -> None:
    """After w3: m = 0.375, 0.375, 0.25; after w0: nothing in common; after w2: the same."""
    found = pk.shift(ONE, TWO, "w3 w0 w2", top_k=3, progress=False)
    data = found.data
    first = 0.5 * np.log(0.5 / 0.375) + 0.5 * (0.5 * np.log(0.25 / 0.375) + 0.5 * LN2)
    assert_close(data["js_nats"].values, np.array([first, LN2, 0.0]), atol=1e-6)
    assert_close(data["kl_nats"].values[[0, 2]], np.array([LN2, 0.0]), atol=1e-6)
    assert data["kl_nats"].values[1] > 60  # 0 but for what a float32 logit can hold
    # w0 follows w3 (1/2 against 1/4); nothing follows the last.
    assert_close(data["logprob_nats"].values[:, 0], np.log([0.5, 0.25]), atol=1e-6)
    assert_close(data["delta_logprob_nats"].values[0], -LN2, atol=1e-6)
    assert data["delta_logprob_nats"].values[1] > 60 and np.isnan(data["delta_logprob_nats"].values[2])
    assert data["argmax_changed"].values.tolist() == [1, 1, 0]
    assert_close(data["entropy_nats"].values[:, 0], np.array([LN2, 1.5 * LN2]), atol=1e-6)
    assert data["top_id"].values[:, 0].tolist() == [[0, 1, 2], [2, 0, 1]]  # of equal ones, the smaller id first
    assert data["top_id"].values[:, 2].tolist() == [[3, 2, 1]] * 2
    assert_close(np.exp(data["top_logprob"].values[:, 2]), np.array([[0.4, 0.3, 0.2]] * 2), atol=1e-6)
    assert data["vocab_str"].sel(vocab=2).item() == " w2" and data["token_str"].values.tolist() == [" w3", " w0", " w2"]
    assert "mean JS" in repr(found) and found.nbytes > 0


def test_the_other_way_round_changes_signs_and_no_divergence() -> None:
    there, back = (pk.shift(*m, "w3 w0 w2", progress=False).data for m in ((ONE, TWO), (TWO, ONE)))
    assert_close(back["js_nats"].values, there["js_nats"].values, atol=1e-12)
    assert_close(back["delta_logprob_nats"].values[:2], -there["delta_logprob_nats"].values[:2], atol=1e-6)


def test_a_model_against_itself_and_against_a_changed_copy() -> None:
    """More tokens than are compared at once; the numbers are those of the models' own logits."""
    tiny, text = tiny_model("llama"), " ".join(f"w{3 + i}" for i in range(40))
    same = pk.shift(tiny.model, tiny.model, text, progress=False).data
    assert not same["js_nats"].values.any() and not same["argmax_changed"].values.any()
    assert not np.nan_to_num(same["delta_logprob_nats"].values).any()
    module = random_weights(copy_of("llama"), seed=1)
    other = TransformersModel.from_loaded(module, words_tokenizer(), name="changed").load()
    data = pk.shift(tiny.model, other, text, progress=False).data
    batch = tiny.model.tokenize([text])
    p, q = (m.own_logits(batch).astype(np.float64) for m in (tiny.model, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    m = np.log((np.exp(p) + np.exp(q)) / 2)
    assert_close(data["js_nats"].values, ((np.exp(p) * (p - m) + np.exp(q) * (q - m)).sum(-1) / 2), atol=1e-6)
    ids = np.asarray(batch.texts[0].ids)
    rows = np.arange(len(ids) - 1)
    assert_close(data["delta_logprob_nats"].values[:-1], (q - p)[rows, ids[1:]], atol=1e-5)
    assert (data["argmax_changed"].values == (p.argmax(-1) != q.argmax(-1))).all() and data["js_nats"].min() > 0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="different tokenizers"):
        pk.shift(ONE, scripted(d_vocab=65), "w1")
    with pytest.raises(TextError, match="found 2"):
        pk.shift(ONE, TWO, ONE.tokenize(["w1", "w2"]))
    with pytest.raises(InputError, match="top_k"):
        pk.shift(ONE, TWO, "w1", top_k=0)
    with pytest.raises(PlanError):
        pk.shift(ONE, TWO, "w1 w2 w3", memory_limit=10, progress=False)
    tiny = tiny_model("llama").model
    with pytest.raises(TextError, match="reads at most"):
        pk.shift(tiny, tiny, " ".join(["w3"] * 400), progress=False)
    assert pk.share_tokenizer(ONE, TWO) and not pk.share_tokenizer(ONE, scripted(d_vocab=65))
    assert pk.Shift.size(10, 100) == 8000


def test_an_encoder_predicts_no_tokens() -> None:
    from dataclasses import replace

    blind = says((1, 0, 0, 0))
    blind.info = replace(blind.info, sites=frozenset())
    with pytest.raises(CapabilityError, match="logits"):
        pk.shift(ONE, blind, "w1")


def test_cancelling_ends_it() -> None:
    steps: list[pk.Step] = []

    def listen(step: pk.Step) -> None:
        steps.append(step)
        raise pk.Cancelled("enough")

    tiny = tiny_model("llama").model
    with pytest.raises(pk.Cancelled):
        pk.shift(tiny, tiny, "w3 w4 w5", progress=listen)
    assert steps
