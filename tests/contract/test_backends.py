"""What every backend promises: it captures what the model computes, and leaves the model as it found it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import (
    D_VOCAB,
    EVERYTHING,
    N_LAYERS,
    Tiny,
    assert_close,
    assert_same,
    random_weights,
    see,
    texts_of,
    tiny_config,
    tiny_model,
    windows_of,
    words_tokenizer,
)
from reference import allowed, attention_stats, readout, received_within

from probekit.backends.transformers import TransformersModel
from probekit.core import (
    SITES,
    CapabilityError,
    Capture,
    Forward,
    InputError,
    Patch,
)
from probekit.engine import run_pass
from probekit.reduce import (
    AttentionStats,
    Field,
    Keep,
    MedianMagnitude,
    Norm,
    Readout,
    Reducer,
)

LENGTHS = (21, 1, 13, 40)
ROWS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "embed", "final_norm", "logits")


def values_of(tiny: Tiny, sites: tuple[str, ...] = ROWS, lengths: tuple[int, ...] = LENGTHS) -> dict[str, np.ndarray]:
    seen = see(tiny.model, [Capture(s, Keep()) for s in sites], texts_of(lengths, D_VOCAB))
    return {s: d["value"].values for s, d in zip(sites, seen, strict=True)}


def naive(tiny: Tiny, ids: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Block outputs, attention maps and logits of one text, from eager attention and plain hooks."""
    module, blocks = tiny.reference, []
    layers = module.get_submodule(tiny.model.architecture.layers)

    def keep(_: Any, __: Any, output: Any) -> None:
        blocks.append((output[0] if isinstance(output, tuple) else output)[0].numpy().astype(np.float64))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        out = module(torch.tensor([ids]), output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack(blocks), [a[0].numpy() for a in out.attentions], out.logits[0].numpy()


# --- the numbers --------------------------------------------------------------------------------------------------


def test_residual_stream_adds_up(tiny: Tiny) -> None:
    """resid_post = resid_mid + mlp_out, resid_mid = resid_pre + attn_out, and each block hands over to the next."""
    seen = values_of(tiny)
    scale = float(np.abs(seen["resid_post"]).max())
    assert_close(seen["resid_mid"], seen["resid_pre"] + seen["attn_out"], atol=1e-6 * scale)
    assert_close(seen["resid_post"], seen["resid_mid"] + seen["mlp_out"], atol=1e-6 * scale)
    assert np.array_equal(seen["resid_pre"][1:], seen["resid_post"][:-1])
    if tiny.kind != "gpt2":  # gpt2 adds learned positions to the embedding
        assert np.array_equal(seen["resid_pre"][0], seen["embed"])
    assert not np.allclose(seen["final_norm"], seen["resid_post"][-1]), "resid_post is read before the final norm"


def test_captured_values_are_the_models_own(tiny: Tiny) -> None:
    """Block outputs and logits equal those of plain hooks on an eager twin, text by text."""
    seen, batch = values_of(tiny), texts_of(LENGTHS, D_VOCAB)
    for i, text in enumerate(batch):
        blocks, _, logits = naive(tiny, text.ids)
        at = slice(batch.starts[i], batch.starts[i] + len(text))
        assert_close(seen["resid_post"][:, at], blocks, atol=1e-5 * float(np.abs(blocks).max()))
        assert_close(seen["logits"][at], logits, atol=1e-5 * float(np.abs(logits).max()))


def test_attention_rows_sum_to_one_and_are_causal(tiny: Tiny) -> None:
    @dataclass(frozen=True)
    class Sums(Reducer):
        reads: ClassVar = "attention"

        def fields(self) -> dict[str, Field]:
            return {n: Field(("head", "token"), "share", n) for n in ("all", "future", "beyond")}

        def measure(self, piece: Any) -> dict[str, torch.Tensor]:
            keys = torch.arange(piece.probs.shape[-1])
            distance = torch.arange(piece.start, piece.start + piece.probs.shape[2])[:, None] - keys
            probs = piece.probs
            return {
                "all": probs.sum(-1),
                "future": (probs * (distance < 0)).sum(-1),
                "beyond": (probs * (distance >= 8)).sum(-1),
            }

    sums = see(tiny.model, [Capture("pattern", Sums())], texts_of(LENGTHS, D_VOCAB))[0]
    assert_close(sums["all"], np.ones_like(sums["all"]), atol=1e-6)
    assert np.abs(sums["future"].values).max() == 0
    for layer, window in enumerate(windows_of(tiny.kind)):
        beyond = np.abs(sums["beyond"].values[layer]).max()
        assert beyond == 0 if window else beyond > 0.05, (layer, window)


def test_statistics_equal_a_naive_reference(tiny: Tiny) -> None:
    """Every statistic of a batch equals what float64 makes of eager maps, hooked blocks and lens logits, text by text.

    Relative 1e-4 of each statistic's size (the array's largest entry); counts and ranks exactly.
    """
    batch = texts_of(LENGTHS, D_VOCAB)
    stats, within, lens, own, norm, top, median, _ = see(tiny.model, EVERYTHING, batch)
    final_norm = tiny.reference.get_submodule(tiny.model.architecture.final_norm)
    head = tiny.reference.get_output_embeddings()
    for i, text in enumerate(batch):
        at = slice(batch.starts[i], batch.starts[i] + len(text))
        next_ids = np.append(np.asarray(text.ids[1:], dtype=int), -1)
        blocks, maps, logits = naive(tiny, text.ids)
        for layer, window in enumerate(windows_of(tiny.kind)):
            seen = allowed(len(text), window)
            for field, expected in attention_stats(maps[layer], seen).items():
                assert_close(
                    stats[field].values[layer, ..., at], expected, atol=1e-5 * np.abs(expected).max() + 1e-6, what=field
                )
            for field, expected in received_within(maps[layer], seen, 16).items():
                assert_close(within[field].values[layer, ..., at], expected, atol=1e-5, what=field)
            with torch.no_grad():
                read = head(final_norm(torch.as_tensor(blocks[layer], dtype=torch.float32))).numpy()
            _same_readout(lens.isel(layer=layer, token=at), read, next_ids, logits)
            assert_close(norm["norm"].values[layer, at], np.linalg.norm(blocks[layer], axis=-1), rtol=1e-5)
            largest = -np.sort(-np.abs(blocks[layer]), axis=-1)[:, :3]
            assert_close(np.abs(top["value"].values[layer, at]), largest, rtol=1e-4)
            assert_close(median["median"].values[layer, i], np.median(np.abs(blocks[layer])), rtol=1e-4)
        _same_readout(own.isel(token=at), logits, next_ids, None)


def _same_readout(found: Any, logits: np.ndarray, next_ids: np.ndarray, final: np.ndarray | None) -> None:
    for field, expected in readout(logits, next_ids, 5, final).items():
        if field == "kl_nats" and field not in found:
            continue
        if field in found:
            exact = field == "target_rank"
            atol = 0.0 if exact else 1e-4 * float(np.nanmax(np.abs(expected), initial=0.1))
            assert_close(found[field], expected, atol=atol, what=field)


def test_lens_at_the_last_layer_is_the_model(tiny: Tiny) -> None:
    """The last layer's readout is the model's own distribution, bit for bit, and its KL to it is zero."""
    lens, own = see(tiny.model, EVERYTHING[2:4], texts_of(LENGTHS, D_VOCAB))
    for field in ("entropy_nats", "logprob_nats", "target_rank", "top_logprob", "top_id"):
        assert np.array_equal(lens[field].values[-1], own[field].values, equal_nan=True), field
    assert np.abs(lens["kl_nats"].values[-1]).max() == 0 < lens["kl_nats"].values[:-1].min()


def test_watching_attention_does_not_change_the_numbers(tiny: Tiny) -> None:
    """Attention captures in the same pass leave logits and residuals as they are without."""
    batch, logits = texts_of(LENGTHS, D_VOCAB), Capture("logits", Keep())
    alone = see(tiny.model, [logits], batch)[0]
    watched = see(tiny.model, [*EVERYTHING, logits], batch)[-1]
    assert_same(watched, alone, rtol=1e-5)


def test_single_layers_are_slices_of_all_layers(tiny: Tiny) -> None:
    """Captures of one layer, beside those of all or without them, from either end, give that layer's numbers."""
    batch = texts_of(LENGTHS, D_VOCAB)
    every = (Norm(), AttentionStats(), Readout(5), MedianMagnitude())
    sites = {"rows": "resid_post", "attention": "pattern", "vocab": "resid_post"}
    whole = [Capture(sites[r.reads], r) for r in every]
    single = [Capture((sites[r.reads], layer), r) for r in every for layer in (1, -1)]
    expected = see(tiny.model, whole, batch)
    for found in (see(tiny.model, [*single, *whole], batch)[: len(single)], see(tiny.model, single, batch)):
        for i, data in enumerate(found):
            assert_same(data, expected[i // 2].isel(layer=[1 if i % 2 == 0 else N_LAYERS - 1]), rtol=1e-5)


def test_gpt2_scales_attention_by_layer_where_its_config_says_so() -> None:
    """A scaling that depends on the layer reaches the statistics."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("gpt2")
    config.scale_attn_by_inverse_layer_idx = True
    module = random_weights(AutoModelForCausalLM.from_config(config)).eval()
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    reference.load_state_dict(module.state_dict())
    tiny = Tiny("gpt2", TransformersModel.from_loaded(module, words_tokenizer(), name="scaled").load(), reference)
    batch = texts_of((20,), D_VOCAB)
    found = see(tiny.model, [EVERYTHING[0]], batch)[0]["entropy_nats"].values
    maps = naive(tiny, batch.texts[0].ids)[1]
    assert_close(found, np.stack([attention_stats(m, allowed(20))["entropy_nats"] for m in maps]), atol=1e-5)
    plain = see(tiny_model("gpt2").model, [EVERYTHING[0]], batch)[0]["entropy_nats"].values
    assert np.abs(found - plain).max() > 0.01, "the option must matter for this test to hold anything"


# --- sites and patches --------------------------------------------------------------------------------------------


def test_declared_sites_are_exactly_those_that_work(tiny: Tiny) -> None:
    """Each declared site is captured with its axes; every other site is refused by name."""
    batch = texts_of((5, 3), D_VOCAB)
    for site in SITES:
        reducer: Reducer = AttentionStats() if site == "pattern" else Keep()
        if site in tiny.model.info.sites:
            data = run_pass(tiny.model, Forward((Capture(site, reducer),)), batch)[0].data
            assert all(np.isfinite(a.values).all() for d in data.values() for a in d.data_vars.values())
        else:
            with pytest.raises(CapabilityError, match=f"no point '{site}'"):
                run_pass(tiny.model, Forward((Capture(site, reducer),)), batch)
            with pytest.raises(CapabilityError, match=f"no point '{site}'"):
                tiny.model.execute(Forward((Capture(site, reducer),)), batch)


PATCHED = tuple(site for site in SITES if site not in ("pattern", "router"))


@pytest.mark.parametrize("site", PATCHED)
def test_patches_are_exact_where_they_are_offered_and_refused_elsewhere(tiny: Tiny, site: str) -> None:
    """The identity changes no bit, a zero is seen at the point and reaches the logits; or the point is refused."""
    batch, layered = texts_of((9, 4), D_VOCAB), SITES[site].layered
    point = (site, 1) if layered else site
    wanted = (
        Capture("logits", Keep()),
        Capture(point, Keep()) if site != "logits" else Capture("embed", Keep()),
    )

    def patched(*patches: Patch) -> list[np.ndarray]:
        return [p.arrays["value"] for p in tiny.model.execute(Forward(wanted, patches), batch)]

    try:
        same = patched(Patch(point, 1.0))
    except CapabilityError as refused:
        assert f"{site!r} can be read but not changed" in str(refused)
        return
    plain, gone = patched(), patched(Patch(point, 0.0))
    assert all(np.array_equal(a, b) for a, b in zip(same, plain, strict=True))
    assert np.abs(plain[1]).max() > 0 == np.abs(gone[1]).max(), "a capture sees what the patch wrote"
    assert np.abs(gone[0] - plain[0]).max() > 1e-3, "the patch is decorative"


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_residual_stream_adds_up_under_a_patch(tiny: Tiny, site: str) -> None:
    """What a patch writes is what the rest of the block builds on, so the sums still hold after it."""
    batch, sites = texts_of((9, 4), D_VOCAB), ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    captures = tuple(Capture((s, 1), Keep()) for s in sites)
    try:
        parts = tiny.model.execute(Forward(captures, (Patch((site, 1), 0.5),)), batch)
    except CapabilityError as refused:
        assert f"{site!r} can be read but not changed" in str(refused)
        return
    pre, attn, mid, mlp, post = (p.arrays["value"] for p in parts)
    scale = float(np.abs(post).max())
    if site != "resid_mid":
        assert_close(mid, pre + attn, atol=1e-6 * scale)
    if site != "resid_post":
        assert_close(post, mid + mlp, atol=1e-6 * scale)


def test_patch_at_positions_touches_only_these(tiny: Tiny) -> None:
    """Positions count within each text, negative ones from its own end, whatever the padding."""
    batch, capture = texts_of((9, 4), D_VOCAB), Capture("resid_pre.1", Keep())
    plain = tiny.model.execute(Forward((capture,)), batch)[0].arrays["value"][0]
    patch = Patch("resid_pre.1", 0.0, positions=(0, -1))
    found = tiny.model.execute(Forward((capture,), (patch,)), batch)[0].arrays["value"][0]
    expected = plain.copy()
    expected[[0, 8, 9, 12]] = 0
    assert np.array_equal(found, expected)


def test_layer_outside_the_model_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"Layer 9 of 'resid_post' is outside this model: it has 3 layers"):
        tiny.model.execute(Forward((Capture("resid_post.9", Norm()),)), texts_of((4,)))
