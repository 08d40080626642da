"""Dormant heads: attention heads that rest on the first token in one kind of text and work in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, fmt, param, register
from probekit.core import Batch, Capture, Forward, InputError, ModelInfo, Trace, token_coords
from probekit.methods.domains import Rule, find_switching, in_own_order, smallest_p
from probekit.methods.removals import NEXT, REMOVALS, looks, n_passes, remove_heads, sample_heads
from probekit.reduce import AttentionStats
from probekit.stats import Estimate, rank_correlation, text_mean

_ATTENTION = Capture("pattern", AttentionStats())
_HEAD, _BY_TEXT, _BY_DOMAIN = ("layer", "head"), ("layer", "head", "text"), ("case", "layer", "head")
_NAMED, _BARS = 6, 12  # heads named in a claim; bars, about


@dataclass(frozen=True)
class DormantParams(Params):
    """Parameters of dormant-heads."""

    dormant: float = param(0.9, low=0, high=1, unit="share", help="Dormancy above which a head is dormant")
    active: float = param(0.5, low=0, high=1, unit="share", help="Dormancy below which a head is active")
    first_query: int = param(8, low=1, high=4096, unit="position", help="First query that counts in the dormancy")
    heads: str = param("sample", choices=("sample", "all"), help="Remove a sample of heads, or every one in turn")
    n_heads: int = param(24, low=1, high=100_000, unit="heads", help="Heads in the sample")
    removal: str = param(
        "zero", choices=REMOVALS, help="A removed head writes nothing, or its value at position 0 everywhere"
    )
    n_permutations: int = param(1999, low=19, high=100_000, unit="draws", help="Permutations of the domain labels")
    alpha: float = param(0.05, low=0.001, high=0.5, help="Family-wise error rate of the test for switching heads")
    seed: int = param(0, low=0, help="Seed of the permutations, of the resampling and of the control heads")


@register
class DormantHeads(Analysis):
    """Which heads rest on the first token, which do so in one kind of text only, and what does it cost to remove them?

    Question:
        Which heads are dormant, that is, put nearly all attention on position 0? Are there heads that are dormant in
        one domain of texts and active in another? Does removing a head change the loss where it is active only?

    Method:
        The dormancy of a head on a text is the mean over queries i >= 8 of A[i, 0]; in a domain it is the mean over
        its texts, each text alike. The paper speaks of dormant and active heads without thresholds; ours are:
        dormant above 0.9, active below 0.5. Beside it stands the first half of the rule of the paper's code, the mean
        over the same queries of H(A[i]) / ln(i + 1), for which no threshold was published. A head is removed by
        setting its output to zero at every position (or to its value at position 0, as if all attention lay there),
        one head of one text at a time; its cost is the mean surprisal of the text's tokens, removed minus as it is.
        The sample of removed heads: a third with the largest difference between domains (those that switch first), a
        third of random other heads of the same layers as a control; of the rest, half are the most dormant, half lie
        at even steps through the order of mean dormancy. With one domain there is only this rest.

    Null:
        The domain labels are permuted over texts. A head switches if it is dormant in one domain, active in another,
        and the difference between its largest and smallest dormancy by domain is exceeded by the largest difference
        of any head in at most 5 % of permutations: the chance that any head passes where labels mean nothing is at
        most that. The expected number of switching heads is the mean over permutations under the same rule. The
        interval of the number resamples texts within domains, with the critical difference as found, and is widened
        to hold the number itself. Removing a head that does nothing costs 0.

    Known failure modes:
        Dormancy looks at position 0 alone: a head that rests on another token counts as active, and so does a sliding
        window that has left position 0 behind. Texts are taken to be independent; windows of one document are not.
        Domains whose texts differ in length differ in dormancy for that reason too. Later heads may make up for a
        removed one, short texts say little about what a head does, and removal also touches position 0 itself. A
        head whose value at position 0 is not small writes something while it is dormant. The sample exaggerates
        extremes: its rank correlation is not that of all heads.

    References:
        Guo et al. 2024, Active-Dormant Attention Heads, arXiv 2410.13835, section 3 (attention and zero-out by domain).
        Westfall and Young 1993, Resampling-Based Multiple Testing (largest statistic under permutations).
    """

    name = "dormant-heads"
    title = "Dormant heads"
    intervenes = True
    Params = DormantParams
    measures = {
        "dormancy": Measure(_BY_TEXT, "share", "mean attention on position 0 over the text's queries that count"),
        "row_entropy": Measure(
            _BY_TEXT, "share of ln(i + 1)", "mean entropy of the same queries' rows over that of uniform ones"
        ),
        "loss_change_nats": Measure(
            _BY_TEXT, "nats", "mean surprisal over the text's tokens, head removed minus as it is; NaN if not removed"
        ),
        "loss_nats": Measure(("token",), "nats", "surprisal of the token that follows; NaN at the end of a text"),
        "text_case": Measure(("text",), "1", "place of the text's domain on the axis `case`"),
        "domain_dormancy": Measure(_BY_DOMAIN, "share", "dormancy, mean over the domain's texts"),
        "domain_loss_change_nats": Measure(
            _BY_DOMAIN, "nats", "change of the loss, mean over the domain's texts; NaN if not removed"
        ),
        "spread": Measure(_HEAD, "share", "largest minus smallest dormancy of any domain"),
        "p_value": Measure(_HEAD, "1", "share of permutations in which any head's spread is as large"),
        "switches": Measure(_HEAD, "1", "1 if dormant in one domain, active in another, and p is at most alpha"),
        "picked_as": Measure(_HEAD, "1", "why it was removed (difference, control, dormant, range, all); empty if not"),
        "null_spread": Measure(("sample",), "share", "largest spread of any head, labels permuted"),
        "null_switching": Measure(("sample",), "heads", "heads that switch by the same rule, labels permuted"),
        "resampled_switching": Measure(("sample",), "heads", "heads that switch, texts resampled within domains"),
    }

    def min_tokens(self, params: DormantParams) -> int:
        """One query that counts."""
        return params.first_query + 1

    def check_texts(self, params: DormantParams, batch: Batch) -> None:
        """Refuse thresholds that call a head both."""
        if params.active > params.dormant:
            raise InputError(
                f"dormant-heads: a head is active below {params.active:g} and dormant above {params.dormant:g}, so some "
                "would be both. Give active at most as large as dormant."
            )

    def passes(self, params: DormantParams, info: ModelInfo, batch: Batch) -> int:
        """One to look, then one head of one text in each row."""
        n = info.n_layers * info.n_heads
        n = n if params.heads == "all" else min(params.n_heads, n)
        return 1 + n_passes(n, batch)

    def flow(self, params: DormantParams, info: ModelInfo) -> Flow:
        """Dormancy and loss as they are, the test on the domains, then one removal at a time."""
        seen = yield Forward((_ATTENTION, *looks(params.removal)))
        names = sorted(set(seen.batch.domains))
        case = np.array([names.index(d) for d in seen.batch.domains])
        first, entropy = _over_queries(seen, params.first_query)
        order, rule = in_own_order(seen.batch), Rule(params.dormant, params.active, params.alpha)
        flat = first.reshape(-1, len(seen.batch)).T[order]
        test = find_switching(flat, case[order], rule, n_draws=params.n_permutations, seed=params.seed)
        shape, several = (info.n_layers, info.n_heads), len(names) > 1
        picked = np.full(shape, "all", dtype=object)
        if params.heads == "sample":
            first_choice = np.lexsort((-test.spread.round(9), ~test.switches)) if several else np.zeros(0, int)
            mean = test.means.mean(axis=0).reshape(shape)
            picked = sample_heads(first_choice, mean, params.n_heads, seed=params.seed)
        change = yield from remove_heads(seen, np.argwhere(picked != ""), params.removal)
        by_domain = np.stack([change[..., case == d].mean(axis=-1) for d in range(len(names))])
        data = {
            "dormancy": (_BY_TEXT, first),
            "row_entropy": (_BY_TEXT, entropy),
            "loss_change_nats": (_BY_TEXT, change),
            "loss_nats": ("token", -seen[NEXT]["logprob_nats"].values),
            "text_case": ("text", case),
            "domain_loss_change_nats": (_BY_DOMAIN, by_domain),
            "picked_as": (_HEAD, picked),
            "domain_dormancy": (_BY_DOMAIN, test.means.reshape(-1, *shape)),
            "spread": (_HEAD, test.spread.reshape(shape)),
            "p_value": (_HEAD, test.p.reshape(shape)),
            "switches": (_HEAD, test.switches.reshape(shape).astype(np.int64)),
            "null_spread": ("sample", test.null_spread),
            "null_switching": ("sample", test.null_count),
            "resampled_switching": ("sample", test.resampled_count),
        }
        coords = token_coords(seen.batch) | {"case": np.array([n or "all texts" for n in names], dtype=object)}
        coords |= {"layer": np.arange(info.n_layers), "head": np.arange(info.n_heads)}
        return xr.Dataset(data, coords)[list(self.measures)]

    def findings(self, result: Result) -> list[Finding]:
        """Which heads switch and what they do, how many are dormant, and what removing which kind costs."""
        found = [_switching(result), _switching_cost(result)] if result.dataset.sizes["case"] > 1 else []
        found += [_dormant_share(result), *_costs(result), _agreement(result)]
        return [f for f in found if f is not None]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Dormancy by domain, the difference between domains, and dormancy against cost."""
        return {**_maps(result), "cost": _scatter(result), "removed": _bars(result)}


def _over_queries(seen: Trace, first_query: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean attention on position 0, and mean entropy as a share of ln(i + 1), by text; axes layer, head, text."""
    data, batch = seen[_ATTENTION], seen.batch
    first = data["first_share"].transpose("layer", "head", "token").values.astype(float)
    entropy = data["entropy_nats"].transpose("layer", "head", "token").values / np.log(np.maximum(batch.pos, 1) + 1)
    spans = [slice(start + first_query, start + n) for start, n in zip(batch.starts, batch.lengths, strict=True)]
    means = [np.stack([values[..., s].mean(axis=-1) for s in spans], axis=-1) for values in (first, entropy)]
    return means[0], means[1]


def _table(result: Result) -> list[dict[str, Any]]:
    """The switching heads, largest difference first: where dormant, where active, and the cost of removal by domain."""
    data, p = result.dataset, result.params.as_dict()
    found: list[dict[str, Any]] = []
    for layer, head in np.argwhere(data["switches"].values == 1).tolist():
        mean = data["domain_dormancy"].values[:, layer, head]
        cost = data["domain_loss_change_nats"].values[:, layer, head]
        costs = {str(n): float(c) if np.isfinite(c) else None for n, c in zip(data["case"].values, cost, strict=True)}
        found.append(
            {
                "layer": layer, "head": head, "p": float(data["p_value"].values[layer, head]),
                "dormancy": dict(zip(costs, map(float, mean), strict=True)), "loss_change_nats": costs,
                "dormant_in": [d for d, m in zip(costs, mean, strict=True) if m > p["dormant"]],
                "active_in": [d for d, m in zip(costs, mean, strict=True) if m < p["active"]],
            }
        )  # fmt: skip
    return sorted(found, key=lambda row: -round(data["spread"].values[row["layer"], row["head"]], 6))


def _switching(result: Result) -> Finding:
    data, p = result.dataset, result.params.as_dict()
    sizes = np.bincount(data["text_case"].values).tolist()
    table, total, value = _table(result), data["switches"].size, float(data["switches"].values.sum())
    rule = f"(dormant in one domain, active in another, family-wise p ≤ {p['alpha']:g})"
    named = "; ".join(
        f"{r['layer']}.{r['head']}, dormant in {' and '.join(r['dormant_in'])}, active in {' and '.join(r['active_in'])}"
        for r in table[:_NAMED]
    )
    claim = f"{int(value)} of {total} heads switch {rule}: {named}{'; …' * (len(table) > _NAMED)}."
    if not table:
        mean = data["domain_dormancy"].values
        by_threshold = int(((mean.max(0) > p["dormant"]) & (mean.min(0) < p["active"])).sum())
        layer, head = divmod(int(data["spread"].values.argmax()), data.sizes["head"])
        most = ", ".join(f"{m:.2f} in {d}" for d, m in zip(data["case"].values, mean[:, layer, head], strict=True))
        claim = (
            f"None of {total} heads switches {rule}; {by_threshold} would by their means alone. The dormancy of "
            f"{int((data['p_value'].values <= p['alpha']).sum())} differs at that level, most that of {layer}.{head}: {most}."
        )
        if smallest_p(sizes) > p["alpha"]:
            claim = (
                f"Whether heads switch cannot be told from {' and '.join(map(str, sizes))} texts: p is at least "
                f"{smallest_p(sizes):.2g}, whatever they hold (4 texts per domain would do). By their means alone, "
                f"{by_threshold} of {total} heads are dormant in one domain and active in another."
            )
    low, high = np.quantile(data["resampled_switching"].values, (0.025, 0.975))
    return Finding(
        claim, value, "heads", float(data["null_switching"].values.mean()), "same rule, domain labels permuted",
        (min(float(low), value), max(float(high), value)), data.sizes["text"], "texts",
        {"heads": table, "smallest_p": smallest_p(sizes), "texts": sizes}, quantity="heads that switch between domains",
    )  # fmt: skip


def _cost(result: Result, which: np.ndarray) -> Estimate:
    """Mean change of the loss: over heads within a text, then over texts; which heads, by axes case, layer, head."""
    change, case = result["loss_change_nats"].values, result["text_case"].values
    chosen = [change[..., t][which[c] & np.isfinite(change[..., t])] for t, c in enumerate(case)]
    return text_mean(np.array([values.mean() if values.size else np.nan for values in chosen]))


def _kinds(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Which heads are dormant and which active; axes case, layer, head."""
    mean, p = result["domain_dormancy"].values, result.params.as_dict()
    return mean > p["dormant"], mean < p["active"]


def _switching_cost(result: Result) -> Finding | None:
    switches = result["switches"].values == 1
    dormant, active = (_cost(result, kind & switches) for kind in _kinds(result))
    control = _cost(result, np.broadcast_to(result["picked_as"].values == "control", _kinds(result)[0].shape))
    if not (dormant.n and active.n):
        return None
    n = int((switches & (result["picked_as"].values != "")).sum())
    aside = f"; other heads of the same layers cost {fmt(control.value)}" if control.n else ""
    return Finding(
        f"Removing a switching head costs {fmt(active.value)} nats per token where it is active and {fmt(dormant.value)} "
        f"where it is dormant ({n} of {int(switches.sum())} were removed){aside}.",
        active.value, "nats", dormant.value, "the same heads where they are dormant", active.ci95, active.n, active.n_unit,
        {"control": control.value if control.n else None}, quantity="cost of removing switching heads where active",
    )  # fmt: skip


def _dormant_share(result: Result) -> Finding:
    data, p = result.dataset, result.params.as_dict()
    flat = data["dormancy"].values.reshape(-1, data.sizes["text"])
    dormant, active = (text_mean(hit.mean(axis=0)) for hit in (flat > p["dormant"], flat < p["active"]))
    kinds = [k.reshape(len(k), -1).sum(axis=1) for k in _kinds(result)]
    cases = zip(data["case"].values, *kinds, strict=True)
    by_domain = "; ".join(f"{d} {a} dormant, {b} active" for d, a, b in cases)
    aside = f" In the mean over texts, of {len(flat)} heads: {by_domain}."
    if data.sizes["case"] == 1:
        aside += " Switching was not tested: it needs texts of two domains at least."
    dormant = dormant.within(0, 1)
    return Finding(
        f"In a text, {dormant.value:.0%} of heads are dormant (above {p['dormant']:g}) and {active.value:.0%} active "
        f"(below {p['active']:g}).{aside}",
        dormant.value, "share of heads", 0.0, "uniform causal attention: none", dormant.ci95, dormant.n, dormant.n_unit,
        quantity="heads that are dormant in a text",
    )  # fmt: skip


def _costs(result: Result) -> list[Finding]:
    removed = np.isfinite(result["domain_loss_change_nats"].values)
    kinds = [kind & removed for kind in _kinds(result)]
    dormant, active = (_cost(result, kind) for kind in kinds)
    found = []
    for name, cost, kind in (("dormant", dormant, kinds[0]), ("active", active, kinds[1])):
        if cost.n:
            size = np.where(kind, np.abs(result["domain_loss_change_nats"].values), -1.0)
            case, layer, head = (int(i) for i in np.unravel_index(size.argmax(), size.shape))
            domain, most = str(result["case"].values[case]), result["domain_loss_change_nats"].values[case, layer, head]
            against = name == "active" and dormant.n > 0
            found.append(Finding(
                f"Removing {'an' if name == 'active' else 'a'} {name} head changes the loss by {fmt(cost.value)} nats per token "
                f"on average ({int(kind.any(axis=0).sum())} removed), {layer}.{head} in {domain} most, by {fmt(float(most))}.",
                cost.value, "nats", dormant.value if against else 0.0,
                "dormant heads" if against else "a head that does nothing", cost.ci95, cost.n, cost.n_unit,
                {"layer": layer, "head": head, "domain": domain, "largest_nats": float(most)},
                quantity=f"cost of removing {name} heads",
            ))  # fmt: skip
    return found


def _agreement(result: Result) -> Finding | None:
    removed = result["picked_as"].values != ""
    first, change = (result[n].values[removed] for n in ("dormancy", "loss_change_nats"))
    both = zip(first.T, np.abs(change).T, strict=True)
    mean = text_mean(np.array([rank_correlation(x, y) for x, y in both])).within(-1, 1)
    return None if not mean.n else Finding(
        f"Over the {int(removed.sum())} heads that were removed, dormancy and the size of the change in loss have a rank "
        f"correlation of {mean.value:.2f} in a text.",
        mean.value, "rank correlation", 0.0, "an unrelated order", mean.ci95, mean.n, mean.n_unit,
        quantity="dormancy against the size of the cost",
    )  # fmt: skip


def _maps(result: Result) -> dict[str, plots.Figure]:
    data, p = result.dataset, result.params.as_dict()
    dormant, active = _kinds(result)
    read = f"Mean attention on position 0 over queries from {p['first_query']} on, each text alike."
    maps = {
        f"dormancy_{i}": plots.heatmap(
            data["domain_dormancy"].isel(case=i, drop=True),
            title=f"Dormancy in {domain}: of {dormant[i].size} heads {dormant[i].sum()} dormant, {active[i].sum()} active",
            unit="share", quantity="dormancy", low=0.0, high=1.0, caption=f"{result.about} {read}",
            alt=f"Heatmap over layer and head of the dormancy in {domain}.",
        )
        for i, domain in enumerate(map(str, data["case"].values))
    }  # fmt: skip
    if data.sizes["case"] > 1:
        two = data.sizes["case"] == 2
        a, b = map(str, data["case"].values[:2])
        what = f"dormancy in {a} minus {b}" if two else "largest minus smallest dormancy of any domain"
        values = data["domain_dormancy"].isel(case=0, drop=True) - data["domain_dormancy"].isel(case=1, drop=True)
        maps["difference"] = plots.heatmap(
            values if two else data["spread"], title=_switching(result).claim, unit="share", quantity=what,
            scale="diverging" if two else "sequential", caption=f"{result.about} {read}",
            hover=np.vectorize(lambda p: f"family-wise p {p:.3g}", otypes=[object])(data["p_value"].values),
            alt=f"Heatmap over layer and head of the {what}.",
        )  # fmt: skip
    return maps


def _scatter(result: Result) -> plots.Figure:
    data = result.dataset
    removed = np.argwhere(data["picked_as"].values != "").tolist()
    at = tuple(np.array(removed).T)
    groups = {
        str(domain): (data["domain_dormancy"].values[c][at], data["domain_loss_change_nats"].values[c][at])
        for c, domain in enumerate(data["case"].values)
    }
    reason = [f"head {layer}.{head}, removed as: {data['picked_as'].values[layer, head]}" for layer, head in removed]
    return plots.scatter(
        groups,
        title=" ".join(f.claim for f in _costs(result)) or "What removing heads costs, by how dormant they are",
        unit="1",
        x_quantity="dormancy (share of attention on position 0)",
        y_quantity="change of loss (nats per token)",
        hover=dict.fromkeys(groups, reason),
        caption=f"{result.about} One point per removed head and domain, means over the domain's texts.",
        alt="Scatter of the change in loss when a head is removed against its dormancy, by domain.",
    )


def _bars(result: Result) -> plots.Figure:
    """Cost of the heads that differ most between domains, or matter most; a bar per domain."""
    data = result.dataset
    several, switches = data.sizes["case"] > 1, data["switches"].values
    key = data["spread"].values if several else np.abs(data["domain_loss_change_nats"].values).max(axis=0)
    shown = map(tuple, np.argwhere(data["picked_as"].values != "").tolist())
    labels, costs = [], []
    for layer, head in sorted(shown, key=lambda at: (-switches[at], -key[at]))[: _BARS // data.sizes["case"] + 1]:
        for c, domain in enumerate(map(str, data["case"].values)):
            costs.append(text_mean(data["loss_change_nats"].values[layer, head, data["text_case"].values == c]))
            labels.append(f"{layer}.{head} {domain} {data['domain_dormancy'].values[c, layer, head]:.2f}")
    bars = xr.DataArray([c.value for c in costs], dims="head", coords={"head": np.array(labels, dtype=object)})
    known = [c.ci95 for c in costs if c.ci95 is not None]
    ends = [bars.copy(data=[ci95[i] for ci95 in known]) for i in (0, 1)] if len(known) == len(costs) else []
    switching = _switching_cost(result) if several else None
    ranked = "that differ most between domains" if several else "that matter most"
    return plots.bars(
        bars,
        title=switching.claim if switching else f"What it costs to remove the heads {ranked}",
        unit="nats per token",
        quantity="change of loss",
        intervals=(ends[0], ends[1]) if ends else None,
        caption=f"{result.about} Layer.head, domain, and the head's dormancy there; switching heads first, 95 % intervals "
        "over texts.",
        alt=f"Bars of the change in loss by domain for the removed heads {ranked}.",
    )
