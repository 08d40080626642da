"""The TransformerLens backend: the same numbers as the native one, changes that are live, models left as they were."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import (
    D_VOCAB,
    EVERYTHING,
    Boom,
    Tiny,
    assert_close,
    assert_same,
    random_weights,
    see,
    texts_of,
    tiny_model,
    words_tokenizer,
)
from tiny_configs import KINDS

import probekit
from probekit.backends.self_check import self_check
from probekit.backends.transformer_lens import TransformerLensModel, bridge, build_bridge, hooks
from probekit.backends.transformers import TransformersModel
from probekit.cli import cli
from probekit.core import (
    SITES,
    Add,
    CapabilityError,
    Capture,
    Embed,
    Forward,
    InputError,
    KnockOut,
    LogitDifference,
    ModelError,
    NextTokenEntropy,
    Patch,
    ProjectOut,
    Replace,
    SelfCheckError,
)
from probekit.engine import run_pass
from probekit.reduce import AttentionStats, Keep, Norm

LENGTHS = (21, 1, 13, 140)  # one is longer than a block of queries
BATCH = texts_of(LENGTHS, D_VOCAB)
SMALL = texts_of((9, 4), D_VOCAB)
READ_ONLY = ("resid_mid", "final_norm", "logits")
# What a bridge cannot show as probekit means it is left out, and nothing else is.
LEFT_OUT: dict[str, set[str]] = {
    "gpt_neox": {"q", "k"},  # shown before the rotation only
    "olmo": {"v", "z"},  # shown before they are clipped
    "granite": {"embed"},  # shown after its multiplier
    "phi3": {"q", "k"},
    "mixtral": {"router"},
    "gpt_oss": {"router"},
}


@dataclass(frozen=True)
class Pair:
    """One set of weights behind both backends."""

    kind: str
    native: TransformersModel
    model: TransformerLensModel


def _native(kind: str, dtype: torch.dtype = torch.float32) -> TransformersModel:
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(KINDS[kind].config())).eval().to(dtype)
    return TransformersModel.from_loaded(module, words_tokenizer(), name=kind)


def _pair(kind: str, native: TransformersModel) -> Pair:
    return Pair(kind, native, TransformerLensModel.from_model(native).load())


@pytest.fixture(scope="module", params=["llama-grouped", "gpt2", "mistral"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return _pair(request.param, tiny_model(request.param).model)


OTHERS = ("gpt_neox", "gemma2", "gpt_oss", "granite", "olmo", "mixtral", "phi3", "cohere2")


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest) -> Pair:
    """Families in which bridges and probekit name different things alike."""
    return _pair(request.param, _native(request.param))


def values(model: Any, captures: list[Capture], patches: tuple[Patch, ...] = ()) -> list[np.ndarray]:
    return [p.arrays["value"] for p in model.execute(Forward(tuple(captures), patches), SMALL)]


# --- the numbers --------------------------------------------------------------------------------------------------


def _same_at_every_site(pair: Pair, batch: Any) -> None:
    """Every site kept whole, relative to its largest entry."""
    captures = [Capture(s, Keep()) for s in sorted(pair.model.info.sites - {"pattern"})]
    for capture, found, expected in zip(
        captures, see(pair.model, captures, batch), see(pair.native, captures, batch), strict=True
    ):
        size = float(np.abs(expected["value"]).max())
        assert_close(found["value"], expected["value"], atol=1e-5 * size, what=capture.key)


def test_every_site_equals_the_native_backend(pair: Pair) -> None:
    assert pair.model.info == pair.native.info, "sizes, capabilities and sites"
    _same_at_every_site(pair, BATCH)


def test_every_statistic_equals_the_native_backend(pair: Pair) -> None:
    """Attention statistics, lenses, norms and medians of texts that are padded on the right."""
    both = zip(EVERYTHING, see(pair.model, EVERYTHING, BATCH), see(pair.native, EVERYTHING, BATCH), strict=True)
    for capture, found, expected in both:
        assert_same(found, expected, rtol=1e-5, what=capture.key)


def test_other_families_equal_the_native_backend_or_say_what_they_lack(other: Pair) -> None:
    expected = other.native.info.sites - LEFT_OUT.get(other.kind, set())
    assert other.model.info.sites == expected
    _same_at_every_site(other, BATCH)
    for capture in (Capture("pattern", AttentionStats()), EVERYTHING[3]):
        (found,), (native,) = see(other.model, [capture], BATCH), see(other.native, [capture], BATCH)
        assert_same(found, native, rtol=1e-5, what=capture.key)
    for site in other.native.info.sites - expected:
        with pytest.raises(CapabilityError, match=f"no point '{site}'"):
            run_pass(other.model, Forward((Capture(site, Keep()),)), SMALL)


def test_padding_changes_nothing(pair: Pair) -> None:
    alone = see(pair.model, EVERYTHING, BATCH, groups=[[i] for i in range(len(BATCH))])
    for capture, found, expected in zip(EVERYTHING, see(pair.model, EVERYTHING, BATCH), alone, strict=True):
        assert_same(found, expected, rtol=1e-5, what=capture.key)


def test_half_precision_rounds_no_more_than_the_native_backend() -> None:
    """Both against float32 with the same rounded weights."""
    half = _pair("llama", _native("llama", torch.bfloat16))
    rounded = copy.deepcopy(half.native.module).float()
    exact = TransformersModel.from_loaded(rounded, words_tokenizer(), name="exact").load()
    assert half.model.info.sites == half.native.info.sites and half.model.info.dtype == "bfloat16"
    for site in ("resid_post", "logits", "q", "z"):
        found, native, expected = (
            see(m, [Capture(site, Keep())], BATCH)[0]["value"].values for m in (half.model, half.native, exact)
        )
        size = np.abs(expected).mean()
        assert 1e-4 < np.abs(found - expected).mean() / size < 1.5 * np.abs(native - expected).mean() / size < 0.05, (
            site
        )


# --- changes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [s for s in SITES if s not in ("pattern", "router", *READ_ONLY)])
def test_patches_are_exact_live_and_equal_to_the_native_ones(pair: Pair, site: str) -> None:
    point = (site, 1) if SITES[site].layered else site
    captures = [Capture("logits", Keep()), Capture(point, Keep())]
    plain = values(pair.model, captures)
    for a, b in zip(values(pair.model, captures, (Patch(point, 1.0),)), plain, strict=True):
        assert np.array_equal(a, b), "an identity patch changes no bit"
    gone = values(pair.model, captures, (Patch(point, 0.0),))
    assert np.abs(gone[1]).max() == 0, "a capture sees what the patch wrote"
    assert np.abs(gone[0] - plain[0]).max() > 1e-3, "the patch is decorative"
    direction = np.random.default_rng(0).normal(size=plain[1].shape[-1])
    heads = (1,) if "head" in SITES[site].dims else None
    for edit in (0.0, Add(direction, 2.0), ProjectOut(direction), Replace(direction)):
        patch = Patch(point, edit, positions=(0, -1), heads=heads)
        found, expected = values(pair.model, captures, (patch,)), values(pair.native, captures, (patch,))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, atol=1e-5 * float(np.abs(b).max()), what=patch.key)


@pytest.mark.parametrize("site", READ_ONLY)
def test_points_that_can_only_be_read_refuse_patches(pair: Pair, site: str) -> None:
    with pytest.raises(CapabilityError, match=f"'{site}' can be read but not changed"):
        values(pair.model, [Capture("logits", Keep())], (Patch(site, 0.0),))


def test_knock_outs_equal_the_native_ones(pair: Pair) -> None:
    captures = (Capture("logits", Keep()), Capture("pattern", AttentionStats()))
    plain = see(pair.model, captures, SMALL)[0]
    for edit, heads in ((KnockOut(keys=[0], queries=[2, -1]), (1, 3)), (KnockOut(queries=[-1]), None)):
        request = Forward(captures, (Patch("pattern.1", edit, heads=heads),))
        found, expected = (run_pass(m, request, SMALL)[0] for m in (pair.model, pair.native))
        for capture in captures:
            assert_same(found[capture], expected[capture], rtol=1e-5, what=capture.key)
        assert np.abs(found[captures[0]]["value"].values - plain["value"].values).max() > 1e-3


def test_knock_outs_are_refused_where_scores_are_not_what_they_are_called() -> None:
    """OPT's bridge shows the pattern under the name of the scores."""
    model = TransformerLensModel.from_model(_native("opt")).load()
    with pytest.raises(CapabilityError, match="does not show attention scores before the softmax"):
        values(model, [Capture("logits", Keep())], (Patch("pattern.0", KnockOut(queries=[-1])),))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_equal_the_native_ones(kind: str) -> None:
    pair = _pair(kind, _native(kind))
    pair.native.module.requires_grad_(False)  # gradients are those of activations, also where weights are frozen
    captures = tuple(Capture(s, Keep()) for s in ("embed", "resid_pre", "attn_out", "mlp_out", "q", "k", "v", "z"))
    for target in (LogitDifference((5, 6), (7, -1)), NextTokenEntropy()):
        request = Forward(captures, gradient_of=target)
        found, expected = (m.execute(request, SMALL) for m in (pair.model, pair.native))
        for capture, a, b in zip(captures, found, expected, strict=True):
            size = float(np.abs(b.arrays["value"]).max())
            assert size > 1e-3, capture.key
            assert_close(a.arrays["value"], b.arrays["value"], atol=1e-4 * size, what=f"{capture.key} {target}")


# --- as found -----------------------------------------------------------------------------------------------------


def _state(of: Any) -> dict[str, Any]:
    """Everything about the modules of a bridge, or of a model, that somebody could have changed."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = (bool, int, float, str, type(None))
    parts = {f"{i}.{n}": m for i, root in enumerate(of) for n, m in root.named_modules(remove_duplicate=False)}
    configs = {id(m.config): m.config for m in parts.values() if hasattr(m, "config") and hasattr(m.config, "to_dict")}
    return {
        "types": {n: (type(m), id(m)) for n, m in parts.items()},
        "plain": {n: {k: v for k, v in vars(m).items() if isinstance(v, plain)} for n, m in parts.items()},
        "hooks": {n: [list(getattr(m, k)) for k in kinds] for n, m in parts.items()},
        "points": {n: [len(m.fwd_hooks), len(m.bwd_hooks)] for n, m in parts.items() if hasattr(m, "fwd_hooks")},
        "kept": {n: id(vars(m)["_pattern"]) for n, m in parts.items() if "_pattern" in vars(m)},
        "config": {
            k: copy.deepcopy(c.to_dict()) | {"attention": getattr(c, "_attn_implementation", None)}
            for k, c in configs.items()
        },
        "weights": {
            n: (id(t), t.data_ptr(), t.requires_grad, t.grad is None, t.detach().clone().numpy().tobytes())
            for root in of
            for n, t in root.state_dict(keep_vars=True).items()
        },
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.fixture(params=["llama-grouped", "gpt2"])
def handed_over(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A bridge that somebody uses: partly in training mode, with a hook of its own, never run so far."""
    native = tiny_model(request.param).model
    found = build_bridge(copy.deepcopy(native.module), native.tokenizer, "theirs")
    for i, part in enumerate(found.original_model.modules()):
        part.training = i % 3 == 0
    found.fired = []
    found.embed.hook_out.add_hook(lambda x, hook: found.fired.append(1))
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_a_bridge_that_was_handed_over_is_left_as_found(handed_over: Any, fails: bool) -> None:
    before = _state((handed_over, handed_over.original_model))
    model = probekit.open_model(handed_over)
    assert isinstance(model, TransformerLensModel) and model.bridge is handed_over
    captures = (*EVERYTHING, *([Capture("resid_mid", Boom())] if fails else []))
    patches = (Patch("resid_pre.1", 0.5), Patch("pattern.1", KnockOut(queries=[-1])))
    fired = len(handed_over.fired)
    try:
        model.execute(Forward(captures, patches), BATCH)
    except ZeroDivisionError:
        assert fails
    assert _state((handed_over, handed_over.original_model)) == before
    assert len(handed_over.fired) > fired, "the owner's hook fires in our passes"
    fired = len(handed_over.fired)
    handed_over(torch.tensor([[3, 4, 5]]))
    assert len(handed_over.fired) == fired + 1, "and afterwards"


def test_the_native_model_is_left_as_found(tiny_llama: Tiny) -> None:
    """Building, running and even folding a bridge changes no module, configuration or weight of the native model."""
    native = tiny_llama.model
    before = _state((native.module,))
    expected = see(native, EVERYTHING, SMALL)
    made = native.to_transformer_lens()
    TransformerLensModel.from_bridge(made).load().execute(Forward(EVERYTHING), SMALL)
    assert made.original_model.config._attn_implementation == "eager" != native.module.config._attn_implementation
    assert made.W_E.data_ptr() == native.module.get_input_embeddings().weight.data_ptr(), "weights are shared"
    made.enable_compatibility_mode()
    assert _state((native.module,)) == before
    for found, known in zip(see(native, EVERYTHING, SMALL), expected, strict=True):
        assert_same(found, known)


# --- ways in ------------------------------------------------------------------------------------------------------


def test_ways_in(tiny_llama: Tiny) -> None:
    """By name (or pair) with backend=, and by a bridge; provenance says which library ran, the hash says which weights."""
    pair = (tiny_llama.module, words_tokenizer())
    lazy = probekit.open_model(pair, backend="transformer_lens", lazy=True)
    assert isinstance(lazy, TransformerLensModel) and lazy._bridge is None
    assert lazy.info.sites == tiny_llama.model.info.sites
    assert lazy.tokenize(["w3 w4"]) == tiny_llama.model.tokenize(["w3 w4"])
    told = lazy.provenance()
    assert told["backend"] == "transformer_lens" and told["versions"]["transformer-lens"]
    own = tiny_llama.model.provenance()
    assert told["weights_hash"] == own["weights_hash"] and told["tokenizer_hash"] == own["tokenizer_hash"]
    theirs = probekit.open_model(lazy.to_transformer_lens())
    assert theirs.provenance()["weights_hash"] == own["weights_hash"]
    assert theirs.decode([5]) == ("w5",)
    with pytest.raises(InputError, match="leave backend out"):
        probekit.open_model(lazy.to_transformer_lens(), backend="nnsight")
    with pytest.raises(CapabilityError, match="cannot serve Embed"):
        lazy.execute(Embed(("a",)), SMALL)
    with pytest.raises(InputError, match="Layer 9 of 'resid_post' is outside this model: it has 3 layers"):
        lazy.execute(Forward((Capture("resid_post.9", Norm()),)), SMALL)


def test_command_line(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    copy.deepcopy(tiny_llama.module).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    text = " ".join(f"w{3 + i * i % 101}" for i in range(90))
    given = ["run", "attention-sinks", "logit-lens", "--model", str(folder), "--text", text, "--out", str(out)]
    done = CliRunner().invoke(cli, [*given, "--backend", "transformer_lens"])
    assert done.exit_code == 0, done.output
    assert json.loads((out / "manifest.json").read_text())["backend"] == "transformer_lens"
    wrong = CliRunner().invoke(cli, [*given, "--backend", "transformer-lens"])
    assert wrong.exit_code == 2 and "Did you mean 'transformer_lens'" in wrong.output


def test_bridges_that_cannot_be_read_are_refused(tiny_llama: Tiny) -> None:
    folded = tiny_llama.model.to_transformer_lens()
    folded.enable_compatibility_mode()
    with pytest.raises(ModelError, match="compatibility mode"):
        probekit.open_model(folded)
    other = tiny_llama.model.to_transformer_lens()
    other.tokenizer = None
    with pytest.raises(ModelError, match="without tokenizer; expected a decoder"):
        probekit.open_model(other)


@pytest.mark.parametrize(("kind", "says"), [("helium", "HeliumForCausalLM"), ("gemma3-multimodal", "inside a larger")])
def test_models_without_a_bridge_are_refused_and_nothing_is_installed(
    kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens would install packages for images by itself when it meets a multimodal model."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "check_call", never)
    with pytest.raises(ModelError, match=says):
        _native(kind).to_transformer_lens()


def test_without_the_library_the_error_says_what_to_install(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge.sources", None)
    with pytest.raises(ModelError, match=r"pip install 'probekit\[compare\]'"):
        tiny_llama.model.to_transformer_lens()


# --- the checks can fail ------------------------------------------------------------------------------------------


def test_a_hook_point_that_shows_something_else_is_not_served(
    tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries before the rotation, the MLP's input as its output: the check at load drops both."""
    queries = ("blocks.{L}.attn.hook_q",)
    wrong = {"q": queries, "mlp_out": ("blocks.{L}.mlp.hook_in",), "z": queries}
    monkeypatch.setattr(hooks, "HOOKS", hooks.HOOKS | wrong)
    model = TransformerLensModel.from_model(tiny_llama.model).load()
    assert tiny_llama.model.info.sites - model.info.sites == {"q", "k", "mlp_out", "z", "v"}


def test_a_bridge_whose_lens_is_wrong_is_refused_at_load(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TransformerLensModel.from_model(tiny_llama.model).load()
    monkeypatch.setattr(bridge.BridgeUnembed, "norm", lambda self, rows: rows)
    with pytest.raises(SelfCheckError, match="the lens at the last layer"):
        self_check(model)
