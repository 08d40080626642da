"""The paths made for accelerators give the CPU's numbers; they run here on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import texts_of, tiny_config, tiny_model, words_tokenizer

from probekit.backends import capture_pass
from probekit.backends.transformers import TransformersModel
from probekit.core import Capture, Forward, Point
from probekit.reduce import AttentionStats, NextToken, Nucleus, Readout, Recorder, Tempered, vocab_tiles
from probekit.reduce.vocab_rows import stream_readout
from probekit.reduce.vocab_tiles import stream_readout_tiles

LAYERS, TOKENS, D_MODEL, D_VOCAB = 3, 37, 24, 1003


class Unembed:
    """Random weights, a bias, a soft-cap: everything the lens may meet."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight, self.bias = torch.randn(D_VOCAB, D_MODEL), torch.randn(D_VOCAB)

    def norm(self, rows: torch.Tensor) -> torch.Tensor:
        return rows / rows.norm(dim=-1, keepdim=True) * 3

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh(logits / 30)


def read(stream: Any, **how: Any) -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    residuals = {layer: torch.randn(TOKENS, D_MODEL) * 5 for layer in range(LAYERS)}
    targets = torch.randint(0, D_VOCAB, (TOKENS,))
    targets[-1] = -1
    layered = Recorder(Readout(7), Point("resid_post"), tuple(range(LAYERS)), (TOKENS,))
    final = Recorder(NextToken(5), Point("logits"), (0,), (TOKENS,))
    cut = Recorder(Nucleus(0.8), Point("logits"), (0,), (TOKENS,))  # reads whole rows on either path
    warm = Recorder(Tempered(0.5, 3), Point("resid_post"), (1, 2), (TOKENS,))
    stream(residuals, LAYERS - 1, targets, Unembed(), [layered, warm], [final, cut], **how)
    parts = {"lens": layered.close((0,)), "final": final.close((0,)), "cut": cut.close((0,)), "warm": warm.close((0,))}
    return {f"{k} {name}": a.astype(float) for k, p in parts.items() for name, a in p.arrays.items()}


@pytest.mark.parametrize(("rows", "tile"), [(16, 256), (1000, 64), (5, 5000)])
def test_tiles_give_what_whole_rows_give(rows: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_tiles, "DEVICE_ROWS", rows)
    monkeypatch.setattr(vocab_tiles, "DEVICE_TILE", tile)
    expected, found = read(stream_readout), read(stream_readout_tiles, compiled=False)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=2e-5, equal_nan=True, err_msg=name)


def test_the_backend_reads_by_tiles_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, batch = tiny_model("llama-grouped"), texts_of([20, 9])
    request = Forward((Capture("resid_post", Readout(4)), Capture("logits", NextToken(4))))
    expected = tiny.model.execute(request, batch)
    calls = []

    def tiles(*args: Any, **how: Any) -> None:
        calls.append(1)
        stream_readout_tiles(*args, compiled=False, **how)

    monkeypatch.setattr(capture_pass, "stream_readout", tiles)
    for ours, theirs in zip(tiny.model.execute(request, batch), expected, strict=True):
        for name in theirs.arrays:
            np.testing.assert_allclose(ours.arrays[name], theirs.arrays[name], rtol=1e-5, atol=2e-5, err_msg=name)
    assert calls


@pytest.mark.parametrize("kind", ["llama", "llama-grouped", "mistral"])
def test_half_precision_statistics_are_those_of_the_same_weights_in_float32(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    half.load_state_dict(tiny_model(kind).module.state_dict())
    model = TransformersModel.from_loaded(half.to(torch.bfloat16), words_tokenizer()).load()
    batch, request = texts_of([40, 23]), Forward((Capture("pattern.0", AttentionStats()),))
    (found,) = model.execute(request, batch)
    (expected,) = tiny_model(kind).model.execute(request, batch)
    for name in expected.arrays:
        # Weights, queries and keys are rounded to 8 bits; sums over them are not.
        np.testing.assert_allclose(found.arrays[name], expected.arrays[name], atol=0.06, rtol=0.05, err_msg=name)
    row_sums = found.arrays["received"][0] * found.arrays["seen"][0]
    assert np.allclose(row_sums[:, :40].sum(-1), 40, rtol=2e-3)


def test_half_precision_output_is_the_models_own() -> None:
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_config(tiny_config("llama-grouped")).eval()
    half.load_state_dict(tiny_model("llama-grouped").module.state_dict())
    model = TransformersModel.from_loaded(half.to(torch.bfloat16), words_tokenizer()).load()
    batch = texts_of([40])
    from probekit.reduce import Keep

    logits = Capture("logits", Keep())
    plain = model.execute(Forward((logits,)), batch)[0].arrays["value"]
    watched = model.execute(Forward((logits, Capture("pattern", AttentionStats()))), batch)[0].arrays["value"]
    np.testing.assert_allclose(watched, plain, atol=0.02 * float(np.abs(plain).max()))
