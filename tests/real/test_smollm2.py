"""The real SmolLM2-135M-Instruct against a plain transformers reference, and what is known to be in it.

The reference is the same folder loaded by transformers alone, with eager attention, `output_attentions` and a hook on
every block; statistics are computed naively in float64 from its maps and logits. Both run in float32, along different
kernels, so their own rounding separates them. How close "equal" is, is stated with each comparison.
"""

from __future__ import annotations

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

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]
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


def test_attention_statistics_equal_the_reference(ours: tuple[Batch, list[xr.Dataset]], plain: Plain) -> None:
    """Shares entry by entry to 1e-4 relative (found: 1e-6); entropies to 1e-4 relative and 1e-5 nats.

    A row that looks at one key only has entropy near 0, a difference of numbers as large as its scores.
    """
    batch, (stats, within, *_) = ours
    seen = allowed(batch.n_tokens)
    for layer, maps in enumerate(plain.maps):
        for field, expected in attention_stats(maps, seen).items():
            atol = 1e-5 if field == "entropy_nats" else 0.0
            assert_close(stats[field].values[layer], expected, rtol=1e-4, atol=atol, what=f"{field} {layer}")
        for field, expected in received_within(maps, seen, 64).items():
            assert_close(within[field].values[layer], expected, rtol=1e-4, what=f"{field} within {layer}")


def test_readouts_equal_the_reference(ours: tuple[Batch, list[xr.Dataset]], plain: Plain) -> None:
    """Ranks exactly; varentropy to 1e-4 relative; nats to 1e-4 relative and 2e-5 nats.

    Where the model is nearly certain, entropy and surprisal are near 0, and differences of logits near 30, whose
    rounding is 2e-6 each: no float32 computation knows such values to 1e-4 of themselves.
    """
    batch, (_, _, lens, own, *_) = ours
    for layer in (0, 5, 11, 12, 20, 25, 28, 29):  # float64 over 49,152 tokens takes half a second a layer
        naive = readout(plain.lens[layer], batch.next_ids, 10, plain.logits)
        _compare(lens.isel(layer=layer), naive, f"layer {layer}")
    _compare(own, readout(plain.logits, batch.next_ids, 10), "the model")


def _compare(found: xr.Dataset, naive: dict[str, np.ndarray], what: str) -> None:
    compared = 0
    for field, expected in naive.items():
        if field in found:
            rtol = 0.0 if field == "target_rank" else 1e-4
            atol = 2e-5 if field.endswith(("_nats", "_logprob")) else 0.0
            assert_close(found[field].values, expected, rtol=rtol, atol=atol, what=f"{field} of {what}")
            compared += 1
    assert compared == 5, compared


def test_lens_at_the_last_layer_is_the_model(ours: tuple[Batch, list[xr.Dataset]], plain: Plain) -> None:
    """The hooked last block through norm and unembedding gives the reference's logits: it is not normed twice."""
    assert_close(plain.lens[-1], plain.logits, rtol=1e-4, atol=1e-4)
    lens, own = ours[1][2:4]
    for field in ("entropy_nats", "logprob_nats", "top_id"):
        assert np.array_equal(lens[field].values[-1], own[field].values, equal_nan=True)


def test_residual_statistics_equal_the_reference(smol: Any, ours: tuple[Batch, list[xr.Dataset]], plain: Plain) -> None:
    """Norms, largest entries and medians to 1e-4 relative; the stream itself to 1e-4 of each block's median."""
    batch, (*_, norm, top, median) = ours
    assert_close(norm["norm"], np.linalg.norm(plain.blocks, axis=-1), rtol=1e-4)
    assert_close(np.abs(top["value"]), -np.sort(-np.abs(plain.blocks), axis=-1)[..., :5], rtol=1e-4)
    signed = np.take_along_axis(plain.blocks, top["dim"].values.astype(int), -1)
    assert_close(top["value"], signed, rtol=1e-4)
    assert_close(median["median"].values[:, 0], np.median(np.abs(plain.blocks), axis=(1, 2)), rtol=1e-4)
    rows = see(smol, [Capture("resid_post.20", Keep())], batch)[0]["value"].values[0]
    assert_close(rows, plain.blocks[20], rtol=1e-4, atol=1e-4 * float(np.median(np.abs(plain.blocks[20]))))


def test_texts_batched_together_are_what_each_is_alone(smol: Any) -> None:
    """Three texts of different lengths, padded together and one by one: 1e-5 relative, and 1e-5 in absolute terms.

    The absolute part is for shares and nats near 0; ids and ranks are equal but where logits tie to that precision.
    """
    batch = smol.tokenize(SHORT)
    assert len(set(batch.lengths)) == 3
    together = see(smol, CAPTURES, batch)
    alone = see(smol, CAPTURES, batch, [[0], [1], [2]])
    for capture, a, b in zip(CAPTURES, together, alone, strict=True):
        for name, array in b.data_vars.items():
            what = f"{name} of {capture.key}"
            if name in ("top_id", "dim", "target_rank"):
                same = np.isclose(a[name].values, array.values, rtol=0, atol=0, equal_nan=True)
                assert same.mean() > 0.999, what
            else:
                scale = 1e-5 * max(1.0, float(np.nanmedian(np.abs(array.values))))
                assert_close(a[name].values, array.values, rtol=1e-5, atol=scale, what=what)


def test_massive_activation_is_where_it_is_known_to_be(found: Results) -> None:
    """Near 22,000 in dimension 507 at position 0, written by block 11, taken down by the last two blocks."""
    largest, written, erased, _, layers = found["massive-activations"].findings
    assert (largest.where["dim"], largest.where["pos"]) == (507, 0)
    assert 18_000 < largest.where["magnitude"] < 28_000
    assert written.where == {"layer": 11, "part": "MLP"} and erased.where == {"layers": [28, 29]}
    assert layers.where["strict"] == list(range(11, 28))
    assert largest.value > 1_000 > 10 * largest.null


def test_sinks_come_in_two_phases_over_depth(found: Results) -> None:
    """A phase before the massive activation is written, and one from there to the end; most pairs have a sink."""
    rate, share, phases, *_ = found["attention-sinks"].findings
    (first, second) = phases.where["phases"]
    assert 1 <= first[0] <= 4 and 7 <= first[1] <= 10 and 11 <= second[0] <= 13 and second[1] == 29
    assert 50 < rate.value < 90 and share.value > 3 * share.null


def test_lens_is_informative_only_in_the_last_quarter(found: Results) -> None:
    informative, settled, _ = found["logit-lens"].findings
    assert 22 <= informative.where["layer"] < 30
    assert settled.value > 20
    known = found["logit-lens"]["logprob_nats"].mean("token").values
    assert (known[:22] < -np.log(49_152)).all() and known[-1] > -5


def test_uncertainty_is_that_of_a_language_model(found: Results) -> None:
    """Entropy and surprisal of plain English are a few nats, far from uniform; findings carry their evidence."""
    _, mean, held = found["token-uncertainty"].findings
    assert 2 < mean.value < 4 and mean.null == pytest.approx(np.log(49_152))
    assert held.null < held.value < 0.6
    for finding in found.findings:
        assert np.isfinite(finding.value) and (finding.ci95 is None) == (finding.n == 1)


def test_everything_ran_in_one_pass(found: Results) -> None:
    plans = [r.provenance["plan"] for r in found.values()]
    assert all(len(p) == 1 and p == plans[0] for p in plans)
    assert found["logit-lens"].provenance["attention"].startswith("sdpa")
