"""Activation patching on circuits that are built by hand, on the endpoints it must reproduce, and on nothing at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import D_MODEL, N_HEADS, N_LAYERS, assert_close, run, tiny_config, tiny_model, words_tokenizer
from scipy.stats import spearmanr

from probekit.analysis import Result
from probekit.backends.transformers import TransformersModel
from probekit.core import Batch, Capture, Forward, InputError, Patch, Replace, TextError, TokenText
from probekit.engine import run_pass
from probekit.reduce import AtPosition, Keep, read_answers
from probekit.stats import held_out_best, rank_correlation

CARRIER = (1, 2)  # block and head that move the difference to the last token
CONSTANT, INFO, MOVED, SAME = 0, slice(1, 9), slice(17, 25), 31  # dimensions of the stream
HEAD = D_MODEL // N_HEADS


def text(ids: Any) -> TokenText:
    return TokenText(tuple(map(int, ids)), tuple(f" w{i}" for i in ids))


def pairs_of(lengths: tuple[int, ...], changed: tuple[int, ...] = (1,), seed: int = 0) -> Batch:
    """Pairs of random texts that differ at `changed` and in the answer at their end."""
    rng = np.random.default_rng(seed)
    done = []
    for n in lengths:
        clean = rng.integers(3, 120, n)
        corrupted = clean.copy()
        for position in (*changed, -1):
            corrupted[position] = (clean[position] - 3 + rng.integers(1, 117)) % 117 + 3
        done += [text(clean), text(corrupted)]
    return Batch(tuple(done))


def _built(fill: Callable[[Any, np.random.Generator], None]) -> TransformersModel:
    """A llama with uniform attention, MLPs that write one constant and norms nearly constant; `fill` adds to it."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding = module.get_input_embeddings().weight
        embedding[:, CONSTANT] = 200.0  # so large that what else is in the stream does not change its length
        embedding[:, INFO] = torch.as_tensor(rng.normal(size=(len(embedding), HEAD)), dtype=torch.float32)
        fill(module, rng)
        module.lm_head.weight[:, SAME] = torch.as_tensor(rng.normal(size=128), dtype=torch.float32)
        for layer in module.model.layers:
            layer.mlp.gate_proj.weight[0, CONSTANT] = layer.mlp.up_proj.weight[0, CONSTANT] = 1.0
            layer.mlp.down_proj.weight[SAME, 0] = 0.1
    return TransformersModel.from_loaded(module, words_tokenizer(), name="built").load()


@functools.cache
def circuit() -> TransformersModel:
    """One head moves what differs from its token to all later ones; the answer reads only what was moved."""

    def fill(module: Any, rng: np.random.Generator) -> None:
        block, head = CARRIER
        mine = slice(head * HEAD, (head + 1) * HEAD)
        module.model.layers[block].self_attn.v_proj.weight[mine, INFO] = 50 * torch.eye(HEAD)
        module.model.layers[block].self_attn.o_proj.weight[MOVED, mine] = torch.eye(HEAD)
        module.lm_head.weight[:, MOVED] = torch.as_tensor(rng.normal(size=(128, HEAD)) * 30, dtype=torch.float32)

    return _built(fill)


@functools.cache
def linear() -> TransformersModel:
    """Every head of every block moves something, all of it linearly."""

    def fill(module: Any, rng: np.random.Generator) -> None:
        for layer in module.model.layers:
            for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj):
                projection.weight.copy_(torch.as_tensor(rng.normal(size=(D_MODEL, D_MODEL)), dtype=torch.float32))
            layer.self_attn.v_proj.weight[:, CONSTANT] = 0
            layer.self_attn.o_proj.weight[CONSTANT] = 0
        module.lm_head.weight.copy_(torch.as_tensor(rng.normal(size=(128, D_MODEL)) * 30, dtype=torch.float32))

    return _built(fill)


def patched(model: Any, batch: Batch, **params: Any) -> Result:
    return run("activation-patching", model, batch, **{"min_gap": 0.01, **params})["activation-patching"]


def at(result: Result, variable: str, site: str, role: str, run_: str = "corrupted") -> np.ndarray:
    """Values at tokens of one role of one run; axes layer, token."""
    data = result.dataset
    return data[variable].sel(case=site).values[:, (data["role"].values == role) & (data["run"].values == run_)]


def test_the_planted_head_is_found_and_no_other_place() -> None:
    """The stream carries the difference at the changed token up to the carrier's block, at the last token after it."""
    result = patched(circuit(), pairs_of((7, 5, 9, 6, 8)))
    block, head = CARRIER
    for run_, row in (("corrupted", 1), ("clean", 0)):
        expected = np.zeros((N_LAYERS, N_HEADS, 5))
        expected[block, head] = 1
        assert_close(result["head_effect"].values[..., row::2], expected, atol=1e-4)
        for site, role, layers in (
            ("resid_pre", "changed", [0, 1]),
            ("resid_pre", "last", [2]),
            ("attn_out", "last", [block]),
        ):
            found = at(result, "effect", site, role, run_)
            assert_close(found, np.repeat(np.isin(range(3), layers)[:, None], 5, 1).astype(float), atol=1e-4)
        for site, role in (("resid_pre", "after"), ("attn_out", "changed"), ("attn_out", "after"), ("mlp_out", "last")):
            assert np.abs(at(result, "effect", site, role, run_)).max() < 1e-4
        for site in ("resid_pre", "attn_out", "mlp_out"):
            assert (at(result, "effect", site, "before", run_) == 0).all()
            assert np.isnan(at(result, "effect", site, "answer", run_)).all()


def test_findings_name_the_planted_places() -> None:
    found = patched(circuit(), pairs_of((7, 5, 9, 6, 8))).findings
    where = [f.where for f in found]
    travel, gap = found[0], found[1]
    assert (travel.value, travel.null, travel.n, travel.n_unit) == (2.0, 3.0, 5, "pairs")
    assert gap.where["left_out"] == 0
    for direction in ("denoising", "noising"):
        head = {"direction": direction, "site": "z", "layer": CARRIER[0], "head": CARRIER[1]}
        output = {"direction": direction, "site": "attn_out", "layer": CARRIER[0], "role": "last"}
        for place, others in ((head, N_LAYERS * N_HEADS), (output, None)):
            finding = found[where.index(place)]
            assert finding.value == pytest.approx(1, abs=1e-4), finding
            if others:
                assert finding.null == pytest.approx(1 / others, abs=1e-4)


def test_attribution_is_exact_where_the_model_is_linear() -> None:
    """Uniform attention, no MLP, a stream of constant length: the first order is all there is."""
    result = patched(linear(), pairs_of((7, 5, 9, 6, 8), changed=(1, 3)), min_gap=0.5)
    for variable, estimate in (("effect", "attributed"), ("head_effect", "head_attributed")):
        exact, found = result[variable].values, result[estimate].values
        known = np.isfinite(exact)
        assert np.array_equal(known, np.isfinite(found)) and np.abs(exact[known]).max() > 0.5
        assert np.abs(exact - found)[known].max() < 0.02 * np.abs(exact[known]).max()
    assert result["head_rank_correlation"].min() > 0.98
    assert result["rank_correlation"].sel(case=["resid_pre", "attn_out"]).min() > 0.98


def test_attribution_is_not_exact_where_the_model_is_not_linear() -> None:
    """A random model with sharp attention: the same comparison finds less agreement."""
    result = patched(tiny_model("llama-grouped").model, pairs_of((7, 5, 9, 6, 8), changed=(1, 3)), min_gap=0.5)
    assert result["head_rank_correlation"].mean() < 0.9
    assert result["rank_correlation"].sel(case="resid_pre").mean() < 0.9


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2", "mistral"])
def test_endpoints(kind: str) -> None:
    """All of the input, or all of the output, of the other run gives the other run; one's own activation nothing."""
    model, batch = tiny_model(kind).model, pairs_of((7,), changed=(1, 3))
    logits, read = Capture("logits", AtPosition(-2)), lambda trace: trace[logits]["value"].values
    keeps = [Capture(site, Keep()) for site in ("resid_pre", "resid_post")]
    seen = run_pass(model, Forward((logits, *keeps)), batch)[0]
    clean, corrupted = read(seen)
    assert np.abs(clean - corrupted).max() > 0.1
    into, last = seen[keeps[0]]["value"].values[0, :7], seen[keeps[1]]["value"].values[-1, 5]
    own = seen[keeps[0]]["value"].values[1, 7:]
    for patch, expected in (
        (Patch("resid_pre.0", Replace(into), texts=(1,)), clean),
        (Patch("resid_post.-1", Replace(last), (-2,), texts=(1,)), clean),
        (Patch("resid_pre.1", Replace(own), texts=(1,)), corrupted),
    ):
        trace, _ = run_pass(model, Forward((logits,), (patch,), texts=(1,)), batch)
        assert_close(read(trace)[0], expected, atol=1e-5 * float(np.abs(clean).max()))


def test_a_single_changed_token_at_the_input_is_the_whole_effect() -> None:
    """On any model the input stream of the only changed token makes the run the other one, in all four metrics."""
    result = patched(tiny_model("llama-grouped").model, pairs_of((7, 5, 9)))
    for run_, row in (("corrupted", 0), ("clean", 1)):
        assert_close(at(result, "effect", "resid_pre", "changed", run_)[0], np.ones(3), atol=1e-4)
        for metric in ("logit_diff", "logprob_nats", "prob", "kl_nats"):
            found = at(result, metric, "resid_pre", "changed", run_)[0]
            assert_close(found, result[f"run_{metric}"].values[row::2], atol=1e-4, what=metric)
    assert_close(result["run_kl_nats"].values[::2], np.zeros(3), atol=1e-9)
    assert result["run_kl_nats"].values[1::2].min() > 0.01


def test_the_answers_metrics_by_hand() -> None:
    """Four logits: 2, 1, 0, 0 against a uniform reference."""
    logits = np.array([[2.0, 1.0, 0.0, 0.0]], dtype=np.float32)
    p = np.exp([2, 1, 0, 0]) / np.exp([2, 1, 0, 0]).sum()
    found = read_answers(logits, np.array([0]), np.array([1]), np.log(np.full((1, 4), 0.25)))
    assert found["logit_diff"] == 1 and found["prob"] == pytest.approx(p[0])
    assert found["logprob_nats"] == pytest.approx(np.log(p[0]))
    assert found["kl_nats"] == pytest.approx((0.25 * np.log(0.25 / p)).sum())


def test_chance_has_no_best_place() -> None:
    """Held-out values at the best of 200 places are those of chance over 300 draws; the flattered maximum is not."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(300, 6, 200))
    held = np.array([held_out_best(d)[1].mean() for d in draws])
    assert abs(held.mean()) < 3 * held.std() / np.sqrt(300)
    assert np.mean([d.mean(axis=0).max() for d in draws]) > 1
    best, values = held_out_best(np.array([[0.0, 5.0, np.nan], [1.0, 4.0, 9.0], [np.nan] * 3]))
    assert best == 2 and values[:2].tolist() == pytest.approx([np.nan, 4.0], nan_ok=True) and np.isnan(values[2])


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 60).astype(float), rng.normal(size=60)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(rank_correlation(x, np.ones(60))) and np.isnan(rank_correlation(x[:2], y[:2]))
    null = [rank_correlation(x, rng.permutation(y)) for _ in range(300)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(300)


def test_random_pairs_have_no_head_that_matters_in_all() -> None:
    """A random model, other tokens in every pair: the head that other pairs choose does no more than any head."""
    found = patched(tiny_model("llama-grouped").model, pairs_of((7,) * 8, seed=3), sites="z", min_gap=0.5).findings
    heads = [f for f in found if f.where.get("site") == "z" and "head" in f.where]
    assert len(heads) == 2 and all(f.z < 3 for f in heads), heads


def test_pairs_without_a_gap_are_left_out_and_counted() -> None:
    """The smallest gap is refused: NaN everywhere, and the finding says how many."""
    batch = pairs_of((7, 5, 9))
    own = patched(circuit(), batch)["run_logit_diff"].values
    gaps = np.abs(own[::2] - own[1::2])
    result = patched(circuit(), batch, min_gap=float(np.sort(gaps)[:2].mean()))
    small = int(gaps.argmin())
    assert np.isnan(result["head_effect"].values[..., 2 * small : 2 * small + 2]).all()
    assert np.isnan(result["effect"].values[..., result["pair"].values == small]).all()
    assert result["head_effect"].notnull().sum() == 2 * 2 * N_LAYERS * N_HEADS
    gap = result.findings[1]
    assert gap.where["left_out"] == 1 and gap.n == 2 and "; 1 left out, whose runs differ by less than" in gap.claim
    with pytest.raises(InputError, match=r"every pair differ by less than min_gap=1e\+06 logits"):
        patched(circuit(), batch, min_gap=1e6)


def test_one_direction_is_half_of_both() -> None:
    batch = pairs_of((7, 5))
    both = patched(circuit(), batch)
    for direction, run_ in (("denoising", "corrupted"), ("noising", "clean")):
        one = patched(circuit(), batch, direction=direction)
        mine = one["run"].values == run_
        assert_close(one["effect"].values[..., mine], both["effect"].values[..., mine], atol=1e-5)
        assert np.isnan(one["effect"].values[..., ~mine]).all()


def test_a_window_patches_its_neighbours_too() -> None:
    """The carrier's output is within the window of either neighbour, so the peak is three blocks wide."""
    result = patched(circuit(), pairs_of((7, 5)), window=3)
    assert_close(at(result, "effect", "attn_out", "last"), np.ones((3, 2)), atol=1e-4)
    assert result["rank_correlation"].sel(case="attn_out").isnull().all()
    assert "exaggerate peaks" in result.figures()["attn_out"].caption


def test_predicted_answers_are_the_models_own() -> None:
    """Without answers in the texts, the top tokens after clean and corrupted prompts take their place."""
    model = tiny_model("llama-grouped").model
    logits = Capture("logits", AtPosition())
    prompts = Batch(tuple(text(t.ids[:-1]) for t in pairs_of((7, 5, 9, 6, 8, 7))))
    top = run_pass(model, Forward((logits,)), prompts)[0][logits]["value"].values.argmax(-1)
    differ = np.flatnonzero(top[::2] != top[1::2])[:3]
    batch = prompts.select([int(i) for pair in differ for i in (2 * pair, 2 * pair + 1)])
    top = top[list(batch.index)]
    result = patched(model, batch, answers="predicted")
    assert len(differ) == 3
    assert np.array_equal(result["right_id"].values[::2], top[::2])
    assert np.array_equal(result["wrong_id"].values[::2], top[1::2])
    assert (result["role"].values == "last").sum() == 6 and not (result["role"].values == "answer").any()


def test_what_is_no_pair_is_refused() -> None:
    model = circuit()
    clean, corrupted = pairs_of((6,)).texts
    longer = text((*corrupted.ids[:3], 9, *corrupted.ids[3:]))
    cases = [
        ((clean,), "reads pairs of texts .* found 1 text. Give an even number"),
        (
            (clean, longer),
            r"Texts 0 \(clean\) and 1 \(corrupted\) have 6 and 7 tokens.* From position 1 on they read \[",
        ),
        ((clean, text((*corrupted.ids[:-1], clean.ids[-1]))), "both end with the answer ' w"),
        ((clean, text((*clean.ids[:-1], corrupted.ids[-1]))), "have the same prompt"),
    ]
    for texts, message in cases:
        with pytest.raises(TextError, match=message):
            patched(model, Batch(texts))
    prompt = text(clean.ids[:-1])
    with pytest.raises(TextError, match="have the same prompt"):
        patched(model, Batch((prompt, prompt)), answers="predicted")
    other = tiny_model("llama-grouped").model
    logits = Capture("logits", AtPosition())
    for word in range(3, 120):  # a change that does not change the prediction
        same_words = Batch((text((5, 6, 7, 9, 11)), text((word, 6, 7, 9, 11))))
        top = run_pass(other, Forward((logits,)), same_words)[0][logits]["value"].values.argmax(-1)
        if word != 5 and top[0] == top[1]:
            break
    with pytest.raises(InputError, match="there is no wrong answer to compare with"):
        patched(other, same_words, answers="predicted")
