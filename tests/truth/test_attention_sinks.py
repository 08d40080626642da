"""Attention sinks: planted ones are found where and as strongly as planted; uniform attention has none."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, planted_sinks, run, scripted, see, texts_of, tiny_model, words_tokenizer

from probekit.analysis import Result
from probekit.backends.scripted import Script, planted, random_play
from probekit.backends.transformers import TransformersModel
from probekit.core import Batch, Capture, TokenText
from probekit.methods.sinks import sink_phases
from probekit.reduce import AttentionStats, Keep

T, N_LAYERS, N_HEADS = 64, 9, 4
LENGTHS = (64, 80, 70, 64, 100, 66)
UNIFORM = float(np.mean(1 / np.arange(1, T + 1)))  # H_T / T


def sinks(where: dict[tuple[int, int], float], key: int = 0) -> Any:
    """Uniform causal attention, but for planted sinks."""
    return planted(random_play(N_LAYERS, N_HEADS), planted_sinks(where, key))


def find(play: Any, lengths: tuple[int, ...] = LENGTHS, **params: Any) -> Result:
    model = scripted(play=play, n_layers=N_LAYERS, n_heads=N_HEADS)
    return run("attention-sinks", model, texts_of(lengths), **params)["attention-sinks"]


def test_planted_sinks_are_found_in_their_heads_with_their_strength() -> None:
    """The published rate is the share of planted pairs, exactly; received attention is what the rows say."""
    strong = {(layer, head): 0.5 for layer in (1, 2, 5, 6, 7) for head in range(3)}
    weak = {(layer, 3): 0.2 for layer in range(N_LAYERS)}  # visible, but below the threshold
    result = find(sinks(strong | weak))
    expected = np.zeros((len(LENGTHS), N_LAYERS, N_HEADS))
    for layer, head in strong:
        expected[:, layer, head] = 1
    assert np.array_equal(result["sink_rate"], expected)
    rate, share, phases, others, *_ = result.findings
    assert rate.value == pytest.approx(100 * len(strong) / (N_LAYERS * N_HEADS), rel=1e-6)
    assert (rate.null, rate.unit, rate.n, rate.n_unit) == (0.0, "percent", 6, "texts")
    assert (phases.value, phases.where["phases"]) == (2, [[1, 2], [5, 7]])
    received = result["received"].values[1, 0][result["pos"].values == 0]
    assert_close(received, [(1 + 0.5 * (n - 1)) / n for n in LENGTHS], rtol=1e-6)
    assert others.value == 0 and "No token beside position 0" in others.claim
    pos = result["pos"].values
    held = (15 * 0.5 + 9 * 0.2) / 36 + 12 / 36 * float(np.mean(1 / (pos[pos > 0] + 1)))
    assert share.value == pytest.approx(held, rel=1e-5)
    assert share.ci95 is not None and share.ci95[0] > share.null


def test_uniform_attention_has_no_sink() -> None:
    """The matched null: alpha_1 = H_T / T, rate 0, no phase, and the exact share on position 0."""
    result = find(random_play(N_LAYERS, N_HEADS), (T,) * 5)
    first = result["pos"].values == 0
    assert_close(result["received"].values[..., first], np.full((N_LAYERS, N_HEADS, 5), UNIFORM), rtol=1e-6)
    assert pytest.approx(0.0741, abs=5e-5) == UNIFORM
    rate, share, phases, others, *_ = result.findings
    assert (rate.value, rate.null, phases.value, others.value) == (0, 0, 0, 0)
    assert phases.claim == "No block has sinks in many heads."
    even = float(np.mean(1 / np.arange(2, T + 1)))
    assert share.value == pytest.approx(even, rel=1e-6) and share.null == pytest.approx(even, rel=1e-12)
    rows = np.log(np.arange(2, T + 1))
    assert_close(result["layer_entropy_nats"], np.full(N_LAYERS, rows.mean()), rtol=1e-6)
    rest = np.log(np.arange(1, T))
    assert_close(result["layer_entropy_rest_nats"], np.full(N_LAYERS, rest.mean()), rtol=1e-5)


def test_noisy_attention_has_no_sink() -> None:
    """Random scores of unit variance: no rate, no phase, on any of twenty models."""
    for seed in range(20):
        model = scripted(play=random_play(2, 3, seed=seed, sharpness=1.0), n_layers=2, n_heads=3)
        rate, _, phases, others, *_ = run("attention-sinks", model, texts_of((T, 70), seed=seed))[
            "attention-sinks"
        ].findings
        assert (rate.value, phases.value, others.value) == (0, 0, 0)


def test_threshold_below_the_uniform_value_says_that_everything_is_a_sink() -> None:
    """With epsilon under H_T / T the null itself is a sink everywhere, and the finding says so."""
    rate = find(random_play(N_LAYERS, N_HEADS), (T,) * 5, epsilon=0.07).findings[0]
    assert (rate.value, rate.null) == (100, 100)
    rate = find(random_play(N_LAYERS, N_HEADS), (T,) * 5, epsilon=0.075).findings[0]
    assert (rate.value, rate.null) == (0, 0)


def test_threshold_is_decided_for_each_text() -> None:
    """A sink in one of two texts counts as half, although the mean received attention is below the threshold."""

    def plant(text: TokenText, script: Script) -> Script:
        if text.ids[0] == 3:
            script.pattern[:, :, 1:] *= 0.55 / script.pattern[:, :, 1:, 1:].sum(-1, keepdims=True)
            script.pattern[:, :, 1:, 0] = 0.45
        return script

    texts = (TokenText((3, *range(4, 67)), ("a",) * 64), TokenText(tuple(range(4, 68)), ("b",) * 64))
    model = scripted(play=planted(random_play(), plant))
    result = run("attention-sinks", model, Batch(texts))["attention-sinks"]
    mean_then_threshold = result["received"].values[..., result["pos"].values == 0].mean()
    assert mean_then_threshold < 0.3 and result.findings[0].value == 50
    assert result["sink_rate_by_key"].values[0] == 50


def test_sink_at_another_position_is_found_there() -> None:
    """A sink at position 5: the rate by key, the token and its layers; position 0 stays clean."""
    where = {(layer, head): 0.6 for layer in (3, 4) for head in (0, 1, 2)}
    result = find(sinks(where, key=5))
    by_key = result["sink_rate_by_key"].values
    assert by_key[5] == pytest.approx(100 * 6 / 36) and np.nansum(by_key) == pytest.approx(by_key[5])
    at = result["pos"].values == 5
    assert_close(result["sink_share"].values[3:5, at], np.full((2, 6), 0.75), rtol=1e-12)
    assert np.nansum(result["sink_share"].values[:, ~at]) == 0
    rate, _, phases, others, *_ = result.findings
    assert (rate.value, phases.value) == (0, 0)
    assert others.value == pytest.approx(6 / 36, rel=1e-6) and others.where["pos"] == 5


def test_tail_is_left_out_of_the_search() -> None:
    """Every token attends to itself: the last keys receive much from few queries and are no sinks."""

    def plant(text: TokenText, script: Script) -> Script:
        script.pattern[:] = np.eye(len(text))
        return script

    result = find(planted(random_play(N_LAYERS, N_HEADS), plant), (T,) * 2)
    assert_close(result["received"].values[0, 0, :T], 1 / (T - np.arange(T)), rtol=1e-6)
    assert np.isnan(result["sink_rate_by_key"].values[-8:]).all() and not np.isnan(result["sink_rate_by_key"][55])
    assert np.isnan(result["sink_share"].values[:, T - 8 : T]).all()
    assert [f.value for f in result.findings[::2]] == [0, 0, 0] and result.findings[3].value == 0
    assert_close(result["layer_entropy_nats"], np.zeros(N_LAYERS), atol=1e-6)
    without = find(planted(random_play(N_LAYERS, N_HEADS), plant), (T,) * 2, tail=0)
    assert without["sink_rate_by_key"].values[-3:].tolist() == [100, 100, 100], "these are what the tail hides"


def test_tail_longer_than_the_horizon_leaves_nothing_to_search() -> None:
    result = find(sinks({(0, 0): 0.5}), (80,), horizon=40, tail=64)
    assert np.isnan(result["sink_rate_by_key"]).all()


def test_all_attention_on_position_0() -> None:
    """One-hot rows: received 1, entropy 0, rate 100 %."""
    result = find(sinks({(layer, head): 1.0 for layer in range(N_LAYERS) for head in range(N_HEADS)}))
    rate, share, phases, *_ = result.findings
    assert (rate.value, phases.value, phases.where["phases"]) == (100, 1, [[0, N_LAYERS - 1]])
    assert share.value == pytest.approx(1)
    assert_close(result["layer_entropy_nats"], np.zeros(N_LAYERS), atol=1e-6)
    assert set(result["received"].values[..., result["pos"].values == 0].ravel()) == {1.0}


def test_rate_is_measured_on_the_first_tokens_of_a_longer_text() -> None:
    """The rate at T = 64 on texts of 64 and of 200 tokens with the same rows is the same, and falls beyond the horizon."""
    where = {(layer, 0): 0.31 for layer in range(N_LAYERS)}
    short, long = find(sinks(where), (T,) * 5), find(sinks(where), (200,) * 5)
    assert short.findings[0].value == long.findings[0].value == pytest.approx(25)
    assert np.array_equal(short["sink_rate_by_key"], long["sink_rate_by_key"], equal_nan=True)
    assert np.array_equal(short["sink_rate_by_epsilon"], long["sink_rate_by_epsilon"])


def test_phases_are_runs_of_at_least_two_layers() -> None:
    assert sink_phases(np.array([0.3, 0.3, 0, 0.9, 0, 0.25, 0.26, 0.26])) == [(0, 1), (6, 7)]
    assert sink_phases(np.zeros(4)) == [] and sink_phases(np.ones(3)) == [(0, 2)]


def test_a_repeated_token_makes_all_positions_equal() -> None:
    """One token over and over, no beginning-of-sequence token: hidden states are equal at every position and layer.

    This holds for every set of weights, with rotary positions and without any, because all values are equal.
    """
    batch = Batch((TokenText((7,) * T, ("x",) * T),))
    for kind in ("llama", "llama-grouped", "mistral", "qwen2"):
        rows = see(tiny_model(kind).model, [Capture("resid_post", Keep())], batch)[0]["value"].values
        assert np.abs(rows - rows[:, :1]).max() < 1e-5 * np.abs(rows).max(), kind
    gpt2 = see(tiny_model("gpt2").model, [Capture("resid_post", Keep())], batch)[0]["value"].values
    assert np.abs(gpt2 - gpt2[:, :1]).max() > 0.1 * np.abs(gpt2).max(), "learned positions tell positions apart"


def test_a_repeated_token_without_positions_has_no_sink() -> None:
    """Without positions the rows are uniform: alpha_1 = H_T / T and the published rate is 0, whatever the weights."""
    module = copy.deepcopy(tiny_model("llama").module)

    def nowhere(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*position_ids.shape, 8)
        return torch.ones(shape), torch.zeros(shape)

    module.model.rotary_emb.forward = nowhere
    model = TransformersModel.from_loaded(module, words_tokenizer(), name="nowhere").load()
    batch = Batch((TokenText((7,) * T, ("x",) * T),))
    stats = see(model, [Capture("pattern", AttentionStats())], batch)[0]
    assert_close(stats["received"].values[..., 0], np.full((3, 4), UNIFORM), rtol=1e-4)
    result = run("attention-sinks", model, batch, n_made=3)["attention-sinks"]
    assert result.findings[0].value == 0
    assert result["made_rate"].sel(case="repeated").values.tolist() == [0, 0, 0]
