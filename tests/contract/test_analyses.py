"""What every analysis promises, checked for each that is registered: no author has to write these tests."""

from __future__ import annotations

import ast
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import assert_quantities, assert_same, run, scripted, texts_of, tiny_model

from probekit.analysis import Analysis, Finding, Result, analyses, load_result
from probekit.core import AXES, Batch, TextError
from probekit.engine import Job, first_plan, run_jobs
from probekit.engine import plan as planning
from probekit.plots import Figure, TokenStrip, figure_json
from probekit.reduce import vocab_rows

pytestmark = pytest.mark.usefixtures("quiet")

NAMES = tuple(name for name, a in analyses().items() if a.only_looks())  # others: test_interventions.py
SHORT: dict[str, Any] = {"horizon": 16}  # the tests' texts are short
# Whole numbers above 100 count tokens and are tried at 64, which the texts here have; no upper bound is tried as 1e6.
MANY, SOME, UNBOUNDED = 100, 64, 1e6
LENGTHS = (24, 20, 31, 18, 40, 22)
SOURCES = ("scripted", "llama-grouped")
every_analysis = pytest.mark.parametrize("name", NAMES)
every_model = pytest.mark.parametrize("source", SOURCES)


def model_of(source: str) -> Any:
    return scripted() if source == "scripted" else tiny_model(source).model


def params_of(name: str, **values: Any) -> dict[str, Any]:
    known = analyses()[name].Params.specs()
    return {k: v for k, v in ({**SHORT, **values}).items() if k in known}


def result_of(name: str, source: str = "scripted", batch: Batch | None = None, **values: Any) -> Result:
    return run(name, model_of(source), batch or texts_of(LENGTHS), **params_of(name, **values))[name]


def test_there_are_analyses() -> None:
    assert set(NAMES) >= {"attention-sinks", "logit-lens", "massive-activations", "token-uncertainty"}


@every_analysis
@every_model
def test_plan_is_deterministic_and_hashable(name: str, source: str) -> None:
    """Equal parameters give equal requests and equal plans; the plan is plain data."""
    analysis, model, batch = analyses()[name], model_of(source), texts_of(LENGTHS)
    params = analysis.Params.parse(params_of(name), name)
    requests = [next(analysis.flow(params, model.info)) for _ in range(2)]
    assert requests[0] == requests[1] and hash(requests[0]) == hash(requests[1])
    plans = [first_plan([Job(analysis, params)], model.info, batch, memory_limit=1 << 30) for _ in range(2)]
    assert plans[0] == plans[1] and hash(plans[0][0]) == hash(plans[1][0])
    assert json.loads(json.dumps(plans[0][0].as_dict()))["n_tokens"] == sum(LENGTHS)


@every_analysis
@every_model
def test_result_is_as_declared_and_finite(name: str, source: str) -> None:
    """Variables, axes and units are those of `measures`; numbers are finite but where a measure says NaN."""
    result = result_of(name, source)
    measures = result.analysis.measures
    assert list(result.dataset.data_vars) == list(measures)
    for variable, measure in measures.items():
        array = result[variable]
        assert array.dims == measure.dims and set(array.dims) <= set(AXES)
        assert (array.attrs["units"], array.attrs["long_name"]) == (measure.unit, measure.help)
        if array.dtype.kind == "f":
            assert not np.isinf(array.values).any(), variable
            assert np.isfinite(array.values).any(), variable
            may = "NaN" in measure.help or variable in ("logprob_nats", "target_rank")
            assert may or np.isfinite(array.values).all(), f"{variable} has NaN and its help does not say where"
    for coordinate in ("text", "pos", "token_id", "token_str"):
        assert result.dataset[coordinate].dims == ("token",)


@every_analysis
@every_model
def test_text_order_changes_nothing_but_the_order(name: str, source: str) -> None:
    """Values of texts and tokens move with their texts, everything else stays, findings included."""
    batch, order = texts_of(LENGTHS), [4, 2, 0, 5, 1, 3]
    moved = Batch(tuple(batch.texts[i] for i in order))
    first, second = result_of(name, source, batch), result_of(name, source, moved)
    tokens = np.concatenate([np.arange(batch.starts[i], batch.starts[i] + batch.lengths[i]) for i in order])
    for variable, array in first.dataset.data_vars.items():
        expected = array.isel(token=tokens) if "token" in array.dims else array
        expected = expected.isel(text=order) if "text" in array.dims else expected
        _same_values(second[str(variable)], expected, str(variable))
    _same_findings(second.findings, first.findings)


@every_analysis
def test_corpus_index_changes_nothing(name: str) -> None:
    """Texts cut from a larger corpus, out of order, give the same numbers as on their own."""
    batch = texts_of(LENGTHS)
    order = [4, 2, 0, 5, 1, 3]
    first = result_of(name, batch=Batch(tuple(batch.texts[i] for i in order)))
    second = result_of(name, batch=batch.select(order))
    for variable, array in first.dataset.data_vars.items():
        _same_values(second[str(variable)], array, str(variable))
    _same_findings(second.findings, first.findings)


@every_analysis
def test_chunk_size_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of queries, chunks of tokens and layers of any size: the same result."""
    batch, plain = texts_of(LENGTHS), result_of(name)
    for block, size in ((1, 1), (7, 5), (1000, 1000)):
        for constant in ("TOKENS", "ROWS", "STRIP"):
            monkeypatch.setattr(vocab_rows, constant, size)
        other = run(name, scripted().with_block(block), batch, **params_of(name))[name]
        for variable, array in plain.dataset.data_vars.items():
            _same_values(other[str(variable)], array, str(variable))
        _same_findings(other.findings, plain.findings)


@every_analysis
def test_padding_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts padded to the longest in one batch, or each alone: the same result."""
    results = []
    for alike, tokens, n_batches in ((0.0, 1 << 20, 1), (0.0, 1, len(LENGTHS))):
        monkeypatch.setattr(planning, "ALIKE", alike)
        monkeypatch.setattr(planning, "BATCH_TOKENS", tokens)
        results.append(result_of(name, "llama-grouped"))
        assert len(results[-1].provenance["plan"][0]["batches"]) == n_batches
    for variable, array in results[1].dataset.data_vars.items():
        _same_values(results[0][str(variable)], array, str(variable))
    _same_findings(results[0].findings, results[1].findings)


def _same_values(found: xr.DataArray, expected: xr.DataArray, what: str) -> None:
    if expected.dtype.kind == "f":
        finite = np.abs(expected.values[np.isfinite(expected.values)]).max(initial=0.0)
        np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-5 * finite, err_msg=what)
    else:
        assert np.array_equal(found.values, expected.values), what


def _same_findings(found: list[Finding], expected: list[Finding]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.unit, a.n, a.n_unit, a.null_meaning) == (b.unit, b.n, b.n_unit, b.null_meaning)
        for x, y in ((a.value, b.value), (a.null, b.null), *zip(a.ci95 or (), b.ci95 or (), strict=True)):
            assert x == pytest.approx(y, rel=1e-4, abs=1e-5), (a, b)


@every_analysis
@every_model
def test_saved_result_is_the_result_bit_for_bit(name: str, source: str, tmp_path: Path) -> None:
    result = result_of(name, source)
    loaded = load_result(result.save(tmp_path / "r.zarr"))
    assert_same(loaded.dataset, result.dataset)
    assert (loaded.params, loaded.analysis) == (result.params, result.analysis)
    assert loaded.provenance == json.loads(json.dumps(result.provenance))
    assert loaded.findings == result.findings
    assert {k: _plain(d) for k, d in loaded.figures().items()} == {k: _plain(d) for k, d in result.figures().items()}


def _plain(drawing: Figure | TokenStrip) -> str:
    if isinstance(drawing, Figure):
        return json.dumps(figure_json(drawing), sort_keys=True, allow_nan=False)
    quantities = [(q.label, q.unit, q.scale, q.low, q.high, np.asarray(q.values).tolist()) for q in drawing.quantities]
    return repr((drawing.title, drawing.tokens, drawing.texts.tolist(), quantities, drawing.caption, drawing.notes))


@every_analysis
@every_model
@pytest.mark.parametrize("lengths", [LENGTHS, (40,), (18,), (24, 20)], ids=str)
def test_findings_carry_their_evidence(name: str, source: str, lengths: tuple[int, ...]) -> None:
    """Claim, value, unit, null and its meaning, n; an interval around the value whenever n > 1; what is measured."""
    findings = result_of(name, source, texts_of(lengths)).findings
    assert findings
    assert_quantities(findings)
    for f in findings:
        assert f.analysis == name and f.claim.endswith(".") and "nan" not in f.claim.lower(), f.claim
        assert f.unit and f.null_meaning and f.n_unit and f.n >= 1
        assert np.isfinite([f.value, f.null]).all(), f
        assert (f.ci95 is None) == (f.n == 1), f
        if f.ci95 is not None:
            assert f.ci95[0] <= f.value <= f.ci95[1], f
        assert json.loads(json.dumps(f.as_dict(), allow_nan=False))["value"] == f.value
        if len(lengths) >= 5:
            assert (f.n, f.n_unit) == (len(lengths), "texts")


@every_analysis
@every_model
@pytest.mark.parametrize("lengths", [LENGTHS, (18,)], ids=str)
def test_figures_explain_themselves(name: str, source: str, lengths: tuple[int, ...]) -> None:
    """Title, caption with model and n, alternative text, valid JSON; strips as long as the text."""
    drawings = result_of(name, source, texts_of(lengths)).figures()
    assert drawings and any(isinstance(d, TokenStrip) for d in drawings.values())
    for key, drawing in drawings.items():
        assert drawing.title and drawing.caption and drawing.alt, key
        assert f"{len(lengths)} text" in drawing.caption, key
        if isinstance(drawing, TokenStrip):
            assert len(drawing.tokens) == len(drawing.texts) == sum(lengths)
            assert all(len(q.values) == sum(lengths) and q.label and q.unit for q in drawing.quantities), key
            assert len(drawing.notes) in (0, sum(lengths))
        else:
            figure = json.loads(json.dumps(figure_json(drawing), allow_nan=False))
            assert figure["data"], key
            axes = [v for k, v in figure["layout"].items() if k.startswith(("xaxis", "yaxis"))]
            named = [a for a in axes if a.get("visible", True) and a.get("autorange") != "reversed"]  # bars with labels
            assert named and all(a.get("title", {}).get("text") for a in named), key


def test_every_finding_that_is_built_names_its_quantity() -> None:
    """Also those that no test's texts bring about, and those of the analyses that are held to contracts elsewhere."""
    root, built = Path(__file__).parents[2], 0
    for path in sorted([*(root / "probekit").rglob("*.py"), *(root / "analyses").glob("*.py")]):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("Finding", "pk.Finding"):
                named = {k.arg for k in call.keywords}  # None stands for **, as of sticky-tokens
                assert named & {"quantity", None}, f"{path.relative_to(root)}:{call.lineno} names no quantity"
                built += 1
    assert built > 100


def _bounds() -> list[Any]:
    cases = []
    for name in NAMES:
        for spec in analyses()[name].Params.specs().values():
            if spec.type is str and not spec.choices:
                continue  # names of files, such as that of a lens, have no bounds
            high = UNBOUNDED if spec.high is None else spec.high
            high = SOME if spec.type is int and high > MANY else high
            for value in spec.choices or (spec.low, high):
                if value is not None:
                    cases.append(pytest.param(name, spec.name, spec.type(value), id=f"{name} {spec.name}={value}"))
    return cases


@pytest.mark.parametrize(("name", "parameter", "value"), _bounds())
@every_model
def test_parameters_run_at_their_bounds(name: str, parameter: str, value: Any, source: str) -> None:
    """Lowest and highest value of every parameter: finite findings and figures that draw."""
    result = result_of(name, source, texts_of((90, 70)), **{parameter: value})
    assert dataclasses.asdict(result.params)[parameter] == value
    assert all(np.isfinite([f.value, f.null]).all() for f in result.findings), result.findings
    assert all(_plain(d) for d in result.figures().values())


@every_analysis
@every_model
def test_too_short_text_is_refused_by_index_and_length(name: str, source: str) -> None:
    """The shortest text that is allowed runs; one token less is refused before anything runs."""
    analysis = analyses()[name]
    params = analysis.Params.parse(params_of(name), name)
    least = analysis.min_tokens(params)
    assert least >= 2
    run_jobs([Job(analysis, params)], model_of(source), texts_of((least,)))
    with pytest.raises(TextError, match=rf"Text 1 has {least - 1} tokens; {name} needs at least {least}"):
        run_jobs([Job(analysis, params)], model_of(source), texts_of((least, least - 1)))


@every_analysis
def test_docstring_has_its_sections(name: str) -> None:
    analysis: type[Analysis] = type(analyses()[name])
    for heading in ("Question", "Method", "Null", "Known failure modes", "References"):
        assert len(analysis.section(heading)) > 20, heading
    assert analysis.summary().endswith("?") and analysis.section("Nonsense") == ""
    assert all(spec.help for spec in analysis.Params.specs().values())


@every_analysis
@every_model
def test_takes_less_than_two_seconds(name: str, source: str) -> None:
    """Pass, findings and figures on six short texts; processor time, so that a busy machine does not matter."""
    result_of(name, source)  # imports and first use
    start = time.process_time()
    result = result_of(name, source)
    assert result.findings and result.figures()
    assert time.process_time() - start < 2
