"""Steering: a planted direction controls what is preferred, controls and shuffled labels do not; checked in numpy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SIZES, assert_close, random_weights, run, tiny_model, words_tokenizer

from probekit.analysis import Result
from probekit.backends.transformers import TransformersModel
from probekit.core import Batch, Capture, Forward, InputError, TextError, TokenText
from probekit.engine import run_pass
from probekit.methods.contrasts import chosen_doses
from probekit.phenomena.steering import stands_out, steering_patch
from probekit.reduce import NextToken

POSITIVE, NEGATIVE, OTHER = range(10, 30), range(30, 50), range(50, 128)
N_PAIRS, N_NEUTRAL, N_LAYERS = 8, 3, 3


@functools.cache
def planted_model() -> Any:
    """Blocks that add next to nothing, so that logits follow from embeddings alone, along one direction that counts.

    Embeddings of positive tokens lie on one side of a hyperplane and those of negative tokens on the other, amid
    noise within it; the unembedding raises positive tokens and lowers negative ones along the same normal.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    module = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    random_weights(module)
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(2, 128, 32))
    normal = vectors[0, 0] / np.linalg.norm(vectors[0, 0])
    vectors -= (vectors @ normal)[..., None] * normal
    side = np.array([1.0 if i in POSITIVE else -1.0 if i in NEGATIVE else 0.0 for i in range(128)])
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-7)  # nearly nothing: points that do nothing at all are refused
            layer.mlp.down_proj.weight.mul_(1e-7)
        module.model.norm.weight.fill_(1.0)
        module.model.embed_tokens.weight.copy_(torch.tensor(vectors[0] + 3 * side[:, None] * normal))
        module.lm_head.weight.copy_(torch.tensor(0.3 * vectors[1] + side[:, None] * normal))
    return TransformersModel.from_loaded(module.eval(), words_tokenizer(), name="planted").load()


def texts_for(n_pairs: int = N_PAIRS, n_neutral: int = N_NEUTRAL, *, seed: int = 0, flip: Any = ()) -> Batch:
    """Pairs that share a start and end with a positive or a negative token, then neutral texts.

    Pairs named in `flip` have their texts in the wrong order.
    """
    rng = np.random.default_rng(seed)
    ids: list[list[int]] = []
    for i in range(n_pairs):
        start = rng.choice(OTHER, int(rng.integers(4, 8))).tolist()
        pair = [[*start, int(rng.choice(POSITIVE))], [*start, int(rng.choice(NEGATIVE))]]
        ids += pair[::-1] if i in flip else pair
    ids += [rng.choice(OTHER, 10 + i).tolist() for i in range(n_neutral)]
    return Batch(tuple(TokenText(tuple(t), tuple(f" w{i}" for i in t)) for t in ids))


def steer(batch: Batch, model: Any = None, **params: Any) -> Result:
    params = {"n_neutral": N_NEUTRAL, "n_controls": 2, **params}
    return run("steering", model or planted_model(), batch, **params)["steering"]


@functools.cache
def planted_result() -> Result:
    return steer(texts_for(), n_controls=4, layers="0,1,2")


def test_planted_direction_steers_with_both_signs() -> None:
    """The preference follows the dose in every pair; random and orthogonal directions do next to nothing."""
    result = planted_result()
    data, first = result.dataset, result.findings[0]
    assert first.where["steers"] and "steers" in first.claim and "No block" not in first.claim
    assert (np.diff(data["change"].values, axis=1) > 0).all()
    assert (data["change"].sel(dose=0).values == 0).all() and (data["kl_nats"].sel(dose=0).values == 0).all()
    assert first.n == N_PAIRS and first.n_unit == "pairs"
    assert first.ci95 is not None and first.ci95[0] > 3 * np.abs(data["control_slope"].values).max()
    rises = result.findings[1]
    assert rises.value == 1 and rises.where["lowest"] < 0 < rises.where["highest"]
    orthogonal = data["control_slope"].values[:, data["kind"].values == "orthogonal"]
    assert np.abs(orthogonal).max() < 0.15 * first.value
    # Half the distance between the two sides is 3 along the normal; the rest of the difference is noise.
    normal = planted_normal()
    for direction in data["direction"].values:
        assert direction @ normal == pytest.approx(6, abs=1e-4)
    assert (data["agreement"].values > 0.4).all()


def planted_normal() -> np.ndarray:
    first = np.random.default_rng(1).normal(size=(2, 128, 32))[0, 0]
    return np.asarray(first / np.linalg.norm(first))


@pytest.mark.parametrize("position", ["last", "mean"])
def test_numbers_equal_a_naive_computation(position: str) -> None:
    """Directions from the other pairs, doses, preferences, slopes, KL and cost: once more, from embeddings alone."""
    batch = texts_for()
    data = steer(batch, layers="1", doses="0.5,2", position=position).dataset.isel(layer=0)
    module = planted_model().module
    embed, unembed = (w.weight.detach().double().numpy() for w in (module.model.embed_tokens, module.lm_head))
    eps = module.config.rms_norm_eps

    def logprobs(ids: tuple[int, ...], added: np.ndarray) -> np.ndarray:
        rows = embed[list(ids)] + added
        logits = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + eps) @ unembed.T
        return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))

    texts = [t.ids for t in batch]
    median = float(np.median([np.linalg.norm(embed[i]) for ids in texts for i in ids]))
    assert float(data["median_norm"]) == pytest.approx(median, rel=1e-6)
    # The start is shared and so is not part of the mean: both positions read the last token only.
    own = [embed[texts[2 * i][-1]] - embed[texts[2 * i + 1][-1]] for i in range(N_PAIRS)]
    everyone = np.mean(own, axis=0)
    assert_close(data["direction"].values, everyone, atol=1e-5)
    assert float(data["length"]) == pytest.approx(np.linalg.norm(everyone) / median, rel=1e-5)
    assert data["dose"].values.tolist() == [-2, -0.5, 0, 0.5, 2]
    for d, dose in enumerate(data["dose"].values):
        for i in range(N_PAIRS):
            others = np.mean([own[j] for j in range(N_PAIRS) if j != i], axis=0)
            added = dose * median * others / np.linalg.norm(others)
            preferences, kl = {}, []
            for steered in (False, True):
                ends = []
                for ids in texts[2 * i : 2 * i + 2]:
                    ends.append(logprobs(ids, added * steered)[-2, ids[-1]])
                preferences[steered] = ends[0] - ends[1]
            for ids in texts[2 * i : 2 * i + 2]:
                p, q = logprobs(ids, 0 * added)[-1], logprobs(ids, added)[-1]
                kl.append((np.exp(p) * (p - q)).sum())
            assert float(data["preference"][i]) == pytest.approx(preferences[False], abs=1e-4)
            assert float(data["change"][d, i]) == pytest.approx(preferences[True] - preferences[False], abs=1e-4)
            assert float(data["kl_nats"][d, i]) == pytest.approx(np.mean(kl), abs=1e-4)
            cosine = own[i] @ others / np.linalg.norm(own[i]) / np.linalg.norm(others)
            assert float(data["agreement"][i]) == pytest.approx(cosine, abs=1e-5)
        for k, ids in enumerate(texts[2 * N_PAIRS :]):
            added = dose * median * everyone / np.linalg.norm(everyone)
            at = (range(len(ids) - 1), ids[1:])
            cost = (logprobs(ids, 0 * added)[at] - logprobs(ids, added)[at]).mean()
            assert float(data["cost"][d, k]) == pytest.approx(cost, abs=1e-4)
    x, y = data["dose"].values, data["change"].values
    assert_close(data["slope"].values, [np.linalg.lstsq(x[:, None], y[:, i])[0][0] for i in range(N_PAIRS)], atol=1e-6)


def test_mean_counts_from_where_a_pair_parts() -> None:
    """Continuations of several tokens: the mean over them, of unequal lengths, without the shared start."""
    rng = np.random.default_rng(3)
    ids = []
    for _ in range(4):
        start = rng.choice(OTHER, 5).tolist()
        ids += [[*start, *rng.choice(POSITIVE, 2)], [*start, *rng.choice(NEGATIVE, 3)]]
    batch = Batch(tuple(TokenText(tuple(map(int, t)), tuple(f" w{i}" for i in t)) for t in ids))
    embed = planted_model().module.model.embed_tokens.weight.detach().double().numpy()
    for position, cut in (("last", -1), ("mean", 5)):
        data = steer(batch, n_neutral=0, layers="0", doses="1", position=position).dataset
        means = [embed[t[cut:]].mean(axis=0) for t in ids]
        expected = np.mean([means[i] - means[i + 1] for i in range(0, 8, 2)], axis=0)
        assert_close(data["direction"].values[0], expected, atol=1e-5)


def test_wrong_labels_on_all_pairs_turn_the_direction_and_nothing_else() -> None:
    right, wrong = steer(texts_for(), layers="1"), steer(texts_for(flip=range(N_PAIRS)), layers="1")
    assert_close(wrong["direction"].values, -right["direction"].values, atol=1e-5)
    assert_close(wrong["slope"].values, right["slope"].values, atol=1e-4)
    assert_close(wrong["preference"].values, -right["preference"].values, atol=1e-5)


def test_shuffled_labels_give_no_more_than_controls() -> None:
    """With each pair's order left to a coin, few of many shuffles pass, and their mean slope is near 0."""
    slopes, passed = [], 0
    for seed in range(16):
        coins = np.random.default_rng(100 + seed).random(10) < 0.5
        batch = texts_for(10, 1, seed=seed, flip=np.flatnonzero(coins))
        result = steer(batch, n_neutral=1, layers="1", doses="0.5", seed=seed)
        slopes.append(result.findings[0].value)
        passed += result.findings[0].where["steers"]
    planted = planted_result().findings[0].value
    assert passed <= 2, slopes
    assert abs(np.mean(slopes)) < 3 * np.std(slopes) / 4
    assert np.mean(slopes) < 0.3 * planted


def test_pairs_without_a_common_direction_do_not_steer() -> None:
    """Both texts of a pair end with any token, in a random model: slopes around 0, and next to no layer passes."""
    passed, slopes = 0, []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        ids = []
        for _ in range(8):
            start = rng.integers(3, 128, 5).tolist()
            ids += [[*start, int(end)] for end in rng.choice(np.arange(3, 128), 2, replace=False)]
        batch = Batch(tuple(TokenText(tuple(t), tuple(f" w{i}" for i in t)) for t in ids))
        result = steer(batch, tiny_model("llama-grouped").model, n_neutral=0, doses="0.5", seed=seed)
        passed += result.findings[0].where["steers"]
        slopes += result["slope"].mean("case").values.tolist()
    assert passed <= 2
    assert abs(np.mean(slopes)) < 3 * np.std(slopes) / np.sqrt(12)  # layers of one model are not independent


def test_controls_are_as_long_as_the_direction_and_at_right_angles() -> None:
    """Unit vectors; orthogonal ones at right angles to the direction, and within the span of the pairs' activations."""
    from probekit.methods.contrasts import AtLayer, Roles

    batch = texts_for(5)
    embed = planted_model().module.model.embed_tokens.weight.detach().double().numpy()
    at = AtLayer(embed[batch.ids], batch, Roles.of(batch, N_NEUTRAL), "last", 3, 0)
    steering, random, orthogonal = at.units[0], at.units[1:4], at.units[4:]
    for units in at.units:
        assert units.shape == (6, 32)
        assert_close(np.linalg.norm(units, axis=-1), np.ones(6), atol=1e-12)
    assert all((units == units[0]).all() for units in random)
    assert len({units[0].tobytes() for units in at.units}) == 7
    ends = np.array([embed[t.ids[-1]] for t in batch.texts[:10]])
    for units in orthogonal:
        assert_close((units * steering).sum(-1), np.zeros(6), atol=1e-12)
        for i in range(5):  # within the span of the other pairs' centred activations
            others = np.delete(ends, [2 * i, 2 * i + 1], axis=0)
            centred = others - others.mean(axis=0)
            inside = np.linalg.lstsq(centred.T, units[i])[0] @ centred
            assert_close(inside, units[i], atol=1e-9)


def test_order_of_pairs_changes_nothing_but_the_order() -> None:
    batch, order = texts_for(), [5, 2, 0, 7, 1, 6, 3, 4]
    rows = [r for i in order for r in (2 * i, 2 * i + 1)] + [2 * N_PAIRS + i for i in (2, 0, 1)]
    first, second = planted_result(), steer(batch.select(rows), n_controls=4, layers="0,1,2")
    for name in first.dataset.data_vars:
        expected = first[str(name)]
        expected = expected.isel(case=order) if "case" in expected.dims else expected
        expected = expected.isel(text=[2, 0, 1]) if "text" in expected.dims else expected
        assert_close(second[str(name)].values, expected.values, atol=2e-5, what=str(name))
    assert second["text"].values.tolist() == [18, 16, 17]


def test_patch_of_a_result_does_what_was_measured() -> None:
    """The helper's patch on neutral texts costs what the result says; a multiple of `direction` is the same."""
    batch, result = texts_for(), planted_result()
    neutral = batch.select(range(2 * N_PAIRS, len(batch)))
    capture = Capture("logits", NextToken(1))
    patches = {"steered": (steering_patch(result, 0.4, 1),), "plain": ()}
    nll = {}
    for name, patch in patches.items():
        trace, _ = run_pass(planted_model(), Forward((capture,), patch), neutral)
        nll[name] = -trace[capture]["logprob_nats"].groupby("text").mean().values
    expected = result["cost"].sel(layer=1, dose=0.4).values
    assert_close(nll["steered"] - nll["plain"], expected, atol=1e-5)
    assert steering_patch(result, 0.5).point.layer == result.findings[0].where["layer"]
    with pytest.raises(InputError, match=r"after the blocks \[0, 1, 2\], none after 7"):
        steering_patch(result, 0.5, 7)


def test_without_neutral_texts_there_is_no_cost() -> None:
    result = steer(texts_for(6, 0), n_neutral=0, layers="1", doses="1")
    assert result["cost"].shape == (1, 3, 0) and np.isnan(result["control_cost"].values).all()
    assert len(result.findings) == 3 and "cost" not in result.figures()


def test_what_cannot_be_steered_is_refused_before_anything_runs() -> None:
    batch = texts_for()
    with pytest.raises(TextError, match=r"19 texts, of which the last 4 are neutral.*15 are left.*odd number"):
        steer(batch, n_neutral=4)
    with pytest.raises(TextError, match=r"3 contrast pairs; steering needs at least 4"):
        steer(texts_for(3))
    with pytest.raises(TextError, match=r"last 30 are neutral.*0 contrast pairs|last 30 are neutral.*0 are left"):
        steer(batch, n_neutral=30)
    with pytest.raises(InputError, match=r"Layer 3 of 'resid_post' is outside this model: it has 3 layers"):
        steer(batch, layers="1,3")
    with pytest.raises(InputError, match=r"layers='one'; expected block numbers"):
        steer(batch, layers="one")
    for doses in ("", "0,1", "-1", "inf", "some"):
        with pytest.raises(InputError, match=r"expected positive numbers with commas"):
            steer(batch, doses=doses)
    same = Batch((batch.texts[0], batch.texts[0], *batch.texts[2:]))
    with pytest.raises(TextError, match=r"Texts 0 and 1, a contrast pair, are the same"):
        steer(same)
    short = TokenText(batch.texts[2].ids[:-1], batch.texts[2].strings[:-1])
    with pytest.raises(TextError, match=r"Texts 2 and 3, a contrast pair, differ in length only"):
        steer(Batch((*batch.texts[:3], short, *batch.texts[4:])))
    line = [TokenText((60, i), (" w60", f" w{i}")) for _ in range(4) for i in (10, 30)]
    with pytest.raises(TextError, match=r"differ along a single line"):
        steer(Batch(tuple(line)), n_neutral=0)


def test_layers_and_doses() -> None:
    """Negative layers count from the end; doses come with both signs and 0, each once, ascending."""
    result = steer(texts_for(), layers="-1, 0, 2", doses="1,0.5,1")
    assert result["layer"].values.tolist() == [0, 2] and result["dose"].values.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert chosen_doses("2") == (-2, 0, 2)
    assert len(result.provenance["plan"]) >= 1
    passes = result.analysis.passes(result.params, planted_model().info, texts_for())
    assert passes == 1 + 2 * 4 * 5
    assert sum(p["passes"] for p in result.provenance["plan"]) == passes


def test_verdict_needs_both_kinds_of_controls_and_the_interval() -> None:
    data = planted_result().dataset.copy(deep=True)
    assert stands_out(data, 1)
    for kind in ("random", "orthogonal"):
        loud = data.copy(deep=True)
        loud["control_slope"].values[1, data["kind"].values == kind] = data["slope"].values[1].mean()
        assert not stands_out(loud, 1)
    mixed = data.copy(deep=True)
    mixed["slope"].values[1] *= np.array([1, -1] * (N_PAIRS // 2))
    assert not stands_out(mixed, 1)
    backwards = data.copy(deep=True)
    backwards["slope"].values[1] *= -1
    assert not stands_out(backwards, 1)


def test_blocks_of_the_planted_model_add_nothing() -> None:
    """What the naive computation rests on: every layer gives the same numbers."""
    data = planted_result().dataset
    assert data.sizes["layer"] == N_LAYERS
    assert_close(data["slope"].values, np.repeat(data["slope"].values[:1], N_LAYERS, axis=0), atol=1e-5)
