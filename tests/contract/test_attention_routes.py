"""BLOOM, Falcon and GPT-J, whose attention does not go through transformers' registry, against naive references."""

from __future__ import annotations

import copy
import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Boom, assert_close, see, words_tokenizer
from reference import allowed, attention_stats, readout
from routed_families import (
    BLOCKS,
    FAMILIES,
    FORMS,
    LENGTHS,
    N_LAYERS,
    Routed,
    mixed,
    plain_runs,
    routed_batch,
    tiny_routed,
)

from probekit.backends.edits import cut_of
from probekit.backends.transformers import TransformersModel
from probekit.backends.transformers.attention_routes import ROUTES, routed
from probekit.backends.transformers.attention_switch import Watch
from probekit.core import CapabilityError, Capture, Forward, KnockOut, LogitDifference, ModelError, Patch
from probekit.reduce import AttentionStats, Keep, Norm, Readout
from probekit.reduce.attention_blocks import AttentionBlock


def _route(one: Routed, watch: Watch, module: Any = None) -> Any:
    return routed((module or one.model.module).get_submodule(BLOCKS), one.model.architecture.route or "", watch)


def _logits(model: TransformersModel, *patches: Patch) -> np.ndarray:
    return model.execute(Forward((Capture("logits", Keep()),), patches), routed_batch())[0].arrays["value"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_equals_a_naive_reference(name: str) -> None:
    """Keep at every site of every layer, in a batch with padding, equals plain hooks and hand-made q, k, v."""
    one = tiny_routed(name)
    sites = sorted(one.model.info.sites - {"pattern"})
    expected = {"embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act", "q", "k", "v", "z", "final_norm"}
    assert set(sites) == expected | {"logits"} | ({"resid_mid"} if one.family.sequential else set())
    found = see(one.model, [Capture(site, Keep()) for site in sites], routed_batch())
    for site, data in zip(sites, found, strict=True):
        naive = np.concatenate([run[site] for run in plain_runs(name)], axis=1)
        values = data["value"].values if "layer" in data.dims else data["value"].values[None]
        assert_close(values, naive, atol=1e-5 * float(np.abs(naive).max()), what=site)
    assert found[sites.index("k")].sizes["head"] == one.family.n_kv
    q = see(one.model, [Capture("q.1", Norm())], routed_batch())[0]["norm"]
    naive = np.concatenate([np.linalg.norm(run["q"][1], axis=-1) for run in plain_runs(name)])
    assert_close(q.values[0], naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_equal_a_naive_reference(name: str) -> None:
    """Streamed attention statistics and the lens of the last layer, in a batch with padding."""
    batch, runs = routed_batch(), plain_runs(name)
    stats, lens = see(
        tiny_routed(name).model, [Capture("pattern", AttentionStats()), Capture("resid_post", Readout(3))], batch
    )
    for layer in range(N_LAYERS):
        naive = [attention_stats(run["maps"][layer], allowed(n)) for run, n in zip(runs, LENGTHS, strict=True)]
        for field in naive[0]:
            expected = np.concatenate([n[field] for n in naive], axis=-1)
            assert_close(stats[field].values[layer], expected, atol=2e-5, what=f"{field} of layer {layer}")
    logits = np.concatenate([run["logits"][0] for run in runs])
    naive = readout(logits, batch.next_ids, 3)
    for field in ("entropy_nats", "logprob_nats", "target_rank", "top_logprob"):
        assert_close(lens[field].values[-1], naive[field], atol=5e-5, what=field)
    sharp = stats["max"].values
    assert sharp.max() > 0.5 > sharp.min(), "the reference attention must be far from uniform"


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_patch_changes_no_bit_and_zero_patch_is_live(name: str) -> None:
    """At every site that can be changed; whole, and at some positions, heads and dimensions."""
    model = tiny_routed(name).model
    before = _logits(model)
    for site in sorted(model.info.sites - {"pattern", "resid_mid", "final_norm", "logits"}):
        point = site if site == "embed" else f"{site}.1"
        assert np.array_equal(_logits(model, Patch(point, 1.0)), before), site
        assert np.array_equal(_logits(model, Patch(point, 1.0, positions=(0,), dims=(1, 3))), before), site
        gone = _logits(model, Patch(point, 0.0))
        assert np.abs(gone - before).max() > 1e-3, site
        part = _logits(model, Patch(point, 0.0, positions=(-1,), texts=(2,)))
        changed = np.abs(part - before).max(-1) > 0
        # the last token of one text changes nothing but itself
        assert np.flatnonzero(changed).tolist() == [sum(LENGTHS[:3]) - 1], site


def test_queries_of_one_token_text_are_not_read() -> None:
    """A null: in a text of one token the softmax has one entry, so queries and keys change nothing there."""
    model = tiny_routed("bloom").model
    before, at = _logits(model), LENGTHS[0]
    for site in ("q", "k"):
        assert np.array_equal(_logits(model, Patch(f"{site}.1", 0.0))[at], before[at])


@pytest.mark.parametrize("name", FAMILIES)
def test_knock_out_equals_a_naive_masked_softmax(name: str) -> None:
    """Cut edges in some heads of layer 1: its heads' output and statistics are those of a masked softmax."""
    one, cut_heads = tiny_routed(name), (0, 2)
    patch = Patch("pattern.1", KnockOut(keys=(0, 2), queries=(-1, -3)), heads=cut_heads, texts=(0, 3))
    request = Forward((Capture("z.1", Keep()), Capture("pattern.1", AttentionStats())), (patch,))
    parts = one.model.execute(request, routed_batch())
    z, stats = (part.finish(routed_batch()) for part in parts)
    expected, entropy = [], []
    for i, (run, n) in enumerate(zip(plain_runs(one.model.info.name), LENGTHS, strict=True)):
        maps = run["maps"][1:2].copy()
        if i in patch.texts:
            edges = np.ix_([0], cut_heads, [n - 1, n - 3], [0, 2])
            assert maps[edges].max() > 1e-3, "the edges must carry weight"
            maps[edges] = 0
            maps /= maps.sum(-1, keepdims=True)
        expected.append(mixed(maps, run["v"][1:2]))
        entropy.append(attention_stats(maps[0], allowed(n))["entropy_nats"])
    assert_close(z["value"].values, np.concatenate(expected, axis=1), atol=2e-5, what="z")
    assert_close(stats["entropy_nats"].values[0], np.concatenate(entropy, axis=1), atol=2e-5, what="entropy")
    only_cut = one.model.execute(Forward((Capture("z.1", Keep()),), (patch,)), routed_batch())[0].arrays["value"]
    assert_close(only_cut, z["value"].values, atol=1e-6, what="cut without watching")


def _own(one: Routed) -> list[dict[str, Any]]:
    """What each attention module has of its own beyond its class, by layer."""
    blocks = one.model.module.get_submodule(BLOCKS)
    return [dict(block.get_submodule(one.family.attention).__dict__) for block in blocks]


@pytest.mark.parametrize("name", FORMS)
def test_model_is_left_as_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only layers that are looked at get another `forward`, only for the pass, and also where the pass fails."""
    one = tiny_routed(name)
    modules = [b.get_submodule(one.family.attention) for b in one.model.module.get_submodule(BLOCKS)]
    implementation = one.model.module.config._attn_implementation
    before, during = _own(one), list[list[bool]]()

    def look(values: torch.Tensor) -> None:
        during.append(["forward" in m.__dict__ for m in modules])

    taps = {("q", 1): [look]}
    with routed(
        one.model.module.get_submodule(BLOCKS),
        one.model.architecture.route or "",
        Watch(frozenset(), (3,), print, taps),
    ):
        one.model.module(torch.tensor([[3, 4, 5]]), use_cache=False)
    assert during == [[False, True, False]]
    for captures in (
        (Capture("pattern", AttentionStats()),),
        (Capture("z.2", Keep()), Capture("pattern.0", AttentionStats())),
    ):
        one.model.execute(Forward(captures, (Patch("q.1", 0.5),)), routed_batch())
        assert _own(one) == before
    for site in ("k.1", "z.2", "resid_post.1"):
        with pytest.raises(ZeroDivisionError, match="boom"):
            one.model.execute(Forward((Capture("pattern", AttentionStats()), Capture(site, Boom()))), routed_batch())
        assert _own(one) == before
    assert one.model.module.config._attn_implementation == implementation
    assert not any("forward" in own for own in before)

    # where nobody looks into attention, its own forward runs
    monkeypatch.setitem(ROUTES, one.model.architecture.route or "", None)  # would fail if it were used
    one.model.execute(Forward((Capture("resid_post", Norm()),)), routed_batch())


def test_other_tools_are_not_passed_by() -> None:
    """Weights that accelerate moves in `forward` are still moved; any other foreign `forward` is refused."""
    one = tiny_routed("gptj")
    module = one.model.module.get_submodule(BLOCKS)[1].attn
    request = Forward((Capture("pattern", AttentionStats()),))
    expected = one.model.execute(request, routed_batch())[0].arrays["max"]
    calls: list[int] = []

    def moved(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return module._old_forward(*args, **kwargs)

    own = module.forward
    try:
        module._old_forward, module.forward = own, moved
        assert np.array_equal(one.model.execute(request, routed_batch())[0].arrays["max"], expected)
        assert calls == [1]
        assert module._old_forward is own
        assert module.forward is moved
        del module._old_forward
        with pytest.raises(CapabilityError, match="Another tool has replaced `forward` of the attention of layer 1"):
            one.model.execute(request, routed_batch())
        assert module.forward is moved
    finally:
        for left in {"forward", "_old_forward"} & set(module.__dict__):
            delattr(module, left)
    other = type("GPTJFlashAttention2", (type(module),), {})
    blocks = torch.nn.ModuleList([torch.nn.Module()])
    blocks[0].attn = copy.deepcopy(module)
    blocks[0].attn.__class__ = other
    watch = Watch(frozenset({0}), (3,), print)
    with (
        pytest.raises(CapabilityError, match=r"is a GPTJFlashAttention2; .*attn_implementation"),
        routed(blocks, "gptj", watch),
    ):
        pass


@pytest.mark.parametrize("name", FORMS)
def test_gradients_equal_finite_differences(name: str) -> None:
    """d(logit difference)/d(q, k, v, z) at layer 1 against central differences of patched runs of a float64 copy."""
    one, batch = tiny_routed(name), routed_batch().select([0])
    module = copy.deepcopy(one.plain).double()
    exact = TransformersModel.from_loaded(module, words_tokenizer(), name="exact").load()
    metric, rng = LogitDifference((5,), (9,)), np.random.default_rng(0)
    # BLOOM and GPT-J take their softmax in float32 whatever the weights are, which a small step would not rise above.
    width, close = (1e-5, 2e-6) if name.startswith("falcon") else (2e-3, 5e-4)

    def value(site: str, changed: torch.Tensor) -> float:
        watch = Watch(frozenset(), batch.lengths, print, {(site, 1): [lambda values: values + changed]})
        with torch.no_grad(), _route(one, watch, module):
            logits = module(torch.tensor([batch.texts[0].ids]), use_cache=False).logits[0, -1]
        return float(logits[5] - logits[9])

    for site in ("q", "k", "v", "z"):
        request = Forward((Capture(f"{site}.1", Keep()),), gradient_of=metric)
        single, gradient = (m.execute(request, batch)[0].arrays["value"][0] for m in (one.model, exact))
        assert np.abs(gradient).max() > 1e-3
        assert_close(single, gradient, atol=1e-3 * np.abs(gradient).max(), what=f"{site} in float32")
        for _ in range(3):
            step = rng.normal(size=gradient.shape)
            changed = torch.as_tensor(width * step)[None]
            slope = (value(site, changed) - value(site, -changed)) / (2 * width)
            assert_close((gradient * step).sum(), slope, atol=close * np.linalg.norm(gradient), what=site)
    assert all(p.grad is None for p in one.model.module.parameters())


def test_gradient_through_a_knock_out() -> None:
    """Cut attention is differentiable too: the whole-matrix form is used, with ALiBi and the mask."""
    one = tiny_routed("falcon, ALiBi")
    batch = routed_batch().select([0])
    n = batch.lengths[0]
    cut = cut_of([Patch("pattern.1", KnockOut(keys=(0,), queries=(-1,)))], batch)
    assert cut is not None
    shown: dict[str, torch.Tensor] = {}

    def start(values: torch.Tensor) -> torch.Tensor:
        shown["v"] = values.detach().requires_grad_()
        return shown["v"]

    taps = {("v", 1): [start], ("z", 1): [lambda values: shown.__setitem__("z", values)]}
    watch = Watch(frozenset(), batch.lengths, print, taps, {1: cut})
    with _route(one, watch):
        one.model.module(torch.tensor([batch.texts[0].ids]), use_cache=False)
    (gradient,) = torch.autograd.grad(shown["z"][0, -1].sum(), shown["v"])
    maps = plain_runs("falcon, ALiBi")[0]["maps"][1, :, -1].copy()
    maps[:, 0] = 0
    maps /= maps.sum(-1, keepdims=True)
    assert gradient.shape == (1, n, *one.family.heads[::2])
    assert_close(gradient[0, :, :, 0], maps.T, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_half_precision_passes_the_self_check(name: str) -> None:
    """bfloat16 weights: watching leaves the logits as they are, and statistics are near those of float32."""
    one = tiny_routed(name)
    half = copy.deepcopy(one.plain).to(torch.bfloat16)
    model = TransformersModel.from_loaded(half, words_tokenizer(), name="half").load()
    assert model.info.dtype == "bfloat16"
    request = Forward((Capture("pattern.0", AttentionStats()),))
    found, expected = (m.execute(request, routed_batch())[0].arrays["first_share"] for m in (model, one.model))
    assert 0 < np.abs(found - expected).max() < 0.1


@pytest.mark.parametrize("name", FORMS)
def test_a_mask_of_the_callers_is_honoured(name: str) -> None:
    """Texts padded on the left and an attention mask: padding gets no attention, and the logits are the model's own."""
    one, blocks = tiny_routed(name), list[AttentionBlock]()
    ids, mask = torch.tensor([[0, 0, 0, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8, 9]]), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0

    def on_block(layer: int, block: AttentionBlock) -> None:
        blocks.append(dataclasses.replace(block, probs=block.probs.clone()))

    with torch.no_grad():
        expected = one.plain(ids, attention_mask=mask, use_cache=False).logits
        with _route(one, Watch(frozenset(range(N_LAYERS)), (7, 7), on_block)):
            found = one.model.module(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    assert_close(found[real], expected[real], atol=1e-4)
    assert len(blocks) >= N_LAYERS
    for block in blocks:
        assert float(block.probs[0, :, 3:, :3].max()) == 0.0
        assert float(block.probs[1, :, 1:, 0].max()) > 0.0
        assert_close(block.probs.sum(-1)[1], torch.ones_like(block.probs.sum(-1)[1]), atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_taps_work_with_a_cache(name: str) -> None:
    """Token by token with a key-value cache, a tapped layer gives what it gives in one pass."""
    from transformers import DynamicCache

    one = tiny_routed(name)
    module, ids = one.model.module, torch.tensor([routed_batch().texts[0].ids])
    taps = {(site, 1): [lambda values: values * 1.5] for site in ("q", "k", "v", "z")}
    watch = Watch(frozenset(), (ids.shape[1],), print, taps)
    with torch.no_grad(), _route(one, watch):
        whole = module(ids, use_cache=False).logits[0]
        cache = DynamicCache(config=module.config)
        steps = [module(ids[:, :5], past_key_values=cache, use_cache=True).logits[0]]
        steps += [
            module(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0] for i in range(5, ids.shape[1])
        ]
    assert_close(torch.cat(steps), whole, atol=1e-4)
    with torch.no_grad():
        assert (module(ids, use_cache=False).logits[0] - whole).abs().max() > 1e-2


@pytest.mark.parametrize("name", FORMS)
def test_generation_under_patches(name: str) -> None:
    """With a cache and without, the same tokens and log-probabilities; and patched ones differ from unpatched ones."""
    model, prompts = tiny_routed(name).model, routed_batch().select([0, 2])
    patches = (
        Patch("k.1", 1.7, positions=(-1,)),
        Patch("v.1", 0.5),
        Patch("z.0", 1.3, heads=(1,)),
        Patch("pattern.2", KnockOut(keys=(1,)), heads=(0,), texts=(0,)),
    )
    for some in ((), patches):
        cached, whole = (model.generate(prompts, 5, some, cached=c) for c in (True, False))
        assert [t.ids for t in cached.batch] == [t.ids for t in whole.batch]
        assert_close(cached.data["logprob_nats"], whole.data["logprob_nats"], atol=1e-4)
    first = model.generate(prompts, 1).data["entropy_nats"].values
    assert np.abs(model.generate(prompts, 1, patches).data["entropy_nats"].values - first).max() > 1e-3


def test_variants_that_are_not_described_are_refused() -> None:
    """A BLOOM whose residual stream starts after the norms is refused by name."""
    from transformers import BloomConfig

    config = BloomConfig(apply_residual_connection_post_layernorm=True)
    module = types.SimpleNamespace(config=config)
    with pytest.raises(ModelError, match="apply_residual_connection_post_layernorm"):
        TransformersModel.from_loaded(module, None)
