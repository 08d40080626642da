"""What holds for every analysis that needs no texts: units, findings with null and interval, figures, storage, repeats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_quantities
from sticky_model import BagEmbedder

import probekit as pk
from probekit.analysis import Analysis, analyses, get_analysis
from probekit.analysis.finding import Finding
from probekit.core import CapabilityError

# A small model and parameters with which each analysis takes a second or two; one that has no row here is not held to
# the contract, and the first test says so.
ROWS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sticky-tokens": (
        lambda: BagEmbedder([f"w{i}" for i in range(60)], sticky="w7"),
        {"n_scored": 30, "n_candidates": 8, "n_validation": 10, "n_random": 6, "n_above": 4},
    ),
}
ELSEWHERE = {"undertrained-tokens", "glitch-tokens", "token-card"}  # held to the same in their own files, on a decoder


@pytest.fixture(scope="module", params=sorted(ROWS))
def result(request: pytest.FixtureRequest) -> pk.Result:
    model, params = ROWS[request.param]
    return pk.run(request.param, model(), **params)


def test_every_analysis_without_texts_is_held_to_this() -> None:
    without = {name for name, analysis in analyses().items() if not analysis.reads_texts}
    assert set(ROWS) <= without and without - set(ROWS) <= ELSEWHERE
    assert not any(get_analysis(name).only_looks() for name in without), "'all' must not run them"


def test_every_variable_is_declared_with_unit_and_axes(result: pk.Result) -> None:
    assert list(result.dataset.data_vars) and set(result.dataset.data_vars) == set(result.analysis.measures)
    for name, measure in result.analysis.measures.items():
        assert result[name].dims == measure.dims and result[name].attrs["units"] == measure.unit and measure.help
        values = result[name].values
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            assert "NaN" in measure.help, f"{name} holds NaN and its help does not say when"


def test_findings_have_null_interval_and_n(result: pk.Result) -> None:
    assert result.findings
    assert_quantities(result.findings)
    for finding in result.findings:
        assert isinstance(finding, Finding) and finding.n >= 1 and finding.null_meaning and finding.unit
        assert np.isfinite([finding.value, finding.null]).all()
        assert finding.ci95 is None or finding.ci95[0] <= finding.value + 1e-9 <= finding.ci95[1] + 2e-9
        assert "nan" not in finding.claim.lower().split()


def test_figures_have_caption_and_alt(result: pk.Result) -> None:
    drawn = result.figures()
    assert drawn
    for name, figure in drawn.items():
        assert figure.caption and figure.alt and figure.title, name
        assert result.provenance["model"]["name"] in figure.caption, name


def test_results_round_trip(result: pk.Result, tmp_path: Path) -> None:
    again = pk.load_result(result.save(tmp_path / "r.zarr"))
    assert again.dataset.equals(result.dataset) and again.findings == result.findings
    assert list(again.figures()) == list(result.figures())


def test_the_same_twice(result: pk.Result) -> None:
    model, params = ROWS[result.name]
    assert pk.run(result.name, model(), **params).dataset.equals(result.dataset)


def test_docstring_and_presets(result: pk.Result) -> None:
    kind: type[Analysis] = type(result.analysis)
    for heading in ("Question", "Method", "Null", "Known failure modes", "References"):
        assert kind.section(heading), heading
    for name, values in kind.Params.presets.items():
        assert kind.Params.parse(dict(values), name)


def test_a_model_of_the_other_kind_is_refused(result: pk.Result) -> None:
    model = ROWS[result.name][0]()
    model.embed_texts = None  # type: ignore[method-assign]
    with pytest.raises(CapabilityError, match="cannot embed texts; open a text-embedding model"):
        pk.run(result.name, model, **ROWS[result.name][1])
