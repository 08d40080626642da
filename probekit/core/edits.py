"""Changes to activations, as data: where, and what happens there.

A `Patch` is a pair (point, edit), narrowed to texts, positions, heads and dimensions. Edits are zero
and scale (`Scale`), replace by given values (`Replace`: a mean over a reference corpus, another
text's activation, another trace's), add a direction (`Add`), project one out (`ProjectOut`), and
cut attention edges (`KnockOut`). All are frozen and hashable, so that equal requests share a pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InputError
from .points import SITES, Point


class Values:
    """A read-only float32 array that can be part of a request: equal contents, equal hash.

    Args:
        values: anything numpy reads; copied.

    Raises:
        InputError: it is empty, or holds NaN or infinity.
    """

    __slots__ = ("array", "digest")

    def __init__(self, values: Any) -> None:
        self.array = np.array(getattr(values, "values", values), dtype=np.float32)
        if not self.array.size or not np.isfinite(self.array).all():
            raise InputError(f"Found values of shape {self.array.shape}, empty or not finite; expected finite numbers.")
        self.array.setflags(write=False)
        self.digest = hashlib.sha256(repr(self.array.shape).encode() + self.array.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Values({'×'.join(map(str, self.array.shape))}, {self.digest[:8]})"


@dataclass(frozen=True)
class Scale:
    """Multiply by a number: 0 removes the activation, 1 is the identity, -1 turns it round."""

    factor: float

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"scale({self.factor:g})"


@dataclass(frozen=True, init=False)
class Replace:
    """Put given values in the place of the activation.

    Args:
        values: broadcast against position × (head) × dimension of what the patch selects in one text.
    """

    values: Values

    def __init__(self, values: Any) -> None:
        object.__setattr__(self, "values", values if isinstance(values, Values) else Values(values))

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"replace({self.values.digest[:16]})"


@dataclass(frozen=True, init=False)
class Add:
    """Add a direction.

    Args:
        direction: axis dimension, or broadcast as `Replace.values` are.
        scale: what it is multiplied with.
    """

    direction: Values
    scale: float

    def __init__(self, direction: Any, scale: float = 1.0) -> None:
        object.__setattr__(self, "direction", direction if isinstance(direction, Values) else Values(direction))
        object.__setattr__(self, "scale", float(scale))

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"add({self.scale:g}*{self.direction.digest[:16]})"


@dataclass(frozen=True, init=False)
class ProjectOut:
    """Remove the component along a direction: x - (x · u) u with u = direction / |direction|.

    Args:
        direction: axis dimension; its length does not matter.

    Raises:
        InputError: the direction has length 0 or more than one axis.
    """

    direction: Values

    def __init__(self, direction: Any) -> None:
        object.__setattr__(self, "direction", direction if isinstance(direction, Values) else Values(direction))
        if self.direction.array.ndim != 1 or not self.direction.array.any():
            shape = self.direction.array.shape
            raise InputError(f"A direction to project out has one axis and some length; found shape {shape}.")

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"project_out({self.direction.digest[:16]})"


@dataclass(frozen=True, init=False)
class KnockOut:
    """Cut attention edges before the softmax, so that the rest of each row takes their share (arXiv 2304.14767).

    Belongs to the point `pattern`; the patch's `heads` say which heads.

    Args:
        keys: positions that are not looked at, negative from the end; None for every key before the query.
        queries: positions that do not look, negative from the end; None for all.
    """

    keys: tuple[int, ...] | None
    queries: tuple[int, ...] | None

    def __init__(self, keys: Sequence[int] | None = None, queries: Sequence[int] | None = None) -> None:
        object.__setattr__(self, "keys", None if keys is None else tuple(map(int, keys)))
        object.__setattr__(self, "queries", None if queries is None else tuple(map(int, queries)))

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"knock_out({self.queries} -> {self.keys})"


Edit = Scale | Replace | Add | ProjectOut | KnockOut


@dataclass(frozen=True, init=False)
class Patch:
    """A pair (point, edit): what is changed on the way through the model.

    Args:
        point: where to write, in any spelling; a layered site without a layer means every layer.
        edit: what happens there; a number is short for `Scale`.
        positions: positions within each text, negative from the end; None for all.
        heads: heads, for points that have them (key-value heads at `k` and `v`); None for all.
        dims: dimensions along the last axis; None for all.
        texts: corpus indices of the texts it applies to; None for all.

    Raises:
        InputError: heads at a point without heads, or an edit that does not fit the point.
    """

    point: Point
    edit: Edit
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    dims: tuple[int, ...] | None
    texts: tuple[int, ...] | None

    def __init__(
        self,
        point: Point | str | tuple[str, int],
        edit: Edit | float,
        positions: Sequence[int] | None = None,
        *,
        heads: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        texts: Sequence[int] | None = None,
    ) -> None:
        object.__setattr__(self, "point", Point.of(point))
        object.__setattr__(self, "edit", Scale(float(edit)) if isinstance(edit, (int, float)) else edit)
        for name, where in (("positions", positions), ("heads", heads), ("dims", dims), ("texts", texts)):
            object.__setattr__(self, name, None if where is None else tuple(map(int, where)))
        self._check()

    def _check(self) -> None:
        site = self.point.site
        if (site == "pattern") != isinstance(self.edit, KnockOut):
            what = type(self.edit).__name__
            raise InputError(
                f"{what} does not fit the point {site!r}: KnockOut is the edit of 'pattern', and belongs there only."
            )
        if isinstance(self.edit, KnockOut) and (self.positions is not None or self.dims is not None):
            raise InputError("A KnockOut names queries and keys itself; positions and dims do not apply.")
        if self.heads is not None and "head" not in SITES[site].dims:
            with_heads = ", ".join(s for s in SITES if "head" in SITES[s].dims)
            raise InputError(f"The point {site!r} has no heads; points that do: {with_heads}.")
        for name in ("positions", "heads", "dims", "texts"):
            chosen = getattr(self, name)
            if chosen is not None and (not chosen or len(set(chosen)) != len(chosen)):
                raise InputError(f"{name}={list(chosen)} of a patch at {self.point}: expected some, each one once.")

    @property
    def key(self) -> str:
        """A short unique spelling."""
        named = ("positions", "heads", "dims", "texts")
        where = "".join(f" {n}={list(getattr(self, n))}" for n in named if getattr(self, n) is not None)
        return f"{self.point}:{self.edit.key}{where}"
