"""Layer ablation: what a model still predicts when one block is deleted, or two neighbours change places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, fmt, param, register
from probekit.core import Batch, Capture, Forward, ModelInfo, Patch, Reference, SelfCheckError, Trace, Values
from probekit.reduce import Keep, LocalAttention, Readout, TopMagnitudes
from probekit.stats import Estimate, text_mean, token_mean, units

_SHOWN = 64  # tokens of the map
_ABLATED = ("case", "layer", "token")
_WINDOW = 5  # tokens before the query that count as local, as in the paper
_LENS, _LARGEST = Capture("resid_post", Readout(1)), Capture("resid_post", TopMagnitudes(1))
_LOCAL = Capture("pattern", LocalAttention(_WINDOW))
_MOST_IDENTITY = {"float32": 1e-4, "float64": 1e-6}  # nats of KL that doing nothing may cost by rounding


@dataclass(frozen=True)
class AblationParams(Params):
    """Parameters of layer-ablation."""

    swap: bool = param(True, help="Whether neighbouring blocks are also swapped")
    stride: int = param(1, low=1, high=50, unit="blocks", help="Ablate every n-th block; 1 for all")
    count_first: bool = param(False, help="Whether the first position of each text counts in means")


@register
class LayerAblation(Analysis):
    """Which blocks can be deleted, or swapped with their neighbour, and what does the model lose?

    Question:
        Does the model need each of its blocks, and each in its place? Where in depth does it need them most?

    Method:
        Delete a block: what its attention and its MLP add to the residual stream is set to zero, so that
        its output is its input. Swap: block l runs in the place of block l + 1 and the other way round,
        norms included; what the place hands to its block (mask, rotary angles) stays. One pass per
        ablation over all texts. Against the model as it is, per token: KL(original ‖ ablated) over the
        full vocabulary, whether the likeliest token is the same, change of the entropy, and change of
        the loss, -ln p of the token that really follows. Means leave out the first position of each
        text, unless asked for, as the paper drops the beginning-of-sequence position. "The middle" is
        the second and third quarter of the blocks. Signals of the paper's stages, which it gives
        without thresholds, are shown beside it: attention on the 5 tokens before the query
        (detokenisation), and entropy and KL from the final distribution of the logit lens: from where
        the KL is largest, predictions form (prediction ensembling, residual sharpening).

    Null:
        An ablation that multiplies a block's attention output by one: KL 0, up to rounding; a run
        where it is not is refused. Agreement is held against that of the original predictions at two
        different positions. Local attention is held against uniform causal attention.

    Known failure modes:
        Deleting a block also takes away what only feeds the norms: blocks that write massive activations
        look indispensable. Later blocks may make up for what is missing, so that a small loss does not
        mean that a block does nothing. The lens is unreliable in early layers. In models whose blocks
        alternate between attention windows, a swapped block sees the window of its new place.

    References:
        Lad et al. 2024, The Remarkable Robustness of LLMs: Stages of Inference?, arXiv 2406.19384.
        McGrath et al. 2023, The Hydra Effect, arXiv 2307.15771 (self-repair).
    """

    name = "layer-ablation"
    title = "Layer deletion and swap"
    intervenes = True
    Params = AblationParams
    measures = {
        "kl_nats": Measure(
            _ABLATED, "nats", "KL(original ‖ ablated); layer is the deleted block or the first of "
            "the two swapped; NaN where it was not ablated"
        ),
        "same_top": Measure(_ABLATED, "1", "1 if the likeliest next token stays the same; NaN where not ablated"),
        "entropy_change_nats": Measure(_ABLATED, "nats", "entropy, ablated minus original; NaN where not ablated"),
        "loss_change_nats": Measure(
            _ABLATED, "nats", "surprisal of the token that follows, ablated minus original; NaN at "
            "the end of a text and where not ablated"
        ),
        "identity_kl_nats": Measure(("token",), "nats", "KL(original ‖ a run with a patch that changes nothing)"),
        "top_id": Measure(("token",), "1", "id of the original's likeliest next token"),
        "vocab_str": Measure(("vocab",), "1", "what the ids in top_id show as"),
        "lens_entropy_nats": Measure(("layer", "token"), "nats", "entropy of the logit lens after the block"),
        "lens_kl_nats": Measure(("layer", "token"), "nats", "KL(final distribution ‖ the lens after the block)"),
        "local_share": Measure(("layer", "token"), "share", "attention on the 5 preceding tokens, mean over heads"),
        "largest": Measure(("layer", "token"), "activation", "largest magnitude in the stream after the block"),
    }  # fmt: skip

    def passes(self, params: AblationParams, info: ModelInfo, batch: Batch) -> int:
        """The original, the identity, and one per ablation."""
        return 2 + len(list(_ablations(params, info.n_layers)))

    def flow(self, params: AblationParams, info: ModelInfo) -> Flow:
        """The original, a run that changes nothing, then every ablation."""
        last = info.n_layers - 1
        rows, final = Capture(("resid_post", last), Keep()), Capture(("resid_post", last), Readout(1))
        original = yield Forward((rows, final, _LENS, _LARGEST, _LOCAL))
        batch = original.batch
        against = Reference(Values(original[rows]["value"].values[0]), batch.index, batch.lengths)
        nothing = yield Forward((final,), (Patch("attn_out.0", 1.0),), against=against, why="change nothing")
        identity = nothing[final]["kl_nats"].values[0]
        _check_identity(identity, info)
        cases = ["delete", "swap"] if params.swap and info.n_layers > 1 else ["delete"]
        shape = (len(cases), info.n_layers, batch.n_tokens)
        found = {n: np.full(shape, np.nan) for n in ("kl", "same", "entropy", "loss")}
        for case, layer, patches, order in _ablations(params, info.n_layers):
            trace = yield Forward((final,), patches, order=order, against=against, why=f"{case} blocks")
            for name, values in _changes(original, trace, final).items():
                found[name][cases.index(case), layer] = values
        return _dataset(original, found, identity, cases, final)

    def findings(self, result: Result) -> list[Finding]:
        """How much the middle keeps, which blocks matter, where the stages' signals lie."""
        kept = [self._middle(result, str(case)) for case in result["case"].values]
        out = _outlier(result)
        return [kept[0], self._worst(result), *([out] if out else []), *kept[1:], _local(result), _ensembling(result)]

    def _middle(self, result: Result, case: str) -> Finding:
        n_layers = result.dataset.sizes["layer"]
        same = result["same_top"].sel(case=case).values
        middle = _middle_of(same)
        kept = _mean(result, same[middle].mean(axis=0)).within(0, 1)
        what = "Deleting a block" if case == "delete" else "Swapping two neighbouring blocks"
        worst = min(middle, key=lambda i: _mean(result, same[i]).value)
        lowest = _mean(result, same[worst]).value
        return Finding(
            f"{what} in the middle of the model ({middle[0]} to {middle[-1]} of {n_layers}) keeps {kept.value:.0%} of "
            f"the predictions on average, {lowest:.0%} at worst (block {worst}).",
            kept.value, "share of tokens", _chance(result["top_id"].values),
            "original predictions at two different positions", kept.ci95, kept.n, kept.n_unit,
            {"case": case, "layers": middle, "worst": worst}, quantity=f"predictions kept after {what.lower()}",
        )  # fmt: skip

    def _worst(self, result: Result) -> Finding:
        kl = result["kl_nats"].sel(case="delete").values
        layers = _ablated(kl)
        means = {i: _mean(result, kl[i]).value for i in layers}
        worst = max(layers, key=lambda i: means[i])
        most = _mean(result, kl[worst])
        typical = float(np.median([means[i] for i in layers if i != worst])) if len(layers) > 1 else 0.0
        loss = _mean(result, result["loss_change_nats"].sel(case="delete").values[worst]).value
        return Finding(
            f"Deleting block {worst} does most: KL {fmt(most.value)} nats and {fmt(loss)} nats of loss per token; the "
            f"median of the other blocks is KL {fmt(typical)}.",
            most.value, "nats", typical, "median over the other blocks", most.ci95, most.n, most.n_unit,
            {"layer": worst, "loss_change_nats": loss}, quantity="KL of deleting the block that matters most",
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Curves of every measure over depth, the stages' signals, and where in the text it hurts."""
        found = result.findings
        kept, worst, chance = found[0].claim, found[1].claim, found[0].null
        return {
            "agreement": _curve(
                result, "same_top", kept, "share of tokens", "predictions kept",
                "Share of tokens whose likeliest next token stays the same", reference=(chance, "chance"),
                y_range=(0.0, 1.0),
            ),
            "kl": _curve(
                result, "kl_nats", worst, "nats", "KL(original ‖ ablated)",
                "Mean KL of the next-token distributions", log_y=True,
            ),
            "loss": _curve(
                result, "loss_change_nats", "What each ablation costs in loss", "nats per token", "change of loss",
                "Mean change of the surprisal of the token that follows", reference=(0.0, "original"),
            ),
            "entropy": _curve(
                result, "entropy_change_nats", "Whether an ablation leaves the model less sure", "nats",
                "change of entropy", "Mean change of the entropy", reference=(0.0, "original"),
            ),
            "local": plots.lines(
                {f"attention on the {_WINDOW} tokens before": _over_tokens(result, "local_share")},
                title=found[-2].claim,
                unit="share",
                quantity="attention",
                reference=(found[-2].null, "uniform attention"),
                caption=f"{result.about} Mean over heads and tokens; the query itself does not count.",
                alt="Share of attention on the five preceding tokens against layer.",
            ),
            "lens": plots.lines(
                {
                    "entropy of the lens": _over_tokens(result, "lens_entropy_nats"),
                    "KL(final ‖ lens)": _over_tokens(result, "lens_kl_nats"),
                },
                title=found[-1].claim,
                unit="nats",
                quantity="mean",
                caption=f"{result.about} The logit lens of the original model, mean over tokens.",
                alt="Entropy of the logit lens and its KL from the final distribution against layer.",
            ),
            "map": _map(result),
            "strip": _strip(result),
        }  # fmt: skip


Ablation = tuple[str, int, tuple[Patch, ...], tuple[int, ...] | None]


def _ablations(params: AblationParams, n_layers: int) -> Iterator[Ablation]:
    """Case, layer, patches and order of every ablation."""
    for layer in range(0, n_layers, params.stride):
        yield "delete", layer, (Patch(("attn_out", layer), 0.0), Patch(("mlp_out", layer), 0.0)), None
    for layer in range(0, n_layers - 1, params.stride) if params.swap else ():
        order = list(range(n_layers))
        order[layer], order[layer + 1] = layer + 1, layer
        yield "swap", layer, (), tuple(order)


def _changes(original: Trace, ablated: Trace, final: Capture) -> dict[str, np.ndarray]:
    before, after = (t[final].isel(layer=0) for t in (original, ablated))
    return {
        "kl": after["kl_nats"].values,
        "same": (after["top_id"].values == before["top_id"].values)[:, 0].astype(float),
        "entropy": after["entropy_nats"].values - before["entropy_nats"].values,
        "loss": before["logprob_nats"].values - after["logprob_nats"].values,
    }


def _check_identity(kl: np.ndarray, info: ModelInfo) -> None:
    most, allowed = float(kl.max()), _MOST_IDENTITY.get(info.dtype, 1e-2)
    if not most <= allowed:
        raise SelfCheckError(
            f"A patch that changes nothing moved the predictions of {info.name!r} by {most:.1e} nats; expected at most "
            f"{allowed:g}. Its passes do not repeat, so ablations cannot be compared with the original."
        )


def _dataset(
    original: Trace, found: dict[str, np.ndarray], identity: np.ndarray, cases: list[str], final: Capture
) -> xr.Dataset:
    lens = original[_LENS]
    return xr.Dataset(
        {
            "kl_nats": (_ABLATED, found["kl"]),
            "same_top": (_ABLATED, found["same"]),
            "entropy_change_nats": (_ABLATED, found["entropy"]),
            "loss_change_nats": (_ABLATED, found["loss"]),
            "identity_kl_nats": ("token", identity),
            "top_id": ("token", original[final]["top_id"].values[0, :, 0]),
            "vocab_str": original.vocab_table(),
            "lens_entropy_nats": lens["entropy_nats"],
            "lens_kl_nats": lens["kl_nats"],
            "local_share": original[_LOCAL]["local_share"].mean("head"),
            "largest": abs(original[_LARGEST]["value"].isel(rank=0, drop=True)),
        },
        coords={"case": np.asarray(cases, dtype=object)},
    )


def _mean(result: Result, values: np.ndarray) -> Estimate:
    """Mean over tokens; the first position of each text only where it was asked for."""
    text, pos = result["text"].values, result["pos"].values
    return token_mean(np.where(_counted(result), values, np.nan), text, pos)


def _counted(result: Result) -> np.ndarray:
    return (result["pos"].values > 0) | bool(result.params.as_dict()["count_first"])


def _over_tokens(result: Result, name: str, case: str | None = None) -> xr.DataArray:
    values = result[name] if case is None else result[name].sel(case=case, drop=True)
    rows = [_mean(result, row).value for row in values.values]
    return xr.DataArray(rows, dims="layer", coords={"layer": result["layer"].values}, name=name)


def _ablated(values: np.ndarray) -> list[int]:
    """Layers with numbers; axes layer, token."""
    return [int(i) for i in np.flatnonzero(np.isfinite(values).any(axis=1))]


def _middle_of(values: np.ndarray) -> list[int]:
    """Those in the second and third quarter of the depth; all if none of them was ablated."""
    n_layers, layers = len(values), _ablated(values)
    return [i for i in layers if n_layers // 4 <= i < max(3 * n_layers // 4, n_layers // 4 + 1)] or layers


def _chance(ids: np.ndarray) -> float:
    """How often the predictions at two different positions are the same."""
    _, counts = np.unique(ids, return_counts=True)
    n = len(ids)
    return float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else 0.0


def _outlier(result: Result) -> Finding | None:
    """The block whose deletion stands out from its neighbours in depth; None where there are too few."""
    kl = result["kl_nats"].sel(case="delete").values
    layers = _ablated(kl)
    means = [_mean(result, kl[i]).value for i in layers]
    beside = {k: float(np.mean(means[k - 2 : k] + means[k + 1 : k + 3])) for k in range(2, len(layers) - 2)}
    if not beside:
        return None
    k = max(beside, key=lambda k: means[k] / max(beside[k], 1e-30))
    text = result["text"].values
    largest = np.mean([result["largest"].values[:, text == t].max(axis=1) for t in np.unique(text)], axis=0)
    writer = int(np.argmax(np.diff(largest, prepend=0.0)))
    it = _mean(result, kl[layers[k]])
    also = "the block" if writer == layers[k] else f"not the block (that is {writer})"
    return Finding(
        f"Among the blocks away from both ends, block {layers[k]} stands out: deleting it costs KL {fmt(it.value)} nats, "
        f"its neighbours {fmt(beside[k])}. It is {also} after which the largest activation has grown most.",
        it.value, "nats", beside[k], "mean of two neighbours on each side", it.ci95, it.n, it.n_unit,
        {"layer": layers[k], "writer": writer}, quantity="KL of deleting the inner block that stands out",
    )  # fmt: skip


def _local(result: Result) -> Finding:
    share = _over_tokens(result, "local_share").values
    top = int(share.argmax())
    it, pos = _mean(result, result["local_share"].values[top]).within(0, 1), result["pos"].values
    uniform = _mean(result, np.minimum(pos, _WINDOW) / (pos + 1)).value
    depth = top / max(len(share) - 1, 1)
    return Finding(
        f"Heads look most at the {_WINDOW} tokens before them in block {top} ({depth:.0%} of the depth): {it.value:.0%} "
        f"of attention, {share[-1]:.0%} in the last block.",
        it.value, "share of attention", uniform, "uniform causal attention", it.ci95, it.n, it.n_unit,
        {"layer": top, "depth": depth}, quantity="attention to near tokens in the most local block",
    )  # fmt: skip


def _ensembling(result: Result) -> Finding:
    far = result["lens_kl_nats"].values
    n_layers = len(far)
    counted = _counted(result)
    unit, name = units(result["text"].values, result["pos"].values)
    peaks = [float(far[:, counted & (unit == u)].mean(axis=1).argmax()) for u in np.unique(unit[counted])]
    depth = text_mean(np.array(peaks) / max(n_layers - 1, 1), name).within(0, 1)
    pooled = int(far[:, counted].mean(axis=1).argmax())
    return Finding(
        f"The lens is farthest from the final distribution after block {pooled} of {n_layers} and approaches it from "
        f"there on; in a single text that is at {depth.value:.0%} of the depth on average.",
        depth.value, "share of depth", 0.5, "a peak at any depth alike", depth.ci95, depth.n, depth.n_unit,
        {"layer": pooled}, quantity="depth at which the lens is farthest off",
    )  # fmt: skip


_LABELS = {"delete": "block deleted", "swap": "swapped with the next block"}


def _curve(
    result: Result, name: str, title: str, unit: str, quantity: str, words: str, *, log_y: bool = False, **how: Any
) -> plots.Figure:
    curves = {_LABELS[case]: _over_tokens(result, name, case) for case in map(str, result["case"].values)}
    bands = {}
    for case in () if log_y else map(str, result["case"].values):
        means = [_mean(result, row) for row in result[name].sel(case=case).values]
        ends = np.array([m.ci95 or (np.nan, np.nan) for m in means])
        if any(m.ci95 for m in means):
            low, high = (curves[_LABELS[case]].copy(data=e) for e in ends.T)
            bands[_LABELS[case]] = (low, high)
    also = " Bands: 95 % intervals." if bands else ""
    also += "" if result.params.as_dict()["count_first"] else " The first position of each text is left out."
    return plots.lines(
        curves, title=title, unit=unit, quantity=quantity, log_y=log_y, bands=bands, **how,
        caption=f"{result.about} {words}, by the block that was deleted, or the first of two that were swapped.{also}",
        alt=f"{quantity} against layer, for deleted and for swapped blocks.",
    )  # fmt: skip


def _map(result: Result) -> plots.Figure:
    first = int(result["text"].values[0])
    one = result.dataset.isel(token=(result["text"].values == first) & (result["pos"].values < _SHOWN))
    return plots.heatmap(
        one["kl_nats"].sel(case="delete", drop=True),
        title="Which predictions need which block",
        unit="nats",
        quantity="KL(original ‖ block deleted)",
        scale="log",
        caption=f"{result.about} The first {one.sizes['token']} tokens of text {first}; the column belongs to the "
        "position that predicts.",
        alt="Heatmap over deleted block and token of the KL divergence, logarithmic.",
    )


def _strip(result: Result) -> plots.TokenStrip:
    data = result.dataset
    kl = data["kl_nats"].sel(case="delete").values
    layers, middle = _ablated(kl), _middle_of(kl)
    words = plots.words_by_id(data["vocab_str"])
    worst = np.asarray(layers)[np.argmax(kl[layers], axis=0)]
    return plots.TokenStrip(
        title="Where the prediction hangs on single blocks",
        tokens=tuple(map(str, data["token_str"].values)),
        texts=data["text"].values,
        quantities=(
            plots.Quantity("mean KL over deleted middle blocks", "nats", kl[middle].mean(axis=0), "log"),
            plots.Quantity("KL of the block that matters most", "nats", kl[layers].max(axis=0), "log"),
        ),
        caption=f"{result.about} The colour belongs to the position that predicts.",
        alt="The text, each token coloured by how far deleting blocks moves the prediction after it.",
        notes=tuple(
            f"next: {words[i]!r}; matters most: block {b}"
            for i, b in zip(data["top_id"].values.tolist(), worst.tolist(), strict=True)
        ),
    )
