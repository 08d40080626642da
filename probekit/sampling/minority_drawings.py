"""What forking-tokens draws: the minority and its cut, words, the rule against chance, the answers, forks inside."""

from __future__ import annotations

import numpy as np

from probekit import plots
from probekit.analysis import Result

from .inside import inside_drawings

_WORDS = 12  # of the highest and of the lowest
_PLACES = 4


def minority_drawings(result: Result) -> dict[str, plots.Drawing]:
    """All figures, by name."""
    p, data = result.params.as_dict(), result.dataset
    about = f"{result.about} {p['answers']} sampled answers to each, T={p['temperature']:g}."
    return {
        "minority": _cut(result, about),
        **_words(result, about),
        **_rule(result, about),
        "strip": _strip(result, about),
        **inside_drawings(data, _fork_places(result), about),
    }


def _claim(result: Result, unit: str) -> str:
    return next(f.claim for f in result.findings if f.unit == unit)


def _cut(result: Result, about: str) -> plots.Figure:
    share = result.params.as_dict()["share"]
    cut = float(result["entropy_nats"].values[result["minority"].values > 0].min())
    shown = {"share of the tokens, highest entropy first": "threshold"}
    return plots.lines(
        {"entropy they reach": result["cut_nats"].rename({v: k for k, v in shown.items()})},
        title=_claim(result, "share of entropy"),
        unit="nats",
        reference=(cut, f"the cut at {share:.0%}: {cut:.3g} nats"),
        caption=f"{about} Entropy of the distribution that each token was drawn from, over all answers together.",
        alt="The entropy that a share of the tokens reaches, against that share, with the cut of the minority.",
    )


def _words(result: Result, about: str) -> dict[str, plots.Drawing]:
    mean = result["word_mean"].values
    known = np.flatnonzero(np.isfinite(mean))
    if not known.size:
        return {}
    order = known[np.argsort(-mean[known], kind="stable")]
    split = min(_WORDS, (len(order) + 1) // 2)
    drawings: dict[str, plots.Drawing] = {}
    for name, some in (("highest", order[:split]), ("lowest", order[split:][-_WORDS:])):
        if not some.size:
            continue
        labels = [_word(result, int(k)) for k in some]
        ends = {
            label: (_at(result, "word_low", k), _at(result, "word_high", k))
            for label, k in zip(labels, some, strict=True)
        }
        title = _claim(result, "share of variance") if name == "highest" else _lowest(result, int(some[-1]))
        middle = float(result["entropy_nats"].values.mean())
        drawings[f"words-{name}"] = plots.bars(
            {label: float(mean[k]) for label, k in zip(labels, some, strict=True)},
            title=title,
            unit="nats",
            quantity="mean entropy",
            intervals=ends,
            by="token (occurrences)",
            reference=(middle, "all tokens"),
            caption=f"{about} Token types that occur {result.params.as_dict()['min_count']} times or more, in two answers "
            f"at least; the {name} {len(some)}. Whiskers: 95 % interval from the spread between answers or prompts. "
            "A star marks a mean outside 95 % of those of as many tokens drawn at random.",
            alt=f"Bars of the {name} mean entropies of token types, with intervals and the mean of all tokens.",
        )
    return drawings


def _lowest(result: Result, k: int) -> str:
    word = plots.visible(str(result["vocab_str"].values[k]))
    return f"The lowest mean entropy is that of {word!r}, {_at(result, 'word_mean', k):.2g} nats"


def _at(result: Result, name: str, k: int) -> float:
    return float(result[name].values[k])


def _word(result: Result, k: int) -> str:
    mean = _at(result, "word_mean", k)
    unusual = not _at(result, "word_null_low", k) <= mean <= _at(result, "word_null_high", k)
    shown = plots.visible(str(result["vocab_str"].values[k]))
    same = sum(str(s) == str(result["vocab_str"].values[k]) for s in result["vocab_str"].values)
    marked = f"{shown} [{int(result['vocab'].values[k])}]" if same > 1 else shown
    return f"{marked} ({int(_at(result, 'word_n', k))}){' *' if unusual else ''}"


def _rule(result: Result, about: str) -> dict[str, plots.Drawing]:
    if not np.isfinite(result["recall"].values).any():
        return {}
    shown = {"threshold": "share of the tokens that the rule names, highest entropy first"}
    curves = {
        "recall": result["recall"].rename(shown),
        "recall by chance": result["chance_recall"].rename(shown),
        "precision": result["precision"].rename(shown),
    }
    figure = plots.lines(
        curves,
        title=_claim(result, "share of forks"),
        unit="share",
        y_range=(0, 1.02),
        caption=f"{about} Of the rule that tokens with high entropy fork. Recall: share of the forks it names; by chance: "
        "share of the positions with two plausible tokens it names; precision: share of these that fork. From positions "
        "sampled by strata and weighed accordingly.",
        alt="Recall, chance level and precision against the share of tokens that the rule names.",
    )
    return {"rule": figure}


def _fork_places(result: Result) -> dict[str, int]:
    """The forks whose alternatives lead farthest, by label."""
    forks = np.flatnonzero(result["fork"].values == 1)
    order = forks[np.argsort(-result["fork_distance"].values[forks], kind="stable")][:_PLACES]
    return {f"fork {i}": int(at) for i, at in enumerate(order, 1)}


def _strip(result: Result, about: str) -> plots.TokenStrip:
    data = result.dataset
    return plots.TokenStrip(
        title="Where entropy is high, and where a sampled position forks",
        tokens=tuple(map(str, data["token_str"].values)),
        texts=data["text"].values,
        quantities=(
            plots.Quantity("entropy of the distribution it was drawn from", "nats", data["entropy_nats"].values, low=0),
            plots.Quantity("the minority", "1", data["minority"].values, low=0, high=1),
            plots.Quantity("farthest other token, where sampled", "L2 distance", data["fork_distance"].values, low=0),
        ),
        caption=f"{about} All answers. Hover for what other tokens lead to at the sampled positions.",
        alt="The answers, each token coloured by the entropy of the distribution that it was drawn from.",
        notes=_notes(result),
    )


def _notes(result: Result) -> tuple[str, ...]:
    data = result.dataset
    words = plots.words_by_id(data["vocab_str"])
    found: dict[int, list[str]] = {}
    for k, at in enumerate(data["branch_place"].values.tolist()):
        shares = data["branch_share"].values[k]
        top = int(shares.argmax())
        word = plots.visible(words.get(int(data["branch_id"].values[k]), "?"))
        found.setdefault(at, []).append(f"{word!r} → {data['case'].values[top]} ({shares[top]:.0%})")
    fork = data["fork"].values
    return tuple(
        "" if at not in found else ("FORK: " if fork[at] == 1 else "no fork: ") + "; ".join(found[at])
        for at in range(data.sizes["token"])
    )
