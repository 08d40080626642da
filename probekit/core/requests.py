"""What an analysis asks for: frozen, hashable data."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from .errors import InputError
from .points import Point


@runtime_checkable
class ReducerSpec(Protocol):
    """The part of a reducer that a request needs: it is hashable and has a key (see `probekit.reduce`)."""

    @property
    def key(self) -> str:
        """A short unique spelling, such as `top_magnitudes(k=3)`."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Capture:
    """A pair (point, reducer): what to look at, and how to shrink it before it leaves the forward pass.

    Args:
        point: a `Point` or any spelling of one; a layered site without a layer means every layer.
        reducer: a reducer of `probekit.reduce`.
    """

    point: Point
    reducer: ReducerSpec

    def __init__(self, point: Point | str | tuple[str, int], reducer: ReducerSpec) -> None:
        object.__setattr__(self, "point", Point.of(point))
        object.__setattr__(self, "reducer", reducer)
        if not isinstance(reducer, Hashable) or not hasattr(reducer, "key"):
            raise InputError(f"Expected a reducer of probekit.reduce for the point {self.point}, found {reducer!r}.")

    @property
    def key(self) -> str:
        """A short unique spelling, such as `resid_post:norm()`."""
        return f"{self.point}:{self.reducer.key}"


@dataclass(frozen=True)
class Patch:
    """A pair (point, edit): scale an activation, for all tokens or for some positions of each text.

    Args:
        point: where to write; a layered site needs its layer.
        scale: what the activation is multiplied with: 0 removes it, 1 is the identity.
        positions: positions within each text, negative from the end; None for all.
    """

    point: Point
    scale: float
    positions: tuple[int, ...] | None = None

    def __init__(
        self, point: Point | str | tuple[str, int], scale: float, positions: tuple[int, ...] | None = None
    ) -> None:
        object.__setattr__(self, "point", Point.of(point))
        object.__setattr__(self, "scale", float(scale))
        object.__setattr__(self, "positions", positions)

    @property
    def key(self) -> str:
        """A short unique spelling."""
        where = "" if self.positions is None else f"@{list(self.positions)}"
        return f"{self.point}*{self.scale:g}{where}"


@dataclass(frozen=True)
class Forward:
    """One forward pass over every text.

    Args:
        captures: what comes back, reduced.
        patches: what is changed on the way.
        model: the role of the model this goes to, for analyses that compare models.
    """

    captures: tuple[Capture, ...]
    patches: tuple[Patch, ...] = ()
    model: str = "model"

    @property
    def pass_key(self) -> tuple[str, tuple[Patch, ...]]:
        """Requests with the same key can share one pass."""
        return self.model, self.patches


@dataclass(frozen=True)
class Embed:
    """One embedding per text, from a text-embedding model.

    Args:
        normalise: whether each embedding is scaled to unit length.
        model: the role of the model this goes to.
    """

    normalise: bool = True
    model: str = "model"
    kind: Literal["embed"] = "embed"


Request = Forward | Embed
