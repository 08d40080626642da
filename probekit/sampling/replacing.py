"""What becomes of an answer if one of its tokens is kept, and if another one is drawn in its place."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from probekit.core import Base, Branch, Branches, Fork, Outcome, Request, Sampling

Place = tuple[int, int]  # number of the answer, token of its base


def other_tokens(logits: np.ndarray, own: int, n: int, *, sampling: Sampling, base: Base) -> np.ndarray:
    """Tokens drawn in the place of one: independently, from the model's distribution without it.

    The logits are divided by the temperature, the own token's probability is set to 0 and the rest renormalised; of
    that, the nucleus is kept. More tokens extend fewer.

    Args:
        logits: of the place, float; axis vocab.
        own: id of the token that is replaced.
        n: how many to draw.
        sampling: temperature, nucleus and seed.
        base: the prompt and the answer up to the place; it fixes the draws, with the seed.

    Returns:
        Token ids.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    scaled[own] = -np.inf
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs, kind="stable")
    ranked = probs[order] / probs.sum()
    ranked = np.where(ranked.cumsum() - ranked < sampling.top_p, ranked, 0.0)
    up_to = ranked.cumsum()
    numbers = rng_of(sampling.seed, base, "tokens in the place of one").random(n) * up_to[-1]
    return order[np.minimum(np.searchsorted(up_to, numbers, side="right"), np.flatnonzero(ranked)[-1])]


def rng_of(seed: int, base: Base, what: str) -> np.random.Generator:
    """Draws that depend on a seed, on a prompt with the answer so far, and on what they are for."""
    digest = hashlib.sha256(repr((base.ids, base.n_prompt, what)).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def random_places(base: Base, n: int, allowed: np.ndarray, seed: int) -> list[int]:
    """Tokens of an answer, drawn uniformly without replacement.

    Args:
        base: prompt and answer; it fixes the draws, with the seed.
        n: how many; fewer if there are no more. More extend fewer.
        allowed: which tokens of the answer may be taken.
        seed: of the draws.

    Returns:
        Places within the answer.
    """
    order = rng_of(seed, base, "tokens to compare with").permutation(len(allowed))
    return [int(at) for at in order if allowed[at]][:n]


def kept_and_replaced(
    bases: tuple[Base, ...], drawn: Mapping[Place, np.ndarray], *, sampling: Sampling, outcome: Outcome
) -> Generator[Request, Any, dict[Place, tuple[list[str | None], list[str | None]]]]:
    """Outcomes of continuations with each token, and of one continuation with each token drawn in its place.

    All are drawn afresh: they share no draws with continuations of the same prefixes that leave after the token.

    Args:
        bases: prompts with their answers.
        drawn: for each place, the tokens drawn in the place of its own, of which there are as many everywhere; its own
            is continued that often.
        sampling: how tokens after the place are drawn; its length counts the token there.
        outcome: what is read off the answers.

    Returns:
        For each place, the outcomes with its own token, and those of the tokens drawn, in their order.
    """
    wanted: Counter[Fork] = Counter()
    n = max(len(tokens) for tokens in drawn.values())
    for (i, at), tokens in drawn.items():
        wanted[Fork(i, at, bases[i].ids[at])] = n
        wanted.update(Fork(i, at, int(token)) for token in tokens)
    found: dict[Fork, list[str | None]] = {fork: [] for fork in wanted}
    have, step = 0, 1
    while forks := tuple(fork for fork, count in wanted.items() if count > have):
        step = min(step, n - have)
        some: Branches = yield Branch(bases, forks, step, have, sampling, outcome, why="tokens kept and replaced")
        for fork, continuations in zip(forks, some.continuations, strict=True):
            found[fork] += [c.outcome for c in continuations]
        have += step
        step = have
    result = {}
    for (i, at), tokens in drawn.items():
        once: Counter[int] = Counter()
        replaced = []
        for token in map(int, tokens):
            replaced.append(found[Fork(i, at, token)][once[token]])
            once[token] += 1
        result[i, at] = (found[Fork(i, at, bases[i].ids[at])], replaced)
    return result


def pass_at_k(right: Sequence[int] | np.ndarray, n: int, k: int) -> np.ndarray:
    """Probability that at least one of k continuations, drawn without replacement from n, is right.

    Args:
        right: how many of the n are, of each place.
        n: continuations of each place.
        k: 1 to n.

    Returns:
        1 - C(n - c, k) / C(n, k), an unbiased estimate of what k independent continuations reach (Chen et al. 2021,
        arXiv 2107.03374).
    """
    return np.array([1 - comb(n - int(c), k) / comb(n, k) for c in right])
