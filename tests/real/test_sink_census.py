"""The census of attention sinks on SmolLM2-135M-Instruct, against rates measured beforehand.

Reference values come from an independent script: 40 windows of 64 tokens of licence text, T = 64, epsilon = 0.3. Ten
other pieces of licence text are read here, so tolerances are a fifth of the value, and the interval of ten texts where
that is wider. The embedded weights went through 4-bit quantisation; nothing here is a published number.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probekit as pk
from probekit.analysis import Result
from probekit.analysis.registry import temporary_registrations

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]
ANALYSES = str(Path(__file__).parents[2] / "analyses")
EXPECTED = {
    "natural": 70.9,
    "natural with BOS": 63.2,
    "random": 78.4,
    "random with BOS": 66.4,
    "repeated with BOS": 46.2,
}
BY_EPSILON = {0.1: 87.9, 0.2: 81.8, 0.3: 70.9, 0.4: 57.4, 0.5: 44.7}
MODEL = "smollm2-135m-instruct"
Found = tuple[dict[str, np.ndarray], Result]


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The script as a module; what it registers is forgotten afterwards."""
    before = set(sys.modules)
    with temporary_registrations(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ANALYSES)
        yield importlib.import_module("sink_census")
    for name in set(sys.modules) - before:
        if name in ("sink_census", "sink_census_tables", "corpora", "study_command"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def found(study: Any, smol: Any, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One run: ten openings of licence text, and ten made texts of each kind."""
    pieces = study.python_texts(30, n_chars=400)["licence"][::3]
    ran = study.census([smol], {"licence": pieces}, 10).run(tmp_path_factory.mktemp("census"))
    (results,) = ran.results.values()
    assert study.table(ran)["rate"].sizes["case"] == 7 + 17
    return study.rates(MODEL, results["attention-sinks"]), results["attention-sinks"]


def test_rates_of_natural_random_and_repeated_texts(found: Found) -> None:
    rows, result = found
    for case, rates in rows.items():
        mean = pk.stats.text_mean(rates)
        assert mean.ci95 is not None
        print(f"{case}: {mean.value:.1f} %, interval {mean.ci95[0]:.1f} to {mean.ci95[1]:.1f}, n = {mean.n}")
        expected = EXPECTED.get(case.split(", ")[1], EXPECTED["natural"])
        allowed = max(0.2 * expected, (mean.ci95[1] - mean.ci95[0]) / 2)
        if case.endswith("repeated"):
            assert rates.max() < 1, "equal tokens, equal keys: only the tail could look like a sink"
        else:
            assert abs(mean.value - expected) < allowed, case
    natural, licence = (rows[f"smollm2-135m-instruct, {case}"] for case in ("natural", "licence"))
    assert natural == pytest.approx(licence, abs=1e-3), "the same texts, read once more among the made ones"
    assert float(result["made_rate_other"].sel(case="repeated").max()) < 1


def test_rates_by_epsilon(found: Found) -> None:
    sweep = found[1]["sink_rate_by_epsilon"]
    here = {e: float(sweep.sel(threshold=e, method="nearest")) for e in BY_EPSILON}
    print(here)
    assert here == pytest.approx(BY_EPSILON, rel=0.2)


def test_profile_over_depth(found: Found) -> None:
    """None in blocks 0 and 1, a phase in 3 to 9, none in 10 and 11, a phase from 12 to the end."""
    rates = 100 * found[1]["sink_rate"].mean(("text", "head")).values
    print(rates.round().tolist())
    assert rates[:2].max() < 5 and rates[2] < 40 and rates[10:12].max() < 10
    assert rates[3:10].min() > 30 and 45 < rates[3:10].mean() < 80
    assert rates[12:].min() > 55 and rates[12:].mean() > 80


def test_rates_fall_with_length(found: Found) -> None:
    rates = found[1]["sink_rate_by_length"]
    assert (rates["query"].values + 1).tolist() == [8, 16, 32, 64]
    mean = rates.mean("text").values
    assert (np.diff(mean) < 0).all() and mean[-1] == pytest.approx(100 * float(found[1]["sink_rate"].mean()), abs=1e-3)


def test_report_puts_published_rates_beside(study: Any, found: Found, tmp_path: Path) -> None:
    rows, result = found
    census = pk.result_of("sink-census", study.table_of(rows), result.provenance)
    assert [f.where["case"] for f in census.findings] == list(rows)
    published = census["published"].dropna("case")
    assert float(published.sel(case="Mistral-7B, random")) == 75.21 and published.size == 17
    page = Path(pk.report([census, result], tmp_path / "report")).read_text(encoding="utf-8")
    assert "GPT2-XL, repeated" in page and "made texts: random and repeated tokens" in page


def test_options_are_read(study: Any, smol: Any, tmp_path: Path) -> None:
    """A corpus is a name and a file; texts without T + 1 tokens are left out, and a domain without any is refused."""
    import argparse

    from study_command import corpus_of

    path = tmp_path / "own.txt"
    path.write_text("too short", encoding="utf-8")
    assert corpus_of(f"own={path}") == ("own", ["too short"])
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be read"):
        corpus_of(f"own={tmp_path / 'none.txt'}")
    texts = {"own": ["too short"], "other": ["three four " * 60]}
    refused = str(study.census([smol], texts, 3).plan())
    assert "cannot run: No text of 'own' has 65 tokens" in refused
