"""Mining: a walk through the embeddings, along the gradient of the entropy, to tokens that a model cannot repeat.

arXiv 2410.15052, as in its released code, with two walks beside it that do without the gradient.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.core import Capture, Forward, NextTokenEntropy, Request, Trace, VocabularyTable
from probekit.reduce import AtPosition, Keep

from .glitch import repetition
from .repeating import FAMILIES, Prompts, prompts

LAST = Capture("logits", AtPosition(-1))
EMBED = Capture("embed", Keep())
_PIECE = 64  # prompts that are read in one pass
_TRIALS = 3  # examples in the strict check's prompt of repetition


@dataclass(frozen=True)
class Budget:
    """How long, and how wide, to search.

    Args:
        iterations: steps of a walk; the released examples have 50 and 125.
        near: nearest tokens among which a step chooses; released: 32.
        tried: tokens that a step evaluates; released: 8.
        seed: of what the two other searches draw.
    """

    iterations: int
    near: int = 32
    tried: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Mined:
    """Where three searches went, and what they saw; axis vocab.

    Args:
        mined: iteration in which the walk along the gradient evaluated a token, 0 for the start; NaN if it did not.
        walked: the same of the walk that draws among the nearest tokens.
        drawn: the same of tokens drawn from all, as many in each iteration; NaN if not drawn.
        estimated: entropy that the gradient promised, where the first walk evaluated; NaN elsewhere.
        entropy: of the next-token distribution after the prompt, in nats; NaN for tokens that no search evaluated.
        wrote: id of the likeliest token there; -1 where no search looked.
    """

    mined: np.ndarray
    walked: np.ndarray
    drawn: np.ndarray
    estimated: np.ndarray
    entropy: np.ndarray
    wrote: np.ndarray

    @staticmethod
    def nothing(n_vocab: int) -> Mined:
        """Nowhere, yet."""
        mined, walked, drawn, estimated, entropy = np.full((5, n_vocab), np.nan)
        return Mined(mined, walked, drawn, estimated, entropy, np.full(n_vocab, -1))

    @property
    def called(self) -> np.ndarray:
        """Ids of the evaluated tokens in whose place the model would write another."""
        return np.flatnonzero((self.wrote >= 0) & (self.wrote != np.arange(len(self.wrote))))


def directions(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, in float32; zero rows stay zero."""
    wide = rows.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.float32(1e-12))


def nearest(units: np.ndarray, current: int, left: np.ndarray, k: int) -> np.ndarray:
    """The `k` tokens, of those that are left, whose rows of length 1 lie nearest (L2), nearest first; ties by id."""
    ids = np.flatnonzero(left)
    ids = ids[ids != current]
    return ids[np.argsort(-(units[ids] @ units[current]), kind="stable")[:k]]


def promised(rows: np.ndarray, current: int, ids: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """By how much the entropy would grow, to first order, if another token stood there: (e_i - e) · dH/dx, float64."""
    return (rows[ids].astype(np.float64) - rows[current]) @ slope.astype(np.float64)


def mine(prompt: Prompts, rows: np.ndarray, valid: np.ndarray, how: Budget) -> Generator[Request, Trace, Mined]:
    """Walk to where the model is unsure what to write; to be used with `yield from`.

    The walk begins at the valid token with the shortest row. H is the entropy of what follows the prompt, in which the
    model is asked to repeat the token and its answer is begun; g = dH/dx, where x is the embedding at the token's place
    (summed over its places, if the prompt holds it more than once). Of the `near` tokens nearest to the current one
    (L2 of rows of length 1), the `tried` with the largest H + (e_i - e) · g are evaluated; none is evaluated twice,
    and the one of highest entropy comes next. (The released code takes distances and differences from the unembedding,
    though g belongs to the embedding, which agrees only where both are tied; here both are the embedding's. It does not
    evaluate the start, and takes the gradient at the token's first place.)

    Beside it, with as many evaluations: a walk of the same rules that draws the tokens to evaluate from the nearest,
    and tokens drawn from all valid ones.

    Args:
        prompt: of one family.
        rows: the input embedding; axes vocab, d_model.
        valid: tokens that may be visited; axis vocab.
        how: how long, and how wide.
    """
    seen, units = Mined.nothing(len(rows)), directions(rows)
    ids, rng = np.flatnonzero(valid), np.random.default_rng(how.seed)
    if not (ids.size and how.iterations):
        return seen
    start = int(ids[np.linalg.norm(rows[ids].astype(np.float64), axis=1).argmin()])
    drawn = rng.permutation(ids)[: 1 + how.iterations * how.tried]
    seen.drawn[drawn] = -(-np.arange(len(drawn)) // how.tried)
    yield from _look(prompt, [start], seen)
    seen.mined[start] = seen.walked[start] = 0
    guided = blind = start
    for i in range(1, how.iterations + 1):
        left = valid & np.isnan(seen.mined)
        if not left.any():
            break
        slope = yield from _slope(prompt, guided)
        close = nearest(units, guided, left, how.near)
        gain = promised(rows, guided, close, slope)
        best = np.argsort(-gain, kind="stable")[: how.tried]
        chosen = close[best]
        others = rng.permutation(nearest(units, blind, valid & np.isnan(seen.walked), how.near))[: how.tried]
        yield from _look(prompt, [*chosen.tolist(), *others.tolist()], seen)
        seen.mined[chosen], seen.walked[others] = i, i
        seen.estimated[chosen] = seen.entropy[guided] + gain[best]
        guided, blind = (int(some[seen.entropy[some].argmax()]) for some in (chosen, others))
    yield from _look(prompt, drawn.tolist(), seen)
    return seen


def _slope(prompt: Prompts, token: int) -> Generator[Request, Trace, np.ndarray]:
    """The gradient of the entropy with respect to the token's embedding, summed over its places; axis d_model."""
    (ids,) = prompt.of(token)
    (places,) = prompt.places
    trace = yield Forward((EMBED,), inputs=(ids,), gradient_of=NextTokenEntropy(), why="slopes of the entropy")
    slope: np.ndarray = trace[EMBED]["value"].values[list(places)].astype(np.float64).sum(axis=0)
    return slope


def _look(prompt: Prompts, tokens: Sequence[int], seen: Mined) -> Generator[Request, Trace, None]:
    """Entropy, and what would be written, after the prompt about each token that was not seen yet."""
    new = [t for t in dict.fromkeys(tokens) if seen.wrote[t] < 0]
    for a in range(0, len(new), _PIECE):
        some = new[a : a + _PIECE]
        inputs = tuple(ids for token in some for ids in prompt.of(token))
        trace = yield Forward((LAST,), inputs=inputs, why="entropy where a token should be repeated")
        logits = trace[LAST]["value"].values.astype(np.float64)
        seen.entropy[some], seen.wrote[some] = entropy_nats(logits), logits.argmax(axis=-1)


def entropy_nats(logits: np.ndarray) -> np.ndarray:
    """Entropy of the softmax over the last axis, in nats, float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    p = np.exp(wide)
    mass = p.sum(axis=-1)
    entropy: np.ndarray = np.log(mass) - (p * wide).sum(axis=-1) / mass
    return entropy


def never_written(made: Prompts, tokens: Sequence[int]) -> Generator[Request, Trace, np.ndarray]:
    """Whether each token is the likeliest after none of its prompts; to be used with `yield from`.

    The shortest prompt comes first, and each is put only about tokens that failed the ones before it.

    Returns:
        Booleans, axis token.
    """
    failed = np.ones(len(tokens), dtype=bool)
    for family in sorted(range(len(made.ids)), key=lambda i: len(made.ids[i])):
        asked = np.flatnonzero(failed)
        for a in range(0, len(asked), _PIECE):
            some = asked[a : a + _PIECE]
            inputs = tuple(made.of(tokens[i])[family] for i in some)
            trace = yield Forward((LAST,), inputs=inputs, why="whether mined tokens fail in other prompts, too")
            failed[some] = trace[LAST]["value"].values.argmax(axis=-1) != np.array([tokens[i] for i in some])
    return failed


def searched(
    table: VocabularyTable, kinds: np.ndarray, rows: np.ndarray, valid: np.ndarray, how: Budget
) -> Generator[Request, Any, dict[str, np.ndarray]]:
    """Three searches and the strict check of what they called; to be used with `yield from`.

    Args:
        table: the vocabulary.
        kinds: `token_categories.categories` of it.
        rows: the input embedding; axes vocab, d_model.
        valid: tokens that may be visited; axis vocab.
        how: how long, and how wide; nothing is asked where no step is made.

    Returns:
        The variables of `Mined` under the names of a result, and `strict`: 1 for tokens that are the likeliest after no
        prompt of the strict check either, 0 for others that were called, NaN elsewhere; axis vocab.
    """
    seen, strict = Mined.nothing(len(table)), np.full(len(table), np.nan)
    if how.iterations:
        prompt = yield from repetition(table, kinds)
        seen = yield from mine(prompt, rows, valid, how)
        called = seen.called
        if called.size:
            made = yield from prompts(table, kinds, _TRIALS)
            strict[called] = yield from never_written(made, called.tolist())
    where = {"mined": seen.mined, "walked": seen.walked, "drawn": seen.drawn}
    saw = {"entropy_nats": seen.entropy, "estimated_nats": seen.estimated, "wrote": seen.wrote}
    return where | saw | {"strict": strict}


def mining_passes(how: Budget) -> int:
    """Passes that the searches and the strict check take at most."""
    if not how.iterations:
        return 0
    most = 1 + how.iterations * how.tried
    step = 1 + -(-2 * how.tried // _PIECE)
    return 1 - (-most // _PIECE) + how.iterations * step + len(FAMILIES) * -(-3 * most // _PIECE)
