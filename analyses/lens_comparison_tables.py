"""What the comparison of lenses found, as a result like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

import probekit as pk

_COLOURED = 8  # more lenses would not be told apart


@pk.register
class LensComparison(pk.Analysis):
    """Which lens reads the final distribution off which block?

    Question:
        How near is each block's reading to the model's final distribution, by the logit lens and by
        trained ones, on text that none of them was trained on?

    Method:
        `logit-lens` with each lens on the same openings of texts. By block and text: KL(final ‖
        block), and the share of tokens whose likeliest next token is the final one; by text: the
        block from which that token stays the final one, mean over tokens. The last block is the
        model itself and left out of means over blocks.

    Null:
        The logit lens. Differences are paired by text; intervals come from the spread between texts.

    Known failure modes:
        A trained lens may have seen the texts: whoever runs the study answers for that. It may read
        off a block what the model does not use. With a few texts intervals are wide.

    References:
        Belrose et al. 2023, Eliciting Latent Predictions with the Tuned Lens, arXiv 2303.08112.
    """

    name, title = "lens-comparison", "Lenses beside one another"
    measures = {
        "kl_nats": pk.Measure(("case", "layer", "sample"), "nats", "KL(final ‖ block), mean over each text's tokens"),
        "agreement": pk.Measure(
            ("case", "layer", "sample"),
            "share",
            "tokens of each text whose likeliest next token is already the final one",
        ),
        "settled_layer": pk.Measure(
            ("case", "sample"),
            "layer",
            "block from which the likeliest token stays the final one, mean over the tokens",
        ),
    }

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        """For each trained lens: how much nearer, at how many blocks, and how much earlier predictions settle."""
        found = []
        logit, *others = result["case"].values.tolist()
        kl, settled = result["kl_nats"], result["settled_layer"]
        n_blocks = kl.sizes["layer"] - 1
        for case in others:
            gain = (kl.sel(case=logit) - kl.sel(case=case)).isel(layer=slice(0, n_blocks)).values
            nearer = sum(low > 0 for low in (_low(row) for row in gain))
            m, base = pk.stats.text_mean(gain.mean(0)), float(kl.sel(case=logit).values[:n_blocks].mean())
            own = base - m.value
            found.append(
                pk.Finding(
                    f"The {case} is {m.value:.2f} nats nearer to the final distribution than the logit lens "
                    f"({own:.2f} against {base:.2f}, mean over blocks), and nearer at {nearer} of {n_blocks} blocks.",
                    m.value,
                    "nats",
                    0.0,
                    "no nearer than the logit lens",
                    m.ci95,
                    m.n,
                    m.n_unit,
                    {"case": case},
                    quantity="KL to the final distribution below the logit lens's",
                )
            )
            m = pk.stats.text_mean((settled.sel(case=logit) - settled.sel(case=case)).values)
            way = "earlier" if m.value >= 0 else "later"
            found.append(
                pk.Finding(
                    f"By the {case} predictions settle {abs(m.value):.1f} blocks {way} than by the logit lens.",
                    m.value,
                    "blocks",
                    0.0,
                    "at the same block",
                    m.ci95,
                    m.n,
                    m.n_unit,
                    {"case": case},
                    quantity="blocks by which predictions settle before the logit lens's",
                )
            )
        return found

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """KL and agreement over depth with intervals over texts, and where predictions settle."""
        cases = result["case"].values.tolist()[:_COLOURED]
        about = f"{result.about} Bands: 95 % intervals over texts."
        kl = {case: result["kl_nats"].sel(case=case) for case in cases}
        agreement = {case: result["agreement"].sel(case=case) for case in cases}
        settled = {case: pk.stats.text_mean(result["settled_layer"].sel(case=case).values) for case in cases}
        return {
            "kl": pk.plots.lines(
                {case: v.mean("sample") for case, v in kl.items()},
                bands={case: _band(v) for case, v in kl.items()},
                title="How far each block's reading is from the final distribution",
                unit="nats",
                quantity="KL(final ‖ block)",
                caption=f"{about} The last block is the model itself.",
                alt="Curves over blocks of the KL divergence to the final distribution, one for each lens.",
            ),
            "agreement": pk.plots.lines(
                {case: v.mean("sample") for case, v in agreement.items()},
                bands={case: _band(v, 1.0) for case, v in agreement.items()},
                title="How often a block already names the final prediction",
                unit="share of tokens",
                quantity="agreement",
                y_range=(0, 1),
                caption=about,
                alt="Curves over blocks of the agreement with the final prediction, one for each lens.",
            ),
            "settled": pk.plots.bars(
                {case: m.value for case, m in settled.items()},
                intervals={case: m.ci95 or (m.value, m.value) for case, m in settled.items()},
                title="Where predictions settle",
                unit="layer",
                quantity="block from which the likeliest token stays",
                caption=f"{result.about} Whiskers: 95 % intervals over texts.",
                alt="Bars of the block at which predictions settle, one for each lens.",
            ),
        }


def _low(values: np.ndarray) -> float:
    ci95 = pk.stats.text_mean(values).ci95
    return float(values.mean()) if ci95 is None else ci95[0]


def _band(values: xr.DataArray, most: float = np.inf) -> tuple[xr.DataArray, xr.DataArray]:
    """Ends of the interval over texts, by layer."""
    found = [pk.stats.text_mean(row).within(0.0, most) for row in values.transpose("layer", "sample").values]
    ends = np.array([m.ci95 or (m.value, m.value) for m in found])
    low, high = (xr.DataArray(e, {"layer": values["layer"]}, ["layer"]) for e in ends.T)
    return low, high


def row_of(result: pk.Result) -> tuple[str, xr.Dataset]:
    """One lens: its name, and its numbers by text."""
    data, text = result.dataset, result["text"].values
    best = data["top_id"].isel(rank=0).values
    same, texts = best == best[-1], np.unique(text)
    by_text = {
        "kl_nats": np.stack([data["kl_nats"].values[:, text == t].mean(1) for t in texts], -1),
        "agreement": np.stack([same[:, text == t].mean(1) for t in texts], -1),
    }
    settled = [float(data["settled_layer"].values[text == t].mean()) for t in texts]
    variables: dict[str, Any] = {name: (("layer", "sample"), values) for name, values in by_text.items()}
    return str(data.attrs.get("lens") or "logit lens"), xr.Dataset(
        {**variables, "settled_layer": ("sample", settled)}, {"layer": data["layer"].values}
    )


def table_of(rows: Sequence[tuple[str, xr.Dataset]]) -> xr.Dataset:
    """The dataset of `lens-comparison`; the first row is the logit lens."""
    names = [name if [n for n, _ in rows].count(name) == 1 else f"{name} ({i})" for i, (name, _) in enumerate(rows)]
    joined = xr.concat([data for _, data in rows], "case", join="exact")
    return joined.assign_coords(case=np.array(names, dtype=object))
