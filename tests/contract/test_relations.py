"""Reducers that read whole blocks, values through W_O, or attention scores: every family, against naive numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eager_families import BATCH, Family, family_of, relative
from helpers import N_HEADS, assert_close, copy_of, scripted, see, texts_of, tiny_model, words_tokenizer
from reference import allowed, attention_maps, cosine
from routed_families import FAMILIES, tiny_routed
from tiny_configs import KINDS

from probekit.backends.transformers.weights import output_gram
from probekit.core import CapabilityError, Capture, Forward, InputError, LogitDifference, ModelError, Patch
from probekit.reduce import BlockNorms, CosineTo, Keep, MlpAlignment, Norm, OutputNorm, Reducer, SinkLogitGap

RELATIONS = (
    Capture("resid_post", BlockNorms()),
    Capture("resid_post", MlpAlignment(0)),
    Capture("resid_post", MlpAlignment(-1)),
    Capture("resid_post", CosineTo(0)),
    Capture("k", CosineTo(-1)),
    Capture("v", OutputNorm()),
    Capture("pattern", SinkLogitGap()),
)


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest) -> Family:
    return family_of(request.param)


def projection_rows(attention: torch.nn.Module, n_heads: int) -> np.ndarray:
    """Rows of the output projection by head, read off its weight; axes head, d_head, d_model."""
    from transformers.pytorch_utils import Conv1D

    named = dict(attention.named_children())
    part = next((named[n] for n in ("o_proj", "c_proj", "out_proj", "dense") if n in named), attention)
    weight = part.weight.detach().numpy().astype(float)
    rows = weight if isinstance(part, Conv1D) else weight.T
    return rows.reshape(n_heads, -1, rows.shape[1])


def gaps(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Score on key 0 minus the mean over keys between it and the query, in plain loops; axes head, query."""
    found = np.full(scores.shape[:2], np.nan)
    for i in range(scores.shape[1]):
        between = [j for j in range(1, i) if seen[i, j]]
        if between and seen[i, 0]:
            found[:, i] = scores[:, i, 0] - scores[:, i][:, between].mean(axis=1)
    return found


def test_every_family_gives_the_naive_numbers(family: Family) -> None:
    norms, first, last, to_first, k_to_last, output, gap = see(family.model, RELATIONS, BATCH)
    kept = family.values
    scale = float(np.abs(kept["resid_post"]).max())
    before, after = kept["resid_pre"].astype(float), kept["resid_post"].astype(float)
    mlp = after - kept["resid_mid"] if "resid_mid" in kept else kept["mlp_out"].astype(float)
    assert_close(norms["mlp_norm"], np.linalg.norm(mlp, axis=-1), atol=2e-5 * scale)
    assert_close(norms["attn_norm"], np.linalg.norm(after - before - mlp, axis=-1), atol=2e-5 * scale)
    for i, text in enumerate(BATCH):
        at = slice(BATCH.starts[i], BATCH.starts[i] + len(text))
        stream, wrote, keys = after[:, at], mlp[:, at], kept["k"][:, at]
        assert_close(first["mlp_to_stream"].values[:, at], cosine(wrote, stream[:, :1]), atol=1e-4)
        assert_close(first["mlp_to_mlp"].values[:, at], cosine(wrote, wrote[:, :1]), atol=1e-4)
        assert_close(last["mlp_to_stream"].values[:, at], cosine(wrote, stream[:, -1:]), atol=1e-4)
        assert_close(to_first["cosine"].values[:, at], cosine(stream, stream[:, :1]), atol=1e-5)
        assert_close(k_to_last["cosine"].values[:, at], cosine(keys, keys[:, -1:]), atol=1e-5)
        for layer, window in enumerate(KINDS[family.name].windows):
            own = family.naive[i]
            attention = family.layers[layer].get_submodule(family.model.architecture.attention)
            rows = projection_rows(attention, N_HEADS)
            v = np.repeat(kept["v"][layer, at].astype(float), N_HEADS // kept["v"].shape[2], axis=1)  # token head d
            expected = np.linalg.norm(np.einsum("thd,hdm->htm", v, rows), axis=-1)
            relative(output["output_norm"].values[layer, :, at], expected, what="norm through W_O")
            seen = allowed(len(text), window)
            q, k = (own.heads[layer][site][0].swapaxes(0, 1) for site in ("q", "k"))
            maps = attention_maps(q, k, seen, **own.how[layer])
            with np.errstate(divide="ignore"):
                naive = gaps(np.log(maps), seen)
            assert_close(gap["gap_nats"].values[layer, :, at], naive, atol=2e-4, what=f"gap, layer {layer}")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_outside_the_registry_serve_them_too(name: str) -> None:
    """BLOOM, Falcon and GPT-J: norms of blocks add up from what was kept, values go through the projection."""
    model, batch = tiny_routed(name).model, texts_of((9, 5))
    norms, output, _ = see(model, [RELATIONS[0], RELATIONS[5], RELATIONS[6]], batch)
    sites = ("resid_pre", "resid_post", "mlp_out", "v", "attn_out")
    before, after, mlp, v, _ = (x["value"].values for x in see(model, [Capture(s, Keep()) for s in sites], batch))
    assert_close(norms["mlp_norm"], np.linalg.norm(mlp, axis=-1), atol=1e-4 * float(np.abs(mlp).max()))
    attention = np.linalg.norm(after - before - mlp, axis=-1)
    assert_close(norms["attn_norm"], attention, atol=1e-4 * float(attention.max()))
    rows = projection_rows(model.part(model.architecture.attention, 0), model.info.n_heads)
    group = model.info.n_heads // model.info.n_kv_heads
    expected = np.linalg.norm(np.einsum("thd,hdm->htm", np.repeat(v[0], group, axis=1), rows), axis=-1)
    relative(output["output_norm"].values[0], expected, what="norm through W_O")


def test_gap_of_hand_made_rows() -> None:
    """Scores 3 on the first key and 1, 2 on the next two: the fourth query's gap is 1.5, the second's undefined."""
    from probekit.reduce.attention_blocks import AttentionBlock

    scores = torch.tensor([[[[3.0, 1.0, 2.0, -7.0]] * 4]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    probs = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    for given in (scores, None):  # from scores, and from probabilities alone
        block = AttentionBlock(probs, probs[..., 0], probs[..., 0], 0, (4,), scores=given)
        found = SinkLogitGap().measure(block)["gap_nats"][0, 0].numpy()
        assert_close(found, np.array([np.nan, np.nan, 2.0, 1.5]), atol=1e-6)
    hidden = causal.clone()
    hidden[3, 0] = False
    block = AttentionBlock(probs, probs[..., 0], probs[..., 0], 0, (4,), visible=hidden[None], scores=scores)
    assert bool(SinkLogitGap().measure(block)["gap_nats"][0, 0, 3].isnan())


def test_scores_are_read_where_probabilities_vanish() -> None:
    """A gap of 200 nats, whose smaller probabilities are zero in float32, is 200."""
    from probekit.reduce.attention_blocks import AttentionMath, stream_attention

    q = torch.full((1, 1, 6, 1), 1.0)
    k = torch.zeros(1, 1, 6, 1)
    k[0, 0, 0] = 200.0
    found = []
    stream_attention(
        q, k, k, AttentionMath(1.0, keep_scores=True), (6,),
        lambda block: found.append(SinkLogitGap().measure(block)["gap_nats"][0, 0].numpy()),
    )  # fmt: skip
    assert_close(found[0][2:], np.full(4, 200.0), atol=1e-4)


def test_watching_scores_changes_no_other_number() -> None:
    model, batch = tiny_model("llama-grouped").model, texts_of((40, 33, 7))
    from probekit.reduce import AttentionStats

    plain = see(model, [Capture("pattern", AttentionStats())], batch)[0]
    both = see(model, [Capture("pattern", AttentionStats()), Capture("pattern", SinkLogitGap())], batch)[0]
    for name, values in plain.data_vars.items():
        assert_close(both[name], values, atol=1e-6)


def test_identical_tokens_have_cosine_one_and_a_missing_position_is_refused() -> None:
    model, batch = scripted(), texts_of((6, 4))
    values = see(model, [Capture("resid_post", CosineTo(2))], batch)[0]["cosine"].values
    assert_close(values[:, batch.pos == 2], np.ones((4, 2)), atol=1e-6)
    with pytest.raises(InputError, match="outside a text of 4"):
        see(model, [Capture("resid_post", CosineTo(5))], batch)


def test_a_patch_at_the_end_of_a_block_is_part_of_what_its_mlp_seems_to_add() -> None:
    """Held activations belong to one block: a patch in block 0 does not leak into what block 1 is said to add."""
    model, batch = tiny_model("llama").model, texts_of((7,))
    capture = Capture("resid_post", BlockNorms())
    parts = model.execute(Forward((capture,), (Patch("resid_post.0", 0.0),)), batch)
    stream = see(model, [Capture("resid_mid", Norm())], batch)[0]["norm"].values
    assert_close(parts[0].arrays["mlp_norm"][0], stream[0], atol=1e-4 * float(stream.max()))  # 0 - resid_mid
    assert parts[0].arrays["mlp_norm"][1].max() < 0.9 * stream.max()


@pytest.mark.parametrize("reducer", [BlockNorms(), OutputNorm()], ids=lambda r: r.key)
def test_no_gradient_of_whole_blocks(reducer: Reducer) -> None:
    site = "v" if isinstance(reducer, OutputNorm) else "resid_post"
    request = Forward((Capture(site, reducer),), gradient_of=LogitDifference((5,), (6,)))
    with pytest.raises(CapabilityError, match="Gradients are seen"):
        tiny_model("llama").model.execute(request, texts_of((5,)))


def test_a_sub_layer_without_a_known_output_projection_is_refused() -> None:
    strange = torch.nn.ModuleDict({"mystery": torch.nn.Linear(4, 4)})
    with pytest.raises(ModelError, match="found mystery"):
        output_gram(strange, 2, 2)


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2"])
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_other_backends_give_the_same_numbers(backend: str, kind: str) -> None:
    """All relations but those at points that nnsight does not offer: keys, and values that come out fused."""
    from probekit.models import open_model

    native, batch = tiny_model(kind).model, texts_of((12, 7))
    other = open_model((copy_of(kind), words_tokenizer()), backend=backend)
    other.load()
    wanted = [c for c in RELATIONS if c.point.site in other.info.sites]
    missing = {"transformer_lens": set(), "nnsight": {"k"} if kind == "llama-grouped" else {"k", "v"}}[backend]
    assert {c.point.site for c in RELATIONS} - {c.point.site for c in wanted} == missing
    for capture, found, expected in zip(wanted, see(other, wanted, batch), see(native, wanted, batch), strict=True):
        for name, values in expected.data_vars.items():
            finite = np.abs(values.values[np.isfinite(values.values)]).max()
            assert_close(found[name], values, atol=1e-4 * max(1.0, float(finite)), what=f"{capture.key} {name}")
