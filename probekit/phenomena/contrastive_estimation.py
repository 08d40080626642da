"""Contrastive estimation: which tokens of an answer right answers would not have and wrong ones would."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Result, fmt, param, register
from probekit.core import Base, Batch, Forward, ModelInfo, Texts, TokenText, Trace, token_coords
from probekit.methods.contrastive import answer_begins, scored
from probekit.sampling import WritingParams, base_answers
from probekit.sampling.inside import INSIDE, INSIDE_MEASURES, answers_only, inside_drawings, inside_measures
from probekit.stats import Estimate, rank_correlation, text_mean

_SAME = 1e-6  # nats below which a score counts as the probability itself
_LOWEST = "lowering of the lowest tokens beyond models exchanged"
_FIRST = "; NaN for the first token of a given text"


@dataclass(frozen=True)
class ContrastiveParams(WritingParams):
    """Parameters of contrastive-estimation."""

    beta: float = param(1.0, low=0.0, high=10.0, help="Weight of the negative model; 0 leaves the positive one alone")
    answer_from: str = param(
        "model",
        choices=("model", "given"),
        help="Whose answers are scored: texts are prompts and the model writes the likeliest answer to each, or texts "
        "are scored as they are given, prompts with their answers",
    )
    answer_after: str = param(
        "",
        help="Words after which the answer begins in texts that are given, such as 'Answer:'; if empty, all tokens are "
        "scored, those of the prompt too",
    )
    k: int = param(5, low=1, high=100, unit="tokens", help="Lowest-scoring tokens of each answer that are pointed out")


@register
class ContrastiveEstimation(Analysis):
    """Which tokens of an answer would a model of right answers avoid that a model of wrong answers takes?

    Question:
        Which tokens of an answer are critical, in the sense that a model tuned on right answers finds them unlikely
        and a model tuned on wrong ones finds them likely?

    Method:
        Texts are prompts; the model under study writes the likeliest answer to each, token by token, and the tokens of
        the answer are scored (with `answer_from` given, texts are scored as they are, from their second token or from
        the words `answer_after` on). The positive and the negative model read the same token ids; row t - 1 of their
        logits z belongs to token y_t. Its score is s_t = softmax((1 + beta) z_positive - beta z_negative)[y_t] over
        the whole vocabulary, which is p_positive^(1 + beta) / p_negative^beta divided by its sum; logits are float32,
        everything after them float64. Low scores mark critical tokens. The lowering of a token is log p_positive -
        log s: what the contrast takes away beyond the positive model's own doubt. Answers weigh the same in means.

    Null:
        Were both models the same, the score would be the positive model's probability and every lowering 0. As the
        lowest of many scores is low by selection, the lowering at each answer's lowest-scoring token is compared with
        that of the two models exchanged, at the token that scores lowest then: two models that differ in nothing but
        chance lower as much either way. For rank correlations of the score: those of the positive model's probability,
        which is the score without a contrast; the claims also tell what shuffling scores among tokens would give.

    Known failure modes:
        A low score alone may only be a low probability: look at the lowering. The pair has to come from this very
        model, or the contrast shows what else sets the three apart. A pair tuned on few answers hardly differs, and
        its scores are probabilities. The likeliest answer of a model that is mostly wrong is one path among many; only
        rollouts tell whether its outcome hangs on a token. Whether an answer is right is known only where the text
        names a right one.

    References:
        Lin et al. 2024, Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning
        Capability, arXiv 2411.19943 (contrastive estimation; beta is fixed at 1 in the released code).
    """

    name = "contrastive-estimation"
    title = "Contrastive estimation"
    writes = True
    roles = ("positive", "negative")
    Params = ContrastiveParams
    measures = {
        "score": Measure(("token",), "share", f"softmax((1 + beta) z_positive - beta z_negative) of the token{_FIRST}"),
        "p_positive": Measure(("token",), "share", f"its probability under the positive model{_FIRST}"),
        "p_negative": Measure(("token",), "share", f"its probability under the negative model{_FIRST}"),
        "log_ratio_nats": Measure(("token",), "nats", f"log p_positive - log p_negative{_FIRST}"),
        "lowering_nats": Measure(("token",), "nats", f"log p_positive - log score{_FIRST}"),
        "exchanged_nats": Measure(("token",), "nats", f"the lowering, were the two models exchanged{_FIRST}"),
        "order": Measure(("token",), "1", f"tokens of its text that score lower{_FIRST}"),
        "lowest_nats": Measure(("text",), "nats", "lowering at the text's lowest-scoring token"),
        "lowest_exchanged_nats": Measure(("text",), "nats", "lowering at the lowest-scoring token, models exchanged"),
        "right": Measure(("text",), "1", "1 for a right answer, 0 for a wrong one; NaN where nobody said what is right"),
        **{
            name: replace(m, help=f"{m.help}; NaN (-1 for ids) for the first token of a given text")
            if "token" in m.dims
            else m
            for name, m in INSIDE_MEASURES.items()
        },
    }  # fmt: skip

    def min_tokens(self, params: Any) -> int:
        """A given text needs a token to score; a prompt does not."""
        return 2 if params.answer_from == "given" else 1

    def check_texts(self, params: Any, batch: Batch) -> None:
        """A given text has an answer."""
        if params.answer_from == "given":
            _given(params, batch)

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        """The answers, a look inside them, and each of them through both models."""
        return 2 * len(batch) + (1 if params.answer_from == "given" else 2)

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Answers, a look inside them, and what the two models say of every token."""
        outcome = params.outcome
        if params.answer_from == "given":
            inside = yield Forward(INSIDE)
            asked = inside.batch
            bases = _given(params, asked)
            said = [outcome.read("".join(t.strings[b.n_prompt :])) for t, b in zip(asked, bases, strict=True)]
        else:
            asked = yield Texts()
            bases, answers = yield from base_answers(asked, params.max_tokens, outcome)
            said = [a.outcome for a in answers]
            inside = yield Forward(INSIDE, inputs=tuple(b.ids for b in bases), why="inside the answers")
        found = []
        for base in bases:
            found.append((yield from scored(base, params.beta)))
        whole = params.answer_from == "given" and not params.answer_after
        data = _table(found, inside, None if whole else bases)
        data["right"] = ("text", [_right(outcome, s, text) for s, text in zip(said, asked, strict=True)])
        return data[list(self.measures)]

    def findings(self, result: Result) -> list[Finding]:
        """The lowest-scoring token, which model the answers are closer to, and what stands beside the score."""
        some = [_lowest(result), _leaning(result), *_beside(result), _right_and_wrong(result)]
        return [f for f in some if f is not None]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The answers coloured by score, score and probabilities along one of them, and against each other."""
        data, k = result.dataset, result.params.as_dict()["k"]
        place = _lowest_place(result)
        text = int(data["text"].values[place])
        one, places = data.isel(token=data["text"].values == text), _places(result, text)[:k]
        low = data.isel(token=places)
        where = "Text" if result.params.as_dict()["answer_from"] == "given" else "The likeliest answer to prompt"
        about = f"{result.about} {where} {text}."
        alone = one["p_positive"].copy(data=np.log(one["p_positive"].values))
        curves = {"score": alone - one["lowering_nats"], "probability, positive model": alone}
        words = zip(low["pos"].values, low["token_str"].values, low["lowering_nats"].values, strict=True)
        inside = {"lowest score": place} | {f"next ({i + 2})": int(at) for i, at in enumerate(places[1:4])}
        return {
            "strip": _strip(result),
            "along": plots.lines(
                curves, title=result.findings[0].claim, unit="nats", quantity="log score, log probability",
                caption=f"{about} Critical tokens are those at which the score is low and lies below the positive model's "
                "own probability.",
                alt="Log score and log-probability under the positive model against the token of the answer.",
            ),
            "lowest": plots.bars(
                {f"({int(p)}) {plots.visible(str(s))}": float(v) for p, s, v in words},
                title=f"How far the contrast lowers the {low.sizes['token']} lowest-scoring tokens", unit="nats",
                quantity="log p_positive - log score", by="token", reference=(0.0, "no contrast"),
                caption=f"{about} Lowest score first, its place in brackets; at 0 the score is the probability.",
                alt="Bars of how far the score lies below the positive model's probability, for the lowest-scoring tokens.",
            ),
            "against": _against(result),
            **inside_drawings(data, inside, about),
        }  # fmt: skip


def _given(params: Any, batch: Batch) -> list[Base]:
    """Texts as prompts with answers; without words that part them, all but the first token is the answer."""
    after = params.answer_after
    named = zip(batch.index, batch, strict=True)
    return [Base(t.ids, max(1, answer_begins(t, after, f"Text {i}")) if after else 1) for i, t in named]


def _right(outcome: Any, said: str | None, text: TokenText) -> float:
    if not text.answer:
        return np.nan
    return float(said == (outcome.read(text.answer) or text.answer))


def _table(found: list[np.ndarray], inside: Trace, bases: list[Base] | None) -> xr.Dataset:
    """Everything that is known of the tokens; without bases, all tokens of given texts."""
    given = Batch(inside.batch.texts), np.arange(inside.batch.n_tokens)
    batch, rows = given if bases is None else answers_only(bases, inside)
    first = (batch.pos == 0) & (bases is None)
    log_score, log_pos, log_neg, log_exchanged = np.full((4, batch.n_tokens), np.nan)
    order, ends = np.full(batch.n_tokens, np.nan), []
    for start, n, values in zip(batch.starts, batch.lengths, found, strict=True):
        own = slice(start + n - values.shape[1], start + n)
        log_score[own], log_pos[own], log_neg[own], log_exchanged[own] = values
        order[own] = np.argsort(np.argsort(values[0], kind="stable"), kind="stable")
        low, exchanged = int(values[0].argmin()), int(values[3].argmin())
        ends.append((values[1, low] - values[0, low], values[2, exchanged] - values[3, exchanged]))
    within = inside_measures(inside, np.maximum(rows, 1))
    for name, measure in INSIDE_MEASURES.items():
        if "token" in measure.dims:
            values = np.array(within[name][1])
            values[(slice(None),) * measure.dims.index("token") + (first,)] = np.nan if values.dtype.kind == "f" else -1
            within[name] = (measure.dims, values)
    lowest, exchanged_lowest = np.array(ends).T
    return xr.Dataset(
        {
            "score": ("token", np.exp(log_score)),
            "p_positive": ("token", np.exp(log_pos)),
            "p_negative": ("token", np.exp(log_neg)),
            "log_ratio_nats": ("token", log_pos - log_neg),
            "lowering_nats": ("token", log_pos - log_score),
            "exchanged_nats": ("token", log_neg - log_exchanged),
            "order": ("token", order),
            "lowest_nats": ("text", lowest),
            "lowest_exchanged_nats": ("text", exchanged_lowest),
            **within,
        },
        coords=token_coords(batch) | {"layer": inside[INSIDE[1]]["layer"].values},
    )


def _unit(result: Result) -> str:
    return "texts" if result.params.as_dict()["answer_from"] == "given" else "answers"


def _places(result: Result, text: int) -> np.ndarray:
    """Places of a text's tokens on the token axis, lowest score first."""
    here = np.flatnonzero((result["text"].values == text) & np.isfinite(result["order"].values))
    return here[np.argsort(result["order"].values[here], kind="stable")]


def _lowest_place(result: Result) -> int:
    """The token that scores lowest of all."""
    return int(np.nanargmin(result["score"].values))


def _per_text(result: Result, values: np.ndarray) -> np.ndarray:
    """Mean over the tokens of each text."""
    text = result["text"].values
    return np.array([np.nanmean(values[text == t]) for t in np.unique(text)])


def _lowest(result: Result) -> Finding:
    data, unit, place = result.dataset, _unit(result), _lowest_place(result)
    more = text_mean(data["lowest_nats"].values - data["lowest_exchanged_nats"].values, unit)
    at = {"text": int(data["text"].values[place]), "pos": int(data["pos"].values[place])}
    null, ends = "the two models exchanged", None if more.n == 1 else (0.0, 0.0)
    if np.nanmax(np.abs(data["lowering_nats"].values)) < _SAME:
        claim = "The score is the probability under the positive model at every token: there is no contrast to see."
        return Finding(claim, 0.0, "nats", 0.0, null, ends, more.n, unit, quantity=_LOWEST)
    score, p_pos, p_neg, p = (
        float(data[n].values[place]) for n in ("score", "p_positive", "p_negative", "probability")
    )
    word, low = plots.visible(str(data["token_str"].values[place])), float(data["lowering_nats"].values[place])
    side = "below" if low > _SAME else "not below"
    return Finding(
        f"The lowest-scoring token is {word!r} (token {at['pos']} of {unit[:-1]} {at['text']}): {fmt(score)}, {side} its "
        f"probability under the positive model ({fmt(p_pos)}; negative {fmt(p_neg)}, model under study {fmt(p)}). "
        f"{_depth(float(data['lowest_nats'].values.mean()), more, unit)}",
        more.value, "nats", 0.0, null, more.ci95, more.n, more.n_unit, at | {"token": word}, quantity=_LOWEST,
    )  # fmt: skip


def _depth(mean: float, more: Estimate, unit: str) -> str:
    """How far the contrast lowers the lowest-scoring tokens, and whether the exchanged models would lower them so."""
    which, average = (f"The lowest-scoring tokens of the {unit} lie", " on average") if more.n > 1 else ("It lies", "")
    amount = f"{which} {fmt(abs(mean))} nats {'below' if mean > 0 else 'above'} that probability{average}"
    if more.ci95 is not None and more.ci95[0] <= 0 <= more.ci95[1]:
        return f"{amount}, no more than exchanging the two models may give."
    than = "more" if more.value > 0 else "less"
    return f"{amount}, {fmt(abs(more.value))} nats {than} than with the two models exchanged."


def _leaning(result: Result) -> Finding:
    mean = text_mean(_per_text(result, result["log_ratio_nats"].values), _unit(result))
    sure = mean.ci95 is None or not mean.ci95[0] <= 0 <= mean.ci95[1]
    side = "likelier" if mean.value > 0 else "less likely"
    claim = (
        f"A token is on average {fmt(abs(mean.value))} nats {side} under the positive model than under the negative one."
        if sure and abs(mean.value) >= _SAME
        else f"The {_unit(result)} are on average as likely under the positive as under the negative model, to "
        f"{fmt(abs(mean.value))} nats a token."
    )
    return Finding(claim, mean.value, "nats", 0.0, "both models the same", mean.ci95, mean.n, mean.n_unit,
                   quantity="log-probability, positive minus negative model")  # fmt: skip


def _beside(result: Result) -> list[Finding]:
    """Whether low scores are low probabilities or high entropies, under the model under study."""
    data, unit = result.dataset, _unit(result)
    text, found = data["text"].values, []
    for name, words in (("probability", "the probability"), ("entropy_nats", "the entropy")):
        of_score, of_positive = (
            np.array(
                [rank_correlation(data[of].values[text == t], data[name].values[text == t]) for t in np.unique(text)]
            )
            for of in ("score", "p_positive")
        )
        if not (np.isfinite(of_score) & np.isfinite(of_positive)).any():
            continue
        mean, null = text_mean(of_score, unit).within(-1, 1), text_mean(of_positive, unit).value
        claim = (
            f"Within one {unit[:-1]}, the score has a rank correlation of {mean.value:.2f} with {words} under the model "
            f"under study ({null:.2f} without a contrast, 0 if scores are shuffled among its tokens)"
            f"{_shared(result) if name == 'probability' else ''}."
        )
        meaning = "the positive model's probability in the place of the score"
        found.append(Finding(claim, mean.value, "rank correlation", null, meaning, mean.ci95, mean.n, mean.n_unit,
                             quantity=f"score against {words} of the model"))  # fmt: skip
    return found


def _shared(result: Result) -> str:
    """How many of the lowest-scoring tokens are also the least likely ones."""
    both, chance, n, k = 0, 0.0, 0, result.params.as_dict()["k"]
    for text in np.unique(result["text"].values):
        places = _places(result, int(text))
        some = min(k, len(places))
        unlikely = places[np.argsort(result["probability"].values[places], kind="stable")[:some]]
        both += len(set(unlikely.tolist()) & set(places[:some].tolist()))
        chance, n = chance + some * some / len(places), n + some
    return f"; {both} of the {n} lowest-scoring tokens are among as many least likely ones ({fmt(chance)} by chance)"


def _right_and_wrong(result: Result) -> Finding | None:
    """Whether the contrast lowers wrong answers more than right ones; None with fewer than two of either kind."""
    right, lowering = result["right"].values, _per_text(result, result["lowering_nats"].values)
    wrong_ones, right_ones = lowering[right == 0], lowering[right == 1]
    if min(len(wrong_ones), len(right_ones)) < 2:
        return None
    from scipy.stats import ttest_ind

    value = float(wrong_ones.mean() - right_ones.mean())
    spread = np.ptp(wrong_ones) > 0 or np.ptp(right_ones) > 0
    interval = ttest_ind(wrong_ones, right_ones, equal_var=False).confidence_interval() if spread else (value, value)
    ci95 = (float(interval[0]), float(interval[1]))
    counted = f"{len(wrong_ones)} wrong and {len(right_ones)} right {_unit(result)}"
    than = "more" if value > 0 else "less"
    claim = (
        f"The contrast lowers the tokens of {counted} alike, to {fmt(abs(value))} nats a token."
        if ci95[0] <= 0 <= ci95[1]
        else f"The contrast lowers the tokens of wrong {_unit(result)} {fmt(abs(value))} nats {than} than those of right "
        f"ones ({counted})."
    )
    n = len(wrong_ones) + len(right_ones)
    return Finding(claim, value, "nats", 0.0, "wrong and right ones lowered alike", ci95, n, _unit(result),
                   quantity="lowering of tokens in wrong minus right answers")  # fmt: skip


def _against(result: Result) -> plots.Figure:
    """Score against probability, in logarithms."""
    data, k = result.dataset, result.params.as_dict()["k"]
    with np.errstate(divide="ignore"):
        x, y = np.log(data["p_positive"].values), np.log(data["score"].values)
    low = data["order"].values < k
    named = zip(data["token_str"].values, data["text"].values, data["pos"].values, strict=True)
    about = [f"{plots.visible(str(s))} ({_unit(result)[:-1]} {t}, token {p})" for s, t, p in named]
    groups = {f"{k} lowest of each": low, "other tokens": ~low & np.isfinite(y)}
    return plots.scatter(
        {name: (x[which], y[which]) for name, which in groups.items() if which.any()},
        title="Score against probability: below the line the contrast lowers a token", unit="nats",
        x_quantity="log probability, positive model", y_quantity="log score", diagonal="score = probability",
        hover={name: [about[i] for i in np.flatnonzero(which)] for name, which in groups.items()},
        caption=f"{result.about} One point per token.",
        alt="Scatter of the log score of every token against its log-probability under the positive model.",
    )  # fmt: skip


def _strip(result: Result) -> plots.TokenStrip:
    data = result.dataset
    numbers = [data[n].values for n in ("p_positive", "p_negative", "probability")]
    said = zip(*numbers, data["right"].values[data["text"].values], strict=True)
    mark = {1.0: "; in a right answer", 0.0: "; in a wrong answer"}
    notes = [
        "" if np.isnan(a) else f"positive {fmt(a)}, negative {fmt(b)}, model {fmt(c)}{mark.get(r, '')}"
        for a, b, c, r in said
    ]
    with np.errstate(divide="ignore"):
        low = -np.log(data["score"].values)
    return plots.TokenStrip(
        title="Which tokens score low, and what both models say of them",
        tokens=tuple(map(str, data["token_str"].values)),
        texts=data["text"].values,
        quantities=(
            plots.Quantity("-log score (dark: critical)", "nats", low, low=0),
            plots.Quantity("lowered by the contrast", "nats", data["lowering_nats"].values, "diverging"),
            plots.Quantity("score", "share", data["score"].values, low=0, high=1),
            plots.Quantity("log p_positive - log p_negative", "nats", data["log_ratio_nats"].values, "diverging"),
            plots.Quantity("probability, model under study", "share", data["probability"].values, low=0, high=1),
            plots.Quantity("entropy, model under study", "nats", data["entropy_nats"].values, low=0),
        ),
        caption=f"{result.about} A token is critical where its score is low and lies below its probability. Hover for the "
        "probabilities under both models and the one under study.",
        alt="The answers, each token coloured by how low it scores.",
        notes=tuple(notes),
    )
