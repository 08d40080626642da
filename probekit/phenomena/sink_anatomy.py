"""Sink anatomy: how sinks, massive activations and the norms of values and keys go together, and which needs which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, fmt, param, register
from probekit.core import Batch, Forward, ModelInfo
from probekit.methods import sink_cases as sc
from probekit.methods.extremes import MIN_MAGNITUDE, RATIO
from probekit.stats import Estimate, held_out_best, text_mean

_OWN, _EDITS = "as it is", ("removed", "mean", "control")
_BY_CASE, _BY_HEAD = ("case", "layer", "text"), ("layer", "head", "text")
_RHO = {
    "entry": "largest entry entering the block",
    "stream": "norm of the stream entering the block",
    "key": "key norm",
    "value": "value norm",
}
_ALSO = (  # beside the sink rate: variable, unit, words for removed, control and blocks, what it is
    ("value_ratio", "× later", "values at position 0 are {0} × as long as later ones {2} ({1} × in the control)",
     "values at position 0"),
    ("stream_ratio", "× later", "the stream at position 0 is {0} × as long as later ones {2} ({1} × in the control)",
     "stream at position 0"),
    ("loss_nats", "nats per token", "the loss is {0} nats per token ({1} in the control)", "loss"),
)  # fmt: skip
_RATE, _LOG = {"y_range": (0.0, 1.0)}, {"log_y": True}
_SHAPES: dict[str, tuple[str, str, str, dict[str, Any]]] = {  # figures by case: title, unit, quantity, axis
    "sink_rate": ("", "share of heads", "sink at position 0", _RATE),
    "at_sinks": ("Attention that goes to what were sinks", "share", "attention received", _RATE),
    "largest": ("Whether what was removed is written again", "× median", "largest entry entering", _LOG),
    "stream_ratio": ("What is left of position 0", "× later", "stream norm", {**_LOG, "reference": (1.0, "as later")}),
    "value_ratio": ("Values at position 0", "× later", "value norm", {**_LOG, "reference": (1.0, "as later")}),
}
_AT_SINKS, _SHOWN_DIMS = ("sink_share", "dim", "text"), 5


@dataclass(frozen=True)
class SinkAnatomyParams(Params):
    """Parameters of sink-anatomy."""

    epsilon: float = param(0.3, low=0.01, high=0.99, unit="share", help="Mean attention above which a key is a sink")
    horizon: int = param(64, low=4, high=4096, unit="tokens", help="Length T at which the sink rate is measured")
    tail: int = param(8, low=0, high=64, unit="tokens", help="Last positions left out of the joint view")
    min_magnitude: float = param(MIN_MAGNITUDE, low=0.0, unit="activation", help="Magnitude a massive entry exceeds")
    ratio: float = param(RATIO, low=1.0, unit="× median", help="Multiple that some entry of a phase exceeds")
    loose_ratio: float = param(
        300.0, low=1.0, unit="× median", help="Multiple that all exceed; `ratio` if that is lower"
    )
    phases: int = param(2, low=0, high=8, help="Phases intervened on at most, largest entries first; 0 for none")
    top_k: int = param(5, low=1, high=50, unit="entries", help="Largest entries looked at, per token and layer")

    @property
    def spec(self) -> sc.SinkSpec:
        """The criteria among them."""
        loose = min(self.ratio, self.loose_ratio)
        return sc.SinkSpec(self.epsilon, self.horizon, self.tail, self.min_magnitude, self.ratio, loose, self.top_k)


@register
class SinkAnatomy(Analysis):
    """Do sinks, massive activations, drained values and small keys belong together, and do sinks need the entries?

    Question:
        Per layer, head, token and channel: do the tokens that receive attention as sinks hold the massive
        entries, small values and small keys? If the massive entries are taken away, do the sinks go?

    Method:
        Attention and values of block l read the stream that leaves block l - 1, so the sinks of block l are
        held against its entries; block 0, which reads the embedding, has none. A (layer, head, token) is a
        sink if the attention received by the key, mean over the queries that see it, exceeds epsilon; the
        last `tail` positions do not count. Association: Spearman's rank correlation over the tokens of a text
        of the attention received from a head with the token's largest entry, the norm of the stream, and the
        norms of the head's key and value; mean over heads, layers and texts, with and without position 0.
        Overlap: the share of sinks on tokens with a massive entry, and of such tokens (times heads) that are
        sinks. Ratios at position 0 are its number over the mean of later positions.

        Intervention. A phase is a run of blocks after which some entry exceeds 100 and `loose_ratio` × median,
        and one of them `ratio` × median; its writer is the block in it after which the largest entry of a text
        has grown most. The entries that are massive there are set to zero after the writer, once; or to
        their mean over the other texts (same dimension; at the start of a text or later); or, as control, as
        many random other dimensions of the same tokens are set to zero. The sink rate is the share of heads for
        which position 0 is a sink on the first T tokens, in the blocks after the writer up to the first that
        no longer reads the phase. Texts in which nothing is changed do not count.

    Null:
        Correlation 0 and the overlap expected if sinks were placed on the tokens of their text at random, with
        the same counts. For interventions: the control, in the same texts.

    Known failure modes:
        Attention received and many norms have a trend over positions, which is an association too. How many
        sinks go depends on how many entries do: vary `loose_ratio` and `top_k`. What is left of the token, or
        written again, may still be large (see the figures). The control excludes effects of touching the token,
        not of a change of the same size. Zeroing may break more than sinks: compare with the mean.

    References:
        Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762, sections 3 and 4.
        Gu et al. 2025, When Attention Sink Emerges in Language Models, arXiv 2410.10781, section 3.
        Guo et al. 2024, Active-Dormant Attention Heads, arXiv 2410.13835, section 2 (drained values).
    """

    name = "sink-anatomy"
    title = "Sink anatomy"
    intervenes = True
    Params = SinkAnatomyParams
    measures = {
        "sink_share": Measure(("layer", "token"), "share", "share of heads for which the key is a sink; NaN in the tail"),
        "massive": Measure(("layer", "token"), "1", "1 if the token enters the block with a massive entry; NaN at block 0"),
        "times_median": Measure(("layer", "token"), "× median", "largest entry with which it enters; NaN at block 0"),
        "dim": Measure(("layer", "token"), "1", "dimension of that entry; -1 at block 0"),
        **{
            f"rho_{n}{rest}": Measure(_BY_HEAD, "rank correlation", f"attention received with {words}{also}; NaN if alike")
            for rest, also in (("", ""), ("_rest", ", without position 0"))
            for n, words in _RHO.items()
        },
        "sink_at_first": Measure(_BY_HEAD, "1", "1 if position 0 is a sink on the first T tokens"),
        "drain": Measure(_BY_HEAD, "× later", "‖W_O v‖ of position 0 over the mean of later ones; NaN where they are 0"),
        "gap_nats": Measure(_BY_HEAD, "nats", "score of position 0 minus those between it and the query, mean over queries"),
        "sink_rate": Measure(_BY_CASE, "share", "heads for which position 0 is a sink; NaN where nothing is changed"),
        "received": Measure(("case", "layer", "token"), "share", "attention received, mean over heads"),
        "at_sinks": Measure(_BY_CASE, "share", "mean attention that what was a sink receives; NaN without or unchanged"),
        "largest": Measure(_BY_CASE, "× median", "largest entry of the text entering the block; NaN at block 0 or unchanged"),
        "stream_ratio": Measure(_BY_CASE, "× later", "stream norm at position 0 entering the block; NaN as above"),
        "key_ratio": Measure(_BY_CASE, "× later", "key norm at position 0; NaN where keys are 0 or nothing is changed"),
        "value_ratio": Measure(_BY_CASE, "× later", "value norm at position 0; NaN where values are 0 or nothing is changed"),
        "loss_nats": Measure(("case", "text"), "nats", "mean surprisal of the next token; NaN where nothing is changed"),
    }  # fmt: skip

    def min_tokens(self, params: SinkAnatomyParams) -> int:
        """The sink rate needs T tokens, a rank correlation without position 0 four that count."""
        return max(params.horizon, params.tail + 4)

    def passes(self, params: SinkAnatomyParams, info: ModelInfo, batch: Batch) -> int:
        """The model as it is, and one pass per phase and edit; fewer where there are fewer phases."""
        return 1 + params.phases * (len(_EDITS) - (len(batch) < 2))

    def flow(self, params: SinkAnatomyParams, info: ModelInfo) -> Flow:
        """Look; then remove, average and control the entries of each phase."""
        spec = params.spec
        own = yield Forward((*spec.captures, *sc.BESIDE))
        largest = spec.largest(own)
        joint, sinks = spec.joint(own)
        cases, found = [(_OWN, _OWN, -1, -1, 0)], [spec.case(own, sinks)]
        for writer, last in spec.phases(largest, params.phases):
            for edit, patches in sc.edits(spec.entries(largest, writer), own.batch, info.d_model):
                trace = yield Forward(spec.captures, patches, why=f"massive entries after block {writer}: {edit}")
                changed = np.isin(own.batch.index, [t for p in patches for t in p.texts or ()])
                found.append(spec.case(trace, sinks, changed))
                cases.append((f"{edit} after block {writer}", edit, writer, last, len(patches)))
        names = ("case", "edit", "writer", "last", "n_entries")
        columns = zip(names, zip(*cases, strict=True), strict=True)
        coords = {n: ("case", np.array(v, dtype=object if n in ("case", "edit") else int)) for n, v in columns}
        by_case = {n: (("case", *dims), np.stack([f[n][1] for f in found])) for n, (dims, _) in found[0].items()}
        data = {**joint, **by_case}
        return xr.Dataset({name: data[name] for name in self.measures}, coords).assign_coords(own[sc.STATS].coords)

    def findings(self, result: Result) -> list[Finding]:
        """What removing does, phase by phase; then what goes together."""
        removed = [f for phase in _phases_of(result) for f in _phase_findings(result, *phase)]
        removed = removed or [_nothing_removed(result)]
        more = [_overlap(result), *(_association(result, name) for name in _RHO), _channel(result), _drain(result)]
        return [*removed, *(f for f in more if f is not None)]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Sink rates by case, everything on one axis of depth, tokens, and channels."""
        by_phase = {f"{k} after {w}": d for w, last in _phases_of(result) for k, d in _by_case(result, w, last).items()}
        return {**by_phase, **_over_depth(result), **_over_tokens(result), "channels": _channels(result)}


def _phases_of(result: Result) -> list[tuple[int, int]]:
    pairs = zip(result["writer"].values.tolist(), result["last"].values.tolist(), strict=True)
    return sorted({p for p in pairs if p[0] >= 0})


def _cases(result: Result, name: str, writer: int) -> dict[str, xr.DataArray]:
    """A number as it is and under each edit of a phase, in the texts that the edits change."""
    data, at = result[name], np.flatnonzero(result["writer"].values == writer)
    by_edit = {str(result["edit"].values[i]): data.isel(case=i) for i in at}
    changed = np.isfinite(result["loss_nats"].isel(case=at[0]))
    return {_OWN: data.isel(case=0).where(changed), **by_edit}


def _compared(result: Result, name: str, writer: int, last: int) -> dict[str, np.ndarray]:
    """Per case and text, the mean over the blocks that read the phase."""
    read = slice(writer + 1, last + 1)
    cases = _cases(result, name, writer).items()
    return {k: sc.over_layers(a.values[read] if "layer" in a.dims else a.values[None]) for k, a in cases}


def _phase_findings(result: Result, writer: int, last: int) -> list[Finding]:
    rate = _compared(result, "sink_rate", writer, last)
    of_case = zip(*(result[name].values for name in ("writer", "edit", "n_entries")), strict=True)
    n = {str(edit): int(count) for at, edit, count in of_case if at == writer}
    where: dict[str, Any] = {"layer": writer, "blocks": [writer + 1, last], "entries": n["removed"]}
    received = {k: text_mean(v) for k, v in _compared(result, "at_sinks", writer, last).items()}
    at_sinks = {f"received_{k.replace(' ', '_')}": it.value for k, it in received.items() if it.n}
    control = "control" if "control" in rate else _OWN  # no control where every dimension holds a massive entry
    own, removed, null = (text_mean(rate[k]).within(0, 1) for k in (_OWN, "removed", control))
    verdict = sc.verdict(text_mean(rate["removed"] - rate[control]), null.value)
    blocks = f"in blocks {writer + 1} to {last}"
    by_block = _curve(_cases(result, "sink_rate", writer)["removed"])[0].values[writer + 1 : last + 1]
    later = {k: text_mean(sc.over_layers(a.values[last + 1 :])) for k, a in _cases(result, "sink_rate", writer).items()}
    further = f" After these it is one of {later['removed'].value:.1%} ({later[_OWN].value:.1%} as it is)."
    further = further if later[_OWN].n else ""
    found = [
        _finding(
            f"Without the massive entries that block {writer} writes, position 0 is a sink of {removed.value:.1%} of heads "
            f"{blocks}, {by_block.min():.0%} to {by_block.max():.0%} block by block ({own.value:.1%} as it is, "
            f"{null.value:.1%} in the control): {verdict}.{further}",
            removed, "share of heads", (null.value, "other dimensions of the same tokens removed"), {**where, **at_sinks},
            "sinks without massive entries",
        )
    ]  # fmt: skip
    if "mean" in rate:
        mean = text_mean(rate["mean"]).within(0, 1)
        as_it_is = text_mean(np.where(np.isfinite(rate["mean"]), rate[_OWN], np.nan)).value
        claim = f"With their mean over other texts instead ({n['mean']} entries), it is a sink of {mean.value:.1%} of heads."
        was = as_it_is, "the model as it is"
        found.append(_finding(claim, mean, "share of heads", was, where, "sinks with massive entries at their mean"))
    for name, unit, words, what in _ALSO:
        cases = _compared(result, name, writer, last)
        it, other = text_mean(cases["removed"]), text_mean(cases[control]).value
        claim = f"Without the entries of block {writer}, {words.format(fmt(it.value), fmt(other), blocks)}."
        quantity = f"{what} without massive entries"
        found += [_finding(claim, it, unit, (other, "the control"), where, quantity)] if it.n else []
    return found


def _finding(claim: str, it: Estimate, unit: str, null: tuple[float, str], where: dict[str, Any], what: str) -> Finding:
    return Finding(claim, it.value, unit, *null, it.ci95, it.n, it.n_unit, where, quantity=what)


def _nothing_removed(result: Result) -> Finding:
    p = result.params.as_dict()
    rate = text_mean(sc.over_layers(result["sink_rate"].values[0])).within(0, 1)
    uniform = float(np.mean(1 / np.arange(1, p["horizon"] + 1)) > p["epsilon"])
    none = f"No entry that a later block reads is above {p['min_magnitude']:g} and {p['ratio']:g} × median"
    claim = f"{none if p['phases'] else 'Nothing was changed'}; position 0 is a sink of {rate.value:.1%} of heads."
    return _finding(claim, rate, "share of heads", (uniform, "uniform causal attention"), {}, "sinks at position 0")


def _overlap(result: Result) -> Finding | None:
    share, massive, pos = (result[n].values for n in ("sink_share", "massive", "pos"))
    (it, null, back), (rest, rest_null, _) = (sc.overlap(share, massive, pos, first) for first in (0, 1))
    if not it.n or not np.nansum(massive):
        return None
    chance = f"; without position 0 {rest.value:.1%}, {rest_null:.1%} by chance"
    without = chance if rest.n else "; no other token is a sink"
    return _finding(
        f"{it.value:.1%} of sinks (layer, head, token) are on a token that enters the block with a massive entry, "
        f"{null:.1%} by chance{without}. Such a token is a sink of {back:.1%} of heads.",
        it, "share of sinks", (null, "sinks at random tokens of the text"), {"back": back},
        "sinks on tokens with a massive entry",
    )  # fmt: skip


def _association(result: Result, name: str) -> Finding | None:
    rest, every = (text_mean(sc.over_layers(result[f"rho_{name}{end}"].values)) for end in ("_rest", ""))
    claim = (
        f"Among later positions, attention received and {_RHO[name]} have a rank correlation of {rest.value:+.2f} "
        f"({every.value:+.2f} with position 0)."
    )
    null, what = (0.0, "tokens permuted within their text"), f"attention received against {_RHO[name]}"
    return _finding(claim, rest.within(-1, 1), "rank correlation", null, {"quantity": name}, what) if rest.n else None


def _channel(result: Result) -> Finding | None:
    at_sinks, elsewhere = sc.largest_dims(*(result[n].values for n in _AT_SINKS))
    best, held = held_out_best(at_sinks)
    it, null = text_mean(held).within(0, 1), text_mean(elsewhere[:, best]).value
    claim = f"The largest entry of a sink is in dimension {best} in {it.value:.0%} of (layer, head, token), at other tokens in {null:.0%}."
    where, quantity = {"dim": best}, "sinks whose largest entry is in one dimension"
    return _finding(claim, it, "share of sinks", (null, "tokens that are no sink"), where, quantity) if it.n else None


def _drain(result: Result) -> Finding | None:
    at = result["drain"].where(result["sink_at_first"] > 0).values
    it = text_mean(sc.over_layers(at))
    claim = f"Where position 0 is a sink, its value adds to the stream, per attention, {fmt(it.value)} × what later ones would."
    quantity = "what a sink's value adds to the stream"
    return _finding(claim, it, "× later", (1.0, "positions alike"), {"pos": 0}, quantity) if it.n else None


def _curve(array: xr.DataArray) -> tuple[xr.DataArray, tuple[xr.DataArray, xr.DataArray]]:
    """Mean over texts of an array of layer and text, with its interval."""
    means = [text_mean(row) for row in array.values]
    ends = np.array([m.ci95 or (np.nan, np.nan) for m in means])
    layers = {"layer": array["layer"].values}
    mean, low, high = (xr.DataArray(v, layers, ("layer",)) for v in ([m.value for m in means], ends[:, 0], ends[:, 1]))
    return mean, (low, high)


def _by_case(result: Result, writer: int, last: int) -> dict[str, plots.Figure]:
    """The same number over depth as it is and under each edit."""
    main = _phase_findings(result, writer, last)[0]
    drawn = {}
    for name, (title, unit, quantity, axis) in _SHAPES.items():
        found = {k: _curve(a) for k, a in _cases(result, name, writer).items()}
        drawn[name] = plots.lines(
            {k: c for k, (c, _) in found.items()}, bands={k: b for k, (_, b) in found.items()}, title=title or main.claim,
            unit=unit, quantity=quantity, caption=f"{result.about} {main.where['entries']} massive entries after block {writer} removed, set to "
            "their mean over other texts, or as many other dimensions removed (control). Mean over texts, bands: 95 % "
            "intervals.", alt=f"{quantity} against layer, as it is and under each edit.", **axis,
        )  # fmt: skip
    return drawn


def _over_depth(result: Result) -> dict[str, plots.Drawing]:
    """The model as it is: every quantity of a block over the same axis of depth."""
    own = result.dataset.isel(case=0)
    heads = {name: _curve(result[name].mean("head")) for name in ("drain", "gap_nats")}
    rho = {words: _curve(result[f"rho_{name}_rest"].mean("head")) for name, words in _RHO.items()}
    rate, at_first = _curve(own["sink_rate"]), f"{result.about} Mean over texts; bands: 95 % intervals."
    ratios = {
        "largest entry ÷ median, entering": _curve(own["largest"]),
        "norm of the stream, entering": _curve(own["stream_ratio"]),
        "key norm": _curve(own["key_ratio"]),
        "value norm": _curve(own["value_ratio"]),
        "value through W_O": heads["drain"],
    }
    return {
        "sinks": plots.lines(
            {"heads": rate[0]}, bands={"heads": rate[1]}, title="Sinks at position 0 over depth", unit="share of heads",
            quantity="sink at position 0", y_range=(0.0, 1.0), caption=at_first, alt="Sink rate against layer.",
        ),
        "ratios": plots.lines(
            {k: c for k, (c, _) in ratios.items()}, title="Position 0 over later positions, block by block", unit="ratio",
            quantity="position 0 over later ones", log_y=True, reference=(1.0, "as later positions"),
            caption=f"{result.about} Mean over texts. Entry and stream are those that the block reads; the largest entry "
            "is that of any token, over the median of the layer.",
            alt="Ratios of entry, stream, key, value and output norm against layer, logarithmic.",
        ),
        "gap": plots.lines(
            {"gap": heads["gap_nats"][0]}, bands={"gap": heads["gap_nats"][1]}, reference=(0.0, "no preference"),
            title="How far scores on position 0 exceed the others", unit="nats", quantity="score on position 0, excess",
            caption=at_first, alt="Gap between the score of position 0 and the other scores against layer.",
        ),
        "association": plots.lines(
            {k: c for k, (c, _) in rho.items()}, bands={k: b for k, (_, b) in rho.items()}, reference=(0.0, "tokens permuted"), y_range=(-1.0, 1.0),
            title="What goes with attention received, without position 0", unit="rank correlation",
            quantity="with attention received", caption=at_first, alt="Rank correlations against layer.",
        ),
        "drain": plots.heatmap(
            result["drain"].mean("text"), scale="log", title="Which heads drain the value of position 0", unit="× later",
            quantity="value through W_O", caption=f"{result.about} Position 0 over the mean of later ones, mean over texts.",
            alt="Heatmap over layer and head of the output norm of position 0 relative to later positions.",
        ),
    }  # fmt: skip


def _over_tokens(result: Result) -> dict[str, plots.Drawing]:
    data, text = result.dataset, result["text"].values
    one = data.isel(token=text == text[0])
    about = f"{result.about} Text {text[0]}; the row is the block that reads the entry and holds the sink."
    sink, entry = data["sink_share"].mean("layer").values, data["times_median"].max("layer").values
    top = data["dim"].values[data["times_median"].fillna(0).argmax("layer").values, np.arange(len(text))]
    return {
        "sink tokens": plots.heatmap(
            one["sink_share"], title="Which tokens are sinks, block by block", unit="share of heads", quantity="sink",
            low=0, high=1, caption=f"{about} The tail is grey.", alt="Heatmap over layer and token of the share of heads.",
        ),
        "entry tokens": plots.heatmap(
            one["times_median"], title="Which tokens enter a block with large entries", unit="× median", scale="log",
            quantity="largest entry", caption=about, alt="Heatmap over layer and token of the largest entry.",
        ),
        "strip": plots.TokenStrip(
            title="Sinks and the entries they carry", tokens=tuple(map(str, data["token_str"].values)), texts=text,
            quantities=(
                plots.Quantity("sink in (layer, head) pairs", "share", sink, low=0),
                plots.Quantity("largest entry at any block", "× median", entry, "log"),
            ),
            caption=f"{result.about} Hover for the dimension of the token's largest entry.",
            alt="The text, each token coloured by how often it is a sink, or by its largest entry.",
            notes=tuple(f"dimension {d}" for d in top.tolist()),
        ),
    }  # fmt: skip


def _channels(result: Result) -> plots.Figure:
    """The dimensions that most often hold the largest entry of a sink, and in which blocks."""
    share, dim, text = (result[name].values for name in _AT_SINKS)
    at_sinks = np.nan_to_num(sc.over_layers(sc.largest_dims(share, dim, text)[0]))
    most = np.argsort(-at_sinks, kind="stable")[:_SHOWN_DIMS]
    top = np.sort(most[at_sinks[most] > 0] if at_sinks.any() else most)
    coords = {"layer": result["layer"].values, "d_model": top}
    return plots.heatmap(
        xr.DataArray(sc.dims_by_layer(share, dim, text, top), coords, ("layer", "d_model")),
        x_labels=[str(d) for d in top], title="Which dimensions hold the largest entry of sinks, block by block",
        unit="share of sinks", quantity="largest entry here", caption=f"{result.about} Share of all (layer, head, token) "
        "that are sinks, mean over texts; the row is the block that reads the entry and holds the sink.",
        alt="Heatmap over layer and dimension of the share of sinks whose largest entry is there.",
    )  # fmt: skip
