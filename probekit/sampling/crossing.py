"""Answers that one model writes and another one takes over for single tokens.

A switching policy (arXiv 2603.22446): the next token comes from the intervening model if S(prefix) = 1, else from the
primary one. S depends on the prefix alone. Run token by token, that needs both models in lock-step. Here the primary
writes to the end, both models are read along what it wrote, the first place past the last switch at which S holds gets
a token from the intervening model, and the primary writes on from there. The answers have the same distribution:

- Up to that place, S is 0 after the last switch, so the policy would have drawn these tokens from the primary as well.
  Whether S holds at a place was told by what stands before it, so neither the tokens behind the place nor their being
  thrown away have any say in it.
- At the place, a token is drawn from the intervening model, independently of what the primary had written there.
- Behind it, the primary's fresh tokens given the new prefix follow the policy until S holds again. Where the drawn
  token is the one that the primary had put there, what the primary had written behind it has that distribution already
  and is kept.

A budget keeps that so: which places before a prefix were switched follows from the prefix, since S held at them, first
come, first served.

All answers advance together, one switch a round, so that what is written in a round shares requests. Two draws of one
run of the policy never share their random numbers: continuations of the same prefix are numbered on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from probekit.core import Base, Branch, Branches, Continuation, Fork, Outcome, Request, Sampling

Prefix = tuple[tuple[int, ...], int]  # token ids, and how many of them are the prompt


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Args:
        prompt: index of the prompt.
        number: its own among the answers to that prompt.
        ids: its tokens, an end token too.
        switched: places in the answer whose tokens the intervening model drew, in order.
    """

    prompt: int
    number: int
    ids: tuple[int, ...]
    switched: tuple[int, ...] = ()

    @property
    def next_place(self) -> int:
        """The first place past the last switch."""
        return self.switched[-1] + 1 if self.switched else 0


Where = Callable[
    [Sequence[Answer]], Generator[Request, Any, list[int | None]]
]  # the next switch of each; None for none
Read = Callable[
    [Base], Generator[Request, Any, np.ndarray]
]  # a value for each token of an answer, told by what precedes


@dataclass(frozen=True)
class Desk:
    """What answers are written to, and how.

    Args:
        prompts: their token ids.
        sampling: how tokens are drawn; `max_tokens` is the length of an answer at most.
    """

    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling

    def base(self, answer: Answer) -> Base:
        """The prompt with an answer."""
        prompt = self.prompts[answer.prompt]
        return Base((*prompt, *answer.ids), len(prompt))

    def answers(self, n: int, role: str) -> Generator[Request, Any, list[Answer]]:
        """Answers of one model alone, prompt by prompt; to be used with `yield from`.

        Two models draw with the same random numbers, so that models that are alike write alike.

        Args:
            n: answers to each prompt.
            role: of the model.
        """
        prefixes = [(prompt, len(prompt)) for prompt in self.prompts for _ in range(n)]
        found = yield from _written(prefixes, self.sampling, role, Counter())
        return [Answer(i // n, i % n, one.ids) for i, one in enumerate(found)]

    def crossed(
        self, drafts: Sequence[Answer], where: Where, *, primary: str, other: str
    ) -> Generator[Request, Any, list[Answer]]:
        """Answers of one model in which another one draws the tokens at some places; to be used with `yield from`.

        Args:
            drafts: answers of the primary model alone, each prompt's numbered from 0.
            where: a conversation that tells each answer's next switch past its last.
            primary: role of the model that writes.
            other: role of the model that intervenes.

        Returns:
            The answers in the order of the drafts; one without a switch is its draft.
        """
        answers, active = list(drafts), list(range(len(drafts)))
        used = Counter((self.prompts[a.prompt], len(self.prompts[a.prompt])) for a in drafts)
        while active:
            places = yield from where([answers[i] for i in active])
            turns = [(i, at) for i, at in zip(active, places, strict=True) if at is not None]
            if not turns:
                break
            prefixes = [self._prefix(answers[i], answers[i].ids[:at]) for i, at in turns]
            tokens = yield from _written(prefixes, replace(self.sampling, max_tokens=1), other, used)
            unfinished = []
            for (i, at), token in zip(turns, tokens, strict=True):
                old = answers[i]
                kept = token.ids[0] == old.ids[at]
                ids = old.ids if kept else (*old.ids[:at], token.ids[0])
                answers[i] = replace(old, ids=ids, switched=(*old.switched, at))
                if not kept and token.stopped != "end" and len(ids) < self.sampling.max_tokens:
                    unfinished.append(i)
            yield from self._finish(answers, unfinished, primary, used)
            active = [i for i, _ in turns]
        return answers

    def _prefix(self, answer: Answer, ids: tuple[int, ...]) -> Prefix:
        prompt = self.prompts[answer.prompt]
        return (*prompt, *ids), len(prompt)

    def _finish(
        self, answers: list[Answer], which: Sequence[int], role: str, used: Counter[Prefix]
    ) -> Generator[Request, Any, None]:
        """Let the primary model write on from where some answers were cut."""
        if not which:
            return
        rooms = [self.sampling.max_tokens - len(answers[i].ids) for i in which]
        prefixes = [self._prefix(answers[i], answers[i].ids) for i in which]
        rests = yield from _written(prefixes, replace(self.sampling, max_tokens=max(rooms)), role, used)
        for i, room, rest in zip(which, rooms, rests, strict=True):
            answers[i] = replace(answers[i], ids=(*answers[i].ids, *rest.ids[:room]))

    def said(self, answers: Sequence[Answer], outcome: Outcome) -> Generator[Request, Any, list[str | None]]:
        """What answers say; to be used with `yield from`. A model is asked to put their last tokens, and reads them."""
        bases = [self.base(a) for a in answers]
        distinct = list(dict.fromkeys(bases))
        forks = tuple(Fork(i, len(b.ids) - 1, b.ids[-1]) for i, b in enumerate(distinct))
        greedy = Sampling(1, temperature=0.0)
        found: Branches = yield Branch(
            tuple(distinct), forks, sampling=greedy, outcome=outcome, why="what the answers say"
        )
        read = {base: some[0].outcome for base, some in zip(distinct, found.continuations, strict=True)}
        return [read[base] for base in bases]


def _written(
    prefixes: Sequence[Prefix], sampling: Sampling, role: str, used: Counter[Prefix]
) -> Generator[Request, Any, list[Continuation]]:
    """One continuation of each prefix; equal ones get different numbers, also over several calls."""
    rows: dict[Prefix, list[int]] = {}
    for i, prefix in enumerate(prefixes):
        rows.setdefault(prefix, []).append(i)
    groups: dict[tuple[int, int], list[Prefix]] = {}
    for prefix, some in rows.items():
        groups.setdefault((used[prefix], len(some)), []).append(prefix)
        used[prefix] += len(some)
    found: list[Continuation | None] = [None] * len(prefixes)
    for (first, n), alike in groups.items():
        bases = tuple(Base(*prefix) for prefix in alike)
        forks = tuple(Fork(i, len(base.ids)) for i, base in enumerate(bases))
        branches: Branches = yield Branch(bases, forks, n, first, sampling, None, role, "answers are written")
        for prefix, drawn in zip(alike, branches.continuations, strict=True):
            for i, one in zip(rows[prefix], drawn, strict=True):
                found[i] = one
    return [one for one in found if one is not None]


def by_rule(desk: Desk, read: Read, *, above: float, budget: int) -> Where:
    """Switch wherever a value exceeds a threshold, until the budget is spent.

    Args:
        desk: what the answers are written to.
        read: a conversation that tells the value of each place of an answer, from what precedes it alone.
        above: the threshold.
        budget: switches of an answer at most.
    """

    def where(answers: Sequence[Answer]) -> Generator[Request, Any, list[int | None]]:
        places: list[int | None] = []
        for answer in answers:
            if len(answer.switched) >= budget or answer.next_place >= len(answer.ids):
                places.append(None)
                continue
            values = yield from read(desk.base(answer))
            fires = np.flatnonzero(values[answer.next_place :] > above)
            places.append(answer.next_place + int(fires[0]) if fires.size else None)
        return places

    return where


def at_random(desk: Desk, counts: dict[tuple[int, int], int]) -> Where:
    """Switch at random places, as often as another run did: its control at matched budget.

    With k switches left, k of the places past the last switch are drawn without replacement, every set alike, and the
    first of them is next. The places are those of the answer as it stands: so every switch that is wanted finds one,
    unless the rest of an answer is shorter than what is left of its budget. (Places drawn ahead of the text would often
    lie past its end.) Which of the tokens stand there has no part in it.

    Args:
        desk: what the answers are written to.
        counts: switches of each answer, by prompt and number.
    """

    def where(answers: Sequence[Answer]) -> Generator[Request, Any, list[int | None]]:
        yield from ()  # nobody has to be asked
        places: list[int | None] = []
        for answer in answers:
            left = counts[answer.prompt, answer.number] - len(answer.switched)
            room = len(answer.ids) - answer.next_place
            if left <= 0 or room <= 0:
                places.append(None)
                continue
            rng = _generator(desk, answer)
            places.append(answer.next_place + int(rng.choice(room, min(left, room), replace=False).min()))
        return places

    return where


def _generator(desk: Desk, answer: Answer) -> np.random.Generator:
    """Random numbers of an answer's next switch, whatever runs beside it."""
    digest = hashlib.sha256(repr(desk.prompts[answer.prompt]).encode()).digest()
    words = [desk.sampling.seed, int.from_bytes(digest[:8], "little"), answer.number, len(answer.switched)]
    return np.random.default_rng(np.random.SeedSequence(words))
