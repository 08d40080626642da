"""The benchmark's tables say what was measured: medians, targets met and missed, curves over T, a report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import assert_quantities

import probekit as pk
from probekit.analysis.registry import load_file, temporary_registrations

ANALYSES = Path(__file__).parents[2] / "analyses"


@pytest.fixture
def tables() -> Iterator[Any]:
    """The module; its analyses are forgotten afterwards."""
    with temporary_registrations():
        load_file(ANALYSES / "capture_tables.py")
        yield sys.modules["probekit_user_capture_tables"]


def _cases(tables: Any) -> list[Any]:
    def case(what: str, target: float | None, values: list[float], **more: Any) -> Any:
        return tables.Case(what, "the bare model", target, values=values, **more)

    return [
        case("quick", 1.2, [1.3, 1.0, 1.1], curve="ours", n_tokens=256),
        case("slow", 1.2, [1.3, 1.4, 1.2], curve="ours", n_tokens=64),
        case("others", 2.5, [2.0, 2.6, 3.0], at_least=True, curve="alone", n_tokens=64),
        case("others again", 2.7, [2.0, 2.6, 3.0], at_least=True),
        case("no target", None, [7.0]),
        case("small", None, [100.0], unit="MiB", curve="memory", n_tokens=64),
        case("large", 2048.0, [3000.0], unit="MiB", curve="memory", n_tokens=256),
    ]


def test_costs_are_medians_with_their_verdict(tables: Any, tmp_path: Path) -> None:
    """Median, smallest and largest of the pairs; a target is met from the right side; no target, no verdict."""
    result = pk.result_of("capture-benchmark", tables.cost_table(_cases(tables)), {})
    assert result["median"].values.tolist() == [1.1, 1.3, 2.6, 2.6, 7.0, 100.0, 3000.0]
    assert (float(result["lowest"][0]), float(result["highest"][0])) == (1.0, 1.3)
    assert_quantities(result.findings)
    claims = [f.claim for f in result.findings]
    verdicts = ["met" if "met." in c else "missed" if "missed." in c else "" for c in claims]
    assert verdicts == ["met", "missed", "met", "missed", "", "", "missed"], claims
    page = Path(pk.report([result], tmp_path / "report")).read_text(encoding="utf-8")
    assert "target ≤ 1.2 missed" in page and "Peak memory above the loaded model" in page


def test_curves_run_over_the_length_of_the_text(tables: Any) -> None:
    """Rows of one curve are sorted by T; a single point is no curve; units are not mixed."""
    rows = _cases(tables)
    times = tables.curves_of(rows, "×")
    assert list(times) == ["ours"]
    assert times["ours"]["threshold"].values.tolist() == [64, 256]
    assert times["ours"].values.tolist() == [1.3, 1.1]
    assert list(tables.curves_of(rows, "MiB")) == ["memory"]


def test_parity_names_every_statistic(tables: Any) -> None:
    """Each finding holds our largest difference against that of eager float32."""
    off = xr.Dataset(
        {
            "largest_difference": (("sample", "case"), np.array([[1e-6, 2e-6], [3e-6, 4e-6]])),
            "largest_value": ("case", [1.0, 10.0]),
        },
        coords={"sample": ["probekit", "eager float32"], "case": ["received", "norm"]},
    )
    found = pk.result_of("capture-parity", off, {}).findings
    assert [(f.value, f.null) for f in found] == [(1e-6, 3e-6), (2e-6, 4e-6)]
    assert found[0].claim.startswith("received: at most 1.0e-06 from float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_device_study_runs_on_a_cpu(tables: Any, dtype: str) -> None:
    """The accelerator's study, on a tiny model: it measures what it says and needs no network."""
    import torch

    sys.modules.setdefault("capture_tables", tables)
    with temporary_registrations():
        load_file(ANALYSES / "device_benchmark.py")
        study = sys.modules["probekit_user_device_benchmark"]
        cases = study.DeviceBench("tiny", "cpu", getattr(torch, dtype), 24).cases(1)
    assert [c.against for c in cases] == ["bare forward", "bare products"]
    assert all(np.isfinite(c.values).all() for c in cases)
