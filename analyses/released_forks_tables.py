"""What released draws say of forks, as a result like any other, beside what was measured on the whole release."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

import probekit as pk
from probekit.sampling import ReleasedForks

EPSILONS = (0.3, 0.6)
SHARE = 0.2  # of the positions, by entropy
# Means over all 100 questions of the release (Llama-3-8B-Instruct, tinyMMLU), measured on its files.
WHOLE = {
    "positions": 205.0,
    "branches": 1.67,
    "max_drift": 0.347,
    "survival at 0.3": 0.707,
    "survival at 0.6": 0.870,
    "has_fork": 0.43,
    "n_forks": 0.69,
}
ROWS = {
    "positions": ("tokens", "Positions of the answer that were sampled", "positions sampled in an answer"),
    "branches": ("tokens", "Tokens tried at a position, mean", "tokens tried at a position"),
    "max_drift": ("1", "Largest L2 distance of o_t from o_0", "largest drift of the outcomes"),
    "survival at 0.3": (
        "share",
        "Probability that no token was drawn that leads elsewhere by 0.3 or more",
        "probability of taking no fork",
    ),
    "survival at 0.6": ("share", "The same by 0.6 or more", "probability of taking no fork"),
    "has_fork": (
        "share",
        "Questions with at least one alternative that lies 0.6 or more away",
        "questions with a fork",
    ),
    "n_forks": ("positions", "Positions with such an alternative", "positions that fork"),
}


@pk.register
class ReleasedForksStudy(pk.Analysis):
    """What do the draws that others released say of forks, drift and survival?

    Question:
        How far do outcomes drift along answers, how many tokens fork, how often would a sampled answer take no fork,
        and does the entropy of the next token find the forks?

    Method:
        Per question, from the released outcomes of the continuations of every token with a probability above 5 %: o_t,
        drift, survival and forks, defined as in `forking-paths`, without smoothing and with all categories. The entropy
        of a position is that of the tried tokens' probabilities divided by their sum. Change points: odds of at least
        one against none, exact Bayesian segmentation.

    Null:
        For entropy: the share of the fork positions that would lie among the top 20 % if they were any of the positions
        where at least two tokens were tried. Rows "whole release" are means over all 100 questions, measured on them.

    Known failure modes:
        200 draws per token leave a standard error of up to 0.035 per share. Outcomes were read by regular expression
        with the model's own choice as the fallback. A few questions are not the release: see the intervals.

    References:
        Bigelow et al. 2025, Forking Paths in Neural Text Generation, arXiv 2412.07961, section 3.
        The released draws: arXiv 2608.19611.
    """

    name, title = "released-forks", "Forks in released draws"
    measures = {
        "value": pk.Measure(("case", "sample"), "1", "of each question (axis sample); the unit is that of the row"),
        "whole": pk.Measure(("case",), "1", "mean over the whole release, the same row"),
        "change_odds": pk.Measure(("sample",), "1", "odds of at least one change of o_t against none, at most 1e12"),
        "top_share": pk.Measure(("sample",), "share", "fork positions among the top 20 % by entropy; NaN without a fork"),
        "chance": pk.Measure(("sample",), "share", "expected share, were they any positions with two tokens; NaN without"),
        "fork_count": pk.Measure(("sample",), "positions", "positions that fork at 0.6"),
        "difference": pk.Measure(("sample",), "share", "largest difference from the release's own o_t; NaN without one"),
        "question": pk.Measure(("sample",), "1", "name of the file"),
    }  # fmt: skip

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        """One per row, whether o_t is the release's, what entropy finds, where outcomes change."""
        return [_agrees(result), *_rows(result), _entropy(result), _changes(result)]

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """Survival and drift of these questions beside the whole release."""
        found = {f.where["case"]: f for f in result.findings if "case" in f.where}
        shares = {"max_drift": "largest drift", "survival at 0.3": "survival at 0.3"}
        shares |= {"survival at 0.6": "survival at 0.6", "has_fork": "has a fork"}
        both, ends = {}, {}
        for case, label in shares.items():
            f = found[case]
            both[f"{label}, these questions"], ends[f"{label}, these questions"] = f.value, f.ci95 or (f.value, f.value)
            both[f"{label}, whole release"], ends[f"{label}, whole release"] = WHOLE[case], (WHOLE[case], WHOLE[case])
        n = result.dataset.sizes["sample"]
        drift = result["value"].sel(case="max_drift").values
        return {
            "summary": pk.plots.bars(
                both, intervals=ends, title=f"{n} questions beside the whole release", unit="1", quantity="mean",
                caption=f"Released draws of {n} questions, 200 per token. Whiskers: 95 % intervals over questions.",
                alt="Bars of drift, survival and the share of questions with a fork, here and over the whole release.",
            ),
            "drift": pk.plots.bars(
                dict(zip(map(str, result["question"].values), drift.tolist(), strict=True)),
                title="How far the outcomes ahead drift along each answer", unit="1", quantity="largest L2 distance of o_t from o_0",
                caption="L2 distance; the most that two distributions can lie apart is 1.41.",
                alt="Bars of the largest drift by question.", by="question",
            ),
        }  # fmt: skip


def table_of(questions: Sequence[ReleasedForks]) -> xr.Dataset:
    """The dataset of `released-forks`."""
    forks = [q.forks for q in questions]
    counts = np.array([sum(bool(x.any()) for x in f.forked(0.6)) for f in forks], dtype=float)
    values = {
        "positions": [len(f.positions) for f in forks],
        "branches": [np.mean([len(p.alternatives) for p in f.positions]) for f in forks],
        "max_drift": [f.drift().max() for f in forks],
        **{f"survival at {e:g}": [f.survival(e)[-1] for f in forks] for e in EPSILONS},
        "has_fork": counts > 0,
        "n_forks": counts,
    }
    top = np.array([_among_top(f) for f in forks])
    return xr.Dataset(
        {
            "value": (("case", "sample"), np.array([np.asarray(values[k], dtype=float) for k in ROWS])),
            "whole": ("case", [WHOLE[k] for k in ROWS]),
            "change_odds": ("sample", [min(pk.sampling.find_changes(f.counts()).odds, 1e12) for f in forks]),
            "top_share": ("sample", top[:, 0]),
            "chance": ("sample", top[:, 1]),
            "fork_count": ("sample", counts),
            "difference": ("sample", [q.difference() for q in questions]),
            "question": ("sample", np.array([q.name for q in questions], dtype=object)),
        },
        coords={"case": np.array(list(ROWS), dtype=object)},
    )


def _among_top(forks: Any) -> tuple[float, float]:
    """Share of the fork positions among the top 20 % by entropy, and what chance gives among those with two tokens."""
    weights = [np.array([a.prob for a in p.alternatives]) for p in forks.positions]
    entropy = np.array([-(w / w.sum() * np.log(w / w.sum())).sum() for w in weights])
    forked = np.array([bool(x.any()) for x in forks.forked(0.6)])
    if not forked.any():
        return float("nan"), float("nan")
    order = np.argsort(-entropy, kind="stable")[: int(np.ceil(SHARE * len(entropy)))]
    top = np.zeros(len(entropy), dtype=bool)
    top[order] = True
    several = np.array([len(w) > 1 for w in weights])
    return float(top[forked].mean()), float((top & several).sum() / several.sum())


def _rows(result: pk.Result) -> list[pk.Finding]:
    found = []
    for case, values, whole in zip(result["case"].values, result["value"].values, result["whole"].values, strict=True):
        unit, what, quantity = ROWS[str(case)]
        m = pk.stats.text_mean(values, "questions")
        m = m.within(0, 1) if unit == "share" else m.within(0, np.inf)
        claim = f"{what}: {m.value:.3g} {unit if unit != '1' else ''}".rstrip() + f" (whole release {whole:.3g})."
        meaning = "mean over all 100 questions of the release"
        found.append(
            pk.Finding(
                claim,
                m.value,
                unit,
                float(whole),
                meaning,
                m.ci95,
                m.n,
                m.n_unit,
                {"case": str(case)},
                quantity=quantity,
            )
        )
    return found


def _agrees(result: pk.Result) -> pk.Finding:
    worst = result["difference"].values
    known = worst[np.isfinite(worst)]
    if not known.size:
        claim = "The release states no o_t to compare with."
        quantity = "difference of o_t from the release's (not measurable)"
        return pk.Finding(claim, 0.0, "share", 0.0, "no difference", None, 1, "release", quantity=quantity)
    m = pk.stats.text_mean(known, "questions")
    return pk.Finding(
        f"o_t agrees with the release's own to {known.max():.1g} in all {known.size} questions.",
        m.value, "share", 0.0, "no difference", m.ci95, m.n, m.n_unit, quantity="difference of o_t from the release's",
    )  # fmt: skip


def _entropy(result: pk.Result) -> pk.Finding:
    known = np.isfinite(result["top_share"].values)
    n = result["fork_count"].values
    if not known.any():
        return pk.Finding(
            "No token of these answers forks.", 0.0, "share", 0.0, "no fork", None, 1, "release",
            quantity="fork positions among the highest entropies (not measurable)",
        )  # fmt: skip
    weight = n[known] / n[known].sum()
    value = float((result["top_share"].values[known] * weight).sum())
    chance = float((result["chance"].values[known] * weight).sum())
    rng = np.random.default_rng(0)
    draws = rng.integers(0, known.sum(), (2000, int(known.sum())))
    hits = result["top_share"].values[known] * n[known]
    means = hits[draws].sum(axis=1) / n[known][draws].sum(axis=1)
    low, high = (float(x) for x in np.quantile(means, [0.025, 0.975]))
    return pk.Finding(
        f"{value:.0%} of the {int(n.sum())} fork positions lie among the top 20 % by entropy; chance, given that two tokens "
        f"were tried, is {chance:.0%}.",
        value, "share of fork positions", chance, "any position with two tokens", (low, high), int(known.sum()), "questions",
        quantity="fork positions among the highest entropies",
    )  # fmt: skip


def _changes(result: pk.Result) -> pk.Finding:
    strong = result["change_odds"].values > pk.sampling.STRONG
    m = pk.stats.text_mean(strong.astype(float), "questions").within(0, 1)
    return pk.Finding(
        f"Outcomes change along {int(strong.sum())} of {len(strong)} answers beyond doubt (odds above 9).",
        m.value, "share of questions", 0.0, "one distribution all along: odds above 9 are not expected", m.ci95, m.n, m.n_unit,
        quantity="answers whose outcomes change",
    )  # fmt: skip
