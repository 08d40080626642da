"""The high-entropy minority of sampled answers, the positions that are tried for forks, and all that came of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from probekit.core import Base, Batch, Capture, Fork, Trace, token_coords
from probekit.stats import MIN_TEXTS

from .fork_labels import ForkLabel, fork_label, rule, stratified
from .fork_table import likely_tokens, token_probs
from .forks import OTHER, Alternative, ForkMap, Position
from .inside import answers_only, inside_measures
from .minority import cuts, high_entropy, token_types
from .rounds import Draws

SHARES = np.round(np.arange(1, 101) / 100, 2)


def units_of(prompt: np.ndarray) -> tuple[np.ndarray, str]:
    """The unit that each answer belongs to, which intervals resample: its prompt, or itself where prompts are few.

    Args:
        prompt: number of each answer's prompt, from 0.
    """
    if len(np.unique(prompt)) >= MIN_TEXTS:
        return prompt, "prompts"
    return np.arange(len(prompt)), "answers"


@dataclass(frozen=True)
class Corpus:
    """Sampled answers to prompts, and one look at them.

    Args:
        bases: prompts with their answers.
        prompt: number of each answer's prompt, from 0.
        inside: a pass over the bases.
        at: its capture of the next-token distribution at the temperature of the draws, 20 likeliest tokens named.
    """

    bases: list[Base]
    prompt: np.ndarray
    inside: Trace
    at: Capture

    @cached_property
    def batch(self) -> Batch:
        """The answers."""
        return answers_only(self.bases, self.inside)[0]

    @cached_property
    def rows(self) -> np.ndarray:
        """Place of each token of the answers in the pass."""
        return answers_only(self.bases, self.inside)[1]

    def drawn_from(self, field: str) -> np.ndarray:
        """A field of the distribution that each token was drawn from, float64; the first axis is token."""
        return np.asarray(self.inside[self.at][field].values[self.rows - 1], dtype=float)

    @cached_property
    def entropy(self) -> np.ndarray:
        """In nats, axis token."""
        return self.drawn_from("entropy_nats")

    def plausible(self, p_min: float) -> list[tuple[int, ...]]:
        """For each token, what could have stood there: the token itself first, then the others above `p_min`."""
        ids, logprob = self.inside[self.at]["top_id"].values[self.rows - 1], self.drawn_from("top_logprob")
        rows = zip(self.batch.ids.tolist(), ids, logprob, strict=True)
        return [likely_tokens(own, some, chances, p_min) for own, some, chances in rows]

    def probs(self, place: int, tokens: tuple[int, ...]) -> list[float]:
        """Probabilities of tokens at a place, its own first."""
        return token_probs(self.inside, self.at, int(self.rows[place]) - 1, tokens)

    def fork(self, place: int, token: int) -> Fork:
        """The fork that puts a token at a place."""
        text = int(self.batch.text_of_token[place])
        return Fork(text, self.bases[text].n_prompt + int(self.batch.pos[place]), token)


@dataclass(frozen=True)
class Tried:
    """Positions that were sampled from a corpus, by what rule, and what could have stood there.

    Args:
        corpus: the answers.
        share: of all tokens that are the minority.
        tokens: for each token of the corpus, what could have stood there.
        places: positions that were sampled, among those with two such tokens or more.
        weights: how many of these each stands for.
    """

    corpus: Corpus
    share: float
    tokens: list[tuple[int, ...]]
    places: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, *, share: float, p_min: float, n: int, seed: int) -> Tried:
        """A stratified sample of `n` positions with two plausible tokens or more."""
        tokens = corpus.plausible(p_min)
        eligible = np.array([len(some) > 1 for some in tokens])
        minority = high_entropy(corpus.entropy, share)
        return cls(corpus, share, tokens, *stratified(corpus.entropy, minority, eligible, n, seed))

    @property
    def forks(self) -> tuple[Fork, ...]:
        """Every token at every position."""
        return tuple(self.corpus.fork(at, t) for at in self.places.tolist() for t in self.tokens[at])

    def maps(self, draws: Draws) -> dict[int, tuple[ForkMap, dict[int, Position]]]:
        """By answer, its map of forks, and the positions of it by place."""
        found: dict[int, dict[int, Position]] = {}
        for at in self.places.tolist():
            tokens, fork = self.tokens[at], self.corpus.fork(at, self.tokens[at][0])
            said = [tuple(c.outcome for c in draws[self.corpus.fork(at, t)]) for t in tokens]
            some = (Alternative(t, p, o) for t, p, o in zip(tokens, self.corpus.probs(at, tokens), said, strict=True))
            found.setdefault(fork.base, {})[at] = Position(fork.position, tuple(some))
        return {text: (ForkMap(tuple(places.values())), places) for text, places in found.items()}


def minority_table(tried: Tried, draws: Draws, *, epsilon: float, min_count: int) -> xr.Dataset:
    """Everything that forking-tokens measures, on a token axis that holds the answers only.

    Args:
        tried: the corpus and the positions that were sampled.
        draws: continuations of every plausible token there.
        epsilon: distance from which an alternative forks.
        min_count: occurrences from which a token type counts.
    """
    corpus = tried.corpus
    maps = tried.maps(draws)
    labels = {
        at: fork_label(forks, position, epsilon, seed=at)
        for forks, positions in maps.values()
        for at, position in positions.items()
    }
    fork = np.array([labels[at].fork for at in tried.places.tolist()], dtype=float)
    eligible = np.array([len(some) > 1 for some in tried.tokens])
    found = rule(corpus.entropy, eligible, tried.places, fork, tried.weights, SHARES)
    branches, cases = _branches(maps, labels)
    inside = inside_measures(corpus.inside, corpus.rows)
    vocab = inside["vocab_str"]["vocab"].values
    return xr.Dataset(
        {
            **inside,
            "entropy_nats": ("token", corpus.entropy),
            "probability": ("token", np.exp(corpus.drawn_from("logprob_nats"))),
            **_likeliest(corpus, inside["top_id"][1].shape[1]),
            "prompt": ("text", corpus.prompt),
            "minority": ("token", high_entropy(corpus.entropy, tried.share).astype(float)),
            "n_plausible": ("token", np.array([len(some) for some in tried.tokens], dtype=float)),
            **{name: ("token", values) for name, values in _sampled(tried, labels).items()},
            "cut_nats": ("threshold", cuts(corpus.entropy, SHARES)),
            "recall": ("threshold", found.recall),
            "chance_recall": ("threshold", found.chance),
            "precision": ("threshold", found.precision),
            **_types(corpus, vocab, min_count),
            **branches,
        },
        coords=token_coords(corpus.batch)
        | {"threshold": SHARES, "case": np.array(cases, dtype=object), "layer": np.arange(corpus.inside.info.n_layers)},
    )


def _likeliest(corpus: Corpus, n: int) -> dict[str, tuple[Any, Any]]:
    """The likeliest tokens at the temperature of the draws."""
    return {
        "top_id": (("token", "rank"), corpus.drawn_from("top_id")[:, :n].astype(np.int64)),
        "top_prob": (("token", "rank"), np.exp(corpus.drawn_from("top_logprob")[:, :n])),
    }


def _sampled(tried: Tried, labels: Mapping[int, ForkLabel]) -> dict[str, np.ndarray]:
    """Numbers of the sampled positions, NaN elsewhere (weights 0)."""
    n = tried.corpus.batch.n_tokens
    found = {name: np.full(n, np.nan) for name in ("fork", "fork_distance", "dealt_fork", "half_fork")}
    found["weight"] = np.zeros(n)
    found["weight"][tried.places] = tried.weights
    for at, label in labels.items():
        found["fork"][at] = label.fork
        found["fork_distance"][at] = label.distances.max()
        found["dealt_fork"][at] = label.dealt
        found["half_fork"][at] = np.nan if label.halved is None else label.halved
    return found


def _types(corpus: Corpus, vocab: np.ndarray, min_count: int) -> dict[str, tuple[Any, Any]]:
    """The word table along the vocabulary, NaN for types that do not count, and what types explain."""
    unit, n_unit = units_of(corpus.prompt)
    found = token_types(
        corpus.batch.ids, corpus.entropy, unit[corpus.batch.text_of_token], least=min_count, n_unit=n_unit
    )
    columns = ("n", "mean", "low", "high", "null_low", "null_high")
    table: dict[str, tuple[Any, Any]] = {f"word_{name}": (("vocab",), np.full(len(vocab), np.nan)) for name in columns}
    explained = (np.nan,) * 4
    if found is not None:
        at = np.searchsorted(vocab, found.ids)
        for name in columns:
            table[f"word_{name}"][1][at] = getattr(found, name)
        low, high = found.explained.ci95 or (np.nan, np.nan)
        explained = (found.explained.value, low, high, found.explained_null)
    names = ("type_share", "type_share_low", "type_share_high", "type_share_null")
    return table | {name: ((), value) for name, value in zip(names, explained, strict=True)}


def _branches(
    maps: Mapping[int, tuple[ForkMap, Mapping[int, Position]]], labels: Mapping[int, ForkLabel]
) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """One row per token that was tried, and the categories of outcomes."""
    cases = [*dict.fromkeys(c for forks, _ in maps.values() for c in forks.categories if c != OTHER), OTHER]
    rows: dict[str, list[Any]] = {n: [] for n in ("place", "id", "prob", "n", "distance", "share")}
    for forks, positions in maps.values():
        where = [cases.index(c) for c in forks.categories]
        for at, position in positions.items():
            shares = np.zeros((len(position.alternatives), len(cases)))
            shares[:, where] = forks.branch(position)
            for one, share, far in zip(position.alternatives, shares, labels[at].distances, strict=True):
                values = (at, one.token, one.prob, len(one.outcomes), far, share)
                for name, value in zip(rows, values, strict=True):
                    rows[name].append(value)
    kinds = {"place": np.int64, "id": np.int64, "n": np.int64}
    flat = {
        f"branch_{name}": (("branch",), np.array(values, dtype=kinds.get(name, float)))
        for name, values in rows.items()
        if name != "share"
    }
    share = np.array(rows["share"], dtype=float).reshape(len(rows["id"]), len(cases))
    return flat | {"branch_share": (("branch", "case"), share)}, cases
