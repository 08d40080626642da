"""Attention sinks at any position, at any length, and in made texts: planted rates come back, nulls stay silent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run, scripted, see, texts_of, tiny_model

from probekit.analysis import Result
from probekit.backends.scripted import Script, planted, random_play
from probekit.core import Batch, Capture, TokenText
from probekit.methods.sinks import (
    KINDS,
    UNIFORM,
    WITH_BOS,
    difference,
    made_rates,
    made_texts,
    sinks_of,
    uniform_received,
)
from probekit.reduce import AttentionStats
from probekit.stats import text_mean

T, N_LAYERS, N_HEADS, N_PAIRS = 64, 9, 4, 36
BOS, N_FEW = 2, 16  # natural texts here are of the ids 3 to 15; random ones of all 64
Pairs = set[tuple[int, int]]


def text_of(*ids: int) -> TokenText:
    return TokenText(ids, tuple(f" w{i}" for i in ids))


def put(script: Script, pairs: Pairs, key: int = 0, share: float = 0.6) -> None:
    """In some (layer, head) pairs, a share on one key wherever it is seen; what is left stays in proportion."""
    for layer, head in pairs:
        rows = script.pattern[layer, head, max(key, 1) :]
        rows[:, key] = 0
        rows *= (1 - share) / rows.sum(-1, keepdims=True)
        rows[:, key] = share


def find(plant: Any, batch: Batch, *, bos: int | None = BOS, **params: Any) -> Result:
    play = planted(random_play(N_LAYERS, N_HEADS), plant)
    model = scripted(play=play, n_layers=N_LAYERS, n_heads=N_HEADS, bos_id=bos)
    return run("attention-sinks", model, batch, **params)["attention-sinks"]


def as_pairs(values: Any) -> Pairs:
    return {(int(layer), int(head)) for layer, head in np.argwhere(np.asarray(values))}


def test_sinks_anywhere_are_found_with_and_without_position_0() -> None:
    """A union of planted pairs, exactly; a sink in the tail counts only once the tail is searched."""
    first = {(layer, 0) for layer in range(4)}
    fifth = {(layer, head) for layer in (3, 4) for head in (0, 1)}
    last = {(8, 2)}

    def plant(text: TokenText, script: Script) -> Script:
        put(script, first, 0, 0.4)
        put(script, fifth, 5, 0.5)
        put(script, last, len(text) - 3)
        return script

    batch = texts_of((T,) * 5)
    result = find(plant, batch)
    assert as_pairs(result["sink_rate_any"][2]) == first | fifth and as_pairs(result["sink_rate_other"][2]) == fifth
    (anywhere,) = (f for f in result.findings if f.claim.startswith("Some key is"))
    assert anywhere.value == pytest.approx(100 * 4 / N_PAIRS) and anywhere.where["any"] == pytest.approx(700 / N_PAIRS)
    assert (anywhere.where["pos"], anywhere.where["layer"], anywhere.null) == (5, 3, 0)
    assert (anywhere.ci95, anywhere.n) == (pytest.approx((100 / 9, 100 / 9)), 5)
    every = find(plant, batch, tail=0)
    assert as_pairs(every["sink_rate_other"][0]) == fifth | last
    nothing = find(plant, texts_of((80,) * 2), horizon=40, tail=64)
    assert np.array_equal(nothing["sink_rate_any"], nothing["sink_rate"]) and not nothing["sink_rate_other"].any()
    assert as_pairs(nothing["sink_rate"][0]) >= first - fifth, "position 0 counts whatever the tail is"


def test_threshold_is_strict() -> None:
    """A mean of exactly epsilon is no sink; position 0, other keys and any key alike."""
    at = np.array([[0.5, 0.5, 0.75], [0.75, 0.5, 0.5]])
    found = sinks_of(at, 0.5, 0)
    assert [found[k].tolist() for k in ("first", "any", "other")] == [[False, True], [True, True], [True, False]]


def test_uniform_attention_at_every_length() -> None:
    """alpha_0 = H_T / T for every T of the sweep; a rate of 0 where that is below epsilon, of 100 at T = 8 where not."""
    result = find(lambda _, script: script, texts_of((130, 140, 200, 150, 129)))
    lengths = (result["query"].values + 1).tolist()
    assert lengths == [8, 16, 32, 64, 128]
    harmonic = np.array([np.sum(1 / np.arange(1, t + 1)) / t for t in lengths])
    assert_close(result["uniform_by_length"], harmonic, rtol=1e-12)
    assert_close(result["received_by_length"], np.tile(harmonic, (5, 1)), rtol=1e-6)
    assert result["sink_rate_by_length"].values.tolist() == [[100, 0, 0, 0, 0]] * 5, "H_8 / 8 = 0.34"
    (lengthy,) = (f for f in result.findings if f.claim.startswith("Sink_1 is"))
    assert (lengthy.value, lengthy.null, lengthy.where["T"]) == (0, 0, lengths) and "not comparable" in lengthy.claim


def test_planted_share_at_every_length() -> None:
    """A share s on position 0 makes alpha_0(T) = (1 + s (T - 1)) / T: 0.3 is passed up to T = 32 and not at 64."""
    share = 0.28

    def plant(_: TokenText, script: Script) -> Script:
        put(script, {(layer, head) for layer in range(N_LAYERS) for head in range(3)}, share=share)
        return script

    result = find(plant, texts_of((64, 70)))
    lengths = result["query"].values + 1
    expected = 0.75 * (1 + share * (lengths - 1)) / lengths + 0.25 * result["uniform_by_length"].values
    assert_close(result["received_by_length"], np.tile(expected, (2, 1)), rtol=1e-6)
    assert result["sink_rate_by_length"].values.tolist() == [[100, 75, 75, 0]] * 2
    (lengthy,) = (f for f in result.findings if f.claim.startswith("Sink_1 is"))
    assert (lengthy.value, lengthy.where["rates"]) == (0, [100, 75, 75, 0])


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2", "mistral", "qwen2"])
def test_a_text_that_is_cut_is_a_shorter_text(kind: str) -> None:
    """The sweep over T equals runs on texts of T tokens, sliding windows of 8 included; at T = horizon, Sink_1."""
    model, batch = tiny_model(kind).model, texts_of((40, 33), n_vocab=120)
    result = run("attention-sinks", model, batch, horizon=16, epsilon=0.25)["attention-sinks"]
    for column, t in enumerate((8, 16, 32)):
        short = Batch(tuple(text_of(*text.ids[:t]) for text in batch))
        alpha = see(model, [Capture("pattern", AttentionStats())], short)[0]["received"].values[..., [0, t]]
        assert_close(result["received_by_length"].values[:, column], alpha.mean((0, 1)), rtol=1e-5, what=f"T = {t}")
        rates = 100 * (alpha > 0.25).mean((0, 1))
        assert_close(result["sink_rate_by_length"].values[:, column], rates, rtol=1e-12, what=f"T = {t}")
    published = 100 * result["sink_rate"].mean(("layer", "head")).values
    assert_close(result["sink_rate_by_length"].values[:, 1], published, rtol=1e-6)


def natural_texts() -> Batch:
    """Eight texts of few different tokens; every other one begins with the beginning-of-sequence token."""
    plain = texts_of((T + 6,) * 8, n_vocab=N_FEW)
    return Batch(tuple(text_of(BOS, *t.ids) if i % 2 else t for i, t in enumerate(plain)))


def test_planted_rates_of_made_texts() -> None:
    """Sinks where the first token is BOS, where tokens differ, where they are natural: each case has its own sum."""
    at_start = {(layer, head) for layer in (1, 2) for head in (0, 1)}  # 4 pairs
    varied = {(5, 3), (6, 3), (7, 3)}
    familiar = {(8, 0), (8, 1)}
    elsewhere = {(4, 2)}

    def plant(text: TokenText, script: Script) -> Script:
        begun, body = text.ids[0] == BOS, set(text.ids[1:])
        put(script, at_start if begun else set())
        put(script, varied if len(body) > 1 else set())
        put(script, familiar if max(body) < N_FEW and len(body) > 1 else set())
        put(script, elsewhere if len(body) == 1 else set(), key=7)
        return script

    result = find(plant, natural_texts(), n_made=5, seed=3)
    expected = {"natural": 5, "random": 3, "repeated": 0}
    expected |= {kind + WITH_BOS: n + 4 for kind, n in expected.items()}
    assert result["case"].values.tolist() == [*expected, UNIFORM]
    for case, n in expected.items():
        assert_close(result["made_rate"].sel(case=case).values, np.full(5, 100 * n / N_PAIRS), rtol=1e-12, what=case)
        other = 100 / N_PAIRS if case.startswith("repeated") else 0
        assert_close(result["made_rate_other"].sel(case=case).values, np.full(5, other), rtol=1e-12, what=case)
    by_layer = result["made_rate_by_layer"]
    assert by_layer.sel(case="natural with BOS").values.tolist() == [0, 50, 50, 0, 0, 25, 25, 25, 50]
    assert result["made_rate"].sel(case=UNIFORM).values[0] == 0 and not by_layer.sel(case=UNIFORM).any()
    gaps = [f for f in result.findings if f.unit == "percentage points"]
    assert_close([f.value for f in gaps], np.array([-2, -5, -2, -5, 4]) * 100 / N_PAIRS, rtol=1e-9)
    assert [(f.null, f.n) for f in gaps] == [(0, 5)] * 5 and {f.where["T"] for f in gaps} == {T}
    assert gaps[1].claim.startswith("Without a beginning-of-sequence token, Sink_1 is 0.0 % for one repeated token")
    assert result.findings[0].value == pytest.approx(100 * (4 * 5 + 4 * 9) / 8 / N_PAIRS), "the run's own texts"
    assert {"made", "made_depth"} <= set(result.figures())


def test_made_texts_take_one_more_pass_and_only_if_asked() -> None:
    plain, made = (find(lambda _, s: s, natural_texts(), n_made=n) for n in (0, 3))
    assert [p["why"] for p in plain.provenance["plan"]] == [""]
    assert plain["case"].values.tolist() == [UNIFORM] and not set(plain.figures()) & {"made", "made_depth"}
    first, second = made.provenance["plan"]
    assert (first["why"], second["n_texts"], second["n_tokens"], second["passes"]) == ("", 18, 18 * T, 1)
    assert second["why"].startswith("made texts")
    for name in ("received", "sink_rate", "sink_rate_by_length"):
        assert np.array_equal(plain[name], made[name]), "what is made changes nothing about the run's own texts"


def test_the_seed_decides_which_texts_are_made() -> None:
    """A sink where the second token is odd: random and repeated rates follow the seed, natural ones do not."""

    def plant(text: TokenText, script: Script) -> Script:
        put(script, {(layer, 0) for layer in range(N_LAYERS)} if text.ids[1] % 2 else set())
        return script

    batch = texts_of((10,) * 4)
    how: dict[str, Any] = {"bos": None, "n_made": 12, "horizon": 8, "epsilon": 0.5}
    one, again, other = (find(plant, batch, seed=seed, **how)["made_rate"] for seed in (0, 0, 1))
    assert np.array_equal(one, again, equal_nan=True)
    assert np.array_equal(one[0], other[0], equal_nan=True)
    assert not np.array_equal(one[1], other[1]) and not np.array_equal(one[2], other[2])


def test_without_such_a_token_there_are_three_cases() -> None:
    result = find(lambda _, s: s, texts_of((T,) * 2), bos=None, n_made=4)
    assert result["case"].values.tolist() == [*KINDS, UNIFORM]
    assert np.isnan(result["made_rate"].values[0]).tolist() == [False, False, True, True], "two natural texts"
    assert len([f for f in result.findings if f.unit == "percentage points"]) == 2


def test_made_texts_are_what_they_are_called() -> None:
    """Deterministic; of T tokens; random ids uniform without BOS; one token repeated; BOS in front once, or not at all."""
    info, batch = scripted(bos_id=BOS).info, natural_texts()
    made = made_texts(batch, info, n=200, n_tokens=T, seed=0)
    assert made == made_texts(batch, info, n=200, n_tokens=T, seed=0)
    assert made["random"] != made_texts(batch, info, n=200, n_tokens=T, seed=1)["random"]
    assert {len(ids) for texts in made.values() for ids in texts} == {T}
    assert [len(made[kind]) for kind in KINDS] == [8, 200, 200]
    counts = np.bincount(np.ravel(made["random"]), minlength=info.d_vocab)
    rest = np.delete(counts, BOS)
    assert counts[BOS] == 0 and len(counts) == 64
    mean = 200 * T / 63
    assert abs(rest - mean).max() < 4.5 * np.sqrt(mean), "a binomial count"
    assert all(len(set(ids)) == 1 for ids in made["repeated"]) and len({ids[0] for ids in made["repeated"]}) > 50
    for kind in KINDS:
        for ids, twin in zip(made[kind], made[kind + WITH_BOS], strict=True):
            assert ids[0] != BOS and twin == (BOS, *ids[:-1])
    assert [ids[:3] for ids in made["natural"]] == [t.ids[1:4] if i % 2 else t.ids[:3] for i, t in enumerate(batch)]


def test_natural_texts_are_cut_alike_and_spread_over_the_corpus() -> None:
    """A text of T tokens, BOS included, has T - 1 without it: then every case has T - 1, and says so."""
    info = scripted(bos_id=BOS).info
    texts = tuple(text_of(*([10 + i] * T)) for i in range(9))
    assert [ids[0] for ids in made_texts(Batch(texts), info, n=3, n_tokens=T, seed=0)["natural"]] == [10, 13, 16]
    short = Batch((*texts[:1], text_of(BOS, *[5] * (T - 1))))
    made = made_texts(short, info, n=3, n_tokens=T, seed=0)
    assert {len(ids) for some in made.values() for ids in some} == {T - 1}
    result = find(lambda _, s: s, short, n_made=3)
    assert result.dataset.attrs["made_tokens"] == T - 1
    assert {f.where["T"] for f in result.findings if f.unit == "percentage points"} == {T - 1}


def test_differences_are_silent_where_there_are_none() -> None:
    """Sinks by the throw of a coin, 400 times: every interval misses 0 about as often as it may, in 5 % (within 4 errors)."""
    base = find(lambda _, script: script, texts_of((10,) * 7), n_made=9, horizon=8)
    missed = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        counts = {c: 7 if c.startswith("natural") else 9 for c in base["case"].values[:-1]} | {UNIFORM: 1}
        thrown = {case: rng.random((n, N_LAYERS, N_HEADS, 8)) for case, n in counts.items()}
        data = base.dataset.assign(made_rates(thrown, 0.5, 0).data_vars)
        gaps = [f for f in replace(base, dataset=data).findings if f.unit == "percentage points"]
        missed.append([f.ci95 is None or not f.ci95[0] <= 0 <= f.ci95[1] for f in gaps])
        assert {f.n for f in gaps} == {7}
    rates = np.mean(missed, axis=0)
    error = np.sqrt(0.05 * 0.95 / 400)
    assert rates.shape == (5,) and (rates < 0.05 + 4 * error).all() and (rates > 0.05 - 4 * error).all(), rates


def test_difference_is_no_narrower_than_that_of_welch() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    for n, m, spread in ((5, 5, 1.0), (4, 50, 0.1), (40, 4, 5.0), (30, 30, 1.0)):
        a, b = rng.normal(1, spread, n), rng.normal(0, 1, m)
        ours, welch = difference(text_mean(a), text_mean(b), "texts"), ttest_ind(a, b, equal_var=False)
        low, high = welch.confidence_interval()
        assert ours.value == pytest.approx(a.mean() - b.mean()) and ours.n == min(n, m)
        assert ours.ci95 is not None and 1 <= (ours.ci95[1] - ours.ci95[0]) / (high - low) < 1.35, (n, m)
    assert difference(text_mean(np.ones(1)), text_mean(np.ones(5)), "texts").ci95 is None


def test_uniform_attention_by_key() -> None:
    """The closed form against the matrix itself."""
    rows = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    assert_close(uniform_received(T), rows.sum(axis=0) / np.arange(T, 0, -1), rtol=1e-12)
