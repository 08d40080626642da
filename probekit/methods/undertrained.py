"""How far the rows of tokens lie from those of tokens that were never trained (arXiv 2405.05417)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def reference_from(given: str, table: VocabularyTable, kinds: np.ndarray, rows: np.ndarray) -> ReferenceSet:
    """The reference of given ids, separated by commas; `reference_set` if none are given.

    Raises:
        InputError: it is no list of ids of this vocabulary, or no reference can be found.
    """
    if not given.strip():
        return reference_set(table, kinds, rows)
    try:
        ids = np.array([int(x) for x in given.split(",")])
    except ValueError:
        raise InputError(f"reference holds ids separated by commas, such as 5,7,8; found {given!r}.") from None
    if not ((ids >= 0) & (ids < len(table))).all():
        raise InputError(f"reference holds ids from 0 to {len(table) - 1}; found {given!r}.")
    return described(np.unique(ids), rows, "given ids")


def chosen(indicator: str, values: Mapping[str, np.ndarray]) -> str:
    """The indicator of this name; "auto" is the input norm where embeddings are untied, and else the cosine.

    Raises:
        InputError: the model has no such indicator.
    """
    if indicator == "auto":
        return "input norm" if "input norm" in values else "cosine"
    if indicator not in values:
        raise InputError(
            f"This model has no indicator {indicator!r}: its embeddings are "
            f"{'untied' if 'input norm' in values else 'tied'}. It has {', '.join(values)}."
        )
    return indicator


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
    rows = weights.unembedding
    mu = rows[reference.ids].astype(np.float64).mean(axis=0)
    mean, first = _mean_and_first(rows)
    names = INDICATORS[:4]
    parts: list[tuple[np.ndarray, ...]] = []
    for block in _blocks(rows):
        parts.append(
            (
                _from(block, mu),
                _from(block - mean, mu - mean),
                _from(block - np.outer(block @ first, first), mu - (mu @ first) * first),
                np.linalg.norm(block - mu, axis=1),
            )
        )
    found = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
    if not weights.tied:
        found["input norm"] = np.concatenate([np.linalg.norm(b, axis=1) for b in _blocks(weights.embedding)])
    if weights.bias is not None and np.ptp(weights.bias) > 0:
        found["bias"] = np.abs(weights.bias - weights.bias[reference.ids].mean()).astype(np.float64)
    return found


def _blocks(rows: np.ndarray, size: int = 8192) -> Iterator[np.ndarray]:
    """Rows in float64, a block at a time: large vocabularies are not held twice."""
    return (rows[a : a + size].astype(np.float64) for a in range(0, len(rows), size))


def _mean_and_first(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean row, and the first principal component of the centred rows."""
    mean = sum((b.sum(axis=0) for b in _blocks(rows)), np.zeros(rows.shape[1])) / len(rows)
    spread = sum(((b - mean).T @ (b - mean) for b in _blocks(rows)), np.zeros((rows.shape[1],) * 2))
    return mean, np.linalg.eigh(spread)[1][:, -1]


def _from(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    return 1 - unit(rows) @ unit(target)
