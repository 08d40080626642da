"""A new phenomenon is one new file: under 40 lines, and everything else follows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import Tiny, assert_close, assert_same, run, scripted, texts_of

from probekit.analysis import analyses, get_analysis, load_file, load_result, temporary_registrations
from probekit.core import InputError, UnknownName
from probekit.plots import TokenStrip

FILE = Path(__file__).parent / "plugins" / "mean_norm.py"


@pytest.fixture
def loaded() -> Iterator[None]:
    with temporary_registrations():
        load_file(FILE)
        yield


def test_file_is_short() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.usefixtures("loaded")
def test_one_file_gives_numbers_findings_figures_and_a_saved_result(tiny_llama: Tiny, tmp_path: Path) -> None:
    batch = texts_of((9, 4, 7, 8, 12))
    result = run("mean-norm", tiny_llama.model, batch)["mean-norm"]
    weight = tiny_llama.module.get_input_embeddings().weight.detach().numpy()
    norms = np.linalg.norm(weight[batch.ids], axis=1)
    assert_close(result["norm"], norms, rtol=1e-6)
    assert result["norm"].attrs["units"] == "activation"
    (finding,) = result.findings
    assert finding.value == pytest.approx(norms.mean(), rel=1e-6)
    assert (finding.n, finding.n_unit, finding.analysis) == (5, "texts", "mean-norm")
    strip = result.figures()["strip"]
    assert isinstance(strip, TokenStrip) and len(strip.tokens) == batch.n_tokens
    result.save(tmp_path / "saved.zarr")
    assert_same(load_result(tmp_path / "saved.zarr").dataset, result.dataset)


@pytest.mark.usefixtures("loaded")
def test_it_runs_beside_the_others_in_one_pass(tiny_llama: Tiny) -> None:
    """All that only look and this one, one plan; the result is what it is alone."""
    batch = texts_of((20, 24))
    results = run("all", tiny_llama.model, batch, horizon=16)
    assert len(results) > 5 and len(results["mean-norm"].provenance["plan"]) == 1
    assert_same(results["mean-norm"].dataset, run("mean-norm", tiny_llama.model, batch)["mean-norm"].dataset)


def test_registration_ends_with_the_block() -> None:
    before = set(analyses())
    with temporary_registrations():
        load_file(FILE)
        load_file(FILE)  # again, as a notebook does
        assert set(analyses()) == before | {"mean-norm"}
    assert set(analyses()) == before
    with pytest.raises(UnknownName, match="Unknown analysis 'mean-norm'"):
        get_analysis("mean-norm")


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    thief = tmp_path / "thief.py"
    thief.write_text(FILE.read_text(encoding="utf-8").replace('"mean-norm"', '"logit-lens"'), encoding="utf-8")
    with temporary_registrations(), pytest.raises(ValueError, match=r"'logit-lens' belongs to probekit\.phenomena"):
        load_file(thief)
    with pytest.raises(InputError, match="Expected a Python file"):
        load_file(tmp_path / "nothing.py")


def test_a_name_that_is_taken_is_refused_in_a_fresh_interpreter(tmp_path: Path) -> None:
    """The thief is refused, not the analysis that was there."""
    thief = tmp_path / "thief.py"
    thief.write_text(FILE.read_text(encoding="utf-8").replace('"mean-norm"', '"logit-lens"'), encoding="utf-8")
    code = f"from probekit.analysis import load_file; load_file({str(thief)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FILE.parents[3])
    assert "'logit-lens' belongs to probekit.phenomena" in done.stderr


def test_a_second_model_is_not_silently_the_first(tmp_path: Path) -> None:
    """A request for another role is refused where the run has one model."""
    two = tmp_path / "two.py"
    source = FILE.read_text(encoding="utf-8").replace("Forward((SEEN,))", 'Forward((SEEN,), model="base")')
    two.write_text(source, encoding="utf-8")
    with temporary_registrations():
        load_file(two)
        with pytest.raises(InputError, match="role 'base'; this run has model"):
            run("mean-norm", scripted(), texts_of((5,)))
