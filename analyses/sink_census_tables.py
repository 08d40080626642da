"""What the census of attention sinks found, as a result like any other, beside the published table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

import probekit as pk

T, EPSILON = 64, 0.3
KINDS = ("natural", "random", "repeated", "natural, its chat model")
# Percent at T = 64 and epsilon = 0.3, by kind; NaN where no number was found. Read in notes on arXiv 2410.10781.
PUBLISHED = {
    "GPT2-XL": (77.00, 70.29, 62.28, np.nan),
    "Mistral-7B": (97.49, 75.21, 0.00, 88.34),
    "LLaMA2-7B": (92.47, 90.13, 0.00, 92.88),
    "LLaMA2-13B": (91.69, np.nan, np.nan, 90.94),
    "LLaMA3-8B": (99.02, 91.23, 0.00, 98.85),
}


@pk.register
class SinkCensus(pk.Analysis):
    """In how many (layer, head) pairs is position 0 a sink, in which models and on which texts?

    Question:
        How does Sink_1 differ between models and kinds of text, and does it need natural text at all?

    Method:
        `attention-sinks` on the first 64 tokens of each text, as the model's tokenizer begins it, at
        epsilon = 0.3; then its made texts, each without and with a beginning-of-sequence token. The
        rate of a text is the share of (layer, head) pairs; rows are means over texts.

    Null:
        Uniform causal attention, for which no pair has a sink at T = 64.

    Known failure modes:
        Published rates belong to 100 other texts; they were read in notes on the paper, not run here.
        Which token begins a text is the tokenizer's choice, and changes the rate.

    References:
        Gu et al. 2025, When Attention Sink Emerges in Language Models, arXiv 2410.10781, section 3.
    """

    name, title = "sink-census", "Attention sinks across models and texts"
    measures = {
        "rate": pk.Measure(("case", "sample"), "percent", "Sink_1 of each text; NaN where a row has fewer or none"),
        "published": pk.Measure(("case",), "percent", "the published rate; NaN where it was measured here"),
    }

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        """One per row that was measured."""
        found = []
        for case, values in zip(result["case"].values.tolist(), result["rate"].values, strict=True):
            if np.isfinite(values).any():
                m = pk.stats.text_mean(values).within(0, 100)
                claim = f"{case}: position 0 is a sink for {m.value:.1f} % of (layer, head) pairs."
                where = {"case": case, "T": T}
                meaning = "uniform causal attention"
                quantity = "heads with a sink at position 0"
                found.append(
                    pk.Finding(claim, m.value, "percent", 0.0, meaning, m.ci95, m.n, m.n_unit, where, quantity=quantity)
                )
        return found

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """What was measured, with intervals, and what was published."""
        rows = {f.where["case"]: f for f in result.findings}
        table = result["published"].dropna("case")
        at = f"T = {T}, epsilon = {EPSILON:g}"
        how = {"unit": "percent", "quantity": "Sink_1"}
        return {
            "measured": pk.plots.bars(
                {case: f.value for case, f in rows.items()},
                intervals={case: f.ci95 or (f.value, f.value) for case, f in rows.items()},
                title="How often position 0 is a sink",
                caption=f"{at}; {min(f.n for f in rows.values())} to {max(f.n for f in rows.values())} texts in a row. "
                "Whiskers: 95 % intervals over texts.",
                alt="Bars of the sink rate by model and kind of text.",
                **how,
            ),
            "published": pk.plots.bars(
                dict(zip(table["case"].values.tolist(), table.values.tolist(), strict=True)),
                title="How often position 0 is a sink, as published",
                caption=f"{at}; Gu et al. 2025, 100 texts in a row.",
                alt="Bars of the published sink rate by model and kind of text.",
                **how,
            ),
        }


def table_of(rows: Mapping[str, np.ndarray]) -> xr.Dataset:
    """The dataset of `sink-census`: rates in percent of each text by row, and the published rows below them."""
    known = {f"{model}, {kind}": v for model, row in PUBLISHED.items() for kind, v in zip(KINDS, row, strict=True)}
    known = {case: value for case, value in known.items() if np.isfinite(value)}
    rates = np.full((len(rows) + len(known), max(map(len, rows.values()))), np.nan)
    for line, values in zip(rates, rows.values(), strict=False):
        line[: len(values)] = values
    return xr.Dataset(
        {
            "rate": (("case", "sample"), rates),
            "published": ("case", [*[np.nan] * len(rows), *known.values()]),
        },
        coords={"case": np.array([*rows, *known], dtype=object)},
    )
