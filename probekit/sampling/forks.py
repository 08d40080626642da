"""What outcomes say of a text's forks: distributions, drift, survival and change points (arXiv 2412.07961).

Everything is computed from draws alone, so that released ones can be analysed as well as fresh ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from probekit.core import InputError

Distance = Literal["l1", "l2", "cosine", "kl", "js"]
OTHER = "other"
_LEAST = 1e-4  # probabilities are not less than this in KL, as released
_LN2 = float(np.log(2.0))


@dataclass(frozen=True)
class Alternative:
    """One token that could stand at a position, and what came of it.

    Args:
        token: its id.
        prob: its probability there.
        outcomes: what each continuation says; None for nothing.
    """

    token: int
    prob: float
    outcomes: tuple[str | None, ...]


@dataclass(frozen=True)
class Position:
    """A place of an answer with the tokens that could stand there.

    Args:
        index: place in the answer, counted from 0.
        alternatives: the token of the answer itself first.
    """

    index: int
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class ForkMap:
    """Outcome distributions along an answer.

    `o[t, w]` is the share of each category among the continuations after token w at position t, and
    `o_t = sum_w p(w) o[t, w]` with the probabilities of the tokens that were tried divided by their sum (section 3).
    A category counts as itself if its share of `o_t` exceeds `least` somewhere, at most `most` of them, by their
    largest share; the rest, and answers that say nothing, are "other". (The released code also weighs continuations
    by their length-normalised probability, and overwrites the result; plain shares are unbiased.)

    Args:
        positions: in order.
        least: share from which a category counts.
        most: categories that count at most.
    """

    positions: tuple[Position, ...]
    least: float = 0.1
    most: int = 6

    def __post_init__(self) -> None:
        if not self.positions or not all(
            p.alternatives and all(a.outcomes for a in p.alternatives) for p in self.positions
        ):
            raise InputError("A map of forks needs positions, tokens at each of them, and continuations of each token.")

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The outcomes that count, commonest first, and "other" if there are more."""
        names = sorted({o for p in self.positions for a in p.alternatives for o in a.outcomes if o is not None})
        shares = np.stack([self._mixed(p, names) for p in self.positions])  # position, category and what is none
        largest = shares[:, :-1].max(axis=0) if names else np.zeros(0)
        order = sorted(range(len(names)), key=lambda i: (-shares[:, i].mean(), names[i]))
        kept = sorted((i for i in order if largest[i] > self.least), key=lambda i: -largest[i])[: self.most]
        chosen = [names[i] for i in order if i in kept]
        rest = len(chosen) < len(names) or shares[:, -1].any()
        return (*chosen, OTHER) if rest or not chosen else tuple(chosen)

    def _mixed(self, position: Position, names: Sequence[str]) -> np.ndarray:
        return _weights(position) @ np.stack([_shares(a, names) for a in position.alternatives])

    def branch(self, position: Position) -> np.ndarray:
        """o[t, w] of each alternative; axes alternative, category."""
        named = [c for c in self.categories if c != OTHER]
        shares = np.stack([_shares(a, named) for a in position.alternatives])
        return shares if OTHER in self.categories else shares[:, : len(named)]

    @cached_property
    def distributions(self) -> np.ndarray:
        """o_t; axes position, category."""
        return np.stack([_weights(p) @ self.branch(p) for p in self.positions])

    def drift(self, kind: Distance = "l2") -> np.ndarray:
        """Distance of o_t from o_0; axis position."""
        o = self.distributions
        return np.array([distance(o[0], row, kind) for row in o])

    def forked(self, epsilon: float = 0.6, kind: Distance = "l2") -> list[np.ndarray]:
        """For each position, which of its alternatives lead elsewhere than the answer's own token: by `epsilon` or more.

        Outcome distributions are compared as they are, whatever their tokens' probabilities. (The released code
        compares p(w) o[t, w], so that two tokens with the same outcomes and different probabilities look forked.)
        """
        found = []
        for position in self.positions:
            o = self.branch(position)
            found.append(np.array([False, *(distance(o[0], row, kind) >= epsilon - 1e-12 for row in o[1:])]))
        return found

    def hazard(self, epsilon: float = 0.6, kind: Distance = "l2") -> np.ndarray:
        """Probability of leaving the answer's course at each position: that of the forked tokens; axis position."""
        forked = zip(self.positions, self.forked(epsilon, kind), strict=True)
        return np.array([float(_weights(p)[f].sum()) for p, f in forked])

    def survival(self, epsilon: float = 0.6, kind: Distance = "l2") -> np.ndarray:
        """Probability that no fork was taken up to and with each position, the product of 1 - hazard; axis position."""
        return np.cumprod(1 - self.hazard(epsilon, kind))

    def counts(self) -> np.ndarray:
        """Draws per category, weighed by the probability of their tokens, that o_t rests on; axes position, category.

        They add up to the effective number of draws of the mixture, 1 / sum of squared weights per draw.
        """
        found = []
        for position, row in zip(self.positions, self.distributions, strict=True):
            each = [w * w / len(a.outcomes) for w, a in zip(_weights(position), position.alternatives, strict=True)]
            found.append(row / sum(each))
        return np.stack(found)

    def course(self) -> np.ndarray:
        """`counts`, and in one more row the draws after the answer's own token at the last position.

        That row says what lies ahead once the last of the tokens that were tried has been written. (It shares draws with
        the row before, of which they are a part; where nothing changes, both are alike all the more.)
        """
        last = self.positions[-1]
        own = self.branch(last)[0] * len(last.alternatives[0].outcomes)
        return np.vstack([self.counts(), own])


def distance(a: np.ndarray, b: np.ndarray, kind: Distance) -> float:
    """How far two distributions are apart.

    Args:
        a: probabilities of the categories.
        b: as many.
        kind: "l1" and "l2" norms of the difference, "cosine" (1 - cosine), "kl" (of b from a, in nats, probabilities
            not less than 1e-4), or "js" (Jensen-Shannon divergence in nats).
    """
    if kind == "l1":
        return float(np.abs(a - b).sum())
    if kind == "l2":
        return float(np.sqrt(((a - b) ** 2).sum()))
    if kind == "cosine":
        return float(1 - (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    if kind == "kl":
        p, q = (np.maximum(x, _LEAST) for x in (a, b))
        return float((p * np.log(p / q)).sum())
    middle = (a + b) / 2
    return float(min(sum(_relative(x, middle) for x in (a, b)) / 2, _LN2))


def _relative(p: np.ndarray, q: np.ndarray) -> float:
    known = p > 0
    return float((p[known] * np.log(p[known] / q[known])).sum())


def _weights(position: Position) -> np.ndarray:
    probs = np.array([a.prob for a in position.alternatives], dtype=float)
    return probs / probs.sum()


def _shares(alternative: Alternative, names: Sequence[str]) -> np.ndarray:
    """Share of each name among the outcomes, and of everything else at the end."""
    n = len(alternative.outcomes)
    counts = [sum(o == name for o in alternative.outcomes) for name in names]
    return np.array([*counts, n - sum(counts)], dtype=float) / n
