"""ReLU attention: streamed weights and outputs are those of a naive float64 reference, and the model keeps its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch import Tensor

import probekit as pk
from probekit.backends import self_check as checks
from probekit.backends.transformers import toy
from probekit.backends.transformers.relu_attention import relu_attention
from probekit.core import CapabilityError, Capture, Forward, KnockOut, Patch, SelfCheckError
from probekit.reduce import AttentionStats, Keep, Maps, SinkLogitGap
from probekit.reduce.attention_blocks import AttentionBlock, AttentionMath, stream_attention, whole_attention

VOCABULARY = ("<s>", *"abcdefghijklmnop")
SHAPE = toy.ToyShape(n_layers=2, d_model=16, context=48, d_vocab=len(VOCABULARY), relu=True)
TEXTS = ["abcdefghijklmnopabcdefghijklmnopabcdefghijklmnop"[:n] for n in (40, 33, 17)]


def naive(query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None = None) -> Any:
    """Weights and output in float64, one query at a time."""
    n = query.shape[2]
    z = query.double() @ key.double().transpose(2, 3) * scaling
    if hidden is not None:
        z = z.masked_fill(hidden, -1.0)
    weights = torch.zeros_like(z)
    for i in range(n):
        weights[..., i, : i + 1] = z[..., i, : i + 1].clamp(min=0) / (i + 1)
    return weights, weights @ value.double()


def qkv(n: int = 37, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, n, 8, generator=made) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("block", [5, 16, 64])
def test_streamed_weights_are_the_naive_ones(block: int) -> None:
    """Whatever the block size: weights, row maxima, entropies of the rows as shares, output."""
    query, key, value = qkv()
    weights, output = naive(query, key, value, 0.3)
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def on_block(b: AttentionBlock) -> None:
        assert not b.normalised
        seen.append((b.start, b.probs.clone(), b.entropy_nats.clone(), b.max.clone()))

    how = AttentionMath(0.3, relu=True)
    made = stream_attention(query, key, value, how, (37, 37), on_block, block=block)
    assert_close(made.double(), output, atol=1e-6)
    assert_close(whole_attention(query, key, value, how).transpose(1, 2).double(), output, atol=1e-6)
    share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    entropy = torch.special.entr(share).sum(-1)
    for start, probs, nats, largest in seen:
        stop = start + probs.shape[2]
        assert_close(probs.double(), weights[:, :, start:stop, : probs.shape[3]], atol=1e-6)
        assert_close(nats.double(), entropy[:, :, start:stop], atol=1e-5)
        assert_close(largest.double(), weights[:, :, start:stop].amax(-1), atol=1e-6)


def test_hand_computed_rows() -> None:
    """Scores (2), (-1, 4), (3, 0, 6): weights (2), (0, 2), (1, 0, 2); entropies 0, 0 and that of (1/3, 2/3)."""
    z = torch.tensor([[2.0, 0, 0], [-1, 4, 0], [3, 0, 6]])
    seen: list[AttentionBlock] = []
    how = AttentionMath(1.0, relu=True, keep_scores=True)
    stream_attention(z[None, None], torch.eye(3)[None, None], torch.ones(1, 1, 3, 1), how, (3,), seen.append)
    (block,) = seen
    assert_close(block.probs[0, 0], np.array([[2.0, 0, 0], [0, 2, 0], [1, 0, 2]]))
    assert_close(block.entropy_nats[0, 0], np.array([0, 0, np.log(3) - np.log(2) * 2 / 3]), atol=1e-6)
    assert_close(block.max[0, 0], np.array([2.0, 2, 2]))
    assert block.scores is not None and block.scores[0, 0, 1, :2].tolist() == [-1, 4]


def test_a_row_without_positive_score_is_zero() -> None:
    """All scores negative: weights, largest weight, entropy and output are 0, not NaN."""
    one = torch.ones(1, 1, 4, 2)
    seen: list[AttentionBlock] = []
    made = stream_attention(one, -one, one, AttentionMath(1.0, relu=True), (4,), seen.append)
    assert not made.any() and not seen[0].probs.any() and not seen[0].entropy_nats.any() and not seen[0].max.any()


def test_masks_hide_and_change_nothing_else() -> None:
    """A hidden pair weighs 0; the others keep their weight, since rows are not renormalised."""
    query, key, value = qkv(12)
    allowed = torch.ones(12, 12, dtype=torch.bool).tril()
    allowed[8, :5] = False
    weights, output = naive(query, key, value, 0.5, hidden=~allowed)
    mask = allowed[None, None]
    made, none = relu_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.5)
    assert none is None
    assert_close(made.transpose(1, 2).double(), output, atol=1e-6)
    free = naive(query, key, value, 0.5)[0]
    assert_close(weights[..., 8, 5:], free[..., 8, 5:])


def test_cached_keys_continue_the_row_numbers() -> None:
    """The last queries alone, with all keys: the same rows, divided by the same positions."""
    query, key, value = qkv(9)
    how = AttentionMath(0.4, relu=True)
    whole = whole_attention(query, key, value, how)
    assert_close(whole_attention(query[:, :, 6:], key, value, how), whole[:, 6:], atol=1e-6)


def test_dropout_is_refused() -> None:
    query, key, value = qkv(3)
    with pytest.raises(CapabilityError, match=r"ReLU attention has no dropout; the model asks for 0\.1"):
        relu_attention(torch.nn.Identity(), query, key, value, None, dropout=0.1)


@pytest.fixture(scope="module")
def module() -> Any:
    return toy.build_toy(SHAPE, seed=3)


def test_captures_are_what_the_model_computes(module: Any) -> None:
    """Statistics of every layer against weights made by hand from the model's own projections; logits unchanged."""
    model = toy.open_toy(module, VOCABULARY, "toy")
    batch = model.tokenize([TEXTS[0]])
    reducers = (AttentionStats(), Maps(), SinkLogitGap())
    captures = (*(Capture("pattern", r) for r in reducers), Capture("logits", Keep()), Capture("resid_pre", Keep()))
    stats, maps, gap, logits, stream = (p.arrays for p in model.execute(Forward(captures), batch))
    assert_close(logits["value"], model.own_logits(batch), atol=1e-6)
    for layer, block in enumerate(module.model.decoder.layers):
        attention = block.self_attn
        x = block.self_attn_layer_norm(torch.tensor(np.asarray(stream["value"][layer])))
        q, k, v = (p(x)[None, None] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        weights = naive(q, k, v, 0.25)[0][0, 0].detach().numpy()
        found = np.asarray(maps["value"]).reshape(2, len(x), len(x))[layer]
        assert_close(found, weights, atol=1e-5)
        n_seen = np.arange(len(x), 0, -1)
        assert_close(np.ravel(stats["received"][layer]), weights.sum(0) / n_seen, atol=1e-5)
        assert_close(np.ravel(stats["first_share"][layer]), weights[:, 0], atol=1e-5)
        z = (q @ k.transpose(2, 3))[0, 0].detach().numpy() * 0.25
        wanted = [z[i, 0] - z[i, 1:i].mean() for i in range(2, len(x))]
        assert_close(np.ravel(gap["gap_nats"][layer])[2:], np.array(wanted), atol=1e-4)


def test_rows_do_not_sum_to_one_and_the_check_at_load_knows(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check passes ReLU attention; shown as softmax attention, or with a negative weight, it fails."""
    model = toy.open_toy(module, VOCABULARY, "toy")
    batch = model.tokenize([TEXTS[0]])
    rows = model.execute(Forward((Capture("pattern", checks._RowSums()),)), batch)[0].arrays["past"]
    assert float(np.abs(np.asarray(rows) - 1).min()) > 0.01
    measure = checks._RowSums.measure

    def spoil(change: dict[str, Any]) -> None:
        def spoilt(self: Any, piece: AttentionBlock) -> Any:
            return measure(self, replace(piece, **{k: f(piece) for k, f in change.items()}))

        monkeypatch.setattr(checks._RowSums, "measure", spoilt)

    spoil({"normalised": lambda piece: True})
    with pytest.raises(SelfCheckError, match="attention rows sum to one"):
        checks.self_check(model, model._added)
    spoil({"probs": lambda piece: piece.probs - 0.5})
    with pytest.raises(SelfCheckError, match="no negative weight"):
        checks.self_check(model, model._added)


def test_batches_cuts_and_gradients(module: Any) -> None:
    """Texts of different lengths together; a cut edge changes its query alone; the way that gradients take agrees."""
    model = toy.open_toy(module, VOCABULARY, "toy")
    batch = model.tokenize(TEXTS)
    request = Forward((Capture("logits", Keep()),))
    together = np.asarray(model.execute(request, batch)[0].arrays["value"])
    alone = np.concatenate([model.own_logits(batch.select([i])) for i in range(len(TEXTS))])
    assert_close(together, alone, atol=1e-5)
    cut = Patch(("pattern", 1), KnockOut(queries=(12,), keys=None), texts=(0,))
    changed = np.asarray(model.execute(Forward(request.captures, (cut,)), batch)[0].arrays["value"])
    moved = np.abs(changed - together).max(axis=-1) > 1e-4
    assert np.flatnonzero(moved).tolist() == [12]
    ids = torch.tensor([batch.texts[0].ids])
    with torch.enable_grad():
        assert_close(module(input_ids=ids).logits[0].detach(), alone[: len(batch.texts[0])], atol=1e-6)


def test_a_saved_folder_keeps_relu_attention(module: Any, tmp_path: Path) -> None:
    """`open_model` on the folder: the same logits, the name in config.json, a bos token by default."""
    folder = toy.save_toy(module, VOCABULARY, tmp_path / "toy", {"note": "untrained"})
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert said["attn_implementation"] == "relu" and said["toy"] == {"note": "untrained"}
    opened, held = pk.open_model(folder), toy.open_toy(module, VOCABULARY, "toy")
    batch = opened.tokenize(["abc"])
    assert batch.texts[0].ids == (0, 1, 2, 3) and batch.strings == ("<s>", "a", "b", "c")
    assert_close(opened.own_logits(batch), held.own_logits(batch))  # type: ignore[attr-defined]
    softmax = toy.build_toy(toy.ToyShape(2, 16, 48, len(VOCABULARY)), seed=3)
    other = toy.open_toy(softmax, VOCABULARY, "softmax").own_logits(batch)
    assert np.abs(other - held.own_logits(batch)).max() > 1e-3
    assert module.config._attn_implementation == "relu"


def test_who_would_run_a_softmax_instead_is_refused() -> None:
    """The other libraries and the sampler of continuations do not know this kernel; each says so."""
    from probekit.core import Base, Branch, Fork
    from probekit.toys import open_bigram_backcopy

    model: Any = open_bigram_backcopy("1-layer-relu")
    assert "ReLU" in model.provenance()["attention"]
    for leave in (model.to_transformer_lens, model.to_nnsight):
        with pytest.raises(CapabilityError, match="ReLU in the place of the softmax"):
            leave()
    with pytest.raises(CapabilityError, match="branching is not offered"):
        model.branch(Branch((Base((0, 5), 1),), (Fork(0, 1),)), lambda *_: None, memory_limit=1 << 30)
