"""What zeroing massive activations was published to do, and a result that holds it beside what is measured here."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xarray as xr

import probekit as pk

RECALLED = "arXiv 2402.17762, WikiText-2; quoted from memory, not checked"
CHECKED = "re-measured for arXiv 2503.22329, {}; read in the figures of its repository, not run here"
NO_CHANGE = "the mean changes nothing"
# Model, perplexity as it is, with massive entries at zero, at their mean (NaN where no number was found), words, source.
PUBLISHED = (
    ("Llama-2-7B", 5.47, np.inf, 5.47, "", RECALLED),
    ("Llama-2-13B", 4.88, 5729.0, np.nan, NO_CHANGE, RECALLED),
    ("Llama-2-7B", 5.13, 8977.0, 5.137, "", CHECKED.format("WikiText-2")),
    ("Llama-3.2-1B", 9.08, 6249.0, np.nan, NO_CHANGE, CHECKED.format("WikiText-2")),
    ("Llama-3.2-3B", 11.88, 17799.0, np.nan, NO_CHANGE, CHECKED.format("C4")),
    ("gemma-3-1b", 9.79, 10.21, np.nan, "", CHECKED.format("WikiText-2")),
    ("GPT-2 small", 30.22, 30.21, np.nan, "no effect, nor in phi-2 and OPT-6.7B", CHECKED.format("WikiText-2")),
)
CASES = ("as it is", "zero", "mean")
Row = tuple[str, tuple[float, ...], list[dict[str, Any]]]  # case, perplexities in the order of CASES, findings


@pk.register
class MassiveActivationIntervention(pk.Analysis):
    """What does it cost to take massive activations away, here and in what was published?

    Question:
        Does a model break without its massive activations, does a constant in their place do, and at which block?

    Method:
        The analysis massive-activations with `intervene`, once for each block (by default those at which a phase with
        massive entries begins), by the strict criterion where half of the texts hold such an entry there, otherwise by
        the looser one. Published numbers stand below what is measured here, each with how it is known.

    Null:
        For what is measured here, the larger change of two controls; for what was published, no change.

    Known failure modes:
        Presence is not function: models differ. Published numbers belong to other texts, contexts and precisions.

    References:
        Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762, section 3.
        Owen et al. 2025, A Refined Analysis of Massive Activations in LLMs, arXiv 2503.22329.
    """

    name, title = "massive-activation-intervention", "Massive activations, taken away"
    measures = {
        "perplexity": pk.Measure(("case", "sample"), "1", "as it is, at zero, at the mean; NaN where not known"),
        "finding": pk.Measure(("case",), "1", "the findings on the case as JSON"),
    }

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        """What was measured here, then what was published."""
        return [pk.Finding.from_dict(f) for row in result["finding"].values for f in json.loads(row)]

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """The loss that zero and the mean add, for every case with finite numbers."""
        plain, changed = result["perplexity"].values[:, 0], result["perplexity"].values
        drawn = {}
        for column, what in ((1, "zero"), (2, "mean")):
            added = np.log(changed[:, column] / plain)
            drawn[what] = pk.plots.bars(
                {str(c): float(x) for c, x in zip(result["case"].values, added, strict=True) if np.isfinite(x)},
                title=f"What massive activations at {'their ' * (what == 'mean')}{what} add to the loss",
                unit="nats per token",
                quantity=f"ln(perplexity at {what} / as it is)",
                caption=f"{result.about} Published cases belong to other texts; those without finite numbers are left out.",
                alt="Bars of the added loss by model and block.",
            )
        return drawn


def published() -> list[Row]:
    """The table above, as rows."""
    rows: list[Row] = []
    for model, *values, words, source in PUBLISHED:
        named = ", ".join(f"{case} {value:,.6g}" for case, value in zip(CASES, values, strict=True) if value == value)
        finding = pk.Finding(
            f"Published, {model}: perplexity {named}{'; ' * bool(words)}{words} ({source}).",
            float(np.log(values[1] / values[0])), "nats per token", 0.0, "no change", None, 1, "model",
            {"case": "zero"}, quantity="loss cost of massive entries at zero",
        )  # fmt: skip
        known = "recalled" if source == RECALLED else "re-measured"
        rows.append((f"{model} ({known})", tuple(values), [finding.as_dict()]))
    return rows


def table(rows: list[Row]) -> xr.Dataset:
    """Rows as the dataset of `massive-activation-intervention`."""
    return xr.Dataset(
        {
            "perplexity": (("case", "sample"), [values for _, values, _ in rows]),
            "finding": ("case", np.array([json.dumps(f) for _, _, f in rows], dtype=object)),
        },
        coords={"case": np.array([c for c, _, _ in rows], dtype=object), "sample": np.array(CASES, dtype=object)},
    )
