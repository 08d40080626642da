"""What switching single tokens between two models does to what their answers say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from probekit import plots
from probekit.analysis import Finding, Measure, Result, fmt
from probekit.core import Batch, Outcome, Request
from probekit.stats import MIN_TEXTS, Estimate, text_mean, wilson

from .crossing import Answer, Desk, Read, at_random, by_rule

MODEL, BASE = "model", "base"  # roles
ARMS = (
    "base alone",
    "base, tokens from the model by rule",
    "base, tokens from the model at random",
    "model alone",
    "model, tokens from the base by rule",
    "model, tokens from the base at random",
)
FORWARD, REVERSE = (0, 1, 2, 3), (3, 4, 5, 0)  # primary alone, by rule, at random, the other alone
_DRAWS = 2000
_ANSWERS = ("case", "text", "sample")
_NOBODY = "; NaN where nothing is expected"
_ALIKE = "; NaN where the two models alone are not told apart"
_ENDS = {"low": "lower end of its 95 % interval", "high": "upper end of its 95 % interval"}
CROSSING_MEASURES = {
    "theta_nats": Measure((), "nats", "JS above which a token was switched"),
    "most_switches": Measure((), "tokens", "switches of an answer at most"),
    "expected": Measure(("text",), "1", "what answers to a prompt are held against; empty for nothing"),
    "expected_given": Measure(("text",), "1", "1 where the prompt came with the right answer"),
    "hit": Measure(_ANSWERS, "1", f"1 where an answer says what is expected{_NOBODY}"),
    "switched": Measure(_ANSWERS, "tokens", "tokens of the answer that the other model drew"),
    "length": Measure(_ANSWERS, "tokens", "tokens of the answer"),
    "hit_share": Measure(("case",), "share", f"answers that say what is expected{_NOBODY}"),
    **{f"hit_{end}": Measure(("case",), "share", f"{words}{_NOBODY}") for end, words in _ENDS.items()},
    "recovery": Measure(
        ("case",), "share", f"of the gap to the other model that is closed; 0 for a model alone{_ALIKE}"
    ),
    **{f"recovery_{end}": Measure(("case",), "share", f"{words}{_ALIKE}") for end, words in _ENDS.items()},
}


@dataclass(frozen=True)
class Rule:
    """When a token is switched.

    Args:
        above: the divergence above which it is.
        budget: switches of an answer at most.
    """

    above: float
    budget: int


def rule_for(own: Sequence[np.ndarray], budget: float, theta: float) -> Rule:
    """The rule that a budget means.

    Args:
        own: divergence at each token of each of the model's own answers.
        budget: a share of the tokens of an answer of mean length below 1, their number from 1 on; 0 for no switch.
        theta: the threshold; 0 for the one that a share of the tokens exceeds which is the budget's.
    """
    values = np.concatenate(own)
    mean_length = len(values) / len(own)
    number = max(1, round(budget * mean_length if budget < 1 else budget)) if budget else 0
    share = budget if budget < 1 else min(1.0, budget / mean_length)
    rank = min(int(share * len(values)), len(values) - 1)
    return Rule(theta or float(np.sort(values)[::-1][rank]), number)


def all_arms(desk: Desk, own: Sequence[Answer], read: Read, rule: Rule) -> Generator[Request, Any, list[list[Answer]]]:
    """The answers of all `ARMS`, in order; to be used with `yield from`.

    Args:
        desk: what they are written to.
        own: the model's own answers, numbered from 0 for each prompt.
        read: tells the divergence at each token of an answer.
        rule: when a token is switched.
    """
    n = 1 + max(a.number for a in own)
    alone = yield from desk.answers(n, BASE)
    arms = []
    for drafts, primary, other in ((alone, BASE, MODEL), (list(own), MODEL, BASE)):
        chosen = by_rule(desk, read, above=rule.above, budget=rule.budget)
        crossed = yield from desk.crossed(drafts, chosen, primary=primary, other=other)
        counts = {(a.prompt, a.number): len(a.switched) for a in crossed}
        control = yield from desk.crossed(drafts, at_random(desk, counts), primary=primary, other=other)
        arms += [drafts, crossed, control]
    return arms


def expected_answers(desk: Desk, prompts: Batch, outcome: Outcome, n: int) -> Generator[Request, Any, list[str | None]]:
    """What answers to each prompt are held against; to be used with `yield from`.

    The right answer where the prompt comes with one. Otherwise the model's usual one: what most of `n` further answers
    of its say, which count for nothing else, so that the choice flatters none of the answers that are judged. None if
    they say nothing.
    """
    given = [(outcome.read(text.answer) or text.answer) if text.answer else None for text in prompts]
    if all(given):
        return given
    further = replace(desk, sampling=replace(desk.sampling, seed=desk.sampling.seed + 1))
    answers = yield from further.answers(n, MODEL)
    said = yield from further.said(answers, outcome)
    for i, known in enumerate(given):
        counts = Counter(s for a, s in zip(answers, said, strict=True) if a.prompt == i and s is not None)
        given[i] = known or (min(counts, key=lambda s: (-counts[s], s)) if counts else None)
    return given


@dataclass(frozen=True)
class Shares:
    """How often answers of each arm say what is expected.

    Args:
        value: share; axis arm.
        ends: 95 % interval; axes (low, high), arm.
        recovery: (arm - primary alone) / (other alone - primary alone), 0 for a model alone; NaN where the two models
            alone are not told apart; axis arm.
        recovery_ends: its 95 % interval; axes (low, high), arm.
    """

    value: np.ndarray
    ends: np.ndarray
    recovery: np.ndarray
    recovery_ends: np.ndarray


def by_unit(hit: np.ndarray) -> tuple[np.ndarray, str]:
    """What is resampled: prompts, each with the mean of its answers, or the answers where prompts are fewer than five.

    Args:
        hit: 1 where an answer says what is expected; NaN for prompts of which nothing is; axes arm, text, sample.

    Returns:
        Axes arm, unit; and the name of the units.
    """
    known = hit[:, np.isfinite(hit).all(axis=(0, 2))]
    if known.shape[1] >= MIN_TEXTS:
        return known.mean(axis=2), "prompts"
    return known.reshape(len(hit), -1), "answers"


def shares(hit: np.ndarray) -> Shares:
    """Shares and recoveries of all arms, intervals over the units of `by_unit`, the same for all arms.

    Args:
        hit: as in `by_unit`.
    """
    values, name = by_unit(hit)
    n_arms, n = values.shape
    empty = np.full((2, n_arms), np.nan)
    if n == 0:
        return Shares(empty[0], empty, np.where(np.isin(range(n_arms), (0, 3)), 0.0, np.nan), empty)
    mean, ends = values.mean(axis=1), empty.copy()
    for arm in range(n_arms):
        one = text_mean(values[arm], name).within(0, 1).ci95
        single = name == "answers" or one is None or not np.ptp(values[arm])  # no spread: as of draws that agree
        ends[:, arm] = wilson(round(values[arm].sum()), n) if single else one
    chosen = np.random.default_rng(0).integers(0, n, (_DRAWS, n))
    draws = values[:, chosen].mean(axis=2)  # arm, draw
    recovery, around = np.zeros(n_arms), np.zeros((2, n_arms))
    for primary, *arms, other in (FORWARD, REVERSE):
        gap = draws[other] - draws[primary]
        low, high = np.quantile(gap, [0.025, 0.975])
        for arm in arms:
            if low <= 0 <= high:
                recovery[arm], around[:, arm] = np.nan, np.nan
                continue
            recovery[arm] = (mean[arm] - mean[primary]) / (mean[other] - mean[primary])
            some = gap != 0
            around[:, arm] = np.quantile(((draws[arm] - draws[primary])[some] / gap[some]), [0.025, 0.975])
    return Shares(mean, ends, recovery, around)


def difference(gains: np.ndarray, name: str) -> Estimate:
    """Mean of paired differences between shares, with its 95 % interval.

    Over prompts Student's t; over answers, whose differences are -1, 0 or 1, and where all differences are equal, the
    interval of Agresti and Min (2005), which half an answer more in each of the four cells keeps from having no width.

    Args:
        gains: one per unit, -1 to 1.
        name: what the units are.
    """
    one, n = text_mean(gains, name), len(gains)
    if one.ci95 is None or (name == "prompts" and np.ptp(gains)):
        return one.within(-1, 1)
    middle = gains.sum() / (n + 2)
    half = 1.959963984540054 * float(np.sqrt(((gains**2).sum() + 1) / (n + 2) - middle**2)) / np.sqrt(n + 2)
    ends = min(middle - half, one.value), max(middle + half, one.value)
    return Estimate(one.value, (float(ends[0]), float(ends[1])), n, name).within(-1, 1)


def crossing_measures(
    desk: Desk, arms: Sequence[Sequence[Answer]], prompts: Batch, outcome: Outcome
) -> Generator[Request, Any, dict[str, Any]]:
    """What the answers of all arms say, but for theta and the budget; for `xr.Dataset`; to be used with `yield from`.

    Args:
        desk: what they were written to.
        arms: the answers of `ARMS`, each prompt's in order.
        prompts: the prompts, with right answers if they are known.
        outcome: what is read off answers.
    """
    flat = [a for arm in arms for a in arm]
    n_prompts = len(prompts)
    said = yield from desk.said(flat, outcome)
    expected = yield from expected_answers(desk, prompts, outcome, len(arms[0]) // n_prompts)
    hit = [
        np.nan if expected[a.prompt] is None else float(s == expected[a.prompt])
        for a, s in zip(flat, said, strict=True)
    ]
    shape = (len(arms), n_prompts, -1)
    hits = np.array(hit).reshape(shape)
    found = shares(hits)
    return {
        "expected": ("text", np.array([e or "" for e in expected], dtype=object)),
        "expected_given": ("text", np.array([int(bool(t.answer)) for t in prompts])),
        "hit": (_ANSWERS, hits),
        "switched": (_ANSWERS, np.array([len(a.switched) for a in flat]).reshape(shape)),
        "length": (_ANSWERS, np.array([len(a.ids) for a in flat]).reshape(shape)),
        "hit_share": ("case", found.value),
        "hit_low": ("case", found.ends[0]),
        "hit_high": ("case", found.ends[1]),
        "recovery": ("case", found.recovery),
        "recovery_low": ("case", found.recovery_ends[0]),
        "recovery_high": ("case", found.recovery_ends[1]),
    }


def crossing_findings(result: Result) -> list[Finding]:
    """What few tokens of one model do in the answers of the other, in both directions, against random places."""
    return [_direction(result, FORWARD, (BASE, MODEL)), _direction(result, REVERSE, (MODEL, BASE))]


def _direction(result: Result, which: tuple[int, ...], roles: tuple[str, str]) -> Finding:
    primary, rule, random, other = which
    values, name = by_unit(result["hit"].values)
    null = "as many tokens switched at random places of the same answers"
    told, quantity = _told(result, rule, roles), f"gain from few tokens of the {roles[1]}"
    if not values.shape[1]:
        claim = f"{told}; none of the answers by which to tell what is expected says anything."
        quantity += " (not measurable)"
        return Finding(claim, 0.0, "share of answers", 0.0, null, None, 1, name, quantity=quantity)
    gain = difference(values[rule] - values[random], name)
    share = result["hit_share"].values
    where = {"switched": _mean_switches(result, rule), "switched_at_random": _mean_switches(result, random)}
    if not result["switched"].values[rule].any():
        claim = f"{told}: {share[primary]:.0%} of its answers {_say(result)}, {share[other]:.0%} of the {roles[1]}'s."
        return Finding(
            claim, gain.value, "share of answers", 0.0, null, gain.ci95, gain.n, gain.n_unit, where, quantity=quantity
        )
    clear = gain.ci95 is not None and not gain.ci95[0] <= 0 <= gain.ci95[1]
    claim = (
        f"{told}, {share[rule]:.0%} of the answers {_say(result)}{_closed(result, rule)}, with as many at random places "
        f"{share[random]:.0%}; {share[primary]:.0%} of the {roles[0]}'s own do, and {share[other]:.0%} of the {roles[1]}'s"
        f"{'' if np.isfinite(result['recovery'].values[rule]) else ', which are not told apart'}"
        f"{'' if clear else '; these answers do not tell the rule from random places'}."
    )
    return Finding(
        claim, gain.value, "share of answers", 0.0, null, gain.ci95, gain.n, gain.n_unit, where, quantity=quantity
    )


def _told(result: Result, rule: int, roles: tuple[str, str]) -> str:
    """What was switched, in words."""
    if not result["switched"].values[rule].any():
        theta = float(result["theta_nats"].values)
        why = f"JS exceeds {fmt(theta)} nats nowhere" if result["most_switches"].values else "nothing is to be switched"
        return f"No token of the {roles[0]}'s answers is drawn from the {roles[1]} ({why})"
    n, length = _mean_switches(result, rule), float(result["length"].values[rule].mean())
    return (
        f"With {n:.2g} of {length:.0f} tokens of the {roles[0]}'s answers drawn from the {roles[1]}, where JS exceeds "
        f"{fmt(float(result['theta_nats'].values))} nats"
    )


def _mean_switches(result: Result, arm: int) -> float:
    return float(result["switched"].values[arm].mean())


def _say(result: Result) -> str:
    given = result["expected_given"].values
    if given.all():
        return "are right"
    return "say what is expected" if given.any() else "say what the model usually says"


def _closed(result: Result, arm: int) -> str:
    value, low, high = (float(result[f"recovery{end}"].values[arm]) for end in ("", "_low", "_high"))
    return f" ({value:.0%} of the gap, {low:.0%} to {high:.0%})" if np.isfinite(value) else ""


def about(result: Result) -> str:
    """Both models and the corpus in a line, for captions."""
    other = result.provenance.get("other models", {}).get(BASE, {}).get("model", {}).get("name")
    return f"{result.about} {f'Base: {other}.' if other else ''}".strip()


def crossing_bars(result: Result) -> plots.Figure:
    """How often the answers of each arm say what is expected."""
    share, low, high = (np.nan_to_num(result[f"hit_{end}"].values) for end in ("share", "low", "high"))
    forward, reverse = (float(result["recovery"].values[which[1]]) for which in (FORWARD, REVERSE))
    known = np.isfinite(forward) and np.isfinite(reverse)
    title = (
        f"Few tokens by the rule close {forward:.0%} of the gap in the base's answers, {reverse:.0%} in the model's"
        if known
        else "The answers of the two models alone are not told apart: there is no gap that switching could close"
    )
    _, name = by_unit(result["hit"].values)
    counts = [
        f"{_mean_switches(result, arm):.1f} of {result['length'].values[arm].mean():.0f}" for arm in range(len(ARMS))
    ]
    labels = [arm if not result["switched"].values[i].any() else f"{arm} ({counts[i]})" for i, arm in enumerate(ARMS)]
    return plots.bars(
        {label: float(v) for label, v in zip(labels, share, strict=True)}, title=title, unit="share",
        quantity=f"answers that {_say(result)}", by="who writes",
        intervals={label: (float(a), float(b)) for label, a, b in zip(labels, low, high, strict=True)},
        caption=f"{about(result)} {result['hit'].shape[2]} answers to each prompt and case; 95 % intervals over {name}. In "
        "brackets: tokens that the other model drew, of all, on average. Gap: from the model that writes to the other, each "
        "alone.",
        alt="Bars of how often answers say what is expected: each model alone, with tokens of the other by the rule, and "
        "with as many at random places.",
    )  # fmt: skip
