"""Value drain: planted factors are found at sinks of their heads, exactly; values unrelated to sinks show none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, planted_sinks, run, scripted, see, texts_of, tiny_model

from probekit.analysis import Finding, Result
from probekit.backends.scripted import Script, planted, random_play
from probekit.core import Batch, Capture, TokenText
from probekit.reduce import Norm, OutputNorm

N_LAYERS, N_HEADS = 4, 3
LENGTHS = (30, 41, 25, 36, 30, 28)
NULL = random_play(N_LAYERS, N_HEADS)
Change = Callable[[TokenText, Script], Script]


def drains(where: dict[tuple[int, int], float], key: int = 0, keys: float = 1.0) -> Change:
    """All values and keys have length 1, but at one token of some pairs."""

    def plant(text: TokenText, script: Script) -> Script:
        assert script.value is not None and script.key is not None
        for rows in (script.value, script.key):
            rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        for (layer, head), factor in where.items():
            script.value[layer, key, head] *= factor
            script.key[layer, key, head] *= keys
        return script

    return plant


def play(*changes: Change, base: Any = NULL) -> Any:
    for change in changes:
        base = planted(base, change)
    return base


def find(played: Any, lengths: tuple[int, ...] = LENGTHS, batch: Batch | None = None, **params: Any) -> Result:
    model = scripted(play=played, n_layers=N_LAYERS, n_heads=N_HEADS)
    return run("value-drain", model, batch or texts_of(lengths), **params)["value-drain"]


def named(result: Result) -> dict[str, Finding]:
    """Findings by the null that they are held against."""
    words = {
        "a random other token in place of the sink": "drain",
        "norms at the token unrelated to sinks": "contrast",
        "a random later token": "first",
        "strength and ratio unrelated over pairs": "joint",
        "scores that do not depend on the key": "gap",
    }
    return {words[f.null_meaning]: f for f in result.findings}


def test_planted_drain_is_found_in_its_heads_with_its_strength() -> None:
    """Values at a fifth and keys at half their length at the sinks of two heads: these ratios there, 1 elsewhere."""
    pairs = {(1, 0): 0.6, (2, 1): 0.6}
    result = find(play(planted_sinks(pairs), drains(dict.fromkeys(pairs, 0.2), keys=0.5)))
    expected = {name: np.ones((len(LENGTHS), N_LAYERS, N_HEADS)) for name in ("output", "value", "key")}
    for layer, head in pairs:
        for name, factor in (("output", 0.2), ("value", 0.2), ("key", 0.5)):
            expected[name][:, layer, head] = factor
    for name, ratio in expected.items():
        assert_close(result[f"{name}_ratio"], ratio, rtol=1e-5)
        assert_close(result[f"first_{name}_ratio"], ratio, rtol=1e-5)
        typical = result[f"{name}_typical"]
        assert_close(typical.sel(case="strongest key").values, ratio.mean(axis=(0, 2)), rtol=1e-5)
        assert_close(typical.sel(case="others").values, np.ones(N_LAYERS), rtol=1e-5)
    assert_close(result["strength"].values[:, 1, 0], [(1 + 0.6 * (n - 1)) / n for n in LENGTHS], rtol=1e-6)
    assert set(result["main_pos"].values) == {0}
    assert_close(result["sink_share"].values, np.where(result["pos"].values == 0, 2 / 12, 0.0), rtol=1e-12)
    found = named(result)
    assert found["drain"].value == pytest.approx(0.2, rel=1e-5) and found["drain"].null == 1
    assert found["drain"].where["share_of_pairs"] == pytest.approx(2 / 12)
    assert "are drained" in found["drain"].claim and "key norm 0.500 ×" in found["drain"].claim
    assert found["contrast"].value == pytest.approx(0.8, rel=1e-5)
    assert found["first"].value == pytest.approx((2 * 0.2 + 10) / 12, rel=1e-5)
    assert {(f.n, f.n_unit) for f in found.values()} == {(6, "texts")}


def test_sink_at_another_position_is_drained_there() -> None:
    """Three sinks at position 5 with small values, one at position 0 without; large values at position 0 do not count.

    The published ratio sets position 0 against a mean that the drained token is part of.
    """
    pairs = {(0, 0): 0.7, (3, 2): 0.7, (3, 1): 0.7}
    drained = drains(dict.fromkeys(pairs, 0.25), key=5)
    result = find(
        play(planted_sinks(pairs, key=5), planted_sinks({(1, 1): 0.6}), drained, lambda _, s: _scaled(s, 3, 1, 0, 4.0))
    )
    assert set(result["main_pos"].values) == {5}
    assert_close(result["output_ratio"].values[:, 3, 1:], np.full((6, 2), 0.25), rtol=1e-5)
    assert_close(result["main_ratio"].values[:, 1, 1], np.ones(6), rtol=1e-5)
    found = named(result)
    assert found["drain"].value == pytest.approx((3 * 0.25 + 1) / 4, rel=1e-5)
    assert found["contrast"].value == pytest.approx(0.75, rel=1e-5)
    expected = [4 / ((n - 2 + 0.25) / (n - 1)) for n in LENGTHS]
    assert_close(result["first_output_ratio"].values[:, 3, 1], expected, rtol=1e-5)
    pos = result["pos"].values
    assert_close(result["sink_share"].values, np.where(pos == 5, 3 / 12, np.where(pos == 0, 1 / 12, 0.0)), rtol=1e-12)


def test_small_values_elsewhere_are_no_drain() -> None:
    """Small values at position 7, a sink at position 0: the ratio is 1 over the mean of the others, by hand."""
    pairs = {(1, 0): 0.6, (2, 1): 0.6}
    found = named(find(play(planted_sinks(pairs), drains(dict.fromkeys(pairs, 0.2), key=7))))
    expected = np.mean([1 / ((n - 2 + 0.2) / (n - 1)) for n in LENGTHS])
    assert found["drain"].value == pytest.approx(expected, rel=1e-5)
    assert "are larger than elsewhere" in found["drain"].claim


def test_another_sink_of_the_head_is_not_among_the_others() -> None:
    """Two sinks: the strongest is compared with tokens that are none, whatever the second one's values."""

    def two(text: TokenText, script: Script) -> Script:
        rows = script.pattern[2, 1, 5:]
        rows *= 0.1 / rows.sum(-1, keepdims=True)
        rows[:, 0], rows[:, 5] = 0.5, 0.4
        rows /= rows.sum(-1, keepdims=True)
        return script

    result = find(play(two, drains({(2, 1): 0.2}), lambda _, s: _scaled(s, 2, 1, 5, 0.01)))
    assert set(result["sink_pos"].values[:, 2, 1]) == {0}
    assert_close(result["output_ratio"].values[:, 2, 1], np.full(6, 0.2), rtol=1e-5)
    expected = [0.2 / ((n - 2 + 0.01) / (n - 1)) for n in LENGTHS]
    assert_close(result["first_output_ratio"].values[:, 2, 1], expected, rtol=1e-5)


def _scaled(script: Script, layer: int, head: int, pos: int, factor: float) -> Script:
    assert script.value is not None
    script.value[layer, pos, head] *= factor
    return script


def test_texts_without_a_sink_are_counted_as_such() -> None:
    """Sinks in the longer three of six texts: the ratio is theirs, n is all, and the claim says so."""
    pairs = {(1, 0): 0.6}

    def sometimes(text: TokenText, script: Script) -> Script:
        return planted_sinks(pairs)(text, script) if len(text) >= 30 else script

    result = find(play(drains(dict.fromkeys(pairs, 0.5)), sometimes), (30, 41, 25, 36, 26, 28))
    drain = named(result)["drain"]
    assert drain.value == pytest.approx(0.5, rel=1e-5) and drain.n == 6 and "3 of 6 texts" in drain.claim
    one = find(play(drains({}), sometimes), (30, 25, 26))
    assert "drain" not in named(one), "one text of three gives no interval"
    alone = named(find(play(drains(dict.fromkeys(pairs, 0.5)), sometimes), (30,)))["drain"]
    assert (alone.value, alone.ci95, alone.n) == (pytest.approx(0.5, rel=1e-5), None, 1)


def test_a_strongest_key_that_is_no_sink_is_not_among_the_others_either() -> None:
    """A weak key at position 5: its ratio is that of its own value, 0.25, to the others' 1; the pair has no sink."""
    result = find(play(planted_sinks({(1, 0): 0.25}, key=5), drains({(1, 0): 0.25}, key=5)), tail=4)
    assert set(result["sink_pos"].values[:, 1, 0]) == {5} and not result["sink_share"].values.any()
    assert_close(result["output_ratio"].values[:, 1, 0], np.full(6, 0.25), rtol=1e-5)
    assert set(named(result)) == {"first", "joint", "gap"}


def test_epsilon_and_tail_bound_the_search() -> None:
    """A weak sink counts below its strength only; a key in the tail never does."""
    played = play(planted_sinks({(1, 0): 0.4}), drains({(1, 0): 0.2}))
    assert "drain" in named(find(played)) and "drain" not in named(find(played, epsilon=0.5))
    mixed = play(planted_sinks({(1, 0): 0.45, (2, 0): 0.45}, key=5), planted_sinks({(3, 0): 0.9}))
    for epsilon, pos, share in ((0.3, 5, 2 / 12), (0.5, 0, 1 / 12)):
        result = find(mixed, epsilon=epsilon)
        assert set(result["main_pos"].values) == {pos} and result["sink_share"].values.max() == pytest.approx(share)
    late = play(planted_sinks({(1, 0): 0.9}, key=20), drains({(1, 0): 0.2}, key=20))
    assert "drain" not in named(find(late, (26, 26))) and named(find(late, (26, 26), tail=2))["drain"].value < 0.21


def test_stronger_sinks_that_drain_more_give_a_rank_correlation() -> None:
    """Strength and drain in the same order over pairs: rho = -1; in opposite order: +1."""
    pairs = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    strength = dict(zip(pairs, np.linspace(0.2, 0.9, len(pairs)).tolist(), strict=True))
    for factors, rho in ((np.linspace(1, 0.1, len(pairs)), -1), (np.linspace(0.1, 1, len(pairs)), 1)):
        drain = dict(zip(pairs, factors.tolist(), strict=True))
        joint = named(find(play(planted_sinks(strength), drains(drain))))["joint"]
        assert joint.value == pytest.approx(rho, abs=1e-9) and joint.null == 0
        assert ("drain more" in joint.claim) == (rho < 0)


def test_values_unrelated_to_sinks_are_silent() -> None:
    """Sinks planted, values random: over 40 models, 95 % of the intervals hold the null, and errors average out.

    Tolerances: three standard errors of the share of 40 intervals, and of the mean error over the models.
    """
    pairs = {(0, 0): 0.5, (1, 2): 0.7, (2, 1): 0.6, (3, 0): 0.8}
    seeds, covered, errors = 40, dict.fromkeys(("drain", "contrast", "first", "joint", "gap"), 0), []
    for seed in range(seeds):
        base = random_play(N_LAYERS, N_HEADS, seed=seed, sharpness=1.0)
        planted_in = play(planted_sinks(pairs), base=base)
        found = named(find(planted_in)) | {"gap": named(find(base))["gap"]}
        for name in covered:
            finding = found[name]
            assert finding.ci95 is not None
            covered[name] += finding.ci95[0] <= finding.null <= finding.ci95[1]
        errors.append([found[name].value - found[name].null for name in covered])
    least = seeds * 0.95 - 3 * (seeds * 0.95 * 0.05) ** 0.5
    assert min(covered.values()) >= least, covered
    assert min(covered.values()) < seeds, "some interval must miss, or it says nothing"
    error = np.array(errors)
    assert (np.abs(error.mean(axis=0)) < 3 * error.std(axis=0, ddof=1) / seeds**0.5).all(), error.mean(axis=0)


def test_planted_gap_is_found_at_every_query() -> None:
    """Scores of 3 and 1 nats on position 0 in two heads of block 2, none elsewhere; masked keys do not count."""

    def plant(text: TokenText, script: Script) -> Script:
        for head, nats in ((0, 3.0), (1, 1.0)):
            rows = script.pattern[2, head]
            rows[:, 0] *= np.exp(nats)
            rows /= rows.sum(-1, keepdims=True)
        return script

    result = find(play(plant))
    pos = result["pos"].values
    gap = result["gap_nats"].values
    assert np.isnan(gap[..., pos < 2]).all() and np.isfinite(gap[..., pos >= 2]).all()
    expected = np.zeros((N_LAYERS, N_HEADS))
    expected[2] = (3, 1, 0)
    assert_close(gap[..., pos >= 2], np.broadcast_to(expected[..., None], (4, 3, (pos >= 2).sum())), atol=1e-5)
    assert_close(result["text_gap_nats"].values, np.broadcast_to(expected, (6, 4, 3)), atol=1e-5)
    assert_close(result["gap_mean_nats"].values[2, 2:], np.full(39, 4 / 3), atol=1e-5)
    assert_close(result["gap_max_nats"].values[:, 2:], np.tile([[0.0], [0.0], [3.0], [0.0]], 39), atol=1e-5)
    found = named(result)["gap"]
    assert found.value == pytest.approx(4 / 3, abs=1e-5) and found.where["layer"] == 2
    assert found.where["mean_nats"] == pytest.approx(1 / 3, abs=1e-5)
    uniform = named(find(NULL))["gap"]
    assert uniform.value == pytest.approx(0, abs=1e-6)


def test_texts_in_which_every_token_is_a_sink() -> None:
    """Three tokens and no tail: there are no others, so no ratio at sinks; the published one and the gap stay."""
    result = find(NULL, (3, 3), tail=0)
    assert np.isnan(result["output_ratio"].values).all() and np.isfinite(result["first_output_ratio"].values).all()
    assert set(named(result)) == {"first", "gap"} and result.figures()


def test_a_backend_without_keys_or_values() -> None:
    """Without k the key measures are NaN and nothing else changes; without v the gap remains."""
    played = play(planted_sinks({(1, 0): 0.6}), drains({(1, 0): 0.2}))
    whole = find(played)
    for missing, kept in ((("k",), 5), (("k", "v"), 1)):
        model = scripted(play=played, n_layers=N_LAYERS, n_heads=N_HEADS)
        model.info = dataclasses.replace(model.info, sites=model.info.sites - set(missing))
        result = run("value-drain", model, texts_of(LENGTHS))["value-drain"]
        for name, array in whole.dataset.data_vars.items():
            own = str(name).removeprefix("first_").split("_")[0]
            absent = own == "key" or ("v" in missing and own in ("output", "value", "main"))
            absent &= str(name) != "main_pos"
            if absent:
                assert np.isnan(result[str(name)].values).all() and "NaN" in result.analysis.measures[str(name)].help
            else:
                assert_close(result[str(name)].values, array.values, atol=1e-12, what=str(name))
        assert len(result.findings) == kept and "key norm" not in " ".join(f.claim for f in result.findings)
        assert result.figures()


def test_grouped_heads_show_the_values_that_they_read() -> None:
    """Two query heads for each key-value head: norms stand once for each query head; the output norm is its own."""
    model, batch = tiny_model("llama-grouped").model, texts_of((20, 30))
    result = run("value-drain", model, batch)["value-drain"]
    value, key, output = see(model, [Capture("v", Norm()), Capture("k", Norm()), Capture("v", OutputNorm())], batch)
    for head in range(4):
        assert_close(result["value_norm"].values[:, head], value["norm"].values[..., head // 2], rtol=1e-5)
        assert_close(result["key_norm"].values[:, head], key["norm"].values[..., head // 2], rtol=1e-5)
    assert_close(result["output_norm"].values, output["output_norm"].values, rtol=1e-5)
    assert not np.allclose(result["output_norm"].values[:, 0], result["output_norm"].values[:, 1])
