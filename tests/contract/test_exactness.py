"""Streamed statistics against naive float64 ones from whole attention maps and whole logits.

Tolerances are those of float32 arithmetic: shares to 2e-6; entropies and log-probabilities to a few units of
rounding of the largest score or logit in the row, because they are differences of numbers of that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, scripted, see, texts_of, tiny_model
from reference import allowed, attention_maps, attention_stats, readout, received_within

from probekit.backends.scripted import Script
from probekit.core import Batch, Capture, Forward, Point, TokenText
from probekit.reduce import (
    AttentionStats,
    Keep,
    MedianMagnitude,
    NextToken,
    Norm,
    Readout,
    ReceivedWithin,
    Recorder,
    TopMagnitudes,
    attention_blocks,
    vocab_rows,
)
from probekit.reduce.attention_blocks import AttentionMath, stream_attention

EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Case:
    """One attention layer: its texts, heads and rules."""

    lengths: tuple[int, ...] = (37,)
    block: int = 16
    n_heads: int = 4
    n_kv: int = 4
    d_value: int = 8
    window: int | None = None
    masked: bool = False
    softcap: float | None = None
    strength: float = 1.0
    bias: str = ""
    sinks: tuple[float, ...] = ()


CASES = {
    "plain": Case(),
    "block divides T": Case(lengths=(48,)),
    "block of one": Case(lengths=(9,), block=1),
    "block beyond T": Case(block=1000),
    "one token": Case(lengths=(1,)),
    "grouped heads": Case(n_kv=2),
    "one key-value head": Case(n_kv=1, lengths=(50, 3)),
    "padding": Case(lengths=(37, 1, 16, 20), n_kv=2),
    "window": Case(window=5),
    "window and padding": Case(window=5, lengths=(37, 2, 20), n_kv=2),
    "window of one": Case(window=1),
    "window longer than T": Case(window=64),
    "mask": Case(masked=True, lengths=(37, 20)),
    "mask, grouped heads, soft-cap": Case(masked=True, n_kv=2, softcap=2.0),
    "soft-cap": Case(softcap=5.0, strength=4.0),
    "soft-cap, window, padding": Case(softcap=5.0, window=6, lengths=(30, 7)),
    "sharp": Case(strength=30.0, lengths=(37, 20)),
    "wide values": Case(d_value=24),
    "ALiBi": Case(bias="alibi"),
    "ALiBi, one token": Case(bias="alibi", lengths=(1,)),
    "ALiBi, grouped heads, padding": Case(bias="alibi", n_kv=2, lengths=(37, 20, 1)),
    "ALiBi, mask": Case(bias="alibi", masked=True, lengths=(37, 20)),
    "bias of every pair": Case(bias="pairs", lengths=(37, 20), n_kv=2),
    "learned sinks": Case(sinks=(-2.0, 0.0, 3.0, 40.0)),
    "learned sinks, one token": Case(sinks=(-2.0, 0.0, 3.0, 40.0), lengths=(1,)),
    "learned sinks, window, grouped heads, padding": Case(
        sinks=(-2.0, 0.0, 3.0, 9.0), window=5, n_kv=2, lengths=(37, 2)
    ),
    "learned sinks, block divides T": Case(sinks=(-50.0, 0.0, 3.0, 9.0), lengths=(48,), strength=5.0),
}


def _bias(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    """What is added to the scores; axes text (or 1), head, query (or 1), key."""
    longest = max(case.lengths)
    if case.bias == "alibi":
        return (0.5 ** np.arange(1, case.n_heads + 1)[:, None, None] * np.arange(longest))[None].astype(np.float32)
    if case.bias == "pairs":
        return rng.normal(size=(len(case.lengths), case.n_heads, longest, longest)).astype(np.float32)
    return None


@pytest.mark.parametrize("in_turn", [False, True], ids=["", "heads in turn"])
@pytest.mark.parametrize("name", CASES)
def test_attention_statistics_are_exact(name: str, in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """AttentionStats, ReceivedWithin and the output equal those of whole float64 maps."""
    case, rng = CASES[name], np.random.default_rng(1)
    n_texts, longest, d_head = len(case.lengths), max(case.lengths), 8
    q = (rng.normal(size=(n_texts, case.n_heads, longest, d_head)) * case.strength).astype(np.float32)
    k = rng.normal(size=(n_texts, case.n_kv, longest, d_head)).astype(np.float32)
    v = rng.normal(size=(n_texts, case.n_kv, longest, case.d_value)).astype(np.float32)
    seen = np.stack([allowed(longest, case.window)] * n_texts)
    if case.masked:  # a different random mask for each text; every query sees itself
        seen &= (rng.random(seen.shape) < 0.6) | np.eye(longest, dtype=bool)
    scaling = d_head**-0.5
    bias, sinks = _bias(case, rng), np.array(case.sinks, np.float32) if case.sinks else None
    math = AttentionMath(
        scaling,
        case.softcap,
        None if case.masked else case.window,
        torch.as_tensor(seen)[:, None] if case.masked else None,
        bias=None if bias is None else torch.as_tensor(bias),
        sinks=None if sinks is None else torch.as_tensor(sinks),
    )
    reducers = [AttentionStats(), ReceivedWithin(8), ReceivedWithin(20)]
    recorders = [Recorder(r, Point("pattern"), (0,), case.lengths) for r in reducers]
    tensors = [torch.as_tensor(x) for x in (q, k, v)]
    blocks: list[int] = []

    def on_block(piece: Any) -> None:
        blocks.append(piece.start)
        for recorder in recorders:
            recorder.attention(0, piece)

    if in_turn:
        monkeypatch.setattr(attention_blocks, "BLOCK_BYTES", 1)
    output = stream_attention(*tensors, math, case.lengths, on_block, block=case.block)
    assert blocks == list(range(0, longest, case.block)) * (case.n_kv if in_turn else 1)
    found = [r.close(tuple(range(n_texts))).arrays for r in recorders]
    largest = float(np.abs(q).max() * np.abs(k).max() * d_head * scaling) if case.softcap is None else case.softcap
    largest += float(np.abs(bias).max()) if bias is not None else 0.0
    at = 0
    for i, n in enumerate(case.lengths):
        added: Any = 0.0 if bias is None else bias[min(i, len(bias) - 1)][:, :n, :n]
        maps = attention_maps(q[i, :, :n], k[i, :, :n], seen[i, :n, :n], scaling, case.softcap, added, sinks)
        expected = [
            attention_stats(maps, seen[i, :n, :n]),
            *(received_within(maps, seen[i, :n, :n], h) for h in (8, 20)),
        ]
        for arrays, naive in zip(found, expected, strict=True):
            for field, values in naive.items():
                tolerance = 8 * EPS * max(1.0, largest) if field != "seen" else 0.0
                assert_close(arrays[field][0, ..., at : at + n], values, atol=tolerance, what=f"{field} of text {i}")
        mixed = np.einsum("hqk,hkd->hqd", maps, np.repeat(v[i, :, :n].astype(float), case.n_heads // case.n_kv, 0))
        assert_close(output[i, :, :n], mixed, atol=8 * EPS * max(1.0, largest) * float(np.abs(v).max()), what="output")
        at += n


def _logits(kind: str, n: int, n_vocab: int) -> np.ndarray:
    rng = np.random.default_rng(n_vocab)
    if kind == "uniform":
        return np.zeros((n, n_vocab), np.float32)
    if kind == "ties":
        return rng.integers(0, 4, (n, n_vocab)).astype(np.float32)
    if kind == "extreme":
        return rng.choice([-1e4, 0.0, 1.0, 9_999.0, 1e4], (n, n_vocab)).astype(np.float32)
    if kind == "one-hot":
        row = np.zeros((n, n_vocab), np.float32)
        row[np.arange(n), rng.integers(0, n_vocab, n)] = np.linspace(10, 60, n)
        return row
    return (5 * rng.normal(size=(n, n_vocab))).astype(np.float32)


KINDS = ["random", "ties", "uniform", "one-hot", "extreme"]


@pytest.mark.parametrize("run", [64, 4], ids=lambda r: f"run {r}")
@pytest.mark.parametrize("top_k", [2, 100])
@pytest.mark.parametrize("n_vocab", [7, 64, 100, 1000, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_readouts_are_exact(kind: str, n_vocab: int, top_k: int, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readout of a layer and NextToken equal what float64 makes of the same logits.

    The unembedding is the identity, so that residual rows are logits. Vocabularies lie below, at and above multiples
    of the top-k search's runs; the last token of each text has no target.
    """
    monkeypatch.setattr(vocab_rows, "RUN", run)
    lengths = (5, 1, 14)
    n, rng = sum(lengths), np.random.default_rng(2)
    final, layer = _logits(kind, n, n_vocab), _logits("random" if kind != "extreme" else kind, n, n_vocab)[::-1].copy()
    ids = [tuple(int(i) for i in rng.integers(0, n_vocab, size)) for size in lengths]
    batch = Batch(tuple(TokenText(i, tuple(map(str, i))) for i in ids))
    starts = dict(zip(ids, batch.starts, strict=True))

    def play(text: TokenText) -> Script:
        at = slice(starts[text.ids], starts[text.ids] + len(text))
        return Script(np.stack([layer[at], final[at]]), np.zeros((2, 1, len(text), len(text))))

    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 1, "d_model": n_vocab, "d_vocab": n_vocab}
    model = scripted(play=play, unembedding=np.eye(n_vocab), **sizes)
    captures = [Capture("resid_post", Readout(top_k)), Capture("logits", NextToken(top_k))]
    lens, own = see(model, captures, batch)
    for data, logits, other in (
        (lens.isel(layer=0), layer, final),
        (lens.isel(layer=1), final, None),
        (own, final, None),
    ):
        naive = readout(logits, batch.next_ids, top_k, other)
        scale = max(1.0, float(np.abs(logits).max()), float(np.abs(final).max()))
        for field in set(data.data_vars) - {"top_id"}:
            # varentropy: second moment of rounding errors at the size of the logits and of the deviation itself
            size = scale * max(1.0, float(naive[field].max())) ** 0.5 if field == "varentropy_nats2" else scale
            exact = field == "target_rank"
            assert_close(
                data[field], naive[field], atol=0 if exact else 8 * EPS * size, rtol=0 if exact else 4e-6, what=field
            )
        ids_found = data["top_id"].values
        assert ids_found.shape == (n, min(top_k, n_vocab))
        assert all(len(set(row)) == len(row) for row in ids_found), "an id is named twice"
        named = np.take_along_axis(logits, ids_found.astype(int), 1)
        assert np.array_equal(named, -np.sort(-logits, axis=1)[:, : ids_found.shape[1]]), (
            "the ids are not the likeliest"
        )


def test_rows_are_exact() -> None:
    """Keep, Norm, TopMagnitudes and MedianMagnitude equal numpy's, for even and odd counts, huge entries and ties."""
    rng = np.random.default_rng(3)
    for lengths, d_model in (((5, 1, 8), 16), ((3, 7), 5)):
        values = rng.normal(size=(2, sum(lengths), d_model)).astype(np.float32)
        values[0, 2, 3], values[1, 1, 1], values[1, 3] = 25_000.0, -8_000.0, 1.0
        ids = [tuple(range(i, i + n)) for i, n in enumerate(lengths)]
        batch = Batch(tuple(TokenText(i, tuple(map(str, i))) for i in ids))
        starts = dict(zip(ids, batch.starts, strict=True))

        def play(text: TokenText, starts: Any = starts, values: Any = values) -> Script:
            at = starts[text.ids]
            return Script(values[:, at : at + len(text)], np.zeros((2, 1, len(text), len(text))))

        model = scripted(play=play, n_layers=2, n_heads=1, d_model=d_model)
        reducers = (Keep(), Norm(), TopMagnitudes(3), MedianMagnitude())
        keep, norm, top, median = see(model, [Capture("resid_post", r) for r in reducers], batch)
        assert np.array_equal(keep["value"], values)
        assert_close(norm["norm"], np.sqrt((values.astype(float) ** 2).sum(-1)), rtol=4 * EPS)
        magnitudes = np.abs(values)
        assert np.array_equal(np.abs(top["value"]), -np.sort(-magnitudes, axis=-1)[..., :3])
        assert np.array_equal(np.take_along_axis(values, top["dim"].values.astype(int), -1), top["value"])
        cut = np.split(magnitudes, np.cumsum(lengths)[:-1], axis=1)
        assert_close(median["median"], np.stack([np.median(t, axis=(1, 2)) for t in cut], 1), rtol=2 * EPS)


@pytest.mark.parametrize("kind", ["llama", "llama-grouped", "llama-single", "mistral"])
@pytest.mark.parametrize("block_bytes", [1, 4000, 40_000])
def test_heads_run_in_turn_without_a_difference(kind: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts run some key-value heads and fewer queries at a time; texts, heads and keys stay in their places."""
    model, batch = tiny_model(kind).model, texts_of([70, 41, 3])
    request = Forward((Capture("pattern", AttentionStats()), Capture("pattern", ReceivedWithin(16))))
    expected = model.execute(request, batch)
    monkeypatch.setattr(attention_blocks, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(attention_blocks, "SMALLEST_BLOCK", 8)
    shown: list[tuple[int, int]] = []
    normalise = attention_blocks._normalise

    def spy(scores: torch.Tensor, how: Any, place: Any, *rest: Any) -> Any:
        shown.append((place[0], scores.shape[1]))
        return normalise(scores, how, place, *rest)

    monkeypatch.setattr(attention_blocks, "_normalise", spy)
    found = model.execute(request, batch)
    if kind != "llama-single":
        assert any(n < model.info.n_heads for _, n in shown) or block_bytes == 40_000
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs.arrays:
            np.testing.assert_allclose(ours.arrays[name], theirs.arrays[name], atol=1e-5, equal_nan=True, err_msg=name)
