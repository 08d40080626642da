"""Models, texts and comparisons that several tests use. Every comparison asserts."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr

from probekit.analysis import Finding, Results, get_analyses
from probekit.backends.scripted import Play, Script, ScriptedModel, random_play
from probekit.backends.transformers import TransformersModel
from probekit.core import Batch, Capture, Forward, Model, TokenText
from probekit.engine import Job, run_jobs
from probekit.reduce import (
    AttentionStats,
    Field,
    Keep,
    MedianMagnitude,
    NextToken,
    Norm,
    Partial,
    Readout,
    ReceivedWithin,
    Reducer,
    TopMagnitudes,
)

torch.set_num_threads(1)  # tiny products; threads only wait for each other

N_LAYERS, N_HEADS, D_MODEL, D_VOCAB = 3, 4, 32, 128
SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8
EVERYTHING = (
    Capture("pattern", AttentionStats()),
    Capture("pattern", ReceivedWithin(16)),
    Capture("resid_post", Readout(5)),
    Capture("logits", NextToken(5)),
    Capture("resid_post", Norm()),
    Capture("resid_post", TopMagnitudes(3)),
    Capture("resid_post", MedianMagnitude()),
    Capture("resid_mid", Keep()),
)


def tiny_config(kind: str) -> Any:
    """A configuration of one family: full, grouped and single key-value heads, windows, biases, learned positions."""
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    if kind == "gpt2":
        sizes = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": 256, "n_inner": 48}
        return GPT2Config(vocab_size=D_VOCAB, **sizes, bos_token_id=1, eos_token_id=2)
    if kind == "mistral":
        return MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=WINDOW)
    if kind == "qwen2":
        windows = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        return Qwen2Config(**SIZES, num_key_value_heads=2, **windows)
    n_kv = {"llama": N_HEADS, "llama-grouped": 2, "llama-single": 1}[kind]
    return LlamaConfig(**SIZES, num_key_value_heads=n_kv)


def windows_of(kind: str) -> list[int | None]:
    """The sliding window of each layer of `tiny_config(kind)`; None where a query sees all that precedes it."""
    return {"mistral": [WINDOW] * N_LAYERS, "qwen2": [None, WINDOW, WINDOW]}.get(kind, [None] * N_LAYERS)


def random_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that attention and predictions are far from uniform; norm gains differ from 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and "bias" not in name
            parameter.copy_(1 + 0.3 * noise if norm else 0.25 * noise)
    return module


def words_tokenizer(n: int = D_VOCAB) -> Any:
    """One token per word: `w3` … `w127`; a beginning-of-sequence token that is added only on request."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, n)}
    own = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@dataclass(frozen=True)
class Tiny:
    """A tiny random model: as probekit sees it, and the plain one that serves as reference."""

    kind: str
    model: TransformersModel
    reference: Any  # the same weights, eager attention, never touched by probekit

    @property
    def module(self) -> Any:
        """The transformers model inside `model`."""
        return self.model.module


@functools.cache
def tiny_model(kind: str) -> Tiny:
    """The tiny model of a family; built once, and asserted to have the sizes it claims."""
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(tiny_config(kind))).eval()
    reference = AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager").eval()
    reference.load_state_dict(module.state_dict())
    model = TransformersModel.from_loaded(module, words_tokenizer(), name=f"tiny-{kind}").load()
    found = (model.info.n_layers, model.info.n_heads, model.info.d_model, model.info.d_vocab)
    assert found == (N_LAYERS, N_HEADS, D_MODEL, D_VOCAB), found
    n_kv = {"llama": 4, "llama-single": 1, "gpt2": 4}.get(kind, 2)
    assert model.info.n_kv_heads == n_kv, model.info.n_kv_heads
    assert module.get_input_embeddings().weight.shape == (D_VOCAB, D_MODEL)
    assert (module.config._attn_implementation, reference.config._attn_implementation) == ("sdpa", "eager")
    return Tiny(kind, model, reference)


def copy_of(kind: str) -> Any:
    """A fresh module with the weights of the tiny model of a family."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    module.load_state_dict(tiny_model(kind).module.state_dict())
    return module


def scripted(sharpness: float = 1.0, play: Play | None = None, **sizes: Any) -> ScriptedModel:
    """A scripted null model whose attention is random; or one that plays `play`."""
    own = {k: v for k, v in sizes.items() if k in ("n_layers", "n_heads", "d_model")}
    return ScriptedModel(play or random_play(**own, sharpness=sharpness), **sizes)


def planted_sinks(where: dict[tuple[int, int], float], key: int = 0) -> Callable[[TokenText, Script], Script]:
    """Some (layer, head) pairs put a share on one key wherever they see it; the rest of their rows keeps its shape."""

    def plant(text: TokenText, script: Script) -> Script:
        for (layer, head), share in where.items():
            rows = script.pattern[layer, head, max(key, 1) :]
            rows[:, key] = 0
            rows *= (1 - share) / rows.sum(-1, keepdims=True)
            rows[:, key] = share
        return script

    return plant


def texts_of(lengths: Iterable[int], n_vocab: int = 64, seed: int = 0) -> Batch:
    """Random texts of these lengths; token ids from 3 on."""
    rng = np.random.default_rng(seed)
    done = []
    for n in lengths:
        ids = tuple(int(i) for i in rng.integers(3, n_vocab, n))
        done.append(TokenText(ids, tuple(f" w{i}" for i in ids)))
    return Batch(tuple(done))


def run(names: str | Sequence[str], model: Model, batch: Batch, **params: Any) -> Results:
    """Run analyses through the engine; parameters go to every analysis that has them."""
    jobs = []
    for analysis in get_analyses(names):
        mine = {k: v for k, v in params.items() if k in analysis.Params.specs()}
        jobs.append(Job(analysis, analysis.Params.parse(mine, analysis.name)))
    assert all(any(k in j.analysis.Params.specs() for j in jobs) for k in params), params
    return run_jobs(jobs, model, batch)


def see(
    model: Any, captures: Sequence[Capture], batch: Batch, groups: Sequence[Sequence[int]] = ()
) -> list[xr.Dataset]:
    """What a model shows of some points; the texts run in the given groups, all together if none are given."""
    groups = groups or [range(len(batch))]
    parts = [model.execute(Forward(tuple(captures)), batch.select(group)) for group in groups]
    return [Partial.merge([p[i] for p in parts]).finish(batch) for i in range(len(captures))]


def reducer_classes() -> set[type[Reducer]]:
    """Every reducer that a module of probekit.reduce defines."""
    package = importlib.import_module("probekit.reduce")
    found: set[type[Reducer]] = set()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"probekit.reduce.{info.name}")
        own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Reducer)]
        found |= {c for c in own if c.__module__ == module.__name__ and not getattr(c, "__abstractmethods__", None)}
    return found


@dataclass(frozen=True)
class Boom(Reducer):
    """Raises while the model runs."""

    reads: ClassVar[Any] = "rows"

    def fields(self) -> dict[str, Field]:
        return {"x": Field(("token",), "1", "never made")}

    def measure(self, piece: Any) -> dict[str, torch.Tensor]:
        raise ZeroDivisionError("boom")


def assert_close(found: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0, what: str = "") -> None:
    """Equal shapes, NaN at the same places, and |found - expected| <= atol + rtol * |expected|."""
    np.testing.assert_allclose(
        np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64), rtol, atol, True, what, strict=True
    )


def assert_same(found: xr.Dataset, expected: xr.Dataset, *, rtol: float = 0.0, what: str = "") -> None:
    """Equal variables, types, axes, coordinates, attributes and values.

    With `rtol`, entries of float arrays may differ by that share of the array's largest magnitude. Integers may
    not, but for the order of ids whose log-probabilities are that close.
    """
    assert set(found.variables) == set(expected.variables), what
    for name in map(str, expected.variables):
        a, b = found[name], expected[name]
        label = f"{what} {name}"
        assert (a.dims, a.dtype, a.attrs) == (b.dims, b.dtype, b.attrs), (label, a, b)
        if a.dtype.kind == "f":
            finite = np.abs(b.values[np.isfinite(b.values)])
            assert_close(a.values, b.values, atol=rtol * float(finite.max(initial=0.0)), what=label)
        else:
            assert a.shape == b.shape, label
            differs = a.values != b.values
            if rtol and name == "top_id":
                differs &= ~_nearly_tied(expected["top_logprob"].values, 10 * rtol)
            assert not differs.any(), label
    assert found.attrs == expected.attrs, what


def _nearly_tied(values: np.ndarray, within: float) -> np.ndarray:
    """Entries whose neighbour on the last axis, in descending order, is that close; the last one has an unseen one."""
    close = -np.diff(values, axis=-1) <= within * np.abs(values).max()
    end = np.full((*values.shape[:-1], 1), values.shape[-1] > 1)
    return np.concatenate([close, end], -1) | np.concatenate([np.zeros_like(end), close], -1)


_OF_A_KIND = {"sink-anatomy": "layer"}  # analyses that repeat findings on purpose: for each phase, here


def assert_quantities(findings: Iterable[Finding]) -> None:
    """Each finding says in a few fixed words what it measures, and no two of a result measure the same."""
    seen = set()
    for f in findings:
        assert f.quantity and len(f.quantity) <= 70 and not f.quantity.endswith("."), f
        assert not re.search(r"\d", f.quantity.replace("position 0", "")), f"a number of the data: {f.quantity}"
        key = (f.quantity, f.unit, f.where.get("case"), f.where.get(_OF_A_KIND.get(f.analysis, ""), ""))
        assert key not in seen, f"two findings of {f.analysis} are told apart by nothing: {key}"
        seen.add(key)
