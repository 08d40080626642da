"""Attention sinks: tokens on which heads park attention that they do not need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, param, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.reduce import AttentionStats, ReceivedWithin
from probekit.stats import text_mean, token_mean

THRESHOLDS = np.round(np.arange(0.05, 0.96, 0.05), 2)


@dataclass(frozen=True)
class SinkParams(Params):
    """Parameters of attention-sinks."""

    epsilon: float = param(0.3, low=0.01, high=0.99, unit="share", help="Mean attention above which a key is a sink")
    horizon: int = param(64, low=8, high=4096, unit="tokens", help="Length T at which the published rate is measured")
    tail: int = param(8, low=0, high=64, unit="tokens", help="Last positions left out of the search for sinks")


@register
class AttentionSinks(Analysis):
    """Which tokens do heads park their attention on, and in which layers?

    Question:
        Which keys receive far more attention than their content can explain, in which heads and at
        which depth?

    Method:
        Attention received by key k is alpha_k = mean of A[q, k] over the queries q that can see k
        (A[0, 0] = 1 included). A key is a sink of a head if alpha_k > epsilon, strictly, decided for
        each text and then averaged. The published rate Sink_k is the share of (layer, head) pairs,
        in percent, for which key k is a sink, on the first T tokens of each text; causal attention
        makes them the same as a text of T tokens. The last `tail` positions are left out of the search: few
        queries see them. Row entropies are given with and without position 0, the latter
        renormalised. Over whole texts, received attention falls with length, so rates compare only at equal T.

    Null:
        Uniform causal attention, A[q, k] = 1/(q + 1): alpha_0 = H_T / T (0.074 at T = 64), no sink.
        The mean share on position 0 is then the mean of 1/(q + 1) over the same queries.

    Known failure modes:
        The rate depends on T and epsilon: compare only at equal values, and see the sweep. Whether a
        beginning-of-sequence token is added changes which token is the sink. In sliding-window
        layers late queries do not see position 0. A text that starts mid-sentence still has a sink.

    References:
        Gu et al. 2025, When Attention Sink Emerges in Language Models, arXiv 2410.10781, section 3.
        Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    name = "attention-sinks"
    title = "Attention sinks"
    Params = SinkParams
    measures = {
        "received": Measure(
            ("layer", "head", "token"), "share", "mean attention a key receives from queries that see it"
        ),
        "row_entropy_nats": Measure(("layer", "head", "token"), "nats", "entropy of the query's attention row"),
        "first_share": Measure(("layer", "head", "token"), "share", "the query's attention on position 0"),
        "row_max": Measure(("layer", "head", "token"), "share", "largest entry of the query's attention row"),
        "sink_share": Measure(
            ("layer", "token"), "share", "share of heads for which the key is a sink; NaN in the tail"
        ),
        "sink_rate": Measure(("text", "layer", "head"), "share", "1 if position 0 is a sink on the first T tokens"),
        "sink_rate_by_key": Measure(("key",), "percent", "published Sink_k on the first T tokens; NaN in the tail"),
        "sink_rate_by_epsilon": Measure(("threshold",), "percent", "Sink_1 for other values of epsilon"),
        "layer_entropy_nats": Measure(("layer",), "nats", "mean row entropy, queries from position 1 on"),
        "layer_entropy_rest_nats": Measure(
            ("layer",),
            "nats",
            "the same after removing position 0 and renormalising, over rows that leave 0.1 % or more; NaN without any",
        ),
    }

    def min_tokens(self, params: SinkParams) -> int:
        """The published rate needs T tokens."""
        return max(params.horizon, params.tail + 2)

    def observe(self, params: SinkParams, info: ModelInfo) -> Forward:
        """Streamed statistics of every attention map."""
        return Forward((Capture("pattern", AttentionStats()), Capture("pattern", ReceivedWithin(params.horizon))))

    def compute(self, trace: Trace, params: SinkParams) -> xr.Dataset:
        """Rates, entropies and where the sinks are."""
        stats = trace[Capture("pattern", AttentionStats())]
        within = trace[Capture("pattern", ReceivedWithin(params.horizon))]["received"]
        pos = stats["pos"].values
        windows = np.stack(
            [within.values[..., s : s + params.horizon] for s in trace.batch.starts]
        )  # text layer head key
        by_key = 100 * (windows > params.epsilon).mean(axis=(0, 1, 2))
        by_key[max(0, params.horizon - params.tail) :] = np.nan
        sweep = [100 * (windows[..., 0] > e).mean() for e in THRESHOLDS]
        lengths = np.repeat(trace.batch.lengths, trace.batch.lengths)
        sink_share = (
            (stats["received"] > params.epsilon)
            .mean("head")
            .where(xr.DataArray(pos < lengths - params.tail, dims="token"))
        )
        later = xr.DataArray(pos > 0, dims="token")
        entropy, first = stats["entropy_nats"], stats["first_share"]
        return xr.Dataset(
            {
                "received": stats["received"],
                "row_entropy_nats": entropy,
                "first_share": first,
                "row_max": stats["max"],
                "sink_share": sink_share,
                "sink_rate": (("text", "layer", "head"), (windows[..., 0] > params.epsilon).astype(np.float32)),
                "sink_rate_by_key": ("key", by_key),
                "sink_rate_by_epsilon": ("threshold", sweep),
                "layer_entropy_nats": entropy.where(later).mean(("head", "token")),
                "layer_entropy_rest_nats": _without_first(entropy, first).where(later).mean(("head", "token")),
            },
            coords={"threshold": THRESHOLDS, "key": np.arange(params.horizon)},
        )

    def findings(self, result: Result) -> list[Finding]:
        """The published rate, its profile over depth, the share on position 0, other sinks."""
        p, data = result.params.as_dict(), result.dataset
        rate = text_mean(100 * data["sink_rate"].mean(("layer", "head")).values).within(0, 100)
        uniform = float(np.mean(1 / np.arange(1, p["horizon"] + 1)))
        null = 100.0 if uniform > p["epsilon"] else 0.0
        pos = result["pos"].values
        first = data["first_share"].mean(("layer", "head")).values
        even = float(np.mean(1 / (pos[pos > 0] + 1)))
        # The interval is that of the excess over an even share, which unlike the share itself has no trend in q.
        excess = token_mean(np.where(pos > 0, first - 1 / (pos + 1), np.nan), result["text"].values, pos)
        held = excess.minus(-even).within(0, 1)
        return [
            Finding(
                f"Position 0 is a sink for {rate.value:.1f} % of (layer, head) pairs "
                f"at T = {p['horizon']}, epsilon = {p['epsilon']:g}.",
                rate.value, "percent", null, "uniform causal attention", rate.ci95, rate.n, rate.n_unit,
                {"pos": 0, "T": p["horizon"]},
            ),
            Finding(
                f"Later tokens put {held.value:.0%} of their attention on position 0.",
                held.value, "share", even, "uniform causal attention", held.ci95, held.n, held.n_unit, {"pos": 0},
            ),
            self._phases(result),
            self._others(result),
        ]  # fmt: skip

    def _phases(self, result: Result) -> Finding:
        rates = result["sink_rate"].mean("head").values  # text, layer
        phases = sink_phases(rates.mean(axis=0))
        count = text_mean(np.array([len(sink_phases(r)) for r in rates], dtype=float))
        where = " and ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in phases)
        named = {0: "no block", 1: "one phase", 2: "two phases"}.get(len(phases), f"{len(phases)} phases")
        claim = (
            f"Sinks occupy {named} over depth: blocks {where}."
            if phases
            else "No block has sinks in many of its heads."
        )
        return Finding(
            claim, count.value, "phases", 0.0, "uniform causal attention has none", count.ci95, count.n, count.n_unit,
            {"phases": [list(p) for p in phases]},
        )  # fmt: skip

    def _others(self, result: Result) -> Finding:
        share = result["sink_share"].mean("layer").values
        text, pos, token = result["text"].values, result["pos"].values, result["token_str"].values
        share = np.where((pos > 0) & np.isfinite(share), share, -1.0)
        strongest = [np.flatnonzero(text == t)[np.argmax(share[text == t])] for t in np.unique(text)]
        mean = text_mean(share[strongest]).within(0, 1)
        top = max(strongest, key=lambda i: share[i])
        claim = (
            f"Beside position 0, the strongest sink of a text serves {mean.value:.1%} of (layer, head) pairs; "
            f"the strongest of all is {plots.visible(str(token[top]))!r} at position {pos[top]} of text {text[top]}."
        )
        return Finding(
            claim if mean.value > 0 else "No token beside position 0 is a sink of any head.",
            mean.value, "share of pairs", 0.0, "uniform causal attention", mean.ci95, mean.n, mean.n_unit,
            {"text": int(text[top]), "pos": int(pos[top])},
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Rate over depth and heads, where sinks lie in the text, and the sweep over epsilon."""
        p, data = result.params.as_dict(), result.dataset
        rate, _, phases, _ = result.findings
        spread = float((data["layer_entropy_rest_nats"] - data["layer_entropy_nats"]).mean())
        at = f"T = {p['horizon']}, epsilon = {p['epsilon']:g}"
        mean_rate = data["sink_rate"].mean("text")
        return {
            "depth": plots.lines(
                {"Sink_1": 100 * mean_rate.mean("head")},
                title=phases.claim,
                unit="percent",
                quantity="heads with a sink at position 0",
                y_range=(0, 100),
                caption=f"{result.about} Share of each block's heads for which position 0 is a sink, {at}.",
                alt="Percentage of heads with a sink at position 0 against layer.",
            ),
            "heads": plots.heatmap(
                100 * mean_rate,
                title=rate.claim,
                unit="percent",
                quantity="texts in which position 0 is a sink",
                low=0,
                high=100,
                caption=f"{result.about} Share of texts in which position 0 is a sink of the head, {at}.",
                alt="Heatmap over layer and head of how often position 0 is a sink.",
            ),
            "strip": self._strip(result),
            "tokens": self._tokens(result),
            "entropy": plots.lines(
                {"all keys": data["layer_entropy_nats"], "without position 0": data["layer_entropy_rest_nats"]},
                title=f"Without position 0, attention rows have {spread:+.2f} nats of entropy",
                unit="nats",
                quantity="mean row entropy",
                caption=f"{result.about} Mean over heads and queries from position 1 on; "
                "without position 0: after removing it and renormalising.",
                alt="Mean attention entropy against layer, with all keys and without position 0.",
            ),
            "sweep": plots.lines(
                {"Sink_1": data["sink_rate_by_epsilon"]},
                title="How the rate depends on the threshold epsilon",
                unit="percent",
                quantity="Sink_1",
                reference=(rate.value, f"epsilon = {p['epsilon']:g}"),
                y_range=(0, 100),
                caption=f"{result.about} T = {p['horizon']}.",
                alt="Sink rate at position 0 against the threshold epsilon.",
            ),
        }

    def _tokens(self, result: Result) -> plots.Figure:
        first = int(result["text"].values[0])
        data = result.dataset.isel(token=result["text"].values == first)
        return plots.heatmap(
            data["sink_share"],
            title="Which tokens are sinks, and in which layers",
            unit="share of heads",
            quantity="sink",
            low=0,
            high=1,
            caption=f"{result.about} Text {first}; received attention over the whole text, tail greyed out.",
            alt="Heatmap over layer and token of the share of heads for which the token is a sink.",
        )

    def _strip(self, result: Result) -> plots.TokenStrip:
        data = result.dataset
        received = data["received"].mean(("layer", "head")).values
        quantities = (
            plots.Quantity("sink in (layer, head) pairs", "share", data["sink_share"].mean("layer").values, low=0),
            plots.Quantity("mean attention received", "share", received, low=0),
            plots.Quantity(
                "mean attention paid to position 0",
                "share",
                data["first_share"].mean(("layer", "head")).values,
                low=0,
                high=1,
            ),
            plots.Quantity("mean row entropy", "nats", data["row_entropy_nats"].mean(("layer", "head")).values, low=0),
        )
        return plots.TokenStrip(
            title="Which tokens serve as sinks",
            tokens=tuple(map(str, data["token_str"].values)),
            texts=data["text"].values,
            quantities=quantities,
            caption=f"{result.about} Means over all layers and heads.",
            alt="The text, each token coloured by the share of (layer, head) pairs for which it is a sink.",
        )


def sink_phases(rates: np.ndarray, least: float = 0.25) -> list[tuple[int, int]]:
    """Runs of at least two consecutive layers in which more than `least` of the heads have a sink.

    Args:
        rates: share of heads with a sink at position 0, axis layer.
        least: share from which a layer belongs to a phase.
    """
    inside = np.concatenate([[False], rates > least, [False]]).astype(int)
    edges = np.flatnonzero(np.diff(inside))
    return [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2) if b - a >= 2]


def _without_first(entropy: xr.DataArray, first: xr.DataArray) -> xr.DataArray:
    """Entropy of attention rows after removing position 0 and renormalising, from entropy and share alone.

    Rows that leave less than a thousandth to all other keys are NaN: dividing by it would turn the rounding of
    float32 attention into hundredths of a nat.
    """
    rest = 1 - first
    safe = rest.where(rest > 1e-3)
    return (entropy + xr.where(first > 0, first * np.log(first.where(first > 0, 1)), 0)) / safe + np.log(safe)
