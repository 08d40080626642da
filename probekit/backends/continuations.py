"""The part of writing continuations that is the same whoever computes the next token's distribution."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from probekit.core import Branch, Continuation, Fork, Sampling
from probekit.core.branching import Stopped

LOOK_EVERY = 4  # tokens between two looks at whether a drawn answer is there; greedy ones are few, and looked at always
Done = Callable[[Fork, Continuation], None]
There = Mapping[Fork, frozenset[int]]  # numbers of the continuations that need not be written again


@dataclass
class Job:
    """One continuation on its way.

    Args:
        fork: where it left its base.
        sample: its number.
        draws: numbers in [0, 1), one for each token that it may draw.
        ids: its tokens so far.
        logprobs: their log-probabilities.
    """

    fork: Fork
    sample: int
    draws: np.ndarray
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Writing:
    """Jobs of a request, and when each of them is over.

    Args:
        request: what is wanted.
        done: is told each continuation.
        ends: ids after which nothing follows.
        decode: from token ids to text, special tokens left out.
        there: continuations that are left out.
    """

    def __init__(
        self,
        request: Branch,
        done: Done,
        *,
        ends: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        there: There | None = None,
    ) -> None:
        self.request, self._done, self._ends, self._decode = request, done, ends, decode
        self._there = there or {}
        self._every = 1 if request.sampling.temperature == 0 else LOOK_EVERY

    @property
    def n_jobs(self) -> int:
        """How many continuations are to be written."""
        return sum(self.request.n - len(self._there.get(fork, ())) for fork in self.request.forks)

    def jobs(self) -> Iterator[Job]:
        """Every continuation that is to be written, fork by fork."""
        request = self.request
        for fork in request.forks:
            prefix, there = _digest(request.bases[fork.base].ids[: fork.position]), self._there.get(fork, frozenset())
            for sample in range(request.first, request.first + request.n):
                if sample in there:
                    continue
                yield Job(fork, sample, _draws(request.sampling, prefix, fork, sample))

    def goes_on(self, job: Job, token: int, logprob: float) -> bool:
        """Add a token to a job; whether there is more to write. If not, its continuation is handed over."""
        job.ids.append(token)
        job.logprobs.append(logprob)
        n, outcome = len(job.ids), self.request.outcome
        stopped: Stopped | None = None
        if token in self._ends:
            stopped = "end"
        elif n >= self.request.sampling.max_tokens:
            stopped = "length"
        elif outcome is not None and n % self._every == 0 and outcome.settled(self._answer(job)):
            stopped = "answer"
        if stopped is None:
            return True
        read = None if outcome is None else outcome.read(self._answer(job))
        self._done(job.fork, Continuation(job.sample, tuple(job.ids), tuple(job.logprobs), read, stopped))
        return False

    def _answer(self, job: Job) -> str:
        base = self.request.bases[job.fork.base]
        return self._decode([*base.ids[base.n_prompt : job.fork.position], *job.ids])


def _digest(ids: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:8], "little")


def _draws(sampling: Sampling, prefix: int, fork: Fork, sample: int) -> np.ndarray:
    """Numbers in [0, 1), one per token, of one continuation; more tokens extend them."""
    forced = -1 if fork.token is None else fork.token
    source = np.random.SeedSequence([sampling.seed, prefix, fork.position, forced + 1, sample])
    return np.random.Generator(np.random.PCG64(source)).random(sampling.max_tokens)
