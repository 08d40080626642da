"""Conversations about continuations: the base answers, and as many samples as an interval needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

from probekit.core import Base, Batch, Branch, Branches, Continuation, Fork, Outcome, Request, Sampling
from probekit.stats import wilson

Draws = dict[Fork, tuple[Continuation, ...]]


def base_answers(
    batch: Batch, max_tokens: int, outcome: Outcome | None = None
) -> Generator[Request, Any, tuple[list[Base], list[Continuation]]]:
    """The likeliest answer to each prompt, token by token; to be used with `yield from`.

    Args:
        batch: the prompts.
        max_tokens: longest answer.
        outcome: what is read off it; answers end where more text could not change it.

    Returns:
        Each prompt with its answer, and the answer as a continuation (whose `outcome` is what it says).
    """
    prompts = tuple(Base(text.ids, len(text)) for text in batch)
    forks = tuple(Fork(i, len(p.ids)) for i, p in enumerate(prompts))
    greedy = Sampling(max_tokens, temperature=0.0)
    found: Branches = yield Branch(prompts, forks, sampling=greedy, outcome=outcome, why="greedy answers")
    answers = [some[0] for some in found.continuations]
    return [Base((*p.ids, *a.ids), p.n_prompt) for p, a in zip(prompts, answers, strict=True)], answers


def sampled_until(request: Branch, *, most: int, width: float) -> Generator[Request, Any, Draws]:
    """Continuations of every fork until what the commonest outcome's share is known well enough; for `yield from`.

    Each round doubles the samples of the forks whose share is not known yet. Samples are numbered, so a later run with
    a narrower width extends this one. Stopping on what was seen biases a share slightly towards 0 or 1 (an interval
    narrows there); where that matters, set `most` to `request.n`.

    Args:
        request: bases, forks, and how many samples the first round draws.
        most: samples per fork at most.
        width: half-width of the 95 % Wilson interval at which a fork has enough.

    Returns:
        All continuations of each fork, in order of their numbers.
    """
    draws: Draws = dict.fromkeys(request.forks, ())
    active, have, step = list(request.forks), request.first, min(request.n, most)
    while active and step > 0:
        found: Branches = yield Branch(
            request.bases, tuple(active), step, have, request.sampling, request.outcome, request.model, request.why
        )
        for fork, some in zip(active, found.continuations, strict=True):
            draws[fork] += some
        have += step
        step = min(have - request.first, most - (have - request.first))
        active = [f for f in active if half_width([c.outcome for c in draws[f]]) > width]
    return draws


def half_width(outcomes: Sequence[str | None]) -> float:
    """Half the 95 % Wilson interval of the commonest outcome's share; 1 where there is none."""
    if not outcomes:
        return 1.0
    _, count = Counter(outcomes).most_common(1)[0]
    low, high = wilson(count, len(outcomes))
    return (high - low) / 2
