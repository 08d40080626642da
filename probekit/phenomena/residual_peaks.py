"""Residual peaks: tokens whose residual stream is many times longer than that of all others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, fmt, param, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.methods.extremes import in_words
from probekit.reduce import AttentionStats, BlockNorms, Norm
from probekit.stats import held_out_best, text_mean

_NORM, _START = Capture("resid_post", Norm()), Capture(("resid_pre", 0), Norm())
_PARTS, _ATTENTION = Capture("resid_post", BlockNorms()), Capture("pattern", AttentionStats())
_DELIMITERS = frozenset(".,;:!?()[]{}\"'`-")


@dataclass(frozen=True)
class PeakParams(Params):
    """Parameters of residual-peaks."""

    least: float = param(5.0, low=1.0, unit="× others", help="Multiple of the other tokens' mean norm that is a peak")
    epsilon: float = param(0.3, low=0.01, high=0.99, unit="share", help="Mean attention above which a key is a sink")
    tail: int = param(8, low=0, high=64, unit="tokens", help="Last positions left out of the search for sinks")


@register
class ResidualPeaks(Analysis):
    """At which tokens is the residual stream many times longer than elsewhere, and which sub-layers make it so?

    Question:
        Does position 0, or another token, carry a residual stream far longer than that of the other tokens; after
        which block and by which sub-layer is it written, where is it taken down, and do heads have their sinks there?

    Method:
        Euclidean norms of the raw residual stream before the first block and after every block, before any final
        norm. A token's ratio after a block is its norm over the mean norm of the text's tokens after position 0,
        itself left out. The peak of a text is the token and block with the largest ratio. Its token is followed
        through depth: its writer is the block, up to the peak, after which its norm has grown most. There, the norm
        of what the MLP adds over the sum of the norms of what MLP and attention add says which of the two writes.
        A block takes the peak down if the mean norm falls there by at least a tenth of its largest value, by the
        sub-layer whose addition to the token is longer on average. A ratio of `least` or more counts as a peak; the
        paper gives no number. Attention of block l + 1 reads the stream after block l, so peaks after a block are set
        beside the sinks of the next (received attention above epsilon, the last `tail` positions left out). Texts
        count the same.

    Null:
        Position 0 against a random other position: a ratio of 1. The block at which it is read is chosen by the
        other texts, so choosing does not flatter it. The largest ratio of all: independent Gaussian streams of
        the same width, depth and lengths. The sub-layer: the same block at the text's other tokens.

    Known failure modes:
        Other tokens with a peak raise the mean of the others and lower every ratio. A peak in the stream is not a
        function of it. Norms add up only where sub-layers write in the same direction: the share says which wrote
        more, not how much of the peak it made. Before the first block, norms are those of embeddings, learned positions
        included. Peaks of models with norms after their sub-layers are bounded by those norms.

    References:
        Guo et al. 2024, Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs,
        arXiv 2410.13835, section 2.
        Gu et al. 2025, When Attention Sink Emerges in Language Models, arXiv 2410.10781, section 3.
    """

    name = "residual-peaks"
    title = "Residual peaks"
    Params = PeakParams
    measures = {
        "norm": Measure(("layer", "token"), "activation", "Euclidean norm of the residual stream after the block"),
        "start_norm": Measure(("token",), "activation", "the same before the first block"),
        "ratio": Measure(("layer", "token"), "× others", "norm over the mean of the text's others after position 0"),
        "attn_norm": Measure(("layer", "token"), "activation", "norm of what attention adds to the stream"),
        "mlp_norm": Measure(("layer", "token"), "activation", "norm of what the MLP adds to the stream"),
        "sink_share": Measure(("layer", "token"), "share", "share of heads for which the key is a sink; 0 in the tail"),
        "peak_pos": Measure(("text",), "1", "position of the largest ratio"),
        "peak_layer": Measure(("text",), "layer", "block after which it is largest"),
        "peak_ratio": Measure(("text",), "× others", "the largest ratio of the text"),
        "peak_path": Measure(("layer", "text"), "activation", "norm of that token through depth"),
        "writer": Measure(("text",), "layer", "block, up to the peak, after which that norm has grown most"),
        "mlp_share": Measure(
            ("text",), "share", "norm of what the MLP adds there over that of MLP and attention together"
        ),
        "mlp_share_others": Measure(("text",), "share", "mean of the same over the text's other tokens"),
    }

    def min_tokens(self, params: PeakParams) -> int:
        """Every token needs others after position 0."""
        return max(3, params.tail + 2)

    def observe(self, params: PeakParams, info: ModelInfo) -> Forward:
        """Norms of the stream, of what is added to it, and received attention."""
        return Forward((_NORM, _START, _PARTS, _ATTENTION))

    def compute(self, trace: Trace, params: PeakParams) -> xr.Dataset:
        """Ratios, each text's peak, and its writer."""
        norm, start = trace[_NORM]["norm"], trace[_START]["norm"]
        attn, mlp = trace[_PARTS]["attn_norm"], trace[_PARTS]["mlp_norm"]
        before = start.values.reshape(-1)  # one layer
        spans = [slice(s, s + n) for s, n in zip(trace.batch.starts, trace.batch.lengths, strict=True)]
        ratio = np.concatenate([_ratios(norm.values[:, s]) for s in spans], axis=1)
        lengths = np.repeat(trace.batch.lengths, trace.batch.lengths)
        searched = trace.batch.pos < lengths - params.tail
        sinks = (trace[_ATTENTION]["received"].values > params.epsilon).mean(axis=1) * searched
        share = mlp.values / np.maximum(mlp.values + attn.values, 1e-30)
        peaks = [_peak(norm.values[:, s], before[s], ratio[:, s], share[:, s]) for s in spans]
        columns = {name: ("text", [p[name] for p in peaks]) for name in peaks[0] if name != "peak_path"}
        return xr.Dataset(
            {
                "norm": norm,
                "start_norm": ("token", before),
                "ratio": (("layer", "token"), ratio),
                "attn_norm": attn,
                "mlp_norm": mlp,
                "sink_share": (("layer", "token"), sinks),
                "peak_path": (("layer", "text"), np.stack([p["peak_path"] for p in peaks], axis=1)),
                **columns,
            },
            attrs={"d_model": trace.info.d_model},
        )[list(self.measures)]

    def findings(self, result: Result) -> list[Finding]:
        """Position 0, the largest ratio, its writer and erasers, the blocks with a peak, and sinks beside them."""
        data = result.dataset
        peaked = float(data["peak_ratio"].mean()) >= result.params.as_dict()["least"]
        followed = [_written(data), _erased(result)] if peaked else []
        beside = _beside_sinks(result) if peaked else None
        return [_first(result), _largest(result, peaked), *followed, _blocks(result), *([beside] if beside else [])]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Norms and ratios over depth, what sub-layers add at the peak, and the tokens."""
        return {
            "norms": _norms_figure(result),
            "ratio": _ratio_figure(result),
            "writer": _writer_figure(result),
            "tokens": _tokens_figure(result),
            "strip": _strip(result),
        }


def _ratios(norm: np.ndarray) -> np.ndarray:
    """Each token's norm over the mean of the others after position 0; axes layer, token."""
    n = norm.shape[1]
    later = np.arange(n) > 0
    total = norm[:, 1:].sum(axis=1, keepdims=True, dtype=float)
    mean = (total - np.where(later, norm, 0)) / np.where(later, n - 2, n - 1)
    return norm / np.maximum(mean, 1e-30)


def _peak(norm: np.ndarray, before: np.ndarray, ratio: np.ndarray, share: np.ndarray) -> dict[str, float | np.ndarray]:
    """Where the ratio of one text is largest, the token's norm through depth, and who wrote it."""
    layer, pos = (int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
    path = norm[:, pos]
    writer = int(np.diff(path[: layer + 1], prepend=before[pos]).argmax())
    return {
        "peak_pos": pos,
        "peak_layer": layer,
        "peak_ratio": float(ratio[layer, pos]),
        "peak_path": path,
        "writer": writer,
        "mlp_share": float(share[writer, pos]),
        "mlp_share_others": float(np.delete(share[writer], pos).mean()),
    }


def _places(result: Result) -> list[np.ndarray]:
    """Where the tokens of each text lie, in the order of the texts."""
    text = result["text"].values
    return [np.flatnonzero(text == t) for t in dict.fromkeys(text.tolist())]


def _peak_tokens(result: Result) -> np.ndarray:
    """Where each text's peak lies on the token axis."""
    return np.array([at[pos] for at, pos in zip(_places(result), result["peak_pos"].values, strict=True)])


def _first(result: Result) -> Finding:
    data = result.dataset
    at = data["ratio"].values[:, result["pos"].values == 0].T  # text, layer
    best, held = held_out_best(at)
    found = text_mean(held)
    layer = int(data["layer"].values[best])
    norms = data["norm"].values[best]
    pos = result["pos"].values
    return Finding(
        f"After block {layer}, the residual stream at position 0 is {fmt(found.value)} × as long as at other tokens "
        f"({fmt(float(norms[pos == 0].mean()))} against {fmt(float(norms[pos > 0].mean()))}).",
        found.value, "× others", 1.0, "a random other position", found.ci95, found.n, found.n_unit,
        {"layer": layer, "pos": 0}, quantity="norm of the residual stream at position 0",
    )  # fmt: skip


def _largest(result: Result, peaked: bool) -> Finding:
    data = result.dataset
    found = text_mean(data["peak_ratio"].values)
    sizes = [len(at) * data.sizes["layer"] for at in _places(result)]
    null = float(np.mean([_gaussian_ratio(data.attrs["d_model"], n) for n in sizes]))
    roles = Counter(_roles(result))
    listed = ", ".join(f"{role} in {count / found.n:.0%}" for role, count in roles.most_common())
    lead = "The largest ratio of a text" if peaked else "No token stands out: the largest ratio of a text"
    return Finding(
        f"{lead} is {fmt(found.value)} × on average, at {listed} of texts.",
        found.value, "× others", null, "largest of as many Gaussian streams", found.ci95, found.n, found.n_unit,
        {"roles": dict(roles)}, quantity="largest norm of the residual stream in a text",
    )  # fmt: skip


def _roles(result: Result) -> list[str]:
    """What kind of token the peak of each text is."""
    tokens = [str(t).strip() for t in result["token_str"].values[_peak_tokens(result)]]
    later = ["a later delimiter" if set(t) <= _DELIMITERS else "another later token" for t in tokens]
    return ["position 0" if p == 0 else role for p, role in zip(result["peak_pos"].values, later, strict=True)]


def _written(data: xr.Dataset) -> Finding:
    share = text_mean(data["mlp_share"].values).within(0, 1)
    null = float(data["mlp_share_others"].mean())
    writers = Counter(data["writer"].values.tolist())
    layer, count = min(writers.items(), key=lambda item: (-item[1], item[0]))
    part = "MLP" if share.value > 0.5 else "attention"
    return Finding(
        f"Block {layer} writes the peak (in {count / share.n:.0%} of texts), by its {part}: of what its sub-layers add "
        f"there, the MLP's part is {share.value:.0%}; at other tokens it is {null:.0%}.",
        share.value, "share", null, "the same block at other tokens", share.ci95, share.n, share.n_unit,
        {"layer": layer, "sublayer": part}, quantity="the MLP's part in writing the peak",
    )  # fmt: skip


def _erased(result: Result) -> Finding:
    path = result["peak_path"].values.astype(float)
    peak = path.max(axis=0)
    gone = text_mean(1 - path[-1] / np.maximum(peak, 1e-30)).within(0, 1)
    lost = -np.diff(path, axis=0, prepend=path[:1]).mean(axis=1) / max(float(peak.mean()), 1e-30)
    highest = int(path.mean(axis=1).argmax())
    erasers = [i for i, share in enumerate(lost) if share >= 0.1 and i > highest]
    claim, where = "No block takes the peak down", dict[str, object](layers=erasers)
    if erasers:
        at = _peak_tokens(result)
        mlp, attention = (float(result[n].values[erasers][:, at].mean()) for n in ("mlp_norm", "attn_norm"))
        part, several = "MLP" if mlp > attention else "attention", len(erasers) > 1
        verbs = ("s", "", "their") if several else ("", "s", "its")
        claim = f"Block{verbs[0]} {in_words(erasers, ' and ')} take{verbs[1]} the peak down by {verbs[2]} {part}"
        where |= {"sublayer": part}
    return Finding(
        f"{claim}: {gone.value:.0%} of its largest norm is gone after the last block.",
        gone.value, "share of the norm", 0.0, "what is written stays", gone.ci95, gone.n, gone.n_unit, where,
        quantity="part of the peak that is gone",
    )  # fmt: skip


def _blocks(result: Result) -> Finding:
    least, at = result.params.as_dict()["least"], _peak_tokens(result)
    ratio = result["ratio"].values[:, at]  # layer, text
    count = text_mean((ratio >= least).sum(axis=0).astype(float))
    layers = np.flatnonzero(ratio.mean(axis=1) >= least).tolist()
    claim = f"present after blocks {in_words(layers, ' and ')}" if layers else "not present after any block"
    return Finding(
        f"A peak of {least:g} × or more, on average over texts, is {claim}.",
        count.value, "blocks per text", 0.0, "Gaussian streams: none", count.ci95, count.n, count.n_unit,
        {"layers": layers}, quantity="blocks with a peak",
    )  # fmt: skip


def _beside_sinks(result: Result) -> Finding | None:
    at, p = _peak_tokens(result), result.params.as_dict()
    high = result["ratio"].values[:-1, at] >= p["least"]  # layer, text
    share = result["sink_share"].values[1:, at]
    lengths = np.array([len(place) for place in _places(result)])
    usable = high.any(axis=0) & ~high.all(axis=0) & (result["peak_pos"].values < lengths - p["tail"])
    if usable.sum() < min(2, len(at)):
        return None
    high, share = high[:, usable], share[:, usable]
    there, elsewhere = ((share * mask).sum(axis=0) / mask.sum(axis=0) for mask in (high, ~high))
    found = text_mean(there - elsewhere).within(-1, 1)
    return Finding(
        f"In blocks that read a peak, {there.mean():.0%} of heads have a sink at its token; in blocks that do not, "
        f"{elsewhere.mean():.0%}.",
        found.value, "share of heads", 0.0, "sinks unrelated to the peak", found.ci95, found.n, found.n_unit,
        quantity="sinks at its token, blocks with minus without peak",
    )  # fmt: skip


def _gaussian_ratio(d_model: int, n: int) -> float:
    """Expected largest norm of n independent Gaussian streams over their mean norm."""
    from scipy.stats import chi

    return float(chi.ppf(1 - np.exp(-np.euler_gamma) / n, d_model) / chi.mean(d_model))


def _norms_figure(result: Result) -> plots.Figure:
    norm, pos = result["norm"], result["pos"].values
    return plots.lines(
        {
            "position 0": norm.isel(token=pos == 0).mean("token"),
            "later tokens": norm.isel(token=pos > 0).mean("token"),
            "peak token of each text": result["peak_path"].mean("text"),
        },
        title=result.findings[0].claim, unit="activation", quantity="norm of the residual stream", log_y=True,
        caption=f"{result.about} After each block, means over texts. Before the first block: "
        f"{fmt(float(result['start_norm'].values[pos == 0].mean()))} at position 0, "
        f"{fmt(float(result['start_norm'].values[pos > 0].mean()))} later.",
        alt="Norm of the residual stream against layer, at position 0, at later tokens and at each text's peak.",
    )  # fmt: skip


def _ratio_figure(result: Result) -> plots.Figure:
    ratio, pos = result["ratio"], result["pos"].values
    found = {f.unit: f for f in result.findings}
    return plots.lines(
        {
            "position 0": ratio.isel(token=pos == 0).mean("token"),
            "peak token of each text": ratio.isel(token=_peak_tokens(result)).mean("token"),
            "a random later token": ratio.isel(token=pos > 0).mean("token"),
        },
        title=found["blocks per text"].claim, unit="× others", quantity="norm", log_y=True,
        reference=(result.params.as_dict()["least"], "counts as a peak"),
        caption=f"{result.about} Norm over the mean of the text's other tokens after position 0, means over texts.",
        alt="Ratio of norms against layer at position 0, at each text's peak and at random later tokens, logarithmic.",
    )  # fmt: skip


def _writer_figure(result: Result) -> plots.Figure:
    at = np.zeros(result["norm"].sizes["token"], dtype=bool)
    at[_peak_tokens(result)] = True
    curves = {
        f"{label}, {where}": result[name].isel(token=mask).mean("token")
        for label, name in (("MLP", "mlp_norm"), ("attention", "attn_norm"))
        for where, mask in (("peak token", at), ("other tokens", ~at))
    }
    written = [f.claim for f in result.findings if "layer" in f.where and "sublayer" in f.where]
    return plots.lines(
        curves,
        title=written[0] if written else "What attention and MLP add at each text's largest token and elsewhere",
        unit="activation", quantity="norm of what is added", log_y=True,
        caption=f"{result.about} Means over texts.",
        alt="Norms of what attention and the MLP add to the stream against layer, at peak tokens and at others.",
    )  # fmt: skip


def _tokens_figure(result: Result) -> plots.Figure:
    first = int(result["text"].values[0])
    return plots.heatmap(
        result["ratio"].isel(token=result["text"].values == first),
        title="Norm of each token relative to the others, over depth",
        unit="× others", quantity="norm", scale="log", low=1.0,
        caption=f"{result.about} Text {first}; norm over the mean of the text's other tokens after position 0.",
        alt="Heatmap over layer and token of the ratio of norms, logarithmic.",
    )  # fmt: skip


def _strip(result: Result) -> plots.TokenStrip:
    ratio = result["ratio"]
    best = ratio.argmax("layer").values
    layers = ratio["layer"].values
    return plots.TokenStrip(
        title="Which tokens carry a peak",
        tokens=tuple(map(str, result["token_str"].values)), texts=result["text"].values,
        quantities=(
            plots.Quantity("largest ratio at any block", "× others", ratio.max("layer").values, "log"),
            plots.Quantity("largest norm at any block", "activation", result["norm"].max("layer").values, "log"),
            plots.Quantity("sink in (layer, head) pairs", "share", result["sink_share"].mean("layer").values, low=0),
        ),
        caption=f"{result.about} Hover for the block after which the token's ratio is largest.",
        alt="The text, each token coloured by its largest ratio of norms.",
        notes=tuple(f"after block {layers[i]}" for i in best),
    )  # fmt: skip
