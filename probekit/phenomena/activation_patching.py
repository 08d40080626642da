"""Activation patching: which activations carry what makes a model change its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, fmt, param, register
from probekit.core import Batch, Forward, ModelInfo
from probekit.core.pairs import check_pairs
from probekit.methods.sweeps import DIRECTIONS, METRICS, SITES, STREAMS, PairSweep, SweepSpec
from probekit.stats import held_out_best, text_mean

ROLES = {"changed": "the changed tokens", "after": "the tokens between", "last": "the last token"}
_WHERE = "; NaN where not swept, after the measured position, and in pairs that are left out"


@dataclass(frozen=True)
class PatchingParams(Params):
    """Parameters of activation-patching."""

    answers: str = param(
        "text",
        choices=("text", "predicted"),
        help="Answers: each text's last token, or what the model predicts after it",
    )
    direction: str = param(
        "both", choices=("both", *DIRECTIONS), help="Clean into corrupted, corrupted into clean, or both"
    )
    sites: str = param("all", choices=("all", *SITES), help="What is patched: one kind of activation, or all four")
    window: int = param(
        1, low=1, high=9, unit="blocks", help="Neighbouring outputs patched together; more exaggerates peaks"
    )
    min_gap: float = param(0.5, low=1e-3, unit="logits", help="Pairs whose two runs differ by less are left out")
    attribution: bool = param(True, help="Also estimate every effect from one gradient, and compare")


@register
class ActivationPatching(Analysis):
    """Which activations, at which block and token, carry what makes the model change its answer?

    Question:
        Two prompts of equal length differ in a few tokens and have different right answers. At which blocks and
        tokens, and in which heads, is the difference that decides the answer?

    Method:
        Texts come in pairs, clean then corrupted, of equally many tokens; each ends with its answer (or the model's
        own top predictions are the answers). An activation of one run is replaced by that of the other at the same
        position: clean into corrupted (denoising: is it sufficient?) and corrupted into clean (noising: is it
        necessary?). Residual streams, attention and MLP outputs are swept over block and token, heads over block
        and head at all tokens. The effect is (m_patched - m_own) / (m_other - m_own) with m the logit difference of
        the two answers at the token before them: 0 leaves the run as it is, 1 makes it the other run. With
        denoising that is (m_patched - m_corrupted) / (m_clean - m_corrupted). Places before the first difference
        are exactly 0 and are not run. Attribution patching estimates the same from one gradient,
        (a_other - a_own) · ∂m/∂a at the run that is patched. Means are over pairs; by role, first over the tokens
        of that role in a pair. The best place is chosen on the other pairs (leave one out), so that choosing it
        does not flatter it.

    Null:
        Patching a run with its own activation changes nothing: effect 0. For a best place, the mean over all places
        of its kind: what a place chosen at random gives.

    Known failure modes:
        Denoising and noising are no mirror images: backup heads hide in noising, parts of a conjunction in
        denoising. Probability hides components that lower it, and a ratio with a small denominator is noise (such
        pairs are left out). Windows of blocks exaggerate peaks. Attribution is worst at early residual streams and
        sharp attention, where the model is far from linear. Patched tokens that differ in position are not aligned.

    References:
        Zhang and Nanda 2024, Towards Best Practices of Activation Patching, arXiv 2309.16042, sections 2 to 5.
        Heimersheim and Nanda 2024, How to Use and Interpret Activation Patching, arXiv 2404.15255.
        Kramár et al. 2024, AtP*: Localizing LLM Behaviour to Components, arXiv 2403.00745, section 2.
    """

    name = "activation-patching"
    title = "Activation patching"
    intervenes = True
    Params = PatchingParams
    measures = {
        "effect": Measure(("case", "layer", "token"), "share", f"effect on the logit difference, by site{_WHERE}"),
        "attributed": Measure(("case", "layer", "token"), "share", f"the effect as one gradient estimates it{_WHERE}"),
        **{k: Measure(("case", "layer", "token"), u, f"{h}, patched{_WHERE}") for k, (u, h) in METRICS.items()},
        "head_effect": Measure(("layer", "head", "text"), "share", f"effect of one head at all tokens{_WHERE}"),
        "head_attributed": Measure(("layer", "head", "text"), "share", f"the same as one gradient estimates it{_WHERE}"),
        **{f"head_{k}": Measure(("layer", "head", "text"), u, f"{h}, one head patched{_WHERE}")
           for k, (u, h) in METRICS.items()},
        **{f"run_{k}": Measure(("text",), u, f"{h}, nothing patched") for k, (u, h) in METRICS.items()},
        "right_id": Measure(("text",), "1", "token id of the pair's right answer"),
        "wrong_id": Measure(("text",), "1", "token id of the pair's wrong answer"),
        "rank_correlation": Measure(
            ("case", "text"), "1", "Spearman correlation of attributed and exact effects over blocks and tokens from the "
            "first changed one on; NaN where there is nothing to compare"),
        "head_rank_correlation": Measure(
            ("text",), "1", "Spearman correlation of attributed and exact effects over heads; NaN where not swept"),
    }  # fmt: skip

    def check_texts(self, params: PatchingParams, batch: Batch) -> None:
        """Refuse texts that are no pairs of equal length with different prompts and answers."""
        check_pairs(batch, self.name, with_answer=params.answers == "text")

    def passes(self, params: PatchingParams, info: ModelInfo, batch: Batch) -> int:
        """One to look, one for the gradient, and those of the sweep, each with many places in rows of their own."""
        return 1 + int(params.attribution) + _spec(params).passes(info, batch)

    def flow(self, params: PatchingParams, info: ModelInfo) -> Flow:
        """Look at both runs, then patch one place at a time, in all pairs at once."""
        spec = _spec(params)
        seen = yield Forward(spec.looks)
        sweep = PairSweep(spec, seen)
        yield from sweep.run()
        if params.attribution:
            yield from sweep.attribution()
        return sweep.dataset()

    def findings(self, result: Result) -> list[Finding]:
        """Where the difference travels, the places that matter most, the gap they share, and what gradients miss."""
        spec = _spec(result.params)
        travel = [_travel(result, d) for d in spec.directions if "resid_pre" in spec.sites]
        peaks = [_peak(result, s, d) for d in spec.directions for s in spec.sites if s != "resid_pre"]
        agreements = [a for s in spec.sites for a in (_agreement(result, s),) if a.n]
        return [*travel[:1], _gap(result), *travel[1:], *peaks, *agreements]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The stream's effect by role, maps of one pair, heads, attribution against exact effects, and the texts."""
        spec = _spec(result.params)
        drawings: dict[str, plots.Drawing] = {}
        if "resid_pre" in spec.sites:
            drawings["travel"] = _travel_curves(result, spec.directions)
        for site in spec.sites:
            drawings[site] = _head_map(result, spec) if site == "z" else _token_map(result, site, spec)
        if result.params.as_dict()["attribution"] and (spec.window == 1 or {"resid_pre", "z"} & set(spec.sites)):
            drawings["attribution"] = _comparison(result, spec)
        if set(spec.sites) - {"z"}:
            drawings["strip"] = _strip(result, spec)
        return drawings


def _directions(chosen: str) -> tuple[str, ...]:
    return tuple(DIRECTIONS) if chosen == "both" else (chosen,)


def _spec(params: Any) -> SweepSpec:
    sites = SITES if params.sites == "all" else (params.sites,)
    return SweepSpec(params.answers, _directions(params.direction), sites, params.window, params.min_gap)


def _by_role(result: Result, site: str, direction: str) -> np.ndarray:
    """Effects of one direction, as means over the tokens of each role; axes pair, layer, role; NaN without any."""
    data = result.dataset
    values, role, pair = data["effect"].sel(case=site).values, data["role"].values, data["pair"].values
    mine = data["run"].values == ("corrupted" if direction == "denoising" else "clean")
    out = np.full((int(pair.max()) + 1, len(values), len(ROLES)), np.nan)
    for r, name in enumerate(ROLES):
        for i in range(len(out)):
            here = mine & (role == name) & (pair == i)
            out[i, :, r] = values[:, here].mean(axis=1) if here.any() else np.nan
    return out


def _percent(share: float) -> str:
    return f"{round(share, 2) + 0.0:.0%}"  # no "-0%"


def _half(share: np.ndarray) -> np.ndarray:
    """First block from which half of the effect is reached; the number of blocks where it never is. Axes pair, layer."""
    reached = share >= 0.5
    first = np.where(reached.any(axis=1), reached.argmax(axis=1), share.shape[1]).astype(float)
    return np.where(np.isfinite(share).all(axis=1), first, np.nan)


def _travel(result: Result, direction: str) -> Finding:
    effect = _by_role(result, "resid_pre", direction)
    last, changed = effect[..., list(ROLES).index("last")], effect[..., 0]
    n_layers = last.shape[1]
    block = text_mean(_half(last), "pairs").within(0, n_layers)
    mean = [float(text_mean(changed[:, layer], "pairs").value) for layer in (0, n_layers - 1)]
    verb = "restores" if direction == "denoising" else "removes"
    claim = (
        f"{direction.capitalize()}: from block {block.value:.3g} on, the stream of the last token alone {verb} half of "
        "the answer"
        if block.value < n_layers
        else f"{direction.capitalize()}: at no block's input does the stream of the last token alone {verb[:-1]} half of "
        "the answer"
    )
    if np.isfinite(mean).all():
        claim += f"; one changed token {verb} {_percent(mean[0])} at block 0 and {_percent(mean[1])} at the last block"
    return Finding(
        claim + ".", block.value, "block", float(n_layers), "what differs never reaches the last token",
        block.ci95, block.n, block.n_unit, {"direction": direction, "changed": mean if np.isfinite(mean).all() else None},
        quantity=f"block from which the last token {verb} half",
    )  # fmt: skip


def _gap(result: Result) -> Finding:
    own, least = result["run_logit_diff"].values, result.params.as_dict()["min_gap"]
    used = np.abs(own[::2] - own[1::2]) >= least
    clean, corrupted, gap = (
        text_mean(np.where(used, v, np.nan), "pairs") for v in (own[::2], own[1::2], own[::2] - own[1::2])
    )
    right = int(((own[::2] > 0) & (own[1::2] < 0)).sum())
    claim = (
        f"The logit difference is {fmt(clean.value)} on clean and {fmt(corrupted.value)} on corrupted prompts; in {right} "
        f"of {len(used)} pair{'s' * (len(used) != 1)} the model prefers the right answer to each"
    )
    if not used.all():
        claim += f"; {int((~used).sum())} left out, whose runs differ by less than {least:g} logits"
    return Finding(
        f"{claim}.", gap.value, "logits", 0.0, "the changed tokens do not matter", gap.ci95, gap.n, gap.n_unit,
        {"clean": clean.value, "corrupted": corrupted.value, "left_out": int((~used).sum())},
        quantity="logit difference, clean minus corrupted prompts",
    )  # fmt: skip


def _peak(result: Result, site: str, direction: str) -> Finding:
    verb = "restores" if direction == "denoising" else "removes"
    if site == "z":
        heads = result["head_effect"].values[..., DIRECTIONS[direction] :: 2]  # layer, head, pair
        effect, shape = heads.reshape(-1, heads.shape[-1]).T, heads.shape[:2]
    else:
        roles = _by_role(result, site, direction)
        effect, shape = roles.reshape(len(roles), -1), roles.shape[1:]
    place, held = held_out_best(effect)
    layer, which = (int(i) for i in np.unravel_index(place, shape))
    share, null = text_mean(held, "pairs"), float(effect[np.isfinite(effect)].mean())
    window = result.params.as_dict()["window"]
    if site == "z":
        what = f"of single heads, {layer}.{which}"
        where: dict[str, Any] = {"layer": layer, "head": which}
    else:
        name, role = STREAMS[site], list(ROLES)[which]
        kind = (
            f"of single {name}s, block {layer}'s"
            if window == 1
            else f"of {name}s of {window} blocks, those around {layer}"
        )
        what, where = f"{kind} at {ROLES[role]}", {"layer": layer, "role": role}
    chosen = "chosen on the other pairs" if share.n > 1 else "chosen on the same pair"
    return Finding(
        f"{direction.capitalize()}: {what} {verb} most, {_percent(share.value)} of the difference.",
        share.value, "share of the difference", null, f"mean over all places; the best is {chosen}",
        share.ci95, share.n, share.n_unit, {"direction": direction, "site": site, **where},
        quantity=f"difference that the best {STREAMS.get(site, 'head')} {verb}",
    )  # fmt: skip


def _agreement(result: Result, site: str) -> Finding:
    per_run = result["head_rank_correlation"] if site == "z" else result["rank_correlation"].sel(case=site)
    values = per_run.values
    found = np.isfinite(values)
    both = np.where(found, values, 0.0).reshape(-1, 2).sum(1) / np.maximum(found.reshape(-1, 2).sum(1), 1)
    mean = text_mean(np.where(found.reshape(-1, 2).any(1), both, np.nan), "pairs").within(-1, 1)
    name = "heads" if site == "z" else f"{STREAMS[site]}s"
    return Finding(
        f"Attribution from one gradient ranks {name} with a Spearman correlation of {mean.value:.2f} to exact patching.",
        mean.value, "rank correlation", 0.0, "an unrelated order", mean.ci95, mean.n, mean.n_unit, {"site": site},
        quantity=f"agreement of attribution with patching, {name}",
    )  # fmt: skip


_READ = "0: nothing changes; 1: the run answers like the other one."


def _about(result: Result, spec: SweepSpec) -> str:
    used = np.isfinite(result["effect"].values).any((0, 1)) if spec.sites != ("z",) else None
    n = (
        len(np.unique(result["pair"].values[used]))
        if used is not None
        else int(np.isfinite(result["head_effect"].values).any((0, 1)).reshape(-1, 2).any(1).sum())
    )
    wide = f" Windows of {spec.window} blocks, which exaggerate peaks." if spec.window > 1 else ""
    return f"{result.about} {n} pair{'s' * (n != 1)}.{wide}"


def _travel_curves(result: Result, directions: tuple[str, ...]) -> plots.Figure:
    effect = _by_role(result, "resid_pre", directions[0])
    layer = {"layer": result["layer"].values}
    curves: dict[str, xr.DataArray] = {}
    bands: dict[str, tuple[xr.DataArray, xr.DataArray]] = {}
    for r, words in enumerate(ROLES.values()):
        means = [text_mean(effect[:, at, r], "pairs") for at in range(effect.shape[1])]
        if not all(m.n for m in means):
            continue
        curves[words] = xr.DataArray([m.value for m in means], dims="layer", coords=layer)
        if all(m.ci95 for m in means):
            low, high = (curves[words].copy(data=[m.ci95[e] for m in means if m.ci95]) for e in (0, 1))
            bands[words] = (low, high)
    spec = _spec(result.params)
    return plots.lines(
        curves,
        bands=bands,
        title=_travel(result, directions[0]).claim,
        unit="share of the difference",
        quantity="effect",
        caption=f"{_about(result, spec)} {directions[0].capitalize()}: the residual stream entering a block replaced at one "
        f"token, mean over the tokens of a role, then over pairs; bands are 95 % intervals over pairs. {_READ}",
        alt="Effect of patching the residual stream against block, for changed tokens, tokens between and the last token.",
    )


def _token_map(result: Result, site: str, spec: SweepSpec) -> plots.Figure:
    """One pair's effects over blocks and tokens, the first that is not left out; other tokens of its twin named."""
    data, direction = result.dataset, spec.directions[0]
    run = "corrupted" if direction == "denoising" else "clean"
    effect = data["effect"].sel(case=site)
    used = np.isfinite(effect.values).any(axis=0)
    pair = int(data["pair"].values[used & (data["run"].values == run)].min())
    mine = (data["pair"].values == pair) & (data["role"].values != "answer")
    own, other = ((mine & (data["run"].values == r)) for r in (run, "clean" if run == "corrupted" else "corrupted"))
    labels = [
        f"{mark}→{plots.visible(str(b))}" if a != b else mark
        for mark, a, b in zip(
            plots.token_labels(data.isel(token=own)),
            data["token_str"].values[own],
            data["token_str"].values[other],
            strict=True,
        )
    ]
    name = STREAMS[site]
    return plots.heatmap(
        effect.isel(token=own),
        title=_peak(result, site, direction).claim
        if site != "resid_pre"
        else f"{direction.capitalize()}: effect of the residual stream entering each block, at each token",
        unit="share of the difference",
        quantity="effect",
        scale="diverging",
        x_labels=labels,
        caption=f"{_about(result, spec)} Pair {pair}, {direction}: the {name} replaced at one block and token; "
        f"“a→b” marks tokens of the {run} run and what stands there in the other. {_READ}",
        alt=f"Heatmap over block and token of the effect of patching the {name}.",
    )


def _head_map(result: Result, spec: SweepSpec) -> plots.Figure:
    direction = spec.directions[0]
    effect = result["head_effect"].isel(text=slice(DIRECTIONS[direction], None, 2)).mean("text")
    return plots.heatmap(
        effect.assign_coords(head=np.arange(effect.sizes["head"])),
        title=_peak(result, "z", direction).claim,
        unit="share of the difference",
        quantity="effect",
        scale="diverging",
        caption=f"{_about(result, spec)} {direction.capitalize()}: one head's output replaced at every token, mean over pairs. "
        f"{_READ}",
        alt="Heatmap over block and head of the mean effect of patching one head.",
    )


def _comparison(result: Result, spec: SweepSpec) -> plots.Figure:
    groups, data = {}, result.dataset
    mine = np.isin(data["role"].values, list(ROLES))
    for site in spec.sites:
        if site == "z":
            groups["heads"] = (data["head_effect"].values, data["head_attributed"].values)
        elif spec.window == 1 or site == "resid_pre":
            exact, estimate = (data[v].sel(case=site).values[:, mine] for v in ("effect", "attributed"))
            groups[f"{STREAMS[site]}s"] = (exact, estimate)
    found = [a for s in spec.sites for a in (_agreement(result, s),) if a.n]
    ranks = ", ".join(
        f"{'heads' if a.where['site'] == 'z' else STREAMS[a.where['site']] + 's'} {a.value:.2f}" for a in found
    )
    return plots.scatter(
        groups,
        title=f"Attribution against exact patching; rank correlations: {ranks or 'none'}",
        unit="share of the difference",
        x_quantity="exact effect",
        y_quantity="attributed effect",
        diagonal="equal",
        caption=f"{_about(result, spec)} One point per block and token (or head) of each patched run, from the first changed "
        "token on. A model that were linear would put every point on the line.",
        alt="Scatter of effects estimated from one gradient against exact effects, with the line of equality.",
    )


def _strip(result: Result, spec: SweepSpec) -> plots.TokenStrip:
    data = result.dataset
    quantities = []
    for site in spec.sites:
        if site != "z":
            values = data["effect"].sel(case=site).values
            known = np.isfinite(values).any(axis=0)
            best = np.where(known, np.where(np.isfinite(values), values, -np.inf).max(axis=0, initial=-np.inf), np.nan)
            quantities.append(
                plots.Quantity(f"{STREAMS[site]}: largest effect of any block", "share", best, "diverging")
            )
    roles = {"before": "before the first difference", "answer": "answer", **ROLES}
    return plots.TokenStrip(
        title="Both texts of every pair, coloured by the largest effect of any block",
        tokens=tuple(map(str, data["token_str"].values)),
        texts=data["text"].values,
        quantities=tuple(quantities),
        caption=f"{_about(result, spec)} Corrupted texts show denoising, clean texts noising. {_READ} Grey: not swept.",
        alt="The texts of every pair, each token coloured by the largest effect that patching it has at any block.",
        notes=tuple(roles[str(r)] for r in data["role"].values),
    )
