"""What the weights of a model say of each token: norms, indicators of being under-trained, and neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from probekit.core import InputError, VocabularyTable, VocabularyWeights

from .token_categories import OK
from .undertrained import indicators, reference_set, unit

_LEAST = 1e-12  # norm of a row that has a direction


@dataclass(frozen=True)
class Placed:
    """A number, and where it lies in the vocabulary.

    Args:
        value: the number.
        percentile: per cent of the ordinary tokens whose number is at most this one.
    """

    value: float
    percentile: float


@dataclass(frozen=True)
class Neighbour:
    """A token whose unembedding row points the same way.

    Args:
        token: its id.
        shown: what it shows as.
        cosine: of the two rows.
    """

    token: int
    shown: str
    cosine: float


@dataclass(frozen=True)
class TokenRows:
    """What the weights say of every token, worked out once. Build it with `of`.

    Args:
        values: norms and indicators by name; axis vocab.
        ordinary: which tokens percentiles are taken among.
        rows: unembedding; axes vocab, d_model. None for a model that shows no weights.
        norms: of these rows.
        exists: which ids have a token.
        reference: what indicators measure the distance from, in words; "" without any.
    """

    values: Mapping[str, np.ndarray]
    ordinary: np.ndarray
    rows: np.ndarray | None
    norms: np.ndarray
    exists: np.ndarray
    reference: str

    @classmethod
    def of(cls, weights: VocabularyWeights | None, table: VocabularyTable, kinds: np.ndarray) -> TokenRows:
        """From the weights and what becomes of each token's text.

        Args:
            weights: rows of embedding and unembedding; None for a model that shows none.
            table: every id, decoded and encoded again.
            kinds: category of each id.
        """
        exists = np.array([bool(p) for p in table.pieces])
        if weights is None:
            return cls({}, kinds == OK, None, np.empty(0), exists, "")
        norms = np.linalg.norm(weights.unembedding, axis=1)
        values = {} if weights.tied else {"embedding norm": np.linalg.norm(weights.embedding, axis=1)}
        values["row norm" if weights.tied else "unembedding norm"] = norms
        try:
            reference = reference_set(table, kinds, weights.unembedding)
        except InputError:
            return cls(values, kinds == OK, weights.unembedding, norms, exists, "")
        found = {n: v for n, v in indicators(weights, reference).items() if n != "input norm"}  # shown as a norm
        about = f"{len(reference.ids)} {reference.why}"
        return cls(values | found, kinds == OK, weights.unembedding, norms, exists, about)

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take."""
        return sum(v.nbytes for v in self.values.values()) + (0 if self.rows is None else self.rows.nbytes)

    def placed(self, token: int) -> dict[str, Placed]:
        """Each number of a token beside those of the ordinary tokens; NaN per cent where there are none."""
        some = {name: (float(v[token]), v[self.ordinary]) for name, v in self.values.items()}
        return {
            n: Placed(v, float(100 * (all_ <= v).mean()) if all_.size else float("nan"))
            for n, (v, all_) in some.items()
        }

    def neighbours(self, token: int, table: VocabularyTable, n: int) -> tuple[Neighbour, ...]:
        """The tokens whose rows have the largest cosine with a token's, largest first.

        Args:
            token: an id.
            table: what ids show as.
            n: how many.
        """
        if self.rows is None:
            return ()
        norms = np.maximum(self.norms, _LEAST)
        cosine = np.where(self.exists, self.rows @ unit(self.rows[token]).astype(np.float32) / norms, -np.inf)
        cosine[token] = -np.inf
        order = [int(i) for i in np.argsort(-cosine, kind="stable")[:n] if np.isfinite(cosine[i])]
        return tuple(Neighbour(i, table.shown[i], float(cosine[i])) for i in order)
