"""Parameters of an analysis: a frozen dataclass whose fields make flags, widgets and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

from probekit.core import InputError, unknown


@dataclass(frozen=True)
class ParamSpec:
    """What a surface needs to offer one parameter."""

    name: str
    type: type
    default: Any
    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def parse(self, value: Any, where: str) -> Any:
        """`value` as this parameter's type.

        Raises:
            InputError: it is of another type, out of bounds, or not among the choices.
        """
        label = f"{where}: parameter {self.name!r}"
        try:
            parsed = _coerce(value, self.type)
        except (TypeError, ValueError, KeyError):
            raise InputError(f"{label} must be {self.type.__name__}, found {value!r}.") from None
        if self.choices and parsed not in self.choices:
            raise InputError(f"{label} must be one of {', '.join(self.choices)}, found {value!r}.")
        if (self.low is not None and parsed < self.low) or (self.high is not None and parsed > self.high):
            raise InputError(f"{label} must be {self.bounds}, found {value!r}.")
        return parsed

    @property
    def bounds(self) -> str:
        """The allowed range in words, "" if there is none."""
        if self.low is not None and self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.high is not None else ""


def _coerce(value: Any, kind: type) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    if isinstance(value, bool):
        raise ValueError
    parsed = kind(value)
    if kind is float and parsed != parsed:
        raise ValueError
    return parsed


def param(
    default: Any,
    *,
    help: str,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a Params dataclass.

    Args:
        default: the value when the user gives none; its type is the field's annotation (int, float, bool, str).
        help: one sentence that a user reads beside the flag or the slider.
        unit: unit of the value.
        low: smallest allowed value.
        high: largest allowed value.
        choices: allowed strings.
    """
    meta = {"help": help, "unit": unit, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Params:
    """Base of every analysis' parameters.

    Attributes:
        presets: by name, values of several parameters that go together, such as those of a paper.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def specs(cls) -> dict[str, ParamSpec]:
        """One `ParamSpec` per field, in order."""
        hints = get_type_hints(cls)
        return {
            f.name: ParamSpec(name=f.name, type=hints[f.name], default=f.default, **f.metadata)
            for f in dataclasses.fields(cls)
        }

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> Params:
        """Parameters from plain values, checked.

        Args:
            values: by field name; what is missing keeps its default.
            where: the analysis' name, for messages.

        Raises:
            UnknownName: a name that is no parameter.
            InputError: a value of the wrong type or out of bounds.
        """
        specs = cls.specs()
        for name in values:
            if name not in specs:
                raise unknown(f"parameter of {where}", name, specs)
        return cls(**{name: specs[name].parse(value, where) for name, value in values.items()})

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)
