"""What critical-tokens claims and shows, from its result alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit import plots
from probekit.analysis import Finding, Result, fmt
from probekit.stats import Estimate, text_mean, wilson

from .critical import NOT_MEASURED
from .critical_table import FOUND, GROUPS, STATUS
from .inside import inside_drawings

_ABOUT = ("the critical token", "a random token with as much freedom", "any random token")


@dataclass(frozen=True)
class _Critical:
    """The critical token of one answer.

    Args:
        text: number of the prompt.
        place: on the token axis.
        at: within the answer.
        branch: on the branch axis.
        before: share of right continuations without it, and of how many; of the prompt's where it is the first.
    """

    text: int
    place: int
    at: int
    branch: int
    before: tuple[float, int]


def critical_findings(result: Result) -> list[Finding]:
    """The clearest critical token, what replacing helps, where critical tokens lie, what was left out."""
    found = _found(result)
    if not found:
        return [_statuses(result)]
    compared = [f for f in (_compared(result, 1), _compared(result, 2)) if f is not None]
    return [_clearest(result, found), *compared, *_where(result, found), _own_words(result, found), _statuses(result)]


def _found(result: Result) -> list[_Critical]:
    """Critical tokens, the one before which most continuations were right first."""
    data = result.dataset
    texts, share, drawn = data["text"].values, data["success_share"].values, data["drawn"].values
    n = data.sizes["sample"]
    found = []
    for branch in np.flatnonzero(data["branch_group"].values == 0):
        place = int(data["branch_place"].values[branch])
        text = int(texts[place])
        at = place - int(np.flatnonzero(texts == text)[0])
        prompt = float(data["prompt_success"].values[text]), n
        before = (float(share[place - 1]), int(drawn[place - 1])) if at else prompt
        found.append(_Critical(text, place, at, int(branch), before))
    return sorted(found, key=lambda c: -c.before[0])


def _word(result: Result, place: int) -> str:
    return repr(plots.visible(str(result["token_str"].values[place])))


def _of(share: float, n: int, what: str = "") -> str:
    """A count in words."""
    right = round(share * n)
    return f"{'none' if right == 0 else 'all' if right == n else f'{right:,}'} of {n:,}{what}"


def _clearest(result: Result, found: list[_Critical]) -> Finding:
    """The critical token after whose predecessor most was still possible; its gain was drawn afresh."""
    one, data = found[0], result.dataset
    kept, replaced = (data[name].values[one.branch] for name in ("kept_right", "replaced_right"))
    n = len(kept)
    says, right = (plots.visible(str(data[name].values[one.text])) for name in ("says", "right_answer"))
    ahead = "before it" if one.at else "from the prompt"
    value = float(replaced.mean() - kept.mean())
    return Finding(
        f"After {_word(result, one.place)} (token {one.at} of the answer to prompt {one.text}, which says {says!r} where "
        f"{right!r} is right), {_of(kept.mean(), n)} fresh continuations are right; {ahead} {_of(*one.before)} were; with "
        f"another token in its place {_of(replaced.mean(), n)} are.",
        value, "share", 0.0, "the token makes no difference", _difference(int(kept.sum()), int(replaced.sum()), n), n,
        "continuations", {"text": one.text, "pos": one.at, "token": str(data["token_str"].values[one.place])},
        quantity="gain at the clearest critical token",
    )  # fmt: skip


def _difference(before: int, after: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of n (Newcombe 1998, method 10)."""
    p, q = before / n, after / n
    (low_p, high_p), (low_q, high_q) = wilson(before, n), wilson(after, n)
    low = q - p - float(np.hypot(q - low_q, high_p - p))
    return low, q - p + float(np.hypot(high_q - q, p - low_p))


def _per_answer(result: Result, values: np.ndarray, group: int) -> np.ndarray:
    """Mean of a branch's values over each answer's tokens of a group; NaN where it has none. Axis answer."""
    data = result.dataset
    texts, groups = data["text"].values[data["branch_place"].values], data["branch_group"].values
    means = []
    for text in np.unique(texts[groups == 0]):
        mine = values[(texts == text) & (groups == group)]
        means.append(mine.mean() if len(mine) else np.nan)
    return np.array(means, dtype=float)


def _gain(result: Result, group: int) -> Estimate:
    """Mean over answers of what replacing tokens of a group gains."""
    return text_mean(_per_answer(result, result["gain"].values, group), "answers").within(-1, 1)


def _compared(result: Result, group: int) -> Finding | None:
    """Replacing the critical token against replacing random ones, paired within answers."""
    gain, right = result["gain"].values, (result["kept_right"].mean("sample"), result["replaced_right"].mean("sample"))
    ours, theirs = (_per_answer(result, gain, g) for g in (0, group))
    difference = text_mean(ours - theirs, "answers").within(-2, 2)
    if not difference.n:
        return None
    both = np.isfinite(theirs)
    kept, replaced = (_per_answer(result, r.values, 0)[both].mean() for r in right)
    other = [_per_answer(result, r.values, group)[both].mean() for r in right]
    return Finding(
        f"Replacing the critical token takes right continuations from {kept:.1%} to {replaced:.1%}; replacing "
        f"{_ABOUT[group]} of the same answers, from {other[0]:.1%} to {other[1]:.1%}: the gain is "
        f"{abs(difference.value) * 100:.1f} points {'larger' if difference.value >= 0 else 'smaller'}{_chance(difference)}.",
        difference.value, "share", 0.0, f"the gain from replacing {_ABOUT[group]}", difference.ci95, difference.n,
        difference.n_unit, {"group": GROUPS[group]}, quantity=f"gain of critical over {('', 'equally free', 'any')[group]} random tokens",
    )  # fmt: skip


def _lengths(result: Result, found: list[_Critical]) -> np.ndarray:
    texts = result["text"].values
    return np.array([(texts == c.text).sum() for c in found])


def _chance(difference: Estimate) -> str:
    low, high = difference.ci95 or (-1.0, 1.0)
    return ", which may be chance" if low <= 0 <= high else ""


def _answers(found: list[_Critical]) -> str:
    return f"{len(found):,} answer{'s' * (len(found) != 1)}"


def _where(result: Result, found: list[_Critical]) -> list[Finding]:
    """Where critical tokens lie, and how sure the model was of them."""
    places, lengths = np.array([c.at for c in found]), _lengths(result, found)
    along = text_mean((places + 0.5) / lengths, "answers").within(0, 1)
    texts, entropy = result["text"].values, result["entropy_nats"].values
    excess = text_mean(np.array([entropy[c.place] - entropy[texts == c.text].mean() for c in found]), "answers")
    probs = np.array([result["probability"].values[c.place] for c in found])
    here = np.mean([entropy[c.place] for c in found])
    return [
        Finding(
            f"In {_answers(found)}, the critical token lies {along.value:.0%} of the way along{' on average' * (len(found) > 1)}.",
            along.value, "share of the answer", 0.5, "uniform along the answer", along.ci95, along.n, along.n_unit,
            quantity="place of critical tokens along the answer",
        ),
        Finding(
            f"Where critical tokens were drawn, the entropy is {fmt(float(here))} nats, {fmt(abs(excess.value))} "
            f"{'more' if excess.value >= 0 else 'less'} than over the tokens of their answers; their median probability is "
            f"{np.median(probs):.2g}.",
            excess.value, "nats", 0.0, "the mean over the same answers' tokens", excess.ci95, excess.n, excess.n_unit,
            quantity="entropy at critical tokens beyond the mean",
        ),
    ]  # fmt: skip


def _own_words(result: Result, found: list[_Critical]) -> Finding:
    """Whether what is critical is the wrong result itself."""
    first, last = (result[name].values for name in ("words_from", "words_to"))
    own = np.array([first[c.text] <= c.at <= last[c.text] and last[c.text] >= 0 for c in found])
    before = sum(bool(c.at < first[c.text]) for c in found)
    chance = np.mean([(last[c.text] >= 0) * (last[c.text] - first[c.text] + 1) / n
                      for c, n in zip(found, _lengths(result, found), strict=True)])  # fmt: skip
    share = _share(int(own.sum()), len(found), "answers")
    return Finding(
        f"In {own.sum():,} of {_answers(found)}, the critical token is where the wrong result is first said; in {before:,} "
        "it comes before.",
        share.value, "share of critical tokens", float(chance), "a token of the answer drawn at random", share.ci95,
        share.n, share.n_unit, {"before": before}, quantity="critical tokens that first say the wrong result",
    )  # fmt: skip


def _share(count: int, n: int, n_unit: str) -> Estimate:
    """A share of answers or prompts, with its Wilson interval."""
    if n == 1:
        return Estimate(float(count), None, 1, n_unit)
    low, high = wilson(count, n)
    return Estimate(count / n, (low if count else 0.0, high if count < n else 1.0), n, n_unit)  # free of rounding


def _statuses(result: Result) -> Finding:
    status = result["status"].values
    share = _share(int((status == FOUND).sum()), len(status), "prompts")
    named = [f"{int((status == k).sum()):,} {name}" for k, name in enumerate(STATUS) if (status == k).any()]
    many = "prompt" if len(status) == 1 else "prompts"
    return Finding(
        f"Of {len(status):,} {many}: {'; '.join(named)}.",
        share.value, "share of prompts", 0.0, "no wrong answer has a critical token", share.ci95, share.n, share.n_unit,
        {name: int((status == k).sum()) for k, name in enumerate(STATUS)}, quantity="prompts with a critical token",
    )  # fmt: skip


def critical_drawings(result: Result) -> dict[str, plots.Drawing]:
    """The success rate along the text and over it, pass@k, gains, alternatives, places, and the inside."""
    found, data = _found(result), result.dataset
    drawn: dict[str, plots.Drawing] = {"strip": _strip(result, found)}
    if found:
        drawn |= {
            "rate": _rate(result, found[0]),
            "alternatives": _alternatives(result, found[0]),
            "pass": _pass(result),
            "gains": _gains(result),
            "places": _places(result, found),
        }
        drawn |= inside_drawings(data, _shown(result, found[0]), result.about)
    return drawn | {"prompts": _prompts(result)}


def _shown(result: Result, one: _Critical) -> dict[str, int]:
    """The critical token of one answer and the free ones that it is compared with."""
    data = result.dataset
    places, groups = data["branch_place"].values, data["branch_group"].values
    free = places[(groups == 1) & (data["text"].values[places] == one.text)]
    return {"critical": one.place, **{f"random {i + 1}": int(p) for i, p in enumerate(np.unique(free))}}


def _strip(result: Result, found: list[_Critical]) -> plots.TokenStrip:
    data = result.dataset
    share, drawn, how = (data[name].values for name in ("success_share", "drawn", "how"))
    ways = ("not measured", "", " (of the prefix that it shares with)", "the wrong answer is over")
    notes = [ways[h] if h in (NOT_MEASURED, 3) else f"right: {_of(s, n)}{ways[h]}" for s, n, h in zip(share, drawn, how, strict=True)]  # fmt: skip
    for c in found:
        notes[c.place] = f"critical; {notes[c.place]}"
    about = (
        f"{result.about} Wrong answers, one to a line. Colour: share of right ones among continuations of the answer up to the "
        "token; grey: not measured, since earlier prefixes do not matter. Choose 'critical' to see the critical tokens."
    )
    critical = data["critical"].values.astype(float)
    return plots.TokenStrip(
        title="How often the answers can still turn out right, token by token",
        tokens=tuple(map(str, data["token_str"].values)),
        texts=data["text"].values,
        quantities=(
            plots.Quantity("right from here", "share", share, low=0, high=max(0.25, float(np.nanmax(share, initial=0)))),
            plots.Quantity("critical", "1", critical, low=0, high=1),
            plots.Quantity("probability of the token", "share", data["probability"].values, low=0, high=1),
            plots.Quantity("entropy of the next token", "nats", data["entropy_nats"].values, low=0),
        ),
        caption=about,
        alt="The wrong answers, each token coloured by the share of continuations from there that are right.",
        notes=tuple(notes),
    )  # fmt: skip


def _rate(result: Result, one: _Critical) -> plots.Figure:
    data = result.dataset
    mine = data.isel(token=data["text"].values == one.text)
    prompt = float(data["prompt_success"].values[one.text])
    top = max(prompt, float(np.nanmax(mine["success_share"].values, initial=0.1)))
    return plots.lines(
        {"right from here": mine["success_share"]},
        title=critical_findings(result)[0].claim,
        unit="share",
        quantity="right continuations",
        y_range=(-0.02, min(1.05, 1.15 * top + 0.05)),
        reference=(prompt, "answers from the prompt on"),
        caption=f"{result.about} Answer to prompt {one.text}. Share of right ones among continuations up to each token, the "
        f"token included; token {one.at} is critical. Prefixes that show early that they are alive draw fewer; no line "
        "where nothing was measured.",
        alt="Share of right continuations against the token of the answer after which they leave.",
    )


def _alternatives(result: Result, one: _Critical) -> plots.Figure:
    """How often each of the tokens drawn in the critical one's place led to the right answer."""
    data = result.dataset
    ids, right = data["replaced_id"].values[one.branch], data["replaced_right"].values[one.branch]
    table = plots.words_by_id(data["vocab_str"])
    often = sorted(set(ids.tolist()), key=lambda i: (-(ids == i).sum(), i))[:12]
    kept = data["kept_right"].values[one.branch]
    word = plots.visible(str(data["token_str"].values[one.place]))
    shares = {f"{word} (kept; {int(kept.sum())} of {len(kept)})": float(kept.mean())}
    for i in often:
        mine = right[ids == i]
        shown = plots.visible(table[i]) if i in table else f"[{i}]"
        label = f"{shown} ({int(mine.sum())} of {len(mine)})"
        shares[label if label not in shares else f"{label} [{i}]"] = float(mine.mean())
    return plots.bars(
        shares,
        title=f"What the tokens drawn in the place of {word!r} lead to",
        unit="share",
        quantity="right continuations",
        by="token in its place",
        caption=f"{result.about} Answer to prompt {one.text}, token {one.at}. Tokens drawn from the model's distribution "
        "without the critical one, the likeliest to be drawn first; one continuation for each draw.",
        alt="Bars of the share of right continuations by the token put in the place of the critical one.",
    )


def _pass(result: Result) -> plots.Figure:
    data = result.dataset
    curves, bands = {}, {}
    for group, name in enumerate(("critical", "free", "any")):
        for what in ("kept", "replaced"):
            case = f"{name}, {what}"
            if name == "any" or np.isnan(data["pass_share"].sel(case=case).values).any():
                continue
            label = f"{'critical token' if group == 0 else 'random free token'} {what}"
            curves[label] = data["pass_share"].sel(case=case, drop=True)
            if group:
                continue  # four bands hide one another
            low, high = (data[f"pass_{end}"].sel(case=case, drop=True) for end in ("low", "high"))
            bands[label] = (low, high)
    n = _gain(result, 0).n
    return plots.lines(
        {label: curve.rename(threshold="continuations (k)") for label, curve in curves.items()},
        title="How many attempts it takes with the critical token, and without it",
        unit="share",
        quantity="pass@k",
        bands=bands,
        y_range=(0, 1.12),
        caption=f"{result.about} Answers: {n}; mean over them; bands: 95 % intervals of the critical token's curves. The horizontal axis is k, the number "
        "of continuations of which one has to be right. Replaced: each from another token drawn from the model.",
        alt="Pass@k against k, for critical and random tokens kept and replaced.",
    )  # fmt: skip


def _gains(result: Result) -> plots.Figure:
    estimates = {name: _gain(result, g) for g, name in enumerate(_ABOUT)}
    known: dict[str, Any] = {name: e for name, e in estimates.items() if e.n}
    findings = critical_findings(result)
    return plots.bars(
        {name: e.value for name, e in known.items()},
        title=findings[1].claim if "group" in findings[1].where else "What replacing the critical token gains",
        unit="share",
        quantity="right ones with another token, minus with the token",
        intervals={name: e.ci95 for name, e in known.items()} if all(e.ci95 for e in known.values()) else None,
        reference=(0.0, "no gain"),
        by="token replaced",
        caption=f"{result.about} Answers: {known[_ABOUT[0]].n}; mean over them, with 95 % intervals; all continuations drawn afresh. "
        "As much freedom: probability below 0.95.",
        alt="Bars of the gain from replacing the critical token, free random ones and any.",
    )  # fmt: skip


def _places(result: Result, found: list[_Critical]) -> plots.Figure:
    along = (np.array([c.at for c in found]) + 0.5) / _lengths(result, found)
    counts, edges = np.histogram(along, bins=10, range=(0, 1))
    where = critical_findings(result)
    claim = next(f.claim for f in where if f.unit == "share of the answer")
    return plots.histogram(
        counts,
        edges,
        title=claim,
        unit="share of the answer",
        quantity="place of the critical token",
        counted="answers",
        caption=f"{result.about} {_answers(found)}; 0 is the first token of an answer, 1 the last.",
        alt="Histogram of where in their answers critical tokens lie.",
    )


def _prompts(result: Result) -> plots.Figure:
    status = result["status"].values
    return plots.bars(
        {name: float((status == k).sum()) for k, name in enumerate(STATUS)},
        title=_statuses(result).claim,
        unit="prompts",
        quantity="",
        by="what became of them",
        caption=f"{result.about} Never wrong: no finished wrong answer among the greedy and the sampled ones. Too rarely right: by "
        "the sampled answers. Lost from the start: by as many more as a prefix has, the prompt itself is not alive. Never lost: "
        "every prefix has a right continuation.",
        alt="Bars of the number of prompts by what became of them.",
    )  # fmt: skip
