"""Critical tokens: after which token of a wrong answer no continuation is right any more."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Result, param, register
from probekit.core import (
    Base,
    Batch,
    Forward,
    InputError,
    ModelInfo,
    Outcome,
    Request,
    TextError,
    Texts,
    TokenText,
    Trace,
)
from probekit.methods.two_models import logits_of
from probekit.sampling import Pattern, WritingParams
from probekit.sampling.critical import (
    PUBLISHED_N,
    Rollouts,
    Scanned,
    WrongAnswer,
    most_dead,
    scan_answers,
    stand_ins,
)
from probekit.sampling.critical_report import critical_drawings, critical_findings
from probekit.sampling.critical_table import (
    FOUND,
    LOST,
    NEVER_LOST,
    NONE_WRONG,
    RARELY_RIGHT,
    Replaced,
    Study,
    critical_table,
)
from probekit.sampling.inside import INSIDE, INSIDE_MEASURES, NEXT
from probekit.sampling.replacing import kept_and_replaced, other_tokens, random_places
from probekit.sampling.wrong_answers import Looking, Tried, finished_at, fresh_success, own_words, wrong_answers

_TOGETHER = 16  # answers whose keys and values are held at once
_NEAR_SURE = 0.95

Answers = dict[int, tuple[WrongAnswer, Scanned]]  # by number of the prompt


@dataclass(frozen=True)
class CriticalParams(WritingParams):
    """Parameters of critical-tokens."""

    correct: str = param("", help="What a right answer says, for prompts that do not say it themselves")
    tries: int = param(16, low=1, high=10000, unit="answers", help="Sampled answers per prompt to find a wrong one in")
    least_success: float = param(
        0.05,
        low=0.0,
        high=1.0,
        unit="share",
        help="Prompts of whose sampled answers a smaller share is right are left out: they are lost from the start",
    )
    n: int = param(
        32, low=4, high=10000, unit="continuations", help="Continuations per prefix, and per token that is replaced"
    )
    sure: float = param(
        _NEAR_SURE,
        low=0.5,
        high=1.0,
        unit="share",
        help="Prefixes that tokens of together this probability join share a measurement; 1 measures every prefix",
    )
    whole: bool = param(False, help="Measure the prefixes, too, that cannot matter to which token is critical")
    controls: int = param(
        2, low=1, high=64, unit="tokens", help="Random tokens of each kind to compare with, per answer"
    )
    unfinished: bool = param(
        False, help="Answers that say nothing, or that max_tokens cut off, count as wrong ones, too"
    )

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {"n": PUBLISHED_N, "sure": 1.0}}

    @property
    def joined(self) -> float:
        """From which probability on tokens join prefixes. Above temperature 1, draws are less sure than the model."""
        return 1.0 if self.temperature > 1 else self.sure


@register
class CriticalTokens(Analysis):
    """After which token of a wrong answer is no continuation right any more, and would another token have helped?

    Question:
        A wrong answer is often still open for a while: written on from its first tokens, the model sometimes comes to
        the right result. At which token is that over, and does it help to put another token there?

    Method:
        Texts are prompts, each with what a right answer says (`answer` of its record, or `correct` for all). A wrong
        answer to each is taken: the greedy one if it is wrong, else the first wrong one of `tries` sampled answers.
        It has to be finished and to say something, unless `unfinished`. Prompts without one, and those of whose
        sampled answers less than `least_success` are right, are counted and left out; so are those that are not alive
        themselves, by `n` more answers that had no part in the choice.

        The prefix of a token is the prompt and the answer up to it, the token included; the first token counts. Its
        success rate is the share of right answers among `n` continuations of at most `max_tokens`. It is alive if
        more than 3 of 64 are right (the paper: 5 %), or the same share of n: 2 or more of 32, 1 or more of 16. The
        critical token is the first after the last prefix that is alive whose prefix has not one right continuation. If
        none comes after it, it is the one that stood last when a later prefix turned out to be alive.

        Prefixes are measured from the end backward until the last one that is alive. One that has shown enough
        right continuations draws no more (its rate is then slightly too high); one counts as lost only after all n.
        Where the answer is finished, its outcome is fixed. Prefixes share the measurement of a later one if the tokens
        in between have together a probability of `sure` or more, since such tokens move the rate by 1 - sure at most.

        Replacing: n continuations with the token kept, drawn afresh, since the draws that chose it are all wrong by
        construction; against one continuation after each of n tokens drawn from the model's distribution without it.
        The gain is the difference of the shares of right ones. Pass@k = mean over answers of 1 - C(n - c, k) / C(n, k).
        For comparison the same with random tokens of the same answers, the critical one excepted: tokens with as much
        freedom (probability below 0.95, since almost all that could replace a near-sure token is garbage), and any.

    Null:
        A random token with as much freedom, of the same answer, kept and replaced in the same way: if the critical
        token is nothing special, its gain is that of the random ones. For places: uniform along the answer.

    Known failure modes:
        With few continuations, a prefix with a small success rate passes for lost: of 32, one with a rate of 5 % has
        none right in a fifth of the cases. Where the rate is low all along, the critical token is mostly chance, and
        its gain small. The clearest token of many is flattered by the choice; its gain is not, being drawn afresh.
        Answers that are read wrongly, and right results found by accident, count like all others.

    References:
        Lin et al. 2025, Critical Tokens Matter, arXiv 2411.19943, section 2; the rule is that of its released code.
        Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv 2107.03374 (pass@k).
    """

    name = "critical-tokens"
    title = "Critical tokens"
    writes = True
    Params = CriticalParams
    measures = {
        "success_share": Measure(("token",), "share", "right continuations of the prefix up to the token, it included; 0 where the wrong answer is finished, NaN where not measured"),
        "drawn": Measure(("token",), "continuations", "how many were drawn of it, or of the prefix it shares with"),
        "how": Measure(("token",), "1", "0: not measured, 1: continued, 2: shared with a later prefix, 3: the answer is finished"),
        "critical": Measure(("token",), "1", "1 at critical tokens"),
        **INSIDE_MEASURES,
        "status": Measure(("text",), "1", "of each prompt: 0 with a critical token, 1 never wrong, 2 too rarely right, 3 lost from the start, 4 never lost"),
        "tried_success": Measure(("text",), "share", "right ones among the first sampled answers to the prompt, by which it was chosen"),
        "prompt_success": Measure(("text",), "share", "right ones among n more answers to it; NaN where none were sampled, or it is lost from the start"),
        "critical_place": Measure(("text",), "tokens", "place of the critical token in the answer, from 0; -1 where there is none"),
        "greedy": Measure(("text",), "1", "1 where the wrong answer is the greedy one"),
        "says": Measure(("text",), "1", "what the wrong answer says"),
        "right_answer": Measure(("text",), "1", "what a right answer says"),
        "words_from": Measure(("text",), "tokens", "first token with which the wrong answer says what it says; -1 where there is none"),
        "words_to": Measure(("text",), "tokens", "the last of them"),
        "branch_place": Measure(("branch",), "1", "place on the token axis of a token that was kept and replaced"),
        "branch_group": Measure(("branch",), "1", "0: critical, 1: random one with as much freedom, 2: any random one"),
        "kept_right": Measure(("branch", "sample"), "1", "1 where a continuation with the token is right; drawn afresh"),
        "replaced_right": Measure(("branch", "sample"), "1", "1 where the continuation after another token is right"),
        "replaced_id": Measure(("branch", "sample"), "1", "id of that other token"),
        "gain": Measure(("branch",), "share", "right continuations with another token, minus those with the token"),
        "pass_share": Measure(("case", "threshold"), "share", "pass@k, mean over answers; NaN without a token of the kind"),
        "pass_low": Measure(("case", "threshold"), "share", "lower end of its 95 % interval over answers; NaN likewise"),
        "pass_high": Measure(("case", "threshold"), "share", "upper end of its 95 % interval over answers; NaN likewise"),
    }  # fmt: skip

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        """The prompts, one look at the wrong answers, and one at each that has a critical token."""
        return 2 + len(batch)

    def check_texts(self, params: Any, batch: Batch) -> None:
        """Every prompt says what a right answer is, in words that an answer can be read as."""
        outcome = params.outcome
        for i, text in enumerate(batch):
            said = text.answer or params.correct
            if not said:
                raise TextError(
                    f"Text {i} does not say what a right answer to it is. Give records, such as "
                    '{"text": …, "answer": "18"}, or one right answer for all prompts (correct=…).'
                )
            if outcome.read(said) is None and not isinstance(outcome, Pattern):
                raise TextError(
                    f"The right answer to text {i} is {said!r}, and no answer is ever read as that ({outcome.key}). "
                    "Say it as answers do, or have answers read otherwise (answer=…)."
                )

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Wrong answers, a look inside them, their prefixes from the end backward, tokens kept and replaced."""
        if params.temperature == 0:
            raise InputError(
                "critical-tokens counts right ones among continuations; at temperature 0 all are the same."
            )
        prompts: Batch = yield Texts()
        rights = [_right(text, params) for text in prompts]
        looking = Looking(params.tries, params.least_success, params.unfinished, params.sampling(), params.outcome)
        tried = yield from wrong_answers(prompts, rights, looking)
        status = np.where(tried.enough, NONE_WRONG, RARELY_RIGHT)
        if not tried.wrong:
            raise InputError(_nothing(status, params))
        alive = yield from _alive(prompts, rights, tried, looking, params)
        status[[i for i in tried.wrong if i not in alive]] = LOST
        if not alive:
            raise InputError(_nothing(status, params))
        wrong = {i: tried.wrong[i] for i in alive}
        bases = [Base((*prompts.texts[i].ids, *answer.ids), len(prompts.texts[i])) for i, answer in wrong.items()]
        inside: Trace = yield Forward(INSIDE, inputs=tuple(b.ids for b in bases), why="inside the wrong answers")
        chances, prefixes, words = {}, {}, {}
        for number, ((i, answer), base) in enumerate(zip(wrong.items(), bases, strict=True)):
            strings = inside.batch.texts[number].strings[base.n_prompt :]
            stop = finished_at(strings, answer, params.outcome)
            chances[i] = _probs(inside, number, base)
            prefixes[i] = WrongAnswer(base, rights[i], stand_ins(chances[i], params.joined, stop), stop)
            words[i] = own_words(strings, answer.outcome, params.outcome)
        answers = yield from _scanned(prefixes, params)
        for i, (_, scanned) in answers.items():
            status[i] = NEVER_LOST if scanned.critical is None else FOUND
        replaced = yield from _replace(answers, chances, params)
        study = Study(tried, alive, rights, status, answers, words, replaced)
        return critical_table(study, inside, params.n)[list(self.measures)]

    def findings(self, result: Result) -> list[Finding]:
        """The clearest critical token, what replacing helps beside random tokens, where they lie, what was left out."""
        return critical_findings(result)

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The success rate along the text, pass@k, gains, what else could have stood there, and the inside."""
        return critical_drawings(result)


def _right(text: TokenText, params: Any) -> str:
    """What a right answer to a prompt is read as; a pattern that catches nothing in it leaves it as it is."""
    said = text.answer or params.correct
    outcome: Outcome = params.outcome
    return outcome.read(said) or said.strip()


def _nothing(status: np.ndarray, params: Any) -> str:
    rarely, lost = (int((status == k).sum()) for k in (RARELY_RIGHT, LOST))
    return (
        f"There is no wrong answer to look at ({len(status)} prompts). Of {rarely}, less than {params.least_success:.0%} of "
        f"{params.tries} sampled answers are right (least_success, tries); of {lost}, {most_dead(params.n)} or "
        f"less of {params.n} more; to {len(status) - rarely - lost}, no finished answer is wrong. Give other "
        "prompts, sample more answers, allow longer ones (max_tokens), or take those that are cut off (unfinished=true)."
    )


def _probs(inside: Trace, number: int, base: Base) -> np.ndarray:
    """Probability of each token of an answer."""
    start = inside.batch.starts[number]
    rows = slice(start + base.n_prompt - 1, start + len(base.ids) - 1)
    return np.exp(inside[NEXT]["logprob_nats"].values[rows].astype(float))


def _scanned(prefixes: Mapping[int, WrongAnswer], params: Any) -> Generator[Request, Any, Answers]:
    rollouts = Rollouts(params.sampling(), params.outcome, params.n, params.whole)
    texts = list(prefixes)
    found: list[Scanned] = []
    for start in range(0, len(texts), _TOGETHER):
        some = [prefixes[i] for i in texts[start : start + _TOGETHER]]
        found += yield from scan_answers(some, rollouts)
    return {i: (prefixes[i], scanned) for i, scanned in zip(texts, found, strict=True)}


def _alive(
    prompts: Batch, rights: list[str], tried: Tried, looking: Looking, params: Any
) -> Generator[Request, Any, dict[int, float]]:
    """Success rates of the prompts with a wrong answer, by more draws; those that are lost from the start left out."""
    texts = sorted(tried.wrong)
    n = params.n
    shares = yield from fresh_success(prompts.select(texts), [rights[i] for i in texts], looking, n)
    return {i: float(share) for i, share in zip(texts, shares, strict=True) if round(share * n) > most_dead(n)}


def _replace(
    answers: Answers, chances: Mapping[int, np.ndarray], params: Any
) -> Generator[Request, Any, list[Replaced]]:
    """Critical and random tokens, kept and replaced."""
    texts = [i for i, (_, scanned) in answers.items() if scanned.critical is not None]
    done: list[Replaced] = []
    for start in range(0, len(texts), _TOGETHER):
        some = texts[start : start + _TOGETHER]
        places = {i: _places(*answers[i], chances[i], params) for i in some}
        bases = tuple(answers[i][0].base for i in some)
        drawn: dict[tuple[int, int], np.ndarray] = {}
        for number, i in enumerate(some):
            drawn |= yield from _others(number, bases[number], {at for at, _ in places[i]}, params)
        found = yield from kept_and_replaced(
            bases, drawn, sampling=params.sampling(params.max_tokens + 1), outcome=params.outcome
        )
        for number, i in enumerate(some):
            for at, group in places[i]:
                place = (number, bases[number].n_prompt + at)
                kept, replaced = (np.array([said == answers[i][0].right for said in half]) for half in found[place])
                done.append(Replaced(i, at, group, kept, drawn[place], replaced))
    return done


def _others(
    number: int, base: Base, places: set[int], params: Any
) -> Generator[Request, Any, dict[tuple[int, int], np.ndarray]]:
    """Tokens drawn in the place of some of an answer's, by number of the answer and place in the base."""
    logits = yield from logits_of(base.ids[: base.n_prompt + max(places)], "model", "what else could stand there")
    drawn = {}
    for at in sorted(base.n_prompt + place for place in places):
        before = Base(base.ids[:at], base.n_prompt)
        drawn[number, at] = other_tokens(
            logits[at - 1], base.ids[at], params.n, sampling=params.sampling(), base=before
        )
    return drawn


def _places(answer: WrongAnswer, scanned: Scanned, probs: np.ndarray, params: Any) -> list[tuple[int, int]]:
    """Tokens of an answer that are replaced, with their group: the critical one, free ones, any."""
    assert scanned.critical is not None
    allowed = np.arange(len(probs)) <= answer.finished  # what comes after could change nothing
    allowed[scanned.critical] = False
    free = random_places(answer.base, params.controls, allowed & (probs < _NEAR_SURE), params.seed)
    other = random_places(answer.base, params.controls, allowed, params.seed)
    return [(scanned.critical, 0), *((at, 1) for at in free), *((at, 2) for at in other)]
