"""What changing activations does to the real SmolLM2-135M-Instruct.

The massive activation (arXiv 2402.17762, section 4: set to zero, the model breaks; set to its mean, it does not): one
number, at position 0 of the stream after block 11. And generation under patches, against transformers' own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import probekit as pk
from probekit.core import Batch, Capture, Forward
from probekit.demo import demo_texts
from probekit.engine import run_pass
from probekit.reduce import Keep, NextToken, TopMagnitudes

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]
LAYER, DIM = 11, 507
SURPRISAL = Capture("logits", NextToken(1))


@pytest.fixture(scope="module")
def reference(smol: Any) -> Batch:
    """Three passages to take the mean from."""
    return smol.tokenize(demo_texts()[:3])


@pytest.fixture(scope="module")
def held_out(smol: Any) -> Batch:
    """Three other passages, to be judged on."""
    return smol.tokenize(demo_texts()[3:])


def perplexity(model: Any, batch: Batch, *patches: pk.Patch) -> float:
    trace, _ = run_pass(model, Forward((SURPRISAL,), patches), batch)
    return float(np.exp(-np.nanmean(trace[SURPRISAL]["logprob_nats"].values)))


def test_one_number_carries_the_model_and_its_mean_will_do(
    smol: Any, reference: Batch, held_out: Batch, record_property: Any
) -> None:
    """Zero destroys the model; the mean over other texts does not; zeros elsewhere do next to nothing."""
    point = f"resid_post.{LAYER}"
    largest = Capture(point, TopMagnitudes(2))
    trace, _ = run_pass(smol, Forward((largest,)), reference)
    first = trace[largest].isel(layer=0, token=np.flatnonzero(trace.batch.pos == 0))
    assert (first["dim"].isel(rank=0) == DIM).all(), "the massive activation has moved"
    mean = float(first["value"].isel(rank=0).mean())
    spread = float(first["value"].isel(rank=0).std())
    assert 18_000 < mean < 28_000 and spread < 0.2 * mean

    massive: dict[str, Any] = {"positions": (0,), "dims": (DIM,)}
    found = {
        "as it is": perplexity(smol, held_out),
        "zero": perplexity(smol, held_out, pk.Patch(point, 0.0, **massive)),
        "mean": perplexity(smol, held_out, pk.Patch(point, pk.Replace([[mean]]), **massive)),
        "zero, another dimension": perplexity(smol, held_out, pk.Patch(point, 0.0, positions=(0,), dims=(DIM + 1,))),
        "zero, another position": perplexity(smol, held_out, pk.Patch(point, 0.0, positions=(7,), dims=(DIM,))),
    }
    for name, value in found.items():
        record_property(name, value)
        print(f"{name:<26}{value:12.2f}")
    plain = found["as it is"]
    assert 2 < plain < 40
    assert found["zero"] > 20 * plain
    assert found["mean"] == pytest.approx(plain, rel=0.05)
    assert found["zero, another dimension"] == pytest.approx(plain, rel=0.01)
    assert found["zero, another position"] == pytest.approx(plain, rel=0.01)


PROMPTS = ("The capital of France is", "Once upon a time, in a small village by the sea,", "2 + 2 =")


def test_generation_is_transformers_own(smol: Any) -> None:
    """Greedy, from prompts of unequal length, token for token; entropies are those of an ordinary pass."""
    found = pk.generate(smol, list(PROMPTS), 12)
    for prompt, text, n in zip(smol.tokenize(PROMPTS), found.batch, found.n_prompt, strict=True):
        ids = torch.tensor([prompt.ids])
        own = smol.module.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        assert text.ids == tuple(own[0].tolist()) and text.ids[:n] == prompt.ids
    assert "Paris" in found.texts[0]
    trace, _ = run_pass(smol, Forward((SURPRISAL,)), found.batch)
    entropy = trace[SURPRISAL]["entropy_nats"]
    kept = np.concatenate([np.arange(len(t)) >= n for t, n in zip(found.batch, found.n_prompt, strict=True)])
    before = entropy.values[
        np.flatnonzero(kept) - 1
    ]  # the distribution a token is drawn from is that of the one before
    np.testing.assert_allclose(found.data["entropy_nats"].values, before, atol=1e-4)


def test_steered_generation_agrees_with_and_without_the_cache(smol: Any) -> None:
    """A direction added at every step, and one number set at the prompt only; both change what is written."""
    batch = smol.tokenize(PROMPTS[1:2])
    sea, city = (pk.cache(smol, t, "resid_post.12")["resid_post", 12].values[-1] for t in (" the sea", " the city"))
    steer = (pk.Patch("resid_post.12", pk.Add(city - sea, 4.0)),)
    plain, steered = smol.generate(batch, 10), smol.generate(batch, 10, steer)
    again = smol.generate(batch, 10, steer, cached=False)
    assert steered.batch == again.batch and steered.batch != plain.batch
    np.testing.assert_allclose(steered.data["logprob_nats"], again.data["logprob_nats"], atol=1e-4)
    broken = smol.generate(batch, 10, (pk.Patch(f"resid_post.{LAYER}", 0.0, positions=(0,), dims=(DIM,)),))
    assert broken.batch != plain.batch


def test_writing_back_changes_no_bit(smol: Any) -> None:
    """The model's own activations, at ten points of one block; grouped heads: 9 queries share 3 keys and values."""
    batch = smol.tokenize(["The keeper of the lighthouse wrote down the weather."])
    logits = Capture("logits", Keep())
    plain = run_pass(smol, Forward((logits,)), batch)[0][logits]["value"].values
    points = tuple(f"{site}.12" for site in ("resid_pre", "attn_out", "mlp_act", "mlp_out", "q", "k", "v", "z"))
    seen = pk.cache(smol, batch, points)
    assert seen["k.12"].sizes["head"] == 3 and seen["q.12"].sizes["head"] == 9
    for point in points:
        patched = run_pass(smol, Forward((logits,), (pk.Patch(point, pk.Replace(seen[point])),)), batch)[0]
        assert np.array_equal(patched[logits]["value"].values, plain), point
