"""What the Bigram-Backcopy study found, as a result like any other: outcomes against the published ones, and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

import probekit as pk
from probekit.toys import CRITERIA, PHENOMENA, ExtremeTokens, Preset, appears

SINK, DRAIN, PEAK = PHENOMENA
_NAMES = {SINK: "sink", DRAIN: "drain", PEAK: "peak"}  # of the deciding measures
_UNITS = {SINK: "share", DRAIN: "× other tokens", PEAK: "× other tokens"}
_WORDS = {
    SINK: "attention of ordinary queries on <s>",
    DRAIN: "norm of the value of <s>",
    PEAK: "norm of the residual stream on <s>",
}
_SAID = {SINK: "of a row", DRAIN: "times that of other tokens", PEAK: "times that of other tokens"}
_RELEASED = (  # BBM/figures/BBM/massive_dynamics_sgd_relu.pt of the authors' repository, commit 16b3593
    "The authors' released curves of this norm, three layers, d_model 256, 10,000 updates: from 24 to 141 under Adam, "
    "from 24 to 20 under SGD, from 23 to 24 with ReLU attention. "
)
_CASES = ("case", "sample")
_CURVES = ("case", "sample", "threshold")
_LAYERS = ("case", "sample", "layer")
_RUN = "; NaN where a setting has fewer runs"


@dataclass(frozen=True)
class Run:
    """One trained model.

    Args:
        setting: name of its setting.
        seed: of the run.
        steps: when it was measured.
        measured: what was found then.
        seconds: how long training took, measuring included.
    """

    setting: str
    seed: int
    steps: tuple[int, ...]
    measured: tuple[ExtremeTokens, ...]
    seconds: float


@pk.register
class BigramBackcopyStudy(pk.Analysis):
    """Which of the three extreme-token phenomena appear when a small transformer learns to copy after triggers?

    Question:
        Attention sink, value drain and residual peak on <s>: which of them does a Bigram-Backcopy transformer grow,
        with one block and with three, with softmax and ReLU attention, under Adam and SGD; and is that the published
        outcome?

    Method:
        Models are trained from scratch and measured on the same 128 fresh sequences. The sink is the mean attention on
        <s> of queries that are neither <s> nor a trigger, in the block where their rows lie most on <s>; it is there
        above 0.5. The drain is the norm of <s>'s value over the mean norm of the others', in that same block; it is
        there below 0.5. The peak is the norm of <s> in the residual stream over the mean norm of the others, after the
        block where that is largest; it is there above 2. The publication shows curves and names no thresholds: these
        are ours, the same for all settings, and were not changed; sizes and rates of the small preset were chosen in
        trials, in which the phenomena were looked at. ReLU attention's weights are no distribution; the weights
        themselves decide, and their share of the row's sum is reported beside them. A setting has a phenomenon if all
        of its runs do, and lacks it if none does.

    Null:
        The same models before training.

    Known failure modes:
        Where in depth the copying head forms differs between runs, and the peak needs a block before it. Small batches
        make noisy gradients, which let all norms grow. A ratio of norms hides which of the two changes: under SGD the
        stream of <s> soon stops growing while that of other tokens shrinks, and the ratio comes close to its criterion;
        the curve of the norm itself, which the publication draws, tells this from the steady growth under Adam. In some
        one-block runs with ReLU attention the stream of <s> grows without bound although nothing attends to it; the
        publication makes no claim on it, and its authors' released curves do the same (from 23 to 19,000).

    References:
        Guo et al. 2024, Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs,
        arXiv 2410.13835, section 2.
    """

    name, title = "bigram-backcopy", "Extreme tokens of Bigram-Backcopy transformers"
    measures = {
        "sink": pk.Measure(_CASES, "share", f"mean attention on <s> in the block that attends to it most{_RUN}"),
        "sink_proxy": pk.Measure(_CASES, "share", f"the same over the row's sum; equal to it with softmax{_RUN}"),
        "drain": pk.Measure(_CASES, "× other tokens", f"norm of <s>'s value over the others', in that block{_RUN}"),
        "peak": pk.Measure(_CASES, "× other tokens", f"largest norm of <s> over the others' after any block{_RUN}"),
        "sink_untrained": pk.Measure(_CASES, "share", f"`sink` before training{_RUN}"),
        "drain_untrained": pk.Measure(_CASES, "× other tokens", f"`drain` before training{_RUN}"),
        "peak_untrained": pk.Measure(_CASES, "× other tokens", f"`peak` before training{_RUN}"),
        "sink_layer": pk.Measure(_CASES, "layer", "that block; -1 where a setting has fewer runs"),
        "published": pk.Measure(
            ("case", "rank"), "1", "1 published, 0 published as absent, NaN no claim; three phenomena"
        ),
        "icl_nats": pk.Measure(_CASES, "nats", f"cross-entropy at triggers; the oracle's is 0{_RUN}"),
        "excess_nats": pk.Measure(_CASES, "nats", f"KL(oracle ‖ model) over all positions{_RUN}"),
        "bos_attention": pk.Measure(_LAYERS, "share", f"attention on <s> of each block{_RUN} or blocks"),
        "back_attention": pk.Measure(_LAYERS, "share", f"attention of triggers on the token before{_RUN} or blocks"),
        "value_ratio": pk.Measure(_LAYERS, "× other tokens", f"value norms of each block{_RUN} or blocks"),
        "stream_ratio": pk.Measure(_LAYERS, "× other tokens", f"stream norms after each block{_RUN} or blocks"),
        "gap_nats": pk.Measure(
            _LAYERS, "nats", f"score on <s> minus the mean score on the keys between{_RUN} or blocks"
        ),
        "sink_curve": pk.Measure(_CURVES, "share", f"`sink` over training; `threshold` is the part done{_RUN}"),
        "drain_curve": pk.Measure(_CURVES, "× other tokens", f"`drain` over training{_RUN}"),
        "peak_curve": pk.Measure(_CURVES, "× other tokens", f"`peak` over training{_RUN}"),
        "norm_curve": pk.Measure(_CURVES, "activation", f"norm of <s> after block 0, over training{_RUN}"),
        "excess_curve": pk.Measure(_CURVES, "nats", f"`excess_nats` over training{_RUN}"),
    }

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        """How many published outcomes reproduce, and each outcome."""
        data = result.dataset
        cells = [(case, p) for case in range(data.sizes["case"]) for p in PHENOMENA]
        return [_summary(data), *(_outcome(data, case, p) for case, p in cells)]

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """Settings by phenomena, values with intervals, and curves over training."""
        data, about = result.dataset, _about(result)
        figures = {"outcomes": _outcomes(data, f"{about} {_changes(result)}")}
        for phenomenon, name in _NAMES.items():
            figures[name] = _bars(data, phenomenon, about)
            figures[f"{name}_curve"] = _curves(data, phenomenon, about)
        figures["runs"] = _by_run(data, about)
        figures |= {name: _rest(data, name, about) for name in ("norm_curve", "excess_curve")}
        return figures


def study_table(preset: Preset, runs: Sequence[Run]) -> xr.Dataset:
    """The numbers of all runs, labelled."""
    settings = [s for s in preset.settings if any(r.setting == s.name for r in runs)]
    grouped = [sorted((r for r in runs if r.setting == s.name), key=lambda r: r.seed) for s in settings]
    n_case, n_run = len(settings), max(map(len, grouped))
    n_layer, n_moment = max(s.n_layers for s in settings), len(runs[0].steps)
    empty: dict[tuple[str, ...], tuple[int, ...]] = {
        _CASES: (n_case, n_run), _LAYERS: (n_case, n_run, n_layer), _CURVES: (n_case, n_run, n_moment),
    }  # fmt: skip
    dims = {name: m.dims for name, m in BigramBackcopyStudy.measures.items() if m.dims in empty}
    arrays = {name: np.full(empty[d], np.nan) for name, d in dims.items()}
    for case, of_setting in enumerate(grouped):
        for sample, run in enumerate(of_setting):
            for name, values in _numbers(run).items():
                row = arrays[name][case, sample : sample + 1]  # a view: of one number, or of one per block or moment
                row[..., : np.size(values)] = values  # fewer blocks than the deepest: the rest stays NaN
    arrays["sink_layer"] = np.nan_to_num(arrays["sink_layer"], nan=-1).astype(int)
    published = [
        [np.nan if s.published[p] is None else float(bool(s.published[p])) for p in PHENOMENA] for s in settings
    ]
    data = {name: (dims[name], a) for name, a in arrays.items()}
    done = np.array(runs[0].steps) / runs[0].steps[-1]
    coords = {"case": [s.title for s in settings], "threshold": done}
    dataset = xr.Dataset(data | {"published": (("case", "rank"), np.array(published))}, coords)
    return dataset[list(BigramBackcopyStudy.measures)]


def _numbers(run: Run) -> dict[str, Any]:
    end, start = run.measured[-1], run.measured[0]
    found: dict[str, Any] = {
        "sink_proxy": end.bos_proxy[end.sink_layer],
        "sink_layer": end.sink_layer,
        "icl_nats": end.losses.icl,
        "excess_nats": end.losses.excess,
        "excess_curve": [m.losses.excess for m in run.measured],
        "norm_curve": [m.bos_norm[0] for m in run.measured],
    }
    for phenomenon, name in _NAMES.items():
        found[name] = end.value(phenomenon)
        found[f"{name}_untrained"] = start.value(phenomenon)
        found[f"{name}_curve"] = [m.value(phenomenon) for m in run.measured]
    for name in ("bos_attention", "back_attention", "value_ratio", "stream_ratio", "gap_nats"):
        found[name] = getattr(end, name)
    return found


def _of(data: xr.Dataset, name: str, case: int) -> np.ndarray:
    """One number per run of a setting."""
    values = data[name].isel(case=case).values.astype(float)
    return values[np.isfinite(values)]


def _published(data: xr.Dataset, case: int, phenomenon: str) -> bool | None:
    said = float(data["published"].values[case, PHENOMENA.index(phenomenon)])
    return None if np.isnan(said) else bool(said)


def _hits(data: xr.Dataset, case: int, phenomenon: str) -> tuple[int, int]:
    """In how many runs of a setting the phenomenon is there, and how many runs there are."""
    values = _of(data, _NAMES[phenomenon], case)
    return sum(appears(phenomenon, v) for v in values), len(values)


def _verdict(hits: int, n: int) -> str:
    return "appears" if hits == n else "is absent" if hits == 0 else "appears in some runs"


def _agrees(data: xr.Dataset, case: int, phenomenon: str) -> str:
    """The published outcome and whether the runs agree with it, in words."""
    said, (hits, n) = _published(data, case, phenomenon), _hits(data, case, phenomenon)
    if said is None:
        return "no published claim"
    words = "published as present" if said else "published as absent"
    right = hits if said else n - hits
    return f"{words}: {'agrees' if right == n else f'{right} of {n} runs agree' if right else 'disagrees'}"


def _outcome(data: xr.Dataset, case: int, phenomenon: str) -> pk.Finding:
    name, (hits, n) = _NAMES[phenomenon], _hits(data, case, phenomenon)
    mean = _mean(data, name, case, phenomenon)
    null = float(_of(data, f"{name}_untrained", case).mean())
    criterion = f"{'below' if phenomenon == DRAIN else 'above'} {CRITERIA[phenomenon]:g}"
    proxy = float(_of(data, "sink_proxy", case).mean())
    beside = f" ({proxy:.2g} where rows are divided by their sum)" if _weights(data, case, phenomenon) else ""
    if phenomenon == PEAK:
        norm = data["norm_curve"].isel(case=case).dropna("sample").mean("sample").values
        beside = f", and after block 0 {norm[-1] / norm[0]:.2g} times what it was before training"
    claim = (
        f"{data['case'].values[case]}: the {phenomenon} {_verdict(hits, n)} ({hits} of {n} run{'s' * (n != 1)}). The "
        f"{_WORDS[phenomenon]} is {mean.value:.3g} {_SAID[phenomenon]}{beside}; criterion: {criterion}; "
        f"{_agrees(data, case, phenomenon)}."
    )
    return pk.Finding(
        claim, mean.value, _UNITS[phenomenon], null, "the same models before training", mean.ci95, mean.n, "runs",
        {"setting": str(data["case"].values[case]), "phenomenon": phenomenon},
        quantity=_WORDS[phenomenon],
    )  # fmt: skip


def _mean(data: xr.Dataset, name: str, case: int, phenomenon: str) -> pk.stats.Estimate:
    """Mean over the runs of a setting, its interval cut to what is possible."""
    return pk.stats.text_mean(_of(data, name, case), "runs").within(0, 1 if phenomenon == SINK else np.inf)


def _weights(data: xr.Dataset, case: int, phenomenon: str) -> bool:
    """Whether attention weights and shares of a row differ, as they do without softmax."""
    return phenomenon == SINK and abs(_of(data, "sink_proxy", case) - _of(data, "sink", case)).max() > 1e-3


def _summary(data: xr.Dataset) -> pk.Finding:
    """Published outcomes that all runs of a setting reproduce."""
    claimed = [(c, p, _published(data, c, p)) for c in range(data.sizes["case"]) for p in PHENOMENA]
    known = [(c, p, bool(said)) for c, p, said in claimed if said is not None]
    met = sum(_hits(data, c, p)[0] == (_hits(data, c, p)[1] if said else 0) for c, p, said in known)
    null = sum(not said for _, _, said in known)
    return pk.Finding(
        f"{met} of the {len(known)} published outcomes appear in every run of their setting.",
        float(met), "outcomes", float(null), "models without any of the phenomena", None, 1, "table",
        quantity="published outcomes in every run of their setting",
    )  # fmt: skip


def _about(result: pk.Result) -> str:
    p = result.provenance.get("preset", {})
    sizes = f"d_model {p.get('d_model')}, {p.get('context')} tokens, batches of {p.get('batch_size')}"
    return f"Preset {p.get('name')}: {sizes}."


def _changes(result: pk.Result) -> str:
    """Everything that differs from the publication."""
    changes = result.provenance.get("preset", {}).get("changes", ())
    return " ".join(("What differs from the publication:", *changes)) if changes else ""


def _outcomes(data: xr.Dataset, about: str) -> pk.plots.Figure:
    margin = np.zeros((data.sizes["case"], len(PHENOMENA)))
    words, shown = np.empty(margin.shape, dtype=object), np.empty(margin.shape, dtype=object)
    for case in range(len(margin)):
        for j, p in enumerate(PHENOMENA):
            value = float(_of(data, _NAMES[p], case).mean())
            factor = np.log2(max(value, 1e-3) / CRITERIA[p]) * (-1 if p == DRAIN else 1)
            margin[case, j] = np.clip(factor, -3, 3)
            hits, n = _hits(data, case, p)
            words[case, j] = f"{value:.3g} {_SAID[p]}, {hits} of {n} runs; {_agrees(data, case, p)}"
            said = {True: "present", False: "absent", None: "no claim"}[_published(data, case, p)]
            shown[case, j] = f"{value:.2g} (published: {said})"
    table = xr.DataArray(margin, {"case": data["case"].values, "phenomenon": list(PHENOMENA)}, ["case", "phenomenon"])
    upward = slice(None, None, -1)  # the first setting on top
    figure = pk.plots.heatmap(
        table.isel(case=upward).rename("margin"),
        title=_summary(data).claim,
        unit="doublings",
        quantity="margin",
        scale="diverging",
        low=-3,
        high=3,
        hover=words[upward],
        caption="Red: the phenomenon is there; blue: it is not. The colour is the number of doublings by which the mean "
        "over runs passes its criterion, cut at three; the number is that mean: attention on <s>, norm of the value of "
        f"<s> and norm of the stream on <s>, the norms as multiples of other tokens'. {about}",
        alt="Heatmap of settings by phenomena: by how many doublings each mean passes or misses its criterion, with the "
        "mean and the published outcome in each cell.",
    )
    figure.plot.update_traces(text=shown[upward], texttemplate="%{text}", selector={"type": "heatmap"})
    figure.plot.update_yaxes(title_text="setting")
    return figure


def _bars(data: xr.Dataset, phenomenon: str, about: str) -> pk.plots.Figure:
    name = _NAMES[phenomenon]
    means, ends = {}, {}
    beside = ""  # a setting about which the publication says nothing would only stretch the scale
    for case, title in enumerate(map(str, data["case"].values)):
        if _published(data, case, phenomenon) is None:
            beside += (
                f"{title}, of which the publication says nothing: {_mean(data, name, case, phenomenon).value:.3g}. "
            )
            continue
        shown = {title: name} | (
            {f"{title}, over the row's sum": "sink_proxy"} if _weights(data, case, phenomenon) else {}
        )
        for label, measure in shown.items():
            mean = _mean(data, measure, case, phenomenon)
            means[label], ends[label] = mean.value, mean.ci95 or (mean.value, mean.value)
    there = "below" if phenomenon == DRAIN else "above"
    return pk.plots.bars(
        means,
        title=f"{phenomenon.capitalize()}: {_WORDS[phenomenon]}, at the end of training",
        unit=_UNITS[phenomenon],
        quantity=_WORDS[phenomenon],
        intervals=ends,
        reference=(CRITERIA[phenomenon], f"there if {there}"),
        caption=f"Whiskers: 95 % intervals over runs (Student's t). {beside}{about}",
        alt=f"Bars of the {phenomenon} measure in each setting with intervals and the criterion.",
    )


def _by_run(data: xr.Dataset, about: str) -> pk.plots.Figure:
    """The peak of every run with several blocks, and the block whose head copies."""
    heights = {}
    for case, title in enumerate(map(str, data["case"].values)):
        back = data["back_attention"].isel(case=case).values
        for run, peak in enumerate(_of(data, "peak", case)):
            if np.isfinite(back[run]).sum() > 1:
                heights[f"{title}, run {run}: copies in block {int(np.nanargmax(back[run]))}"] = float(peak)
    return pk.plots.bars(
        heights,
        title="The residual peak of each run, and the block whose head copies",
        unit=_UNITS[PEAK],
        quantity=_WORDS[PEAK],
        reference=(CRITERIA[PEAK], "there if above"),
        caption="Largest ratio after any block. The copying head is the one whose triggers attend most to the token "
        f"before them; only blocks before it can make a peak that serves it. {about}",
        alt="Bars of the largest ratio of stream norms in each run with three blocks.",
    )


def _mean_curves(data: xr.Dataset, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    curves, bands = {}, {}
    for case, title in enumerate(map(str, data["case"].values)):
        runs = data[name].isel(case=case).dropna("sample", how="all").drop_vars("case")
        runs = runs.assign_coords(threshold=100 * runs["threshold"])
        curves[title], bands[title] = runs.mean("sample"), (runs.min("sample"), runs.max("sample"))
    return curves, bands


def _along(figure: pk.plots.Figure) -> pk.plots.Figure:
    """The same figure, its horizontal axis called by what it holds."""
    words = "part of training (percent of updates)"
    figure.plot.update_xaxes(title_text=words, unifiedhovertitle={"text": "after %{x:.3~g} % of training"})
    return figure


def _curves(data: xr.Dataset, phenomenon: str, about: str) -> pk.plots.Figure:
    curves, bands = _mean_curves(data, f"{_NAMES[phenomenon]}_curve")
    return _along(
        pk.plots.lines(
            curves,
            title=f"{phenomenon.capitalize()} over training",
            unit=_UNITS[phenomenon],
            quantity=_WORDS[phenomenon],
            bands=bands,
            log_y=phenomenon == PEAK,
            reference=(CRITERIA[phenomenon], "criterion"),
            caption=f"Means over runs; bands from the smallest to the largest run. {about}",
            alt=f"The {phenomenon} measure against the part of training done, one curve per setting.",
        )
    )


def _rest(data: xr.Dataset, name: str, about: str) -> pk.plots.Figure:
    """A curve that no criterion decides: the norm itself, or the loss."""
    curves, bands = _mean_curves(data, name)
    norm = name == "norm_curve"
    words = "norm of <s> after block 0" if norm else "KL(oracle ‖ model)"
    return _along(
        pk.plots.lines(
            curves,
            title="The norm itself, as the publication draws it" if norm else "The loss approaches the oracle's",
            unit="activation" if norm else "nats",
            quantity=words,
            bands=bands,
            log_y=True,
            caption=f"Means over {'runs' if norm else 'runs and positions'}; bands from the smallest to the largest run. "
            f"{_RELEASED if norm else ''}{about}",
            alt=f"The {words} against the part of training done, one curve per setting.",
        )
    )
