"""Continuations from shared prefixes, as data: what to write on from, how to draw, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from .errors import InputError

Stopped = Literal["end", "answer", "length"]


@runtime_checkable
class Outcome(Protocol):
    """What a written answer says, in one of a few categories; see `probekit.sampling`."""

    @property
    def key(self) -> str:
        """A short unique spelling; outcomes with equal keys read the same."""
        ...

    def read(self, text: str) -> str | None:
        """The category of an answer; None if it says nothing yet."""
        ...

    def settled(self, text: str) -> bool:
        """Whether more text could not change what the answer says, so that writing may stop."""
        ...


@dataclass(frozen=True)
class Base:
    """A prompt with an answer, from whose tokens branches leave.

    Args:
        ids: token ids of both.
        n_prompt: how many of them are the prompt.
    """

    ids: tuple[int, ...]
    n_prompt: int

    def __post_init__(self) -> None:
        if not 1 <= self.n_prompt <= len(self.ids):
            raise InputError(f"A base of {len(self.ids)} tokens has a prompt of 1 to that many; found {self.n_prompt}.")


@dataclass(frozen=True, order=True)
class Fork:
    """Where branches leave a base: its tokens before `position` are kept.

    Args:
        base: index of the base.
        position: 1 to the number of the base's tokens.
        token: id that is put there; None draws one like all that follow.
    """

    base: int
    position: int
    token: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_tokens: tokens of a continuation at most, the one at the fork included.
        temperature: 0 takes the most probable token; otherwise tokens are drawn from softmax(logits / temperature).
        top_p: tokens are drawn from the smallest set of the likeliest ones that holds this much probability.
        seed: of the draws. A continuation's draws depend on this, on its base up to the fork, on the fork and on its
            own number, not on what runs beside it: more samples extend earlier ones.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise InputError(
                f"Found max_tokens={self.max_tokens}, temperature={self.temperature}, top_p={self.top_p}; expected at "
                "least 1 token, a finite temperature of 0 or more, and a share of probability above 0 and up to 1."
            )

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"{self.max_tokens} tokens, T={self.temperature:g}, top_p={self.top_p:g}, seed={self.seed}"


@dataclass(frozen=True)
class Branch:
    """Continuations from every fork, each with the same numbers of samples.

    Args:
        bases: prompts with their answers.
        forks: where to write on.
        n: continuations per fork.
        first: number of the first one; samples 8 to 15 extend 0 to 7.
        sampling: how tokens are drawn.
        outcome: what is read off each answer (the base's answer up to the fork, and the continuation); writing stops
            where more text could not change it. None reads nothing.
        model: the role of the model this goes to.
        why: what it is for, in a few words.
    """

    bases: tuple[Base, ...]
    forks: tuple[Fork, ...]
    n: int = 1
    first: int = 0
    sampling: Sampling = Sampling()
    outcome: Outcome | None = None
    model: str = "model"
    why: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.bases or not self.forks or self.n < 1 or self.first < 0:
            raise InputError(
                f"A branch request needs bases, forks and samples; found {len(self.bases)} bases, {len(self.forks)} "
                f"forks, n={self.n}, first={self.first}."
            )
        if len(set(self.forks)) != len(self.forks):
            raise InputError("A branch request names a fork twice; ask for more samples of it instead.")
        for fork in self.forks:
            if not 0 <= fork.base < len(self.bases):
                raise InputError(f"{fork} leaves base {fork.base}; there are {len(self.bases)}.")
            base = self.bases[fork.base]
            if not base.n_prompt <= fork.position <= len(base.ids):
                raise InputError(
                    f"{fork} leaves its base at token {fork.position}; its answer goes from {base.n_prompt} to "
                    f"{len(base.ids)} (its end)."
                )

    @property
    def pass_key(self) -> tuple[object, ...]:
        """Requests with the same key bring back the same."""
        key = None if self.outcome is None else self.outcome.key
        return self.model, self.bases, self.forks, self.n, self.first, self.sampling, key

    def fork_key(self, fork: Fork) -> str:
        """What fixes the continuations from a fork, but for the model and their numbers."""
        base = self.bases[fork.base]
        parts = (
            base.ids[: fork.position],
            base.n_prompt,
            fork.token,
            self.sampling.key,
            self.outcome and self.outcome.key,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Continuation:
    """One way a text could have gone on.

    Args:
        sample: its number among those of its fork.
        ids: token ids from the fork on, the token there included, an end token too.
        logprobs_nats: log-probability of each at temperature 1 and without any cut; the forced one's too.
        outcome: what the answer says; None if nothing, or if nothing was to be read.
        stopped: at an end token, once the answer was there, or for want of room.
    """

    sample: int
    ids: tuple[int, ...]
    logprobs_nats: tuple[float, ...]
    outcome: str | None
    stopped: Stopped


@dataclass(frozen=True)
class Branches:
    """What a `Branch` request brought back.

    Args:
        request: what was asked for.
        continuations: for each of its forks, in order of their numbers.
    """

    request: Branch
    continuations: tuple[tuple[Continuation, ...], ...]

    def of(self, fork: Fork) -> tuple[Continuation, ...]:
        """The continuations from one fork."""
        return self.continuations[self.request.forks.index(fork)]

    def outcomes(self, fork: Fork) -> list[str | None]:
        """What their answers say."""
        return [c.outcome for c in self.of(fork)]


def joined(parts: Sequence[Branches]) -> Branches:
    """Several draws from the same forks as one; the samples lie end to end.

    Raises:
        InputError: they are of different forks, or the numbers of their samples do not follow one another.
    """
    first = parts[0].request
    end = first.first
    for part in parts:
        if (part.request.bases, part.request.forks) != (first.bases, first.forks) or part.request.first != end:
            raise InputError("Draws can be joined if they are of the same forks and their numbers follow one another.")
        end += part.request.n
    whole = Branch(
        first.bases, first.forks, end - first.first, first.first, first.sampling, first.outcome, first.model, first.why
    )
    return Branches(whole, tuple(tuple(c for p in parts for c in p.continuations[i]) for i in range(len(first.forks))))
