"""The nnsight backend: its numbers are the native backend's, its patches too, and the model is left as it was found.

Both run the same weights; where attention is not watched they run the same kernels, so values agree to the last bits.
Watched attention is eager here and streamed there, which rounds differently: 1e-5 of each array's largest entry.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import (
    D_MODEL,
    EVERYTHING,
    Boom,
    assert_close,
    assert_same,
    random_weights,
    run,
    see,
    texts_of,
    tiny_model,
    words_tokenizer,
)
from tiny_configs import KINDS as KINDS_OF_FAMILIES

from probekit.backends.nnsight import NnsightModel
from probekit.backends.transformers import TransformersModel, architectures
from probekit.core import (
    Add,
    CapabilityError,
    Capture,
    Forward,
    InputError,
    KnockOut,
    LogitDifference,
    ModelError,
    NextTokenEntropy,
    Patch,
    ProjectOut,
    Replace,
    Scale,
    SelfCheckError,
)
from probekit.models import open_model
from probekit.reduce import AttentionStats, Keep, Norm, TopMagnitudes

KINDS = ("llama-grouped", "gpt2", "mistral", "qwen2")
LENGTHS = (21, 1, 13, 40)
EDGES = {"embed", "resid_pre", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post", "final_norm"}
DIRECTION = np.random.default_rng(5).normal(size=D_MODEL)


@functools.cache
def ours(kind: str) -> NnsightModel:
    """A tiny model through nnsight, on the weights of the native one."""
    return NnsightModel.from_model(tiny_model(kind).model).load()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_site_is_the_native_one(kind: str) -> None:
    """Each site kept whole, from texts of four lengths in one padded batch."""
    native, model, batch = tiny_model(kind).model, ours(kind), texts_of(LENGTHS)
    assert model.info.sites == EDGES | {"logits", "pattern", "z"} | ({"v"} if kind != "gpt2" else set())
    captures = [Capture(s, Keep()) for s in sorted(model.info.sites - {"pattern"})]
    for capture, a, b in zip(captures, see(model, captures, batch), see(native, captures, batch), strict=True):
        assert np.abs(b["value"].values).max() > 0.01
        assert_same(a, b, rtol=1e-5, what=capture.key)


def test_every_reducer_agrees(kind: str) -> None:
    """All reducers in one pass, windows included; also of rows with heads; texts together and one by one."""
    native, model, batch = tiny_model(kind).model, ours(kind), texts_of(LENGTHS)
    captures = (*EVERYTHING, Capture("z", Norm()), Capture("z.1", TopMagnitudes(2)))
    expected = see(native, captures, batch)
    for groups in ([range(4)], [[0], [1], [2], [3]]):
        for capture, a, b in zip(captures, see(model, captures, batch, groups), expected, strict=True):
            assert_same(a, b, rtol=1e-5, what=capture.key)


@pytest.mark.parametrize("family", ["opt", "gemma2", "gpt_oss", "olmo", "phi"])
def test_other_layouts(family: str) -> None:
    """No MLP module, sandwich norms, learned sinks, clipped values (so no `v`), side by side: every served site."""
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(KINDS_OF_FAMILIES[family].config())).eval()
    native = TransformersModel.from_loaded(module, words_tokenizer(), name=family).load()
    model, batch = NnsightModel.from_model(native).load(), texts_of(LENGTHS)
    assert ("v" in model.info.sites) == (family != "olmo")
    captures = [Capture(s, Keep()) for s in sorted(model.info.sites - {"pattern"})]
    captures.append(Capture("pattern", AttentionStats()))
    for capture, a, b in zip(captures, see(model, captures, batch), see(native, captures, batch), strict=True):
        assert_same(a, b, rtol=1e-5, what=capture.key)


def test_attention_of_long_texts_comes_in_blocks() -> None:
    """More queries than one block holds, and an early layer only."""
    batch, capture = texts_of((200, 137)), Capture("pattern.1", AttentionStats())
    found = see(ours("llama-grouped"), [capture], batch)[0]
    expected = see(tiny_model("llama-grouped").model, [capture], batch)[0]
    assert_same(found, expected, rtol=1e-5)


PATCHES = {
    "scale": Patch("resid_post.1", Scale(0.5), positions=(-1,)),
    "zero": Patch("attn_out.0", 0.0, texts=(0, 2)),
    "add": Patch("resid_pre.2", Add(DIRECTION, 0.7), positions=(0,)),
    "project out": Patch("mlp_out", ProjectOut(DIRECTION)),
    "replace": Patch("resid_post.0", Replace(DIRECTION), positions=(-1,), texts=(2,)),
    "dims": Patch("mlp_act.1", Scale(-1), dims=(0, 7)),
    "embed": Patch("embed", Scale(2.0), positions=(0,)),
    "heads": Patch("z.1", 0.0, heads=(1, 3)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_do_what_they_do_natively(kind: str, name: str) -> None:
    patch, batch = PATCHES[name], texts_of(LENGTHS)
    captures = (Capture(patch.point, Keep()), Capture("resid_post", Keep()), Capture("logits", Keep()))
    found, expected, plain = (
        m.execute(Forward(captures, patches), batch)
        for m, patches in ((ours(kind), (patch,)), (tiny_model(kind).model, (patch,)), (ours(kind), ()))
    )
    for capture, a, b, c in zip(captures, found, expected, plain, strict=True):
        scale = float(np.abs(b.arrays["value"]).max())
        assert_close(a.arrays["value"], b.arrays["value"], atol=1e-5 * scale, what=capture.key)
        assert np.abs(a.arrays["value"] - c.arrays["value"]).max() > 1e-3 * scale, "the patch is live"


def test_identity_patches_change_no_bit(kind: str) -> None:
    model, batch = ours(kind), texts_of(LENGTHS)
    plain = see(model, [Capture("logits", Keep())], batch)[0]
    for site in sorted(model.info.sites - {"pattern", "logits", "resid_mid", "final_norm"}):
        parts = model.execute(Forward((Capture("logits", Keep()),), (Patch(site, 1.0),)), batch)
        assert np.array_equal(parts[0].arrays["value"], plain["value"].values), site


def test_a_value_patch_is_the_native_one() -> None:
    """`v` has key-value heads, so its own test."""
    batch, patch = texts_of(LENGTHS), Patch("v.1", 0.0, heads=(1,))
    found, expected = (
        m.execute(Forward((Capture("logits", Keep()),), (patch,)), batch)[0].arrays["value"]
        for m in (ours("llama-grouped"), tiny_model("llama-grouped").model)
    )
    assert_close(found, expected, atol=1e-5 * float(np.abs(expected).max()))


# --- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Forward((Capture("q", Keep()),)), r"has no point 'q'\. It offers: attn_out, embed"),
        (Forward((Capture("k.1", Keep()),)), "has no point 'k'"),
        (
            Forward((Capture("resid_post.1", Keep()),), gradient_of=LogitDifference((3,), (4,))),
            "nnsight backend does not serve gradients; use backend='transformers'",
        ),
        (
            Forward((Capture("embed", Keep()),), gradient_of=NextTokenEntropy()),
            "nnsight backend does not serve gradients; use backend='transformers'",
        ),
        (
            Forward((Capture("logits", Keep()),), (Patch("pattern.1", KnockOut([0], [-1])),)),
            "does not serve knock-outs",
        ),
        (Forward((Capture("resid_post.9", Keep()),)), "Layer 9 of 'resid_post' is outside this model"),
    ],
    ids=["q", "k", "gradient", "gradient of an entropy", "knock-out", "layer"],
)
def test_what_it_cannot_serve_is_refused_by_name(request_: Forward, message: str) -> None:
    with pytest.raises((CapabilityError, InputError), match=message):
        ours("llama-grouped").execute(request_, texts_of((7,)))


def test_a_wrong_row_of_the_table_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    native = tiny_model("llama").model
    model = NnsightModel.from_model(native)
    row = dataclasses.replace(architectures.LLAMA, mid=("input_layernorm", "input"))
    monkeypatch.setattr(native, "architecture", row)
    with pytest.raises(
        SelfCheckError, match=r"in another order than expected: 'model\.model\.layers\.0\.input_layernorm"
    ):
        model.load()


def test_other_nnsight_models_are_refused() -> None:
    import nnsight

    with pytest.raises(InputError, match=r"Found NNsight of nnsight.*expected\s+nnsight\.TransformersModel"):
        open_model(nnsight.NNsight(torch.nn.Linear(2, 2)))


def test_without_nnsight_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nnsight", None)
    for name in [n for n in sys.modules if n.startswith("probekit.backends.nnsight")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModelError, match=r"pip install 'probekit\[compare\]'"):
        tiny_model("llama").model.to_nnsight()


# --- ways in and out ----------------------------------------------------------------------------------------------


def test_a_wrapped_model_is_opened_as_it_is() -> None:
    """`open_model` takes nnsight's own object, which keeps working; its numbers are the native ones."""
    native, batch = tiny_model("gpt2").model, texts_of(LENGTHS)
    wrapped = native.to_nnsight()
    model = open_model(wrapped)
    assert isinstance(model, NnsightModel) and model.to_nnsight() is wrapped
    assert model.tokenize(["w3 w4 w9"]).texts[0].ids == (3, 4, 9)
    for a, b in zip(see(model, EVERYTHING, batch), see(native, EVERYTHING, batch), strict=True):
        assert_same(a, b, rtol=1e-5)
    with wrapped.trace(torch.tensor([[3, 4, 9]])):
        logits = wrapped.output.logits.save()
    assert_close(logits[0].detach().numpy(), native.own_logits(model.tokenize(["w3 w4 w9"])), atol=1e-6)
    with pytest.raises(InputError, match="leave backend out, or say 'nnsight'"):
        open_model(wrapped, backend="transformer_lens")


def test_backend_is_an_option_of_open_model() -> None:
    tiny = tiny_model("llama-grouped")
    model: Any = open_model((tiny.module, tiny.model.tokenizer), backend="nnsight", lazy=True)
    assert isinstance(model, NnsightModel)
    results = run(["massive-activations", "attention-sinks"], model.load(), texts_of((70, 80)))
    provenance = next(iter(results.values())).provenance
    assert provenance["backend"] == "nnsight" and provenance["versions"]["nnsight"].startswith("0.8")
    assert provenance["weights_hash"] == tiny.model.weights_hash()
    with pytest.raises(InputError, match="Did you mean 'nnsight'"):
        open_model((tiny.module, tiny.model.tokenizer), backend="nnsite")
    with pytest.raises(InputError, match="backend applies to models that probekit loads"):
        open_model(model, backend="nnsight")


def test_edits_of_the_nnsight_model_take_part() -> None:
    """What `model.edit` put in place is part of the model: captured values and logits have it."""
    wrapped = tiny_model("llama-grouped").model.to_nnsight()
    with wrapped.edit(inplace=True):
        wrapped.model.layers[2].mlp.output = wrapped.model.layers[2].mlp.output * 0.5
    model, batch = NnsightModel.from_nnsight(wrapped, name="edited").load(), texts_of(LENGTHS)
    found = see(model, [Capture("logits", Keep())], batch)[0]["value"].values
    patched = tiny_model("llama-grouped").model.execute(
        Forward((Capture("logits", Keep()),), (Patch("mlp_out.2", 0.5),)), batch
    )
    assert_close(found, patched[0].arrays["value"], atol=1e-5 * float(np.abs(found).max()))


# --- save, then reduce: what a remote run does --------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"save_first": True}, {"remote": "local"}], ids=["save first", "nnsight's dry run"])
@pytest.mark.parametrize("kind_", ["llama-grouped", "gpt2"])
def test_saved_activations_give_the_same_numbers(kind_: str, how: dict[str, Any]) -> None:
    """`remote="local"` sends the block through nnsight's serialiser and runs it here, as a server would."""
    native, batch = tiny_model(kind_).model, texts_of(LENGTHS)
    model = NnsightModel.from_nnsight(native.to_nnsight(), name="saved", **how).load()
    captures = (*EVERYTHING, Capture("z", Keep()), Capture("embed", Keep()), Capture("final_norm", Keep()))
    for capture, a, b in zip(captures, see(model, captures, batch), see(native, captures, batch), strict=True):
        assert_same(a, b, rtol=1e-5, what=capture.key)
    with pytest.raises(CapabilityError, match="does not serve patches in a pass that saves first"):
        model.execute(Forward(captures, (Patch("resid_pre.1", 0.0),)), batch)
    if "remote" in how:
        assert model.info.device == "remote" and model.provenance()["weights_hash"].startswith("remote:")


def test_a_lens_that_contradicts_the_logits_is_refused_in_a_saving_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NnsightModel.from_nnsight(tiny_model("llama").model.to_nnsight(), name="wrong", save_first=True)
    own = NnsightModel.own_logits
    monkeypatch.setattr(NnsightModel, "own_logits", lambda self, batch: 1.01 * own(self, batch))
    with pytest.raises(SelfCheckError, match="'wrong' fails the self-check: the lens at the last layer"):
        model.load()


# --- left as found ------------------------------------------------------------------------------------------------


def _state(module: Any) -> dict[str, Any]:
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "attention": {k: c._attn_implementation_internal for k, c in configs.items()},
        "config": {k: c.to_dict() for k, c in configs.items()},
        "hooks": {n: [list(getattr(m, k)) for k in kinds] for n, m in module.named_modules()},
        "forward": {n: id(m.__dict__.get("forward")) for n, m in module.named_modules()},
        "training": {n: m.training for n, m in module.named_modules()},
        "weights": {n: (t.data_ptr(), t.detach().clone().numpy().tobytes()) for n, t in module.state_dict().items()},
        "grad mode": torch.is_grad_enabled(),
    }


@contextmanager
def _left_as_found(*modules: Any) -> Iterator[None]:
    """Modules in a mixed state, one with a foreign hook; all of it is compared afterwards."""
    for module in modules:
        for i, part in enumerate(module.modules()):
            part.training = i % 3 == 0
    fired: list[int] = []
    handle = list(modules[0].modules())[-1].register_forward_hook(lambda *_: fired.append(1))
    before = [_state(m) for m in modules]
    try:
        yield
        assert [_state(m) for m in modules] == before
        n = len(fired)
        with torch.no_grad():
            modules[0](torch.tensor([[3, 4, 5]]))
        assert len(fired) > n
    finally:
        handle.remove()
        for module in modules:
            module.eval()


@dataclass(frozen=True)
class _BoomAttention(Boom):
    reads: ClassVar = "attention"


@pytest.mark.parametrize("kind_", ["llama-grouped", "gpt2"])
def test_both_models_are_left_as_found(kind_: str) -> None:
    """The nnsight twin and the native module it shares weights with, after a pass that watches and patches."""
    native, model = tiny_model(kind_).model, ours(kind_)
    assert model.module is not native.module
    assert all(a is b for a, b in zip(native.module.parameters(), model.module.parameters(), strict=True))
    before = see(native, EVERYTHING, texts_of(LENGTHS))
    with _left_as_found(model.module, native.module):
        model.execute(Forward(EVERYTHING, (Patch("resid_pre.1", 0.5),)), texts_of(LENGTHS))
    for capture in (Capture("pattern", _BoomAttention()), Capture("resid_mid", Boom())):
        with _left_as_found(model.module, native.module), pytest.raises(ZeroDivisionError, match="boom"):
            model.execute(Forward((*EVERYTHING, capture)), texts_of(LENGTHS))
    for a, b in zip(see(native, EVERYTHING, texts_of(LENGTHS)), before, strict=True):
        assert_same(a, b)
    for a, b in zip(see(model, EVERYTHING, texts_of(LENGTHS)), before, strict=True):
        assert_same(a, b, rtol=1e-5)


def test_going_out_changes_nothing_here() -> None:
    """`to_nnsight` copies modules, configuration and tokenizer; an edit of the copy's configuration stays there."""
    native = tiny_model("llama-grouped").model
    tokenizer, before = copy.deepcopy(native.tokenizer), _state(native.module)
    wrapped = native.to_nnsight()
    wrapped._module.config._attn_implementation = "eager"
    wrapped._module.model.config.hidden_act = "gelu"
    assert _state(native.module) == before
    assert native.tokenizer.padding_side == tokenizer.padding_side and wrapped.tokenizer is not native.tokenizer
    assert not any("forward" in m.__dict__ for m in native.module.modules())
