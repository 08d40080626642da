"""Which rows have which label, and what is refused before anything is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.core import InputError, Point

from .collected import Collected


@dataclass(frozen=True)
class Target:
    """What a probe is to tell of each row.

    Args:
        values: booleans or numbers, axis row of the collection.
        positive: the class that is True, in words; "" for numbers.
        negative: the other class.
        of_text: whether labels belong to whole texts.
    """

    values: np.ndarray
    positive: str
    negative: str
    of_text: bool

    @property
    def classes(self) -> bool:
        """Whether it is two classes, and not numbers."""
        return self.values.dtype == bool


def target_of(collected: Collected, labels: Sequence[Any] | None, positive: Any = None) -> Target:
    """The target of every row.

    Args:
        collected: the rows.
        labels: one for each text or one for each row; those that came with the texts if None. Two distinct values are
            classes; numbers with more are numbers.
        positive: the class that is positive; the second in ascending order if None.

    Raises:
        InputError: labels are missing, not as many as texts or rows, not finite, of one class, or of several classes
            that are no numbers.
    """
    text = collected.about.numbers["text"]
    n_texts, n_rows = len(collected.about.lengths), len(collected)
    if labels is None:
        labels = collected.about.labels  # type: ignore[assignment]
    if labels is None:
        raise InputError(f"There are no labels. Give one for each of {n_texts} texts or each of {n_rows} rows.")
    values = np.asarray(labels)
    if values.ndim != 1 or len(values) not in (n_texts, n_rows):
        raise InputError(
            f"Found labels of shape {values.shape}; expected one for each of {n_texts} texts or each of {n_rows} rows."
        )
    of_text = len(values) == n_texts
    if n_texts == n_rows and not np.array_equal(text, np.arange(n_texts)):
        raise InputError(
            f"There are {n_texts} texts and as many rows, which do not belong to them one by one. Add a row."
        )
    if values.dtype == object:
        values = np.asarray(values.tolist())
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} labels are NaN or infinite. Leave these texts out.")
    values = values[text] if of_text else values
    return _typed(values, positive, of_text)


def _typed(values: np.ndarray, positive: Any, of_text: bool) -> Target:
    distinct = np.unique(values)
    if len(distinct) < 2:
        raise InputError(f"All labels are {distinct.tolist()[0]!r}; a probe needs two classes, or numbers that differ.")
    if len(distinct) == 2:
        chosen = distinct[1] if positive is None else positive
        if chosen not in distinct:
            raise InputError(f"positive={positive!r} is no label; there are {distinct.tolist()}.")
        other = distinct[0] if chosen == distinct[1] else distinct[1]
        return Target(values == chosen, str(chosen), str(other), of_text)
    if positive is not None:
        if positive not in distinct:
            raise InputError(f"positive={positive!r} is no label; there are {distinct.tolist()[:8]}.")
        return Target(values == positive, str(positive), "any other", of_text)
    if values.dtype.kind not in "iuf":
        raise InputError(
            f"Found {len(distinct)} classes, such as {distinct.tolist()[:4]}; a sweep tells one from the rest: name it "
            "as positive=…."
        )
    return Target(values.astype(np.float64), "", "", of_text)


@dataclass(frozen=True)
class Case:
    """Rows that are probed together, at some layers.

    Args:
        name: what it is, such as "resid_post" or "resid_post, position -1".
        site: the site.
        layers: its layers; one for a site that exists once, which stands at the layer it comes before or after.
        rows: which rows of the collection.
    """

    name: str
    site: str
    layers: tuple[int, ...]
    rows: np.ndarray

    def matrix(self, collected: Collected, layer: int) -> np.ndarray:
        """The rows at a layer; axes row, feature."""
        point = Point(self.site, layer) if collected.layers[self.site] else Point(self.site)
        return collected.matrix(point)[self.rows]


def cases_of(collected: Collected, points: Any, *, by_position: bool) -> list[Case]:
    """What a sweep goes through.

    Args:
        collected: the rows.
        points: which points; every one but the token embedding if None.
        by_position: whether each position that was asked for is a case of its own.

    Raises:
        InputError: the collection holds no such point.
    """
    sites: dict[str, list[int]] = {}
    if points is None:
        sites = {s: list(n) for s, n in collected.layers.items() if s != "embed" or len(collected.layers) == 1}
    else:
        one = isinstance(points, (str, Point)) or (len(points) == 2 and isinstance(points[1], int))
        for point in map(Point.of, [points] if one else points):
            found = collected[point]  # refuses what is not there
            own = found["layer"].values.tolist() if "layer" in found.dims else []
            if not own and collected.layers[point.site]:
                own = [int(point.layer or 0) % int(collected.manifest["model"]["n_layers"])]
            sites[point.site] = sorted({*sites.get(point.site, []), *own})
    last = int(collected.manifest["model"]["n_layers"]) - 1
    position = collected.about.numbers["position"]
    asked = sorted(set(position.tolist())) if by_position else [None]
    found_cases = []
    for site, layers in sites.items():
        for p in asked:
            rows = np.arange(len(collected)) if p is None else np.flatnonzero(position == p)
            name = site if p is None else f"{site}, position {p}"
            found_cases.append(Case(name, site, tuple(layers) or (0 if site == "embed" else last,), rows))
    return found_cases
