"""Texts that an analysis makes itself, and what passes are said to be for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_close, see, texts_of, tiny_model

from probekit.core import Batch, Capture, Forward, InputError, Patch, TokenText
from probekit.engine import run_pass
from probekit.engine.lockstep import run_flows, union
from probekit.reduce import Keep, Norm
from probekit.reporting.tables import provenance_groups

NORM = Capture("resid_post", Norm())


def test_inputs_run_in_the_place_of_the_texts() -> None:
    model, batch = tiny_model("llama").model, texts_of((9, 4))
    trace, plan = run_pass(model, Forward((NORM,), inputs=((5, 6, 7), (8, 8))), batch)
    own = Batch((TokenText((5, 6, 7), ("", "", "")), TokenText((8, 8), ("", ""))))
    assert (trace.batch.lengths, plan.n_tokens) == ((3, 2), 5)
    assert [t.strings[0].strip() for t in trace.batch] == ["w5", "w8"]
    assert_close(trace[NORM]["norm"], see(model, [NORM], own)[0]["norm"].values, rtol=1e-6)


def test_patches_of_made_texts_count_them() -> None:
    model, keep = tiny_model("llama").model, Capture("resid_post.0", Keep())
    request = Forward((keep,), (Patch("resid_post.0", 0.0, texts=(1,)),), inputs=((5, 6), (7, 8)))
    values = run_pass(model, request, texts_of((9,)))[0][keep]["value"].values[0]
    assert np.abs(values[:2]).min() > 0 and np.abs(values[2:]).max() == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"inputs": ()}, "at least one"),
        ({"inputs": ((),)}, "at least one"),
        ({"inputs": ((3,),), "rows": (0,)}, "found several"),
        ({"texts": (0,), "rows": (0,)}, "found several"),
    ],
)
def test_requests_that_make_no_sense_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Forward((NORM,), **how)


@pytest.mark.parametrize(("ids", "message"), [((500,), "outside the vocabulary"), ((3,) * 300, "300 tokens")])
def test_inputs_that_the_model_cannot_read_are_refused(ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_pass(tiny_model("llama").model, Forward((NORM,), inputs=(ids,)), texts_of((4,)))


def test_reasons_do_not_keep_requests_apart() -> None:
    """Two analyses that want the same pass for reasons of their own share it, and both reasons are told."""
    patch = (Patch("resid_post.0", 0.0),)
    one, two = Forward((NORM,), patch, why="to see"), Forward((Capture("embed", Norm()),), patch, why="to know")
    assert Forward((NORM,), why="a") == Forward((NORM,), why="b")
    (both,) = union([one, two])
    assert (both.why, len(both.captures)) == ("to see; to know", 2)
    assert [r.why for r in union([one, one])] == ["to see"]
    assert len(union([Forward((NORM,)), Forward((NORM,), inputs=((3, 4),))])) == 2


def test_the_report_says_how_many_passes_ran_and_why() -> None:
    model, batch, served = tiny_model("llama").model, texts_of((6, 5)), []

    def flow() -> Any:
        yield Forward((NORM,))
        for layer in range(3):
            yield Forward((NORM,), (Patch(("resid_post", layer), 0.0),), why="a block silenced")
        return None

    def serve(request: Forward) -> Any:
        trace, plan = run_pass(model, request, batch)
        served.append(plan.as_dict())
        return trace

    run_flows({"a": flow()}, serve)
    groups = dict(provenance_groups({"plan": served, "model": {"name": "tiny"}}))
    rows = dict(groups["passes"])
    assert rows["in all"] == "4 passes through the model"
    assert rows["a block silenced"].startswith("3 passes, 33 tokens, at most")
    assert any("shared by all" in why and what.startswith("1 pass, 11 tokens") for why, what in rows.items())
