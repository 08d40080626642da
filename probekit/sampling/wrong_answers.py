"""A wrong answer to each prompt, and how often prompts are answered rightly."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.core import Base, Batch, Branch, Branches, Continuation, Fork, Outcome, Request, Sampling

from .rounds import base_answers

TOGETHER = 32  # prompts whose keys and values are held at once


@dataclass(frozen=True)
class Looking:
    """How wrong answers are looked for.

    Args:
        tries: answers that are sampled per prompt.
        least: prompts of whose sampled answers a smaller share is right are left out.
        unfinished: whether answers that say nothing, or that were cut off, count as wrong ones.
        sampling: how answers are drawn.
        outcome: what is read off them.
    """

    tries: int
    least: float
    unfinished: bool
    sampling: Sampling
    outcome: Outcome


@dataclass(frozen=True)
class Tried:
    """What the first answers to some prompts are like.

    Args:
        success: share of the sampled answers that are right; axis text.
        enough: whether that is enough for a prompt to be looked at; axis text.
        wrong: by number of the prompt, the wrong answer: the greedy one if it is wrong, else the first sampled one.
        greedy: numbers of the prompts whose greedy answer it is.
    """

    success: np.ndarray
    enough: np.ndarray
    wrong: dict[int, Continuation]
    greedy: frozenset[int]


def wrong_answers(batch: Batch, rights: Sequence[str], looking: Looking) -> Generator[Request, Any, Tried]:
    """A wrong answer to each prompt that is answered rightly often enough; to be used with `yield from`.

    Args:
        batch: the prompts.
        rights: what a right answer to each says.
        looking: how wrong answers are looked for.
    """
    sampled: list[tuple[Continuation, ...]] = []
    for start in range(0, len(batch), TOGETHER):
        bases = tuple(Base(t.ids, len(t)) for t in batch.texts[start : start + TOGETHER])
        forks = tuple(Fork(i, len(base.ids)) for i, base in enumerate(bases))
        found: Branches = yield Branch(
            bases, forks, looking.tries, 0, looking.sampling, looking.outcome, why="answers to look through"
        )
        sampled += found.continuations
    success = np.array([np.mean([c.outcome == r for c in cs]) for cs, r in zip(sampled, rights, strict=True)])
    enough = success >= looking.least
    kept = np.flatnonzero(enough)
    greedy: dict[int, Continuation] = {}
    for start in range(0, len(kept), TOGETHER):
        chosen = kept[start : start + TOGETHER].tolist()
        _, answers = yield from base_answers(batch.select(chosen), looking.sampling.max_tokens, looking.outcome)
        greedy |= dict(zip(chosen, answers, strict=True))
    wrong = {}
    for i, first in greedy.items():
        some = [c for c in (first, *sampled[i]) if _is_wrong(c, rights[i], looking.unfinished)]
        if some:
            wrong[i] = some[0]
    return Tried(success, enough, wrong, frozenset(i for i, c in wrong.items() if c is greedy[i]))


def fresh_success(batch: Batch, rights: Sequence[str], looking: Looking, n: int) -> Generator[Request, Any, np.ndarray]:
    """Share of right ones among `n` more sampled answers to each prompt, the first `tries` not counted.

    Prompts were chosen by the first ones, which flatters these; the later ones are not concerned.

    Args:
        batch: the prompts.
        rights: what a right answer to each says.
        looking: how the first answers were sampled.
        n: how many more.
    """
    shares: list[float] = []
    for start in range(0, len(batch), TOGETHER):
        bases = tuple(Base(t.ids, len(t)) for t in batch.texts[start : start + TOGETHER])
        forks = tuple(Fork(i, len(base.ids)) for i, base in enumerate(bases))
        found: Branches = yield Branch(
            bases,
            forks,
            n,
            looking.tries,
            looking.sampling,
            looking.outcome,
            why="how often prompts are answered rightly",
        )
        mine = rights[start : start + TOGETHER]
        shares += [
            float(np.mean([c.outcome == r for c in cs])) for cs, r in zip(found.continuations, mine, strict=True)
        ]
    return np.array(shares)


def _is_wrong(answer: Continuation, right: str, unfinished: bool) -> bool:
    says = answer.outcome is not None and answer.stopped != "length"
    return answer.outcome != right and (says or unfinished)


def finished_at(strings: Sequence[str], answer: Continuation, outcome: Outcome) -> int:
    """From which token of an answer on its outcome is fixed: it is over, or says what more text could not change.

    Args:
        strings: what its tokens show as.
        answer: it.
        outcome: what is read off it.

    Returns:
        Place of the token; the number of tokens if more of them could change it to the end.
    """
    over = len(strings) if answer.stopped == "length" else len(strings) - 1
    text = ""
    for place, string in enumerate(strings[:over]):
        text += string
        if outcome.settled(text):
            return place
    return over


def own_words(strings: Sequence[str], said: str | None, outcome: Outcome) -> tuple[int, int]:
    """The tokens with which an answer comes to say what it says to the end, such as the digits of its number.

    Args:
        strings: what its tokens show as.
        said: what it says.
        outcome: what is read off it.

    Returns:
        First and last of them; -1 and -1 if it says nothing, or its tokens one by one do not spell it.
    """
    readings: list[str | None] = [None]
    text = ""
    for string in strings:
        text += string
        readings.append(outcome.read(text))
    if said is None or readings[-1] != said:
        return -1, -1
    last = len(strings) - 1
    while last > 0 and readings[last] == said:  # readings[last] is what the tokens before `last` say
        last -= 1
    first = last
    while first > 0 and readings[first] != readings[first - 1]:  # what the token before the first changed
        first -= 1
    return first, last
