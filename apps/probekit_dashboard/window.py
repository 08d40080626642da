"""Which columns of a long token axis a page shows: those around the selection, or all of them, several in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probekit import plots

WIDEST = 160  # columns of a heat map over tokens


@dataclass(frozen=True)
class Columns:
    """Tokens in columns.

    Args:
        edges: first token of every column, and the end of the last one.
    """

    edges: np.ndarray

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def whole(self) -> bool:
        """Whether some column holds several tokens."""
        return bool((np.diff(self.edges) > 1).any())

    def largest(self, values: np.ndarray) -> np.ndarray:
        """The largest value of each column; the last axis is the token. NaN where all are NaN."""
        filled = np.where(np.isnan(values), -np.inf, values)[..., : self.edges[-1]]
        found = np.maximum.reduceat(filled, self.edges[:-1], axis=-1)
        return np.where(np.isneginf(found), np.nan, found)

    def column_of(self, token: int) -> int:
        """The column that holds a token; the nearest one if none does."""
        return int(np.clip(np.searchsorted(self.edges, token, side="right") - 1, 0, len(self) - 1))

    def token_at(self, column: int, values: np.ndarray) -> int:
        """The token of a column that has the largest value; axis token."""
        first, stop = self.edges[column : column + 2]
        some = np.where(np.isnan(values[first:stop]), -np.inf, values[first:stop])
        return int(first + some.argmax())

    def labels(self, tokens: Sequence[str]) -> list[str]:
        """What each column is called: its token, or the first and last place of its tokens."""
        pairs = zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), strict=True)
        return [plots.visible(tokens[a]) if b - a == 1 else f"{a}–{b - 1}" for a, b in pairs]

    def hovers(self, tokens: Sequence[str]) -> list[str]:
        """The same with places, and more of the text."""
        found = []
        for a, b in zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), strict=True):
            said = plots.visible("".join(tokens[a:b]))[:60]
            found.append(f"{a} {said}" if b - a == 1 else f"{a} to {b - 1}, the largest of them: {said}")
        return found


def around(token: int, n: int, most: int = WIDEST) -> Columns:
    """The tokens around a selected one, one in a column.

    Args:
        token: the selected one.
        n: tokens of the text.
        most: columns at most.
    """
    first = min(max(0, token - most // 2), max(0, n - most))
    return Columns(np.arange(first, min(n, first + most) + 1))


def whole(n: int, most: int = WIDEST) -> Columns:
    """The whole text; of more tokens than columns, several in one.

    Args:
        n: tokens of the text.
        most: columns at most.
    """
    return Columns(np.unique(np.linspace(0, n, min(n, most) + 1).round().astype(int)))
