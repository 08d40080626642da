"""Changes to activations, as data: where, and what happens there.

A `Patch` is a pair (point, edit), narrowed to texts, positions, heads and dimensions. Edits are zero
and scale (`Scale`), replace by given values (`Replace`: a mean over a reference corpus, another
text's activation, another trace's), add a direction (`Add`), project one out (`ProjectOut`), and
cut attention edges (`KnockOut`). All are frozen and hashable, so that equal requests share a pass.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .points import SITES, Point

if TYPE_CHECKING:
    from .model import ModelInfo
    from .text import Batch


class Values:
    """A read-only float32 array that can be part of a request: equal contents, equal hash.

    Args:
        values: a number, a list, an array, a labelled array or a tensor; copied.

    Raises:
        InputError: it is empty, holds NaN or infinity, or is not made of numbers.
    """

    __slots__ = ("array", "digest")

    def __init__(self, values: Any) -> None:
        if hasattr(values, "detach"):  # a tensor, of whatever type and wherever it is
            values = values.detach().float().cpu().numpy()
        try:
            self.array = np.array(values, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"Found {type(values).__name__} where an array of numbers is needed: {error}") from error
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
    """Multiply by a number: 0 removes the activation, 1 is the identity, -1 turns it round.

    Raises:
        InputError: the factor is NaN or infinite.
    """

    factor: float

    def __post_init__(self) -> None:
        _finite(self.factor, "factor")

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
        object.__setattr__(self, "scale", _finite(scale, "scale"))

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

    Raises:
        InputError: keys or queries are named, but none is.
    """

    keys: tuple[int, ...] | None
    queries: tuple[int, ...] | None

    def __init__(self, keys: Sequence[int] | None = None, queries: Sequence[int] | None = None) -> None:
        object.__setattr__(self, "keys", _whole_numbers(keys, "keys"))
        object.__setattr__(self, "queries", _whole_numbers(queries, "queries"))
        for name, chosen in (("keys", self.keys), ("queries", self.queries)):
            if chosen == ():
                raise InputError(f"A KnockOut with empty {name} cuts nothing. Name some, or leave {name} out for all.")

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
        object.__setattr__(self, "edit", Scale(float(edit)) if isinstance(edit, Real) else edit)
        for name, where in (("positions", positions), ("heads", heads), ("dims", dims), ("texts", texts)):
            object.__setattr__(self, name, _whole_numbers(where, name))
        self._check()

    def _check(self) -> None:
        site = self.point.site
        if not isinstance(self.edit, Edit):
            raise InputError(
                f"Found {type(self.edit).__name__} as the edit at {self.point}; expected a number (a factor), Scale, "
                "Replace, Add, ProjectOut or KnockOut."
            )
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


def check_patch(patch: Patch, info: ModelInfo, batch: Batch) -> None:
    """Refuse a patch that does not fit the model or the texts.

    Args:
        patch: the patch.
        info: the model's sizes.
        batch: the texts that run; those the patch does not apply to are not looked at.

    Raises:
        InputError: a head, dimension or position that does not exist or is named twice, values of another shape, or
            a knock-out that leaves a query without any key.
    """
    dims = SITES[patch.point.site].dims
    n_heads = info.n_kv_heads if patch.point.site in ("k", "v") else info.n_heads
    if patch.heads is not None and not all(0 <= h < n_heads for h in patch.heads):
        what = "key-value heads" if n_heads != info.n_heads else "heads"
        hint = f"; its queries have {info.n_heads}, several of which share one" if n_heads != info.n_heads else ""
        raise InputError(f"Heads {list(patch.heads)} at {patch.point}: {info.name!r} has {n_heads} {what} there{hint}.")
    width = {"d_model": info.d_model, "d_head": info.d_head, "d_mlp": info.d_mlp, "vocab": info.d_vocab}.get(dims[-1])
    if patch.dims is not None and width is not None:
        if not all(-width <= d < width for d in patch.dims):
            raise InputError(f"Dimensions {list(patch.dims)} at {patch.point}: it has {width}, 0 to {width - 1}.")
        _each_once(patch, "dims", width)
    for text, n in zip(batch.index, batch.lengths, strict=True):
        if patch.texts is not None and text not in patch.texts:
            continue
        _check_positions(patch, text, n)
        if isinstance(patch.edit, KnockOut):
            continue
        shape = [n if patch.positions is None else len(patch.positions)]
        if "head" in dims:
            shape.append(n_heads if patch.heads is None else len(patch.heads))
        if width is not None:
            shape.append(width if patch.dims is None else len(patch.dims))
            _check_values(patch, tuple(shape), text)


def _check_positions(patch: Patch, text: int, n: int) -> None:
    edit = patch.edit
    chosen = [*(patch.positions or ())]
    if isinstance(edit, KnockOut):
        chosen += [*(edit.keys or ()), *(edit.queries or ())]
    outside = [p for p in chosen if not -n <= p < n]
    if outside:
        raise InputError(f"Position {outside[0]} at {patch.point}: text {text} has {n} tokens, 0 to {n - 1}.")
    _each_once(patch, "positions", n)
    if isinstance(edit, KnockOut) and edit.keys is not None:
        cut, queries = {k % n for k in edit.keys}, range(n) if edit.queries is None else edit.queries
        blind = [q % n for q in queries if cut.issuperset(range(q % n + 1))]
        if blind:
            raise InputError(
                f"The knock-out at {patch.point} leaves query {blind[0]} of text {text} no key to look at. "
                "Name queries that see something else, or leave out keys."
            )


def _each_once(patch: Patch, name: str, size: int) -> None:
    chosen = getattr(patch, name)
    if chosen is not None and len({c % size for c in chosen}) != len(chosen):
        raise InputError(
            f"{name}={list(chosen)} of a patch at {patch.point}: two of them are the same one of {size}, counted from "
            "the start and from the end."
        )


def _check_values(patch: Patch, shape: tuple[int, ...], text: int) -> None:
    edit = patch.edit
    if isinstance(edit, Replace):
        found = edit.values.array.shape
    elif isinstance(edit, (Add, ProjectOut)):
        found = edit.direction.array.shape
    else:
        return
    try:
        fits = np.broadcast_shapes(found, shape) == shape
    except ValueError:
        fits = False
    if isinstance(edit, ProjectOut):
        fits = found == shape[-1:]
    if not fits:
        raise InputError(
            f"Values of shape {found} at {patch.point} do not fit text {text}: the patch selects "
            f"{' × '.join(map(str, shape))} (position, then head where there are heads, then dimension)."
        )


def _whole_numbers(chosen: Iterable[Any] | None, name: str) -> tuple[int, ...] | None:
    try:
        return None if chosen is None else tuple(operator.index(c) for c in chosen)
    except TypeError as error:
        raise InputError(
            f"Found {name}={chosen!r}; expected a list of whole numbers, such as {name}=(0, 3)."
        ) from error


def _finite(number: Any, name: str) -> float:
    if not isinstance(number, Real) or not math.isfinite(number):
        raise InputError(f"Found {name}={number!r}; expected a finite number.")
    return float(number)
