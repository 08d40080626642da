"""Layer ablation: every number equals a naive reference; planted blocks are found; what changes nothing costs nothing."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    N_LAYERS,
    SIZES,
    assert_close,
    random_weights,
    run,
    scripted,
    see,
    texts_of,
    tiny_model,
    words_tokenizer,
)
from scipy.special import log_softmax

from probekit.analysis import Result
from probekit.backends.transformers import TransformersModel
from probekit.core import Batch, CapabilityError, Capture, Forward, InputError, Patch, Reference, SelfCheckError, Values
from probekit.engine import run_pass
from probekit.phenomena.layer_ablation import _chance, _check_identity
from probekit.reduce import Keep, LocalAttention, NextToken, Norm, Readout

NAME = "layer-ablation"
LENGTHS = (24, 20, 31, 18, 40, 22)
FINAL = Capture(("resid_post", N_LAYERS - 1), Readout(1))


def ablate(model: Any, batch: Batch | None = None, **params: Any) -> Result:
    return run(NAME, model, batch or texts_of(LENGTHS), **params)[NAME]


def deep_model(n_layers: int, volume: dict[int, float] | None = None, seed: int = 0) -> TransformersModel:
    """A tiny Llama of some depth, some of whose blocks write more or less; turned after the self-check at load."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SIZES | {"num_hidden_layers": n_layers})
    module = random_weights(AutoModelForCausalLM.from_config(config), seed).eval()
    model = TransformersModel.from_loaded(module, words_tokenizer(), name="planted").load()
    with torch.no_grad():
        for i, factor in (volume or {}).items():
            module.model.layers[i].self_attn.o_proj.weight.mul_(factor)
            module.model.layers[i].mlp.down_proj.weight.mul_(factor)
    return model


LOUD = {i: 3.0 if i == 4 else 0.01 for i in range(9)}


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2"])
def test_every_number_equals_a_naive_reference(kind: str) -> None:
    """Blocks taken out of, or exchanged in, the plain model's list of blocks; distributions in float64."""
    tiny, batch = tiny_model(kind), texts_of((20, 14, 20))
    result = ablate(tiny.model, batch)
    for case, layer in [("delete", i) for i in range(N_LAYERS)] + [("swap", i) for i in range(N_LAYERS - 1)]:
        changed = copy.deepcopy(tiny.reference)
        owner, name = (changed.transformer, "h") if kind == "gpt2" else (changed.model, "layers")
        blocks = list(getattr(owner, name))
        if case == "delete":
            del blocks[layer]
            changed.config.num_hidden_layers = len(blocks)
        else:
            blocks[layer : layer + 2] = blocks[layer + 1], blocks[layer]
        setattr(owner, name, torch.nn.ModuleList(blocks))
        expected = [_naive(tiny.reference, changed, text.ids) for text in batch]
        for variable in ("kl_nats", "same_top", "entropy_change_nats", "loss_change_nats"):
            found = result[variable].sel(case=case).values[layer]
            whole = np.concatenate([e[variable] for e in expected])
            assert_close(found, whole, rtol=1e-4, atol=2e-5, what=f"{case} {layer} {variable}")
    for variable in ("kl_nats", "same_top"):
        assert np.isnan(result[variable].sel(case="swap").values[-1]).all()
        assert np.isfinite(result[variable].sel(case="delete").values).all()


def _naive(original: Any, changed: Any, ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        own, other = (
            log_softmax(m(torch.tensor([ids]), use_cache=False).logits[0].double().numpy(), axis=-1)
            for m in (original, changed)
        )
    rows, following = np.arange(len(ids) - 1), np.array(ids[1:])
    return {
        "kl_nats": (np.exp(own) * (own - other)).sum(-1),
        "same_top": (own.argmax(-1) == other.argmax(-1)).astype(float),
        "entropy_change_nats": (np.exp(own) * own).sum(-1) - (np.exp(other) * other).sum(-1),
        "loss_change_nats": np.append(own[rows, following] - other[rows, following], np.nan),
    }


def test_a_silent_block_is_not_missed_and_may_stand_anywhere() -> None:
    """Deleting it, and swapping it with another silent one, costs nothing but the rounding of the readout."""
    result = ablate(deep_model(4, {1: 0.0, 2: 0.0}))
    kl, same = result["kl_nats"], result["same_top"]
    assert result["identity_kl_nats"].values.max() < 1e-6
    assert kl.sel(case="delete").values[[1, 2]].max() < 1e-6 and (same.sel(case="delete").values[[1, 2]] == 1).all()
    assert kl.sel(case="swap").values[1].max() < 1e-6
    assert kl.sel(case="delete").values[[0, 3]].mean() > 0.1
    kept = result.findings[0]
    assert kept.where["layers"] == [1, 2] and kept.value == 1 and "keeps 100% of the predictions" in kept.claim


def test_equal_blocks_can_be_swapped_but_not_deleted() -> None:
    model = deep_model(3)
    model.module.model.layers[1].load_state_dict(model.module.model.layers[0].state_dict())
    result = ablate(model)
    assert result["kl_nats"].sel(case="swap").values[0].max() < 1e-6
    assert result["kl_nats"].sel(case="swap").values[1].mean() > 0.01
    assert (result["kl_nats"].sel(case="delete").values.mean(axis=1) > 0.01).all()


def test_a_block_that_stands_out_is_found() -> None:
    """A loud block among quiet ones: it matters most, beyond its neighbours, and it writes the largest activation."""
    result = ablate(deep_model(9, LOUD), swap=False)
    worst, outlier = result.findings[1:3]
    assert worst.where["layer"] == 4 and outlier.where == {"layer": 4, "writer": 4}
    assert outlier.value > 2 * outlier.null and "It is the block after which" in outlier.claim
    assert result["case"].values.tolist() == ["delete"]


def test_models_without_such_a_block_have_no_strong_outlier() -> None:
    """Nine blocks drawn alike: over five models the outlier's ratio stays far below the planted one's."""
    ratios = []
    for seed in range(5):
        outlier = ablate(deep_model(9, seed=seed), swap=False).findings[2]
        ratios.append(outlier.value / outlier.null)
    planted = ablate(deep_model(9, LOUD), swap=False).findings[2]
    assert max(ratios) < planted.value / planted.null


def test_position_zero_counts_only_where_it_was_asked_for() -> None:
    model = tiny_model("llama-grouped").model
    without, with_first = ablate(model), ablate(model, count_first=True)
    kl, pos = without["kl_nats"].sel(case="delete").values, without["pos"].values
    layer = without.findings[1].where["layer"]
    assert without.findings[1].value == pytest.approx(kl[layer, pos > 0].mean(), rel=1e-6)
    layer = with_first.findings[1].where["layer"]
    assert with_first.findings[1].value == pytest.approx(kl[layer].mean(), rel=1e-6)


def test_stride_leaves_blocks_out() -> None:
    result = ablate(tiny_model("llama-grouped").model, stride=2)
    finite = np.isfinite(result["kl_nats"].values).all(axis=2)
    assert finite.tolist() == [[True, False, True], [True, False, False]]


def test_local_attention_of_uniform_rows() -> None:
    """Uniform causal attention puts min(5, t) / (t + 1) on the five tokens before t."""
    batch = texts_of((12, 1, 7))
    for block in (1, 5, 32):
        model = scripted(sharpness=0.0).with_block(block)
        share = see(model, [Capture("pattern", LocalAttention())], batch)[0]["local_share"].values
        expected = np.minimum(batch.pos, 5) / (batch.pos + 1)
        assert_close(share, np.broadcast_to(expected, share.shape), atol=1e-6)


def test_chance_agreement_is_that_of_pairs() -> None:
    assert _chance(np.array([7, 7, 3])) == pytest.approx(1 / 3)
    assert _chance(np.array([7, 7])) == 1 and _chance(np.array([1, 2, 3])) == _chance(np.array([1])) == 0


def test_passes_that_do_not_repeat_are_refused() -> None:
    with pytest.raises(
        SelfCheckError, match=r"changes nothing moved the predictions of 'tiny-llama-grouped' by 1\.0e-02"
    ):
        _check_identity(np.array([0.0, 1e-2]), tiny_model("llama-grouped").model.info)


def test_an_order_of_blocks_leaves_the_model_as_it_was() -> None:
    """After the pass, and after one that fails; the identity order is the model itself, bit for bit."""
    tiny, batch = tiny_model("llama-grouped"), texts_of((12, 9))
    logits = Capture("logits", Keep())

    def run_in(order: tuple[int, ...] | None, *captures: Capture) -> np.ndarray:
        return tiny.model.execute(Forward(captures or (logits,), order=order), batch)[0].arrays["value"]

    own = run_in(None)
    assert np.array_equal(run_in((0, 1, 2)), own) and not np.allclose(run_in((1, 0, 2)), own, atol=0.1)
    with pytest.raises(RuntimeError, match="broken"):
        tiny.model.execute(Forward((Capture("resid_post", _Broken()),), order=(1, 0, 2)), batch)
    assert all("forward" not in vars(block) for block in tiny.module.model.layers)
    assert np.array_equal(run_in(None), own)


class _Broken(Norm):
    def measure(self, piece: Any) -> Any:
        raise RuntimeError("broken")


def test_points_at_a_places_edge_belong_to_the_place() -> None:
    """The stream stays one stream in any order: what enters a place is what left the one before."""
    model, batch = tiny_model("llama-grouped").model, texts_of((12, 9))
    captures = tuple(Capture(site, Keep()) for site in ("resid_pre", "resid_post", "mlp_out"))
    pre, post, mlp = (p.arrays["value"] for p in model.execute(Forward(captures, order=(0, 2, 1)), batch))
    assert np.array_equal(pre[1:], post[:-1])
    plain = [p.arrays["value"] for p in model.execute(Forward(captures), batch)]
    assert np.array_equal(mlp[0], plain[2][0]) and not np.allclose(mlp[1:], plain[2][1:], atol=0.1)


def test_orders_and_references_that_do_not_fit_are_refused() -> None:
    model, batch = tiny_model("llama-grouped").model, texts_of((12, 9))
    for order in ((0, 1), (0, 1, 3), (0, 1, 2, 2)):
        with pytest.raises(InputError, match="An order names a block, 0 to 2, for each of 3 places"):
            model.execute(Forward((FINAL,), order=order), batch)
    with pytest.raises(CapabilityError, match="without order, reference"):
        scripted().execute(Forward((Capture("logits", NextToken(1)),), order=(1, 0, 2, 3)), batch)
    with pytest.raises(InputError, match=r"2 texts of 21 tokens has rows of shape \(20, 4\)"):
        Reference(Values(np.ones((20, 4))), (0, 1), (12, 9))
    reference = Reference(Values(np.ones((21, 32))), (0, 1), (9, 12))
    with pytest.raises(InputError, match="Text 0 of 12 tokens cannot be compared with the reference: it has 9 there"):
        model.execute(Forward((FINAL,), against=reference), batch)
    with pytest.raises(InputError, match="Text 2 of 9 tokens cannot be compared with the reference: it is not part"):
        model.execute(Forward((FINAL,), against=reference), Batch(batch.texts[1:], index=(2,)))


def test_a_reference_is_found_by_text_whatever_the_order_and_the_micro_batches() -> None:
    """KL against the run itself is 0, text by text and shuffled; own readouts are not touched by a reference."""
    model, batch = tiny_model("llama-grouped").model, texts_of((12, 9, 12, 30))
    rows, own = Capture(("resid_post", N_LAYERS - 1), Keep()), Capture("logits", NextToken(3))
    trace, _ = run_pass(model, Forward((rows, own)), batch)
    reference = Reference(Values(trace[rows]["value"].values[0]), batch.index, batch.lengths)
    again, _ = run_pass(model, Forward((FINAL, own), against=reference), batch.select([3, 1, 0, 2]))
    assert again[FINAL]["kl_nats"].values.max() < 1e-5
    for text in batch.index:
        here, there = (t[own].isel(token=t[own]["text"].values == text) for t in (trace, again))
        assert_close(there["top_logprob"].values, here["top_logprob"].values, atol=1e-5)
    changed, _ = run_pass(model, Forward((FINAL,), (Patch("mlp_out.1", 0.0),), against=reference), batch)
    assert changed[FINAL]["kl_nats"].values.mean() > 0.05
