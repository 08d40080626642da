"""The real SmolLM2-135M-Instruct against a plain transformers reference, and what is known to be in it.

The reference is the same folder loaded by transformers alone, with eager attention, `output_attentions` and a hook on
every block; statistics are computed naively in float64 from its maps and logits. Both run in float32, along different
kernels, so their own rounding separates them. How close "equal" is, is stated with each comparison.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import assert_close, run, see
from reference import allowed, attention_stats, readout, received_within

from probekit.analysis import Results
from probekit.core import Batch, Capture
from probekit.models import open_model
from probekit.reduce import (
    AttentionStats,
    Keep,
    MedianMagnitude,
    NextToken,
    Norm,
    Readout,
    ReceivedWithin,
    TopMagnitudes,
)

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]
LIGHTHOUSE = (
    "The keeper of the lighthouse wrote down the weather every evening, whether or not anything had happened. On most "
    "days the wind came from the west and smelled of salt and cut grass. When it turned to the north, the gulls left "
    "the rocks and the boats stayed in the harbour. She had learned to read the water before she learned to read "
    "books, and she trusted the first kind of reading more. In the winter of her fortieth year the lamp failed three "
    "times in one week, and each time she carried a lantern up the stairs and stood beside the glass until morning."
)
ORCHARD = (
    " Her brother kept an orchard a day's walk inland. He grew apples, plums and a few stubborn pears, and he sold "
    "them at the market on Saturdays from the back of a cart that had once belonged to their father. Nobody could "
    "remember a summer in which he had not complained about the rain, and nobody could remember a summer in which the "
    "apples had not been good. He said that a tree forgives almost everything except impatience. When the two of them "
    "met, which was seldom, they talked about the price of lamp oil, the health of the horse, and whether the bridge "
    "would last another year. It always did."
)
SHORT = ("A cat sat on the warm wall and watched the street.", LIGHTHOUSE, "Rain fell. The roof held, this time.")
CAPTURES = (
    Capture("pattern", AttentionStats()),
    Capture("pattern", ReceivedWithin(64)),
    Capture("resid_post", Readout(10)),
    Capture("logits", NextToken(10)),
    Capture("resid_post", Norm()),
    Capture("resid_post", TopMagnitudes(5)),
    Capture("resid_post", MedianMagnitude()),
)


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """All processors, for products that are large enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(os.cpu_count() or 1, 8))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smol() -> Any:
    return open_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def found(smol: Any) -> Results:
    """All four phenomena on a text of more than 200 tokens, in one pass, with the model's state before and after."""
    before = (smol.weights_hash(fresh=True), _state(smol.module))
    batch = smol.tokenize([LIGHTHOUSE + ORCHARD])
    assert batch.n_tokens >= 200
    results = run("all", smol, batch)
    assert (smol.weights_hash(fresh=True), _state(smol.module)) == before, "the model is changed"
    return results


def _state(module: Any) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in module.modules()]
    return [module.config._attn_implementation, module.config.to_dict(), hooks]


@dataclass(frozen=True)
class Plain:
    """What transformers alone says of one text."""

    blocks: np.ndarray  # layer, token, d_model; float64
    maps: np.ndarray  # layer, head, query, key
    logits: np.ndarray  # token, vocab
    lens: np.ndarray  # layer, token, vocab


@pytest.fixture(scope="module")
def plain(smol: Any) -> Plain:
    from transformers import AutoModelForCausalLM

    folder = smol.module.config._name_or_path
    module: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    blocks: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: blocks.append((out[0] if isinstance(out, tuple) else out)[0]))
        for layer in module.model.layers
    ]
    with torch.no_grad():
        out = module(torch.tensor([smol.tokenize([LIGHTHOUSE]).texts[0].ids]), output_attentions=True, use_cache=False)
        lens = torch.stack([module.lm_head(module.model.norm(b)) for b in blocks])
    for handle in handles:
        handle.remove()
    assert module.config._attn_implementation == "eager" and len(blocks) == 30
    maps = torch.cat(out.attentions).numpy()
    return Plain(torch.stack(blocks).double().numpy(), maps, out.logits[0].numpy(), lens.numpy())


@pytest.fixture(scope="module")
def ours(smol: Any) -> tuple[Batch, list[xr.Dataset]]:
    batch = smol.tokenize([LIGHTHOUSE])
    assert 100 <= batch.n_tokens <= 140
    return batch, see(smol, CAPTURES, batch)
