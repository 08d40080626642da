"""Steering: adding a direction that contrast pairs give to the residual stream, and seeing what follows the dose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, fmt, param, register
from probekit.core import Add, Batch, Capture, Forward, InputError, ModelInfo, Patch, Trace
from probekit.methods.contrasts import KINDS, AtLayer, Roles, chosen_doses, chosen_layers
from probekit.reduce import AtPosition, Keep, NextToken, log_softmax
from probekit.stats import Estimate, held_out_best, text_mean

SEEN = (Capture("logits", NextToken(1)), Capture("logits", AtPosition(-1)))


@dataclass(frozen=True)
class SteeringParams(Params):
    """Parameters of steering."""

    n_neutral: int = param(
        4, low=0, unit="texts", help="How many of the last texts are neutral ones, which steering should leave alone"
    )
    layers: str = param(
        "", help="Blocks after which it steers, such as 8,15; if empty, a quarter, half and three quarters of the depth"
    )
    doses: str = param(
        "0.1,0.2,0.4", unit="× median norm", help="Lengths of what is added; each is used with both signs"
    )
    position: str = param(
        "last",
        choices=("last", "mean"),
        help="Where the direction is read: last token, or mean from where a pair parts",
    )
    n_controls: int = param(3, low=1, high=20, unit="directions", help="Control directions of each of the two kinds")
    seed: int = param(0, low=0, help="Seed of the control directions")


@register
class Steering(Analysis):
    """Does adding the direction between contrasting texts move what the model prefers, and at what cost?

    Question:
        Is the difference between the activations of positive and negative texts a direction that
        controls the model's behaviour: does the preference follow the dose, with both signs, more
        than under other directions of the same length; and what does it cost elsewhere?

    Method:
        Texts are contrast pairs (positive, negative, positive, negative, …), then neutral texts. A
        pair parts at its first different token; what follows is its continuation (never the first
        token of a text). At a layer, a pair's difference is taken at the last token (or as a
        mean over the continuation); the direction is the mean of the differences (CAA). No pair is
        judged by a direction that it helped to make: it is steered along the mean difference of all
        others. The direction, at length dose × median norm of the residual stream over all tokens
        at that layer, is added after the block at every position, in pairs and neutral texts.
        Preference: mean log-probability per token of the positive continuation minus that of the
        negative one, each within its own text. Slope: least squares through the origin of the
        preference's change on the dose, both signs; the mean over pairs, Student's t interval.
        Cost: rise of the negative log-likelihood of neutral texts, nats per token, mean over texts.
        KL(unsteered ‖ steered) is taken after the last token of the pairs' texts.

    Null:
        Control directions of equal length: random ones (isotropic Gaussian), and ones in the span
        of the pairs' activations (random combinations of centred activations, from the same
        other pairs, the steering direction projected out). By symmetry of sign their slopes have
        mean 0; steering stands out where its slope is above 0 with its interval and beyond Student's
        t of both kinds of controls (their root mean square as scale, one-sided 5 %, Bonferroni over
        layers). The best layer is chosen on the other pairs, so that choosing it does not flatter it.

    Known failure modes:
        Pairs that share a word or a topic give a direction for that word or topic. Doses near the
        median norm break the model (nats per token on neutral text), and a broken model has no preference: look at the cost. The
        preference is measured on given texts, not in what the model would write. The last texts
        count as neutral, so a corpus without neutral texts needs n_neutral = 0.

    References:
        Rimsky et al. 2024, Steering Llama 2 via Contrastive Activation Addition, arXiv 2312.06681.
        Turner et al. 2023, Steering Language Models With Activation Engineering, arXiv 2308.10248.
    """

    name = "steering"
    title = "Steering"
    intervenes = True
    Params = SteeringParams
    measures = {
        "direction": Measure(
            ("layer", "d_model"), "activation", "mean difference over all pairs; pk.Add(direction, 1.0) is CAA's dose 1"
        ),
        "median_norm": Measure(("layer",), "activation", "median norm of the residual stream over all tokens"),
        "length": Measure(("layer",), "× median norm", "length of the direction: the dose that it has by itself"),
        "agreement": Measure(
            ("layer", "case"), "cosine", "a pair's difference and the direction that the other pairs give"
        ),
        "preference": Measure(("case",), "nats per token", "preference without steering"),
        "change": Measure(("layer", "dose", "case"), "nats per token", "change of the preference of a held-out pair"),
        "kl_nats": Measure(
            ("layer", "dose", "case"), "nats", "KL(unsteered ‖ steered) after the last token, mean over the pair"
        ),
        "cost": Measure(
            ("layer", "dose", "text"), "nats per token", "rise of the negative log-likelihood of a neutral text"
        ),
        "slope": Measure(("layer", "case"), "nats per token and dose", "change per dose, least squares, both signs"),
        "control_change": Measure(("layer", "dose", "sample"), "nats per token", "`change` under a control, mean"),
        "control_kl_nats": Measure(("layer", "dose", "sample"), "nats", "`kl_nats` under a control, mean over pairs"),
        "control_cost": Measure(
            ("layer", "dose", "sample"), "nats per token", "`cost` under a control, mean; NaN without neutral texts"
        ),
        "control_slope": Measure(("layer", "sample"), "nats per token and dose", "`slope` under a control, mean"),
    }

    def check_texts(self, params: SteeringParams, batch: Batch) -> None:
        """Refuse texts that are no contrast pairs followed by neutral texts."""
        Roles.of(batch, params.n_neutral)

    def passes(self, params: SteeringParams, info: ModelInfo, batch: Batch) -> int:
        """One without steering, and one for each layer, dose but 0, and direction."""
        n_doses = len(chosen_doses(params.doses)) - 1
        return 1 + len(chosen_layers(params.layers, info)) * n_doses * (1 + len(KINDS) * params.n_controls)

    def flow(self, params: SteeringParams, info: ModelInfo) -> Flow:
        """One pass without steering, then one for each layer, direction and dose."""
        layers, doses = chosen_layers(params.layers, info), chosen_doses(params.doses)
        held = tuple(Capture(("resid_post", layer), Keep()) for layer in layers)
        before = yield Forward((*held, *SEEN))
        roles = Roles.of(before.batch, params.n_neutral)
        n_directions = 1 + len(KINDS) * params.n_controls
        seen: dict[str, np.ndarray] = {
            "change": np.zeros((len(layers), len(doses), n_directions, len(roles.pairs))),
            "kl_nats": np.zeros((len(layers), len(doses), n_directions, len(roles.pairs))),
            "cost": np.zeros((len(layers), len(doses), n_directions, len(roles.neutral))),
        }
        controls = (params.position, params.n_controls, params.seed)
        at_layers = [AtLayer(before[c]["value"].values[0], before.batch, roles, *controls) for c in held]
        at_start, logp = roles.mean_logprobs(_logprob(before), before.batch), _ending(before)
        for i, d, k in np.ndindex(len(layers), len(doses), n_directions):
            if doses[d] == 0:
                continue
            patches = at_layers[i].patches(layers[i], k, doses[d], before.batch, roles)
            after = yield Forward(SEEN, patches, why="a direction added to the stream")
            moved = roles.mean_logprobs(_logprob(after), after.batch) - at_start
            kl = _kl(logp, _ending(after))
            seen["change"][i, d, k] = roles.contrast(moved)
            seen["kl_nats"][i, d, k] = kl[np.array(roles.pairs)].mean(axis=1)
            seen["cost"][i, d, k] = -moved[list(roles.neutral)]
        texts = [before.batch.index[row] for row in roles.neutral]
        return _dataset(layers, doses, at_layers, roles.contrast(at_start), seen, texts)

    def findings(self, result: Result) -> list[Finding]:
        """Whether a layer steers, whether the preference follows the dose, what it costs, whether pairs agree."""
        data = result.dataset
        best, held = held_out_best(data["slope"].transpose("case", "layer").values)
        layer, at = int(data["layer"].values[best]), data.isel(layer=best)
        slope, controls = text_mean(held, "pairs"), at["control_slope"].values
        works, largest = stands_out(data, best), float(np.abs(controls).max())
        than = f"than {len(controls)} control directions of the same length (at most {fmt(largest)} either way)"
        claim = (
            f"Adding the direction after block {layer} steers: the preference for the positive texts moves by "
            f"{fmt(slope.value)} nats per token per dose of one median norm, more {than}."
            if works
            else f"No block steers: at best (block {layer}) the preference moves by {fmt(slope.value)} nats per token "
            f"per dose of one median norm, not clearly more {than}."
        )
        first = Finding(
            claim, slope.value, "nats per token and dose", float(controls.mean()), "mean slope of the controls",
            slope.ci95, slope.n, slope.n_unit, {"layer": layer, "steers": works, "control_rms": _rms(controls)},
            quantity="preference gained per dose",
        )  # fmt: skip
        return [first, self._monotone(at, layer), *self._cost(at, layer), self._agreement(at, layer)]

    def _monotone(self, at: xr.Dataset, layer: int) -> Finding:
        steps = np.diff(at["change"].values, axis=0)  # dose case
        rises = text_mean((steps > 0).mean(axis=0), "pairs").within(0, 1)
        low, high = (float(at["change"].isel(dose=i).mean()) for i in (0, -1))
        doses = at["dose"].values
        return Finding(
            f"From dose {doses[0]:+g} to {doses[-1]:+g} after block {layer} the preference goes from {_signed(low)} to "
            f"{_signed(high)} nats per token against none; {rises.value:.0%} of the steps between doses raise it.",
            rises.value, "share of steps", 0.5, "a step raises it as often as not", rises.ci95, rises.n, rises.n_unit,
            {"layer": layer, "lowest": low, "highest": high}, quantity="steps between doses that raise the preference",
        )  # fmt: skip

    def _cost(self, at: xr.Dataset, layer: int) -> Iterator[Finding]:
        if not at.sizes["text"]:
            return
        dose = float(at["dose"].values[-1])
        end = at.isel(dose=-1)
        cost = text_mean(end["cost"].values, "neutral texts")
        control = float(end["control_cost"].mean())
        yield Finding(
            f"At dose {dose:+g} after block {layer} steering costs neutral text {fmt(cost.value)} nats per token; "
            f"control directions of the same length cost {fmt(control)}.",
            cost.value, "nats per token", control, "mean cost of the controls", cost.ci95, cost.n, cost.n_unit,
            {"layer": layer, "dose": dose, "kl_nats": float(end["kl_nats"].mean())},
            quantity="cost to neutral texts at the highest dose",
        )  # fmt: skip

    def _agreement(self, at: xr.Dataset, layer: int) -> Finding:
        cosine = text_mean(at["agreement"].values, "pairs").within(-1, 1)
        return Finding(
            f"After block {layer} a pair's difference has cosine {fmt(cosine.value)} with the direction of the other "
            f"pairs, which is {fmt(float(at['length']))} median norms long.",
            cosine.value, "cosine", 0.0, "differences in unrelated directions", cosine.ci95, cosine.n, cosine.n_unit,
            {"layer": layer, "length": float(at["length"])}, quantity="agreement of a pair with the other pairs",
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Preference, divergence and cost against the dose at the best layer; preference at every layer."""
        data, found = result.dataset, result.findings
        layer = found[0].where["layer"]
        at = data.sel(layer=layer)
        n, n_neutral = data.sizes["case"], data.sizes["text"]
        about = f"{result.about} {n} pairs, {n_neutral} neutral text{'s' * (n_neutral != 1)}, after block {layer}"
        unit = "Dose: length of what is added, in median norms of the residual stream; negative: the other way."
        spread = unit + " Bands: 95 % interval over {}; for controls, their whole range."
        pairs, texts = spread.format("pairs"), spread.format("neutral texts")
        change, bands = _curves(at["change"], at["control_change"])
        kl, kl_bands = _curves(at["kl_nats"], at["control_kl_nats"])
        layers = {f"after block {b}": data["change"].sel(layer=b) for b in data["layer"].values.tolist()}
        figures: dict[str, plots.Drawing] = {
            "dose_response": plots.lines(
                change,
                bands=bands,
                title=found[0].claim,
                unit="nats per token",
                quantity="change of preference",
                caption=f"{about}. Each pair is steered along the direction of the others. {pairs}",
                alt="Change of the preference for the positive texts against the signed dose, under the steering "
                "direction, random directions and orthogonal directions.",
            ),
            "layers": plots.lines(
                {name: curve.mean("case") for name, curve in layers.items()},
                bands={name: _band(curve) for name, curve in layers.items()},
                title=f"Steering after block {layer} moves the preference most"
                + (f", of {len(layers)} blocks tried." if len(layers) > 1 else ", the only block tried."),
                unit="nats per token",
                quantity="change of preference",
                caption=f"{result.about} {n} pairs. {unit} Bands: 95 % interval over pairs.",
                alt="Change of the preference against the signed dose, one curve for each layer.",
            ),
            "kl": plots.lines(
                kl,
                bands=kl_bands,
                title=f"At dose {at['dose'].values[-1]:+g} steering moves the next-token distribution by "
                f"{fmt(float(at['kl_nats'].isel(dose=-1).mean()))} nats.",
                unit="nats",
                quantity="KL from unsteered to steered",
                caption=f"{about}. KL(unsteered ‖ steered) after the last token of the pairs' texts. {pairs}",
                alt="KL divergence against the signed dose, under steering and control directions.",
            ),
        }
        if n_neutral:
            cost, cost_bands = _curves(at["cost"], at["control_cost"])
            figures["cost"] = plots.lines(
                cost,
                bands=cost_bands,
                title=found[2].claim,
                unit="nats per token",
                quantity="cost on neutral text",
                caption=f"{about}. {texts}",
                alt="Rise of the negative log-likelihood of neutral text against the signed dose.",
            )
        return figures


def steering_patch(result: Result, dose: float, layer: int | None = None) -> Patch:
    """The patch that steers along a result's direction, for requests and generation of one's own.

    Args:
        result: a result of `steering`.
        dose: length of what is added, in median norms of the residual stream at the layer, signed.
        layer: one of the result's layers; the best one if None.

    Raises:
        InputError: the result has no direction at this layer.
    """
    layer = result.findings[0].where["layer"] if layer is None else layer
    known = result["layer"].values.tolist()
    if layer not in known:
        raise InputError(
            f"This result has directions after the blocks {known}, none after {layer}; run it with layers."
        )
    at = result.dataset.sel(layer=layer)
    return Patch(("resid_post", layer), Add(at["direction"].values, dose / float(at["length"])))


def _logprob(trace: Trace) -> np.ndarray:
    return np.asarray(trace[SEEN[0]]["logprob_nats"].values)


def _ending(trace: Trace) -> np.ndarray:
    """Log-probabilities after the last token, nats; axes text, vocab."""
    return log_softmax(trace[SEEN[1]]["value"].values)


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) in nats; axes text, vocab become text."""
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)


def _dataset(
    layers: tuple[int, ...],
    doses: tuple[float, ...],
    at_layers: list[AtLayer],
    preference: np.ndarray,
    seen: dict[str, np.ndarray],
    texts: list[int],
) -> xr.Dataset:
    """What the analysis returns; `seen` has axes layer, dose, direction, pair or neutral text."""
    x = np.array(doses)
    slope = np.einsum("d,ldkp->lkp", x, seen["change"]) / (x**2).sum()
    median = np.array([a.median_norm for a in at_layers])
    direction = np.stack([a.direction for a in at_layers])
    layer_dose = ("layer", "dose")
    control = {name: array[:, :, 1:].mean(axis=-1) for name, array in seen.items() if array.shape[-1]}
    control.setdefault("cost", np.full_like(control["change"], np.nan))
    n_each = (seen["change"].shape[2] - 1) // len(KINDS)
    return xr.Dataset(
        {
            "direction": (("layer", "d_model"), direction.astype(np.float32)),
            "median_norm": ("layer", median),
            "length": ("layer", np.linalg.norm(direction, axis=-1) / median),
            "agreement": (("layer", "case"), np.stack([a.agreement for a in at_layers])),
            "preference": ("case", preference),
            "change": ((*layer_dose, "case"), seen["change"][:, :, 0]),
            "kl_nats": ((*layer_dose, "case"), seen["kl_nats"][:, :, 0]),
            "cost": ((*layer_dose, "text"), seen["cost"][:, :, 0]),
            "slope": (("layer", "case"), slope[:, 0]),
            "control_change": ((*layer_dose, "sample"), control["change"]),
            "control_kl_nats": ((*layer_dose, "sample"), control["kl_nats"]),
            "control_cost": ((*layer_dose, "sample"), control["cost"]),
            "control_slope": (("layer", "sample"), slope[:, 1:].mean(axis=-1)),
        },
        coords={
            "layer": list(layers),
            "dose": x,
            "case": np.arange(len(preference)),
            "text": texts,
            "kind": ("sample", np.repeat(np.array(KINDS, dtype=object), n_each)),
        },
    )


def stands_out(data: xr.Dataset, place: int, level: float = 0.05) -> bool:
    """Whether steering at the layer in this place is above 0 and beyond both kinds of controls; see the Null.

    Args:
        data: dataset of a result of `steering`.
        place: index on its layer axis.
        level: one-sided share of false positives over all layers.
    """
    from scipy.stats import t

    slope, controls = text_mean(data["slope"].values[place], "pairs"), data["control_slope"].values[place]
    groups = [controls[data["kind"].values == kind] for kind in KINDS]
    p = max(float(t.sf(slope.value / max(_rms(group), 1e-30), len(group))) for group in groups)
    return slope.ci95 is not None and slope.ci95[0] > 0 and p * data.sizes["layer"] < level


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def _signed(x: float) -> str:
    return ("+" if x > 0 else "−" if x < 0 else "") + fmt(abs(x))


def _band(curves: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The 95 % interval over pairs or texts at each dose."""
    found: list[Estimate] = [text_mean(row) for row in curves.transpose("dose", ...).values]
    ends = np.array([f.ci95 or (np.nan, np.nan) for f in found])
    return curves[..., 0].copy(data=ends[:, 0]), curves[..., 0].copy(data=ends[:, 1])


def _curves(
    own: xr.DataArray, controls: xr.DataArray
) -> tuple[dict[str, xr.DataArray], dict[str, tuple[xr.DataArray, xr.DataArray]]]:
    """Mean curves and bands: steering over pairs or texts, controls over directions."""
    unit = str(own.dims[-1])
    curves, bands = {"steering": own.mean(unit)}, {"steering": _band(own)}
    for kind in KINDS:
        some = controls.isel(sample=controls["kind"].values == kind)
        curves[f"{kind} controls"] = some.mean("sample")
        bands[f"{kind} controls"] = (some.min("sample"), some.max("sample"))
    return curves, bands
