"""Patches on tiny models: exact where they change nothing, hand-computed where they change something.

What a patch writes is compared with plain arithmetic on what was there; cut attention edges with a naive masked softmax
in float64 from the layer's own queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import D_MODEL, D_VOCAB, assert_close, see, texts_of, tiny_model, windows_of
from reference import allowed, attention_maps, attention_stats

from probekit.core import (
    SITES,
    Add,
    Batch,
    Capture,
    Edit,
    Forward,
    InputError,
    KnockOut,
    Patch,
    Point,
    ProjectOut,
    Replace,
    Scale,
)
from probekit.engine import run_pass
from probekit.reduce import AttentionStats, Keep

KINDS = ("llama-grouped", "gpt2", "mistral")
CHANGEABLE = ("embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act", "q", "k", "v", "z")
LENGTHS = (11, 4, 1)
LOGITS = Capture("logits", Keep())
every_kind = pytest.mark.parametrize("kind", KINDS)
every_site = pytest.mark.parametrize("site", CHANGEABLE)


def point_of(site: str, layer: int = 1) -> Point:
    return Point(site, layer if SITES[site].layered else None)


def values(model: Any, captures: Sequence[Capture], batch: Batch, *patches: Patch) -> list[np.ndarray]:
    """What each capture keeps; the layer axis of a single layer left out."""
    parts = model.execute(Forward(tuple(captures), patches), batch)
    return [p.arrays["value"][0] if len(p.layers) == 1 else p.arrays["value"] for p in parts]


def texts_cut(batch: Batch, array: np.ndarray) -> list[np.ndarray]:
    """One array per text; axis token first."""
    return np.split(array, np.cumsum(batch.lengths)[:-1])


def select(one: np.ndarray, positions: Any, heads: Any, dims: Any) -> np.ndarray:
    """What a patch selects of one text; axes position, (head,) dimension."""
    for axis, chosen in enumerate((positions, heads, dims) if one.ndim == 3 else (positions, dims)):
        one = one if chosen is None else np.take(one, chosen, axis)
    return one


def narrowings(site: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = [{}, {"positions": (0, -1)}, {"dims": (0, 5, -1)}, {"positions": (-1,), "dims": (2,)}]
    if "head" in SITES[site].dims:
        cases += [{"heads": (1,)}, {"heads": (1, 0), "positions": (0,), "dims": (3, -1)}]
    return cases


@every_kind
@every_site
def test_writing_back_what_was_there_changes_no_bit(kind: str, site: str) -> None:
    """Each text's own values, at all of a point or a part of it, texts padded together: every logit is the same."""
    model, batch, point = tiny_model(kind).model, texts_of(LENGTHS, D_VOCAB), point_of(site)
    (plain,) = values(model, [LOGITS], batch)
    (there,) = values(model, [Capture(point, Keep())], batch)
    for where in narrowings(site):
        patches = []
        for i, one in enumerate(texts_cut(batch, there)):
            if len(one) == 1 and where.get("positions") == (0, -1):
                continue  # the same position twice, which is refused
            part = select(one, where.get("positions"), where.get("heads"), where.get("dims"))
            patches.append(Patch(point, Replace(part), **where, texts=(i,)))
        (same,) = values(model, [LOGITS], batch, *patches)
        assert np.array_equal(same, plain), where


@every_kind
@every_site
def test_only_the_selected_part_is_written(kind: str, site: str) -> None:
    """Zeros where positions, heads and dimensions say so, in the chosen texts; all else at the point as it was."""
    model, batch, point = tiny_model(kind).model, texts_of((11, 4), D_VOCAB), point_of(site)
    (there,) = values(model, [Capture(point, Keep())], batch)
    for where in narrowings(site):
        for texts in ((0, 1), (1,)):
            expected = texts_cut(batch, there.copy())
            for i in texts:
                one, grids = expected[i], [where.get(n) for n in ("positions", "heads", "dims")]
                grids = grids if one.ndim == 3 else [grids[0], grids[2]]
                index = [np.arange(n) if g is None else np.array(g) for n, g in zip(one.shape, grids, strict=True)]
                one[np.ix_(*index)] = 0
            (found,) = values(model, [Capture(point, Keep())], batch, Patch(point, 0.0, **where, texts=texts))
            assert np.array_equal(found, np.concatenate(expected)), (where, texts)


@every_kind
@pytest.mark.parametrize("point", ["embed", "resid_pre.0", "resid_post.0", "resid_pre.2"])
def test_another_runs_stream_reproduces_the_other_run(kind: str, point: str) -> None:
    """The whole residual stream of other texts, written in at any depth: the other texts' logits, bit for bit."""
    model, batch, other = tiny_model(kind).model, texts_of(LENGTHS, D_VOCAB), texts_of(LENGTHS, D_VOCAB, seed=1)
    theirs, there = values(model, [LOGITS, Capture(point, Keep())], other)
    patches = [Patch(point, Replace(one), texts=(i,)) for i, one in enumerate(texts_cut(other, there))]
    (found,) = values(model, [LOGITS], batch, *patches)
    assert np.array_equal(found, theirs)
    assert np.abs(found - values(model, [LOGITS], batch)[0]).max() > 1


rng = np.random.default_rng(3)
DIRECTION = rng.normal(size=D_MODEL).astype(np.float32)
UNIT = DIRECTION.astype(float) / np.linalg.norm(DIRECTION.astype(float))
ARITHMETIC: dict[str, tuple[Edit, Any]] = {
    "scale": (Scale(-1.5), lambda x: -1.5 * x),
    "add": (Add(DIRECTION, 2.5), lambda x: x + 2.5 * DIRECTION.astype(float)),
    "project out": (ProjectOut(7 * DIRECTION), lambda x: x - (x @ UNIT)[:, None] * UNIT),
}


@every_kind
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_reaches_the_rest_of_the_model(kind: str, name: str) -> None:
    """The point holds what was computed by hand, and the logits are those of writing in these very values."""
    model, batch = tiny_model(kind).model, texts_of((11, 4), D_VOCAB)
    edit, by_hand = ARITHMETIC[name]
    capture = Capture("resid_pre.1", Keep())
    (before,) = values(model, [capture], batch)
    logits, after = values(model, [LOGITS, capture], batch, Patch("resid_pre.1", edit))
    assert_close(after, by_hand(before.astype(float)), atol=4e-6 * float(np.abs(after).max()))
    written = [Patch("resid_pre.1", Replace(one), texts=(i,)) for i, one in enumerate(texts_cut(batch, after))]
    assert np.array_equal(values(model, [LOGITS], batch, *written)[0], logits)


def test_patches_at_one_point_act_in_their_order() -> None:
    model, batch, capture = tiny_model("llama-grouped").model, texts_of((6,), D_VOCAB), Capture("resid_pre.1", Keep())
    (x,) = values(model, [capture], batch)
    add, double = Patch("resid_pre.1", Add(DIRECTION)), Patch("resid_pre.1", 2.0)
    assert np.array_equal(values(model, [capture], batch, add, double)[0], 2 * (x + DIRECTION))
    assert np.array_equal(values(model, [capture], batch, double, add)[0], 2 * x + DIRECTION)


@every_kind
def test_a_point_without_a_layer_is_every_layer(kind: str) -> None:
    model, batch = tiny_model(kind).model, texts_of((6,), D_VOCAB)
    one_by_one = [Patch(("attn_out", layer), 0.0, positions=(-1,)) for layer in range(3)]
    together = values(model, [LOGITS], batch, Patch("attn_out", 0.0, positions=(-1,)))
    assert np.array_equal(together[0], values(model, [LOGITS], batch, *one_by_one)[0])


@every_kind
def test_texts_padded_together_are_patched_like_each_alone(kind: str) -> None:
    model, batch = tiny_model(kind).model, texts_of((17, 4, 9), D_VOCAB)
    patches = (
        Patch("resid_pre.1", Add(DIRECTION), positions=(-1, 1)),
        Patch("z.2", 0.0, heads=(3,)),
        Patch("k.1", 0.5, positions=(0,)),
        Patch("pattern.0", KnockOut((0, -2), (-1,)), heads=(0, 2)),
    )
    (together,) = values(model, [LOGITS], batch, *patches)
    for i, found in enumerate(texts_cut(batch, together)):
        (alone,) = values(model, [LOGITS], batch.select([i]), *patches)
        assert_close(found, alone, atol=1e-5 * float(np.abs(alone).max()))


# --- attention edges ----------------------------------------------------------------------------------------------

CUTS: dict[str, tuple[KnockOut, tuple[int, ...] | None]] = {
    "one edge": (KnockOut((2,), (9,)), None),
    "some heads": (KnockOut((0, 3), (5, -1)), (1, 3)),
    "a key for all who come after": (KnockOut((4,)), (2,)),
    "everything but itself": (KnockOut(None, (-1, 3)), None),
    "counted from the end": (KnockOut((-2,), (-1,)), (0,)),
}
QKVZ = tuple(Capture((site, 1), Keep()) for site in "qkvz")


def edges(cut: KnockOut, n: int) -> np.ndarray:
    """The pairs that a knock-out cuts in a text of `n` tokens; axes query, key."""
    found = np.zeros((n, n), dtype=bool)
    for query in range(n) if cut.queries is None else [q % n for q in cut.queries]:
        found[query, list(range(query)) if cut.keys is None else [k % n for k in cut.keys]] = True
    return found


@every_kind
@pytest.mark.parametrize("name", CUTS)
def test_cut_edges_equal_a_naive_masked_softmax(kind: str, name: str) -> None:
    """Outputs and statistics of the layer, rows still summing to 1; every other layer before it is untouched."""
    model, batch, (cut, heads) = tiny_model(kind).model, texts_of((21, 10), D_VOCAB), CUTS[name]
    patch, window = Patch("pattern.1", cut, heads=heads), windows_of(kind)[1]
    stats_of = Capture("pattern.1", AttentionStats())
    q, k, v, z = values(model, QKVZ, batch, patch)
    stats = model.execute(Forward((stats_of,), (patch,)), batch)[0].arrays
    plain = values(model, QKVZ, batch)
    assert all(np.array_equal(a, b) for a, b in zip((q, k, v), plain[:3], strict=True))
    assert np.abs(z - plain[3]).max() > 1e-3, "nothing was cut"
    at = 0
    for i, n in enumerate(batch.lengths):
        rows = [texts_cut(batch, x)[i].transpose(1, 0, 2).astype(float) for x in (q, k, v)]
        seen = np.stack([allowed(n, window)] * 4)
        for head in range(4) if heads is None else heads:
            seen[head] &= ~edges(cut, n)
        maps = attention_maps(rows[0], rows[1], seen, rows[0].shape[-1] ** -0.5)
        mixed = np.einsum("hqk,hkd->qhd", maps, np.repeat(rows[2], 4 // len(rows[2]), 0))
        assert_close(texts_cut(batch, z)[i], mixed, atol=1e-5 * float(np.abs(mixed).max()))
        assert_close(maps.sum(-1), np.ones((4, n)), atol=1e-12)
        for field, expected in attention_stats(maps, allowed(n, window)).items():
            found = stats[field][0, ..., at : at + n]
            if field != "seen":  # a knock-out takes the weight, it does not hide the key
                assert_close(found, expected, atol=1e-5, what=field)
        at += n


@every_kind
def test_cutting_an_edge_without_weight_changes_no_bit(kind: str) -> None:
    """An edge to the future, and one beyond the sliding window. The layer is watched in both runs: one kernel."""
    model, batch = tiny_model(kind).model, texts_of((21,), D_VOCAB)
    wanted = (Capture("pattern.1", AttentionStats()), LOGITS)
    before = see(model, wanted, batch)
    cuts = [KnockOut((12,), (5,))] + ([KnockOut((2,), (20,))] if windows_of(kind)[1] else [])
    for cut in cuts:
        parts = model.execute(Forward(wanted, (Patch("pattern.1", cut),)), batch)
        for part, expected in zip(parts, before, strict=True):
            assert all(np.array_equal(part.finish(batch)[name], expected[name]) for name in expected.data_vars)


def test_a_query_that_ends_up_blind_is_refused() -> None:
    """By two knock-outs together, and by one that cuts all that a sliding window shows."""
    batch, request = texts_of((12,), D_VOCAB), (LOGITS,)
    pair = (Patch("pattern.1", KnockOut((0, 1), (3,))), Patch("pattern.1", KnockOut((2, 3), (3,)), heads=(2,)))
    with pytest.raises(InputError, match="leaves query 3 of text 0 no key to look at in head 2: what it does not cut"):
        tiny_model("llama-grouped").model.execute(Forward(request, pair), batch)
    window = Patch("pattern.1", KnockOut(range(4, 12), (11,)))
    tiny_model("llama-grouped").model.execute(Forward(request, (window,)), batch)
    with pytest.raises(InputError, match=r"leaves query 11 of text 0 .* outside the layer's sliding window"):
        tiny_model("mistral").model.execute(Forward(request, (window,)), batch)


# --- refused before anything runs ---------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Patch, str]] = {
    "layer": (Patch("resid_post.3", 0.0), r"Layer 3 of 'resid_post' is outside this model: it has 3 layers"),
    "key-value head": (Patch("k.1", 0.0, heads=(4,)), "has 2 key-value heads there; its queries have 4"),
    "position in one of the texts": (Patch("resid_pre.1", 0.0, positions=(4,)), "text 1 has 4 tokens, 0 to 3"),
    "shape": (Patch("mlp_act.1", Replace(np.ones(D_MODEL))), r"\(32,\) at mlp_act.1 do not fit text 0: .* 11 × 48"),
    "blind": (Patch("pattern.1", KnockOut((0, 1), (1,))), "leaves query 1 of text 0 no key"),
    "text": (Patch("resid_post.1", 0.0, texts=(7,)), r"texts \[7\], and none of them runs; there are 2 texts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_patch_that_does_not_fit_is_refused_before_the_first_text_runs(name: str) -> None:
    patch, message = REFUSED[name]
    model, batch, ran = tiny_model("llama-grouped").model, texts_of((11, 4), D_VOCAB), []
    handle = model.module.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(InputError, match=message):
            run_pass(model, Forward((LOGITS,), (patch,)), batch)
    finally:
        handle.remove()
    assert not ran


def test_a_failure_inside_a_patch_leaves_no_hook_behind() -> None:
    tiny, batch = tiny_model("mistral"), texts_of((12,), D_VOCAB)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tiny.module.modules()]
    patches = (Patch("resid_pre.0", 1.0), Patch("pattern.1", KnockOut(range(4, 12), (11,))))
    with pytest.raises(InputError):
        tiny.model.execute(Forward((LOGITS,), patches), batch)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tiny.module.modules()] == hooks
    assert tiny.module.config._attn_implementation == "sdpa" and torch.is_grad_enabled()
