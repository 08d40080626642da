"""Levels of sink-like tokens: in which layers tokens share the direction of a text's primary sink (arXiv 2512.22213)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

NOISE, SECONDARY, PRIMARY_LIKE = 1, 2, 3
FEWEST = 2  # layers of a window, and of a secondary sink
REFERENCES = (-1, -3, -5)  # ordinary tokens that take the primary's place in the null

Window = tuple[int, int]  # first layer, and the one after the last


@dataclass(frozen=True)
class Labels:
    """What a lifetime is called, as a share of its window.

    Args:
        primary_like: share from which a token is primary-like.
        least: share below which it is noise.
    """

    primary_like: float = 0.6
    least: float = 0.1


@dataclass(frozen=True)
class Levels:
    """Every token's level in one window; axis token.

    Args:
        created: first layer of the window in which it is sink-like; -1 without any.
        lifetime: number of such layers.
        kind: 0 never sink-like, else NOISE, SECONDARY or PRIMARY_LIKE.
    """

    created: np.ndarray
    lifetime: np.ndarray
    kind: np.ndarray

    @classmethod
    def of(cls, hit: np.ndarray, window: Window, labels: Labels) -> Levels:
        """The levels that follow from where tokens are sink-like.

        Primary-like: a lifetime of `labels.primary_like` of the window or more. Secondary: below that, of
        `labels.least` or more and two layers or more, and begun after the window's first layer. Noise: the rest.

        Args:
            hit: whether a token is sink-like; axes layer, token.
            window: only layers inside it count.
            labels: the bounds.
        """
        start, end = window
        lifetime = hit[start:end].sum(axis=0)
        created = np.where(lifetime > 0, start + hit[start:end].argmax(axis=0), -1)
        share = lifetime / (end - start)
        long = (lifetime > 0) & (share >= labels.primary_like)
        secondary = ~long & (share >= labels.least) & (lifetime >= FEWEST) & (created > start)
        kind = np.where(long, PRIMARY_LIKE, np.where(secondary, SECONDARY, np.where(lifetime > 0, NOISE, 0)))
        return cls(created, lifetime, kind)


@dataclass(frozen=True)
class Streams:
    """One text's residual streams, as far as sink levels need them.

    Args:
        cosine: magnitude of the cosine with the primary; axes layer, token.
        others: the same with each ordinary token of the null; axes reference, layer, token.
        norm: axes layer, token.
        ids: token ids.
        primary: position of the primary.
        stands_out: multiple of the median norm that the primary exceeds inside a window.
    """

    cosine: np.ndarray
    others: np.ndarray
    norm: np.ndarray
    ids: np.ndarray
    primary: int
    stands_out: float

    @property
    def median(self) -> np.ndarray:
        """Median norm over the tokens that are not the primary; axis layer."""
        return np.median(np.delete(self.norm, self.primary, axis=1), axis=1)

    @property
    def windows(self) -> list[Window]:
        """Maximal runs of at least two layers in which the primary's norm stands out."""
        return runs(self.norm[:, self.primary] > self.stands_out * self.median)

    @property
    def published(self) -> Window:
        """The published window of the primary's norm."""
        return published_window(self.norm[:, self.primary])

    def hits(self, cosine: float) -> np.ndarray:
        """Which tokens after the primary exceed the cosine, strictly; axes layer, token."""
        return (self.cosine > cosine) & self._later

    @property
    def _later(self) -> np.ndarray:
        return np.arange(self.norm.shape[1]) > self.primary

    def counts(self, windows: Sequence[Window], cosine: float, labels: Labels) -> np.ndarray:
        """Tokens that are secondary and primary-like, counted in each window, with the primary and in the null.

        In the null an ordinary token takes the primary's place, over tokens after the primary that do not repeat it (a
        repeat is parallel for being the same token), scaled to as many; the mean over the ordinary tokens.

        Returns:
            Axes (primary, null), (secondary, primary-like).
        """
        null = []
        for place, other in zip(REFERENCES, self.others, strict=True):
            rest = self._later & (self.ids != self.ids[place])
            scale = self._later.sum() / max(1, rest.sum())
            null.append(_count((other > cosine) & rest, windows, labels) * scale)
        return np.stack([_count(self.hits(cosine), windows, labels), np.mean(null, axis=0)])


@dataclass(frozen=True)
class Carrier:
    """A token that is sink-like in a window: its place on the token and text axes, its window and its level."""

    token: int
    row: int
    window: Window
    created: int
    lifetime: int
    kind: int

    @property
    def share(self) -> float:
        """Lifetime as a share of the window."""
        return self.lifetime / (self.window[1] - self.window[0])


@dataclass(frozen=True)
class Table:
    """Windows and levels of several texts, as arrays; the last case is the published window.

    Args:
        data: `start` and `end` (case, text), -1 where a text has fewer windows; `created`, `lifetime` and `kind` (case,
            token); `primary_pos` (text); coordinates `pos` and `token_id`.
    """

    data: xr.Dataset

    @cached_property
    def rows(self) -> np.ndarray:
        """Place on the text axis of each token."""
        return np.cumsum(self.data["pos"].values == 0) - 1

    @cached_property
    def after_primary(self) -> np.ndarray:
        """Tokens after their text's primary."""
        return self.data["pos"].values > self.data["primary_pos"].values[self.rows]

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Tokens after the primary that are sink-like in no window."""
        return self.after_primary & (self.data["kind"].values[:-1] == 0).all(axis=0)

    @cached_property
    def carriers(self) -> list[Carrier]:
        """Every token that is sink-like in a window (not the published one), by window and place."""
        arrays = (self.data[name].values for name in ("start", "end", "created", "lifetime", "kind"))
        start, end, created, lifetime, kind = arrays
        found = []
        for case, token in np.argwhere(kind[:-1] > 0).tolist():
            row = int(self.rows[token])
            window = int(start[case, row]), int(end[case, row])
            level = int(created[case, token]), int(lifetime[case, token]), int(kind[case, token])
            found.append(Carrier(token, row, window, *level))
        return found

    def of_kind(self, kind: int) -> list[Carrier]:
        """The carriers of one kind."""
        return [c for c in self.carriers if c.kind == kind]

    def levels(self, kind: int) -> list[dict[str, Any]]:
        """The distinct levels of a kind in plain numbers, the most frequent first.

        `layer` of creation and `lifetime` in layers; `depth` of creation, 0 the first block and 1 the last; `share` of
        the window, mean over tokens; number of `tokens`; the three commonest as `examples`.
        """
        last = max(1, self.data.sizes["layer"] - 1)
        found: dict[tuple[int, int], list[Carrier]] = {}
        for c in self.of_kind(kind):
            found.setdefault((c.created, c.lifetime), []).append(c)
        strings = self.data["token_str"].values
        return [
            {
                "layer": layer,
                "lifetime": lifetime,
                "depth": layer / last,
                "share": float(np.mean([c.share for c in some])),
                "tokens": len(some),
                "examples": [s for s, _ in Counter(str(strings[c.token]) for c in some).most_common(3)],
            }
            for (layer, lifetime), some in sorted(found.items(), key=lambda x: (-len(x[1]), x[0]))
        ]

    def span(self, case: int) -> str:
        """The median window of one case over the texts that have one, in words such as "2 to 8"."""
        start, end = self.data["start"].values[case], self.data["end"].values[case]
        return f"{np.median(start[start >= 0]):.0f} to {np.median(end[start >= 0]) - 1:.0f}"

    def inside(self, case: int, n_layers: int) -> np.ndarray:
        """Whether a layer lies in a text's window; axes layer, text."""
        layer = np.arange(n_layers)[:, None]
        return (self.data["start"].values[case] <= layer) & (layer < self.data["end"].values[case])

    def inside_any(self, n_layers: int) -> np.ndarray:
        """Whether a layer lies in any of a text's windows; axes layer, text."""
        every = [self.inside(case, n_layers) for case in range(self.data.sizes["case"] - 1)]
        return np.any([np.zeros((n_layers, self.data.sizes["text"]), dtype=bool), *every], axis=0)

    def contrast(self, kind: int, values: np.ndarray, *, same_id: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """|values| of the tokens of a kind where they are created, and the mean over others there.

        The others are the ordinary tokens of the text or, with `same_id`, those of any text that have the token's id
        and are inside a window there.

        Args:
            kind: of the tokens.
            values: axes layer, token.
            same_id: which others.

        Returns:
            Two means per text, axis text; NaN for texts without a pair.
        """
        ids, inside = self.data["token_id"].values, self.inside_any(len(values))
        pairs: list[list[tuple[float, float]]] = [[] for _ in range(self.data.sizes["text"])]
        for c in self.of_kind(kind):
            among = (ids == ids[c.token]) & inside[c.created, self.rows] if same_id else self.rows == c.row
            if (self.ordinary & among).any():
                here = np.abs(values[c.created])
                pairs[c.row].append((float(here[c.token]), float(here[self.ordinary & among].mean())))
        means = np.array([np.mean(p, axis=0) if p else (np.nan, np.nan) for p in pairs])
        return means[:, 0], means[:, 1]

    def thirds(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means over the middle third and the outer thirds of each text's longest window; axis text.

        All layers where a text has no window; equal where two layers or fewer leave no middle.

        Args:
            values: axes layer, text.
        """
        out = []
        for row, path in enumerate(values.T):
            ends = zip(self.data["start"].values[:-1, row], self.data["end"].values[:-1, row], strict=True)
            start, end = max(ends, key=lambda w: w[1] - w[0], default=(-1, -1))
            first, middle, last = np.array_split(path[start:end] if start >= 0 else path, 3)
            outer = float(np.concatenate([first, last]).mean())
            out.append((float(middle.mean()) if len(last) else outer, outer))
        middles, outers = np.array(out).T
        return middles, outers


def tabulate(texts: Sequence[Streams], cosine: float, labels: Labels) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
    """`start`, `end`, `created`, `lifetime` and `kind` as `Table` holds them, with their axes.

    Args:
        texts: in the order of the text axis.
        cosine: magnitude that a sink-like token exceeds.
        labels: what a lifetime is called.
    """
    most = max(len(t.windows) for t in texts)
    windows = [[*t.windows, *[(-1, -1)] * (most - len(t.windows)), t.published] for t in texts]
    found = []
    for text, cases in zip(texts, windows, strict=True):
        hit = text.hits(cosine)
        levels = [Levels.of(hit & (w[0] >= 0), w if w[0] >= 0 else (0, 1), labels) for w in cases]
        found.append([(x.created, x.lifetime, x.kind) for x in levels])
    by_token = np.concatenate([np.array(f) for f in found], axis=2)  # case, (created, lifetime, kind), token
    ends = np.array(windows)  # text, case, end
    return {name: (("case", "token"), by_token[:, i]) for i, name in enumerate(("created", "lifetime", "kind"))} | {
        name: (("case", "text"), ends[..., i].T) for i, name in enumerate(("start", "end"))
    }


def _count(hit: np.ndarray, windows: Sequence[Window], labels: Labels) -> np.ndarray:
    kinds = [Levels.of(hit, window, labels).kind for window in windows]
    return np.array([sum(int((k == kind).sum()) for k in kinds) for kind in (SECONDARY, PRIMARY_LIKE)], dtype=float)


def runs(inside: np.ndarray) -> list[Window]:
    """Maximal runs of at least two layers that are inside, in order.

    Args:
        inside: axis layer.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(int)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= FEWEST]


def published_window(norm: np.ndarray) -> Window:
    """The window of arXiv 2512.22213: from the largest step up in the primary's norm to the largest step down after it.

    With D_l = norm[l + 1] - norm[l]: start = argmax D + 1, end = start + argmin D[start:] + 1; all layers from start
    where no step follows, all layers of a model with one.

    Args:
        norm: the primary's norm after each block.
    """
    steps = np.diff(norm)
    if not len(steps):
        return 0, len(norm)
    start = int(steps.argmax()) + 1
    return start, start + int(steps[start:].argmin()) + 1 if start < len(steps) else len(norm)
