"""The results of erasing a concept and of steering along a probe: meanings, claims, figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probekit import plots
from probekit.analysis import Finding, Measure, Params, Result, fmt, param
from probekit.stats import text_mean

from .study import CL, ENDS, NO_LAYER, Collectable

if TYPE_CHECKING:
    import xarray as xr

DT = ("dose", "text")


@dataclass(frozen=True)
class ErasureParams(Params):
    """Parameters of erasure."""

    n_folds: int = param(5, low=2, high=50, unit="folds", help="Folds; each keeps every prompt whole")
    seed: int = param(0, low=0, help="Seed of splits and resampling")


def _aurocs(name: str, what: str) -> dict[str, Measure]:
    return {
        f"{name}_auroc": Measure(CL, "1", f"held-out AUROC {what}; {NO_LAYER}"),
        f"{name}_low": Measure(CL, "1", f"its lower end: {ENDS}; {NO_LAYER}"),
        f"{name}_high": Measure(CL, "1", f"its upper end: {ENDS}; {NO_LAYER}"),
    }


class ConceptErasure(Collectable):
    """Is a concept gone for linear probes after LEACE?

    Question:
        Does a probe that is fitted again after erasure fall to chance on held-out prompts, and how much of the activation
        does erasing change?

    Method:
        In each fold the eraser and a probe are fitted on the training prompts; the probe is fitted again on the erased
        training rows (C as chosen before erasure) and tested on erased held-out rows. This probe can only find what
        differs between prompts, for on the rows of the fit LEACE leaves no linear trace. The stricter check: the eraser is
        fitted on one half of the prompts, and probes are fitted and tested, by folds, within the other half, and the other
        way round.

    Null:
        AUROC 0.5; intervals as for linear-probes.

    Known failure modes:
        Where there are fewer rows than features the erased direction is estimated poorly, and a fresh probe finds part of
        the concept again. Probes that are not linear may still succeed. A concept that is absent before is absent after.

    References:
        Belrose et al. 2023, LEACE: Perfect Linear Concept Erasure in Closed Form, arXiv 2306.03819.
    """

    name = "concept-erasure"
    title = "Concept erasure"
    how = "collect rows with pk.collect, then call pk.probing.erase"
    Params = ErasureParams
    measures = {
        **_aurocs("before", "of a probe before erasure"),
        **_aurocs("refit", "of a probe fitted to the erased training rows"),
        **_aurocs("fresh", "of a probe fitted to erased rows of prompts that the eraser has not seen"),
        "coefficient": Measure(
            CL, "1", f"largest weight of the refitted probe per standard deviation before erasure; {NO_LAYER}"
        ),
        "change": Measure(CL, "1", f"length of the change over distance to the mean, held-out rows, mean; {NO_LAYER}"),
        "n_groups": Measure(CL, "prompts", f"prompts; {NO_LAYER}"),
    }

    def findings(self, result: Result) -> list[Finding]:
        """Both checks, at the layer where the concept was plainest."""
        found = []
        for case in result["case"].values.tolist():
            at = _plainest(result.dataset.sel(case=case))
            place = f"{case}, layer {int(at['layer'])}"
            checks = (
                ("fresh", "fitted to prompts that the eraser has not seen"),
                ("refit", "fitted again on the same rows"),
            )
            for name, words in checks:
                value, ends = float(at[f"{name}_auroc"]), (float(at[f"{name}_low"]), float(at[f"{name}_high"]))
                gone = ends[0] <= 0.5 <= ends[1]
                claim = (
                    f"After erasure at {place} a probe {words} has AUROC {fmt(value)}, before it {fmt(float(at['before_auroc']))}: "
                    f"{'not told from chance' if gone else 'the concept is still there'}."
                )
                found.append(
                    Finding(
                        claim,
                        value,
                        "AUROC",
                        0.5,
                        "nothing is left",
                        ends,
                        int(at["n_groups"]),
                        "prompts",
                        {"case": case, "layer": int(at["layer"]), "check": name, "erased": gone},
                        quantity=f"AUROC after erasure, {'new prompts' if name == 'fresh' else 'fitted again'}",
                    )
                )
        return found

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """AUROC before and after over layers, or in bars for one layer."""
        figures: dict[str, plots.Drawing] = {}
        cases = result["case"].values.tolist()
        names = {"before": "before erasure", "fresh": "erased, fresh prompts", "refit": "erased, fitted again"}
        for i, case in enumerate(cases):
            at = result.dataset.sel(case=case).dropna("layer", subset=["before_auroc"])
            claims = [f.claim for f in result.findings if f.where["case"] == case]
            about = f"{result.about} {int(at['n_groups'].isel(layer=0))} prompts, {getattr(result.params, 'n_folds', 0)} folds."
            key = "erasure" if len(cases) == 1 else f"erasure_{i}"
            alt = "Held-out AUROC before erasure and after, of probes fitted again and to fresh prompts."
            if at.sizes["layer"] > 1:
                figures[key] = plots.lines(
                    {words: at[f"{n}_auroc"] for n, words in names.items()},
                    bands={words: (at[f"{n}_low"], at[f"{n}_high"]) for n, words in names.items()},
                    title=claims[0],
                    unit="1",
                    quantity="held-out AUROC",
                    reference=(0.5, "chance"),
                    caption=f"{about} Bands: {ENDS}.",
                    alt=alt,
                )
                continue
            one = at.isel(layer=0)
            figures[key] = plots.bars(
                {words: float(one[f"{n}_auroc"]) for n, words in names.items()},
                intervals={words: (float(one[f"{n}_low"]), float(one[f"{n}_high"])) for n, words in names.items()},
                title=claims[0],
                unit="1",
                quantity="held-out AUROC",
                reference=(0.5, "chance"),
                caption=f"{about} Lines: {ENDS}.",
                alt=alt,
            )
        return figures


def _plainest(data: xr.Dataset) -> xr.Dataset:
    """The layer at which the probe before erasure is best."""
    return data.isel(layer=int(np.nan_to_num(data["before_auroc"].values, nan=-1).argmax()))


@dataclass(frozen=True)
class ProbeSteeringParams(Params):
    """Parameters of steering along a probe."""

    n_random: int = param(10, low=2, high=200, unit="directions", help="Random directions of the same lengths")
    seed: int = param(0, low=0, help="Seed of the random directions")


class ProbeSteering(Collectable):
    """Does the model's answer follow a probe's direction, more than random ones of the same length?

    Question:
        What a probe reads the model need not use. Does adding its direction, with both signs, move the preference for
        one answer over another in prompts that the probe has not seen?

    Method:
        Dose × median norm of the activation at the point over all tokens of the prompts, times the unit direction, is added
        at the point. Preference: logit of the positive answer's first token minus that of the negative one, after the last
        token. Slope: least squares through the origin of the preference's change on the dose, both signs; the mean over
        prompts, Student's t interval. KL(unsteered ‖ steered) after the last token says how much else moves.

    Null:
        Random directions (isotropic Gaussian) of the same lengths. By symmetry of sign their slopes have mean 0; steering
        stands out where the interval of its slope leaves 0 out and it is beyond Student's t of the random slopes (their
        root mean square as scale, two-sided 5 %).

    Known failure modes:
        Doses near the median norm break the model: look at the KL. A direction that writes to the answer's own token
        moves the preference without passing through any computation; steer in an early layer. Random directions mostly
        lie where activations vary little, and are a weak control.

    References:
        Marks and Tegmark 2023, The Geometry of Truth, arXiv 2310.06824.
        Rimsky et al. 2024, Steering Llama 2 via Contrastive Activation Addition, arXiv 2312.06681.
    """

    name = "probe-steering"
    title = "Steering along a probe"
    how = "fit a probe to rows of pk.collect, then call pk.probing.steer"
    Params = ProbeSteeringParams
    measures = {
        "change": Measure(DT, "logits", "change of the preference of each prompt"),
        "probability": Measure(DT, "1", "probability of the positive answer's first token"),
        "kl_nats": Measure(DT, "nats", "KL(unsteered ‖ steered) after the last token"),
        "slope": Measure(("text",), "logits per dose", "change per dose, least squares through 0, both signs"),
        "difference": Measure(("text",), "logits", "preference without steering"),
        "control_change": Measure(("dose", "sample"), "logits", "`change` under a random direction, mean over prompts"),
        "control_probability": Measure(("dose", "sample"), "1", "`probability` under a random direction, mean"),
        "control_kl_nats": Measure(("dose", "sample"), "nats", "`kl_nats` under a random direction, mean"),
        "control_slope": Measure(("sample",), "logits per dose", "`slope` of a random direction, mean over prompts"),
        "median_norm": Measure((), "activation", "median norm at the point over all tokens of the prompts"),
    }

    def findings(self, result: Result) -> list[Finding]:
        """Whether the preference follows the dose, and what it costs."""
        from scipy.stats import t

        data = result.dataset
        slope, controls = text_mean(data["slope"].values, "prompts"), data["control_slope"].values
        scale = float(np.sqrt((controls**2).mean()))
        p = 2 * float(t.sf(abs(slope.value) / max(scale, 1e-30), len(controls)))
        beyond = slope.ci95 is not None and not slope.ci95[0] <= 0 <= slope.ci95[1]
        follows = p < 0.05 and beyond
        point, answers = data.attrs.get("point", "the point"), data.attrs.get("answers", "its answers")
        claim = (
            f"Along the probe's direction at {point} the preference for {answers} moves by {fmt(slope.value)} logits per dose "
            f"of one median norm, {'more' if follows else 'not clearly more'} than along {len(controls)} random directions "
            f"(at most {fmt(float(np.abs(controls).max()))} either way)."
        )
        where = {"point": point, "follows": follows, "control_rms": scale, "p_value": p}
        first = Finding(
            claim, slope.value, "logits per dose", float(controls.mean()), "mean slope of random directions", slope.ci95,
            slope.n, slope.n_unit, where, quantity="preference gained per dose",
        )  # fmt: skip
        ends = [text_mean(data["kl_nats"].isel(dose=i).values, "prompts") for i in (0, -1)]
        i = int(ends[1].value >= ends[0].value)
        dose, kl = float(data["dose"].values[-i]), ends[i]
        control = float(data["control_kl_nats"].isel(dose=-i).mean())
        cost = (
            f"At dose {dose:+g} the next-token distribution moves by {fmt(kl.value)} nats, along random directions by "
            f"{fmt(control)}."
        )
        second = Finding(
            cost, kl.value, "nats", control, "mean of random directions", kl.ci95, kl.n, kl.n_unit, {"dose": dose},
            quantity="divergence at the dose that moves most",
        )  # fmt: skip
        return [first, second]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Preference, probability and divergence against the dose."""
        data, found = result.dataset, result.findings
        caption = (
            f"{result.about} Dose: length of what is added, in median norms of the activation; negative: the other way. "
            f"Bands: 95 % interval over prompts; for the {data.sizes['sample']} random directions, their whole range."
        )
        drawn = {
            "dose_response": ("change", "logits", "change of preference", found[0].claim),
            "probability": ("probability", "1", "probability of the positive answer", _probability_title(data)),
            "kl": ("kl_nats", "nats", "KL from unsteered to steered", found[1].claim),
        }
        figures: dict[str, plots.Drawing] = {}
        for key, (name, unit, quantity, title) in drawn.items():
            own, control = data[name], data[f"control_{name}"]
            ends = np.array([text_mean(row).ci95 or (np.nan, np.nan) for row in own.transpose("dose", "text").values])
            middle = own.mean("text")
            figures[key] = plots.lines(
                {"probe": middle, "random directions": control.mean("sample")},
                bands={
                    "probe": (middle.copy(data=ends[:, 0]), middle.copy(data=ends[:, 1])),
                    "random directions": (control.min("sample"), control.max("sample")),
                },
                title=title,
                unit=unit,
                quantity=quantity,
                caption=caption,
                alt=f"{quantity} against the signed dose, along the probe and random directions, with bands.",
            )
        return figures


def _probability_title(data: xr.Dataset) -> str:
    mean = data["probability"].mean("text")
    doses = data["dose"].values
    low, high = (fmt(float(mean.isel(dose=i))) for i in (0, -1))
    return (
        f"From dose {doses[0]:+g} to {doses[-1]:+g} the probability of the positive answer goes from {low} to {high}."
    )
