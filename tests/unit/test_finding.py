"""A claim carries its evidence, and the strongest are those farthest from their null."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from probekit.analysis import Finding, fmt, strongest


def finding(**changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "claim": "Heads park 40 % on position 0.", "value": 0.4, "unit": "share", "null": 0.1, "null_meaning": "uniform",
        "ci95": (0.3, 0.5), "n": 8, "n_unit": "texts", "where": {"pos": 0}, "analysis": "sinks",
    }  # fmt: skip
    return Finding(**(fields | changes))


@pytest.mark.parametrize("empty", ["claim", "unit", "null_meaning", "n_unit"])
def test_evidence_is_required(empty: str) -> None:
    with pytest.raises(ValueError, match="needs claim, unit, null_meaning and n_unit"):
        finding(**{empty: ""})


def test_several_units_need_an_interval() -> None:
    with pytest.raises(ValueError, match="over 8 texts needs an interval"):
        finding(ci95=None)
    assert finding(ci95=None, n=1).z == 0


def test_z_is_the_distance_in_standard_errors() -> None:
    assert finding().z == pytest.approx(0.3 / (0.2 / (2 * 1.959964)), rel=1e-6)
    assert finding(value=0.1).z == 0
    assert finding(ci95=(0.4, 0.4)).z == math.inf and finding(value=0.1, ci95=(0.1, 0.1)).z == 0
    assert finding(value=math.nan).z == 0


def test_round_trip_through_json() -> None:
    for f in (finding(), finding(ci95=None, n=1)):
        assert Finding.from_dict(json.loads(json.dumps(f.as_dict()))) == f


def test_evidence_in_words() -> None:
    assert finding().evidence == "95 % interval 0.300 to 0.500; null 0.100 (uniform); n = 8 texts"
    assert finding(ci95=None, n=1).evidence == "no interval from one text; null 0.100 (uniform); n = 1 text"


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"), (-0.0, "0"), (1, "1.00"), (0.123456, "0.123"), (12.3456, "12.3"), (123.456, "123"), (999.6, "1,000"),
        (22_552.04, "22,552"), (-1234.5, "-1,234"), (0.00012345, "0.000123"), (0.0000123, "1.23e-05"),
        (float("nan"), "nan"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_numbers_as_a_reader_wants_them(x: float, text: str) -> None:
    assert fmt(x) == text


def test_strongest_takes_the_main_finding_of_each_analysis() -> None:
    found = [finding(analysis=a, value=v) for a, v in (("a", 0.2), ("a", 0.9), ("b", 0.5), ("c", 0.11), ("d", 0.8))]
    assert [(f.analysis, f.value) for f in strongest(found, 3)] == [("d", 0.8), ("b", 0.5), ("a", 0.2)]
    assert strongest([], 3) == []
