"""A model is left as it was found, also after a failure; and one that contradicts itself is refused at load."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import (
    EVERYTHING,
    Boom,
    Tiny,
    assert_same,
    random_weights,
    see,
    texts_of,
    tiny_config,
    tiny_model,
    words_tokenizer,
)

from probekit.backends.self_check import self_check
from probekit.backends.transformers import TransformersModel, architectures
from probekit.core import Capture, Forward, Patch, Request, SelfCheckError

LENGTHS = (21, 1, 13, 40)


@dataclass(frozen=True)
class _BoomAttention(Boom):
    reads: ClassVar = "attention"


@dataclass(frozen=True)
class _BoomVocab(Boom):
    reads: ClassVar = "vocab"


def _state(module: Any) -> dict[str, Any]:
    """Everything about a model that a pass could have changed."""
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "attention": {k: c._attn_implementation_internal for k, c in configs.items()},
        "config": {k: c.to_dict() for k, c in configs.items()},
        "hooks": {n: [list(getattr(m, k)) for k in kinds] for n, m in module.named_modules()},
        "training": {n: m.training for n, m in module.named_modules()},
        "grad": {n: (p.requires_grad, p.grad is None) for n, p in module.named_parameters()},
        "weights": {n: (t.data_ptr(), t.detach().clone().numpy().tobytes()) for n, t in module.state_dict().items()},
        "grad mode": torch.is_grad_enabled(),
    }


@contextmanager
def _left_as_found(module: Any) -> Iterator[list[int]]:
    """Put a module in a mixed state with a foreign hook that counts its calls; compare all of it afterwards."""
    module.train()
    for i, part in enumerate(module.modules()):
        part.training = i % 3 == 0
    frozen = next(iter(module.parameters()))
    frozen.requires_grad_(False)
    fired: list[int] = []
    handle = list(module.modules())[-1].register_forward_hook(lambda *_: fired.append(1))
    before = _state(module)
    assert len(set(before["training"].values())) == 2
    try:
        yield fired
        assert _state(module) == before
        n = len(fired)
        with torch.no_grad():
            module(torch.tensor([[3, 4, 5]]))
        assert len(fired) > n, "the foreign hook must still fire"
        assert _state(module) == before
    finally:
        handle.remove()
        frozen.requires_grad_(True)
        module.eval()


def test_model_is_left_as_found(tiny: Tiny) -> None:
    """Weights, configuration, attention, hooks, training flags and gradients are the same after a full pass."""
    digest = tiny.model.weights_hash(fresh=True)
    with _left_as_found(tiny.module):
        tiny.model.execute(Forward(EVERYTHING, (Patch("resid_pre.1", 0.5),)), texts_of(LENGTHS))
    assert tiny.model.weights_hash(fresh=True) == digest


@pytest.mark.parametrize(
    "capture",
    [Capture("pattern", _BoomAttention()), Capture("resid_mid", Boom()), Capture("resid_post", _BoomVocab())],
    ids=["attention", "rows", "vocab"],
)
def test_model_is_left_as_found_after_a_failure(tiny: Tiny, capture: Capture) -> None:
    """The same when a reducer raises inside the pass; and the next pass gives what it gave before."""
    before = see(tiny.model, EVERYTHING, texts_of(LENGTHS))
    with _left_as_found(tiny.module), pytest.raises(ZeroDivisionError, match="boom"):
        tiny.model.execute(Forward((*EVERYTHING, capture)), texts_of(LENGTHS))
    for found, expected in zip(see(tiny.model, EVERYTHING, texts_of(LENGTHS)), before, strict=True):
        assert_same(found, expected)


def test_two_models_that_share_a_configuration() -> None:
    """Watching one of two models with one config object leaves the other's attention and numbers alone."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama-grouped")
    first, second = (random_weights(AutoModelForCausalLM.from_config(config), seed).eval() for seed in (0, 1))
    second.config = second.model.config = first.config
    for part in [*first.modules(), *second.modules()]:
        if hasattr(part, "config"):
            part.config = first.config
    models = [TransformersModel.from_loaded(m, words_tokenizer(), name="shared").load() for m in (first, second)]
    batch = texts_of(LENGTHS)
    other = models[1].own_logits(batch)
    found = [see(m, EVERYTHING, batch) for m in models]
    assert first.config._attn_implementation == "sdpa"
    assert np.array_equal(models[1].own_logits(batch), other)
    assert_same(found[0][0], see(tiny_model("llama-grouped").model, EVERYTHING, batch)[0], rtol=1e-6)
    assert np.abs(found[1][0]["entropy_nats"].values - found[0][0]["entropy_nats"].values).max() > 0.01


def test_eager_model_stays_eager() -> None:
    """A model loaded with eager attention is watched all the same and is eager again afterwards."""
    tiny = tiny_model("llama-grouped")
    eager = TransformersModel.from_loaded(copy.deepcopy(tiny.reference), words_tokenizer(), name="eager").load()
    batch = texts_of(LENGTHS)
    found, expected = see(eager, EVERYTHING, batch), see(tiny.model, EVERYTHING, batch)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, rtol=1e-5)
    assert eager.module.config._attn_implementation == "eager"


# --- the self-check -----------------------------------------------------------------------------------------------

WRONG = {
    "attention named as MLP": ({"mlp": "self_attn"}, r"resid_post = resid_mid \+ mlp_out; found a relative difference"),
    "MLP named as attention": ({"attention": "mlp"}, r"resid_mid = resid_pre \+ attn_out; found a relative difference"),
    "input norm named as middle norm": ({"mid": ("input_layernorm", "input")}, r"resid_mid = resid_pre \+ attn_out"),
    "another norm named as final": ({"final_norm": "model.layers.0.input_layernorm"}, "the lens at the last layer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_self_check_refuses_a_wrong_row_of_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that names a wrong module does not load; the message says what is off and where to mend it."""
    wrong, message = WRONG[name]
    row = dataclasses.replace(architectures.LLAMA, **wrong)
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", row)
    model = TransformersModel.from_loaded(tiny_model("llama").module, words_tokenizer(), name="wrong")
    with pytest.raises(SelfCheckError, match=message) as caught:
        model.load()
    assert "'wrong' fails the self-check" in str(caught.value)
    assert "architecture table" in str(caught.value)


def test_self_check_notices_a_decorative_point() -> None:
    """A backend whose patches do nothing is refused, and one whose identity patch changes something, too."""

    class Deaf:
        """Ignores patches."""

        info = tiny_model("llama").model.info
        scale = 0.0

        def execute(self, request: Request, batch: Any, progress: Any = None) -> Any:
            assert isinstance(request, Forward)
            parts = tiny_model("llama").model.execute(Forward(request.captures), batch)
            if request.patches and self.scale:
                parts[0].arrays["value"] = parts[0].arrays["value"] + self.scale
            return parts

        def own_logits(self, batch: Any) -> np.ndarray:
            return tiny_model("llama").model.own_logits(batch)

    with pytest.raises(SelfCheckError, match=r"a zero patch at .* left the logits unchanged"):
        self_check(Deaf())
    shifted = Deaf()
    shifted.scale = 1e-6
    with pytest.raises(SelfCheckError, match=r"an identity patch at .* changed the logits"):
        self_check(shifted)
