"""Massive entries of the residual stream as places that can be changed: zero, mean over other texts, and controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probekit.core import Batch, Patch, Replace

MIN_MAGNITUDE, RATIO = 100.0, 1000.0  # arXiv 2402.17762, section 2


@dataclass(frozen=True)
class Entry:
    """One large number in the residual stream that leaves a block.

    Args:
        layer: the block.
        text: row of the text in its batch.
        pos: position within the text.
        dim: dimension.
        value: signed.
    """

    layer: int
    text: int
    pos: int
    dim: int
    value: float

    @property
    def role(self) -> tuple[bool, int]:
        """Entries of different texts with the same role stand for one another: at the start or not, and dimension."""
        return self.pos == 0, self.dim


@dataclass(frozen=True)
class Largest:
    """The largest entries of every token, as `TopMagnitudes` and `MedianMagnitude` give them.

    Args:
        value: signed; axes layer, token, rank.
        dim: axes layer, token, rank.
        median: median magnitude; axes layer, text.
        batch: the texts.
    """

    value: np.ndarray
    dim: np.ndarray
    median: np.ndarray
    batch: Batch

    def passing(self, min_magnitude: float = MIN_MAGNITUDE, ratio: float = RATIO) -> np.ndarray:
        """Which entries are massive: magnitude above both bounds, strictly; axes layer, token, rank."""
        place = np.repeat(np.arange(len(self.batch)), self.batch.lengths)
        magnitude, scale = np.abs(self.value), self.median[:, place, None]
        return (magnitude > min_magnitude) & (magnitude > ratio * scale)

    def entries(self, layer: int, min_magnitude: float = MIN_MAGNITUDE, ratio: float = RATIO) -> tuple[Entry, ...]:
        """Massive entries after one block, by text, position and falling magnitude."""
        place, pos = np.repeat(np.arange(len(self.batch)), self.batch.lengths), self.batch.pos
        found = np.argwhere(self.passing(min_magnitude, ratio)[layer])
        return tuple(
            Entry(layer, int(place[t]), int(pos[t]), int(self.dim[layer, t, r]), float(self.value[layer, t, r]))
            for t, r in found
        )

    def layers(self, min_magnitude: float = MIN_MAGNITUDE, ratio: float = RATIO) -> list[int]:
        """Blocks after which some entry is massive."""
        return [int(i) for i in np.flatnonzero(self.passing(min_magnitude, ratio).any(axis=(1, 2)))]


def zeroed(entries: Sequence[Entry], batch: Batch) -> tuple[Patch, ...]:
    """Set each entry to zero in the stream that leaves its block."""
    return tuple(_patch(e, batch, 0.0) for e in entries)


def averaged(entries: Sequence[Entry], batch: Batch) -> tuple[Patch, ...]:
    """Set each entry to its mean over the other texts, sign included; entries no other text has are left alone.

    The mean is over entries of the same role: at the start of a text or later, and the same dimension. A text's own
    entries never count, so every text is held out from the mean that it is given.
    """
    patches = []
    for entry in entries:
        others = [e.value for e in entries if e.role == entry.role and e.text != entry.text and e.layer == entry.layer]
        if others:
            patches.append(_patch(entry, batch, Replace([[float(np.mean(others))]])))
    return tuple(patches)


def other_dims(entries: Sequence[Entry], batch: Batch, d_model: int, seed: int = 0) -> tuple[Patch, ...]:
    """The control: as many entries at the same tokens, in random dimensions that hold no massive entry, set to zero."""
    rng, taken = np.random.default_rng(seed), {e.dim for e in entries}
    free = np.setdiff1d(np.arange(d_model), sorted(taken))
    places: dict[tuple[int, int, int], list[Entry]] = {}
    for entry in entries:
        places.setdefault((entry.layer, entry.text, entry.pos), []).append(entry)
    patches = []
    for (layer, text, pos), some in places.items():
        dims = rng.choice(free, size=min(len(some), len(free)), replace=False)
        patches += [_patch(Entry(layer, text, pos, int(d), 0.0), batch, 0.0) for d in dims]
    return tuple(patches)


def other_positions(entries: Sequence[Entry], batch: Batch, seed: int = 0) -> tuple[Patch, ...]:
    """The other control: the same dimensions at random tokens that hold no massive entry, set to zero."""
    rng, taken = np.random.default_rng(seed), {(e.text, e.pos) for e in entries}
    patches: dict[tuple[int, int, int, int], Patch] = {}
    for entry in entries:
        free = [p for p in range(batch.lengths[entry.text]) if (entry.text, p) not in taken]
        if free:
            at = Entry(entry.layer, entry.text, int(rng.choice(free)), entry.dim, 0.0)
            patches[at.layer, at.text, at.pos, at.dim] = _patch(at, batch, 0.0)
    return tuple(patches.values())


def _patch(entry: Entry, batch: Batch, edit: float | Replace) -> Patch:
    return Patch(("resid_post", entry.layer), edit, (entry.pos,), dims=(entry.dim,), texts=(batch.index[entry.text],))
