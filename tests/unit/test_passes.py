"""Runs of many passes: copies of a text in rows of their own, one bar, plans that tell how many there are."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import assert_close, scripted, texts_of, tiny_model

from probekit.analysis import Analysis, Measure, Params
from probekit.core import Batch, Capture, Forward, InputError, ModelInfo, Patch, TextError
from probekit.engine import Job, check_texts, first_plan, make_plan, run_jobs, run_pass
from probekit.engine.progress import Progress
from probekit.reduce import AtPosition, Keep, Norm

LOGITS = Capture("logits", AtPosition())


class Repeated(Analysis):
    """Does it repeat?"""

    name, title = "repeated", "Repeated"
    measures = {"norm": Measure(("text",), "activation", "norm of the logits")}
    tells = True

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        return 5 if self.tells else 1

    def check_texts(self, params: Any, batch: Batch) -> None:
        if len(batch) == 3:
            raise TextError("Found 3 texts; expected another number.")

    def flow(self, params: Any, info: ModelInfo) -> Any:
        for i in range(5):
            trace = yield Forward((LOGITS,), (Patch("resid_pre.1", float(i)),) if i else ())
        return xr.Dataset({"norm": ("text", np.linalg.norm(trace[LOGITS]["value"].values, axis=-1))})


class Silent(Repeated):
    """Does it say how often?"""

    name, tells = "silent", False


def test_a_text_runs_in_several_rows_each_under_its_own_patches() -> None:
    """Rows of one pass give what each gives in a pass of its own."""
    model, batch = tiny_model("llama-grouped").model, texts_of((7, 5, 7)).select([2, 0, 1])
    rows, factors = (0, 0, 1, 0, 2), (0.0, 0.5, 1.5, None, 2.0)
    patches = [Patch("resid_pre.1", f, (1,), texts=(i,)) for i, f in enumerate(factors) if f is not None]
    trace, plan = run_pass(model, Forward((LOGITS,), tuple(patches), rows=rows), batch)
    assert trace.batch.index == (0, 1, 2, 3, 4) and (plan.n_texts, plan.n_tokens) == (5, 33)
    for row, (text, factor) in enumerate(zip(rows, factors, strict=True)):
        alone = () if factor is None else (Patch("resid_pre.1", factor, (1,)),)
        expected = run_pass(model, Forward((LOGITS,), alone, texts=(text,)), batch)[0][LOGITS]["value"].values[0]
        assert_close(trace[LOGITS]["value"].values[row], expected, atol=1e-5 * float(np.abs(expected).max()))


def test_rows_and_texts_exclude_each_other_and_rows_exist() -> None:
    with pytest.raises(InputError, match="the text of each row, or inputs; found several"):
        Forward((LOGITS,), texts=(0,), rows=(0, 0))
    with pytest.raises(InputError, match=r"names the texts \[0, 7\]; expected some of \[0, 1\]\."):
        run_pass(scripted(), Forward((LOGITS,), rows=(0, 7)), texts_of((4, 3)))
    assert Forward((LOGITS,), rows=(0, 0)).pass_key != Forward((LOGITS,), rows=(0,)).pass_key


def test_one_position_is_that_row_of_all() -> None:
    """AtPosition at logits projects nothing else and gives the same numbers; elsewhere it picks rows."""
    model, batch = tiny_model("gpt2").model, texts_of((7, 5, 9))
    for site in ("logits", "resid_post.1", "z.2"):
        every, ends = Capture(site, Keep()), np.cumsum(batch.lengths)
        captures = tuple(Capture(site, AtPosition(p)) for p in (-1, -2, 0))
        trace, _ = run_pass(model, Forward((every, *captures)), batch)
        rows = trace[every]["value"]
        for capture, places in zip(captures, (ends - 1, ends - 2, ends - np.array(batch.lengths)), strict=True):
            found = trace[capture]["value"]
            assert found.dims == ("text" if d == "token" else d for d in rows.dims) or "text" in found.dims
            expected = rows.isel(token=places).values
            assert_close(found.values, expected, atol=1e-5 * float(np.abs(expected).max()), what=f"{site} {places}")
    with pytest.raises(InputError, match="Position -6 is outside a text of 5 tokens, 0 to 4"):
        run_pass(model, Forward((Capture("logits", AtPosition(-6)),)), batch)


def test_the_plan_of_one_position_counts_one_row_per_text() -> None:
    info, batch = tiny_model("llama").model.info, texts_of((60,) * 10)
    whole = make_plan(Forward((Capture("logits", Keep()),)), batch, info, 1 << 40)
    one = make_plan(Forward((LOGITS,)), batch, info, 1 << 40)
    assert one.result_bytes == 2 * 10 * 4 * info.d_vocab and whole.result_bytes == 60 * one.result_bytes
    assert one.peak_bytes < whole.peak_bytes


def test_plans_tell_the_passes_and_results_count_them() -> None:
    """Alike passes are recorded once with their number."""
    model, batch = tiny_model("llama").model, texts_of((7, 5))
    plan = first_plan([Job(Repeated(), Params())], model.info, batch, 1 << 30)[0]
    assert plan.passes == 5 and "the first of about 5 passes" in str(plan) and "readout in this pass" in str(plan)
    single = make_plan(Forward((Capture("resid_post", Norm()),)), batch, model.info, 1 << 30)
    assert "one pass" in str(single) and "this pass" not in str(single)
    results = run_jobs([Job(Repeated(), Params())], model, batch)
    assert [p["passes"] for p in results["repeated"].provenance["plan"]] == [5]


def test_an_analysis_refuses_its_texts_before_anything_runs() -> None:
    job = Job(Repeated(), Params())
    check_texts([job], texts_of((4, 4)), None)
    with pytest.raises(TextError, match="Found 3 texts"):
        check_texts([job], texts_of((4, 4, 4)), None)


class Terminal(io.StringIO):
    """Standard error of somebody who watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("analysis", "expected", "known"),
    [(Repeated(), "5 passes", True), (Silent(), "pass 5 ", False)],
    ids=["known", "unknown"],
)
def test_many_passes_share_one_bar(
    analysis: Analysis, expected: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that is redrawn, however many passes; it ends with the last pass."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("probekit.engine.progress.REDRAW", 0.0)
    run_jobs([Job(analysis, Params())], tiny_model("llama").model, texts_of((7, 5)), progress=True)
    shown = screen.getvalue()
    assert expected in shown and shown.count("\n") == 1, shown
    assert ("pass 5 of 5" in shown) == known and ("of" in shown) == known


def test_one_pass_counts_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(shown=True) as bar:
        bar.begin(8.0)
        bar.tell(3.0)
        bar.tell(50.0)
    assert re.search(r"capture: 100%.* 8/8 GFLOP", screen.getvalue()) and screen.getvalue().count("\n") == 1


def test_nobody_watching_sees_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Not asked for, or no terminal: silence."""
    for shown in (False, True):
        run_jobs([Job(Repeated(), Params())], tiny_model("llama").model, texts_of((7,)), progress=shown)
    assert tuple(capfd.readouterr()) == ("", "")
