"""Massive activations: single entries of the residual stream, thousands of times larger than the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, Statistic, fmt, param, register
from probekit.core import Batch, Capture, Forward, InputError, ModelInfo, Trace
from probekit.methods import extremes, massive_summary
from probekit.reduce import BlockNorms, MedianMagnitude, NextToken, Norm, TopMagnitudes
from probekit.stats import Estimate, estimate, text_mean, token_mean

_LOSS = Capture("logits", NextToken())  # what token-uncertainty looks at by default, so that both share it
_BLOCKS = Capture("resid_post", BlockNorms())


@dataclass(frozen=True)
class MassiveParams(Params):
    """Parameters of massive-activations."""

    min_magnitude: float = param(100.0, low=0.0, unit="activation", help="Magnitude that a massive entry exceeds")
    ratio: float = param(1000.0, low=1.0, unit="× median", help="Multiple of the layer's median that it exceeds")
    loose_ratio: float = param(
        500.0, low=1.0, unit="× median", help="The looser multiple, reported beside the strict one"
    )
    top_k: int = param(5, low=1, high=50, unit="entries", help="Largest entries kept for each token and layer")
    intervene: bool = param(False, help="Whether massive entries are also set to zero and to their mean (4 passes)")
    at_block: int = param(
        -1, low=-1, help="Block whose massive entries are set; -1 for the first after which half of the texts hold one"
    )


@register
class MassiveActivations(Analysis):
    """Which single entries of the residual stream dwarf all others, which blocks write them, and are they needed?

    Question:
        Are there entries of the residual stream that are orders of magnitude larger than the rest;
        at which tokens and dimensions; which block writes them and which take them down; and does
        the model need them?

    Method:
        After every block (raw residual stream, before any final norm), the largest magnitudes of
        each token with their dimension, and the median of |h| over all tokens and dimensions of the
        text. An entry is massive if |h| > 100 and |h| > 1000 × that median; the paper says "at
        least or around", so a looser multiple is counted beside it. The text's largest entry (token,
        dimension) is followed through depth: its writer is the block after which its magnitude has
        grown most; a block erases if it takes away at least a tenth of the peak. Where the entry is
        not among the token's largest, it is unknown and at most as large as the smallest kept.
        Tokens are told apart as the paper does: first position, first delimiter (a full stop or
        newlines), further delimiters, special tokens, others.
        With `intervene`, four more passes: at one block, every massive entry is set to zero, or to
        its mean over the other texts, sign included (entries at the first position and later ones
        apart, by dimension), and the pass goes on. Controls: as many entries of the same tokens in
        random dimensions, and the same dimensions at random tokens, set to zero. The loss is -ln p
        of every token that follows, all of them weighing the same; perplexity is exp(mean loss),
        over the tokens that are predicted. The unchanged loss is part of the only pass by default.

    Null:
        Independent Gaussian entries of the same median: the largest of n has an expected magnitude
        of about 7 to 8 medians at the sizes here, and no entry is massive. A carrier at any position
        alike is at the first one in 1 of n. Of the intervention: the larger change of the two
        controls; entries matter if the loss exceeds that of both controls by more than its interval.

    Known failure modes:
        Presence is not function: in GPT-2, phi-2 and OPT setting the entries to zero changes nothing.
        The first block that holds them need not be the one where they matter. Only entries among each
        token's `top_k` largest are found. Quantised weights shift values by a few percent. With a
        beginning-of-sequence token other tokens and dimensions carry them. Half precision overflows
        above 65,504. With few texts the mean over the others is a poor constant.

    References:
        Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762, sections 2, 3.
        Owen et al. 2025, A Refined Analysis of Massive Activations in LLMs, arXiv 2503.22329.
    """

    name = "massive-activations"
    title = "Massive activations"
    Params = MassiveParams
    measures = {
        "norm": Measure(("layer", "token"), "activation", "Euclidean norm of the residual stream"),
        "value": Measure(("layer", "token", "rank"), "activation", "the token's largest entries, signed, largest first"),
        "dim": Measure(("layer", "token", "rank"), "1", "dimensions of these entries"),
        "median": Measure(("layer", "text"), "activation", "median magnitude over all tokens and dimensions of the text"),
        "times_median": Measure(("layer", "token"), "× median", "the token's largest magnitude over its text's median"),
        "n_massive": Measure(("layer",), "entries per text", "entries that pass the strict criterion"),
        "n_massive_loose": Measure(("layer",), "entries per text", "entries that pass with the looser multiple"),
        "peak_pos": Measure(("text",), "1", "position of the text's largest entry"),
        "peak_dim": Measure(("text",), "1", "dimension of the text's largest entry"),
        "peak_layer": Measure(("text",), "layer", "layer at which that entry is largest"),
        "peak_path": Measure(("layer", "text"), "activation", "that entry through depth; NaN where unknown"),
        "writer": Measure(("text",), "layer", "block after which that entry has grown most"),
        "writer_mlp_share": Measure(
            ("text",), "share", "norm of what the writer's MLP adds at that token, over its sum with attention's"
        ),
        "role": Measure(("token",), "1", "first position, special, first delimiter, delimiter or other"),
        "massive_layers": Measure(("token",), "layers", "blocks after which the token holds a strictly massive entry"),
        "massive_layers_loose": Measure(("token",), "layers", "the same with the looser multiple"),
        "dim_texts": Measure(("d_model",), "texts", "texts in which the dimension holds a strictly massive entry"),
        "dim_texts_loose": Measure(("d_model",), "texts", "the same with the looser multiple"),
        "loss_nats": Measure(
            ("case", "token"), "nats", "-ln p of the token that follows, as it is and in each intervention; NaN at the "
            "end of a text"),
        "perplexity": Measure(("case",), "1", "exp of the mean loss over all tokens that are predicted"),
    }  # fmt: skip
    statistics = {name: Statistic(*how) for name, how in massive_summary.STATISTICS.items()}

    def cannot_stream(self, params: MassiveParams) -> str:
        """Interventions take means over all texts."""
        return "interventions need the means over all texts; leave out intervene" if params.intervene else ""

    def passes(self, params: MassiveParams, info: ModelInfo, batch: Batch) -> int:
        """One; with interventions, one more for each. Without other texts there is no mean."""
        return 1 + params.intervene * (len(extremes.WHY) - (len(batch) == 1))

    def flow(self, params: MassiveParams, info: ModelInfo) -> Flow:
        """Norms, largest entries, medians and the loss; then the loss with massive entries changed."""
        if params.intervene and params.at_block >= info.n_layers:
            raise InputError(
                f"Block {params.at_block} is to be changed, and {info.name!r} has the blocks 0 to {info.n_layers - 1}; "
                "give one of them as at_block, or -1 for the first with massive entries."
            )
        trace = yield Forward((*(Capture("resid_post", r) for r in _reducers(params)), _BLOCKS, _LOSS))
        _, top, median = (trace[Capture("resid_post", r)] for r in _reducers(params))
        largest = extremes.Largest(top["value"].values, top["dim"].values, median["median"].values, trace.batch)
        loss, cut = {"as it is": -trace[_LOSS]["logprob_nats"].values}, {}
        if params.intervene:
            bounds = params.min_magnitude, params.ratio
            block = params.at_block if params.at_block >= 0 else largest.first(*bounds)
            entries = () if block is None else largest.entries(block, *bounds)
            cases = extremes.changes(entries, trace.batch, info.d_model)
            for case, patches in cases.items():
                after = yield Forward((_LOSS,), patches, why=extremes.WHY[case])
                loss[case] = -after[_LOSS]["logprob_nats"].values
            cut = {"block": block, "n_entries": len(entries), "n_averaged": len(cases.get("mean", ()))}
        return _dataset(trace, params, largest, loss).assign_attrs(d_model=info.d_model, intervention=cut)

    def summarise(self, dataset: xr.Dataset, params: MassiveParams) -> xr.Dataset:
        """Moments and sums over texts."""
        return massive_summary.summarise(dataset, params.min_magnitude, params.ratio)

    def totals(self, summary: xr.Dataset, params: MassiveParams) -> dict[str, xr.DataArray]:
        """Massive entries by layer and dimension, and the perplexity."""
        return massive_summary.totals(summary)

    def findings(self, result: Result) -> list[Finding]:
        """The largest entry, its writer and erasers, who carries massive entries and where, and whether they matter."""
        massive = bool((result["n_massive_loose"] > 0).any())
        followed = [self._written(result), self._erased(result), _carriers(result)] if massive else []
        return [self._largest(result), *followed, self._layers(result), *_removal(result)]

    def _largest(self, result: Result) -> Finding:
        data, seen = result.dataset, result.summary
        ratio, size = estimate(seen["times_median"].values), estimate(seen["magnitude"].values)
        dim, pos = massive_summary.commonest(seen["places"].item())
        null = float(seen["gaussian"] / seen["texts"])
        massive = bool((data["n_massive_loose"] > 0).any())
        lead = "A massive activation reaches" if massive else "The largest activation is not massive: it has"
        return Finding(
            f"{lead} magnitude {fmt(size.value)} in dimension {dim} at position {pos}, "
            f"{fmt(ratio.value)} × the layer's median.",
            ratio.value, "× median", null, "largest of as many Gaussian entries", ratio.ci95, ratio.n, ratio.n_unit,
            {"dim": dim, "pos": pos, "magnitude": size.value}, quantity="largest entry over the layer's median",
        )  # fmt: skip

    def _written(self, result: Result) -> Finding:
        seen = result.summary
        n, writers = int(seen["texts"]), seen["writers"].values
        writer = int(writers.argmax())
        grown = estimate(seen["grown"].values[writer])
        typical, share = float(seen["elsewhere"][writer]) / n, writers[writer] / n
        mlp = float(seen["mlp_shares"][writer]) / writers[writer]
        part, other = ("MLP", "attention") if mlp > 0.5 else ("attention", "MLP")
        return Finding(
            f"Block {writer} writes it, with its {part} rather than its {other} ({max(mlp, 1 - mlp):.0%} of what "
            f"both add, by norm): its magnitude grows by {fmt(grown.value)} (the writer in {share:.0%} of texts).",
            grown.value, "activation", typical, "median change elsewhere, mean over texts", grown.ci95, grown.n, grown.n_unit,
            {"layer": writer, "part": part}, quantity="growth of the largest entry at its writer",
        )  # fmt: skip

    def _erased(self, result: Result) -> Finding:
        seen = result.summary
        gone, peak = estimate(seen["gone"].values).within(0, 1), estimate(seen["magnitude"].values).value
        path = seen["path_sum"].values / float(seen["texts"])
        lost = -np.diff(path) / max(peak, 1e-30)
        erasers = [i + 1 for i, share in enumerate(lost) if share >= 0.1 and i >= int(path.argmax())]
        named = " and ".join(filter(None, (", ".join(map(str, erasers[:-1])), *map(str, erasers[-1:]))))
        one = len(erasers) == 1
        who = f"Block{'s' * (not one)} {named} take{'s' * one} it down" if erasers else "No block takes it down"
        claim = f"{who}: {gone.value:.0%} of the peak is gone at the end."
        return Finding(
            claim, gone.value, "share of the peak", 0.0, "what is written stays", gone.ci95, gone.n, gone.n_unit,
            {"layers": erasers}, quantity="part of the largest entry's peak that is gone",
        )  # fmt: skip

    def _layers(self, result: Result) -> Finding:
        data, p = result.dataset, result.params.as_dict()
        count = estimate(result.summary["massive_blocks"].values)
        strict = np.flatnonzero(data["n_massive"].values > 0)
        loose = np.flatnonzero(data["n_massive_loose"].values > 0)
        also = sorted(set(loose.tolist()) - set(strict.tolist()))
        criterion = f"above {p['min_magnitude']:g} and {p['ratio']:g} × median"
        claim = f"No entry is massive ({criterion}) after any block"
        if len(strict):
            claim = f"Massive entries ({criterion}) are present after blocks {extremes.in_words(strict.tolist())}"
        claim += f"; above {p['loose_ratio']:g} × also after {extremes.in_words(also)}." if also else "."
        return Finding(
            claim, count.value, "layers", 0.0, "Gaussian entries: no layer", count.ci95, count.n, count.n_unit,
            {"strict": strict.tolist(), "loose": loose.tolist()}, quantity="layers with massive entries",
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Magnitudes over depth, the path of the largest entry, norms per token."""
        data, found = result.dataset, result.findings
        largest, layers = found[0], next(f for f in found if "strict" in f.where)
        path_title = found[1].claim if found[1] is not layers else "The largest entry of each text through depth"
        seen = result.summary
        n, ranks = int(seen["texts"]), range(min(3, data.sizes["rank"]))
        curves = {f"{_ORDINAL[r]}largest magnitude": seen["largest"].isel(rank=r) for r in ranks}
        path = (seen["path_sum"] / seen["path_known"].where(seen["path_known"] > 0)).rename("magnitude")
        first = int(result["text"].values[0])
        removal = {"removal": _losses_drawn(result)} if data.sizes["case"] > 1 else {}
        about, kept = result.about, result.params.as_dict()["top_k"]
        return {
            "magnitudes": plots.lines(
                curves | {"median": seen["median_sum"] / n}, title=largest.claim, unit="activation",
                quantity="magnitude", log_y=True,
                caption=f"{about} Largest entries of any token after each block, and the median over all entries.",
                alt="Largest, second and third largest magnitude and the median magnitude against layer, logarithmic.",
            ),
            "path": plots.lines(
                {"magnitude of the entry": path}, title=path_title, unit="activation", quantity="magnitude",
                caption=f"{about} The largest entry of each text through depth, mean over {n} text{'s' * (n != 1)}; "
                "gaps: not among the token's largest entries.", alt="Magnitude of the largest entry against layer.",
            ),
            "counts": plots.lines(
                {"strict": data["n_massive"], "loose": data["n_massive_loose"]}, title=layers.claim,
                unit="entries per text", quantity="massive entries",
                caption=f"{about} Entries among each token's {kept} largest that pass.",
                alt="Number of massive entries per text against layer, strict and loose.",
            ),
            "norms": plots.heatmap(
                data["norm"].isel(token=result["text"].values == first), scale="log",
                title="Norm of the residual stream at every token", unit="activation", quantity="norm",
                caption=f"{about} Text {first}.",
                alt="Heatmap over layer and token of the norm of the residual stream, logarithmic.",
            ),
            **removal,
            "strip": self._strip(result),
        }  # fmt: skip

    def _strip(self, result: Result) -> plots.TokenStrip:
        data = result.dataset
        best = data["times_median"].argmax("layer")
        dims = data["dim"].isel(rank=0).isel(layer=best).values
        cases = [c for c in ("zero", "mean") if c in data["case"].values]
        changed = [plots.Quantity(f"change of loss, {c}", "nats", _change(result, c), "diverging") for c in cases]
        ratio, norm = (data[name].max("layer").values for name in ("times_median", "norm"))
        return plots.TokenStrip(
            title="Which tokens carry the largest entries",
            tokens=tuple(map(str, data["token_str"].values)),
            texts=data["text"].values,
            quantities=(
                plots.Quantity("largest entry at any layer", "× median", ratio, "log"),
                plots.Quantity("largest norm at any layer", "activation", norm, "log"),
                *changed,
            ),
            caption=f"{result.about_shown} Hover for the token's role, and the layer and dimension of its largest entry."
            + " A change of loss belongs to the position that predicts." * bool(changed),
            alt="The text, each token coloured by its largest entry in units of the layer's median.",
            notes=tuple(
                f"{role}; after block {b}, dimension {d}"
                for role, b, d in zip(data["role"].values, best.values.tolist(), dims.tolist(), strict=True)
            ),
        )


_ORDINAL = ("", "second ", "third ")


def _reducers(params: MassiveParams) -> tuple[Norm, TopMagnitudes, MedianMagnitude]:
    return Norm(), TopMagnitudes(params.top_k), MedianMagnitude()


def _dataset(trace: Trace, params: MassiveParams, largest: extremes.Largest, loss: dict[str, np.ndarray]) -> xr.Dataset:
    """Who is massive, the path of each text's largest entry, and the losses."""
    norm, top, median = (trace[Capture("resid_post", r)] for r in _reducers(params))
    scale = np.repeat(largest.median, trace.batch.lengths, axis=1)  # layer token
    ratios = {"": params.ratio, "_loose": params.loose_ratio}
    losses = np.stack([*loss.values()])
    with np.errstate(over="ignore"):
        perplexity = np.exp(np.nanmean(losses, axis=1))
    data = {
        "norm": norm["norm"],
        "value": top["value"],
        "dim": top["dim"],
        "median": median["median"],
        "times_median": (("layer", "token"), np.abs(largest.value[..., 0]) / np.maximum(scale, 1e-30)),
        "role": ("token", extremes.token_roles(trace.batch, trace.info.bos_id)),
        "loss_nats": (("case", "token"), losses),
        "perplexity": ("case", perplexity),
        **largest.peaks(*(trace[_BLOCKS][name].values for name in ("mlp_norm", "attn_norm"))),
        **largest.carriers(trace.info.d_model, params.min_magnitude, ratios),
    }
    ordered = {name: data[name] for name in MassiveActivations.measures}
    return xr.Dataset(ordered, coords={"case": np.array([*loss], dtype=object)})


def _carriers(result: Result) -> Finding:
    """Which tokens and dimensions hold massive entries; by the looser multiple where none passes the strict one."""
    data, seen = result.dataset, result.summary
    end = "" if (data["n_massive"] > 0).any() else "_loose"
    n_of_dim, held = data[f"dim_texts{end}"].values, seen[f"carriers{end}"].values
    dims = [int(d) for d in np.argsort(-n_of_dim, kind="stable") if n_of_dim[d]]
    named = ", ".join(f"{d} ({n_of_dim[d]})" for d in dims[:5]) + ", …" * (len(dims) > 5)
    share = estimate(seen[f"first{end}"].values).within(0, 1)
    chance, n = float(seen[f"chance{end}"]) / share.n, int(seen["texts"])
    where = extremes.carriers_said(seen[f"carrier_texts{end}"].values.tolist(), seen[f"carrier_words{end}"].item())
    return Finding(
        f"Of {n} text{'s' * (n != 1)}, {'loosely ' * bool(end)}massive entries lie at "
        f"{where}; in dimensions (texts) {named}.",
        share.value, "share of their tokens at the first position", chance, "tokens at any position alike",
        share.ci95, share.n, share.n_unit,
        {**dict(zip(extremes.ROLES, held.astype(int).tolist(), strict=True)), "dims": dims},
        quantity=f"tokens with {'loosely ' * bool(end)}massive entries that come first",
    )  # fmt: skip


def _change(result: Result, case: str, against: str = "as it is") -> np.ndarray:
    loss = result["loss_nats"]
    return np.asarray(loss.sel(case=case).values - loss.sel(case=against).values)


def _mean_change(result: Result, case: str, against: str = "as it is") -> Estimate:
    return token_mean(_change(result, case, against), result["text"].values, result["pos"].values)


def _removal(result: Result) -> list[Finding]:
    """What zero and the mean in the place of massive entries cost, against the controls; nothing if not asked."""
    cut, cases = result.dataset.attrs["intervention"], result["case"].values.tolist()
    if cut and not cut["n_entries"]:
        where = "any block" if cut["block"] is None else f"block {cut['block']}"
        none = text_mean(np.zeros(len(np.unique(result["text"].values))))
        return [Finding(
            f"No entry is massive after {where}: there was nothing to set to zero.",
            0.0, "entries per text", 0.0, "Gaussian entries: none", none.ci95, none.n, none.n_unit, {"block": cut["block"]},
            quantity="massive entries to set to zero",
        )]  # fmt: skip
    return [_cost(result, case) for case in ("zero", "mean") if case in cases]


def _cost(result: Result, case: str) -> Finding:
    """The change of the loss in one case, and whether it exceeds that of both controls."""
    cut, perplexity = result.dataset.attrs["intervention"], result["perplexity"]
    cost = _mean_change(result, case)
    controls = [c for c in extremes.CONTROLS if c in result["case"].values]
    null = max((_mean_change(result, c).value for c in controls), default=0.0)
    beyond = [_mean_change(result, case, c).ci95 for c in controls]
    worse = bool(beyond) and all(ends is not None and ends[0] > 0 for ends in beyond)
    n, averaged = cut["n_entries"], cut["n_averaged"]
    verdict = "more than either control does" if worse else "no more than the controls do"
    if case == "zero":
        what, verdict = "zero", verdict + (": the model uses them" if worse else ": presence is not function")
        verdict += "" if averaged else "; there is no mean to set them to, as no other text has such entries"
    else:
        what = "their mean over the other texts" + f" ({averaged} have one)" * (averaged < n)
    before, after = (fmt(float(perplexity.sel(case=c))) for c in ("as it is", case))
    return Finding(
        f"Setting the {n} massive entr{'ies' if n > 1 else 'y'} after block {cut['block']} to {what} takes perplexity "
        f"from {before} to {after}, {verdict}.",
        cost.value, "nats per token", null, "the larger change of two controls", cost.ci95, cost.n, cost.n_unit,
        {"block": cut["block"], "case": case, "perplexity": float(perplexity.sel(case=case)), "beyond_controls": worse},
        quantity=f"loss cost of massive entries at {'zero' if case == 'zero' else 'their mean'}",
    )  # fmt: skip


def _losses_drawn(result: Result) -> plots.Figure:
    cases = [c for c in map(str, result["case"].values) if c != "as it is"]
    change = {c: _mean_change(result, c) for c in cases}
    ends = {c: e.ci95 for c, e in change.items() if e.ci95 is not None}
    return plots.bars(
        {c: e.value for c, e in change.items()},
        title=_removal(result)[0].claim,
        unit="nats per token",
        quantity="change of the mean loss",
        reference=(0.0, "as it is"),
        intervals=ends if len(ends) == len(change) else None,
        caption=f"{result.about} A change of c nats multiplies perplexity by exp(c)."
        + (f" Whiskers: 95 % intervals over {change[cases[0]].n_unit}." if ends else ""),
        alt="Bars of the change of the mean loss for zero, the mean over other texts, and two controls.",
    )
