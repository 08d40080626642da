"""Which tokens are scored for stickiness, which are validated, and which are put into sentences of known topics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probekit.core import InputError, VocabularyTable

from .sticky import Insertions
from .token_categories import SPECIAL

CANDIDATE, RANDOM, NAMED = 1, 2, 3
BENIGN_TRIED, STICKY_TRIED = 1, 2  # put into sentences of known topics
STRONGEST, _IN_GROUPS = 5, 30


@dataclass(frozen=True)
class Sizes:
    """How many tokens are validated, as what.

    Args:
        n_candidates: of the largest scores; 0 for a share of those scored.
        share: that share.
        n_random: random usable tokens.
    """

    n_candidates: int
    share: float
    n_random: int


def systematic_sample(table: VocabularyTable, kinds: np.ndarray, usable: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Every k-th usable token in an order by script (ASCII first), length and id, from a random start; all specials.

    Args:
        table: what the tokens are.
        kinds: their categories.
        usable: ids to choose from.
        n: tokens wanted; all if 0.
        seed: of the start.

    Raises:
        InputError: hardly any token is usable.
    """
    if len(usable) < 8:
        raise InputError(f"The vocabulary has {len(usable)} usable tokens; expected at least 8.")
    if not n or n >= len(usable):
        return usable
    order = sorted(usable, key=lambda i: (not table.decoded[i].isascii(), len(table.decoded[i]), i))
    step = len(order) / n
    first = np.random.default_rng(seed).uniform(0, step)
    chosen = {int(order[int(first + i * step)]) for i in range(n)}
    return np.array(sorted(chosen | {int(i) for i in usable if kinds[i] == SPECIAL}))


def to_validate(
    score: np.ndarray, usable: np.ndarray, named: Sequence[int], sizes: Sizes, *, seed: int = 0
) -> np.ndarray:
    """1 for candidates, 2 for random tokens, 3 for named ones that are no candidates, 0 for others; axis vocab.

    Args:
        score: of each token, NaN where not scored.
        usable: ids that random tokens are drawn from.
        named: ids that are validated whatever their score.
        sizes: how many of each.
        seed: of the draw.

    Raises:
        InputError: no scored token is left to be no candidate.
    """
    known = np.flatnonzero(np.isfinite(score))
    asked = np.zeros(len(score), dtype=np.int64)
    asked[list(named)] = NAMED
    if sizes.n_candidates:
        best = known[np.argsort(-score[known], kind="stable")][: sizes.n_candidates]
    else:
        best = known[score[known] >= np.quantile(score[known], 1 - sizes.share)]
    if len(best) == len(known):
        raise InputError("Every scored token is a candidate; score more tokens (n_scored), or validate fewer.")
    asked[best] = CANDIDATE
    others = usable[asked[usable] == 0]
    asked[np.random.default_rng([seed, 1]).permutation(others)[: sizes.n_random]] = RANDOM
    return asked


def tested(asked: np.ndarray) -> np.ndarray:
    """Whether a token is a candidate or named; axis vocab."""
    return np.asarray((asked == CANDIDATE) | (asked == NAMED))


def strongest(p: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The candidates of largest p, at most five."""
    candidates = np.flatnonzero(asked == CANDIDATE)
    return candidates[np.argsort(-p[candidates], kind="stable")][:STRONGEST]


def benign(score: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
    """Five tokens drawn from the twenty lowest scores (the paper draws from four times as many as it takes)."""
    known = np.flatnonzero(np.isfinite(score) & (asked != CANDIDATE))
    lowest = known[np.argsort(score[known], kind="stable")][: 4 * STRONGEST]
    return np.random.default_rng([seed, 2]).permutation(lowest)[:STRONGEST]


def ordinary(usable: np.ndarray, asked: np.ndarray, others: np.ndarray, seed: int) -> np.ndarray:
    """Up to thirty usable tokens, drawn at random, that are no candidates, not named, and none of the others."""
    free = usable[~tested(asked)[usable] & ~np.isin(usable, others)]
    return np.random.default_rng([seed, 3]).permutation(free)[:_IN_GROUPS]


def insertions_of(counts: str, seed: int) -> Insertions:
    """Copies and places as a user gives them.

    Raises:
        InputError: the numbers of copies are no ascending list.
    """
    found = _whole_numbers(counts, "counts", "numbers of copies")
    if not found or sorted(set(found)) != found or found[0] < 1:
        raise InputError(f"counts holds ascending numbers of copies, such as 1,2,4,8; found {counts!r}.")
    return Insertions(tuple(found), seed)


def named_ids(tokens: str, n_vocab: int) -> list[int]:
    """Token ids as a user gives them.

    Raises:
        InputError: they are no ids of the vocabulary.
    """
    named = _whole_numbers(tokens, "tokens", "ids")
    if not all(0 <= i < n_vocab for i in named):
        raise InputError(f"tokens holds ids from 0 to {n_vocab - 1}; found {tokens!r}.")
    return named


def _whole_numbers(text: str, name: str, what: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        raise InputError(f"{name} holds {what} separated by commas; found {text!r}.") from None


def spread(values: np.ndarray, tokens: np.ndarray, n: int) -> np.ndarray:
    """Values of some tokens over a vocabulary of n, NaN elsewhere."""
    found = np.full(n, np.nan)
    found[tokens] = values
    return found
