"""Value drain: sinks receive attention and give nothing back, because their values are small."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, fmt, param, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.reduce import AttentionStats, Norm, OutputNorm, SinkLogitGap
from probekit.stats import Estimate, held_out_best, rank_correlation, text_mean

_KINDS: dict[str, tuple[Capture, str]] = {
    "output": (Capture("v", OutputNorm()), "norm of the value through the head's output projection"),
    "value": (Capture("v", Norm()), "norm of the value that the query head reads"),
    "key": (Capture("k", Norm()), "norm of the key that the query head reads"),
}
_PAIR, _TOKEN, _QUERY = ("text", "layer", "head"), ("layer", "head", "token"), ("layer", "query")
_ABSENT = {kind: f"NaN where the backend shows no {capture.point}" for kind, (capture, _) in _KINDS.items()}


@dataclass(frozen=True)
class DrainParams(Params):
    """Parameters of value-drain."""

    epsilon: float = param(0.3, low=0.01, high=0.99, unit="share", help="Mean attention above which a key is a sink")
    tail: int = param(8, low=0, high=64, unit="tokens", help="Last positions left out of the search for sinks")


@register
class ValueDrain(Analysis):
    """Are the values of sink tokens small, so that attention parked there adds little?

    Question:
        Do the heads that have a sink see smaller values there than at other tokens, do heads without one see
        ordinary values at the same tokens, and by how much do queries score the sink above other keys?

    Method:
        The sink of a (layer, head) pair in a text is its strongest key: the one with the largest received attention
        alpha (mean over the queries that see it, whole text), the last `tail` positions left out. The pair has a sink
        if alpha > epsilon, strictly, decided for each text. The ratio of a pair is the norm at its strongest key over
        the mean norm of its others: tokens after position 0 that are no sink of this pair. Norms are ||W_O^h v_j||
        (output, per query head), ||v_j|| and ||k_j|| (of the key-value head that the query head reads). A text's number
        is the mean over its pairs with a sink; texts count the same. The contrast takes one token per text, the
        sink of most pairs, and compares pairs that have their sink there with pairs that have none. As published:
        position 0 over the mean of all j > 0, in every pair. The gap of query i is z[i, 0] - mean over 0 < j < i of
        z[i, j], scaled scores before the softmax, undefined for i < 2; masked keys, such as those after the query,
        never count. A text's gap is the mean over its queries, then over heads.

    Null:
        A random one of the others in place of the sink: a ratio of 1 on average, under the same weighting. Scores that
        do not depend on the key: a gap of 0. Strength and ratio unrelated over pairs: a rank correlation of 0.

    Known failure modes:
        Heads with and without a sink lie in different layers, and the contrast does not separate the two. A small
        value at position 0 may be the token's and not the sink's: compare texts that begin differently. The interval of
        the correlation covers other texts, not other heads; heads that share a key-value head share its values. In
        short texts alpha is large by chance (at position 0 under uniform attention 0.07 with 64 tokens, 0.29 with 10);
        over long texts it falls. A gap includes what the position encoding gives to distance.

    References:
        Guo et al. 2024, Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs,
        arXiv 2410.13835, section 2. The released code averages the gap over future keys too; this does not.
        Gu et al. 2025, When Attention Sink Emerges in Language Models, arXiv 2410.10781, section 3.
    """

    name = "value-drain"
    title = "Value drain"
    Params = DrainParams
    measures = {
        **{f"{k}_norm": Measure(_TOKEN, "activation", f"{words}; {_ABSENT[k]}") for k, (_, words) in _KINDS.items()},
        **{f"{k}_ratio": Measure(_PAIR, "× others", f"{k} norm at the strongest key over the mean of others; {no}")
           for k, no in _ABSENT.items()},
        **{f"first_{k}_ratio": Measure(_PAIR, "× others", f"{k} norm at position 0 over the mean of j > 0; {no}")
           for k, no in _ABSENT.items()},
        **{f"{k}_typical": Measure(("case", "layer"), "activation", f"mean {k} norm over texts and heads; {no}")
           for k, no in _ABSENT.items()},
        "main_ratio": Measure(_PAIR, "× others", "output norm at main_pos over that of others; NaN as output_ratio"),
        "main_pos": Measure(("text",), "1", "position that is the sink of most pairs; 0 where no pair has one"),
        "strength": Measure(_PAIR, "share", "attention received by the strongest key outside the tail"),
        "sink_pos": Measure(_PAIR, "1", "position of the strongest key"),
        "sink_share": Measure(("token",), "share", "share of (layer, head) pairs that have their sink here"),
        "gap_nats": Measure(_TOKEN, "nats", "score on position 0 above the mean of keys between; NaN where undefined"),
        "text_gap_nats": Measure(_PAIR, "nats", "mean gap over the text's queries; NaN where none is defined"),
        "gap_mean_nats": Measure(_QUERY, "nats", "gap, mean over texts, then heads; NaN where undefined"),
        "gap_max_nats": Measure(_QUERY, "nats", "largest over heads of the mean over texts; NaN where undefined"),
    }  # fmt: skip

    def min_tokens(self, params: DrainParams) -> int:
        """A key to search, others beside it, and a query with a key in between."""
        return max(3, params.tail + 2)

    def observe(self, params: DrainParams, info: ModelInfo) -> Forward:
        """Received attention, gaps, and the norms that the backend can show."""
        shown = [capture for capture, _ in _KINDS.values() if capture.point.site in info.sites]
        return Forward((Capture("pattern", AttentionStats()), Capture("pattern", SinkLogitGap()), *shown))

    def compute(self, trace: Trace, params: DrainParams) -> xr.Dataset:
        """Sinks, ratios and gaps of every text."""
        stats = trace[Capture("pattern", AttentionStats())]
        received, gap = stats["received"].values, trace[Capture("pattern", SinkLogitGap())]["gap_nats"].values
        spans = [slice(s, s + n) for s, n in zip(trace.batch.starts, trace.batch.lengths, strict=True)]
        seen = [_Seen.of(received[..., s], params) for s in spans]
        variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for kind in _KINDS:
            norm = _norms(trace, kind, received.shape)
            here = [(x, norm[..., s]) for x, s in zip(seen, spans, strict=True)]
            strongest, others = (np.stack(x) for x in zip(*(x.compare(n, x.place) for x, n in here), strict=True))
            first = [_divide(n[..., 0], _mean(n[..., 1:], -1)) for _, n in here]
            typical = [_mean(n, (0, 2)) for n in (strongest, others)]
            variables |= {
                f"{kind}_norm": (_TOKEN, norm),
                f"{kind}_ratio": (_PAIR, _divide(strongest, others)),
                f"first_{kind}_ratio": (_PAIR, np.stack(first)),
                f"{kind}_typical": (("case", "layer"), np.stack(typical)),
            }
            if kind == "output":
                variables["main_ratio"] = (_PAIR, np.stack([_divide(*x.compare(n, x.main)) for x, n in here]))
        variables |= {
            "main_pos": (("text",), np.array([int(x.main.flat[0]) for x in seen])),
            "strength": (_PAIR, np.stack([x.strength for x in seen])),
            "sink_pos": (_PAIR, np.stack([x.place for x in seen])),
            "sink_share": (("token",), np.concatenate([x.share() for x in seen])),
            "gap_nats": (_TOKEN, gap),
            "text_gap_nats": (_PAIR, np.stack([_mean(gap[..., s], -1) for s in spans])),
            **_gaps(gap, spans),
        }
        cases = np.array(["strongest key", "others"], dtype=object)
        return xr.Dataset(variables, coords={**stats["received"].coords, "case": cases})[list(self.measures)]

    def findings(self, result: Result) -> list[Finding]:
        """Drain at sinks, its contrast, the published ratio, the joint statement, the gap."""
        return list(_found(result).values())

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Norms over depth, ratios by head, strength against ratio, gaps, and the tokens."""
        drawn: dict[str, plots.Drawing] = {}
        if np.isfinite(result["output_ratio"].values).any():
            drawn |= {"norms": _norms_figure(result), "heads": _heads_figure(result), "joint": _joint_figure(result)}
        if np.isfinite(result["text_gap_nats"].values).any():
            drawn |= {"gap": _gap_figure(result), "gap_heads": _gap_heads(result), "gap_tokens": _gap_tokens(result)}
        return drawn | {"strip": _strip(result)}


@dataclass(frozen=True)
class _Seen:
    """What one text shows of sinks: arrays with axes layer, head (and key)."""

    strength: np.ndarray
    place: np.ndarray
    main: np.ndarray  # the same position for all pairs
    sinks: np.ndarray  # layer, head, key: alpha > epsilon, outside the tail
    has: np.ndarray

    @classmethod
    def of(cls, received: np.ndarray, params: DrainParams) -> _Seen:
        n = received.shape[-1]
        search = received[..., : n - params.tail]
        strength, place = search.max(axis=-1), search.argmax(axis=-1)
        sinks, has = (received > params.epsilon) & (np.arange(n) < n - params.tail), strength > params.epsilon
        main = int(np.bincount(place[has], minlength=1).argmax())
        return cls(strength, place, np.full_like(place, main), sinks, has)

    def compare(self, norm: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Norm at `place`, and the mean over others: neither position 0, nor a sink, nor there; axes layer, head."""
        pos = np.arange(norm.shape[-1])
        others = ~self.sinks & (pos > 0) & (pos != place[..., None])
        return np.take_along_axis(norm, place[..., None], -1)[..., 0], _mean(np.where(others, norm, np.nan), -1)

    def share(self) -> np.ndarray:
        """Share of pairs that have their sink at each token; axis key."""
        return np.bincount(self.place[self.has], minlength=self.sinks.shape[-1]) / self.has.size


def _norms(trace: Trace, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms with axes layer, head, token; those of key-value heads stand once for each query head that reads them."""
    capture = _KINDS[kind][0]
    if capture.point.site not in trace.info.sites:
        return np.full(shape, np.nan, dtype=np.float32)
    values = trace[capture]["output_norm" if kind == "output" else "norm"].transpose(*_TOKEN).values
    return np.repeat(values, shape[1] // values.shape[1], axis=1)


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is left."""
    count = (known := np.isfinite(values)).sum(axis=axis)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=axis) / np.maximum(count, 1), np.nan)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _gaps(gap: np.ndarray, spans: list[slice]) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Gaps by query position: mean over texts of each head, then the mean and the largest over heads."""
    shape = (*gap.shape[:2], max(s.stop - s.start for s in spans))
    total, count = np.zeros(shape), np.zeros(shape)
    for s in spans:
        total[..., : s.stop - s.start] += np.nan_to_num(gap[..., s])
        count[..., : s.stop - s.start] += np.isfinite(gap[..., s])
    by_head = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    largest = np.where((count > 0).any(axis=1), np.where(count > 0, by_head, -np.inf).max(axis=1), np.nan)
    return {"gap_mean_nats": (("layer", "query"), _mean(by_head, 1)), "gap_max_nats": (("layer", "query"), largest)}


def _texts(values: np.ndarray) -> Estimate | None:
    """Mean over texts that have a value, as a part of all texts; None where the spread between them is unknown."""
    known, n = int(np.isfinite(values).sum()), len(values)
    return replace(text_mean(values), n=n) if known >= min(n, 2) else None


def _found(result: Result) -> dict[str, Finding]:
    data, epsilon = result.dataset, result.params.as_dict()["epsilon"]
    has = data["strength"].values > epsilon
    made = {"drain": _drain(data, has, epsilon), "contrast": _contrast(data, has), "first": _first(data)}
    made |= {"joint": _joint(data), "gap": _gap(data)}
    return {name: finding for name, finding in made.items() if finding is not None}


def _beside(value: np.ndarray, key: np.ndarray) -> str:
    keys = f", key norm {fmt(float(_mean(key, 0)))} ×" if np.isfinite(key).any() else ""
    return f"(value norm {fmt(float(_mean(value, 0)))} ×{keys})"


def _drain(data: xr.Dataset, has: np.ndarray, epsilon: float) -> Finding | None:
    output, value, key = (_mean(np.where(has, data[f"{k}_ratio"].values, np.nan), (1, 2)) for k in _KINDS)
    found, n_with = _texts(output), int(np.isfinite(output).sum())
    if found is None:
        return None
    low, high = found.ci95 or (found.value, found.value)
    verb = "are drained" if high < 1 else "are larger than elsewhere" if low > 1 else "are not drained"
    among = f"; {n_with} of {len(output)} texts have such heads" if n_with < len(output) else ""
    return Finding(
        f"Values at sinks {verb}: heads with a sink (alpha > {epsilon:g}, {has.mean():.0%} of pairs) have an output "
        f"norm of {fmt(found.value)} × that of their other tokens there {_beside(value, key)}{among}.",
        found.value, "× others", 1.0, "a random other token in place of the sink", found.ci95, found.n, found.n_unit,
        {"epsilon": epsilon, "share_of_pairs": float(has.mean())}, quantity="output norm at the sinks of heads",
    )  # fmt: skip


def _contrast(data: xr.Dataset, has: np.ndarray) -> Finding | None:
    ratio = data["main_ratio"].values
    there = has & (data["sink_pos"].values == data["main_pos"].values[:, None, None])
    sinks, none = (_mean(np.where(mask, ratio, np.nan), (1, 2)) for mask in (there, ~has))
    found = _texts(none - sinks)
    if found is None:
        return None
    both = np.isfinite(none - sinks)
    return Finding(
        f"At each text's main sink, heads without a sink have {fmt(none[both].mean())} × the output norm of others and "
        f"heads with it {fmt(sinks[both].mean())} ×: a difference of {fmt(found.value)}.",
        found.value, "× others", 0.0, "norms at the token unrelated to sinks", found.ci95, found.n, found.n_unit,
        quantity="output norm, heads without minus with the sink",
    )  # fmt: skip


def _first(data: xr.Dataset) -> Finding | None:
    output, value, key = (_mean(data[f"first_{k}_ratio"].values, (1, 2)) for k in _KINDS)
    found = _texts(output)
    if found is None:
        return None
    return Finding(
        f"At position 0, over all heads, the output norm is {fmt(found.value)} × the mean of later tokens "
        f"{_beside(value, key)}.",
        found.value, "× others", 1.0, "a random later token", found.ci95, found.n, found.n_unit, {"pos": 0},
        quantity="output norm at position 0",
    )  # fmt: skip


def _joint(data: xr.Dataset) -> Finding | None:
    pairs = zip(data["strength"].values, data["output_ratio"].values, strict=True)
    found = _texts(np.array([rank_correlation(s.ravel(), r.ravel()) for s, r in pairs]))
    if found is None:
        return None
    found = found.within(-1, 1)
    low, high = found.ci95 or (found.value, found.value)
    words = "drain more" if high < 0 else "drain less" if low > 0 else "drain neither more nor less"
    return Finding(
        f"Heads with stronger sinks {words}: Spearman's rho between received attention and the ratio of output norms, "
        f"over (layer, head) pairs, is {found.value:+.2f}.",
        found.value, "rho", 0.0, "strength and ratio unrelated over pairs", found.ci95, found.n, found.n_unit,
        quantity="sink strength against output norm, over heads",
    )  # fmt: skip


def _gap(data: xr.Dataset) -> Finding | None:
    by_layer = _mean(data["text_gap_nats"].values, 2)
    layer, held = held_out_best(by_layer)
    found, overall = _texts(held), _texts(_mean(by_layer, 1))
    if found is None or overall is None:
        return None
    layer = int(data["layer"].values[layer])
    return Finding(
        f"Queries score position 0 above the keys in between by {fmt(overall.value)} nats on average, and most in "
        f"block {layer}: by {fmt(found.value)} nats (mean over its heads).",
        found.value, "nats", 0.0, "scores that do not depend on the key", found.ci95, found.n, found.n_unit,
        {"layer": layer, "mean_nats": overall.value}, quantity="score of position 0 above others, best block",
    )  # fmt: skip


def _norms_figure(result: Result) -> plots.Figure:
    data, found = result.dataset, _found(result)
    curves = {
        f"{k}, {case}": data[f"{k}_typical"].sel(case=case, drop=True) for k in _KINDS for case in data["case"].values
    }
    title = found["first"].claim if "first" in found else "Norms at the strongest key of each head and at other tokens"
    return plots.lines(
        {label: curve for label, curve in curves.items() if np.isfinite(curve.values).any()},
        title=title, unit="activation", quantity="norm", log_y=True,
        caption=f"{result.about} Norms at each head's strongest key and mean over its other tokens; means over heads "
        "and texts. Output: the value through the head's output projection.",
        alt="Output, value and key norms against layer, at the strongest key and at other tokens, logarithmic.",
    )  # fmt: skip


def _heads_figure(result: Result) -> plots.Figure:
    found, ratio = _found(result), np.log2(np.maximum(_mean(result["output_ratio"].values, 0), 1e-6))
    return plots.heatmap(
        xr.DataArray(ratio, {"layer": result["layer"]}, _PAIR[1:]),
        title=found["drain"].claim if "drain" in found else "Output norm at the strongest key of each head",
        unit="log2", quantity="ratio to other tokens", scale="diverging",
        caption=f"{result.about} Output norm at the pair's strongest key over that of its other tokens, mean over "
        "texts, as a power of two: -1 is half, -2 a quarter.",
        alt="Heatmap over layer and head of the output norm at the strongest key relative to other tokens.",
    )  # fmt: skip


def _joint_figure(result: Result) -> plots.Figure:
    data, found = result.dataset, _found(result)
    strength, ratio = data["strength"].mean("text").values, _mean(data["output_ratio"].values, 0)
    often = (data["strength"].values > result.params.as_dict()["epsilon"]).mean(axis=0) > 0.5
    masks = {"a sink in most texts": often, "a sink in at most half": ~often}
    names = {k: [f"block {data['layer'].values[a]}, head {b}" for a, b in np.argwhere(m)] for k, m in masks.items()}
    return plots.scatter(
        {label: (strength[mask], ratio[mask]) for label, mask in masks.items()},
        title=found["joint"].claim if "joint" in found else "Strength of each head's sink against its values there",
        unit="1", x_quantity="attention received by the strongest key (share)",
        y_quantity="output norm there (× others)", hover=names,
        caption=f"{result.about} One point for each (layer, head) pair, mean over texts.",
        alt="Scatter of attention received by the strongest key against the ratio of output norms, one point per head.",
    )  # fmt: skip


def _gap_figure(result: Result) -> plots.Figure:
    gap, found = result["gap_mean_nats"], _found(result)
    n = gap.sizes["layer"]
    chosen = sorted({0, n // 4, n // 2, 3 * n // 4, n - 1, int(np.nan_to_num(_mean(gap.values, 1)).argmax())})
    return plots.lines(
        {f"block {gap['layer'].values[i]}": gap.isel(layer=i, drop=True) for i in chosen},
        title=found["gap"].claim if "gap" in found else "Score on position 0 above the keys in between",
        unit="nats", quantity="sink logit gap", reference=(0.0, "no preference"),
        caption=f"{result.about} Mean over heads and over the texts that reach the query position; some blocks.",
        alt="Mean gap between the score on position 0 and on other keys against query position, for some blocks.",
    )  # fmt: skip


def _gap_heads(result: Result) -> plots.Figure:
    return plots.heatmap(
        xr.DataArray(_mean(result["text_gap_nats"].values, 0), {"layer": result["layer"]}, _PAIR[1:]),
        title="Which heads score position 0 above the keys in between",
        unit="nats", quantity="sink logit gap", scale="diverging",
        caption=f"{result.about} Mean over the queries of each text from position 2 on, then over texts.",
        alt="Heatmap over layer and head of the mean sink logit gap.",
    )  # fmt: skip


def _gap_tokens(result: Result) -> plots.Figure:
    data = result.dataset
    layer = int(np.nan_to_num(_mean(data["text_gap_nats"].values, (0, 2))).argmax())
    gap = _mean(data["gap_nats"].values[layer], 0)
    known = np.isfinite(gap)
    ids, first, place = np.unique(data["token_id"].values[known], return_index=True, return_inverse=True)
    count, total = np.bincount(place), np.bincount(place, gap[known])
    strings = data["token_str"].values[known][first]
    frequent = np.argsort(-count, kind="stable")[:15]
    return plots.bars(
        {f"{plots.visible(str(strings[i]))} (id {ids[i]}, {count[i]} times)": total[i] / count[i] for i in frequent},
        title=f"Gap in block {data['layer'].values[layer]} by what the query token is",
        unit="nats", quantity="sink logit gap",
        caption=f"{result.about} The most frequent query tokens from position 2 on; mean over heads and occurrences.",
        alt="Bars of the mean sink logit gap for the most frequent query tokens.",
    )  # fmt: skip


def _strip(result: Result) -> plots.TokenStrip:
    data = result.dataset
    quantities = [plots.Quantity("pairs that have their sink here", "share", data["sink_share"].values, low=0)]
    for label, name, unit in (("output norm", "output_norm", "activation"), ("gap as a query", "gap_nats", "nats")):
        values = _mean(data[name].values, (0, 1))
        if np.isfinite(values).any():
            quantities.append(plots.Quantity(f"mean {label}", unit, values))
    return plots.TokenStrip(
        title="Which tokens are sinks, and how large their values are",
        tokens=tuple(map(str, data["token_str"].values)), texts=data["text"].values, quantities=tuple(quantities),
        caption=f"{result.about} Means over all layers and heads.",
        alt="The text, each token coloured by the share of (layer, head) pairs that have their sink there.",
    )  # fmt: skip
