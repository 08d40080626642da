"""How far the rows of tokens lie from those of tokens that were never trained (arXiv 2405.05417)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from probekit.core import InputError, VocabularyTable, VocabularyWeights

from .token_categories import UNREACHABLE_MULTI, UNREACHABLE_SINGLE, UNUSED, looks_special, unused_bytes

_UNREACHABLE = (UNREACHABLE_SINGLE, UNREACHABLE_MULTI)
LEAST = 3  # ids that a reference has at least
ALIKE, SAME = 0.9, 0.98  # cosines from which rows are alike, and the same point
NEIGHBOURS = 8  # rows of a near-duplicate cluster that each of its members has at least
INDICATORS = ("cosine", "centred cosine", "cosine without first component", "distance", "input norm", "bias")


@dataclass(frozen=True)
class ReferenceSet:
    """Tokens that are known, or look, never to have been trained.

    Args:
        ids: their ids.
        why: what makes them so, in words.
        spread: median cosine of their unembedding rows with their mean; near 1 if they lie at one point.
    """

    ids: np.ndarray
    why: str
    spread: float


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, in float64; zero rows stay zero."""
    wide = rows.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)


def reference_set(table: VocabularyTable, kinds: np.ndarray, rows: np.ndarray) -> ReferenceSet:
    """The first of these that gives at least three tokens.

    Bytes that UTF-8 never uses; ids without a token; tokens that no text can bring about; tokens in brackets, of which
    only the largest group that is mutually alike (cosine above 0.9 with one of them) is kept; the densest cluster of
    near-duplicates (rows with at least 8 others at a cosine above 0.98). The paper uses the first kind or ids that were
    looked up for each model; the others are for tokenizers without any.

    Args:
        table: the vocabulary.
        kinds: `token_categories.categories` of it.
        rows: unembedding; axes vocab, d_model.

    Raises:
        InputError: nothing of the kind; ids must then be given.
    """
    bracketed = np.array([i for i, text in enumerate(table.decoded) if looks_special(text)], dtype=np.int64)
    tries: tuple[tuple[Callable[[], np.ndarray], str], ...] = (
        (lambda: unused_bytes(table), "bytes that UTF-8 never uses"),
        (lambda: np.flatnonzero(kinds == UNUSED), "ids without a token"),
        (lambda: np.flatnonzero(np.isin(kinds, _UNREACHABLE)), "tokens that no text brings about"),
        (lambda: _alike(bracketed, rows), "tokens in brackets whose rows are alike"),
        (lambda: _cluster(rows), "the densest cluster of near-duplicate rows"),
    )
    for find, why in tries:
        ids = find()
        if len(ids) >= LEAST:
            return described(ids, rows, why)
    raise InputError(
        "No token of this vocabulary is known to be untrained: no byte outside UTF-8, no id without a token, no "
        "unreachable token, no group of alike tokens in brackets, no cluster of near-duplicate rows. Give ids of tokens "
        "that the training data cannot hold as `reference`."
    )


def described(ids: np.ndarray, rows: np.ndarray, why: str) -> ReferenceSet:
    """A reference set of given ids."""
    some = unit(rows[ids])
    return ReferenceSet(np.asarray(ids, dtype=np.int64), why, float(np.median(some @ unit(some.mean(axis=0)))))


def _alike(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The largest group of ids whose rows have a cosine above 0.9 with one of them."""
    if not len(ids):
        return ids
    some = unit(rows[ids])
    close = some @ some.T > ALIKE
    return ids[close[int(close.sum(axis=1).argmax())]]


def _cluster(rows: np.ndarray, block: int = 2048) -> np.ndarray:
    """Rows with at least 8 others at a cosine above 0.98, around the one that has most."""
    some = unit(rows).astype(np.float32)
    counts = np.concatenate([(some[a : a + block] @ some.T > SAME).sum(axis=1) for a in range(0, len(some), block)]) - 1
    if counts.max() < NEIGHBOURS:
        return np.array([], dtype=np.int64)
    return np.flatnonzero(some @ some[int(counts.argmax())] > SAME)


def indicators(weights: VocabularyWeights, reference: ReferenceSet) -> dict[str, np.ndarray]:
    """What each id's rows say of its training; small values are suspicious.

    With mu the mean of the reference's unembedding rows: 1 - cos(row, mu); the same after the mean of all rows was
    taken from both; the same after the first principal component (of the centred rows) was projected out of the
    uncentred ones; the distance of row and mu; where embeddings are untied, the norm of the embedding row; where there
    is one, the bias (its difference from the reference's mean).

    Returns:
        By name (`INDICATORS`), float64 arrays on the axis vocab.
    """
    rows = weights.unembedding.astype(np.float64)
    mean = rows.mean(axis=0)
    first = np.linalg.eigh(np.cov((rows - mean).T))[1][:, -1]
    mu = rows[reference.ids].mean(axis=0)
    found = {
        "cosine": _from(rows, mu),
        "centred cosine": _from(rows - mean, mu - mean),
        "cosine without first component": _from(rows - np.outer(rows @ first, first), mu - (mu @ first) * first),
        "distance": np.linalg.norm(rows - mu, axis=1),
    }
    if not weights.tied:
        found["input norm"] = np.linalg.norm(weights.embedding.astype(np.float64), axis=1)
    if weights.bias is not None and np.ptp(weights.bias) > 0:
        found["bias"] = np.abs(weights.bias - weights.bias[reference.ids].mean()).astype(np.float64)
    return found


def _from(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    return 1 - unit(rows) @ unit(target)
