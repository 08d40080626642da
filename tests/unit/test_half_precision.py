"""Statistics of models in bfloat16 and float16: summed in float32 from numbers that are rounded."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner
from helpers import (
    WINDOW,
    assert_close,
    copy_of,
    reducer_classes,
    see,
    texts_of,
    tiny_model,
    windows_of,
    words_tokenizer,
)
from reference import allowed, attention_maps, attention_stats, cosine, readout, received_within

from probekit.backends.transformers import TransformersModel
from probekit.cli import cli
from probekit.core import (
    Batch,
    Capture,
    SelfCheckError,
)
from probekit.models import open_model
from probekit.reduce import (
    AtPosition,
    AttentionStats,
    BlockNorms,
    CosineTo,
    Keep,
    LocalAttention,
    LogitDirection,
    Maps,
    MedianMagnitude,
    MlpAlignment,
    NextToken,
    Norm,
    Nucleus,
    OutputNorm,
    Readout,
    ReceivedWithin,
    Reducer,
    SinkLogitGap,
    Tempered,
    TopMagnitudes,
)

HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # largest relative rounding of one number
KINDS = ("llama-grouped", "gpt2", "mistral")
HORIZON, LAST = 16, 2
REDUCERS = (Keep(), Norm(), TopMagnitudes(3), MedianMagnitude(), AtPosition(-2))
ATTENTION = (AttentionStats(), ReceivedWithin(HORIZON), LocalAttention(5))
CAPTURES = (
    *(Capture("resid_post", r) for r in REDUCERS),
    *(Capture("pattern", r) for r in ATTENTION),
    Capture("resid_post", Readout(5)),
    Capture("logits", NextToken(5)),
    Capture("logits", Nucleus(0.8)),
    Capture("logits", Tempered(0.7, 5)),
    Capture("logits", Keep()),
    *(Capture(site, Keep()) for site in ("q", "k", "v", "resid_pre", "resid_mid", "attn_out", "mlp_out")),
    *(Capture("resid_post", r) for r in (BlockNorms(), MlpAlignment(0), CosineTo(0))),
    Capture("v", OutputNorm()),
    Capture("pattern", SinkLogitGap()),
    *(Capture(site, LogitDirection("target")) for site in ("resid_pre", "attn_out", "mlp_out", "logits")),
)


@functools.cache
def seen_in(kind: str, dtype: str, rounded_to: str) -> dict[str, xr.Dataset]:
    """What a model shows with weights rounded to one type and everything computed in another."""
    module = copy_of(kind).to(getattr(torch, rounded_to)).to(getattr(torch, dtype))
    model = TransformersModel.from_loaded(module, words_tokenizer()).load()
    assert model.info.dtype == dtype
    return {c.key: d for c, d in zip(CAPTURES, see(model, CAPTURES, batch()), strict=True)}


def batch() -> Batch:
    return texts_of([37, 20], n_vocab=128)


def texts(data: xr.DataArray) -> list[np.ndarray]:
    """Values of each text, the token axis first, float64."""
    moved = data.transpose("token", ...)
    return [moved.values[data["text"].values == i].astype(np.float64) for i in range(len(batch()))]


every_half = pytest.mark.parametrize("dtype", HALF)
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_reducer_is_covered() -> None:
    """Maps are the probabilities that the other attention reducers are computed from; one text at a time."""
    assert {type(c.reducer) for c in CAPTURES} == reducer_classes() - {Maps}


@every_half
@every_kind
def test_rows_are_reduced_in_float32(kind: str, dtype: str) -> None:
    """From the very activations that the half-precision model had: exact choices, sums to float32's precision."""
    seen = seen_in(kind, dtype, dtype)
    rows = seen[Capture("resid_post", Keep()).key]["value"]
    half = torch.as_tensor(rows.values)
    assert torch.equal(half, half.to(getattr(torch, dtype)).float()), "these are no half-precision numbers"
    exact = rows.values.astype(np.float64)
    assert_close(seen[CAPTURES[1].key]["norm"], np.linalg.norm(exact, axis=-1), rtol=1e-6)
    top = -np.sort(-np.abs(exact), axis=-1)[..., :3]
    assert_close(np.abs(seen[CAPTURES[2].key]["value"]), top)
    for i, text in enumerate(texts(rows)):
        assert_close(seen[CAPTURES[3].key]["median"].sel(text=i), np.median(np.abs(text), axis=(0, 2)), rtol=1e-6)
        assert_close(seen[CAPTURES[4].key]["value"].sel(text=i), text[-2])


@every_half
@every_kind
def test_attention_is_reduced_in_float32(kind: str, dtype: str) -> None:
    """From the very queries and keys of the half-precision model.

    Log-sums are the flash kernel's, off by up to 1e-4; large scores multiply that in entropies.
    """
    seen = seen_in(kind, dtype, dtype)
    q, k = (texts(seen[Capture(site, Keep()).key]["value"]) for site in ("q", "k"))
    found = {type(r): seen[Capture("pattern", r).key] for r in ATTENTION}
    for i, n in enumerate(batch().lengths):
        here = {r: d.isel(token=np.flatnonzero(d["text"].values == i)) for r, d in found.items()}
        for layer, window in enumerate(windows_of(kind)):
            see_pairs = allowed(n, window)
            heads = [x[i][:, layer].transpose(1, 0, 2) for x in (q, k)]
            maps = attention_maps(heads[0], heads[1], see_pairs, heads[0].shape[-1] ** -0.5)
            own = here[AttentionStats].sel(layer=layer)
            for name, expected in attention_stats(maps, see_pairs).items():
                assert_close(
                    own[name].values, expected, atol=1e-3 if name == "entropy_nats" else 2e-4, what=f"{name} of {layer}"
                )
            within = here[ReceivedWithin].sel(layer=layer)
            expected = received_within(maps, see_pairs, HORIZON)["received"]
            assert_close(within["received"].values, expected, atol=2e-4)
            near = np.tril(maps, -1).sum(-1) - np.tril(maps, -6).sum(-1)
            assert_close(here[LocalAttention].sel(layer=layer)["local_share"].values, near, atol=2e-4)
    assert min(batch().lengths) > WINDOW, "no text is long enough for the window to matter"


@every_half
@every_kind
def test_relations_are_reduced_in_float32(kind: str, dtype: str) -> None:
    """Whole blocks from the stream that the half-precision model had; gaps from its scores; W_O read off in its type."""
    seen = seen_in(kind, dtype, dtype)

    def kept(site: str) -> list[np.ndarray]:
        return texts(seen[Capture(site, Keep()).key]["value"])  # token, layer, …

    def found(site: str, reducer: Reducer, name: str) -> list[np.ndarray]:
        return texts(seen[Capture(site, reducer).key][name])

    for i, n in enumerate(batch().lengths):
        before, middle, after = (kept(s)[i] for s in ("resid_pre", "resid_mid", "resid_post"))
        mlp = after - middle
        assert_close(found("resid_post", BlockNorms(), "mlp_norm")[i], np.linalg.norm(mlp, axis=-1), rtol=1e-5)
        attention = np.linalg.norm(middle - before, axis=-1)
        assert_close(found("resid_post", BlockNorms(), "attn_norm")[i], attention, rtol=1e-4)
        assert_close(found("resid_post", CosineTo(0), "cosine")[i], cosine(after, after[:1]), atol=1e-5)
        assert_close(found("resid_post", MlpAlignment(0), "mlp_to_mlp")[i], cosine(mlp, mlp[:1]), atol=1e-4)
        q, k, v = (kept(s)[i] for s in ("q", "k", "v"))  # token, layer, head, d_head
        group = q.shape[2] // k.shape[2]
        scores = np.einsum("qlhd,klhd->lhqk", q, np.repeat(k, group, axis=2)) * q.shape[-1] ** -0.5
        gap = found("pattern", SinkLogitGap(), "gap_nats")[i]
        for layer, window in enumerate(windows_of(kind)):
            sees = allowed(n, window)
            for at in (3, n - 1):
                between = [j for j in range(1, at) if sees[at, j]]
                expected = scores[layer, :, at, 0] - scores[layer, :, at][:, between].mean(axis=1)
                assert_close(gap[at, layer], expected if sees[at, 0] else np.full_like(expected, np.nan), atol=1e-4)
        ratio = found("v", OutputNorm(), "output_norm")[i] / np.linalg.norm(np.repeat(v, group, axis=2), axis=-1)
        assert np.isfinite(ratio).all() and ratio.min() > 0.1 and ratio.max() < 10, "of the size of W_O"


@every_half
@every_kind
def test_the_lens_is_reduced_in_float32(kind: str, dtype: str) -> None:
    """From the model's own half-precision logits, which are what it returns; norm and product are its own."""
    seen = seen_in(kind, dtype, dtype)
    module = copy_of(kind).to(getattr(torch, dtype))
    norm = module.get_submodule(tiny_model(kind).model.architecture.final_norm)
    rows = torch.as_tensor(seen[Capture("resid_post", Keep()).key]["value"].values).to(getattr(torch, dtype))
    with torch.no_grad():
        logits = module.get_output_embeddings()(norm(rows)).double().numpy()
    step = HALF[dtype] * np.abs(logits).max()  # products of other shapes may round a logit to a neighbour
    assert_close(seen[Capture("logits", Keep()).key]["value"].values, logits[LAST], atol=2 * step)
    lens = seen[Capture("resid_post", Readout(5)).key]
    for layer in range(LAST + 1):
        expected = readout(logits[layer], batch().next_ids, 5, final=logits[LAST])
        for name in ("entropy_nats", "logprob_nats", "kl_nats", "top_logprob"):
            assert_close(lens[name].sel(layer=layer).values, expected[name], atol=step, what=f"{name} of {layer}")
    given = seen[Capture("logits", Keep()).key]["value"].values
    own, exact = seen[Capture("logits", NextToken(5)).key], readout(given, batch().next_ids, 5)
    for name in ("entropy_nats", "varentropy_nats2", "logprob_nats", "target_rank", "top_logprob"):
        assert_close(own[name].values, exact[name], rtol=2e-5, atol=2e-5, what=name)


@every_half
@every_kind
def test_direct_attribution_adds_up(kind: str, dtype: str) -> None:
    """What the sub-layers and the biases add is the difference of the two logits, to half precision."""
    seen = seen_in(kind, dtype, dtype)
    parts = {site: seen[Capture(site, LogitDirection("target")).key]["projection"] for site in ("attn_out", "mlp_out")}
    start = seen[Capture("resid_pre", LogitDirection("target")).key]["projection"].sel(layer=0)
    biases = seen[Capture("logits", LogitDirection("target")).key]["projection"]
    total = start + sum(p.sum("layer") for p in parts.values()) + biases
    logits = seen[Capture("logits", Keep()).key]["value"].values.astype(np.float64)
    top, follows = np.argsort(-logits, -1), batch().next_ids
    rows, known = np.arange(len(logits)), follows >= 0
    other = np.where(top[:, 0] == follows, top[:, 1], top[:, 0])
    expected = np.where(known, logits[rows, follows] - logits[rows, other], np.nan)
    assert_close(total.values, expected, atol=4 * HALF[dtype] * np.abs(logits).max())


@every_kind
def test_half_precision_comes_close_to_float32_with_the_same_rounded_weights(kind: str) -> None:
    """What remains is the rounding of activations on the way; it shrinks with the type's precision."""
    off: dict[str, dict[str, float]] = {}
    for dtype, unit in HALF.items():
        found, exact = seen_in(kind, dtype, dtype), seen_in(kind, "float32", dtype)
        off[dtype] = {}
        for capture in CAPTURES:
            for name, values in exact[capture.key].data_vars.items():
                if name in ("top_id", "dim", "target_rank", "value") and capture.point.site != "resid_post":
                    continue
                if name in ("top_id", "dim", "target_rank", "seen") or isinstance(capture.reducer, LogitDirection):
                    continue  # choices among near ties; a random pair of ids may differ with the likeliest one
                if name in ("n_kept", "forced"):
                    continue  # counts up to a sum that tokens of nearly equal probability reach together
                if isinstance(capture.reducer, TopMagnitudes):
                    values, other = np.abs(values), np.abs(found[capture.key][name])
                else:
                    other = found[capture.key][name]
                size = float(np.nanmax(np.abs(values)))
                gap = np.abs(other.values.astype(np.float64) - values.values)
                off[dtype][f"{capture.key} {name}"] = float(np.nanmax(gap)) / size / unit
        worst = max(off[dtype], key=lambda key: off[dtype][key])
        assert off[dtype][worst] < 30, (worst, off[dtype][worst])
    # The same multiple of an eightfold finer unit: where both err, float16 errs less.
    ratios = [off["float16"][k] / off["bfloat16"][k] for k in off["bfloat16"] if off["bfloat16"][k] > 0]
    assert np.median(ratios) < 3, np.median(ratios)


@every_half
def test_the_self_check_of_half_precision_still_notices(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TransformersModel.from_loaded(copy_of("llama").to(getattr(torch, dtype)), words_tokenizer())
    logits = TransformersModel.own_logits
    monkeypatch.setattr(TransformersModel, "own_logits", lambda self, batch: 1.1 * logits(self, batch))
    with pytest.raises(SelfCheckError, match="the lens at the last layer"):
        model.load()


def test_dtype_is_an_option_and_is_shown(tiny_folder: Path, tmp_path: Path) -> None:
    for dtype in HALF:
        assert open_model(tiny_folder, dtype=dtype).info.dtype == dtype
    words = ["run", "token-uncertainty", "--model", str(tiny_folder), "--text", "w3 w4 w5 w6", "--dtype", "bfloat16"]
    result = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["model"]["dtype"] == "bfloat16"
    assert "begins    no token for it: '<s>' (id 1) exists, and was not added" in result.output
