"""Sticky tokens: which tokens pull the similarity of two sentences towards one value, wherever they are put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, param, register
from probekit.core import ModelInfo, Texts, Vocabulary, VocabularyTable
from probekit.methods.sticky_attention import SPLITS, compared, received
from probekit.methods.sticky_choice import (
    BENIGN_TRIED,
    CANDIDATE,
    NAMED,
    RANDOM,
    STICKY_TRIED,
    Sizes,
    benign,
    insertions_of,
    named_ids,
    ordinary,
    spread,
    strongest,
    systematic_sample,
    to_validate,
)
from probekit.methods.sticky_harm import NEAREST, topic_harm
from probekit.methods.sticky_report import by_p, interval, said
from probekit.methods.sticky_result import Validated
from probekit.methods.sticky_trials import (
    below_and_above,
    hit_shares,
    inserted,
    pairs_of,
    scores,
    usable_tokens,
    vocabulary_similarity,
)
from probekit.methods.token_categories import categories
from probekit.stats import text_mean

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
        Put into a sentence a few times, some tokens pull its similarity with any other sentence towards one value.
        Which are they, do they do more than random tokens, do they harm retrieval and clustering, and does the model
        attend to them in another way?

    Method:
        Usable tokens are those whose text encodes to them again and is more than white space. u is the mean cosine of
        the vocabulary's spellings, each embedded as a text. Pairs of sentences less similar than u are taken on an even
        grid from the least similar, m, to m + 0.8 (u - m). The token is put into the second sentence in front, behind
        and at random places, 1, 2, … times. With the changes of the cosine distance d from one count to the next (F sum
        and f number of falls, R and r of rises, δ the distance of the token alone), score = (F + 0.1 f + 0.1 δ) / (R +
        0.05 r + 0.01), averaged over pairs, places weighed 0.35, 0.35, 0.30. The 2 % of largest scores (or the
        n_candidates largest) are candidates. p is the share of validation pairs whose mean d over the counts is below d
        without the token, places weighed 4, 4, 3. The published rule calls candidates sticky if p > Q3 + 0.7 (Q3 - Q1)
        of the candidates, a cut that may lie above 1. All this is the released code of the paper. Called sticky here
        are candidates beyond random tokens (see Null).
        Both sides: the released code tests only whether pairs of low similarity are pulled up. The definition in words,
        that similarities come near u from both sides, is measured beside it: mean |cos - u| with the largest number of
        copies over mean |cos - u| without, on as many pairs below u as above, and the same of variances.
        Harm: the five candidates of largest p and five benign tokens (drawn from the lowest scores) are put into 60
        built-in sentences of 12 topics, each at random places in the largest number of copies. Retrieval: the share of
        a changed sentence's four nearest unchanged ones that are of its topic. Clustering: the v-measure of topics and
        the twelve clusters of k-means (ten starts, fixed seed) when all sentences are changed by one token. Reported is
        the mean of candidates minus that of benign tokens.
        Attention: each of these tokens is appended once, without a space, to each sentence. What every query at every
        head pays to it is pooled over sentences and tokens, and candidates are compared with benign tokens at each
        layer: Wasserstein-1, and KL of densities in 30 shared bins (1e-10 added), as in the paper's released notebook.
        The token is found by its place in the ids; texts in which tokenising makes something else of it are left out.

    Null:
        Sticky: random usable tokens with as many copies, on the same pairs: their p, the share of them above the cut,
        and what the rule returns within them. A candidate is beyond them where the log-odds of its p exceed the
        prediction limit for one more random token, at 5 % for all validated tokens together; pairs that tokens were
        scored on are left out of this comparison, since candidates were chosen by them.
        Harm: benign tokens, with as many copies. Intervals are Welch's over tokens: sentences as units would call two
        groups of random tokens different far too often, since tokens differ among themselves.
        Attention: the same distances between two disjoint groups of random usable tokens, in 39 splits of thirty; the
        interval is that of a jackknife over tokens.

    Known failure modes:
        The cut is an outlier rule within candidates of one model: it nearly always returns 1 to 6 % of them, also of
        random tokens, and counts are not comparable between models. With five pairs a score moves by 10 with the random
        places alone; judge by p. A token in front or behind is put there without a space and may merge with its
        neighbour: the survival rate says how often it stays itself. Length alone pulls similarities (mean pooling),
        which the random tokens share. A sample of tokens finds sticky ones only among itself. Sentences beyond the
        model's length are cut. Intervals of p take pairs as independent, though they share sentences. Five tokens a
        side show large harm only. A v-measure is not corrected for chance: that of shuffled topics stands beside it. KL
        grows with every bin that one group leaves empty. A special token among the candidates may set their attention
        apart alone. Models that compute no attention probabilities are not compared by them, and attention to a token
        does not say what the model makes of it.

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
        "tried": Measure(("vocab",), "1", "1 for benign tokens, 2 for the candidates of largest p: those put into sentences of known topics"),
        "retrieval": Measure(("vocab",), "share", "of a sentence's four nearest, those of its topic, when the sentence alone is changed by the token; NaN where not tried"),
        "retrieval_without": Measure((), "share", "the same without tokens"),
        "retrieval_by_sentence": Measure(("case", "text"), "share", "the same by sentence, the mean over tokens: without tokens, with benign ones, with candidates"),
        "clustering": Measure(("vocab",), "1", "v-measure of topics and k-means clusters when all sentences are changed by the token; NaN where not tried"),
        "clustering_without": Measure((), "1", "the same without tokens"),
        "clustering_chance": Measure((), "1", "the same with clusters shuffled among the sentences, mean of 100"),
        "received": Measure(("case", "layer"), "share", "mean attention that queries pay to one appended copy: of random tokens, benign ones, candidates; NaN where the model shows no attention"),
        "received_there": Measure(("vocab",), "share", "mean attention that each of these tokens receives at the layer where attention_w1 is the largest multiple of attention_w1_null; NaN for other tokens, and as attention_w1_null"),
        "received_low": Measure(("layer",), "share", "2.5 % quantile over groups of random tokens of the candidates' number; NaN as attention_w1_null"),
        "received_high": Measure(("layer",), "share", "97.5 % quantile over these groups; NaN as attention_w1_null"),
        "attention_w1": Measure(("layer",), "share", "Wasserstein-1 of what candidates and benign tokens receive; NaN where the model shows no attention, or one side has fewer than two tokens that stay themselves"),
        "attention_w1_error": Measure(("layer",), "share", "its standard error, a jackknife over tokens; NaN as attention_w1"),
        "attention_w1_null": Measure(("layer",), "share", "the same distance between two groups of random tokens, median over splits; NaN as attention_w1, or where random tokens are too few"),
        "attention_w1_null_95": Measure(("layer",), "share", "95 % quantile over splits; NaN as attention_w1_null"),
        "attention_kl_nats": Measure(("layer",), "nats", "KL of what candidates receive from what benign tokens do, 30 bins; NaN as attention_w1"),
        "attention_kl_null_95_nats": Measure(("layer",), "nats", "95 % quantile over splits of random tokens; NaN as attention_w1_null"),
        "attention_p": Measure((), "probability", "share of splits, and one more, whose distance reaches at some layer the multiple of its median that candidates reach; NaN as attention_w1_null"),
        "attention_tokens": Measure((), "tokens", "candidates and benign tokens whose attention was compared"),
        "attention_texts": Measure((), "texts", "texts whose attention was looked at"),
        "attention_left_out": Measure((), "texts", "texts left out, since the appended token is none of its own there"),
        "attention_missing": Measure((), "1", "why the model shows no attention; empty where it does"),
        "n_cut": Measure((), "texts", "texts that were cut because the model does not read so many tokens"),
        "n_pairs": Measure((), "pairs", "pairs of the validation"),
        "shown": Measure(("vocab",), "1", "what the token shows as"),
        "count": Measure(("bin",), "tokens", "scored tokens by score"),
    }  # fmt: skip

    def min_tokens(self, params: Any) -> int:
        """Sentences are embedded as they are."""
        return 0

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Vocabulary, pairs, scores, validation beside random tokens, both sides, harm, attention."""
        insertions = insertions_of(params.counts, params.seed)
        batch = yield Texts()
        table: VocabularyTable = yield Vocabulary()
        kinds, named = categories(table), named_ids(params.tokens, len(table))
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
        weak, strong = benign(score, asked, params.seed), strongest(p, asked)
        harm = yield from topic_harm((weak, strong), table, insertions.last)
        groups = ordinary(usable, asked, weak, params.seed), weak, strong
        shown = yield from received([int(t) for group in groups for t in group], table)
        found = Validated(asked, score, p, valid, higher, below, above, u).dataset(scoring, level=_LEVEL)
        values = {
            "similarity": ((), u),
            "usable": ("vocab", np.isin(np.arange(len(table)), usable).astype(float)),
            "n_cut": ((), trials.n_cut + valid.n_cut + higher.n_cut),
            "shown": ("vocab", np.array(table.shown, dtype=object)),
        }
        attention = compared(shown, groups, n_layers=info.n_layers, n_vocab=len(table), seed=params.seed)
        return found.assign(values).merge(harm.dataset()).merge(attention)

    def findings(self, result: Result) -> list[Finding]:
        """The tokens to strip, what the rule returns, both sides, harm, attention, survival, the vocabulary."""
        return [Finding(**one) for one in said(result.dataset, lambda i: _word(result, i), _LEVEL)]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Candidates by p against the cut, pairs before and after, both sides of u, scores, harm, attention."""
        return {
            "candidates": _candidates_drawing(result), "pairs": _pairs_drawing(result), "sides": _sides_drawing(result),
            "scores": _scores_drawing(result), **_harm_drawings(result), **_attention_drawings(result),
        }  # fmt: skip


def _word(result: Result, token: int) -> str:
    return f"{plots.visible(str(result['shown'].values[token]))!r} ({token})"


def _about(result: Result) -> str:
    name = result.provenance.get("model", {}).get("name", "model")
    return f"{name}, {int(result['n_pairs'])} pairs, copies {result.params.as_dict()['counts']}."


def _candidates_drawing(result: Result) -> plots.Drawing:
    asked, p, sticky = result["asked"].values, result["p"].values, result["sticky"].values
    top = by_p(result.dataset, (asked == CANDIDATE) | (asked == NAMED))[:_SHOWN]
    labels = {_word(result, i): i for i in top}
    random, n = p[asked == RANDOM], int(sticky.sum())
    return plots.bars(
        {label: float(p[i]) for label, i in labels.items()},
        intervals={label: interval(result.dataset, i) for label, i in labels.items()},
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


def _harm_drawings(result: Result) -> dict[str, plots.Drawing]:
    drawn: dict[str, plots.Drawing] = {}
    tried, kinds = result["tried"].values, {"benign": BENIGN_TRIED, "strongest candidates": STICKY_TRIED}
    nearest = f"The sentence alone is changed, and its {NEAREST} nearest are looked at."
    shapes = {
        "retrieval": ("Does a sentence still find its topic?", "share", "neighbours of its topic", nearest),
        "clustering": (
            "Does k-means still find the topics?",
            "1",
            "v-measure",
            "All sentences are changed by one token.",
        ),
    }
    for name, (title, unit, quantity, how) in shapes.items():
        without, chance = float(result[f"{name}_without"]), float(result["clustering_chance"])
        values, ends = {"no token": without}, {"no token": (without, without)}
        for label, kind in kinds.items():
            found = text_mean(result[name].values[tried == kind], "tokens").within(0, 1)
            values[label], ends[label] = found.value, found.ci95 or (found.value, found.value)
        drawn[name] = plots.bars(
            values, intervals=ends, title=title, unit=unit, quantity=quantity, by="put in",
            reference=(chance, "shuffled topics") if name == "clustering" else None,
            caption=f"{_about(result)} 60 sentences of 12 topics, {int((tried == STICKY_TRIED).sum())} candidates and "
            f"{int((tried == BENIGN_TRIED).sum())} benign tokens, the most copies at random places. {how} Intervals: "
            "Student's t over tokens; without tokens there is one value.",
            alt=f"Bars of {quantity} without tokens, with benign ones and with the strongest candidates.",
        )  # fmt: skip
    return drawn


def _attention_drawings(result: Result) -> dict[str, plots.Drawing]:
    received, w1 = result["received"], result["attention_w1"]
    if not np.isfinite(w1.values).all():
        return {}
    random, weak, strong = (received.isel(case=i) for i in range(3))
    texts, out = int(result["attention_texts"]), int(result["attention_left_out"])
    about = (
        f"{result.provenance.get('model', {}).get('name', 'model')}, one copy appended to 60 sentences, {texts:,} texts "
        f"({out:,} left out: the token did not stay one)."
    )
    beyond = int((w1.values > result["attention_w1_null_95"].values).sum())
    return {
        "attention": plots.lines(
            {"strongest candidates": strong, "benign": weak, "random": random},
            bands={"random": (result["received_low"], result["received_high"])},
            title="Attention paid to an appended token", unit="share", quantity="mean attention per query and head",
            caption=f"{about} Band: 95 % of groups of random tokens as large as that of the candidates.",
            alt="Lines by layer of the mean attention that candidates, benign and random tokens receive.",
        ),
        "distance": plots.lines(
            {
                "candidates against benign": w1, "random, 95 % quantile": result["attention_w1_null_95"],
                "random, median": result["attention_w1_null"],
            },
            title=f"Candidates and benign tokens differ beyond random groups at {beyond} of {w1.size} layers",
            unit="share", quantity="Wasserstein-1 of attention",
            caption=f"{about} The quantile is that of each layer by itself, over {SPLITS} pairs of groups of random "
            f"tokens; over all layers together p = {float(result['attention_p']):.3f}. A single token can set a group apart.",
            alt="Lines by layer of the distance between candidates and benign tokens, and between random groups.",
        ),
    }  # fmt: skip
