"""What every analysis promises that changes activations, lets a model write or compares models, on texts of its kind.

The counterpart of `test_analyses.py`, whose analyses read any text and look once. A new analysis with `intervenes`,
`writes` or `roles` needs a row in `CASES` (`tests/intervention_cases.py`); a missing one fails. The further models of
one with roles are the tiny model with changed weights, each role's its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_quantities, assert_same, copy_of, tiny_model, words_tokenizer
from intervention_cases import CASES

from probekit.analysis import Analysis, Finding, Result, analyses, get_analyses, load_result
from probekit.backends.transformers import TransformersModel
from probekit.core import AXES, Batch, InputError, TextError
from probekit.engine import Job, check_texts, first_plan, run_jobs
from probekit.plots import Figure, TokenStrip, figure_json

pytestmark = pytest.mark.usefixtures("quiet")

NAMES = tuple(name for name, a in analyses().items() if a.intervenes or a.writes or a.roles)
every_analysis = pytest.mark.parametrize("name", [n for n in NAMES if n in CASES])
every_movable = pytest.mark.parametrize("name", [n for n in NAMES if n in CASES and CASES[n].by_text])
every_comparison = pytest.mark.parametrize("name", [n for n in NAMES if n in CASES and analyses()[n].roles])


@functools.cache
def further_model(role: str) -> TransformersModel:
    """The tiny model with the weights of its MLPs changed, in a way of each role's own."""
    module = copy_of("llama-grouped")
    generator = torch.Generator().manual_seed(len(role) + ord(role[0]))
    with torch.no_grad():
        for parameter_name, parameter in sorted(module.named_parameters()):
            if "mlp" in parameter_name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return TransformersModel.from_loaded(module, words_tokenizer(), name=f"tiny-{role}").load()


def further_models(name: str) -> dict[str, TransformersModel]:
    """A model for each role of an analysis."""
    return {role: further_model(role) for role in analyses()[name].roles}


def result_of(name: str, batch: Batch | None = None, **values: Any) -> Result:
    case, analysis = CASES[name], analyses()[name]
    job = Job(analysis, analysis.Params.parse({**case.params, **values}, name))
    model = tiny_model("llama-grouped").model
    return run_jobs([job], model, batch or case.texts(), others=further_models(name))[name]


@functools.cache
def usual_result(name: str) -> Result:
    """The result that several tests look at."""
    return result_of(name)


def _params(name: str) -> Any:
    analysis = analyses()[name]
    return analysis.Params.parse(CASES[name].params, name)


def test_every_analysis_that_intervenes_has_a_row() -> None:
    assert set(NAMES) == set(CASES)


def test_they_run_when_named_and_not_with_all() -> None:
    assert not {a.name for a in get_analyses("all")} & set(NAMES)
    assert [a.name for a in get_analyses(["activation-patching", "logit-lens"])] == [
        "activation-patching",
        "logit-lens",
    ]


@every_analysis
def test_first_request_is_deterministic_and_hashable(name: str) -> None:
    analysis, info = analyses()[name], tiny_model("llama-grouped").model.info
    requests = [next(analysis.flow(_params(name), info)) for _ in range(2)]
    assert requests[0] == requests[1] and hash(requests[0]) == hash(requests[1])


@every_analysis
def test_plan_tells_about_how_many_passes_there_are(name: str) -> None:
    """The first plan carries the number; what is run is at most that, and not a small part (rounds of writing aside)."""
    batch, info = CASES[name].texts(), tiny_model("llama-grouped").model.info
    job = Job(analyses()[name], _params(name))
    plan = first_plan([job], info, batch, memory_limit=1 << 30)[0]
    made = sum(p["passes"] for p in usual_result(name).provenance["plan"])
    assert made <= plan.passes and (job.analysis.writes or made >= plan.passes / 2), (made, plan.passes)
    assert made == 1 or f"the first of about {plan.passes:,} passes" in str(plan)


@every_analysis
def test_result_is_as_declared_and_finite(name: str) -> None:
    result = usual_result(name)
    measures = result.analysis.measures
    assert list(result.dataset.data_vars) == list(measures)
    for variable, measure in measures.items():
        array = result[variable]
        assert array.dims == measure.dims and set(array.dims) <= set(AXES)
        assert (array.attrs["units"], array.attrs["long_name"]) == (measure.unit, measure.help)
        if array.dtype.kind == "f":
            assert not np.isinf(array.values).any(), variable
            assert np.isfinite(array.values).any(), variable
            assert "NaN" in measure.help or np.isfinite(array.values).all(), (
                f"{variable} has NaN; its help does not say"
            )


@every_analysis
def test_same_again(name: str) -> None:
    """Nothing is random that is not seeded, and the models are as they were."""
    models = [tiny_model("llama-grouped").model, *further_models(name).values()]
    before = [model.weights_hash(fresh=True) for model in models]
    first, second = usual_result(name), result_of(name)
    assert_same(first.dataset, second.dataset)
    assert first.findings == second.findings
    assert [model.weights_hash(fresh=True) for model in models] == before


@every_movable
def test_order_changes_nothing_but_the_order(name: str) -> None:
    """Values of texts and tokens move with their texts; findings stay."""
    batch, group, n_moved = CASES[name].texts(), CASES[name].group, len(CASES[name].texts()) - CASES[name].trailing
    n_groups = n_moved // group
    groups = [n_groups - 1, *range(n_groups - 1)]
    order = [group * g + i for g in groups for i in range(group)]
    order += range(n_moved, len(batch))
    first, second = result_of(name, batch), result_of(name, Batch(tuple(batch.texts[i] for i in order)))
    tokens = np.concatenate([np.arange(batch.starts[i], batch.starts[i] + batch.lengths[i]) for i in order])
    for variable, array in first.dataset.data_vars.items():
        expected = array.isel(token=tokens) if "token" in array.dims else array
        # Trailing texts have the axis `text` to themselves, and what moves is then a case.
        trailing = n_moved < len(batch)
        expected = expected.isel(text=order) if "text" in array.dims and not trailing else expected
        expected = expected.isel(case=groups) if "case" in array.dims and trailing else expected
        _same_values(second[str(variable)].values, expected.values, str(variable))
    _same_findings(second.findings, first.findings)


@every_movable
def test_corpus_index_changes_nothing(name: str) -> None:
    """Texts cut from a larger corpus give the same numbers as on their own."""
    batch, group = CASES[name].texts(), CASES[name].group
    order = list(range(group, len(batch)))
    first = result_of(name, Batch(tuple(batch.texts[i] for i in order)))
    second = result_of(name, batch.select(order))
    for variable, array in first.dataset.data_vars.items():
        _same_values(second[str(variable)].values, array.values, str(variable))
    _same_findings(second.findings, first.findings)


def _same_values(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    if expected.dtype.kind == "f":
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=1.0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale, err_msg=what)
    else:
        assert np.array_equal(found, expected), what


def _same_findings(found: list[Finding], expected: list[Finding]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.unit, a.n, a.n_unit, a.null_meaning) == (b.unit, b.n, b.n_unit, b.null_meaning)
        for x, y in ((a.value, b.value), (a.null, b.null), *zip(a.ci95 or (), b.ci95 or (), strict=True)):
            assert x == pytest.approx(y, rel=1e-3, abs=1e-4), (a, b)


@every_analysis
def test_saved_result_is_the_result_bit_for_bit(name: str, tmp_path: Path) -> None:
    result = usual_result(name)
    loaded = load_result(result.save(tmp_path / "r.zarr"))
    assert_same(loaded.dataset, result.dataset)
    assert (loaded.params, loaded.analysis) == (result.params, result.analysis)
    assert loaded.findings == result.findings
    assert {k: _plain(d) for k, d in loaded.figures().items()} == {k: _plain(d) for k, d in result.figures().items()}


def _plain(drawing: Figure | TokenStrip) -> str:
    if isinstance(drawing, Figure):
        return json.dumps(figure_json(drawing), sort_keys=True, allow_nan=False)
    quantities = [(q.label, q.unit, q.scale, q.low, q.high, np.asarray(q.values).tolist()) for q in drawing.quantities]
    return repr((drawing.title, drawing.tokens, drawing.texts.tolist(), quantities, drawing.caption, drawing.notes))


def _check_findings(name: str, findings: list[Finding]) -> None:
    assert findings
    assert_quantities(findings)
    for f in findings:
        assert f.analysis == name and f.claim.endswith(".") and "nan" not in f.claim.lower().split(), f.claim
        assert f.unit and f.null_meaning and f.n_unit and f.n >= 1
        assert np.isfinite([f.value, f.null]).all(), f
        assert (f.ci95 is None) == (f.n == 1), f
        assert f.ci95 is None or f.ci95[0] <= f.value <= f.ci95[1], f
        assert json.loads(json.dumps(f.as_dict(), allow_nan=False))["value"] == f.value


def _check_figures(drawings: dict[str, Any], n_tokens: int) -> None:
    assert drawings
    for key, drawing in drawings.items():
        assert drawing.title and drawing.caption and drawing.alt, key
        assert "text" in drawing.caption, key
        if isinstance(drawing, TokenStrip):
            assert len(drawing.tokens) == len(drawing.texts) == n_tokens
            continue
        figure = json.loads(json.dumps(figure_json(drawing), allow_nan=False))
        assert figure["data"], key
        axes = [v for k, v in figure["layout"].items() if k.startswith(("xaxis", "yaxis"))]
        assert axes and all(a.get("title", {}).get("text") for a in axes if a.get("visible", True)), key


@every_analysis
def test_findings_and_figures_carry_their_evidence(name: str) -> None:
    result = usual_result(name)
    _check_findings(name, result.findings)
    assert any(f.n_unit == CASES[name].n_unit for f in result.findings)
    _check_figures(result.figures(), result.dataset.sizes.get("token", 0))


@every_comparison
def test_every_role_has_a_part(name: str) -> None:
    """A result says which models filled the roles; with another one in any of them it is another result."""
    case, analysis, model = CASES[name], analyses()[name], tiny_model("llama-grouped").model
    job, others = Job(analysis, _params(name)), further_models(name)
    first = usual_result(name)
    told = first.provenance["other models"]
    assert {role: told[role]["model"]["name"] for role in told} == {role: f"tiny-{role}" for role in analysis.roles}
    for role in analysis.roles:
        second = run_jobs([job], model, case.texts(), others=others | {role: further_model("another")})[name]
        assert not second.dataset.equals(first.dataset), role


@every_comparison
def test_a_missing_role_is_refused_before_anything_runs(name: str) -> None:
    analysis, model, others = analyses()[name], tiny_model("llama-grouped").model, further_models(name)
    for role in analysis.roles:
        with pytest.raises(InputError, match=f"in the role '{role}'"):
            given = {k: m for k, m in others.items() if k != role}
            run_jobs([Job(analysis, _params(name))], model, CASES[name].texts(), others=given)


@every_comparison
def test_the_same_model_in_every_role_is_no_finding_against_its_null(name: str) -> None:
    """Nothing lies farther from its null than the interval reaches, where there is nothing to find."""
    model = tiny_model("llama-grouped").model
    job = Job(analyses()[name], _params(name))
    found = run_jobs([job], model, CASES[name].texts(), others=dict.fromkeys(analyses()[name].roles, model))[name]
    _check_findings(name, found.findings)
    for f in found.findings:
        assert f.ci95 is None or f.ci95[0] <= f.null <= f.ci95[1], f
    _check_figures(found.figures(), found.dataset.sizes.get("token", 0))


def _bounds() -> list[Any]:
    return [
        pytest.param(name, values, id=f"{name} {values}")
        for name, case in CASES.items()
        if name in NAMES
        for values in case.bounds
    ]


@pytest.mark.parametrize(("name", "values"), _bounds())
def test_parameters_run_at_their_bounds(name: str, values: dict[str, Any]) -> None:
    result = result_of(name, **values)
    assert values.items() <= dataclasses.asdict(result.params).items()
    _check_findings(name, result.findings)
    _check_figures(result.figures(), result.dataset.sizes.get("token", 0))


@every_analysis
def test_parameters_out_of_bounds_are_refused(name: str) -> None:
    for spec in analyses()[name].Params.specs().values():
        wrong: list[Any] = [spec.low - 1] if spec.low is not None else []
        wrong += [spec.high + 1] if spec.high is not None else []
        wrong += ["no such choice"] if spec.choices else []
        for value in wrong:
            with pytest.raises(InputError, match=f"parameter '{spec.name}' must be"):
                analyses()[name].Params.parse({spec.name: value}, name)


@every_analysis
def test_texts_that_do_not_fit_are_refused_before_anything_runs(name: str) -> None:
    case, job = CASES[name], Job(analyses()[name], _params(name))
    for spoil, message in case.bad:
        with pytest.raises(TextError, match=message):
            check_texts([job], spoil(case.texts()), None)


@every_analysis
def test_docstring_has_its_sections(name: str) -> None:
    analysis: type[Analysis] = type(analyses()[name])
    for heading in ("Question", "Method", "Null", "Known failure modes", "References"):
        assert len(analysis.section(heading)) > 20, heading
    assert analysis.summary().endswith("?")
    assert all(spec.help for spec in analysis.Params.specs().values())
