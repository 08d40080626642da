"""From which token of a wrong answer on no continuation is right any more: the rule, and a scan that measures little.

The prefix of a token is the prompt and the answer up to it, the token included. A prefix is alive if more than 3 of 64
of its continuations are right, or the same share of another number. The rule is that of the code released with arXiv
2411.19943 (`analyse_all_token`); unlike there, prefixes are kept apart by their token ids, not by their text, and the
answer's first token is one of the candidates.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probekit.core import Base, Branch, Branches, Fork, Outcome, Request, Sampling

PUBLISHED_N = 64
_PUBLISHED_LIMIT = 3
NOT_MEASURED, DRAWN, SHARED, FINISHED = range(4)
_WIDTH = 64  # prefixes that are measured together
_DEEPEST = 16  # of one answer


def most_dead(n: int) -> int:
    """With how many right continuations of `n` a prefix still counts as lost: those of a share of 3/64 (4.7 %) or less.

    3 of 64, 1 of 32, 0 of 16; so that 6.25 % are alive with any of them.
    """
    return _PUBLISHED_LIMIT * n // PUBLISHED_N


def critical_prefix(counts: Sequence[int], limit: int) -> int | None:
    """The critical token by the released rule: a forward scan over complete counts.

    The first prefix without a right continuation is the candidate; a later one that is alive discards it, and the next
    without any is the new candidate. If none is left in the end, it is the last that was discarded.

    Args:
        counts: right continuations of each prefix, in the order of the text.
        limit: of a prefix that is alive more are right.

    Returns:
        Its place; None if every prefix has a right continuation.
    """
    candidate: int | None = None
    discarded: int | None = None
    for place, count in enumerate(counts):
        if count == 0 and candidate is None:
            candidate = place
        if count > limit and candidate is not None:
            discarded, candidate = candidate, None
    return discarded if candidate is None else candidate


@dataclass
class BackwardScan:
    """The same rule, from the end backward, so that prefixes before the last one that is alive need no measurement.

    The last stretch between two prefixes that are alive (or the ends of the answer) which holds a prefix without any
    right continuation is the one in which the forward scan finds its result: the first such prefix of that stretch.

    Args:
        limit: of a prefix that is alive more are right.
        critical: the earliest candidate so far.
        done: whether earlier prefixes could not change it any more.
    """

    limit: int
    critical: int | None = None
    done: bool = False

    def see(self, place: int, count: int) -> None:
        """Take in the count of the prefix before those seen so far."""
        if self.done:
            return
        if count > self.limit:
            self.done = self.critical is not None
        elif count == 0:
            self.critical = place


def stand_ins(probs: np.ndarray, sure: float, finished: int) -> np.ndarray:
    """For each prefix of an answer, the prefix that is measured in its stead.

    A token with probability p moves the success rate by 1 - p at most, tokens with probabilities p and q by 1 - pq.
    Prefixes therefore share the measurement of a later one as long as the tokens in between have together a
    probability of `sure` or more, and their rates differ by 1 - sure at most.

    Args:
        probs: probability of each token of the answer, as the draws see it or less.
        sure: from which probability on; 1 measures every prefix, but for tokens with a probability of exactly 1.
        finished: from this prefix on the answer is over and its outcome fixed; they stand for themselves.

    Returns:
        Places, at or after each prefix' own.
    """
    found = np.arange(len(probs))
    together = 1.0
    for place in range(min(finished, len(probs) - 1) - 1, -1, -1):
        together *= float(probs[place + 1])
        if together >= sure:
            found[place] = found[place + 1]
        else:
            together = 1.0
    return found


@dataclass(frozen=True)
class WrongAnswer:
    """An answer whose prefixes are measured.

    Args:
        base: prompt and answer.
        right: what a right answer says.
        stands: for each prefix, the one that is measured in its stead.
        finished: from this prefix on the outcome is fixed, and wrong.
    """

    base: Base
    right: str
    stands: np.ndarray
    finished: int

    def fork(self, number: int, place: int) -> Fork:
        """Where continuations of a prefix leave, if the answer is the base of that number."""
        return Fork(number, self.base.n_prompt + place + 1)


@dataclass(frozen=True)
class Rollouts:
    """How prefixes are measured.

    Args:
        sampling: how tokens are drawn.
        outcome: what is read off the answers.
        n: continuations of a prefix; one that has shown to be alive earlier draws no more.
        whole: measure the prefixes, too, that cannot matter to the result.
    """

    sampling: Sampling
    outcome: Outcome
    n: int
    whole: bool = False

    @property
    def limit(self) -> int:
        """Of a prefix that is alive more are right."""
        return most_dead(self.n)


@dataclass
class Scanned:
    """What is known of the prefixes of one answer.

    Args:
        critical: place of the critical token; None if no prefix is without right continuations.
        right: right continuations of each prefix, those of its stand-in where it has one.
        drawn: continuations that were drawn; 0 where the answer is finished or nothing was measured.
        how: NOT_MEASURED, DRAWN, SHARED (with a later prefix) or FINISHED.
    """

    critical: int | None
    right: np.ndarray
    drawn: np.ndarray
    how: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """Share of right continuations; 0 where the wrong answer is finished, NaN where not measured."""
        share = np.where(self.drawn > 0, self.right / np.maximum(self.drawn, 1), np.nan)
        share[(self.drawn == 0) & (self.how != NOT_MEASURED)] = 0.0  # finished, or sharing with it
        return share


def scan_answers(answers: Sequence[WrongAnswer], rollouts: Rollouts) -> Generator[Request, Any, list[Scanned]]:
    """The critical token of each answer; to be used with `yield from`.

    Prefixes are measured from the end backward, a few of every answer at a time, so that they share a batch. A prefix
    counts as lost only after all its `n` continuations; it counts as alive, and draws no more, as soon as enough of
    them are right. Its share of right ones is then somewhat too high. Prefixes before one that is alive are dropped,
    once the result is known.

    Args:
        answers: wrong answers.
        rollouts: how prefixes are measured.

    Returns:
        What is known of each.
    """
    states = [_State.of(answer, rollouts) for answer in answers]
    bases = tuple(answer.base for answer in answers)
    while open_ := [i for i, state in enumerate(states) if not state.over]:
        depth = min(_DEEPEST, -(-_WIDTH // len(open_)))
        blocks = {i: states[i].next_places(depth) for i in open_}
        yield from _measure(bases, states, blocks, rollouts)
        for i, places in blocks.items():
            states[i].take_in(places)
    return [state.result() for state in states]


def _measure(
    bases: tuple[Base, ...], states: list[_State], blocks: dict[int, list[int]], rollouts: Rollouts
) -> Generator[Request, Any, None]:
    """Continuations of a few prefixes of each answer, in rounds."""
    have, step = 0, min(rollouts.n, max(rollouts.limit + 1, rollouts.n // 4))
    while step > 0:
        wanted = {(i, at): states[i].answer.fork(i, at) for i, places in blocks.items() for at in places}
        wanted = {(i, at): fork for (i, at), fork in wanted.items() if states[i].wants(at)}
        if not wanted:
            return
        found: Branches = yield Branch(
            bases, tuple(wanted.values()), step, have, rollouts.sampling, rollouts.outcome, why="prefixes continued"
        )
        for (i, at), some in zip(wanted, found.continuations, strict=True):
            states[i].right[at] += sum(c.outcome == states[i].answer.right for c in some)
            states[i].drawn[at] += len(some)
        have += step
        step = min(have, rollouts.n - have)


@dataclass
class _State:
    """Where the scan of one answer stands. Counts lie at the prefixes that are measured, not at those that share."""

    answer: WrongAnswer
    rollouts: Rollouts
    scan: BackwardScan
    waiting: list[int]  # prefixes that are measured, the last first
    right: np.ndarray
    drawn: np.ndarray
    known: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, answer: WrongAnswer, rollouts: Rollouts) -> _State:
        n = len(answer.stands)
        counts = np.zeros(n, dtype=np.int64)
        state = cls(answer, rollouts, BackwardScan(rollouts.limit), [], counts, counts.copy())
        measured = sorted(set(answer.stands.tolist()), reverse=True)
        state.take_in([at for at in measured if at >= answer.finished])
        state.waiting = [at for at in measured if at < answer.finished]
        return state

    @property
    def over(self) -> bool:
        return not self.waiting or (self.scan.done and not self.rollouts.whole)

    def next_places(self, depth: int) -> list[int]:
        return self.waiting[:depth]

    def alive(self, at: int) -> bool:
        return bool(self.right[at] > self.rollouts.limit)

    def wants(self, at: int) -> bool:
        """Whether a prefix needs more continuations; not before a later one is known to be alive."""
        later = any(self.alive(other) for other in self.waiting if other > at)
        return not self.alive(at) and (self.rollouts.whole or not later)

    def take_in(self, places: list[int]) -> None:
        """Let the scan see prefixes that were measured, up to the first that is alive; the others wait on."""
        for i, at in enumerate(places):
            self.scan.see(int(self.answer.stands.searchsorted(at)), int(self.right[at]))
            self.known.append(at)
            if self.alive(at) and not self.rollouts.whole:
                dropped = places[i + 1 :]
                self.right[dropped] = self.drawn[dropped] = 0  # not all were drawn
                break
        self.waiting = [at for at in self.waiting if at not in self.known]

    def result(self) -> Scanned:
        stands = self.answer.stands
        known = np.isin(stands, self.known)
        how = np.where(stands == np.arange(len(stands)), DRAWN, SHARED)
        how = np.where(np.arange(len(stands)) >= self.answer.finished, FINISHED, how)
        right, drawn = np.where(known, self.right[stands], 0), np.where(known, self.drawn[stands], 0)
        return Scanned(self.scan.critical, right, drawn, np.where(known, how, NOT_MEASURED))
