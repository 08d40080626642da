"""What every analysis that changes activations promises, on texts of the kind that it reads.

The counterpart of `test_analyses.py`, whose analyses read any text and look once. A new analysis with `intervenes`
needs a row in `CASES`; a missing one fails.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same, run, tiny_model

from probekit.analysis import Analysis, Finding, Result, analyses, get_analyses, load_result
from probekit.core import AXES, Batch, InputError, TextError, TokenText
from probekit.engine import Job, check_texts, first_plan
from probekit.plots import Figure, TokenStrip, figure_json

pytestmark = pytest.mark.usefixtures("quiet")

LENGTHS = (8, 6, 9, 7, 6)


def _text(ids: Any) -> TokenText:
    return TokenText(tuple(map(int, ids)), tuple(f" w{i}" for i in ids))


def singles() -> Batch:
    """Any texts."""
    rng = np.random.default_rng(0)
    return Batch(tuple(_text(rng.integers(3, 120, n)) for n in (*LENGTHS, 8)))


def pairs() -> Batch:
    """Clean and corrupted: equal but for one token and the answer at the end."""
    rng = np.random.default_rng(0)
    done = []
    for n in LENGTHS:
        clean = rng.integers(3, 120, n)
        corrupted = clean.copy()
        corrupted[[1, -1]] = (clean[[1, -1]] + rng.integers(1, 100, 2)) % 117 + 3
        done += [_text(clean), _text(corrupted)]
    return Batch(tuple(done))


def contrasts() -> Batch:
    """Five contrast pairs that part at their second token, then two neutral texts."""
    neutral = singles()
    return Batch((*pairs().texts, *neutral.texts[:2]))


def domains() -> Batch:
    """Texts of two domains."""
    rng = np.random.default_rng(0)
    texts = (_text(rng.integers(3, 120, n)) for n in (12, 10, 14, 11, 13, 12, 10, 15))
    return Batch(tuple(dataclasses.replace(t, domain="ab"[i % 2]) for i, t in enumerate(texts)))


@dataclass(frozen=True)
class Case:
    """How to run one analysis.

    Args:
        texts: makes texts of its kind.
        params: parameters that suit a tiny model.
        group: so many texts belong together and keep their order.
        trailing: so many of the last texts stay where they are.
        group_axis: the axis that runs over groups of texts, if there is one.
        n_unit: what its intervals are over.
        bad: texts that it refuses, with what the message says.
        bounds: values of parameters that are tried beside the defaults.
        by_text: whether all that depends on a text lies on the axes text and token, so that it moves with the text.
    """

    texts: Callable[[], Batch] = singles
    params: dict[str, Any] = field(default_factory=dict)
    group: int = 1
    trailing: int = 0
    group_axis: str = ""
    n_unit: str = "texts"
    bad: tuple[tuple[Callable[[Batch], Batch], str], ...] = ()
    bounds: tuple[dict[str, Any], ...] = ()
    by_text: bool = True


CASES: dict[str, Case] = {
    "activation-patching": Case(
        pairs,
        {"min_gap": 0.01},
        group=2,
        n_unit="pairs",
        bad=(
            (lambda batch: batch.select([0, 1, 2]), "found 3 texts"),
            (lambda batch: batch.select([0, 3]), "have 8 and 6 tokens"),
            (lambda batch: batch.select([0, 0]), "both end with the answer"),
        ),
        bounds=(
            {"sites": "resid_pre"},
            {"sites": "attn_out"},
            {"sites": "mlp_out"},
            {"sites": "z"},
            {"direction": "noising"},
            {"direction": "denoising"},
            {"window": 9},
            {"window": 3, "sites": "mlp_out"},
            {"min_gap": 0.001},
            {"attribution": False},
        ),
    ),
    "dormant-heads": Case(
        domains,
        {"n_permutations": 199, "n_heads": 5},
        bad=((lambda batch: Batch(batch.texts[:1] + singles().texts), "needs at least 9"),),
        bounds=(
            {"heads": "all"},
            {"n_heads": 1},
            {"removal": "first"},
            {"dormant": 0.4, "active": 0.4},
            {"dormant": 1, "active": 0},
            {"first_query": 1},
            {"n_permutations": 19},
            {"alpha": 0.5},
        ),
    ),
    "forking-paths": Case(
        params={"answer_words": "w5,w9,w30", "max_tokens": 6, "n": 4, "most": 8, "p_min": 0.06},
        n_unit="answers",
        bounds=({"spacing": 3}, {"most": 4}, {"epsilon": 0.05}, {"answer_words": "", "answer_regex": r"w(\d)"}),
        by_text=False,  # branches have an axis of their own
    ),
    "layer-ablation": Case(bounds=({"swap": False}, {"stride": 50}, {"count_first": True})),
    "sink-anatomy": Case(
        params={"horizon": 6, "tail": 1, "epsilon": 0.25, "min_magnitude": 0.0, "ratio": 4.0, "phases": 1},
        bounds=(
            {"phases": 0},
            {"phases": 8, "ratio": 1.0},
            {"top_k": 1, "tail": 0},
            {"epsilon": 0.99},
            {"ratio": 1e9, "loose_ratio": 1.0},
        ),
    ),
    "steering": Case(
        contrasts,
        {"n_neutral": 2, "layers": "1", "doses": "0.5,1", "n_controls": 2},
        group=2,
        trailing=2,
        group_axis="sample",
        n_unit="pairs",
        bad=(
            (lambda batch: batch.select(range(11)), "an odd number"),
            (lambda batch: batch.select([0, 1, 2, 3, 10, 11]), "2 contrast pairs"),
            (lambda batch: batch.select([0, 0, *range(2, 12)]), "Texts 0 and 1, a contrast pair, are the same"),
        ),
        bounds=({"position": "mean"}, {"n_controls": 1}, {"layers": "", "doses": "1"}, {"n_neutral": 0}),
    ),
}
NAMES = tuple(name for name, a in analyses().items() if a.intervenes or a.writes)
every_analysis = pytest.mark.parametrize("name", [n for n in NAMES if n in CASES])
every_movable = pytest.mark.parametrize("name", [n for n in NAMES if n in CASES and CASES[n].by_text])


def result_of(name: str, batch: Batch | None = None, **values: Any) -> Result:
    case = CASES[name]
    model = tiny_model("llama-grouped").model
    return run(name, model, batch or case.texts(), **{**case.params, **values})[name]


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
    """The first plan carries the number; what is run is at most that, and not a small part of it."""
    batch, info = CASES[name].texts(), tiny_model("llama-grouped").model.info
    job = Job(analyses()[name], _params(name))
    plan = first_plan([job], info, batch, memory_limit=1 << 30)[0]
    made = sum(p["passes"] for p in result_of(name).provenance["plan"])
    assert plan.passes / 2 <= made <= plan.passes, (made, plan.passes)
    assert made == 1 or f"the first of about {plan.passes:,} passes" in str(plan)


@every_analysis
def test_result_is_as_declared_and_finite(name: str) -> None:
    result = result_of(name)
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
    """Nothing is random that is not seeded, and the model is as it was."""
    model = tiny_model("llama-grouped").model
    before = model.weights_hash(fresh=True)
    first, second = result_of(name), result_of(name)
    assert_same(first.dataset, second.dataset)
    assert first.findings == second.findings and model.weights_hash(fresh=True) == before


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
    result = result_of(name)
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
    result = result_of(name)
    _check_findings(name, result.findings)
    assert any(f.n_unit == CASES[name].n_unit for f in result.findings)
    _check_figures(result.figures(), result.dataset.sizes.get("token", 0))


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
