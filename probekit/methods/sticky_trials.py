"""Conversations about sticky tokens: what the vocabulary, pairs of sentences and inserted tokens embed as.

Each function is a generator of requests, to be used with `yield from`. Requests come in parts of a few thousand texts,
so that a journal keeps what is done, and memory holds the embeddings of one part.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from probekit.core import Batch, Compared, Embed, InputError, Request, Similarities, Tokenize, VocabularyTable

from .sentences import built_in
from .sticky import PLACES, Insertions, even_pairs, hit_share, token_score
from .token_categories import OK, SPECIAL

Conversation = Generator[Request, Any, Any]
FIRST, SECOND = "sentence1", "sentence2"  # the domains that mark the two sides of given pairs
_PART = 4096  # texts of one request
_MOST_SENTENCES = 2000


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences; the second of each is the one that tokens are put into.

    Args:
        first: the sentence that stays.
        second: the sentence that is changed.
        cosine: their similarity as they are; axis pair.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    cosine: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """Both sentences of each pair."""
        return tuple(zip(self.first, self.second, strict=True))

    def take(self, places: np.ndarray) -> Pairs:
        """Some of the pairs, in the order of `places`; one may be taken twice."""
        chosen = [int(i) for i in places]
        return Pairs(tuple(self.first[i] for i in chosen), tuple(self.second[i] for i in chosen), self.cosine[chosen])


@dataclass(frozen=True)
class Trials:
    """What became of pairs when tokens were put in.

    Args:
        cosine: axes token, pair, place, count.
        own: cosine of the first sentence with the token alone; axes token, pair. Empty where not asked for.
        survival: share of the inserted copies that are the token after tokenising; axis token.
        added: tokens that one copy adds to a text; axis token.
        n_cut: texts that were cut because the model does not read so many tokens.
    """

    cosine: np.ndarray
    own: np.ndarray
    survival: np.ndarray
    added: np.ndarray
    n_cut: int


def usable_tokens(table: VocabularyTable, kinds: np.ndarray) -> np.ndarray:
    """Ids whose text encodes to them again and is more than white space."""
    fitting = np.isin(kinds, (OK, SPECIAL))
    return np.array([i for i in np.flatnonzero(fitting) if table.decoded[i].strip()], dtype=np.int64)


def vocabulary_similarity(table: VocabularyTable) -> Conversation:
    """u: mean cosine over all pairs of the vocabulary's spellings, each embedded as a text, with itself included.

    Ids without a token are left out.
    """
    pieces = [p for p in table.pieces if p]
    total, n = np.zeros(0), len(pieces)
    for start in range(0, n, _PART):
        part = tuple(pieces[start : start + _PART])
        found = yield Embed(part, cut=True, total=n, why="vocabulary")
        some = found.values.astype(np.float64).sum(axis=0)
        total = some if not total.size else total + some
    return float(total @ total) / n**2


def pairs_of(batch: Batch) -> Conversation:
    """The pairs that a run's texts give.

    Texts of the domains sentence1 and sentence2 go two by two; texts without such domains make all pairs there are, and
    so do the built-in sentences where there are no texts.

    Raises:
        InputError: the two sides differ in number, or the texts are too few or too many to make pairs of.
    """
    sides = set(batch.domains)
    if sides == {FIRST, SECOND}:
        first = [t.text for t in batch if t.domain == FIRST]
        second = [t.text for t in batch if t.domain == SECOND]
        if len(first) != len(second):
            raise InputError(f"Pairs need as many first as second sentences; found {len(first)} and {len(second)}.")
        sentences = list(dict.fromkeys([*first, *second]))
        place = {s: i for i, s in enumerate(sentences)}
        left, right = [place[s] for s in first], [place[s] for s in second]
    else:
        sentences = list(dict.fromkeys(t.text for t in batch)) or list(built_in()[0])
        if not 3 <= len(sentences) <= _MOST_SENTENCES:
            raise InputError(
                f"Pairs are made of 3 to {_MOST_SENTENCES:,} sentences; found {len(sentences):,}. Or give pairs: a "
                f".csv file with the columns {FIRST} and {SECOND}, or texts={{'{FIRST}': […], '{SECOND}': […]}}."
            )
        left, right = (list(side) for side in zip(*combinations(range(len(sentences)), 2), strict=True))
    rows = (yield Embed(tuple(sentences), cut=True, why="sentences")).values
    cosine = np.einsum("pd,pd->p", rows[left], rows[right])
    return Pairs(tuple(sentences[i] for i in left), tuple(sentences[i] for i in right), cosine)


def below_and_above(pairs: Pairs, u: float, sizes: tuple[int, int, int]) -> tuple[Pairs, Pairs, Pairs]:
    """Pairs to score on and to validate on, both below u, and pairs above u.

    Args:
        pairs: to choose from.
        u: mean similarity of the vocabulary.
        sizes: how many of each.

    Raises:
        InputError: no pair is less similar than u.
    """
    scoring, validation, above = (even_pairs(pairs.cosine, u, n, above=i == 2) for i, n in enumerate(sizes))
    if not validation.size:
        raise InputError(
            f"No two sentences are less similar than tokens are on average (cosine {u:.3f}); the lowest similarity is "
            f"{pairs.cosine.min():.3f}. Give sentences about more different things."
        )
    return pairs.take(scoring), pairs.take(validation), pairs.take(above)


def inserted(
    tokens: np.ndarray,
    table: VocabularyTable,
    pairs: Pairs,
    insertions: Insertions,
    *,
    own: bool = False,
    why: str = "",
) -> Conversation:
    """What each token does to each pair: `Trials`.

    Args:
        tokens: ids.
        table: what their text is.
        pairs: what they are put into.
        insertions: how often and where.
        own: whether the token alone is compared with the first sentences, too.
        why: what it is for.
    """
    n_counts = len(insertions.counts)
    each = len(PLACES) * n_counts + own
    size = max(1, _PART // (each * max(1, len(pairs))))
    anchors = {s: i for i, s in enumerate(dict.fromkeys(pairs.first))}
    base = (yield Tokenize(pairs.second, special=True)) if len(pairs) else ()
    found, survival, added, n_cut = [], [], [], 0
    for start in range(0, len(tokens) if len(pairs) else 0, size):
        part = [int(t) for t in tokens[start : start + size]]
        texts: list[str] = []
        for token in part:
            word = table.decoded[token]
            for second in pairs.second:
                texts += [*([word] if own else []), *insertions.of(word, second)]
        to = tuple(anchors[first] for _ in part for first in pairs.first for _ in range(each))
        watched = tuple(token for token in part for _ in range(len(pairs) * each))
        total = len(tokens) * len(pairs) * each
        said: Compared = yield Similarities(tuple(texts), tuple(anchors), to, watched, total=total, why=why)
        shape = (len(part), len(pairs), each)
        found.append(said.cosine.reshape(shape))
        had = np.array([[ids.count(token) for ids in base] for token in part])[:, :, None]
        counts = np.tile(insertions.counts, len(PLACES))
        kept = (said.count.reshape(shape)[..., own:] - had) / counts
        survival.append(np.clip(kept, 0, 1).mean(axis=(1, 2)))
        before = np.array([len(ids) for ids in base])[None, :, None]
        added.append(((said.tokens.reshape(shape)[..., own:] - before) / counts).mean(axis=(1, 2)))
        n_cut += said.n_cut
    if not found:
        none = np.full(len(tokens), np.nan)
        return Trials(np.empty((len(tokens), 0, len(PLACES), n_counts)), np.empty((len(tokens), 0)), none, none, 0)
    cosine = np.concatenate(found).astype(np.float64)
    return Trials(
        cosine[..., own:].reshape(len(tokens), len(pairs), len(PLACES), n_counts),
        cosine[..., 0] if own else np.empty((len(tokens), 0)),
        np.concatenate(survival), np.concatenate(added), n_cut,
    )  # fmt: skip


def _with_none(trials: Trials, pairs: Pairs) -> np.ndarray:
    """Cosine distances, 0 copies first; axes token, pair, place, count."""
    none = np.broadcast_to(pairs.cosine[:, None, None], (*trials.cosine.shape[:3], 1))
    return np.asarray(1 - np.concatenate([none, trials.cosine], axis=-1))


def scores(trials: Trials, pairs: Pairs) -> np.ndarray:
    """Sticky score of each token; axis token."""
    distances = _with_none(trials, pairs)
    return np.array([token_score(d, 1 - own) for d, own in zip(distances, trials.own, strict=True)])


def hit_shares(trials: Trials, pairs: Pairs, use: np.ndarray | None = None) -> np.ndarray:
    """Share of pairs brought nearer (p) by each token, over some of the pairs; NaN where there are none; axis token.

    Args:
        trials: what became of the pairs.
        pairs: the same pairs without tokens.
        use: which of them count; axis pair. All if None.
    """
    distances = _with_none(trials, pairs)
    if use is not None:
        distances = distances[:, use]
    return np.array([hit_share(d) if d.size else np.nan for d in distances])
