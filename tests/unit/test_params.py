"""Parameters: parsed to their type, held to their bounds, and refused in words that say what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from probekit.analysis import Params, param
from probekit.core import InputError, UnknownName


@dataclass(frozen=True)
class Some(Params):
    """One of each kind."""

    share: float = param(0.3, low=0.0, high=1.0, unit="share", help="a share")
    top_k: int = param(10, low=1, help="a number")
    mode: str = param("mean", choices=("mean", "zero"), help="a choice")
    folded: bool = param(False, help="a switch")
    limit: float = param(5.0, high=9.0, help="bounded above")


def test_specs_tell_what_a_surface_needs() -> None:
    specs = Some.specs()
    assert list(specs) == ["share", "top_k", "mode", "folded", "limit"]
    assert (specs["share"].type, specs["share"].default, specs["share"].unit) == (float, 0.3, "share")
    assert [specs[n].bounds for n in specs] == ["from 0 to 1", "at least 1", "", "", "at most 9"]
    assert specs["mode"].choices == ("mean", "zero")


@pytest.mark.parametrize(
    ("name", "given", "parsed"),
    [
        ("share", "0.5", 0.5),
        ("share", 1, 1.0),
        ("share", 0, 0.0),
        ("top_k", "7", 7),
        ("top_k", 7.0, 7),
        ("mode", "zero", "zero"),
        ("folded", "true", True),
        ("folded", "No", False),
        ("folded", True, True),
    ],
)
def test_values_become_their_type(name: str, given: Any, parsed: Any) -> None:
    value = getattr(Some.parse({name: given}, "x"), name)
    assert value == parsed and type(value) is type(parsed)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("share", 1.1, "'share' must be from 0 to 1, found 1.1"),
        ("share", "much", "'share' must be float, found 'much'"),
        ("share", float("nan"), "'share' must be float, found nan"),
        ("share", True, "'share' must be float, found True"),
        ("top_k", 0, "'top_k' must be at least 1, found 0"),
        ("top_k", 2.5, "'top_k' must be int, found 2.5"),
        ("top_k", float("inf"), "'top_k' must be int, found inf"),
        ("top_k", None, "'top_k' must be int, found None"),
        ("mode", "max", "'mode' must be one of mean, zero, found 'max'"),
        ("limit", 10, "'limit' must be at most 9, found 10"),
        ("folded", "perhaps", "'folded' must be bool, found 'perhaps'"),
    ],
)
def test_values_outside_are_refused(name: str, given: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Some.parse({name: given}, "sinks")
    assert str(caught.value) == f"sinks: parameter {message}."


def test_unknown_parameter_names_close_ones() -> None:
    with pytest.raises(UnknownName, match=r"Unknown parameter of sinks 'topk'. Did you mean 'top_k'"):
        Some.parse({"topk": 3}, "sinks")


def test_parameters_are_values() -> None:
    first, second = Some.parse({"top_k": 3}, "x"), Some.parse({"top_k": "3"}, "x")
    assert first == second and hash(first) == hash(second)
    assert Some.parse(first.as_dict(), "x") == first
