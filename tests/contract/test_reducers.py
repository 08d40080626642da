"""The laws that every reducer keeps, whatever it measures.

The list of reducers is found by walking the package: a new one without an instance here fails.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers import Tiny, assert_same, reducer_classes, scripted, see, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

import probekit.reduce
from probekit.core import SITES, Capture, Forward, Point
from probekit.reduce import (
    AtPosition,
    AttentionStats,
    BlockNorms,
    CosineTo,
    Keep,
    LocalAttention,
    LogitDirection,
    MedianMagnitude,
    MlpAlignment,
    NextToken,
    Norm,
    Nucleus,
    OutputNorm,
    Partial,
    Readout,
    ReceivedWithin,
    Recorder,
    Reducer,
    SinkLogitGap,
    Tempered,
    TopMagnitudes,
    vocab_rows,
)

INSTANCES: dict[type[Reducer], tuple[Reducer, ...]] = {
    AttentionStats: (AttentionStats(),),
    ReceivedWithin: (ReceivedWithin(8), ReceivedWithin(64)),
    Readout: (Readout(), Readout(1), Readout(50)),
    NextToken: (NextToken(), NextToken(2), NextToken(50)),
    Nucleus: (Nucleus(), Nucleus(1.0), Nucleus(0.5, temperature=0.7), Nucleus(1.0, min_p=0.1)),
    Tempered: (Tempered(0.7), Tempered(2.0, 3)),
    Keep: (Keep(),),
    LocalAttention: (LocalAttention(), LocalAttention(1), LocalAttention(100)),
    LogitDirection: (LogitDirection(), LogitDirection("target"), LogitDirection("random")),
    AtPosition: (AtPosition(), AtPosition(0)),
    Norm: (Norm(),),
    TopMagnitudes: (TopMagnitudes(), TopMagnitudes(1), TopMagnitudes(10)),
    MedianMagnitude: (MedianMagnitude(),),
    CosineTo: (CosineTo(), CosineTo(-1)),
    BlockNorms: (BlockNorms(),),
    MlpAlignment: (MlpAlignment(), MlpAlignment(-1)),
    OutputNorm: (OutputNorm(),),
    SinkLogitGap: (SinkLogitGap(),),
}
LENGTHS = (33, 1, 70, 9, 8, 40)
INTEGERS = {"dim", "top_id"}
ALL = [r for instances in INSTANCES.values() for r in instances]
every_reducer = pytest.mark.parametrize("reducer", ALL, ids=lambda r: r.key)


def capture_of(reducer: Reducer) -> Capture:
    site = {"attention": "pattern", "values": "v"}.get(reducer.reads, "resid_post")
    return Capture("logits" if isinstance(reducer, NextToken) else site, reducer)


def test_every_reducer_of_the_package_is_tested_and_exported() -> None:
    """A reducer that is written but not listed here, or not exported, is found."""
    assert reducer_classes() == {*INSTANCES, probekit.reduce.Maps}  # Maps: one text at a time, see test_cache
    assert {c.__name__ for c in reducer_classes()} <= set(probekit.reduce.__all__)


@every_reducer
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_chunk_law_attention(reducer: Reducer, block: int) -> None:
    """Blocks of any number of queries give the same statistics."""
    model, batch, capture = scripted(), texts_of(LENGTHS), capture_of(reducer)
    whole = see(model.with_block(32), [capture], batch)[0]
    assert_same(see(model.with_block(block), [capture], batch)[0], whole, rtol=1e-6)


@pytest.mark.parametrize("reducer", [r for r in ALL if r.reads == "vocab"], ids=lambda r: r.key)
@pytest.mark.parametrize(
    "sizes",
    [
        {"TOKENS": 1, "ROWS": 1, "STRIP": 1},
        {"TOKENS": 7, "ROWS": 20, "STRIP": 3},
        {"TOKENS": 1000, "ROWS": 1000, "STRIP": 1000, "VOCAB_TILE": 7},
        {"STRIP": 5, "VOCAB_TILE": 64, "RUN": 4},
    ],
    ids=str,
)
def test_chunk_law_vocab(reducer: Reducer, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut of tokens, layers, strips, vocabulary tiles and runs gives the same readout."""
    model, batch, capture = scripted(n_layers=5, d_vocab=500), texts_of(LENGTHS), capture_of(reducer)
    whole = see(model, [capture], batch)[0]
    for name, size in sizes.items():
        assert hasattr(vocab_rows, name)
        monkeypatch.setattr(vocab_rows, name, size)
    assert_same(see(model, [capture], batch)[0], whole, rtol=2e-6)


@every_reducer
@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(len(LENGTHS))), cuts=st.sets(st.integers(1, len(LENGTHS) - 1)))
def test_merge_law(reducer: Reducer, order: list[int], cuts: set[int]) -> None:
    """Any partition of the texts into micro-batches, in any order, merges to the same arrays, bit for bit."""
    model, batch, capture = scripted(), texts_of(LENGTHS), capture_of(reducer)
    edges = [0, *sorted(cuts), len(order)]
    groups = [order[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert_same(see(model, [capture], batch, groups)[0], see(model, [capture], batch)[0])


@every_reducer
def test_merge_follows_the_order_of_the_batch(reducer: Reducer) -> None:
    """A batch whose texts are not in corpus order gets its arrays in its own order."""
    model, batch, capture = scripted(), texts_of(LENGTHS), capture_of(reducer)
    order = [3, 0, 5, 1, 2, 4]
    shuffled = see(model, [capture], batch.select(order), [[1, 4], [0], [2, 3, 5]])[0]
    for place, i in enumerate(order):
        alone = see(model, [capture], batch.select([i]))[0]
        if "token" in alone.dims:
            found = shuffled.isel(token=shuffled["text"].values == i)
        else:
            found = shuffled.isel(text=[place])
        assert_same(found, alone, what=f"text {i}")


def test_merge_refuses_a_text_that_was_seen_twice() -> None:
    model, batch = scripted(), texts_of((4, 5))
    part = model.execute(Forward((Capture("resid_post", Norm()),)), batch)[0]
    with pytest.raises(ValueError, match="same text"):
        Partial.merge([part, part])


@every_reducer
def test_padding_law(reducer: Reducer, tiny_llama: Tiny) -> None:
    """Texts of different lengths batched together give what each gives alone."""
    batch, capture = texts_of(LENGTHS, 120), capture_of(reducer)
    alone = see(tiny_llama.model, [capture], batch, [[i] for i in range(len(batch))])[0]
    assert_same(see(tiny_llama.model, [capture], batch)[0], alone, rtol=1e-5)


@every_reducer
def test_types_axes_and_units_are_as_declared(reducer: Reducer) -> None:
    """Floats are float32, ids and dimensions int32; axes and units are those of `fields`."""
    batch, capture = texts_of(LENGTHS), capture_of(reducer)
    data = see(scripted(d_vocab=100), [capture], batch)[0]
    layered = ("layer",) if SITES[capture.point.site].layered else ()
    assert set(data.data_vars) == set(reducer.fields())
    for name, field in reducer.fields().items():
        array = data[name]
        assert array.dtype == (np.int32 if name in INTEGERS else np.float32), name
        assert array.dims == (*layered, *field.dims), name
        assert array.attrs == {"units": field.unit, "long_name": field.help}
        assert field.unit and field.help
        n = {"token": sum(LENGTHS), "text": len(LENGTHS), "head": 3, "layer": 4, "d_model": 16}
        assert all(array.sizes[d] == n[d] for d in array.dims if d in n), name


@every_reducer
def test_one_token_text(reducer: Reducer) -> None:
    """A text of one token is served: what needs a next token or the horizon is NaN, all else is finite."""
    data = see(scripted(), [capture_of(reducer)], texts_of((1,)))[0]
    undefined = {"logprob_nats", "target_rank"} | ({"received"} if isinstance(reducer, ReceivedWithin) else set())
    undefined |= {"projection"} if reducer == LogitDirection("target") else set()
    undefined |= {"gap_nats"}
    for name, array in data.data_vars.items():
        if name in undefined:
            assert np.isnan(array.values).all(), name
        else:
            assert np.isfinite(array.values).all(), name
    if isinstance(reducer, AttentionStats):
        expected = {"received": 1, "entropy_nats": 0, "max": 1, "first_share": 1, "seen": 1}
        assert {n: set(a.values.ravel()) for n, a in data.data_vars.items()} == {n: {v} for n, v in expected.items()}


def test_reducers_are_hashable_and_their_keys_unique() -> None:
    """Equal reducers are one request; other parameters make another key."""
    assert len({r.key for r in ALL}) == len(set(ALL)) == len(ALL)
    for reducer in ALL:
        twin: Any = dataclasses.replace(reducer)  # type: ignore[type-var]
        assert twin is not reducer and twin == reducer and hash(twin) == hash(reducer) and twin.key == reducer.key
    assert ReceivedWithin(8).key == "received_within(horizon=8)"


@every_reducer
@pytest.mark.parametrize("lengths", [(200,), (40, 60, 100)], ids=str)
def test_memory_estimate_is_within_a_factor_of_three(reducer: Reducer, lengths: tuple[int, ...]) -> None:
    """What the plan counts is what the arrays take; numbers per text (16 bytes) are too small to count."""
    capture, batch = capture_of(reducer), texts_of(lengths)
    part = scripted(d_vocab=100).execute(Forward((capture,)), batch)[0]
    real = sum(a.nbytes for a in part.arrays.values()) / max(1, len(part.layers))
    estimate = reducer.memory_bytes(batch.n_tokens, 3, 16)
    assert estimate <= 3 * real and real <= 3 * estimate + 16 * len(batch), (estimate, real)


def test_a_point_that_never_fires_is_an_error() -> None:
    recorder = Recorder(Norm(), Point("resid_post", 0), (0,), (4,))
    with pytest.raises(RuntimeError, match=r"resid_post\.0 never fired"):
        recorder.close((0,))
