"""What the capture benchmark found, as results like any other: a table of costs, and one of agreement."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xarray as xr

import probekit as pk
from probekit.reduce import AttentionStats, Norm, Readout, TopMagnitudes

STATS = (
    pk.Capture("pattern", AttentionStats()),
    pk.Capture("resid_post", Norm()),
    pk.Capture("resid_post", TopMagnitudes(3)),
)
LENS = (pk.Capture("resid_post", Readout(10)),)


@dataclass
class Case:
    """One row of the table.

    Args:
        what: what was measured.
        against: the baseline.
        target: what was aimed for, in `unit`; below it is good unless `at_least`.
        unit: unit of the values.
        values: one per pair.
        at_least: whether larger is better.
        note: seconds or sizes behind the ratio.
        curve: name of the curve over text length that this row is a point of; "" if of none.
        n_tokens: length of the text, where the row belongs to a curve.
    """

    what: str
    against: str
    target: float | None
    unit: str = "× baseline"
    values: list[float] = field(default_factory=list)
    at_least: bool = False
    note: str = ""
    curve: str = ""
    n_tokens: int = 0

    @property
    def median(self) -> float:
        """Median over pairs."""
        return float(np.median(self.values))

    @property
    def met(self) -> bool:
        """Whether the median reaches the target; true if there is none."""
        if self.target is None:
            return True
        return self.median >= self.target if self.at_least else self.median <= self.target


@pk.register
class CaptureBenchmark(pk.Analysis):
    """What does capture cost, and does it agree with everybody else?

    Question:
        How much slower than the bare model is one instrumented pass, how much memory does it take, and
        how far are its numbers from a naive float64 reference and from other tools?

    Method:
        SmolLM2-135M-Instruct, float32, two threads. Speeds are ratios of two computations that run in
        turn in one process (order alternating, one warm-up each); the table gives the median. Memory
        is the peak resident size of a fresh process above its size after loading, sampled every 2 ms.
        Parity is the largest absolute difference over all layers, heads and tokens.

    Null:
        No overhead: ratio 1. For parity: eager attention in float32, naively reduced.

    Known failure modes:
        Shared machines are noisy: differences below a tenth are not resolved without many pairs.

    References:
        None; this is a measurement of the software itself.
    """

    name, title = "capture-benchmark", "What capture costs"
    measures = {
        "median": pk.Measure(("case",), "see unit", "median over pairs"),
        "lowest": pk.Measure(("case",), "see unit", "smallest of the pairs"),
        "highest": pk.Measure(("case",), "see unit", "largest of the pairs"),
        "target": pk.Measure(("case",), "see unit", "what was aimed for; NaN where nothing was"),
        "row": pk.Measure(("case",), "1", "the whole row as JSON"),
    }

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        """One per row: met or not."""
        found = []
        for case in (Case(**json.loads(row)) for row in result["row"].values):
            claim = f"{case.what}: {case.median:.3g} {case.unit} against {case.against}"
            if case.target is not None:
                sign, verdict = "≥" if case.at_least else "≤", "met" if case.met else "missed"
                claim += f"; target {sign} {case.target:g} {verdict}"
            claim += "."
            spread = pk.stats.text_mean(np.array(case.values), "pairs")
            null, meaning = (1.0, "no difference") if case.unit.startswith("×") else (0.0, "no cost")
            where, quantity = {"case": case.what}, "cost of capture"
            found.append(
                pk.Finding(
                    claim,
                    case.median,
                    case.unit,
                    null,
                    meaning,
                    spread.ci95,
                    spread.n,
                    "pairs",
                    where,
                    quantity=quantity,
                )
            )
        return found

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """Ratios to the bare computations, and time and memory over the length of the text."""
        rows = [Case(**json.loads(row)) for row in result["row"].values]
        ratios = [c for c in rows if c.unit.startswith("×") and not c.at_least]
        figures = {
            "ratios": pk.plots.bars(
                {c.what: c.median for c in ratios},
                title="What capture costs, as multiples of the baseline",
                unit="× baseline",
                quantity="median ratio",
                intervals={c.what: (min(c.values), max(c.values)) for c in ratios},
                reference=(1.0, "the baseline itself"),
                caption=f"{_about(result)} Whiskers: smallest and largest pair.",
                alt="Bars of cost ratios against the bare computations.",
            )
        }
        times = curves_of(rows, "×")
        if times:
            figures["time_over_length"] = _over_length(
                times,
                title="Cost over the length of the text",
                unit="× baseline",
                quantity="median ratio",
                reference=(1.0, "the baseline itself"),
                caption=f"{_about(result)} Baselines are named in the table of findings.",
                alt="Ratios of time against the length of the text, one curve per comparison.",
            )
        memory = curves_of(rows, "MiB")
        if memory:
            figures["memory_over_length"] = _over_length(
                memory,
                title="Peak memory above the loaded model",
                unit="MiB",
                quantity="peak memory",
                log_y=True,
                caption=f"{_about(result)} One fresh process per point.",
                alt="Peak memory against the length of the text, one curve per way of computing.",
            )
        return figures


def _about(result: pk.Result) -> str:
    machine = result.provenance.get("machine", {})
    model = result.provenance.get("model", {})
    parts = [model.get("name"), model.get("dtype"), machine.get("processor")]
    return ", ".join(p for p in parts if p) + "." if any(parts) else ""


def curves_of(rows: list[Case], unit: str) -> dict[str, xr.DataArray]:
    """By name, the curves with at least two points whose unit begins with `unit`; axis threshold holds T."""
    points: dict[str, dict[int, float]] = {}
    for case in rows:
        if case.curve and case.unit.startswith(unit):
            points.setdefault(case.curve, {})[case.n_tokens] = case.median
    return {
        name: xr.DataArray([at[t] for t in sorted(at)], {"threshold": sorted(at)}, ["threshold"])
        for name, at in points.items()
        if len(at) > 1
    }


def _over_length(curves: dict[str, xr.DataArray], **labels: Any) -> pk.plots.Figure:
    figure = pk.plots.lines(curves, **labels)
    ticks = sorted({int(t) for curve in curves.values() for t in curve["threshold"].values})
    ends = [np.log10(ticks[0]) - 0.03, np.log10(ticks[-1]) + 0.03]
    figure.plot.update_xaxes(
        type="log",
        range=ends,
        tickvals=ticks,
        ticktext=[str(t) for t in ticks],
        title_text="tokens per text (T)",
        unifiedhovertitle={"text": "T = %{x}"},
    )
    return figure


@pk.register
class CaptureParity(pk.Analysis):
    """How far is every statistic from a naive float64 reference, and how far are other tools?

    Question:
        Is exactness the price of speed?

    Method:
        Largest absolute difference of every statistic, over all layers, heads and tokens of one text,
        to a copy of the model in float64 with eager attention and naive formulas.

    Null:
        The same naive formulas in float32, which are what a careful user would write.

    Known failure modes:
        Ranks jump by one where two logits are equal up to rounding.

    References:
        None; this is a measurement of the software itself.
    """

    name, title = "capture-parity", "Agreement with a float64 reference"
    measures = {
        "largest_difference": pk.Measure(("sample", "case"), "unit of the statistic", "largest absolute difference"),
        "largest_value": pk.Measure(("case",), "unit of the statistic", "largest magnitude in the reference"),
    }

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        """One per statistic."""
        found, data = [], result.dataset
        for statistic in data["case"].values.tolist():
            off = data["largest_difference"].sel(case=statistic)
            others = ", ".join(
                f"{s} {float(off.sel(sample=s)):.1e}" for s in off["sample"].values.tolist() if s != "probekit"
            )
            ours, eager = float(off.sel(sample="probekit")), float(off.sel(sample="eager float32"))
            claim = f"{statistic}: at most {ours:.1e} from float64 (values up to {float(data['largest_value'].sel(case=statistic)):.3g}); {others}."
            found.append(pk.Finding(
                claim, ours, "absolute difference", eager, "eager float32", None, 1, "text", {"case": statistic},
                quantity="largest difference to a float64 reference",
            ))  # fmt: skip
        return found

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """Differences of all tools."""
        return {
            "parity": pk.plots.heatmap(
                result["largest_difference"],
                title="Largest difference to a naive float64 reference",
                unit="unit of the statistic",
                quantity="difference",
                scale="log",
                caption=_about(result),
                alt="Heatmap of the largest difference by tool and statistic.",
            )
        }


def cost_table(cases: list[Case]) -> xr.Dataset:
    """The rows as the dataset of `capture-benchmark`."""
    return xr.Dataset(
        {
            "median": ("case", [c.median for c in cases]),
            "lowest": ("case", [min(c.values) for c in cases]),
            "highest": ("case", [max(c.values) for c in cases]),
            "target": ("case", [np.nan if c.target is None else c.target for c in cases]),
            "row": ("case", [json.dumps(asdict(c)) for c in cases]),
        },
        coords={"case": [c.what for c in cases]},
    )
