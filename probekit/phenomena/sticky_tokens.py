"""Sticky tokens: which tokens pull the similarity of two sentences towards one value, wherever they are put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, param, register
from probekit.core import InputError, ModelInfo, Texts, Vocabulary, VocabularyTable
from probekit.methods.sticky import Insertions, outlier_cut
from probekit.methods.sticky_choice import (
    CANDIDATE,
    NAMED,
    RANDOM,
    Sizes,
    benign,
    spread,
    strongest,
    systematic_sample,
    tested,
    to_validate,
)
from probekit.methods.sticky_result import Validated
from probekit.methods.sticky_trials import (
    below_and_above,
    hit_shares,
    inserted,
    pairs_of,
    scores,
    topic_neighbours,
    usable_tokens,
    vocabulary_similarity,
)
from probekit.methods.token_categories import categories
from probekit.stats import text_mean, wilson

_SHOWN = 20
_LEVEL = 0.05  # of the test against random tokens, for all validated tokens together


@dataclass(frozen=True)
class StickyParams(Params):
    """Parameters of sticky-tokens."""

    counts: str = param("1,2,4,8", help="How many copies are put in, ascending, separated by commas")
    n_scored: int = param(
        240, low=0, high=1000000, unit="tokens", help="Usable tokens that are scored, a systematic sample; 0 for all"
    )
    n_scoring: int = param(5, low=1, high=1000, unit="pairs", help="Pairs of sentences that tokens are scored on")
    n_candidates: int = param(
        40, low=0, high=1000000, unit="tokens", help="Tokens of the largest scores that are validated; 0 for the share"
    )
    share: float = param(0.02, low=0.0001, high=1.0, unit="share", help="Share of the scored tokens that are validated")
    n_validation: int = param(60, low=2, high=10000, unit="pairs", help="Pairs that candidates are validated on")
    n_random: int = param(
        20, low=2, high=100000, unit="tokens", help="Random usable tokens that are validated in the same way"
    )
    n_above: int = param(
        20, low=0, high=10000, unit="pairs", help="Pairs more similar than tokens are, for the two-sided test"
    )
    tokens: str = param("", help="Ids of tokens to validate whatever their score, separated by commas")
    seed: int = param(0, low=0, high=2**31 - 1, help="Seed of samples and of random places")

    presets = {
        "quick": {},
        "published": {
            "counts": "1,2,3,4,5,6,7,8", "n_scored": 0, "n_scoring": 5, "n_candidates": 0, "share": 0.02,
            "n_validation": 250, "n_random": 100, "n_above": 60,
        },
    }  # fmt: skip


@register
class StickyTokens(Analysis):
    """Which tokens bring a text-embedding model to call two unlike sentences similar, once they are put into one?

    Question:
        Put into a sentence a few times, some tokens pull its similarity with any other sentence towards one value. Which
        are they, do they do more than random tokens, and does it harm retrieval and clustering?

    Method:
        Usable tokens are those whose text encodes to them again and is more than white space. u is the mean cosine of
        the vocabulary's spellings, each embedded as a text. Pairs of sentences less similar than u are taken on an even
        grid from the least similar, m, to m + 0.8 (u - m). The token is put into the second sentence in front, behind
        and at random places, 1, 2, … times. With the changes of the cosine distance d from one count to the next (F sum
        and f number of falls, R and r of rises, δ the distance of the token alone), score = (F + 0.1 f + 0.1 δ) / (R +
        0.05 r + 0.01), meaned over pairs, places weighed 0.35, 0.35, 0.30. The 2 % of largest scores (or the n_candidates
        largest) are candidates. p is the share of validation pairs whose mean d over the counts is below d without the
        token, places weighed 4, 4, 3. Candidates with p > Q3 + 0.7 (Q3 - Q1) of the candidates are called sticky by the
        published rule, where the cut may lie above 1. Called here are those that lie beyond random tokens (see Null). This is the released code of
        the paper. It tests only whether pairs of low similarity are pulled up; the definition in words, that
        similarities come near u from both sides, is measured beside it as mean |cos - u| with the largest number of
        copies over mean |cos - u| without, on as many pairs below u as above, and the same of variances.
        Harm: the share of a sentence's four nearest that are of its topic, over 60 built-in sentences of 12 topics, with
        the five candidates of largest p put in, minus the same with benign tokens (drawn from the lowest scores).

    Null:
        Random usable tokens with as many copies, on the same pairs: their p, the share of them above the cut, and what
        the rule returns within them. A candidate is beyond them where the log-odds of its p exceed the prediction limit
        for one more random token, at 5 % for all validated tokens together; pairs that tokens were scored on are left
        out of this comparison, since candidates were chosen by them.

    Known failure modes:
        The cut is an outlier rule within candidates of one model: it nearly always returns 1 to 6 % of them, also of
        random tokens, and counts are not comparable between models. With five pairs a score moves by 10 with the random
        places alone; judge by p. A token in front or behind is put there without a space and may merge with its
        neighbour: the survival rate says how often it stays itself. Length alone pulls similarities (mean pooling), which
        the random tokens share. A sample of tokens finds sticky ones only among itself. Sentences beyond the model's
        length are cut. Intervals of p take pairs as independent, though they share sentences.

    References:
        Chen et al. 2025, Sticking to the Mean: Detecting Sticky Tokens in Text Embedding Models, arXiv 2507.18171, and
        its released code.
    """

    name, title = "sticky-tokens", "Sticky tokens"
    reads_texts = False
    Params = StickyParams
    measures = {
        "similarity": Measure((), "1", "u: mean cosine of the vocabulary's spellings as texts, each with itself included"),
        "usable": Measure(("vocab",), "1", "1 for tokens whose text encodes to them again and is more than white space"),
        "score": Measure(("vocab",), "1", "sticky score; NaN where not scored"),
        "score_cut": Measure((), "1", "smallest score of a candidate"),
        "asked": Measure(("vocab",), "1", "1 for candidates, 2 for random tokens, 3 for tokens that were named; 0 for others"),
        "p": Measure(("vocab",), "share", "share of pairs brought nearer, weighed over places; NaN where not validated"),
        "p_fresh": Measure(("vocab",), "share", "p over the pairs that tokens were not scored on, which random tokens are compared by; NaN where not validated"),
        "cut": Measure((), "share", "Q3 + 0.7 (Q3 - Q1) of the candidates' p"),
        "published": Measure(("vocab",), "1", "1 for candidates and named tokens with p above the cut"),
        "sticky": Measure(("vocab",), "1", "1 for candidates and named tokens whose p lies beyond random tokens"),
        "two_sided": Measure(("vocab",), "1", "mean |cos - u| with the largest number of copies, over the same without, on pairs from both sides of u; NaN where not validated or no pair lies above u"),
        "variance_ratio": Measure(("vocab",), "1", "variance of the cosines with the largest number of copies, over the same without; NaN where two_sided is"),
        "survival": Measure(("vocab",), "share", "inserted copies that are the token after tokenising, over pairs, places and counts; NaN where not validated"),
        "added": Measure(("vocab",), "tokens", "tokens that one copy adds to a text; NaN where not validated"),
        "before": Measure(("rank",), "1", "cosine of each pair without tokens: those below u, then those above"),
        "after": Measure(("rank",), "1", "cosine with the largest number of copies of the candidate of largest p, mean over places"),
        "after_random": Measure(("rank",), "1", "cosine with the largest number of copies of a random token, mean over places and tokens"),
        "retrieval": Measure(("case", "text"), "share", "of a sentence's four nearest, those of its topic; only the sentence itself is changed"),
        "clustering": Measure(("case", "text"), "share", "of a sentence's four nearest, those of its topic; all sentences are changed"),
        "n_cut": Measure((), "texts", "texts that were cut because the model does not read so many tokens"),
        "n_pairs": Measure((), "pairs", "pairs of the validation"),
        "shown": Measure(("vocab",), "1", "what the token shows as"),
        "count": Measure(("bin",), "tokens", "scored tokens by score"),
    }  # fmt: skip

    def min_tokens(self, params: Any) -> int:
        """Sentences are embedded as they are."""
        return 0

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Vocabulary, pairs, scores, validation beside random tokens, both sides, harm."""
        insertions = _insertions(params)
        batch = yield Texts()
        table: VocabularyTable = yield Vocabulary()
        kinds, named = categories(table), _named(params, len(table))
        usable = usable_tokens(table, kinds)
        u = yield from vocabulary_similarity(table)
        sizes = params.n_scoring, params.n_validation, params.n_above
        scoring, below, above = below_and_above((yield from pairs_of(batch)), u, sizes)

        tried = systematic_sample(table, kinds, usable, params.n_scored, params.seed)
        trials = yield from inserted(tried, table, scoring, insertions, own=True, why="scores")
        score = spread(scores(trials, scoring), tried, len(table))
        chosen = Sizes(params.n_candidates, params.share, params.n_random)
        asked = to_validate(score, usable, named, chosen, seed=params.seed)
        tokens = np.flatnonzero(asked)
        valid = yield from inserted(tokens, table, below, insertions, why="validation")
        higher = yield from inserted(tokens, table, above, insertions.last, why="pairs above u")
        p = spread(hit_shares(valid, below), tokens, len(table))
        kinds_of_topic = benign(score, asked, params.seed), strongest(p, asked)
        harm = yield from topic_neighbours(kinds_of_topic, table, insertions.last)
        found = Validated(asked, score, p, valid, higher, below, above, u)
        values = {
            "similarity": ((), u),
            "usable": ("vocab", np.isin(np.arange(len(table)), usable).astype(float)),
            "n_cut": ((), trials.n_cut + valid.n_cut + higher.n_cut),
            "retrieval": (("case", "text"), harm[0]),
            "clustering": (("case", "text"), harm[1]),
            "shown": ("vocab", np.array(table.shown, dtype=object)),
        }
        return found.dataset(scoring, level=_LEVEL).assign(values)

    def findings(self, result: Result) -> list[Finding]:
        """The tokens to strip, what the rule returns of random tokens, both sides, harm, survival, the vocabulary."""
        return [
            _strip(result), _rule(result), *_both_sides(result), *_harm(result), *_survival(result), _vocabulary(result),
        ]  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Candidates by p against the cut, pairs before and after, both sides of u, scores, harm."""
        return {
            "candidates": _candidates_drawing(result), "pairs": _pairs_drawing(result), "sides": _sides_drawing(result),
            "scores": _scores_drawing(result), "harm": _harm_drawing(result),
        }  # fmt: skip


def _ints(text: str, name: str, what: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        raise InputError(f"{name} holds {what} separated by commas; found {text!r}.") from None


def _insertions(params: Any) -> Insertions:
    counts = _ints(params.counts, "counts", "numbers of copies")
    if not counts or sorted(set(counts)) != counts or counts[0] < 1:
        raise InputError(f"counts holds ascending numbers of copies, such as 1,2,4,8; found {params.counts!r}.")
    return Insertions(tuple(counts), params.seed)


def _named(params: Any, n_vocab: int) -> list[int]:
    named = _ints(params.tokens, "tokens", "ids")
    if not all(0 <= i < n_vocab for i in named):
        raise InputError(f"tokens holds ids from 0 to {n_vocab - 1}; found {params.tokens!r}.")
    return named


def _word(result: Result, token: int) -> str:
    return f"{plots.visible(str(result['shown'].values[token]))!r} ({token})"


def _interval(result: Result, token: int) -> tuple[float, float]:
    n = int(result["n_pairs"])
    return _wilson(round(float(result["p"].values[token]) * n), n)


def _wilson(k: int, n: int) -> tuple[float, float]:
    low, high = wilson(k, n)
    return round(low, 9), round(high, 9)  # 0 of n gives 0, and no rest of rounding


def _by_p(result: Result, chosen: np.ndarray) -> list[int]:
    p = result["p"].values
    return [int(i) for i in sorted(np.flatnonzero(chosen), key=lambda i: (-p[i], i))]


def _strip(result: Result) -> Finding:
    sticky, published, p = result["sticky"].values, result["published"].values, result["p"].values
    strong, weak = _by_p(result, sticky == 1), _by_p(result, (published == 1) & (sticky == 0))
    listed = ", ".join(f"{_word(result, i)} p = {p[i]:.3f}" for i in strong[:12])
    more = f" and {len(strong) - 12} more" if len(strong) > 12 else ""
    others = ", ".join(f"{_word(result, i)} {p[i]:.3f}" for i in weak[:12])
    rest = f" Above the published cut, but no further than a random token may lie: {others}." if weak else ""
    strip = f"Sticky; strip these from user input: {listed}{more}."
    said = strip if strong else "No token is sticky beyond random tokens."
    k, n = len(strong), int(tested(result["asked"].values).sum())
    ends = {i: _interval(result, i) for i in (strong + weak)[:40]}
    where = {str(i): f"p {p[i]:.3f}, 95 % {low:.3f} to {high:.3f}" for i, (low, high) in ends.items()}
    return Finding(
        said + rest, k / n, "share of validated tokens", _LEVEL / n, "random tokens called by the same test", _wilson(k, n), n,
        "tokens", where,
    )  # fmt: skip


def _rule(result: Result) -> Finding:
    asked, p = result["asked"].values, result["p"].values
    candidates, random = p[asked == CANDIDATE], p[asked == RANDOM]
    k, n, own = int((candidates > float(result["cut"])).sum()), len(candidates), outlier_cut(random)
    return Finding(
        f"The published rule returns {k} of {n} candidates (p above {float(result['cut']):.3f}); {int((random > float(result['cut'])).sum())} of "
        f"{len(random)} random tokens lie above that cut, and the rule within them returns {int((random > own).sum())}.",
        k / n, "share of candidates", float((random > own).mean()), "the rule within random tokens", _wilson(k, n), n, "tokens",
    )  # fmt: skip


def _both_sides(result: Result) -> list[Finding]:
    asked, value = result["asked"].values, result["two_sided"].values
    if not np.isfinite(value).any():
        return []
    best, variance = strongest(result["p"].values, asked), result["variance_ratio"].values
    found, null = text_mean(value[best], "tokens"), float(value[asked == RANDOM].mean())
    nearer = "nearer to it than" if found.ci95 is not None and found.ci95[1] < null else "no nearer to it than"
    return [
        Finding(
            f"On pairs from both sides of u = {float(result['similarity']):.4f}, the {len(best)} candidates of largest p leave "
            f"{found.value:.2f} of the distance to u (random tokens: {null:.2f}) and {variance[best].mean():.2f} of the "
            f"variance ({variance[asked == RANDOM].mean():.2f}); they bring similarities {nearer} random tokens do.",
            found.value, "× without tokens", null, "random tokens, as many copies", found.ci95, found.n, found.n_unit,
        )
    ]  # fmt: skip


def _harm(result: Result) -> list[Finding]:
    found = []
    for name, what in (("retrieval", "queries"), ("clustering", "all sentences")):
        none, benign, sticky = result[name].values
        contrast = text_mean(sticky - benign, "sentences")
        found.append(
            Finding(
                f"With the strongest candidates in {what}, {sticky.mean():.1%} of the four nearest are of the sentence's topic; "
                f"with benign tokens {benign.mean():.1%}, without tokens {none.mean():.1%}.",
                contrast.value, "share of neighbours", 0.0, "sticky harms as much as benign tokens", contrast.ci95, contrast.n,
                contrast.n_unit, {"measure": name},
            )
        )  # fmt: skip
    return found


def _survival(result: Result) -> list[Finding]:
    chosen = tested(result["asked"].values)
    kept, added = text_mean(result["survival"].values[chosen], "tokens"), result["added"].values[chosen].mean()
    return [
        Finding(
            f"{kept.value:.0%} of the inserted copies are still the token after tokenising; a copy adds {added:.2f} tokens.",
            kept.value, "share of copies", 1.0, "no copy merges with its neighbours", kept.ci95, kept.n, kept.n_unit,
        )
    ]  # fmt: skip


def _vocabulary(result: Result) -> Finding:
    usable, n = int(result["usable"].values.sum()), result["usable"].size
    return Finding(
        f"{usable:,} of {n:,} ids are usable tokens; the spellings of the vocabulary have a mean similarity of "
        f"u = {float(result['similarity']):.5f}.", float(result["similarity"]), "cosine", 0.0, "directions drawn at random",
        None, 1, "vocabulary",
    )  # fmt: skip


def _about(result: Result) -> str:
    name = result.provenance.get("model", {}).get("name", "model")
    return f"{name}, {int(result['n_pairs'])} pairs, copies {result.params.as_dict()['counts']}."


def _candidates_drawing(result: Result) -> plots.Drawing:
    asked, p, sticky = result["asked"].values, result["p"].values, result["sticky"].values
    top = _by_p(result, (asked == CANDIDATE) | (asked == NAMED))[:_SHOWN]
    labels = {_word(result, i): i for i in top}
    random, n = p[asked == RANDOM], int(sticky.sum())
    return plots.bars(
        {label: float(p[i]) for label, i in labels.items()},
        intervals={label: _interval(result, i) for label, i in labels.items()},
        title=f"Tokens that pull pairs together beyond random ones: {n or 'none'}", unit="share",
        quantity="pairs brought nearer", by="token", reference=(float(result["cut"]), "published cut"),
        caption=f"{_about(result)} Intervals: Wilson, pairs as draws. {len(random)} random tokens: mean "
        f"{random.mean():.3f}, from {random.min():.3f} to {random.max():.3f}.",
        alt=f"Bars of the share of pairs that the {len(top)} strongest candidates bring nearer, with the cut.",
    )  # fmt: skip


def _pairs_drawing(result: Result) -> plots.Drawing:
    before = result["before"].values
    token, u = int(strongest(result["p"].values, result["asked"].values)[0]), float(result["similarity"])
    return plots.scatter(
        {
            "random tokens, mean": (before, result["after_random"].values),
            _word(result, token): (before, result["after"].values),
        },
        title="What the strongest candidate does to pairs", unit="cosine", x_quantity="similarity without tokens",
        y_quantity="with the most copies", diagonal="unchanged",
        caption=f"{_about(result)} Mean over the places. A token that is sticky by the definition in words brings all "
        f"pairs to one height, u = {u:.3f}.",
        alt="Scatter of the similarity of pairs without and with tokens; a flat cloud is sticky.",
    )  # fmt: skip


def _sides_drawing(result: Result) -> plots.Drawing:
    asked, names = result["asked"].values, {CANDIDATE: "candidates", RANDOM: "random tokens", NAMED: "named tokens"}
    groups = {name: np.flatnonzero(asked == kind) for kind, name in names.items() if (asked == kind).any()}
    p, sides = result["p"].values, result["two_sided"].values
    return plots.scatter(
        {name: (p[ids], sides[ids]) for name, ids in groups.items()},
        hover={name: [_word(result, int(i)) for i in ids] for name, ids in groups.items()},
        title="Pulling up, and coming near u from both sides", unit="1", x_quantity="share of pairs brought nearer (p)",
        y_quantity="distance to u that is left",
        caption=f"{_about(result)} Published cut: p above {float(result['cut']):.3f}. Below 1: similarities come nearer to u.",
        alt="Scatter of p against the two-sided ratio, candidates and random tokens apart.",
    )  # fmt: skip


def _scores_drawing(result: Result) -> plots.Drawing:
    middles = result["bin"].values
    half = (middles[1] - middles[0]) / 2
    n = int(result["count"].values.sum())
    return plots.histogram(
        result["count"].values, np.append(middles - half, middles[-1] + half), title="Scores of usable tokens", unit="1",
        quantity="sticky score",
        caption=f"{_about(result)} {n:,} tokens scored; candidates from {float(result['score_cut']):.1f}. The score tells how "
        "steadily distances fall, not how far.",
        alt="Histogram of the sticky score over the scored tokens.",
    )  # fmt: skip


def _harm_drawing(result: Result) -> plots.Drawing:
    values: dict[str, float] = {}
    ends: dict[str, tuple[float, float]] = {}
    for name, what in (("retrieval", "queries"), ("clustering", "all")):
        for kind, row in zip(("no token", "benign", "sticky"), result[name].values, strict=True):
            found = text_mean(row, "sentences").within(0, 1)
            label = f"{what}: {kind}"
            values[label] = found.value
            ends[label] = found.ci95 or (found.value, found.value)
    return plots.bars(
        values, intervals=ends, title="Does a sentence still find its topic?", unit="share", quantity="neighbours of its topic",
        by="what is changed, and with what",
        caption=f"{_about(result)} Four nearest of 60 sentences of 12 topics; means over five tokens, intervals over sentences.",
        alt="Bars of the share of neighbours of the same topic, without tokens, with benign and with sticky ones.",
    )  # fmt: skip
