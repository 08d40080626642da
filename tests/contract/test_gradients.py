"""Gradients of a logit difference and of an entropy, at every point: against finite differences and against plain autograd.

The finite differences are central ones in a float64 model; the step goes through a patch (`Add`), so that what is
differentiated is what a patch changes. The plain gradients come from transformers and torch alone.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import D_VOCAB, Tiny, assert_close, texts_of, tiny_model, words_tokenizer

from probekit.backends.transformers import TransformersModel
from probekit.core import (
    SITES,
    Add,
    CapabilityError,
    Capture,
    Forward,
    InputError,
    KnockOut,
    LogitDifference,
    NextTokenEntropy,
    Patch,
    Point,
)
from probekit.engine import run_pass
from probekit.reduce import AttentionStats, Keep, NextToken, Norm, Readout

KINDS = ("llama-grouped", "gpt2", "mistral")
CHANGEABLE = ("embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act", "q", "k", "v", "z")
BATCH = texts_of((9, 4), D_VOCAB)
METRIC = LogitDifference((17, 40), (99, -1))
ENTROPY = NextTokenEntropy()
TARGETS: dict[str, Any] = {"logit difference": METRIC, "entropy": ENTROPY}
Target = LogitDifference | NextTokenEntropy


@dataclass(frozen=True)
class Exact(Keep):
    """Keeps what it is shown in the type that it has."""

    def measure(self, piece: Any) -> Mapping[str, torch.Tensor]:
        return {"value": piece.values}


def in_double(module: Any) -> Any:
    """A copy in float64 throughout: transformers' RMS norms compute in float32 whatever they are given."""
    module = copy.deepcopy(module)
    for path, part in list(module.named_modules()):
        if type(part).__name__.endswith("RMSNorm"):
            exact = torch.nn.RMSNorm(len(part.weight), eps=part.variance_epsilon)
            exact.weight.data.copy_(part.weight.data)
            module.set_submodule(path, exact)
    return module.double().eval()


@functools.cache
def doubled(kind: str) -> TransformersModel:
    """The tiny model in float64."""
    module = in_double(tiny_model(kind).module)
    return TransformersModel.from_loaded(module, words_tokenizer(), name=f"double-{kind}").load()


def gradient(model: Any, point: Point | str, metric: Target = METRIC, *patches: Patch) -> list[np.ndarray]:
    """One array per text: d metric / d activation; axes token, then the point's own."""
    request = Forward((Capture(point, Exact()),), patches, gradient_of=metric)
    value = model.execute(request, BATCH)[0].arrays["value"]
    return np.split(value[0] if SITES[Point.of(point).site].layered else value, np.cumsum(BATCH.lengths)[:-1])


def measured(model: TransformersModel, metric: Target, *patches: Patch) -> np.ndarray:
    """The metric of each text, from the last block's output through norm and unembedding; float64."""
    rows = model.execute(Forward((Capture("resid_post.2", Exact()),), patches), BATCH)[0].arrays["value"][0]
    found = []
    with torch.no_grad():
        for i, one in enumerate(np.split(rows, np.cumsum(BATCH.lengths)[:-1])):
            norm = model.part(model.architecture.final_norm)
            logits = model.module.get_output_embeddings()(norm(torch.tensor(one[metric.position])))
            found.append(float(plainly(logits, metric, i)))
    return np.array(found)


def plainly(logits: torch.Tensor, metric: Target, text: int) -> torch.Tensor:
    """The number of one text, from its logits; torch's own entropy."""
    if isinstance(metric, NextTokenEntropy):
        return torch.distributions.Categorical(logits=logits).entropy()
    return logits[metric.plus[text]] - (logits[metric.minus[text]] if metric.minus[text] >= 0 else 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", CHANGEABLE)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_equal_finite_differences(kind: str, site: str, target: str) -> None:
    """Along random directions at every point: to 1e-6 relative; queries and keys included."""
    model, point, metric = doubled(kind), Point(site, 1 if SITES[site].layered else None), TARGETS[target]
    found, rng, step = gradient(model, point, metric), np.random.default_rng(0), 1e-5
    for text, pos in ((0, 0), (0, 6), (1, -2), (1, -1)):
        shape = found[text].shape[1:]
        direction = rng.normal(size=shape).astype(np.float32)
        up, down = (
            measured(model, metric, Patch(point, Add(direction[None], sign * step), positions=(pos,), texts=(text,)))
            for sign in (1, -1)
        )
        slope = (up - down)[text] / (2 * step)
        expected = float((found[text][pos] * direction.astype(float)).sum())
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-7), (text, pos)
        assert (up - down)[1 - text] == 0, "texts do not touch each other"


def plain_gradients(kind: str, row: int, metric: Target) -> dict[str, np.ndarray]:
    """What torch says of one text, of the transformers model by itself in float64; by point."""
    module, seen = in_double(tiny_model(kind).module), {}

    def keep(name: str, values: torch.Tensor) -> None:
        if not values.requires_grad:
            values.requires_grad_()
        values.retain_grad()
        seen[name] = values

    def output_of(name: str) -> Any:
        return lambda _, __, out: keep(name, out[0] if isinstance(out, tuple) else out)

    def input_of(name: str) -> Any:
        return lambda _, args, kwargs: keep(name, args[0] if args else kwargs["hidden_states"])

    gpt2 = kind == "gpt2"
    block = module.transformer.h[1] if gpt2 else module.model.layers[1]
    attention, down = (block.attn, block.mlp.c_proj) if gpt2 else (block.self_attn, block.mlp.down_proj)
    module.get_input_embeddings().register_forward_hook(output_of("embed"))
    block.register_forward_pre_hook(input_of("resid_pre.1"), with_kwargs=True)
    block.register_forward_hook(output_of("resid_post.1"))
    attention.register_forward_hook(output_of("attn_out.1"))
    (block.ln_2 if gpt2 else block.post_attention_layernorm).register_forward_pre_hook(
        input_of("resid_mid.1"), with_kwargs=True
    )
    block.mlp.register_forward_hook(output_of("mlp_out.1"))
    down.register_forward_pre_hook(input_of("mlp_act.1"), with_kwargs=True)
    (attention.c_proj if gpt2 else attention.o_proj).register_forward_pre_hook(input_of("z.1"), with_kwargs=True)
    (module.transformer.ln_f if gpt2 else module.model.norm).register_forward_hook(output_of("final_norm"))
    if not gpt2:
        attention.v_proj.register_forward_hook(output_of("v.1"))
    logits = module(torch.tensor([BATCH.texts[row].ids]), use_cache=False).logits[0, metric.position]
    plainly(logits, metric, row).backward()
    return {name: values.grad[0].numpy() for name, values in seen.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_equal_plain_autograd(kind: str, position: int, target: str) -> None:
    """Every entry at every token, in float64, from a batch with padding; nothing flows back from later tokens."""
    metric = dataclasses.replace(TARGETS[target], position=position)
    for row, n in enumerate(BATCH.lengths):
        plain = plain_gradients(kind, row, metric)
        assert len(plain) == (9 if kind == "gpt2" else 10)
        for point, expected in plain.items():
            found = gradient(doubled(kind), point, metric)[row]
            assert_close(found.reshape(n, -1), expected, atol=1e-9 * float(np.abs(expected).max()), what=point)
            assert np.abs(expected).max() > 0
            assert not np.abs(found[position % n + 1 :]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_float32_gradients_are_those_of_float64(kind: str, target: str) -> None:
    for site in (*CHANGEABLE, "resid_mid", "final_norm"):
        point, metric = Point(site, 1 if SITES[site].layered else None), TARGETS[target]
        for found, expected in zip(
            gradient(tiny_model(kind).model, point, metric), gradient(doubled(kind), point, metric), strict=True
        ):
            assert_close(found, expected, atol=2e-5 * float(np.abs(expected).max()), what=site)


def test_gradient_is_taken_at_the_patched_activation() -> None:
    """After Scale(0.5) at the point, the slope is that of the halved activation, not of the one before."""
    model, half = doubled("llama-grouped"), Patch("resid_pre.1", 0.5)
    found, before = (gradient(model, "resid_pre.1", METRIC, *some)[0] for some in ((half,), ()))
    direction = np.random.default_rng(1).normal(size=32).astype(np.float32)
    up, down = (
        measured(model, METRIC, half, Patch("resid_pre.1", Add(direction, sign * 1e-5), positions=(3,), texts=(0,)))
        for sign in (1, -1)
    )
    assert (up - down)[0] / 2e-5 == pytest.approx(float(found[3] @ direction), rel=1e-6)
    assert np.abs(found - before).max() > 1e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_found(frozen: bool) -> None:
    """No parameter gets a gradient, frozen ones serve as well, and neither the mode nor a hook stays behind."""
    tiny = tiny_model("llama-grouped")
    expected = gradient(tiny.model, "q.1")
    module = copy.deepcopy(tiny.module).requires_grad_(not frozen)
    model = TransformersModel.from_loaded(module, words_tokenizer(), name="mine").load()
    with torch.no_grad():
        found = gradient(model, "q.1")
        assert not torch.is_grad_enabled()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(p.grad is None and p.requires_grad == (not frozen) for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module.config._attn_implementation == "sdpa"


def test_row_reducers_see_the_gradient_and_texts_choose_what_runs() -> None:
    """`texts` runs some texts; the ids of the difference follow the order in which the request names them."""
    model: Any = tiny_model("gpt2").model
    whole = gradient(model, "z.2")
    request = Forward((Capture("z.2", Norm()),), texts=(1, 0), gradient_of=LogitDifference((40, 17), (-1, 99)))
    trace, _ = run_pass(model, request, BATCH)
    norms = trace[request.captures[0]]["norm"]
    assert norms.dims == ("layer", "head", "token") or norms.dims == ("layer", "token", "head")
    found = norms.isel(layer=0).transpose("token", "head").values
    expected = np.concatenate([np.linalg.norm(whole[1], axis=-1), np.linalg.norm(whole[0], axis=-1)])
    assert_close(found, expected, atol=1e-5 * float(expected.max()))


REFUSED: dict[str, tuple[Forward, type[Exception], str]] = {
    "attention": (
        Forward((Capture("pattern.1", AttentionStats()),), gradient_of=METRIC),
        CapabilityError,
        "ask for attention statistics, lenses, logits and knock-outs in a request without gradient_of",
    ),
    "lens": (Forward((Capture("resid_post", Readout()),), gradient_of=METRIC), CapabilityError, "without gradient_of"),
    "next token": (Forward((Capture("logits", NextToken()),), gradient_of=METRIC), CapabilityError, "Gradients are"),
    "logits": (Forward((Capture("logits", Keep()),), gradient_of=METRIC), CapabilityError, "Gradients are seen at"),
    "knock-out": (
        Forward((Capture("z.1", Keep()),), (Patch("pattern.1", KnockOut((0,), (1,))),), gradient_of=METRIC),
        CapabilityError,
        "without gradient_of",
    ),
    "too few ids": (
        Forward((Capture("z.1", Keep()),), gradient_of=LogitDifference((1,), (2,))),
        InputError,
        "names ids for 1 texts; text 1 has none",
    ),
    "position": (
        Forward((Capture("z.1", Keep()),), gradient_of=LogitDifference((1, 1), (2, 2), 5)),
        InputError,
        "read at position 5; text 1 has 4 tokens",
    ),
    "position of an entropy": (
        Forward((Capture("z.1", Keep()),), gradient_of=NextTokenEntropy(-5)),
        InputError,
        "The next-token entropy is read at position -5; text 1 has 4 tokens",
    ),
    "lens of an entropy": (
        Forward((Capture("resid_post", Readout()),), gradient_of=ENTROPY),
        CapabilityError,
        "without gradient_of",
    ),
    "token id": (
        Forward((Capture("z.1", Keep()),), gradient_of=LogitDifference((1, 128), (2, 2))),
        InputError,
        "plus=128 for text 1; the vocabulary has 128 entries",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient_is_refused(name: str) -> None:
    request, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        tiny_model("llama-grouped").model.execute(request, BATCH)


def test_a_point_that_is_a_copy_has_no_gradient(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that shows a copy is told so; zeros would be a wrong number."""
    from probekit.backends import capture_pass

    own = capture_pass.CapturePass._show

    def shows_a_copy(self: Any, recorder: Any, layer: int) -> Any:
        show = own(self, recorder, layer)

        def tap(values: torch.Tensor) -> None:
            show(values.clone())

        return tap

    monkeypatch.setattr(capture_pass.CapturePass, "_show", shows_a_copy)
    with pytest.raises(CapabilityError, match=r"shows resid_post.1 in layer 1 but does not read it again"):
        gradient(tiny_llama.model, "resid_post.1")
