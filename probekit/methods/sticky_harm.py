"""What tokens do to finding and grouping sentences by topic when they are put into them."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit.core import Embed, Request, VocabularyTable

from .sentences import built_in
from .sticky import Insertions
from .sticky_choice import BENIGN_TRIED, STICKY_TRIED, spread

NEAREST = 4  # as many other sentences a topic has
_STARTS, _SHUFFLES = 10, 100


@dataclass(frozen=True)
class Harm:
    """Sixty sentences of twelve topics, with tokens put into them.

    Args:
        by_sentence: of a sentence's four nearest, the share of its topic, when only the sentence itself is changed;
            axes kind (no token, benign, sticky) and sentence. The mean over tokens.
        retrieval: the same of each token, the mean over sentences; axis vocab, NaN for tokens that were not tried.
        clustering: v-measure of the topics that k-means finds, when all sentences are changed by one token; axis vocab,
            NaN for tokens that were not tried.
        without: v-measure without tokens.
        chance: the same with the clusters shuffled, the mean.
        kind: 1 for benign, 2 for sticky tokens that were tried, 0 for others; axis vocab.
    """

    by_sentence: np.ndarray
    retrieval: np.ndarray
    clustering: np.ndarray
    without: float
    chance: float
    kind: np.ndarray

    def dataset(self) -> xr.Dataset:
        """The measures of sticky-tokens that follow."""
        return xr.Dataset(
            {
                "tried": ("vocab", self.kind),
                "retrieval": ("vocab", self.retrieval),
                "retrieval_without": ((), self.by_sentence[0].mean()),
                "retrieval_by_sentence": (("case", "text"), self.by_sentence),
                "clustering": ("vocab", self.clustering),
                "clustering_without": ((), self.without),
                "clustering_chance": ((), self.chance),
            }
        )


def topic_harm(
    tokens: tuple[np.ndarray, np.ndarray], table: VocabularyTable, insertions: Insertions
) -> Generator[Request, Any, Harm]:
    """Whether sentences still lie by those of their topic when tokens are put into them, at random places.

    Args:
        tokens: benign and sticky tokens; at least one of each.
        table: what their text is.
        insertions: how often.
    """
    sentences, topics = built_in()
    changed = [insertions.of(table.decoded[int(t)], s)[-1] for some in tokens for t in some for s in sentences]
    rows = (yield Embed((*sentences, *changed), cut=True, why="topics")).values
    clean, sets = rows[: len(sentences)], rows[len(sentences) :].reshape(-1, len(sentences), rows.shape[1])
    topic, tried = np.array(topics), np.concatenate(tokens)
    near = np.array([nearest_of_topic(s, clean, topic, NEAREST) for s in sets])
    kind = np.zeros(len(table), dtype=np.int64)
    for number, some in zip((BENIGN_TRIED, STICKY_TRIED), tokens, strict=True):
        kind[some] = number
    found = [near[kind[tried] == number].mean(axis=0) for number in (BENIGN_TRIED, STICKY_TRIED)]
    grouped = clusters(clean, len(set(topics)))
    rng = np.random.default_rng(0)
    return Harm(
        np.array([nearest_of_topic(clean, clean, topic, NEAREST), *found]),
        spread(near.mean(axis=1), tried, len(table)),
        spread(np.array([v_measure(topics, clusters(s, len(set(topics)))) for s in sets]), tried, len(table)),
        v_measure(topics, grouped),
        float(np.mean([v_measure(topics, rng.permutation(grouped)) for _ in range(_SHUFFLES)])),
        kind,
    )


def nearest_of_topic(queries: np.ndarray, collection: np.ndarray, topic: np.ndarray, k: int = NEAREST) -> np.ndarray:
    """Share of each row's k nearest that are of its topic, its own place left out; axis row.

    Args:
        queries: unit rows.
        collection: unit rows of the same texts.
        topic: of each row.
        k: neighbours that count.
    """
    near = queries @ collection.T
    np.fill_diagonal(near, -np.inf)
    nearest = np.argsort(-near, axis=1, kind="stable")[:, :k]
    return np.asarray((topic[nearest] == topic[:, None]).mean(axis=1))


def clusters(rows: np.ndarray, n: int) -> np.ndarray:
    """The cluster of each row by k-means: n clusters, the best of ten starts, a fixed seed.

    Args:
        rows: embeddings.
        n: clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters: all texts are one
        return np.asarray(KMeans(n, n_init=_STARTS, random_state=0).fit_predict(rows.astype(np.float64)))


def v_measure(topics: Sequence[str], found: np.ndarray) -> float:
    """Harmonic mean of homogeneity and completeness, 0 to 1 (Rosenberg and Hirschberg 2007); not corrected for chance.

    Args:
        topics: of each row.
        found: cluster of each row.
    """
    from sklearn.metrics import v_measure_score

    return float(v_measure_score(topics, found))


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """Mean of a minus mean of b with Welch's 95 % interval; None for the interval where a side has one value only.

    Args:
        a: one number per unit.
        b: one number per unit, other units.
    """
    from scipy.stats import t

    value = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return value, None
    parts = np.array([np.var(x, ddof=1) / len(x) for x in (a, b)])
    if not parts.sum():
        return value, (value, value)
    free = parts.sum() ** 2 / (parts**2 / (np.array([len(a), len(b)]) - 1)).sum()
    half = float(t.ppf(0.975, free) * np.sqrt(parts.sum()))
    return value, (value - half, value + half)
