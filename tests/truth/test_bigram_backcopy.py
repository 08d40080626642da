"""Bigram-Backcopy: the generator keeps its own rules, the measures are plain arithmetic, the shipped models show what
the publication reports of their setting, and a model that is trained here learns it anew."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close
from scipy.stats import chi2

from probekit.backends.transformers.toy import ToyShape, build_toy, open_toy
from probekit.core import InputError, UnknownName
from probekit.toys import (
    CRITERIA,
    PAPER,
    PHENOMENA,
    SMALL,
    BigramBackcopy,
    ExtremeTokens,
    extreme_tokens,
    losses,
    measured_sequences,
    open_bigram_backcopy,
    shipped_toys,
    train,
)
from probekit.toys.bigram_backcopy import _table

TASK = BigramBackcopy()
SINK, DRAIN, PEAK = PHENOMENA


def test_the_table_counts_tiny_shakespeare() -> None:
    """1,115,394 characters of 65 kinds; each but the last one begins a pair; space, e, t, o are the most frequent."""
    table = _table()
    unigrams, bigrams = np.array(table["unigrams"]), np.array(table["bigrams"])
    assert unigrams.sum() == table["n_characters"] == 1_115_394 and bigrams.sum() == 1_115_393
    assert bigrams.shape == (65, 65) and len(set(table["characters"])) == 65
    assert (np.diff(unigrams) <= 0).all() and table["characters"][:4] == " eto" and unigrams[0] == 169_892
    missing = unigrams - bigrams.sum(axis=1)
    assert missing.sum() == 1 and table["characters"][int(missing.argmax())] == "\n"


def test_vocabulary_and_triggers() -> None:
    assert TASK.vocabulary[0] == "<s>" and len(TASK.vocabulary) == 66
    assert [TASK.vocabulary[i] for i in TASK.triggers] == [" ", "e", "t"]
    assert TASK.is_trigger(np.arange(6)).tolist() == [False, True, True, True, False, False]
    with pytest.raises(InputError, match="n_triggers must be between 0 and 32, found 40"):
        BigramBackcopy(40)


def test_triggers_copy_backwards_and_never_begin() -> None:
    """After a trigger comes the character before it; no sequence begins with a trigger, so none ever copies <s>."""
    ids = TASK.sample(2000, 50, seed=1)
    assert ids.shape == (2000, 50) and (ids[:, 0] == 0).all() and ids[:, 1:].min() > 0
    n, t = np.nonzero(TASK.is_trigger(ids[:, :-1]))
    assert len(t) > 10_000 and t.min() == 2
    assert (ids[n, t + 1] == ids[n, t - 1]).all()
    again, other = TASK.sample(2000, 50, seed=1), TASK.sample(2000, 50, seed=2)
    assert (again == ids).all() and (other != ids).any()
    rng = np.random.default_rng(1)
    assert (TASK.sample(2000, 50, rng) == ids).all() and (TASK.sample(2000, 50, rng) != ids).any()


def chi_square(ids: np.ndarray, probs: np.ndarray) -> float:
    """p-value of the next characters against a table, over all rows with expected counts of 5 and more."""
    now, then = ids[:, :-1].ravel(), ids[:, 1:].ravel()
    free = ~TASK.is_trigger(now)
    counts = np.zeros_like(probs)
    np.add.at(counts, (now[free], then[free]), 1)
    expected = counts.sum(axis=1, keepdims=True) * probs
    assert not counts[expected == 0].any()
    dense = expected >= 5
    statistic = ((counts - expected) ** 2 / np.where(dense, expected, 1))[dense].sum()
    # In each row, what is left over makes one more cell, which is close to determined by the others.
    return float(chi2.sf(statistic, dense.sum() - (dense.sum(axis=1) > 1).sum()))


def test_other_characters_follow_the_bigrams() -> None:
    """Next characters fit the table (p well inside (0, 1) over seeds), and do not fit one that is a tenth flatter."""
    probs = TASK.next_probs
    assert_close(probs.sum(axis=1), np.ones(66), atol=1e-12)
    assert not probs[0, : TASK.n_triggers + 1].any() and not probs[:, 0].any()
    p = [chi_square(TASK.sample(2000, 64, seed), probs) for seed in range(6)]
    assert sum(x < 0.05 for x in p) <= 3 and min(p) > 1e-4 and max(p) > 0.1, p
    flatter = probs.copy()
    flatter[1:, 1:] = 0.9 * probs[1:, 1:] + 0.1 * probs[1:, 1:].mean(axis=0)
    assert chi_square(TASK.sample(2000, 64, 0), flatter) < 1e-6


def test_oracle_and_losses_by_hand() -> None:
    """The oracle is certain at triggers; its excess is 0; uniform predictions cost ln 66 there, ln 66 - H elsewhere."""
    word = [0, *(TASK.vocabulary.index(c) for c in "ate a")]  # after t comes a, after e comes t, after the space e
    ids = np.array([word])
    oracle = TASK.oracle(ids)
    assert oracle[0, 2].nonzero()[0].tolist() == [word[1]] and oracle[0, 3].nonzero()[0].tolist() == [word[2]]
    row = np.array(_table()["bigrams"][word[1] - 1], float)
    row /= row.sum()
    assert_close(oracle[0, 1, 1:], row)
    entropy = -(row[row > 0] * np.log(row[row > 0])).sum()
    assert_close(TASK.oracle_nats(ids)[0, [1, 2, 3]], np.array([entropy, 0, 0]), atol=1e-12)
    uniform = losses(TASK, ids, np.zeros((1, 6, 66)))
    assert uniform.icl == pytest.approx(np.log(66)) and uniform.markov == pytest.approx(np.log(66) - entropy)
    sequences = TASK.sample(50, 30, 0)
    with np.errstate(divide="ignore"):
        best = losses(TASK, sequences, np.maximum(np.log(TASK.oracle(sequences)), -60))
    assert max(abs(best.icl), abs(best.markov), abs(best.excess)) < 1e-9


def naive(module: Any, ids: np.ndarray, relu: bool) -> dict[str, list[float]]:
    """The measures from the weights alone, in float64, attention one query at a time."""
    w = {k: v.double().numpy() for k, v in module.state_dict().items()}
    width = module.config.hidden_size

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    n, t = ids.shape
    trigger, found = TASK.is_trigger(ids), {k: [] for k in ("first", "proxy", "value", "stream", "gap", "back")}
    h = w["model.decoder.embed_tokens.weight"][ids] + w["model.decoder.embed_positions.weight"][2 : t + 2]
    for layer in range(module.config.num_hidden_layers):
        at = f"model.decoder.layers.{layer}"
        x = norm(h, f"{at}.self_attn_layer_norm")
        q, k, v = (x @ w[f"{at}.self_attn.{p}_proj.weight"].T for p in "qkv")
        z = q @ k.transpose(0, 2, 1) / np.sqrt(width)
        a = np.zeros_like(z)
        for i in range(t):
            row = z[:, i, : i + 1]
            soft = np.exp(row - row.max(axis=1, keepdims=True))
            a[:, i, : i + 1] = np.maximum(row, 0) / (i + 1) if relu else soft / soft.sum(axis=1, keepdims=True)
        pairs = [(s, i) for s in range(n) for i in range(1, t) if not trigger[s, i]]
        sums = [a[s, i].sum() for s, i in pairs]
        found["first"].append(np.mean([a[s, i, 0] for s, i in pairs]))
        found["proxy"].append(np.mean([a[s, i, 0] / c if c > 0 else 0 for (s, i), c in zip(pairs, sums, strict=True)]))
        found["gap"].append(np.mean([z[s, i, 0] - z[s, i, 1:i].mean() for s, i in pairs if i > 1]))
        found["back"].append(np.mean([a[s, i, i - 1] for s in range(n) for i in range(t) if trigger[s, i]]))
        size = np.linalg.norm(v, axis=-1)
        found["value"].append(size[:, 0].mean() / size[:, 1:].mean())
        h = h + a @ v @ w[f"{at}.self_attn.out_proj.weight"].T
        hidden = np.maximum(norm(h, f"{at}.final_layer_norm") @ w[f"{at}.fc1.weight"].T, 0)
        h = h + hidden @ w[f"{at}.fc2.weight"].T
        size = np.linalg.norm(h, axis=-1)
        found["stream"].append(size[:, 0].mean() / size[:, 1:].mean())
    return found


@pytest.mark.parametrize("relu", [False, True])
def test_measures_are_plain_arithmetic_on_the_weights(relu: bool) -> None:
    """Captures through an opened model against the naive computation; this also pins the architecture."""
    module = build_toy(ToyShape(n_layers=2, d_model=16, context=24, d_vocab=66, relu=relu), seed=5)
    ids = TASK.sample(6, 20, seed=3)
    found, wanted = extreme_tokens(open_toy(module, TASK.vocabulary, "toy"), TASK, ids), naive(module, ids, relu)
    pairs = {
        "bos_attention": "first",
        "bos_proxy": "proxy",
        "back_attention": "back",
        "value_ratio": "value",
        "stream_ratio": "stream",
        "gap_nats": "gap",
    }
    for name, other in pairs.items():
        assert_close(getattr(found, name), np.array(wanted[other]), rtol=1e-4, atol=1e-5, what=name)
    assert relu == bool(np.abs(found.bos_attention - found.bos_proxy).max() > 0.01)


@functools.cache
def seen(name: str) -> ExtremeTokens:
    return extreme_tokens(open_bigram_backcopy(name), TASK, measured_sequences(TASK, SMALL.context))


@pytest.mark.parametrize("setting", [s.name for s in SMALL.settings])
def test_shipped_models_show_the_published_outcome(setting: str) -> None:
    """Each phenomenon is there or not as published, by criteria that are the same for all settings."""
    found = seen(setting)
    for phenomenon, said in SMALL.setting(setting).published.items():
        if said is not None:
            assert found.appears[phenomenon] == said, (phenomenon, found.value(phenomenon))
    assert found.losses.icl < 0.05 and found.losses.markov < 0.08 and found.losses.excess < 0.08
    # Some head copies; ReLU weights that do are not close to 1, since nothing divides them by their sum.
    assert found.back_attention.max() > (0.3 if SMALL.setting(setting).relu else 0.7)
    assert found.bos_attention_trigger.max() < 0.1  # and where it copies, nobody looks at <s>


def test_an_untrained_model_shows_nothing() -> None:
    """Attention on <s> is that of uniform rows, 1 / (i + 1); norms of <s> are those of any token."""
    found = seen("untrained")
    assert not any(found.appears.values())
    ids = measured_sequences(TASK, SMALL.context)
    t = np.nonzero(~TASK.is_trigger(ids) & (ids > 0))[1]
    assert_close(found.bos_attention, np.full(3, (1 / (t + 1)).mean()), atol=0.02)
    assert found.losses.icl > 4 and found.back_attention.max() < 0.1
    assert np.abs(found.bos_norm / np.sqrt(2 * SMALL.d_model) - 1).max() < 0.3  # two embeddings of N(0, 1) entries
    assert np.abs(found.value_ratio - 1).max() < 0.35 and np.abs(found.stream_ratio - 1).max() < 0.35


def test_sink_and_drain_sit_where_the_copying_head_is() -> None:
    """The block that holds the 3-layer model's sink is the one whose head copies, and its <s> has a large score."""
    found = seen("3-layer")
    assert found.sink_layer == int(found.back_attention.argmax()) and found.gap_nats[found.sink_layer] > 5
    assert found.stream_ratio[: found.sink_layer].max() == found.stream_ratio.max()  # the peak is made before it


def test_shipped_models_are_ordinary_models() -> None:
    """Texts get their <s> by default; the ReLU toy runs with ReLU attention; every name opens; others are refused."""
    model: Any = open_bigram_backcopy("1-layer-relu")
    assert model.module.config._attn_implementation == "relu" and model.info.n_layers == 1
    assert model.tokenize(["the"]).strings == ("<s>", "t", "h", "e")
    assert set(shipped_toys()) == {s.name for s in SMALL.settings} | {"untrained"}
    with pytest.raises(UnknownName, match="3-layers"):
        open_bigram_backcopy("3-layers")


def test_presets_say_what_differs() -> None:
    """The published numbers stand in `paper`; `small` names every one that it changes."""
    assert (PAPER.d_model, PAPER.context, PAPER.batch_size) == (256, 256, 512)
    rates = {s.name: (s.learning_rate, s.steps) for s in PAPER.settings}
    assert rates["3-layer"] == (3e-4, 10_000) and rates["3-layer-sgd"] == (0.03, 10_000)
    assert rates["1-layer-relu"] == (3e-3, 100_000)
    words = " ".join(SMALL.changes)
    for number in (SMALL.d_model, SMALL.context, SMALL.batch_size):
        assert str(number) in words
    for setting in SMALL.settings:
        assert f"{setting.steps:,}" in words and f"{setting.learning_rate:g}" in words
        assert setting.published == PAPER.setting(setting.name).published
    assert set(PAPER.changes) <= set(SMALL.changes)
    assert CRITERIA == {SINK: 0.5, DRAIN: 0.5, PEAK: 2.0}


def test_a_model_trained_here_learns_to_copy_and_grows_a_sink() -> None:
    """One block, a few hundred updates: the loss falls towards the oracle's, sink and drain appear, the peak does not."""
    torch.set_num_threads(1)
    shorter = replace(SMALL, context=32)
    trained = train(shorter, "1-layer", seed=7, steps=400, n_moments=3)
    start, end = trained.measured[0], trained.measured[-1]
    assert trained.steps[0] == 0 and trained.steps[-1] == 400 and len(trained.train_nats) == 400
    assert not any(start.appears.values()) and start.losses.excess > 2
    assert end.losses.excess < 0.12 and end.losses.icl < 0.1
    assert end.appears == {SINK: True, DRAIN: True, PEAK: False}, [end.value(p) for p in PHENOMENA]
    assert trained.train_nats[:20].mean() > 2.5 > 2.0 > trained.train_nats[-20:].mean()


def test_training_repeats_itself() -> None:
    """The same seed gives the same model; another seed another one; a run of nothing is refused."""
    torch.set_num_threads(1)
    tiny = replace(SMALL, d_model=16, context=12, batch_size=8)
    first, again, other = (train(tiny, "1-layer-relu", seed, steps=5, n_moments=2) for seed in (3, 3, 4))
    assert (first.train_nats == again.train_nats).all() and (first.train_nats != other.train_nats).any()
    with pytest.raises(InputError, match="Expected at least 1 step and 2 moments, found 0 and 16"):
        train(tiny, "1-layer", steps=0)
