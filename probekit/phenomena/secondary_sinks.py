"""Secondary sinks: tokens whose residual stream turns, for some of the depth, into the direction of the primary sink."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, fmt, param, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.methods.sink_levels import NOISE, PRIMARY_LIKE, REFERENCES, SECONDARY, Labels, Streams, Table, tabulate
from probekit.reduce import AttentionStats, BlockNorms, CosineTo, MlpAlignment, Norm
from probekit.stats import text_mean

KINDS = {SECONDARY: "secondary sinks", PRIMARY_LIKE: "primary-like tokens", NOISE: "noise"}
TAIL = 8  # keys that fewer queries see have no reliable mean
THRESHOLDS = np.round(np.arange(0.5, 0.96, 0.05), 2)


@dataclass(frozen=True)
class SecondaryParams(Params):
    """Parameters of secondary-sinks."""

    n_first: int = param(
        2, low=1, high=8, unit="tokens", help="First positions that can be the primary sink; 3 for a chat template"
    )
    cosine: float = param(
        0.9, low=0.0, high=1.0, unit="|cosine|", help="Cosine with the primary that a sink-like token exceeds"
    )
    stands_out: float = param(
        3.2, low=1.0, unit="× median", help="Norm of the primary, over the other tokens' median, inside a window"
    )
    primary_like: float = param(
        0.6, low=0.0, high=1.0, unit="share", help="Share of a window from which a sink-like token is primary-like"
    )
    least: float = param(
        0.1, low=0.0, high=1.0, unit="share", help="Share of a window below which a sink-like token is noise"
    )


@register
class SecondarySinks(Analysis):
    """Which tokens turn into the direction of the primary sink midway, in which layers, and what puts them there?

    Question:
        Are there tokens after the primary sink whose residual stream is, over a stretch of layers, parallel to the
        primary's; after which block does that begin, how long does it last, does the block's MLP write it, and does
        the primary lose attention meanwhile?

    Method:
        h_t^l is the raw residual stream of token t after block l. The primary b of a text is the position, among its
        first `n_first`, with the largest norm in the mean over layers (as published). A window is a maximal run of at
        least two layers in which ||h_b^l|| > 3.2 × the median of ||h_t^l|| over the text's other tokens. The factor
        is 1 / sqrt(1 - cosine): two tokens that share a direction and have unrelated remainders of ordinary length
        do not reach a cosine of 0.9 below it. The published window is given beside: with D_l = ||h_b^{l+1}|| -
        ||h_b^l||, it starts at argmax D + 1 and ends before start + argmin D[start:] + 1. It is a single one, and
        misses the first of two phases.
        Token t > b is sink-like after block l of a window if |cos(h_t^l, h_b^l)| > 0.9, strictly. Its level is the
        first such layer and its lifetime, the number of such layers in the window. The published labels count
        layers (15 and 4) and fit no shallow model; here a lifetime of 0.6 of the window or more is primary-like; one
        of 0.1 to 0.6, of two layers or more, and begun after the window's first layer is secondary; the rest is
        noise. A token counts once in each window. Attention received is the mean of A[q, k] over the queries that
        see k (arXiv 2410.10781) and over heads, an assumption of ours: the paper's own measure of sink strength
        could not be checked. Sums over tokens leave out those that fewer than 8 queries see.

    Null:
        The same rule in the same windows, with an ordinary token (the last, third and fifth from the end, averaged)
        in place of the primary, over tokens t > b that do not repeat it, scaled to as many: in a model whose tokens all
        point the same way it counts as many. Independent Gaussian streams have no window. The published control, other
        occurrences of the same token ids that are not sink-like, is compared at the layer of creation; the MLP's
        output is compared with that of the layer's other tokens.

    Known failure modes:
        A high cosine says that a token carries the same massive dimensions, not that heads attend to it. Tokens that
        occur in most of a text raise the median and shrink windows. The last layer is the raw stream here and not
        the normed one, so published windows can end later. Short windows give coarse lifetimes.

    References:
        Wong et al. 2025, On the Existence and Behaviour of Secondary Attention Sinks, arXiv 2512.22213.
        Gu et al. 2025, When Attention Sink Emerges in Language Models, arXiv 2410.10781, section 3.
    """

    name = "secondary-sinks"
    title = "Secondary sinks"
    Params = SecondaryParams
    measures = {
        "cosine": Measure(("layer", "token"), "cosine", "cosine with the stream of the text's primary sink"),
        "mlp_to_primary": Measure(("layer", "token"), "cosine", "cosine of the MLP's output with the primary's stream"),
        "mlp_norm": Measure(("layer", "token"), "activation", "norm of what the MLP adds to the stream"),
        "received": Measure(("layer", "token"), "share", "attention received, mean over seeing queries and heads"),
        "created": Measure(("case", "token"), "layer", "first sink-like layer in each window; -1 without any"),
        "lifetime": Measure(("case", "token"), "layers", "number of sink-like layers in each window"),
        "kind": Measure(("case", "token"), "1", "0 never sink-like, 1 noise, 2 secondary, 3 primary-like"),
        "start": Measure(("case", "text"), "layer", "first layer of each window; -1 where the text has fewer"),
        "end": Measure(("case", "text"), "layer", "layer after the window's last; -1 where the text has fewer"),
        "primary_pos": Measure(("text",), "1", "position of the primary sink"),
        "primary_norm": Measure(("layer", "text"), "activation", "norm of the primary's stream"),
        "median_norm": Measure(("layer", "text"), "activation", "median norm over the text's other tokens"),
        "primary_received": Measure(("layer", "text"), "share", "attention that the primary receives"),
        "secondary_received": Measure(("layer", "text"), "share", "sum over the text's secondary sinks; 0 without any"),
        "primary_like_received": Measure(("layer", "text"), "share", "sum over its primary-like tokens; 0 without any"),
        "n_secondary": Measure(("text",), "tokens", "secondary sinks of the text, over its windows"),
        "n_primary_like": Measure(("text",), "tokens", "primary-like tokens of the text, over its windows"),
        "null_secondary": Measure(("text",), "tokens", "the same with an ordinary token as the primary"),
        "null_primary_like": Measure(("text",), "tokens", "the same with an ordinary token as the primary"),
        "n_by_cosine": Measure(("threshold",), "tokens per text", "secondary and primary-like, by cosine"),
        "null_by_cosine": Measure(("threshold",), "tokens per text", "the same with an ordinary token as the primary"),
    }

    def min_tokens(self, params: SecondaryParams) -> int:
        """The primary's candidates, and the tokens that stand in for it in the null."""
        return params.n_first + 1 - min(REFERENCES)

    def observe(self, params: SecondaryParams, info: ModelInfo) -> Forward:
        """Norms, cosines with each candidate and with ordinary tokens, MLP outputs, attention received."""
        places = (*range(params.n_first), *REFERENCES)
        stream = [Norm(), BlockNorms(), *map(CosineTo, places), *map(MlpAlignment, range(params.n_first))]
        return Forward((*(Capture("resid_post", r) for r in stream), Capture("pattern", AttentionStats())))

    def compute(self, trace: Trace, params: SecondaryParams) -> xr.Dataset:
        """Primaries, windows, levels, and the same for ordinary tokens."""
        batch, first = trace.batch, range(params.n_first)
        norm = trace[Capture("resid_post", Norm())]["norm"]
        attention = trace[Capture("pattern", AttentionStats())]
        places = [slice(a, a + n) for a, n in zip(batch.starts, batch.lengths, strict=True)]
        primary = [int(norm.values[:, s][:, : params.n_first].mean(axis=0).argmax()) for s in places]
        own = np.repeat(primary, batch.lengths)[None, None]
        candidates = np.stack([trace[Capture("resid_post", CosineTo(p))]["cosine"].values for p in first])
        written = np.stack([trace[Capture("resid_post", MlpAlignment(p))]["mlp_to_stream"].values for p in first])
        others = np.stack([np.abs(trace[Capture("resid_post", CosineTo(p))]["cosine"].values) for p in REFERENCES])
        cosine = np.take_along_axis(candidates, own, axis=0)[0]
        texts = [
            Streams(np.abs(cosine[:, s]), others[:, :, s], norm.values[:, s], batch.ids[s], b, params.stands_out)
            for s, b in zip(places, primary, strict=True)
        ]
        labels = Labels(params.primary_like, params.least)
        counts = np.stack([t.counts(t.windows, params.cosine, labels) for t in texts]).reshape(-1, 4)
        sweep = np.array([[t.counts(t.windows, c, labels).sum(axis=1) for t in texts] for c in THRESHOLDS.tolist()])
        levels = tabulate(texts, params.cosine, labels)
        received = attention["received"].mean("head").values
        reliable = np.where(attention["seen"].values >= TAIL, received, 0.0)
        kind = levels["kind"][1][:-1]  # without the published window
        sums = {k: np.where((kind == k).any(axis=0), reliable, 0.0) for k in (SECONDARY, PRIMARY_LIKE)}
        at = np.asarray(batch.starts) + primary
        per_text = {
            "primary_norm": norm.values[:, at],
            "median_norm": np.stack([t.median for t in texts], axis=1),
            "primary_received": received[:, at],
            "secondary_received": np.add.reduceat(sums[SECONDARY], batch.starts, axis=1),
            "primary_like_received": np.add.reduceat(sums[PRIMARY_LIKE], batch.starts, axis=1),
        }
        names = ("n_secondary", "n_primary_like", "null_secondary", "null_primary_like")
        per_token = {
            "cosine": cosine,
            "mlp_to_primary": np.take_along_axis(written, own, axis=0)[0],
            "mlp_norm": trace[Capture("resid_post", BlockNorms())]["mlp_norm"].values,
            "received": received,
        }
        cases = [*(f"window {i + 1}" for i in range(len(kind))), "published"]
        return xr.Dataset(
            {name: (("layer", "token"), values) for name, values in per_token.items()}
            | levels
            | {"primary_pos": ("text", primary)}
            | {name: (("layer", "text"), values) for name, values in per_text.items()}
            | {name: ("text", counts[:, i]) for i, name in enumerate(names)}
            | {f"{name}_by_cosine": ("threshold", sweep[..., i].mean(axis=1)) for i, name in enumerate(("n", "null"))},
            coords={**norm.coords, "case": np.array(cases, dtype=object), "threshold": THRESHOLDS},
        )

    def findings(self, result: Result) -> list[Finding]:
        """Secondary sinks, primary-like tokens, windows, alignment, the primary midway, the same ids elsewhere."""
        always = [_counted(result, SECONDARY), _counted(result, PRIMARY_LIKE), _windows(result), _midway(result)]
        kinds = sorted((SECONDARY, PRIMARY_LIKE), key=lambda k: always[k - SECONDARY].value, reverse=True)
        return [*always, *(f for kind in kinds for f in _made(result, kind))]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Cosines of one text, norm and attention over depth, the sweep, levels, what the MLPs write, the text."""
        secondary, like, windows, midway, *more = result.findings
        drawn: dict[str, plots.Drawing] = {
            "cosines": _cosine_figure(result, secondary.claim),
            "norm": _norm_figure(result, windows.claim),
            "strength": _strength_figure(result, midway.claim),
            "sweep": plots.lines(
                {"the primary": result["n_by_cosine"], "an ordinary token": result["null_by_cosine"]},
                title="How the number of sink-like tokens depends on the cosine",
                unit="tokens per text",
                quantity="secondary and primary-like",
                caption=f"{result.about} Cosines with the primary, and with an ordinary token in its place. "
                f"The findings are at {result.params.as_dict()['cosine']:g}.",
                alt="Number of secondary and primary-like tokens per text against the cosine threshold.",
            ),
        }
        if Table(result.dataset).carriers:
            drawn["levels"] = _level_figure(result, max(secondary, like, key=lambda f: f.value).claim)
        if more:
            drawn["alignment"] = _alignment_figure(result, more[0].claim)
        return drawn | {"strip": _strip(result)}


def _counted(result: Result, kind: int) -> Finding:
    """How many tokens of a kind a text has, with their levels, against an ordinary token in the primary's place."""
    data, name = result.dataset, "secondary" if kind == SECONDARY else "primary_like"
    count, null = text_mean(data[f"n_{name}"].values), float(data[f"null_{name}"].mean())
    levels = Table(data).levels(kind)
    top = ", ".join(f"{x['tokens']} from block {x['layer']} for {x['lifetime']} layers" for x in levels[:3])
    lost = f", no more than with an ordinary token as the primary ({fmt(null)})" if count.value <= null else ""
    claim = (
        f"A text has {fmt(count.value)} {KINDS[kind]}{lost}, at {len(levels)} level{'s' * (len(levels) != 1)}: {top}."
        if levels
        else f"No text has {KINDS[kind]}{_nearest(data)}."
    )
    return Finding(
        claim, count.value, "tokens per text", null, "an ordinary token in the primary's place",
        count.within(0, np.inf).ci95, count.n, count.n_unit, {"levels": levels}, quantity=KINDS[kind],
    )  # fmt: skip


def _nearest(data: xr.Dataset) -> str:
    """The largest |cosine| inside each window of a token that is not primary-like, in words."""
    table, said = Table(data), []
    for case in range(data.sizes["case"] - 1):
        rest = table.after_primary & (data["kind"].values[case] != PRIMARY_LIKE)
        within = table.inside(case, data.sizes["layer"])[:, table.rows] & rest
        if within.any():
            largest = np.abs(data["cosine"].values[within]).max()
            said.append(f"{largest:.2f} in blocks {table.span(case)}")
    return f": of other tokens, the largest |cosine| with the primary is {' and '.join(said)}" if said else ""


def _windows(result: Result) -> Finding:
    data, table = result.dataset, Table(result.dataset)
    count = text_mean((data["start"][:-1] >= 0).sum("case").values.astype(float))
    *own, published = (table.span(case) for case in range(data.sizes["case"]))
    stands = f"of the primary sink stands out in blocks {' and '.join(own)}" if own else "of no first token stands out"
    return Finding(
        f"The norm {stands}; the published window is {published}.",
        count.value, "windows per text", 0.0, "Gaussian streams: none", count.ci95, count.n, count.n_unit,
        {"windows": own, "published": published}, quantity="windows in which the first token's norm stands out",
    )  # fmt: skip


def _midway(result: Result) -> Finding:
    middle, outer = Table(result.dataset).thirds(result["primary_received"].values)
    change = text_mean(middle - outer)
    where = "its longest window" if result.dataset.sizes["case"] > 1 else "the layers"
    return Finding(
        f"In the middle third of {where} the primary sink receives {middle.mean():.2f} of the attention, "
        f"in the outer thirds {outer.mean():.2f}.",
        change.value, "share", 0.0, "as much in the middle as before and after", change.ci95, change.n, change.n_unit,
        {"middle": float(middle.mean()), "outer": float(outer.mean())},
        quantity="attention on the primary sink, middle minus outer thirds",
    )  # fmt: skip


def _made(result: Result, kind: int) -> list[Finding]:
    """What the MLPs of creating blocks write, and the published control; nothing where there are no such tokens."""
    table, name = Table(result.dataset), KINDS[kind]
    found = []
    own, rest = table.contrast(kind, result["mlp_to_primary"].values)
    change = text_mean(own - rest)
    if change.n:
        large, small = (float(np.nanmean(x)) for x in table.contrast(kind, result["mlp_norm"].values))
        times = large / max(small, 1e-30)
        claim = (
            f"At {name}, what the MLP of the creating block writes has |cosine| {np.nanmean(own):.2f} with the "
            f"primary, at the text's ordinary tokens {np.nanmean(rest):.2f}; it is {fmt(times)} × as long."
        )
        null, where = "the text's ordinary tokens in that layer", {"times_norm": times}
        found.append(Finding(claim, change.value, "|cosine|", 0.0, null, change.ci95, change.n, change.n_unit, where,
                             quantity=f"alignment of MLP output with the primary, {name}"))  # fmt: skip
    own, rest = table.contrast(kind, result["cosine"].values, same_id=True)
    change = text_mean(own - rest)
    if change.n:
        claim = (
            f"When created, {name} have |cosine| {np.nanmean(own):.2f} with the primary; other occurrences of the same "
            f"token ids have {np.nanmean(rest):.2f}."
        )
        null = "same ids where they are not sink-like, in that layer"
        found.append(Finding(claim, change.value, "|cosine|", 0.0, null, change.ci95, change.n, change.n_unit,
                             quantity=f"alignment beyond that of the same ids, {name}"))  # fmt: skip
    return found


def _cosine_figure(result: Result, title: str) -> plots.Figure:
    data = result.dataset
    row = int(np.lexsort((data["n_primary_like"].values, data["n_secondary"].values))[-1])
    one = data.isel(token=Table(data).rows == row)
    return plots.heatmap(
        one["cosine"],
        title=title,
        unit="cosine",
        quantity="cosine with the primary",
        scale="diverging",
        low=-1,
        high=1,
        caption=f"{result.about} Text {int(one['text'][0])}, one with the most such tokens; its primary is position "
        f"{int(data['primary_pos'][row])}.",
        alt="Heatmap over layer and token of the cosine with the primary sink's residual stream.",
    )


def _norm_figure(result: Result, title: str) -> plots.Figure:
    factor = result.params.as_dict()["stands_out"]
    return plots.lines(
        {
            "primary sink": result["primary_norm"].mean("text"),
            "other tokens, median": result["median_norm"].mean("text"),
        },
        title=title,
        unit="activation",
        quantity="norm of the stream",
        log_y=True,
        caption=f"{result.about} Means over texts. In a window the primary exceeds {factor:g} × the median.",
        alt="Norm of the primary sink and median norm of the other tokens against layer, logarithmic.",
    )


def _strength_figure(result: Result, title: str) -> plots.Figure:
    means = {name: result[f"{name}_received"].mean("text") for name in ("primary", "secondary", "primary_like")}
    inside = Table(result.dataset).inside_any(result.dataset.sizes["layer"]).mean(axis=1)
    return plots.lines(
        {
            "primary sink": means["primary"],
            "secondary, sum": means["secondary"],
            "primary-like, sum": means["primary_like"],
            "texts in a window": means["primary"].copy(data=inside),
        },
        title=title,
        unit="share",
        quantity="attention received",
        y_range=(0, 1.1),
        caption=f"{result.about} Means over heads and texts. The last curve marks the windows: the share of texts for "
        "which the layer lies in one.",
        alt="Attention received by the primary sink and by sink-like tokens, and the windows, against layer.",
    )


def _level_figure(result: Result, title: str) -> plots.Figure:
    found = {name: levels for kind, name in KINDS.items() if (levels := Table(result.dataset).levels(kind))}
    return plots.scatter(
        {n: (np.array([x["depth"] for x in some]), np.array([x["share"] for x in some])) for n, some in found.items()},
        title=title,
        unit="share",
        x_quantity="depth of creation, first block to last",
        y_quantity="lifetime within the window",
        hover={
            n: [f"{x['tokens']} tokens: {' '.join(map(plots.visible, x['examples']))}" for x in some]
            for n, some in found.items()
        },
        caption=f"{result.about} One point per level; hover for its tokens.",
        alt="Lifetime of sink-like tokens, as a share of the window, against the depth at which they are created.",
    )


def _alignment_figure(result: Result, title: str) -> plots.Figure:
    written, table = abs(result["mlp_to_primary"]), Table(result.dataset)
    curves: dict[str, xr.DataArray] = {}
    for kind in (SECONDARY, PRIMARY_LIKE):
        tokens, made = table.of_kind(kind), np.full(written.sizes["layer"], np.nan)
        for layer in {c.created for c in tokens}:
            made[layer] = written.values[layer, [c.token for c in tokens if c.created == layer]].mean()
        curves |= {f"{KINDS[kind]}, created here": written[:, 0].copy(data=made)} if tokens else {}
    primary = result["pos"].values == result["primary_pos"].values[table.rows]
    curves |= {"the primary itself": written[:, primary].mean("token")}
    return plots.lines(
        curves | {"ordinary tokens": written[:, table.ordinary].mean("token")},
        title=title,
        unit="|cosine|",
        quantity="MLP output with the primary",
        y_range=(0, 1.25),
        caption=f"{result.about} Means over tokens.",
        alt="Cosine of the MLP's output with the primary's stream against layer, by group of tokens.",
    )


def _strip(result: Result) -> plots.TokenStrip:
    data, table = result.dataset, Table(result.dataset)
    inside = table.inside_any(data.sizes["layer"])[:, table.rows]
    largest = np.where(inside, np.abs(data["cosine"].values), -1.0).max(axis=0)
    life, notes = np.zeros(len(largest)), [""] * len(largest)
    for c in table.carriers:
        life[c.token] = max(life[c.token], c.share)
        notes[c.token] = f"{notes[c.token]} {KINDS[c.kind]}, from block {c.created}, {c.lifetime} layers".strip()
    received = data["received"].mean("layer").values
    return plots.TokenStrip(
        title="Which tokens take the direction of the primary sink",
        tokens=tuple(map(str, data["token_str"].values)),
        texts=data["text"].values,
        quantities=(
            plots.Quantity("largest |cosine| in a window", "|cosine|", np.where(largest < 0, np.nan, largest), low=0),
            plots.Quantity("longest lifetime", "share of the window", life, low=0, high=1),
            plots.Quantity("attention received, mean over layers", "share", received, low=0),
        ),
        caption=f"{result.about} Hover for a token's level. The primary's own cosine is 1.",
        alt="The text, each token coloured by its largest cosine with the primary sink inside a window.",
        notes=tuple(notes),
    )
