"""Model shift: where two models with the same tokenizer differ along an answer, and what these places decide."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Result, fmt, param, register
from probekit.core import Base, Batch, Capture, Forward, ModelInfo, Request, Texts, token_coords
from probekit.methods.concentration import Units, carried
from probekit.methods.divergences import jensen_shannon, nucleus
from probekit.methods.shift_table import Along, along, spread, spread_coords
from probekit.methods.two_models import log_softmax, logits_of
from probekit.reduce import NextToken
from probekit.sampling import WritingParams
from probekit.sampling.crossing import Desk, Read
from probekit.sampling.inside import answers_only
from probekit.sampling.recovery import (
    ARMS,
    BASE,
    CROSSING_MEASURES,
    MODEL,
    all_arms,
    crossing_findings,
    crossing_measures,
    rule_for,
)
from probekit.sampling.shift_drawings import shift_drawings
from probekit.stats import rank_correlation

TOP = Capture("logits", NextToken(1))
FEW = 5  # hundredths of the tokens that the finding speaks of
_CUT = "after both distributions are cut to their nuclei"
_ENDLESS = f"{_CUT}; NaN where infinite, since the first has a token that the second has not"
_EMPTY = "; NaN for a tenth without tokens; an interval from a single answer is NaN, too"


@dataclass(frozen=True)
class ShiftParams(WritingParams):
    """Parameters of model-shift."""

    answers: int = param(4, low=1, high=1000, unit="answers", help="Answers that are drawn to each prompt")
    nucleus: float = param(0.7, low=0.01, high=1.0, unit="share", help="Nucleus of the truncated comparison")
    overlap_k: int = param(10, low=1, high=1000, unit="tokens", help="How many of the likeliest tokens are compared")
    near: float = param(
        0.01, low=1e-6, high=0.69, unit="nats", help="Divergence below which a token counts as unshifted"
    )
    budget: float = param(
        0.05, low=0.0, high=1000, help="Switched tokens of an answer at most: a share of a mean answer's tokens below 1, "
        "else their number; 0 switches none"
    )  # fmt: skip
    theta: float = param(
        0.0, low=0.0, high=0.69, unit="nats", help="Divergence above which a token is switched; 0 for the one that as "
        "many tokens exceed as the budget allows"
    )  # fmt: skip
    switch_on: str = param(
        "whole", choices=("whole", "nucleus"), help="Whether switching looks at whole distributions or at their nuclei"
    )


def _ended(name: str, dims: tuple[str, ...], unit: str, words: str, nan: str = "") -> dict[str, Measure]:
    """A measure and the ends of its 95 % interval."""
    ends = {
        f"{name}_{end}": Measure(dims, unit, f"{word} end of its 95 % interval{nan}")
        for end, word in (("low", "lower"), ("high", "upper"))
    }
    return {name: Measure(dims, unit, words + nan)} | ends


def _both(name: str, words: str, cut: str = _CUT) -> dict[str, Measure]:
    """A number of nats per token, whole and cut."""
    return {
        f"{name}_nats": Measure(("token",), "nats", words),
        f"{name}_cut_nats": Measure(("token",), "nats", f"{words}, {cut}"),
    }


@register
class ModelShift(Analysis):
    """At which tokens does a model differ from its base, and how much do these few tokens decide?

    Question:
        Along the answers of a model, at which tokens would its base have gone on otherwise; are these few or many, where
        do they lie, and do the answers of one model turn into the other's once these tokens are exchanged?

    Method:
        Texts are prompts. The model under study writes `answers` to each. Both models are read along them; at each token
        p is the base's distribution and q the model's, given the same tokens before it, at temperature 1. JS =
        ½ KL(p‖m) + ½ KL(q‖m), m = (p + q) / 2, 0 to ln 2 = 0.693 nats; KL in both directions; log q - log p of the token;
        whether the likeliest token is another; entropies; overlap of the likeliest tokens: whole, and once each
        distribution is cut to its nucleus. Every token has the same weight. Base entropy and place in the answer are
        divided into tenths.
        Cross-sampling: answers of one model in which the other draws the token wherever JS exceeds theta, up to a
        budget; in both directions. Whether a token is switched depends on the tokens before it alone. An answer counts if
        it says what is right, where the prompt comes with that, and otherwise what the model usually says, in further
        answers. Recovery = (crossed - primary alone) / (other alone - primary alone).

    Null:
        A model against itself: 0 at every token. For how uneven the shift is: every logit of the base changed by
        independent Gaussian noise, of the strength that gives the same mean JS. Such a change aims at nothing, and moves
        uncertain tokens more than sure ones. For cross-sampling: as many tokens switched at random places of each answer.

    Known failure modes:
        A nucleus can hold a single token: two that differ by little then have nothing in common, and JS jumps to ln 2.
        KL of nuclei is infinite as soon as a token lies in one only; it is left out there. Answers that stop at
        `max_tokens` have no end: the last tenth is then no ending. The model's own answers are read; the base's might
        show other places. Random places mostly fall where both models agree, so that their switches seldom change a
        token: that is what they are to show. Few answers leave recovery undetermined.

    References:
        Sparse but Critical, arXiv 2603.22446 (ICLR 2026): the divergence at tokens sampled from the tuned model, cut to
        the nucleus of 0.7, and cross-sampling. Its thresholds were not checked against the paper's text.
        Lin 1991, Divergence measures based on the Shannon entropy.
    """

    name = "model-shift"
    title = "Model shift"
    writes = True
    roles = (BASE,)
    Params = ShiftParams
    measures = {
        **_both("js", "Jensen-Shannon divergence of the two next-token distributions"),
        **_both("kl_model_base", "KL(model ‖ base)", _ENDLESS),
        **_both("kl_base_model", "KL(base ‖ model)", _ENDLESS),
        **_both("delta_logprob", "log-probability of the token, model minus base", f"{_CUT}; NaN where outside of one"),
        **_both("entropy_model", "entropy of the model's distribution"),
        **_both("entropy_base", "entropy of the base's distribution"),
        "top_overlap": Measure(("token",), "share", "the model's likeliest tokens that are among as many of the base's"),
        "top_overlap_cut": Measure(("token",), "share", "tokens in both nuclei among those in either"),
        "argmax_changed": Measure(("token",), "1", "1 where the likeliest token is another one"),
        "unspecific_nats": Measure(("token",), "nats", "JS that noise on all logits would give, its mean over tokens the same"),
        "unspecific_changed": Measure(("token",), "share", "how often such noise would change the likeliest token"),
        "model_top_id": Measure(("token",), "1", "the model's likeliest id"),
        "model_top_prob": Measure(("token",), "share", "its probability"),
        "base_top_id": Measure(("token",), "1", "the base's likeliest id"),
        "base_top_prob": Measure(("token",), "share", "its probability"),
        "vocab_str": Measure(("vocab",), "1", "what these ids show as"),
        "share_below": Measure(("threshold",), "share", "tokens whose JS is below a threshold in nats"),
        "share_below_cut": Measure(("threshold",), "share", f"the same, {_CUT}"),
        "share_below_unspecific": Measure(("threshold",), "share", "the same under noise on all logits"),
        **_ended("carried", ("rank",), "share", "of the total JS, on the tokens with the largest: up to each hundredth of "
                 "them; that of an even spread where all is 0"),
        "carried_cut": Measure(("rank",), "share", f"the same, {_CUT}"),
        "carried_unspecific": Measure(("rank",), "share", "the same under noise on all logits"),
        **_ended("js_by_place", ("bin",), "nats", "mean JS by relative place in the answer", _EMPTY),
        "unspecific_by_place": Measure(("bin",), "nats", f"the same under noise on all logits{_EMPTY}"),
        **_ended("js_by_entropy", ("bin",), "nats", "mean JS by rank of the base's entropy among all tokens", _EMPTY),
        "unspecific_by_entropy": Measure(("bin",), "nats", f"the same under noise on all logits{_EMPTY}"),
        **CROSSING_MEASURES,
    }  # fmt: skip

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        """The answers, two looks for words; both models along every answer, at first and after each switch but the last."""
        n, budget = len(batch) * params.answers, params.budget
        switches = max(1, round(budget * params.max_tokens if budget < 1 else budget)) if budget else 0
        return 3 + 2 * n * (1 + max(0, 2 * switches - 1))

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """The model's answers, both models along them, and answers that both write."""
        prompts = yield Texts()
        desk = Desk(tuple(text.ids for text in prompts), params.sampling())
        own = yield from desk.answers(params.answers, MODEL)
        bases = [desk.base(answer) for answer in own]
        known: dict[Base, Along] = {}
        for base in bases:
            if base not in known:
                known[base] = yield from _look(base, params)
        parts = [known[base] for base in bases]
        on = "js_cut" if params.switch_on == "nucleus" else "js"
        rule = rule_for([part[on] for part in parts], params.budget, params.theta)
        read = _reader(params, {base: part[on] for base, part in known.items()})
        arms = yield from all_arms(desk, own, read, rule)
        crossing = yield from crossing_measures(desk, arms, prompts, params.outcome)
        words = yield from _words(bases)
        return xr.Dataset(
            {
                **spread(parts, [answer.prompt for answer in own]), **words.variables, **crossing,
                "theta_nats": ((), rule.above), "most_switches": ((), rule.budget),
            },
            coords=words.coords | spread_coords() | {"case": np.array(ARMS, dtype=object)},
        )[list(self.measures)]  # fmt: skip

    def findings(self, result: Result) -> list[Finding]:
        """How sparse the shift is, where it lies, and what few tokens decide."""
        if not result["js_nats"].values.any():
            return [_alike(result), *crossing_findings(result)]
        own = (_sparse, _carriers, _likeliest, _placed, _uncertain)
        return [*(finding(result) for finding in own), *crossing_findings(result)]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The answers coloured by divergence, how unevenly it is spread, where it lies, and cross-sampling."""
        return shift_drawings(result)


def _look(base: Base, params: Any) -> Generator[Request, Any, Along]:
    """Both models at each token of an answer."""
    log_p, log_q = yield from _distributions(base)
    ids = base.ids[base.n_prompt :]
    return along(log_p, log_q, ids, top_p=params.nucleus, top_k=params.overlap_k)


def _distributions(base: Base) -> Generator[Request, Any, tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of the base and of the model where each token of the answer was drawn; axes token, vocab."""
    rows = slice(base.n_prompt - 1, -1)
    found = []
    for role in (BASE, MODEL):
        logits = yield from logits_of(base.ids, role, "both models along answers")
        found.append(log_softmax(logits[rows]))
    return found[0], found[1]


def _reader(params: Any, known: dict[Base, np.ndarray]) -> Read:
    """JS at each token of an answer; none is read twice."""

    def read(base: Base) -> Generator[Request, Any, np.ndarray]:
        if base not in known:
            log_p, log_q = yield from _distributions(base)
            if params.switch_on == "nucleus":
                log_p, log_q = nucleus(log_p, params.nucleus), nucleus(log_q, params.nucleus)
            known[base] = jensen_shannon(log_p, log_q)
        return known[base]

    return read


@dataclass(frozen=True)
class _Words:
    variables: dict[str, Any]
    coords: dict[str, Any]


def _words(bases: list[Base]) -> Generator[Request, Any, _Words]:
    """What each model would have said, the words for it, and the coordinates of the answers' tokens."""
    inputs, found, table = tuple(b.ids for b in bases), {}, {}
    for role in (MODEL, BASE):
        trace = yield Forward((TOP,), inputs=inputs, model=role, why="what each model would say")
        batch, rows = answers_only(bases, trace)
        seen = trace[TOP].isel(rank=0, token=rows - 1)
        found[f"{role}_top_id"] = ("token", seen["top_id"].values)
        found[f"{role}_top_prob"] = ("token", np.exp(seen["top_logprob"].values.astype(float)))
        table.update(trace.vocab)
    ids = sorted(table)
    strings = np.array([table[i] for i in ids], dtype=object)
    return _Words(found | {"vocab_str": ("vocab", strings)}, token_coords(batch) | {"vocab": np.array(ids)})


def _units(result: Result) -> Units:
    answers = result["text"].values
    return Units.choose(answers // result["hit"].sizes["sample"], answers)


def _finding(
    result: Result, claim: str, statistic: Callable[[np.ndarray], float], null: float,
    *, unit: str, quantity: str, where: Any = None,
) -> Finding:  # fmt: skip
    """A finding about all tokens; its claim ends in what the interval says of the null."""
    units = _units(result)
    value = statistic(np.arange(len(units.of)))
    low, high = {"rank correlation": (-1.0, 1.0), "× mean JS": (0.0, np.inf)}.get(unit, (0.0, 1.0))
    ends = units.interval(lambda rows: np.asarray(statistic(rows)), low=low, high=high)
    ci95 = None if ends is None else (float(ends[0]), float(ends[1]))
    clear = ci95 is None or not ci95[0] <= null <= ci95[1]
    tail = "." if clear else "; these answers do not tell the two apart."
    return Finding(claim + tail, float(value), unit, null, "noise on all logits of the base, with the same mean JS", ci95,
                   units.n, units.names, where or {}, quantity=quantity)  # fmt: skip


_NEAR = "tokens at which the base would hardly differ"


def _alike(result: Result) -> Finding:
    units, near = _units(result), result.params.as_dict()["near"]
    return Finding(
        f"The two models say the same at every one of the {len(units.of):,} tokens: JS is 0 nats at all of them.", 1.0,
        f"share of tokens below {near:g} nats", 1.0, "a model against itself", None if units.n < 2 else (1.0, 1.0),
        units.n, units.names, quantity=_NEAR,
    )  # fmt: skip


def _sparse(result: Result) -> Finding:
    js, near = result["js_nats"].values, result.params.as_dict()["near"]
    null = float((result["unspecific_nats"].values < near).mean())
    claim = (
        f"At {(js < near).mean():.0%} of the tokens of the model's answers the base would have gone on nearly the same: JS "
        f"below {near:g} nats, where a change that aims at nothing and has the same mean ({fmt(float(js.mean()))} nats) "
        f"gives {null:.0%}"
    )
    return _finding(
        result, claim, lambda rows: float((js[rows] < near).mean()), null, unit="share of tokens", quantity=_NEAR
    )


def _carriers(result: Result) -> Finding:
    js = result["js_nats"].values
    value, null = (float(result[name].values[FEW - 1]) for name in ("carried", "carried_unspecific"))
    place = int(js.argmax())
    text, pos = int(result["text"].values[place]), int(result["pos"].values[place])
    word = plots.visible(str(result["token_str"].values[place]))
    claim = (
        f"The {FEW} % of the tokens with the largest JS carry {value:.0%} of all of it (under a change that aims at "
        f"nothing {null:.0%}, were it spread evenly {FEW} %); the largest is at {word!r} (token {pos} of answer {text}), "
        f"{fmt(float(js[place]))} nats"
    )
    where = {"text": text, "pos": pos, "token": word}
    return _finding(
        result, claim, lambda rows: float(carried(js[rows])[FEW - 1]), null, unit="share of JS",
        quantity="JS at the few tokens where it is largest", where=where,
    )  # fmt: skip


def _likeliest(result: Result) -> Finding:
    changed, null = result["argmax_changed"].values, float(result["unspecific_changed"].values.mean())
    overlap = float(result["top_overlap"].values.mean())
    claim = (
        f"At {changed.mean():.1%} of the tokens the likeliest one is another (noise: {null:.1%}); of the model's "
        f"{result.params.as_dict()['overlap_k']} likeliest, {overlap:.0%} are among the base's"
    )
    return _finding(
        result, claim, lambda rows: float(changed[rows].mean()), null, unit="share of tokens",
        quantity="tokens whose likeliest token changes",
    )  # fmt: skip


def _placed(result: Result) -> Finding:
    js, answers, p = result["js_nats"].values, result["text"].values, result.params.as_dict()
    place = (result["pos"].values + 0.5) / np.bincount(answers)[answers]

    def start(values: np.ndarray, rows: np.ndarray, first: bool = True) -> float:
        here = rows[place[rows] < 0.1] if first else rows[place[rows] >= 0.9]
        mean = values[rows].mean()
        return float(values[here].mean() / mean) if here.size and mean > 0 else float("nan")

    every, quantity = np.arange(len(js)), "JS in the first tenth of answers"
    value, end, null = start(js, every), start(js, every, False), start(result["unspecific_nats"].values, every)
    if not np.isfinite([value, end, null]).all():
        claim = "The answers are too short for a first and a last tenth"
        return _finding(result, claim, lambda rows: 1.0, 1.0, unit="× mean JS", quantity=f"{quantity} (not measurable)")
    cut = (result["length"].sel(case=ARMS[3]).values >= p["max_tokens"]).mean()
    claim = (
        f"In the first tenth of an answer JS is {fmt(value)} times its mean (noise: {fmt(null)} times), in the last tenth "
        f"{fmt(end)} times{f', though {cut:.0%} of the answers stop for want of room' if cut else ''}"
    )
    return _finding(result, claim, lambda rows: start(js, rows), null, unit="× mean JS", quantity=quantity)


def _uncertain(result: Result) -> Finding:
    js, entropy = result["js_nats"].values, result["entropy_base_nats"].values
    value, null = (rank_correlation(v, entropy) for v in (js, result["unspecific_nats"].values))
    quantity = "JS against the base's entropy"
    if not np.isfinite([value, null]).all():
        claim = (
            "The base is as uncertain at one token as at another, so that its entropy tells none of them from others"
        )
        return _finding(
            result, claim, lambda rows: 0.0, 0.0, unit="rank correlation", quantity=f"{quantity} (not measurable)"
        )
    claim = (
        f"Where the base is uncertain, JS is {'larger' if value > 0 else 'smaller'}: rank correlation with its entropy "
        f"{value:.2f}, where a change that aims at nothing gives {null:.2f}"
    )
    return _finding(
        result, claim, lambda rows: rank_correlation(js[rows], entropy[rows]), null, unit="rank correlation",
        quantity=quantity,
    )  # fmt: skip
