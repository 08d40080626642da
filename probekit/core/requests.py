"""What an analysis asks for: frozen, hashable data."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from .edits import Patch
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
class LogitDifference:
    """A number per text, made of its logits at one position: sum over `plus` minus sum over `minus`.

    Args:
        plus: per text of the request, in order, the token id that counts for it.
        minus: per text, the token id that counts against it; -1 for none.
        position: where the logits are read, negative from the end.
    """

    plus: tuple[int, ...]
    minus: tuple[int, ...]
    position: int = -1

    def __post_init__(self) -> None:
        if len(self.plus) != len(self.minus):
            raise InputError(f"Expected one id per text; found {len(self.plus)} for and {len(self.minus)} against.")


@dataclass(frozen=True)
class Forward:
    """One forward pass over every text.

    Args:
        captures: what comes back, reduced.
        patches: what is changed on the way, in this order.
        model: the role of the model this goes to, for analyses that compare models.
        texts: corpus indices of the texts that run; None for all.
        gradient_of: if given, captures see the gradient of this number with respect to the
            activation at their point, instead of the activation.
    """

    captures: tuple[Capture, ...]
    patches: tuple[Patch, ...] = ()
    model: str = "model"
    texts: tuple[int, ...] | None = None
    gradient_of: LogitDifference | None = None

    @property
    def pass_key(self) -> tuple[object, ...]:
        """Requests with the same key can share one pass."""
        return self.model, self.patches, self.texts, self.gradient_of


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
