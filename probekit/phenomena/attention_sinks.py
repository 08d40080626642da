"""Attention sinks: tokens on which heads park attention that they do not need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, Statistic, param, register
from probekit.core import Batch, Forward, ModelInfo, Trace
from probekit.methods import sink_summary, sinks
from probekit.stats import estimate, text_mean

THRESHOLDS = np.round(np.arange(0.05, 0.96, 0.05), 2)
_PAIRS = ("text", "layer", "head")


@dataclass(frozen=True)
class SinkParams(Params):
    """Parameters of attention-sinks."""

    epsilon: float = param(0.3, low=0.01, high=0.99, unit="share", help="Mean attention above which a key is a sink")
    horizon: int = param(64, low=8, high=4096, unit="tokens", help="Length T at which the published rate is measured")
    tail: int = param(8, low=0, high=64, unit="tokens", help="Last positions left out of the search for sinks")
    n_made: int = param(0, low=0, high=1000, unit="texts", help="Random and repeated texts to compare with; 0: none")
    seed: int = param(0, low=0, help="Seed of these texts")


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
        makes them the same as a text of T tokens. The last `tail` positions are left out of the
        search: few queries see them. Row entropies are given with and without position 0, the latter
        renormalised. Received attention falls with length, so rates compare only at equal T: see the
        sweep. With `n_made`, one more pass reads as many texts of T random tokens (independent,
        uniform over the vocabulary), of one token repeated T times, and of the run's own texts, each
        without and with a beginning-of-sequence token as the first of the T.

    Null:
        Uniform causal attention, A[q, k] = 1/(q + 1): alpha_0 = H_T / T (0.074 at T = 64), no sink.
        The mean share on position 0 is then the mean of 1/(q + 1) over the same queries. Made texts:
        the rate of natural text, and of the same texts without the beginning-of-sequence token.

    Known failure modes:
        The rate depends on T and epsilon; at T = 8, H_T / T itself exceeds 0.3. Whether a
        beginning-of-sequence token is added changes which token is the sink. In sliding-window
        layers late queries do not see position 0. A text that starts mid-sentence still has a sink.
        Statistics are of the weights that the model uses; where these do not sum to one (sigmoid,
        ReLU, learned sink logits), the published metric is of rows that are normalised first.

    References:
        Gu et al. 2025, When Attention Sink Emerges in Language Models, arXiv 2410.10781, section 3.
        Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    name = "attention-sinks"
    title = "Attention sinks"
    Params = SinkParams
    measures = {
        "received": Measure(("layer", "head", "token"), "share", "mean attention from the queries that see the key"),
        "row_entropy_nats": Measure(("layer", "head", "token"), "nats", "entropy of the query's attention row"),
        "first_share": Measure(("layer", "head", "token"), "share", "the query's attention on position 0"),
        "row_max": Measure(("layer", "head", "token"), "share", "largest entry of the query's attention row"),
        "sink_share": Measure(("layer", "token"), "share", "share of heads whose sink the key is; NaN in the tail"),
        "sink_rate": Measure(_PAIRS, "share", "1 if position 0 is a sink on the first T tokens"),
        "sink_rate_by_key": Measure(("key",), "percent", "published Sink_k on the first T tokens; NaN in the tail"),
        "sink_rate_by_epsilon": Measure(("threshold",), "percent", "Sink_1 for other values of epsilon"),
        "sink_rate_any": Measure(_PAIRS, "share", "1 if position 0 or a later key is; keys in the tail do not count"),
        "sink_rate_other": Measure(_PAIRS, "share", "1 if a key after position 0 is; keys in the tail do not count"),
        "sink_rate_by_length": Measure(("text", "query"), "percent", "Sink_1 when texts end with this query, at T - 1"),
        "received_by_length": Measure(("text", "query"), "share", "alpha_0 likewise, mean over (layer, head) pairs"),
        "uniform_by_length": Measure(("query",), "share", "alpha_0 of uniform causal attention likewise, H_T / T"),
        "layer_entropy_nats": Measure(("layer",), "nats", "mean row entropy, queries from position 1 on"),
        "layer_entropy_rest_nats": Measure(("layer",), "nats",
            "the same after removing position 0 and renormalising, over rows that leave 0.1 % or more; NaN without any",
        ),
        "made_rate": Measure(("case", "sample"), "percent", "Sink_1 of each made text; NaN where a case has fewer"),
        "made_rate_other": Measure(("case", "sample"), "percent", "pairs with a sink after position 0; NaN likewise"),
        "made_rate_by_layer": Measure(("case", "layer"), "percent", "Sink_1 of the made texts in each layer"),
    }  # fmt: skip
    statistics = {name: Statistic(*how) for name, how in sink_summary.STATISTICS.items()}

    def cannot_stream(self, params: SinkParams) -> str:
        """Made texts are made of all texts of a run."""
        return "made texts (n_made) are made of all texts of a run; take n_made = 0" if params.n_made else ""

    def min_tokens(self, params: SinkParams) -> int:
        """The published rate needs T tokens."""
        return max(params.horizon, params.tail + 2)

    def passes(self, params: SinkParams, info: ModelInfo, batch: Batch) -> int:
        """Made texts take a pass of their own."""
        return 1 + (params.n_made > 0)

    def observe(self, params: SinkParams, info: ModelInfo) -> Forward:
        """Streamed statistics of every attention map."""
        return Forward((sinks.STATS, sinks.within(params.horizon)))

    def flow(self, params: SinkParams, info: ModelInfo) -> Flow:
        """The run's own texts, and made ones if they are asked for."""
        seen = yield self.observe(params, info)
        received = {}
        if params.n_made:
            made = sinks.made_texts(seen.batch, info, n=params.n_made, n_tokens=params.horizon, seed=params.seed)
            received = yield from sinks.read_made(made)
        n_tokens = received["random"].shape[-1] if received else params.horizon
        received[sinks.UNIFORM] = np.tile(sinks.uniform_received(n_tokens), (1, info.n_layers, info.n_heads, 1))
        rates = sinks.made_rates(received, params.epsilon, params.tail)
        return self.compute(seen, params).merge(rates).assign_attrs(made_tokens=n_tokens)

    def compute(self, trace: Trace, params: SinkParams) -> xr.Dataset:
        """Rates, entropies and where the sinks are."""
        stats = trace[sinks.STATS]
        pos = stats["pos"].values
        windows = sinks.windows_of(trace, params.horizon)
        found = sinks.sinks_of(windows, params.epsilon, params.tail)
        by_key = 100 * (windows > params.epsilon).mean(axis=(0, 1, 2))
        by_key[max(0, params.horizon - params.tail) :] = np.nan
        sweep = [100 * (windows[..., 0] > e).mean() for e in THRESHOLDS]
        n_tokens = np.repeat(trace.batch.lengths, trace.batch.lengths)
        counted = xr.DataArray(pos < n_tokens - params.tail, dims="token")
        later = xr.DataArray(pos > 0, dims="token")
        entropy, first = stats["entropy_nats"], stats["first_share"]
        rest = sinks.entropy_without_first(entropy, first)
        return xr.Dataset(
            {
                "received": stats["received"],
                "row_entropy_nats": entropy,
                "first_share": first,
                "row_max": stats["max"],
                "sink_share": (stats["received"] > params.epsilon).mean("head").where(counted),
                "sink_rate": (_PAIRS, found["first"].astype(np.float32)),
                "sink_rate_by_key": ("key", by_key),
                "sink_rate_by_epsilon": ("threshold", sweep),
                "sink_rate_any": (_PAIRS, found["any"].astype(np.float32)),
                "sink_rate_other": (_PAIRS, found["other"].astype(np.float32)),
                **sinks.by_length(trace, params.epsilon).data_vars,
                "layer_entropy_nats": entropy.where(later).mean(("head", "token")),
                "layer_entropy_rest_nats": rest.where(later).mean(("head", "token")),
            },
            coords={"threshold": THRESHOLDS, "key": np.arange(params.horizon)},
        )

    def summarise(self, dataset: xr.Dataset, params: SinkParams) -> xr.Dataset:
        """Moments and sums over texts."""
        return sink_summary.summarise(dataset)

    def totals(self, summary: xr.Dataset, params: SinkParams) -> dict[str, xr.DataArray]:
        """Rates by key, threshold and length, and entropies."""
        return sink_summary.totals(summary)

    def findings(self, result: Result) -> list[Finding]:
        """The published rate, the share on position 0, phases over depth, other sinks, rates by T, made texts."""
        p, seen = result.params.as_dict(), result.summary
        rate = estimate(seen["rate"].values).within(0, 100)
        null = 100.0 * (sinks.uniform_received(p["horizon"])[0] > p["epsilon"])
        even, at = float(seen["even_sum"] / seen["later"]), f"T = {p['horizon']}, epsilon = {p['epsilon']:g}"
        # The interval is that of the excess over an even share, which unlike the share itself has no trend in q.
        held = estimate(seen["excess"].values).minus(-even).within(0, 1)
        return [
            Finding(
                f"Position 0 is a sink for {rate.value:.1f} % of (layer, head) pairs at {at}.",
                rate.value, "percent", null, "uniform causal attention", rate.ci95, rate.n, rate.n_unit,
                {"pos": 0, "T": p["horizon"]}, quantity="heads with a sink at position 0",
            ),
            Finding(
                f"Later tokens put {held.value:.0%} of their attention on position 0.",
                held.value, "share", even, "uniform causal attention", held.ci95, held.n, held.n_unit, {"pos": 0},
                quantity="attention of later tokens on position 0",
            ),
            self._phases(result),
            self._others(result),
            _anywhere(result),
            _lengths(result),
            *_made(result),
        ]  # fmt: skip

    def _phases(self, result: Result) -> Finding:
        count = estimate(result.summary["phases"].values)
        phases = sinks.sink_phases(sink_summary.share_of_texts(result.summary, "first").mean("head").values)
        where = " and ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in phases)
        named = {1: "one phase", 2: "two phases"}.get(len(phases), f"{len(phases)} phases")
        return Finding(
            f"Sinks occupy {named} over depth: blocks {where}." if phases else "No block has sinks in many heads.",
            count.value, "phases", 0.0, "uniform causal attention has none", count.ci95, count.n, count.n_unit,
            {"phases": [list(p) for p in phases]}, quantity="phases of sinks over depth",
        )  # fmt: skip

    def _others(self, result: Result) -> Finding:
        mean, top = estimate(result.summary["strongest"].values).within(0, 1), result.summary["strongest_of_all"].item()
        return Finding(
            f"Beside position 0, the strongest sink of a text serves {mean.value:.1%} of (layer, head) pairs; "
            f"the strongest of all is {plots.visible(top['word'])!r} at position {top['pos']} of text {top['text']}."
            if mean.value > 0
            else "No token beside position 0 is a sink of any head.",
            mean.value, "share of pairs", 0.0, "uniform causal attention", mean.ci95, mean.n, mean.n_unit,
            {"text": top["text"], "pos": top["pos"]}, quantity="heads of the strongest sink beside position 0",
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Rate over depth and heads, where sinks lie, the sweeps over epsilon and T, and made texts."""
        p, data, seen = result.params.as_dict(), result.dataset, result.summary
        rate, _, phases, _, anywhere, lengths, *made = result.findings
        spread = float((data["layer_entropy_rest_nats"] - data["layer_entropy_nats"]).mean())
        at = f"T = {p['horizon']}, epsilon = {p['epsilon']:g}"
        over_depth = {
            label: 100 * sink_summary.share_of_texts(seen, place).mean("head")
            for label, place in (("position 0", "first"), ("any", "any"), ("another", "other"))
        }
        return {
            "depth": plots.lines(
                over_depth, title=phases.claim, unit="percent", quantity="heads with a sink", y_range=(0, 100),
                caption=f"{result.about} Share of each block's heads for which position 0, any key or a key other than "
                f"position 0 is a sink, {at}.",
                alt="Percentage of heads with a sink at position 0, anywhere, and elsewhere, against layer.",
            ),
            "heads": plots.heatmap(
                100 * sink_summary.share_of_texts(seen, "first"), title=rate.claim, unit="percent",
                quantity="texts in which position 0 is a sink", low=0, high=100,
                caption=f"{result.about} Share of texts in which position 0 is a sink of the head, {at}.",
                alt="Heatmap over layer and head of how often position 0 is a sink.",
            ),
            "keys": plots.lines(
                {"Sink_k": data["sink_rate_by_key"]}, title=anywhere.claim, unit="percent", y_range=(0, 100),
                caption=f"{result.about} Share of (layer, head) pairs for which the key is a sink, {at}; the last "
                f"{p['tail']} positions are left out.",
                alt="Percentage of layer and head pairs for which a key is a sink, against its position.",
            ),
            "strip": self._strip(result),
            "tokens": _tokens(result),
            "entropy": plots.lines(
                {"all keys": data["layer_entropy_nats"], "without position 0": data["layer_entropy_rest_nats"]},
                title=f"Without position 0, attention rows have {spread:+.2f} nats of entropy", unit="nats",
                quantity="mean row entropy",
                caption=f"{result.about} Mean over heads and queries from position 1 on; without it: renormalised.",
                alt="Mean attention entropy against layer, with all keys and without position 0.",
            ),
            "sweep": plots.lines(
                {"Sink_1": data["sink_rate_by_epsilon"]}, title="How the rate depends on the threshold epsilon",
                unit="percent", quantity="Sink_1", reference=(rate.value, f"epsilon = {p['epsilon']:g}"),
                y_range=(0, 100), caption=f"{result.about} T = {p['horizon']}.",
                alt="Sink rate at position 0 against the threshold epsilon.",
            ),
            **_draw_lengths(result, lengths.claim),
            **(_draw_made(result, made) if made else {}),
        }  # fmt: skip

    def _strip(self, result: Result) -> plots.TokenStrip:
        data = result.dataset
        sink, entropy = data["sink_share"].mean("layer").values, data["row_entropy_nats"].mean(("layer", "head")).values
        received, first = (data[name].mean(("layer", "head")).values for name in ("received", "first_share"))
        return plots.TokenStrip(
            title="Which tokens serve as sinks",
            tokens=tuple(map(str, data["token_str"].values)),
            texts=data["text"].values,
            quantities=(
                plots.Quantity("sink in (layer, head) pairs", "share", sink, low=0),
                plots.Quantity("mean attention received", "share", received, low=0),
                plots.Quantity("mean attention paid to position 0", "share", first, low=0, high=1),
                plots.Quantity("mean row entropy", "nats", entropy, low=0),
            ),
            caption=f"{result.about_shown} Means over all layers and heads.",
            alt="The text, each token coloured by the share of (layer, head) pairs for which it is a sink.",
        )


def _anywhere(result: Result) -> Finding:
    """Sinks at any position, and at any but position 0, at T."""
    p, data, seen = result.params.as_dict(), result.dataset, result.summary
    some, other = (estimate(seen[f"rate_{where}"].values) for where in ("any", "other"))
    n_tokens, other = p["horizon"], other.within(0, 100)
    null = 100.0 * sinks.sinks_of(sinks.uniform_received(n_tokens), p["epsilon"], p["tail"])["other"]
    by_key = np.nan_to_num(data["sink_rate_by_key"].values[1:])
    by_layer = 100 * sink_summary.share_of_texts(seen, "other").mean("head").values
    key, layer = int(by_key.argmax()) + 1, int(by_layer.argmax())
    most = f", most often position {key} ({by_key[key - 1]:.1f} %), most of all in block {layer}"
    return Finding(
        f"Some key is a sink for {some.value:.1f} % of (layer, head) pairs at T = {n_tokens}, a key other than "
        f"position 0 for {other.value:.1f} %{most if other.value else ''}.",
        other.value, "percent", float(null), "uniform causal attention", other.ci95, other.n, other.n_unit,
        {"any": some.value, "pos": key, "layer": layer, "T": n_tokens}, quantity="heads with a sink beyond position 0",
    )  # fmt: skip


def _lengths(result: Result) -> Finding:
    """The rate at the longest T, and how far it is from the one at the shortest."""
    rates, epsilon = result.summary["length_rates"], result.params.as_dict()["epsilon"]
    lengths, uniform = (rates["query"].values + 1).tolist(), result["uniform_by_length"].values
    longest, means = estimate(rates.values[-1]).within(0, 100), [round(estimate(m).value, 2) for m in rates.values]
    return Finding(
        f"Sink_1 is {means[0]:.1f} % at T = {lengths[0]} and {longest.value:.1f} % at T = {lengths[-1]}, which are not "
        f"comparable: H_T / T, the share under uniform attention, is {uniform[0]:.2f} and {uniform[-1]:.2f}.",
        longest.value, "percent", 100.0 * (uniform[-1] > epsilon), "uniform causal attention", longest.ci95, longest.n,
        longest.n_unit, {"T": lengths, "rates": means, "uniform": uniform.round(4).tolist()},
        quantity="heads with a sink at position 0, longest T",
    )  # fmt: skip


_WORDS = dict(zip(sinks.KINDS, ("natural text", "random tokens", "one repeated token"), strict=True))


def _by_case(result: Result) -> dict[str, np.ndarray]:
    return dict(zip(map(str, result["case"].values), result["made_rate"].values, strict=True))


def _made(result: Result) -> list[Finding]:
    """Natural against random and repeated texts, without and with a beginning-of-sequence token; and its effect."""
    rows = _by_case(result)
    if "natural" not in rows:
        return []
    where, found = {"T": result.dataset.attrs["made_tokens"]}, []
    for bos in ("", sinks.WITH_BOS) if "natural" + sinks.WITH_BOS in rows else ("",):
        for kind in sinks.KINDS[1:]:
            made, natural = (text_mean(rows[case + bos]) for case in (kind, "natural"))
            gap = sinks.difference(made, natural, "texts of each kind")
            found.append(Finding(
                f"{'With' if bos else 'Without'} a beginning-of-sequence token, Sink_1 is {made.value:.1f} % for "
                f"{_WORDS[kind]} and {natural.value:.1f} % for natural text (T = {where['T']}).",
                gap.value, "percentage points", 0.0, "as in natural text", gap.ci95, gap.n, gap.n_unit,
                where | {"case": kind + bos}, quantity="sinks of made minus natural texts",
            ))  # fmt: skip
    if len(found) > 2:
        change = {kind: text_mean(rows[kind + sinks.WITH_BOS] - rows[kind]) for kind in sinks.KINDS}
        it, words = change["natural"], [f"{change[k].value:+.1f} for {w}" for k, w in _WORDS.items()]
        found.append(Finding(
            f"A beginning-of-sequence token moves Sink_1 by {words[0]}, {words[1]}, {words[2]} (percentage points).",
            it.value, "percentage points", 0.0, "no effect on natural text", it.ci95, it.n, it.n_unit,
            where | {kind: e.value for kind, e in change.items()}, quantity="sinks with minus without an opening token",
        ))  # fmt: skip
    return found


def _tokens(result: Result) -> plots.Figure:
    first = int(result["text"].values[0])
    return plots.heatmap(
        result.dataset.isel(token=result["text"].values == first)["sink_share"],
        title="Which tokens are sinks, and in which layers", unit="share of heads", quantity="sink", low=0, high=1,
        caption=f"{result.about_shown} Text {first}; received attention over the whole text, tail greyed out.",
        alt="Heatmap over layer and token of the share of heads for which the token is a sink.",
    )  # fmt: skip


def _draw_lengths(result: Result, title: str) -> dict[str, plots.Drawing]:
    """The sweep over T: rates, and the mean attention that they are made of."""
    axis, epsilon = "tokens per text (T)", result.params.as_dict()["epsilon"]
    seen, uniform = result.summary, result["uniform_by_length"].values

    def curve(values: np.ndarray) -> xr.DataArray:
        return xr.DataArray(values, {axis: (seen["query"].values + 1).astype(str).astype(object)}, [axis])

    means = [estimate(row).within(0, 100) for row in seen["length_rates"].values]
    ends, rates = np.array([m.ci95 or (np.nan, np.nan) for m in means]), np.array([m.value for m in means])
    return {
        "lengths": plots.lines(
            {"position 0": curve(rates), sinks.UNIFORM: curve(100.0 * (uniform > epsilon))},
            title=title, unit="percent", quantity="Sink_1", y_range=(0, 100),
            bands={"position 0": (curve(ends[:, 0]), curve(ends[:, 1]))},
            caption=f"{result.about} Each text cut to its first T tokens; epsilon = {epsilon:g}. Band: 95 % interval.",
            alt="Sink rate at position 0 against the length of the text, beside that of uniform attention.",
        ),
        "received_lengths": plots.lines(
            {"position 0": curve((seen["length_received"] / seen["texts"]).values), sinks.UNIFORM: curve(uniform)},
            title="What position 0 receives falls with the length of the text", unit="share",
            quantity="mean attention received", reference=(epsilon, "epsilon"),
            caption=f"{result.about} Mean over (layer, head) pairs and texts; under uniform attention H_T / T.",
            alt="Mean attention received by position 0 against the length of the text, beside H_T / T.",
        ),
    }  # fmt: skip


def _draw_made(result: Result, made: list[Finding]) -> dict[str, plots.Drawing]:
    """Rates of natural, random and repeated texts, and over depth."""
    depth, means = result["made_rate_by_layer"], {c: text_mean(r).within(0, 100) for c, r in _by_case(result).items()}
    null, n = means.pop(sinks.UNIFORM).value, max(m.n for m in means.values())
    about = f"{result.about} Up to {n} sequences of T = {made[0].where['T']} tokens in each case"
    return {
        "made": plots.bars(
            {case: m.value for case, m in means.items()}, title=made[0].claim, unit="percent", quantity="Sink_1",
            intervals={case: m.ci95 or (m.value, m.value) for case, m in means.items()},
            reference=(null, sinks.UNIFORM), caption=f"{about}; whiskers: 95 % intervals over sequences.",
            alt="Sink rate of natural, random and repeated texts, with and without a beginning-of-sequence token.",
        ),
        "made_depth": plots.lines(
            {case: depth.sel(case=case, drop=True) for case in means}, title=made[1].claim, unit="percent",
            quantity="heads with a sink at position 0", y_range=(0, 100), caption=f"{about}.",
            alt="Percentage of heads with a sink at position 0 against layer, for made texts.",
        ),
    }  # fmt: skip
