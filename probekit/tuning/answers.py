"""Which of a model's own answers the positive and the negative model are tuned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from probekit.core import Base, Continuation, InputError, Outcome


@dataclass(frozen=True)
class Example:
    """A prompt with an answer, in token ids.

    Args:
        ids: of both.
        n_prompt: how many of them are the prompt, which is not learnt.
    """

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True)
class Question:
    """What became of one prompt.

    Args:
        right_answer: what a right answer says.
        said: what each sampled answer says, in order of their numbers; None for nothing.
        finished: whether each of them came to an end.
        positive: number of the answer that the positive model learns; None without a right one.
        negative: numbers of those that the negative model learns.
    """

    right_answer: str
    said: tuple[str | None, ...]
    finished: tuple[bool, ...]
    positive: int | None = None
    negative: tuple[int, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Answers that are right, wrong, unread (they say nothing) and unfinished (cut off before they said anything)."""
        done = [s for s, f in zip(self.said, self.finished, strict=True) if f]
        right = sum(s == self.right_answer for s in done)
        unread = sum(s is None for s in done)
        return {
            "right": right,
            "wrong": len(done) - right - unread,
            "unread": unread,
            "unfinished": len(self.said) - len(done),
        }


@dataclass(frozen=True)
class Chosen:
    """What both models learn.

    Args:
        questions: what became of each prompt.
        positive: examples for the positive model.
        negative: examples for the negative one.
    """

    questions: tuple[Question, ...]
    positive: tuple[Example, ...] = field(repr=False)
    negative: tuple[Example, ...] = field(repr=False)


def choose(
    prompts: Sequence[Base],
    answers: Sequence[Sequence[Continuation]],
    right_answers: Sequence[str],
    *,
    outcome: Outcome,
    decode: Callable[[Sequence[int]], str],
    wrong_share: float,
) -> Chosen:
    """The answers that each model learns, after arXiv 2411.19943 and its released code.

    Positive: the first sampled of the right answers to each question. Negative: of each question's wrong answers, the
    commonest first, the first sampled response of each, until they stand for `wrong_share` of the question's wrong
    responses; of answers that were given only once, at most the first one. Answers that were cut off for want of room
    count only if more text could not change what they say. (The released code draws a response among the equal ones;
    as samples are independent, the first is as good.)

    Args:
        prompts: the questions.
        answers: sampled answers to each.
        right_answers: what a right answer to each says.
        outcome: reads an answer.
        decode: from token ids to text.
        wrong_share: share of the wrong responses that the negative examples stand for.

    Raises:
        InputError: no answer is right, or none is wrong; says what was found.
    """
    questions = []
    positive: list[Example] = []
    negative: list[Example] = []
    for prompt, some, right in zip(prompts, answers, right_answers, strict=True):
        texts = [decode(a.ids) for a in some]
        wanted = outcome.read(right) or right
        finished = [a.stopped != "length" or outcome.settled(t) for a, t in zip(some, texts, strict=True)]
        said = [outcome.read(t) for t in texts]
        question = _chosen(wanted, tuple(said), tuple(finished), wrong_share)
        questions.append(question)
        if question.positive is not None:
            positive.append(_example(prompt, some[question.positive]))
        negative += [_example(prompt, some[i]) for i in question.negative]
    if not positive or not negative:
        raise InputError(_nothing_to_learn(questions, "right" if not positive else "wrong"))
    return Chosen(tuple(questions), tuple(positive), tuple(negative))


def _example(prompt: Base, answer: Continuation) -> Example:
    return Example((*prompt.ids, *answer.ids), len(prompt.ids))


def _chosen(right: str, said: tuple[str | None, ...], finished: tuple[bool, ...], wrong_share: float) -> Question:
    numbers: dict[str, list[int]] = {}
    for i, (answer, done) in enumerate(zip(said, finished, strict=True)):
        if done and answer is not None:
            numbers.setdefault(answer, []).append(i)
    positive = numbers.pop(right)[0] if right in numbers else None
    wanted = wrong_share * sum(map(len, numbers.values()))
    negative: list[int] = []
    for own in sorted(numbers.values(), key=lambda n: (-len(n), n[0])):
        if wanted <= 0 or (negative and len(own) == 1):
            break
        negative.append(own[0])
        wanted -= len(own)
    return Question(right, said, finished, positive, tuple(negative))


def _nothing_to_learn(questions: Sequence[Question], what: str) -> str:
    total = {k: sum(q.counts[k] for q in questions) for k in ("right", "wrong", "unread", "unfinished")}
    n = len(questions[0].said)
    told = ", ".join(f"{count:,} are {kind}" for kind, count in total.items())
    advice = {
        "right": "Ask easier questions or more of them, draw more samples, or lower the temperature",
        "wrong": "Ask harder questions or more of them, draw more samples, or raise the temperature",
    }[what]
    cut = " Unfinished ones ran into max_tokens; raise it." if total["unfinished"] else ""
    return (
        f"No sampled answer is {what}: of {n:,} answers to each of {len(questions):,} questions, {told}. A pair needs "
        f"right answers for its positive model and wrong ones for its negative model. {advice}.{cut}"
    )
