"""Forking paths: at which tokens of an answer its outcome is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Result, fmt, param, register
from probekit.core import Batch, Branch, Fork, Forward, InputError, ModelInfo, Texts
from probekit.sampling import STRONG, Draws, WritingParams, base_answers, distance, sampled_until
from probekit.sampling.fork_table import Explored, drawn_at, fork_table, plausible_tokens
from probekit.sampling.inside import INSIDE, INSIDE_MEASURES, MOST_SHOWN, inside_drawings
from probekit.stats import Estimate, text_mean


@dataclass(frozen=True)
class ForkingParams(WritingParams):
    """Parameters of forking-paths."""

    p_min: float = param(0.05, low=0.001, high=0.5, unit="share", help="Least probability of a token that is tried")
    n: int = param(10, low=2, high=10000, unit="continuations", help="Continuations per token in the first round")
    most: int = param(30, low=2, high=10000, unit="continuations", help="Continuations per token at most")
    width: float = param(
        0.15, low=0.005, high=1.0, unit="share", help="Half-width of the interval at which a token has enough"
    )
    spacing: int = param(1, low=1, high=64, unit="tokens", help="Look at every n-th token of the answer")
    epsilon: float = param(0.6, low=0.05, high=1.4, help="Distance of outcome distributions from which a token forks")


@register
class ForkingPaths(Analysis):
    """At which tokens of an answer is its outcome decided, and what would other tokens have led to?

    Question:
        Which tokens of an answer, had another plausible token been drawn in their place, would have led to another
        outcome; and where along the answer does its outcome become settled?

    Method:
        Texts are prompts. The greedy answer to each is the base path. At each of its tokens, every token with a
        probability above `p_min` (and the base's own) is put there and continued, `n` times at first and up to `most`
        times, until the 95 % Wilson interval of its commonest outcome is narrow enough. o[t, w] is the share of each
        outcome among the continuations after token w at position t; o_t their mean over tokens, weighed by the tokens'
        probabilities at the temperature of the draws. Where only the base's own token is plausible, nothing is drawn: such a position has the
        distribution of the next one that was, and the end has the answer's own outcome. Semantic drift is the L2
        distance of o_t from o_0. An alternative forks if o[t, w] lies epsilon or more from o[t, base's token];
        the hazard is the probability of such tokens, survival the product of 1 - hazard. The token that decides most has
        the alternative with the largest product of probability and distance beyond chance. Change points: exact Bayesian
        segmentation of the outcome counts of the positions that were sampled, and of the continuations of the answer's own
        token at the last of them; a change is reported if the odds of at least one exceed 9. Beside them, from
        one pass over the answers: the lens' log-probability of the token over depth and the attention that the
        position which predicts it pays to position 0.

    Null:
        For forks: the base token's own continuations, split in halves of even and odd numbers, under the same epsilon;
        what share of them lie that far apart by chance. For change points: odds of 1.

    Known failure modes:
        Few continuations make distances large by chance: see the null. Stopping early once an interval is narrow
        pulls shares slightly towards 0 and 1. Outcomes that are read wrongly fork where the answer does not. Tokens
        below `p_min` are never tried. A greedy base is one path among many.

    References:
        Bigelow et al. 2025, Forking Paths in Neural Text Generation, arXiv 2412.07961, sections 2 and 3.
        Fearnhead 2006, Exact and efficient Bayesian inference for multiple changepoint problems.
    """

    name = "forking-paths"
    title = "Forking paths"
    writes = True
    Params = ForkingParams
    measures = {
        "outcome_share": Measure(("token", "case"), "share", "o_t: outcomes ahead of the token, before it is drawn"),
        "sampled": Measure(("token",), "1", "1 where continuations were drawn; elsewhere one token is plausible"),
        "drift": Measure(("token",), "1", "L2 distance of o_t from that of the text's first token"),
        "hazard": Measure(("token",), "share", "probability of a token that leads elsewhere, by epsilon or more"),
        "survival": Measure(("token",), "share", "probability that no such token was drawn up to this one"),
        "change": Measure(("token",), "share", "posterior of a change just before the token, given at least one"),
        "change_odds": Measure(("text",), "1", "odds of at least one change against none, at most 1e12"),
        "branch_share": Measure(("branch", "case"), "share", "o[t, w]: outcomes of the continuations after one token"),
        "branch_place": Measure(("branch",), "1", "place on the token axis that the token was put at"),
        "branch_id": Measure(("branch",), "1", "id of the token"),
        "branch_prob": Measure(("branch",), "share", "its probability there"),
        "branch_n": Measure(("branch",), "continuations", "how many were drawn"),
        "branch_distance": Measure(("branch",), "1", "L2 distance of its outcomes from those of the answer's own token"),
        "half_distance": Measure(("branch",), "1", "the same between halves of its own continuations; NaN with fewer than four"),
        **INSIDE_MEASURES,
        "answer_case": Measure(("text",), "1", "place on the case axis of what the answer itself says"),
    }  # fmt: skip

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        """The answers, one look at them, and a few rounds of continuations."""
        return 2 + max(1, int(np.ceil(np.log2(params.most / params.n))) + 1)

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Greedy answers, a look inside them, continuations of every plausible token."""
        if params.most < params.n:
            raise InputError(f"most={params.most} is less than the {params.n} continuations of the first round (n).")
        outcome, at = params.outcome, drawn_at(params.temperature)
        prompts = yield Texts()
        bases, answers = yield from base_answers(prompts, params.max_tokens, outcome)
        inside = yield Forward(
            (*INSIDE, *([] if at in INSIDE else [at])), inputs=tuple(b.ids for b in bases), why="inside the answers"
        )
        tried = plausible_tokens(bases, inside, at, p_min=params.p_min, spacing=params.spacing)
        forks = tuple(Fork(i, place, token) for (i, place), some in tried.items() if len(some) > 1 for token in some)
        draws: Draws = {}
        if forks:
            request = Branch(
                tuple(bases), forks, params.n, 0, params.sampling(), outcome, why="plausible tokens continued"
            )
            draws = yield from sampled_until(request, most=params.most, width=params.width)
        explored = Explored(bases, [a.outcome for a in answers], inside, at, tried, draws)
        return fork_table(explored, params.epsilon)[list(self.measures)]

    def findings(self, result: Result) -> list[Finding]:
        """The token that decides most, how many tokens fork, whether and where the outcome settles."""
        return [_decisive(result), _forks(result), _settled(result), _survival(result)]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The stream of outcomes over the text, what alternatives lead to, drift and survival, and the inside."""
        data, found = result.dataset, result.findings
        deciding = _deciding(result)
        first = int(data["text"].values[0]) if deciding is None else deciding.text
        one = data.isel(token=data["text"].values == first)
        tokens = tuple(map(str, one["token_str"].values))
        marks = (
            []
            if deciding is None
            else [(deciding.place, f"{plots.visible(tokens[deciding.place])} or {deciding.shown}?")]
        )
        about = f"{result.about} Answer {first}, greedy; continuations at the tokens where more than one is plausible."
        curves = {"drift from the start": one["drift"], "survival": one["survival"]}
        return {
            "stream": plots.stream(
                one["outcome_share"].transpose("token", "case"), tokens, title=found[0].claim, caption=about, marks=marks,
                alt="Shares of the outcomes that lie ahead at each token of the answer, stacked, over the text.",
            ),
            "drift": plots.lines(
                curves | {"change just here": one["change"]}, title=found[2].claim, unit="1", quantity="per token",
                caption=f"{about} Drift: L2 distance of the outcomes ahead from those at the start. Survival: no token "
                "was drawn that leads elsewhere.",
                alt="Semantic drift, survival and the posterior of a change against the token of the answer.",
            ),
            "alternatives": _alternatives(result, first),
            **inside_drawings(data, _places(result), about),
            "inside": plots.heatmap(
                one["lens_logprob_nats"], title="When the layers know each token of the answer", unit="nats",
                quantity="log-probability by the lens", caption=f"{about} Logit lens at the place that predicts the token.",
                alt="Heatmap over layer and token of the lens' log-probability of the answer's own token.",
            ),
            "strip": _strip(result),
        }  # fmt: skip


@dataclass(frozen=True)
class _Deciding:
    """The alternative on which most depends: its probability times how far it leads from the answer's own token."""

    text: int
    place: int
    branch: int
    shown: str


def _texts_of_branches(result: Result) -> np.ndarray:
    return result["text"].values[result["branch_place"].values]


def _is_alternative(result: Result) -> np.ndarray:
    """Which branches are not the answer's own token."""
    return result["branch_id"].values != result["token_id"].values[result["branch_place"].values]


def _deciding(result: Result) -> _Deciding | None:
    other = np.flatnonzero(_is_alternative(result))
    if not other.size:
        return None
    best = int(other[np.argmax(_weight(result)[other])])
    place = int(result["branch_place"].values[best])
    text = int(result["text"].values[place])
    within = place - int(np.flatnonzero(result["text"].values == text)[0])
    return _Deciding(text, within, best, plots.visible(_word(result, int(result["branch_id"].values[best]))))


def _weight(result: Result) -> np.ndarray:
    """How much depends on each branch: its probability times its distance beyond what few continuations give by chance.

    Far and likely: the answer's last words may be swapped for the opposite, but hardly ever are. From the squared
    distance its bias is taken, sum p (1 - p) / (n - 1) for each of the two distributions.
    """
    place, shares, n = (result[f"branch_{name}"].values for name in ("place", "share", "n"))
    noise = (shares * (1 - shares)).sum(axis=1) / np.maximum(n - 1, 1)
    own = np.flatnonzero(~_is_alternative(result))
    of_own = np.zeros(result.dataset.sizes["token"])
    of_own[place[own]] = noise[own]
    beyond = result["branch_distance"].values ** 2 - noise - of_own[place]
    return result["branch_prob"].values * np.sqrt(np.maximum(beyond, 0))


def _places(result: Result) -> dict[str, int]:
    """The deciding token, and up to three more on which much depends, as places on the token axis."""
    other = np.flatnonzero(_is_alternative(result))
    weight = _weight(result)
    order = other[np.argsort(-weight[other], kind="stable")]
    places = list(dict.fromkeys(int(result["branch_place"].values[k]) for k in order if weight[k] > 0))[:MOST_SHOWN]
    return {("deciding" if i == 0 else f"fork {i + 1}"): at for i, at in enumerate(places)}


def _word(result: Result, token: int) -> str:
    table = plots.words_by_id(result["vocab_str"])
    return table.get(token, f"[{token}]")


_FARTHEST = "distance of the alternative that leads farthest"


def _decisive(result: Result) -> Finding:
    found, data = _deciding(result), result.dataset
    by_chance = _by_chance(result)
    if found is None:
        claim = "At every token of the answers only one token is plausible: nothing could have led elsewhere."
        return Finding(claim, 0.0, "L2 distance", 0.0, "no alternative", None, 1, "alternatives", quantity=_FARTHEST)
    at = int(data["branch_place"].values[found.branch])
    own = plots.visible(str(data["token_str"].values[at]))
    shares, cases = data["branch_share"].values[found.branch], data["case"].values
    base = next(k for k in np.flatnonzero(data["branch_place"].values == at) if not _is_alternative(result)[k])
    top, was = int(shares.argmax()), int(data["branch_share"].values[base].argmax())
    value = float(data["branch_distance"].values[found.branch])
    n = int(data["branch_n"].values[found.branch])
    low, high = _interval(data["branch_share"].values[base], shares, (int(data["branch_n"].values[base]), n))
    return Finding(
        f"The token that decides most is {own!r} (token {found.place} of answer {found.text}): with {found.shown!r} in its "
        f"place ({float(data['branch_prob'].values[found.branch]):.0%} likely), {shares[top]:.0%} of the answers say "
        f"{str(cases[top])!r}; with {own!r}, {data['branch_share'].values[base][was]:.0%} say {str(cases[was])!r}.",
        value, "L2 distance", by_chance, "median distance between halves of the same continuations", (low, high), n,
        "continuations", {"text": found.text, "pos": found.place, "token": found.shown}, quantity=_FARTHEST,
    )  # fmt: skip


def _by_chance(result: Result) -> float:
    halves = result["half_distance"].values
    return float(np.nanmedian(halves)) if np.isfinite(halves).any() else 0.0


def _interval(base: np.ndarray, other: np.ndarray, n: tuple[int, int], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the distance between two distributions, resampling the continuations of both."""
    rng = np.random.default_rng(0)
    one, two = (rng.multinomial(k, p / p.sum(), draws) / k for k, p in zip(n, (base, other), strict=True))
    low, high = np.quantile(np.sqrt(((one - two) ** 2).sum(axis=1)), [0.025, 0.975])
    value = distance(base, other, "l2")
    return min(float(low), value), max(float(high), value)


def _forks(result: Result) -> Finding:
    p, other = result.params.as_dict(), _is_alternative(result)
    far = result["branch_distance"].values >= p["epsilon"] - 1e-12
    halves = result["half_distance"].values
    known = np.isfinite(halves)
    null = float((halves[known] >= p["epsilon"]).mean()) if known.any() else 0.0
    places = np.unique(result["branch_place"].values[far & other])
    share = _per_text(result, np.where(other, far, np.nan), _texts_of_branches(result)) if other.any() else None
    if share is None or not np.isfinite(share.value):
        return Finding("No token of the answers has a plausible alternative.", 0.0, "share of alternatives", 0.0,
                       "no alternative", None, 1, "answers", quantity="alternatives that fork (not measurable)")  # fmt: skip
    n_tokens, tried = len(result["token_id"]), int(result["sampled"].values.sum())
    return Finding(
        f"{len(places)} of {n_tokens} tokens fork: an alternative that leads elsewhere, by {p['epsilon']:g} or more "
        f"({tried} tokens have one that is plausible; {share.value:.1%} of the alternatives fork).",
        share.value, "share of alternatives", null, "halves of the same continuations that lie as far apart", share.ci95,
        share.n, share.n_unit, {"n_forks": len(places)}, quantity="alternatives that fork",
    )  # fmt: skip


def _per_text(result: Result, values: np.ndarray, texts: np.ndarray) -> Estimate:
    every = np.unique(result["text"].values)
    means = [float(np.nanmean(v)) if np.isfinite(v := values[texts == t]).any() else np.nan for t in every]
    return text_mean(np.array(means), "answers").within(0, 1)


def _settled(result: Result) -> Finding:
    odds, change, text = result["change_odds"].values, result["change"].values, result["text"].values
    n = len(odds)
    strong = odds > STRONG
    share = text_mean(strong.astype(float), "answers").within(0, 1)
    best = int(np.argmax(odds))
    here = np.flatnonzero(text == np.unique(text)[best])
    place = int(change[here].argmax())
    word = plots.visible(str(result["token_str"].values[here[place]]))
    told = (
        f"Its outcome changes most likely just before token {place} ({word!r})"
        if n == 1
        else (f"The clearest change is in answer {best}, just before token {place} ({word!r})")
    )
    claim = (
        f"{told}: odds {'above 1e12' if odds[best] >= 1e12 else fmt(float(odds[best]))} to 1 that it changes at all."
        if strong.any()
        else f"Along the text as a whole, no change of the outcomes ahead is beyond doubt: odds {fmt(float(odds[best]))} to 1 "
        f"at most, from {int(result['sampled'].values.sum())} sampled positions."
    )
    return Finding(
        claim, share.value, "share of answers", 0.0, "one distribution all along: odds above 9 are not expected",
        share.ci95, share.n, share.n_unit, {"text": best, "pos": place, "odds": float(odds[best])},
        quantity="answers whose outcomes change",
    )  # fmt: skip


def _survival(result: Result) -> Finding:
    text, survival = result["text"].values, result["survival"].values
    ends = np.array([survival[text == t][-1] for t in np.unique(text)])
    mean = text_mean(ends, "answers").within(0, 1)
    return Finding(
        f"A sampled answer takes none of these forks with probability {mean.value:.0%}.",
        mean.value, "share", 1.0, "no token forks", mean.ci95, mean.n, mean.n_unit,
        quantity="probability of taking no fork",
    )  # fmt: skip


def _alternatives(result: Result, text: int) -> plots.Figure:
    """What the alternatives that lie farthest lead to."""
    texts, other = _texts_of_branches(result), _is_alternative(result)
    mine = np.flatnonzero((texts == text) & other)
    mine = mine[np.argsort(-result["branch_distance"].values[mine], kind="stable")][:12]
    start = int(np.flatnonzero(result["text"].values == text)[0])
    values = {}
    for k in mine:
        at = int(result["branch_place"].values[k])
        own, new = (
            plots.visible(w)
            for w in (str(result["token_str"].values[at]), _word(result, int(result["branch_id"].values[k])))
        )
        values[f"({at - start}) {own} → {new}"] = float(result["branch_distance"].values[k])
    return plots.bars(
        values or {"no alternative": 0.0}, title="Which tokens, in the place of the answer's own, lead elsewhere",
        unit="1", quantity="L2 distance of the outcomes", reference=(result.params.as_dict()["epsilon"], "epsilon"), by="token put in its place",
        caption=f"{result.about} Answer {text}; the place in brackets, then the answer's token and the one tried.",
        alt="Bars of the distance between the outcomes of alternatives and those of the answer's own tokens.",
    )  # fmt: skip


def _strip(result: Result) -> plots.TokenStrip:
    data = result.dataset
    place, other = data["branch_place"].values, _is_alternative(result)
    farthest = np.zeros(data.sizes["token"])
    np.maximum.at(farthest, place[other], data["branch_distance"].values[other])
    notes = [""] * data.sizes["token"]
    for k in np.flatnonzero(other):
        top = int(data["branch_share"].values[k].argmax())
        said = f"{plots.visible(_word(result, int(data['branch_id'].values[k])))!r} → {data['case'].values[top]}"
        notes[place[k]] += ("; " if notes[place[k]] else "") + f"{said} ({data['branch_share'].values[k][top]:.0%})"
    return plots.TokenStrip(
        title="Where another token would have led elsewhere",
        tokens=tuple(map(str, data["token_str"].values)),
        texts=data["text"].values,
        quantities=(
            plots.Quantity("farthest alternative", "L2 distance", farthest, low=0),
            plots.Quantity("entropy of the next token", "nats", data["entropy_nats"].values, low=0),
            plots.Quantity("attention on position 0", "share", data["sink_share"].mean("layer").values, low=0, high=1),
        ),
        caption=f"{result.about} The greedy answers. Hover for what the alternatives lead to.",
        alt="The answers, each token coloured by how far an alternative in its place leads elsewhere.",
        notes=tuple(notes),
    )
