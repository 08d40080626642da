"""Forking tokens: the high-entropy minority of a model's tokens, and whether its members are forks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Result, param, register
from probekit.core import Branch, Forward, InputError, ModelInfo, Texts
from probekit.sampling import Draws, WritingParams, sampled_until
from probekit.sampling.drawn import drawn_answers
from probekit.sampling.fork_table import drawn_at
from probekit.sampling.inside import INSIDE, INSIDE_MEASURES
from probekit.sampling.minority_drawings import minority_drawings
from probekit.sampling.minority_findings import minority_findings
from probekit.sampling.minority_table import Corpus, Tried, minority_table

_TOKEN, _VOCAB, _SHARE = ("token",), ("vocab",), ("threshold",)
_DRAWN = "at the temperature of the draws"


@dataclass(frozen=True)
class ForkingTokensParams(WritingParams):
    """Parameters of forking-tokens."""

    answers: int = param(4, low=1, high=1000, unit="answers", help="Sampled answers per prompt")
    share: float = param(
        0.2, low=0.01, high=0.99, unit="share", help="Of all tokens, the ones with the highest entropy"
    )
    min_count: int = param(
        5,
        low=2,
        high=100000,
        unit="tokens",
        help="Occurrences from which a token type counts; the paper has 500 in 10⁶",
    )
    n_sampled: int = param(24, low=4, high=100000, unit="positions", help="Positions at which forks are looked for")
    p_min: float = param(0.05, low=0.05, high=0.5, unit="share", help="Least probability of a token that is tried")
    n: int = param(8, low=2, high=10000, unit="continuations", help="Continuations per token in the first round")
    most: int = param(16, low=2, high=10000, unit="continuations", help="Continuations per token at most")
    width: float = param(
        0.2, low=0.005, high=1.0, unit="share", help="Half-width of the interval at which a token has enough"
    )
    epsilon: float = param(0.6, low=0.05, high=1.4, help="Distance of outcome distributions from which a token forks")


@register
class ForkingTokens(Analysis):
    """Which tokens does a model write with high entropy, and are these the tokens at which its answers fork?

    Question:
        How concentrated is the entropy of the next token in a minority of the tokens; which tokens are these; and does
        high entropy tell where another token would have led to another outcome?

    Method:
        Texts are prompts. `answers` answers are drawn to each, at `temperature`, and read once more. H is the entropy of
        softmax(logits / temperature), in nats, before any nucleus is cut: of the distribution that the token was drawn
        from. (A greedy answer would lower H.) The minority are the ceil(share n) tokens with the largest H among all n
        tokens of all answers, by one cut for the corpus; of tokens that tie at it, earlier ones are in. Word table: mean H
        of each token type with `min_count` occurrences or more, in two answers at least. Forks: `n_sampled` positions are
        drawn from those with two or more plausible tokens (the answer's own, and every other with a probability above
        `p_min`), as many from each of four strata: inside and outside the minority, lower and upper half by H. Each
        counts with the inverse of its probability of being drawn. Every plausible token there is continued `n` times and
        up to `most` times, until the 95 % Wilson interval of its commonest outcome is narrow enough; the position forks if
        another token's outcomes lie epsilon or more (L2) from those of its own. A position with one plausible token is no
        fork by definition, and is counted apart. AUROC: probability that a position that forks has a larger H than one
        that does not, both with two plausible tokens. Recall: share of the forks inside the minority. Precision: share of
        the minority's positions with two plausible tokens that fork.

    Null:
        Entropy: spread evenly over tokens. Word table: entropies shuffled over tokens. AUROC: 0.5. Recall: the share of
        the positions with two plausible tokens that the minority holds. Precision: the share of all such positions that
        fork. Forks themselves: all continuations of a position dealt anew to its tokens, as many to each as it had, which
        is what the label does where tokens make no difference; and halves of the same continuations, which hold half as
        many and so overstate it.

    Known failure modes:
        Labels rest on few continuations: where most forks are expected by chance, nothing is told, and the finding says so.
        Wrong labels pull the AUROC towards 0.5. A flat distribution may have no other token above `p_min` and then counts
        as no fork. Outcomes that are read wrongly fork where the answer does not. Continuations have `max_tokens` of
        their own. The cut depends on corpus, model and temperature. With few prompts intervals are over answers, and
        answers to one prompt are alike.

    References:
        Wang et al. 2025, Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for
        LLM Reasoning, arXiv 2506.01939, sections 2 and 3.
        Bigelow et al. 2025, Forking Paths in Neural Text Generation, arXiv 2412.07961 (outcomes after other tokens).
        Newcombe 2006, Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2.
    """

    name = "forking-tokens"
    title = "Forking tokens"
    writes = True
    Params = ForkingTokensParams
    measures = {
        **INSIDE_MEASURES,
        "probability": Measure(_TOKEN, "share", f"probability of the answer's own token {_DRAWN}"),
        "entropy_nats": Measure(_TOKEN, "nats", f"entropy of the distribution that the token was drawn from, {_DRAWN}"),
        "top_prob": Measure(("token", "rank"), "share", f"their probabilities {_DRAWN}"),
        "prompt": Measure(("text",), "1", "number of the prompt that the answer is to"),
        "minority": Measure(_TOKEN, "1", "1 for the tokens with the highest entropy of all answers, else 0"),
        "n_plausible": Measure(_TOKEN, "tokens", "tokens that could have stood there, the own one included"),
        "weight": Measure(_TOKEN, "positions", "positions that a sampled one stands for; 0 where none was sampled"),
        "fork": Measure(_TOKEN, "1", "1 if another token leads elsewhere, 0 if not; NaN where not sampled"),
        "fork_distance": Measure(_TOKEN, "1", "largest L2 distance of another token's outcomes; NaN where not sampled"),
        "dealt_fork": Measure(_TOKEN, "share", "how often it would fork by chance, outcomes dealt anew; NaN where not sampled"),
        "half_fork": Measure(_TOKEN, "1", "1 if halves of one token's continuations lie as far apart; NaN without four of one"),
        "cut_nats": Measure(_SHARE, "nats", "entropy that so large a share of the tokens reaches"),
        "recall": Measure(_SHARE, "share", "forks in so large a minority; NaN without forks"),
        "chance_recall": Measure(_SHARE, "share", "positions with two plausible tokens in so large a minority; NaN without any"),
        "precision": Measure(_SHARE, "share", "of these, the ones that fork; NaN where none was sampled"),
        "word_n": Measure(_VOCAB, "tokens", "occurrences of a token type; NaN for types that do not count"),
        "word_mean": Measure(_VOCAB, "nats", "mean entropy at its occurrences; NaN for types that do not count"),
        "word_low": Measure(_VOCAB, "nats", "lower end of its 95 % interval; NaN for types that do not count"),
        "word_high": Measure(_VOCAB, "nats", "upper end of its 95 % interval; NaN for types that do not count"),
        "word_null_low": Measure(_VOCAB, "nats", "2.5 % quantile of the mean after shuffling; NaN for types that do not count"),
        "word_null_high": Measure(_VOCAB, "nats", "97.5 % quantile of the mean after shuffling; NaN for types that do not count"),
        "type_share": Measure((), "share", "variance of entropy between types, of types that count; NaN without two"),
        "type_share_low": Measure((), "share", "lower end of its 95 % interval; NaN without one"),
        "type_share_high": Measure((), "share", "upper end of its 95 % interval; NaN without one"),
        "type_share_null": Measure((), "share", "the same after shuffling, mean; NaN without two types"),
        "branch_place": Measure(("branch",), "1", "place on the token axis that a token was put at"),
        "branch_id": Measure(("branch",), "1", "id of the token"),
        "branch_prob": Measure(("branch",), "share", f"its probability there, {_DRAWN}"),
        "branch_n": Measure(("branch",), "continuations", "how many were drawn"),
        "branch_distance": Measure(("branch",), "1", "L2 distance of its outcomes from those of the answer's own token"),
        "branch_share": Measure(("branch", "case"), "share", "outcomes of the continuations after it"),
    }  # fmt: skip

    def passes(self, params: Any, info: ModelInfo, batch: Any) -> int:
        """The answers, one look at them, and a few rounds of continuations."""
        return 2 + max(1, int(np.ceil(np.log2(params.most / params.n))) + 1)

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Sampled answers, a look inside them, continuations of every plausible token at some positions."""
        if params.most < params.n:
            raise InputError(f"most={params.most} is less than the {params.n} continuations of the first round (n).")
        outcome, sampling, at = params.outcome, params.sampling(), drawn_at(params.temperature)
        prompts = yield Texts()
        bases, _ = yield from drawn_answers(prompts, params.answers, sampling)
        captures = tuple(dict.fromkeys((*INSIDE, at)))
        inside = yield Forward(captures, inputs=tuple(b.ids for b in bases), why="inside the answers")
        corpus = Corpus(bases, np.arange(len(bases)) // params.answers, inside, at)
        tried = Tried.of(corpus, share=params.share, p_min=params.p_min, n=params.n_sampled, seed=params.seed)
        draws: Draws = {}
        if tried.forks:
            request = Branch(
                tuple(bases), tried.forks, params.n, 0, sampling, outcome, why="plausible tokens continued"
            )
            draws = yield from sampled_until(request, most=params.most, width=params.width)
        return minority_table(tried, draws, epsilon=params.epsilon, min_count=params.min_count)[list(self.measures)]

    def findings(self, result: Result) -> list[Finding]:
        """How well entropy predicts a fork, how far it is concentrated, and in which tokens."""
        return minority_findings(result)

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The minority and its cut, the words in it, the rule against chance, the answers, and the inside of forks."""
        return minority_drawings(result)
