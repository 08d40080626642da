"""Sampled answers to prompts, and a rough interval for whatever is computed of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from probekit.core import Base, Batch, Branch, Branches, Continuation, Fork, InputError, Request, Sampling
from probekit.stats import Estimate


def drawn_answers(
    batch: Batch, n: int, sampling: Sampling
) -> Generator[Request, Any, tuple[list[Base], list[Continuation]]]:
    """`n` sampled answers to each prompt, to their end; to be used with `yield from`.

    Args:
        batch: the prompts.
        n: answers to each.
        sampling: how they are drawn.

    Returns:
        Each prompt with each of its answers, prompt by prompt, and the answers as continuations.

    Raises:
        InputError: the temperature is 0, at which all answers to a prompt are one.
    """
    if sampling.temperature == 0:
        raise InputError("Answers are drawn here, and at temperature 0 there is one only; give a temperature above 0.")
    prompts = tuple(Base(text.ids, len(text)) for text in batch)
    forks = tuple(Fork(i, len(p.ids)) for i, p in enumerate(prompts))
    found: Branches = yield Branch(prompts, forks, n, sampling=sampling, why="sampled answers")
    pairs = [(p, one) for p, some in zip(prompts, found.continuations, strict=True) for one in some]
    return [Base((*p.ids, *one.ids), p.n_prompt) for p, one in pairs], [one for _, one in pairs]


def jackknife(statistic: Callable[[np.ndarray], float], n: int, n_unit: str) -> Estimate:
    """A statistic of units, with the 95 % interval that leaving out one unit after the other gives.

    The standard error is sqrt((n - 1) / n * sum of squared deviations of the n left-out values from their mean), the
    interval Student's t with n - 1 degrees of freedom around the statistic of all units. It suits smooth statistics
    (means, ratios, areas), not single quantiles. Values that are undefined without a unit are left out; with fewer than
    two left, the interval has no ends.

    Args:
        statistic: takes a mask of the units that count, axis unit.
        n: number of units.
        n_unit: what they are, in the plural.
    """
    from scipy.stats import t

    everything = np.ones(n, dtype=bool)
    value = statistic(everything)
    if n < 2:
        return Estimate(value, None, n, n_unit)
    without = np.array([statistic(np.arange(n) != i) for i in range(n)], dtype=float)
    without = without[np.isfinite(without)]
    if len(without) < 2:
        return Estimate(value, (-np.inf, np.inf), n, n_unit)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum() * n / len(without))
    half = float(t.ppf(0.975, n - 1)) * float(error)
    return Estimate(value, (value - half, value + half), n, n_unit)
