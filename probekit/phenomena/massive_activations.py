"""Massive activations: single entries of the residual stream, thousands of times larger than the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, fmt, param, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.reduce import MedianMagnitude, Norm, TopMagnitudes
from probekit.stats import text_mean


@dataclass(frozen=True)
class MassiveParams(Params):
    """Parameters of massive-activations."""

    min_magnitude: float = param(100.0, low=0.0, unit="activation", help="Magnitude that a massive entry exceeds")
    ratio: float = param(1000.0, low=1.0, unit="× median", help="Multiple of the layer's median that it exceeds")
    loose_ratio: float = param(
        500.0, low=1.0, unit="× median", help="The looser multiple, reported beside the strict one"
    )
    top_k: int = param(5, low=1, high=50, unit="entries", help="Largest entries kept for each token and layer")


@register
class MassiveActivations(Analysis):
    """Which single entries of the residual stream dwarf all others, and which blocks write and erase them?

    Question:
        Are there entries of the residual stream that are orders of magnitude larger than the rest;
        at which tokens and dimensions; which block writes them and which take them down?

    Method:
        After every block (raw residual stream, before any final norm), the largest magnitudes of
        each token with their dimension, and the median of |h| over all tokens and dimensions of the
        text. An entry is massive if |h| > 100 and |h| > 1000 × that median; the paper says "at
        least or around", so a looser multiple is counted beside it. The text's largest entry (token,
        dimension) is followed through depth: its writer is the block after which its magnitude has
        grown most; a block erases if it takes away at least a tenth of the peak. Where the entry is
        not among the token's largest, it is unknown and at most as large as the smallest kept.

    Null:
        Independent Gaussian entries of the same median: the largest of n has an expected magnitude
        of about 7 to 8 medians at the sizes here, and no entry is massive.

    Known failure modes:
        Presence is not function: in some models setting the entry to zero changes nothing. Weights
        that were quantised shift values by a few percent. With a beginning-of-sequence token other
        tokens and dimensions carry the entry. Half precision overflows above 65,504.

    References:
        Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762, section 2.
        Owen et al. 2025, A Refined Analysis of Massive Activations in LLMs, arXiv 2503.22329.
    """

    name = "massive-activations"
    title = "Massive activations"
    Params = MassiveParams
    measures = {
        "norm": Measure(("layer", "token"), "activation", "Euclidean norm of the residual stream"),
        "value": Measure(
            ("layer", "token", "rank"), "activation", "the token's largest entries, signed, largest first"
        ),
        "dim": Measure(("layer", "token", "rank"), "1", "dimensions of these entries"),
        "median": Measure(
            ("layer", "text"), "activation", "median magnitude over all tokens and dimensions of the text"
        ),
        "times_median": Measure(("layer", "token"), "× median", "the token's largest magnitude over its text's median"),
        "n_massive": Measure(("layer",), "entries per text", "entries that pass the strict criterion"),
        "n_massive_loose": Measure(("layer",), "entries per text", "entries that pass with the looser multiple"),
        "peak_pos": Measure(("text",), "1", "position of the text's largest entry"),
        "peak_dim": Measure(("text",), "1", "dimension of the text's largest entry"),
        "peak_layer": Measure(("text",), "layer", "layer at which that entry is largest"),
        "peak_path": Measure(("layer", "text"), "activation", "that entry through depth; NaN where unknown"),
        "writer": Measure(("text",), "layer", "block after which that entry has grown most"),
    }

    def observe(self, params: MassiveParams, info: ModelInfo) -> Forward:
        """Norms, largest entries and medians of every layer."""
        return Forward(tuple(Capture("resid_post", r) for r in _reducers(params)))

    def compute(self, trace: Trace, params: MassiveParams) -> xr.Dataset:
        """Who is massive, and the path of each text's largest entry."""
        norm, top, median = (trace[Capture("resid_post", r)] for r in _reducers(params))
        value, dim = top["value"].values, top["dim"].values  # layer token rank
        place = np.repeat(np.arange(len(trace.batch)), trace.batch.lengths)
        scale = median["median"].values[:, place]  # layer token
        magnitude = np.abs(value)
        strict = (magnitude > params.min_magnitude) & (magnitude > params.ratio * scale[..., None])
        loose = (magnitude > params.min_magnitude) & (magnitude > params.loose_ratio * scale[..., None])
        n_texts = len(trace.batch)
        peaks = [_peak(value, dim, trace.batch.starts[i], n) for i, n in enumerate(trace.batch.lengths)]
        paths = np.stack([p[3] for p in peaks], axis=1)
        return xr.Dataset(
            {
                "norm": norm["norm"],
                "value": top["value"],
                "dim": top["dim"],
                "median": median["median"],
                "times_median": (("layer", "token"), magnitude[..., 0] / np.maximum(scale, 1e-30)),
                "n_massive": ("layer", strict.sum(axis=(1, 2)) / n_texts),
                "n_massive_loose": ("layer", loose.sum(axis=(1, 2)) / n_texts),
                "peak_pos": ("text", [p[0] for p in peaks]),
                "peak_dim": ("text", [p[1] for p in peaks]),
                "peak_layer": ("text", [p[2] for p in peaks]),
                "peak_path": (("layer", "text"), paths),
                "writer": ("text", [_writer(path) for path in paths.T]),
            },
            attrs={"d_model": trace.info.d_model},
        )

    def findings(self, result: Result) -> list[Finding]:
        """The largest entry, its writer, its erasers, and the layers that hold massive entries."""
        data = result.dataset
        peaks = abs(data["peak_path"]).max("layer").values
        peak_layer = data["peak_layer"].values
        medians = data["median"].values[peak_layer, np.arange(len(peaks))]
        ratio, size = text_mean(peaks / medians), text_mean(peaks)
        place = _most_common(np.stack([data["peak_dim"].values, data["peak_pos"].values], axis=1))
        lengths = np.bincount(np.unique(result["text"].values, return_inverse=True)[1])
        null = float(np.mean([_gaussian_ratio(n * data.attrs["d_model"] * data.sizes["layer"]) for n in lengths]))
        massive = bool((data["n_massive_loose"] > 0).any())
        lead = "A massive activation reaches" if massive else "The largest activation is not massive: it has"
        largest = Finding(
                f"{lead} magnitude {fmt(size.value)} in dimension {place[0]} at position {place[1]}, "
                f"{fmt(ratio.value)} × the layer's median.",
                ratio.value, "× median", null, "largest of as many Gaussian entries", ratio.ci95, ratio.n, ratio.n_unit,
                {"dim": place[0], "pos": place[1], "magnitude": size.value},
            )  # fmt: skip
        followed = [self._written(result), self._erased(result)] if massive else []
        return [largest, *followed, self._layers(result)]

    def _written(self, result: Result) -> Finding:
        data = result.dataset
        path = np.nan_to_num(np.abs(data["peak_path"].values))
        writer = int(_most_common(data["writer"].values[:, None])[0])
        before = path[writer - 1] if writer else np.zeros(path.shape[1])
        grown = text_mean(path[writer] - before)
        steps = np.abs(np.diff(path, axis=0, prepend=0.0))
        typical = float(np.median(np.delete(steps, writer, axis=0)))
        share = float((data["writer"].values == writer).mean())
        return Finding(
            f"Block {writer} writes it: its magnitude grows by {fmt(grown.value)} there "
            f"(the writer in {share:.0%} of texts).",
            grown.value, "activation", typical, "median change per block elsewhere", grown.ci95, grown.n, grown.n_unit,
            {"layer": writer},
        )  # fmt: skip

    def _erased(self, result: Result) -> Finding:
        path = np.nan_to_num(np.abs(result["peak_path"].values))
        peak = path.max(axis=0)
        gone = text_mean(1 - path[-1] / np.maximum(peak, 1e-30)).within(0, 1)
        lost = -np.diff(path, axis=0).mean(axis=1) / max(float(peak.mean()), 1e-30)
        peak_layer = int(path.mean(axis=1).argmax())
        erasers = [i + 1 for i, share in enumerate(lost) if share >= 0.1 and i >= peak_layer]
        named = (
            ", ".join(map(str, erasers[:-1])) + (" and " if len(erasers) > 1 else "") + str(erasers[-1])
            if erasers
            else ""
        )
        claim = (
            f"Block{'s' * (len(erasers) > 1)} {named} take{'s' * (len(erasers) == 1)} it down: "
            f"{gone.value:.0%} of the peak is gone at the end."
            if erasers
            else f"No block takes it down: {gone.value:.0%} of the peak is gone at the end."
        )
        return Finding(
            claim, gone.value, "share of the peak", 0.0, "what is written stays", gone.ci95, gone.n, gone.n_unit,
            {"layers": erasers},
        )  # fmt: skip

    def _layers(self, result: Result) -> Finding:
        data, p = result.dataset, result.params.as_dict()
        texts = np.unique(result["text"].values)
        hit = (data["times_median"] > p["ratio"]) & (np.abs(data["value"].isel(rank=0)) > p["min_magnitude"])
        per_text = [hit.values[:, result["text"].values == t].any(axis=1).sum() for t in texts]
        count = text_mean(np.array(per_text, dtype=float))
        strict = np.flatnonzero(data["n_massive"].values > 0)
        loose = np.flatnonzero(data["n_massive_loose"].values > 0)
        also = sorted(set(loose.tolist()) - set(strict.tolist()))
        criterion = f"above {p['min_magnitude']:g} and {p['ratio']:g} × median"
        claim = (
            f"Massive entries ({criterion}) are present after blocks {_runs(strict.tolist())}"
            if len(strict)
            else f"No entry is massive ({criterion}) after any block"
        )
        claim += f"; above {p['loose_ratio']:g} × also after {_runs(also)}." if also else "."
        return Finding(
            claim, count.value, "layers", 0.0, "Gaussian entries: no layer", count.ci95, count.n, count.n_unit,
            {"strict": strict.tolist(), "loose": loose.tolist()},
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Magnitudes over depth, the path of the largest entry, norms per token."""
        data = result.dataset
        found = result.findings
        largest, layers = found[0], found[-1]
        path_title = found[1].claim if len(found) > 2 else "The largest entry of each text through depth"
        magnitude = abs(data["value"])
        curves = {
            f"{_ORDINAL[r]}largest magnitude": magnitude.isel(rank=r).max("token")
            for r in range(min(3, data.sizes["rank"]))
        }
        n = len(np.unique(result["text"].values))
        path = abs(data["peak_path"]).mean("text").rename("magnitude")
        first = int(result["text"].values[0])
        one = data.isel(token=result["text"].values == first)
        return {
            "magnitudes": plots.lines(
                curves | {"median": data["median"].mean("text")},
                title=largest.claim,
                unit="activation",
                quantity="magnitude",
                log_y=True,
                caption=f"{result.about} Largest entries of any token after each block, and the median over all entries.",
                alt="Largest, second and third largest magnitude and the median magnitude against layer, logarithmic.",
            ),
            "path": plots.lines(
                {"magnitude of the entry": path},
                title=path_title,
                unit="activation",
                quantity="magnitude",
                caption=f"{result.about} The largest entry of each text through depth, mean over {n} text{'s' * (n != 1)}; "
                "gaps: not among the token's largest entries.",
                alt="Magnitude of the largest entry against layer.",
            ),
            "counts": plots.lines(
                {"strict": data["n_massive"], "loose": data["n_massive_loose"]},
                title=layers.claim,
                unit="entries per text",
                quantity="massive entries",
                caption=f"{result.about} Entries among each token's {result.params.as_dict()['top_k']} largest that pass.",
                alt="Number of massive entries per text against layer, strict and loose.",
            ),
            "norms": plots.heatmap(
                one["norm"],
                title="Norm of the residual stream at every token",
                unit="activation",
                quantity="norm",
                scale="log",
                caption=f"{result.about} Text {first}.",
                alt="Heatmap over layer and token of the norm of the residual stream, logarithmic.",
            ),
            "strip": self._strip(result),
        }

    def _strip(self, result: Result) -> plots.TokenStrip:
        data = result.dataset
        best = data["times_median"].argmax("layer")
        dims = data["dim"].isel(rank=0).isel(layer=best).values
        return plots.TokenStrip(
            title="Which tokens carry the largest entries",
            tokens=tuple(map(str, data["token_str"].values)),
            texts=data["text"].values,
            quantities=(
                plots.Quantity(
                    "largest entry at any layer", "× median", data["times_median"].max("layer").values, "log"
                ),
                plots.Quantity("largest norm at any layer", "activation", data["norm"].max("layer").values, "log"),
            ),
            caption=f"{result.about} Hover for the layer and dimension of the token's largest entry.",
            alt="The text, each token coloured by its largest entry in units of the layer's median.",
            notes=tuple(
                f"after block {b}, dimension {d}" for b, d in zip(best.values.tolist(), dims.tolist(), strict=True)
            ),
        )


_ORDINAL = ("", "second ", "third ")


def _reducers(params: MassiveParams) -> tuple[Norm, TopMagnitudes, MedianMagnitude]:
    return Norm(), TopMagnitudes(params.top_k), MedianMagnitude()


def _peak(value: np.ndarray, dim: np.ndarray, start: int, n: int) -> tuple[int, int, int, np.ndarray]:
    """Position, dimension, layer and path through depth of the largest entry of one text."""
    here, dims = value[:, start : start + n], dim[:, start : start + n]
    layer, pos = np.unravel_index(np.abs(here[..., 0]).argmax(), here.shape[:2])
    its_dim = int(dims[layer, pos, 0])
    found = dims[:, pos] == its_dim  # layer rank
    path = np.where(found.any(axis=1), np.where(found, here[:, pos], 0).sum(axis=1), np.nan)
    return int(pos), its_dim, int(layer), path


def _writer(path: np.ndarray) -> int:
    return int(np.argmax(np.diff(np.nan_to_num(np.abs(path)), prepend=0.0)))


def _most_common(rows: np.ndarray) -> tuple[int, ...]:
    found, counts = np.unique(rows, axis=0, return_counts=True)
    return tuple(int(x) for x in found[counts.argmax()])


def _gaussian_ratio(n: int) -> float:
    """Expected largest magnitude of n independent Gaussian entries over their median magnitude."""
    from scipy.stats import norm

    return float(norm.ppf(1 - 1 / (2 * n) * np.exp(-np.euler_gamma)) / norm.ppf(0.75))


def _runs(layers: list[int]) -> str:
    """Layer numbers in words, consecutive ones as a range."""
    if not layers:
        return "none"
    edges = [0, *(i for i in range(1, len(layers)) if layers[i] != layers[i - 1] + 1), len(layers)]
    parts = [layers[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts)
