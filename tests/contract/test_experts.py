"""The site `router` of mixtures of experts: routing probabilities against the modules' own logits, and who really ran.

The reference is a copy of the model that probekit never touches, run text by text without padding, with plain hooks.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import N_LAYERS, SIZES, assert_close, random_weights, see, texts_of, tiny_model, words_tokenizer
from scipy.special import softmax

from probekit.backends.transformers import TransformersModel
from probekit.core import Batch, CapabilityError, Capture, Forward, LogitDifference, Patch
from probekit.reduce import Keep, TopMagnitudes

N_EXPERTS, TOP_K = 6, 2
LENGTHS = (13, 1, 20)
ROUTER = {"gpt_oss": "mlp.router"}


def _config(name: str) -> Any:
    import transformers as t

    sizes: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "num_experts_per_tok": TOP_K}
    small = {"moe_intermediate_size": 24, "num_experts": N_EXPERTS}
    if name == "mixtral":
        return t.MixtralConfig(**sizes, num_local_experts=N_EXPERTS)
    if name.startswith("qwen3_moe"):
        form: dict[str, Any] = {"mlp_only_layers": [0]} if "dense" in name else {}
        return t.Qwen3MoeConfig(**sizes, **small, head_dim=8, norm_topk_prob="normed" in name, **form)
    if name == "qwen2_moe":
        return t.Qwen2MoeConfig(**sizes, **small, shared_expert_intermediate_size=24)
    if name == "olmoe":
        return t.OlmoeConfig(**sizes, num_experts=N_EXPERTS)
    return t.GptOssConfig(**sizes, head_dim=8, num_local_experts=N_EXPERTS, sliding_window=8)


NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe, normed", "olmoe", "gpt_oss"]


@dataclass(frozen=True)
class Mixture:
    """A tiny random mixture as probekit sees it, and a copy that it never touches."""

    model: TransformersModel
    plain: Any

    @property
    def kind(self) -> str:
        """The family."""
        return str(self.plain.config.model_type)

    def blocks(self) -> Any:
        """The copy's blocks."""
        return self.plain.model.layers

    def router(self, layer: int) -> Any:
        """The copy's router of a layer."""
        return self.blocks()[layer].get_submodule(ROUTER.get(self.kind, "mlp.gate"))


@functools.cache
def mixture(name: str) -> Mixture:
    """Built once; loading runs the self-check."""
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(_config(name))).eval()
    model = TransformersModel.from_loaded(module, words_tokenizer(), name=name).load()
    assert "router" in model.info.sites
    assert "mlp_act" not in model.info.sites
    return Mixture(model, copy.deepcopy(module))


@functools.cache
def _batch() -> Batch:
    return texts_of(LENGTHS)


@dataclass
class Ran:
    """What plain hooks saw in one layer, texts end to end."""

    read: np.ndarray  # what the router reads; axes token, d_model
    logits: np.ndarray  # axes token, expert
    experts: np.ndarray  # ids handed to the experts; axes token, rank
    weights: np.ndarray  # what their outputs are multiplied with; axes token, rank
    mlp_out: np.ndarray  # axes token, d_model


def _ran(one: Mixture, layer: int, plain: Any = None) -> Ran:
    model = plain or one.plain
    block = model.model.layers[layer]
    router = block.get_submodule(ROUTER.get(one.kind, "mlp.gate"))
    seen: dict[str, list[Any]] = {name: [] for name in Ran.__annotations__}

    def on_router(module: Any, args: Any, output: Any) -> None:
        seen["read"].append(args[0])
        seen["logits"].append(output[0])

    def on_experts(module: Any, args: Any) -> None:
        _, ids, weights = args
        seen["experts"].append(ids)
        seen["weights"].append(weights)

    def on_mlp(module: Any, args: Any, output: Any) -> None:
        seen["mlp_out"].append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [router.register_forward_hook(on_router), block.mlp.register_forward_hook(on_mlp)]
    handles.append(block.mlp.experts.register_forward_pre_hook(on_experts))
    try:
        with torch.no_grad():
            for text in _batch():
                model(torch.tensor([text.ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Ran(**{name: torch.cat(some).double().numpy() for name, some in seen.items()})


@pytest.mark.parametrize("name", NAMES)
def test_router_equals_the_softmax_of_the_modules_own_logits(name: str) -> None:
    """Probabilities of all experts in a batch with padding; the chosen ones are their top-k, the weights follow."""
    one = mixture(name)
    keep, top = see(one.model, [Capture("router", Keep()), Capture("router", TopMagnitudes(TOP_K))], _batch())
    assert keep["value"].dims == ("layer", "token", "expert")
    assert keep["value"].shape == (N_LAYERS, sum(LENGTHS), N_EXPERTS)
    for layer in range(N_LAYERS):
        ran, found = _ran(one, layer), keep["value"].values[layer]
        assert_close(found, softmax(ran.logits, axis=-1), atol=2e-6)
        assert_close(found.sum(-1), np.ones(len(found)), atol=1e-6)
        assert np.array_equal(np.sort(ran.experts, -1), np.sort(np.argsort(-found)[:, :TOP_K], -1))
        assert np.array_equal(np.sort(ran.experts, -1), np.sort(top["dim"].values[layer], -1))
        chosen = np.take_along_axis(found, ran.experts.astype(int), -1)
        divided = getattr(one.plain.config, "norm_topk_prob", True)
        assert_close(ran.weights, chosen / chosen.sum(-1, keepdims=True) if divided else chosen, atol=5e-6)
        assert found.max() - found.min() > 0.5, "routing must be far from uniform"
    assert len(np.unique(top["dim"].values)) > 2, "several experts must run"


@pytest.mark.parametrize("name", NAMES)
def test_router_equals_a_hand_made_product(name: str) -> None:
    """From what the router reads, its weight and its bias, in float64."""
    one = mixture(name)
    keep = see(one.model, [Capture("router.1", Keep())], _batch())[0]["value"].values[0]
    router = one.router(1)
    logits = _ran(one, 1).read @ router.weight.detach().double().numpy().T
    if one.kind == "gpt_oss":
        bias = router.bias.detach().double().numpy()
        assert np.abs(softmax(logits, -1) - keep).max() > 0.01, "the bias must matter"
        logits = logits + bias
    assert_close(keep, softmax(logits, axis=-1), atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_top_experts_are_those_that_ran(name: str) -> None:
    """Another expert's weights change the MLP's output at the tokens that have it in their top-k, and nowhere else."""
    one, layer = mixture(name), 1
    found = see(one.model, [Capture(f"router.{layer}", Keep())], _batch())[0]["value"].values[0]
    top = np.argsort(-found)[:, :TOP_K]
    before = _ran(one, layer).mlp_out
    for expert in range(N_EXPERTS):
        other = copy.deepcopy(one.plain)
        with torch.no_grad():
            other.model.layers[layer].mlp.experts.down_proj[expert] += 0.5
        changed = np.abs(_ran(one, layer, other).mlp_out - before).max(-1) > 1e-4
        assert np.array_equal(changed, (top == expert).any(-1)), expert


@pytest.mark.parametrize("name", NAMES)
def test_a_router_without_weights_is_uniform(name: str) -> None:
    """A null: equal logits are 1 / n each."""
    plain = copy.deepcopy(mixture(name).plain)
    router = plain.model.layers[1].get_submodule(ROUTER.get(plain.config.model_type, "mlp.gate"))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    model = TransformersModel.from_loaded(plain, words_tokenizer(), name=name)
    found = see(model, [Capture("router", Keep())], _batch())[0]["value"].values
    assert np.array_equal(found[1], np.full_like(found[1], np.float32(1 / N_EXPERTS)))
    assert np.ptp(found[0]) > 0.5


def test_batches_and_patches_upstream() -> None:
    """Texts one by one give what they give together; a change of the stream before it reaches the router."""
    one, captures = mixture("mixtral"), [Capture("router", Keep())]
    together, alone = see(one.model, captures, _batch()), see(one.model, captures, _batch(), [[2], [0], [1]])
    assert_close(alone[0]["value"], together[0]["value"], atol=1e-6)
    patched = one.model.execute(Forward(tuple(captures), (Patch("attn_out.1", 0.0),)), _batch())[0].arrays["value"]
    difference = np.abs(patched - together[0]["value"].values).max((1, 2))
    assert difference[0] == 0
    assert difference[1:].min() > 0.01


def test_layers_without_a_router_are_named() -> None:
    """Qwen3-MoE with a plain MLP in layer 0: its other layers are served, and asking for layer 0 says so."""
    model = mixture("qwen3_moe, dense").model
    assert see(model, [Capture("router.2", Keep())], _batch())[0].sizes["expert"] == N_EXPERTS
    for point in ("router", "router.0"):
        with pytest.raises(CapabilityError, match=r"Layer 0 .* has a plain MLP and no router; layers with one: 1, 2"):
            see(model, [Capture(point, Keep())], _batch())
    assert not any(m._forward_hooks for m in model.module.modules())


def test_router_is_read_only_and_only_where_there_are_experts() -> None:
    """Changing it, its gradient, and asking a model without experts are refused."""
    model = mixture("mixtral").model
    with pytest.raises(CapabilityError, match="'router' can be read but not changed"):
        model.execute(Forward((Capture("logits", Keep()),), (Patch("router.1", 0.0),)), _batch())
    ids = (5,) * len(LENGTHS)
    with pytest.raises(CapabilityError, match="gradient"):
        model.execute(Forward((Capture("router.1", Keep()),), gradient_of=LogitDifference(ids, ids)), _batch())
    with pytest.raises(CapabilityError, match="has no point 'router'"):
        see(tiny_model("llama").model, [Capture("router", Keep())], _batch())
