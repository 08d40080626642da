"""Many conversations, few passes: requests are united, shares handed out, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import xarray as xr
from helpers import scripted, texts_of

from probekit.core import Capture, Embed, Forward, InputError, Patch, Trace
from probekit.engine import run_flows, run_pass, union
from probekit.reduce import Keep, MedianMagnitude, Norm

NORM, KEEP, MEDIAN = (Capture("resid_post", r) for r in (Norm(), Keep(), MedianMagnitude()))
ZERO = (Patch("resid_pre.1", 0.0),)


def test_equal_captures_are_asked_for_once() -> None:
    assert union([Forward((NORM, KEEP)), Forward((KEEP, MEDIAN)), Forward((NORM,))]) == [Forward((NORM, KEEP, MEDIAN))]


def test_patches_and_roles_need_passes_of_their_own() -> None:
    requests = [Forward((NORM,)), Forward((KEEP,), ZERO), Forward((MEDIAN,), ZERO), Forward((NORM,), model="base")]
    assert union(list(requests)) == [Forward((NORM,)), Forward((KEEP, MEDIAN), ZERO), Forward((NORM,), model="base")]


def test_other_requests_are_refused() -> None:
    with pytest.raises(InputError, match="found Embed"):
        union([Embed(("a",))])


def _flows(log: list[str]) -> dict[str, Any]:
    def once() -> Any:
        trace = yield Forward((NORM,))
        log.append(f"once {sorted(trace.data)}")
        return xr.Dataset({"a": ("layer", [1.0])})

    def twice() -> Any:
        first = yield Forward((NORM, KEEP))
        log.append(f"twice {sorted(first.data)}")
        second = yield Forward((MEDIAN,))
        log.append(f"again {sorted(second.data)}")
        return xr.Dataset({"b": ("layer", [2.0])})

    def never() -> Any:
        return xr.Dataset({"c": ("layer", [3.0])})
        yield

    return {"twice": twice(), "never": never(), "once": once()}


def test_flows_advance_together_and_see_only_their_share() -> None:
    """Two rounds, one pass each; results in the order of the flows."""
    served: list[Forward] = []
    model, batch = scripted(), texts_of((5, 4))

    def serve(request: Forward) -> Trace:
        served.append(request)
        return run_pass(model, request, batch)[0]

    log: list[str] = []
    done = run_flows(_flows(log), serve)
    assert served == [Forward((NORM, KEEP)), Forward((MEDIAN,))]
    assert log == [
        "twice ['resid_post:keep()', 'resid_post:norm()']",
        "once ['resid_post:norm()']",
        "again ['resid_post:median_magnitude()']",
    ]
    assert [(n, *d.data_vars) for n, d in done.items()] == [("twice", "b"), ("never", "c"), ("once", "a")]


def test_a_failure_closes_every_flow() -> None:
    closed: list[str] = []

    def patient(name: str) -> Any:
        try:
            yield Forward((NORM,))
        finally:
            closed.append(name)

    def serve(request: Forward) -> Trace:
        raise MemoryError("too much")

    with pytest.raises(MemoryError, match="too much"):
        run_flows({"a": patient("a"), "b": patient("b")}, serve)
    assert sorted(closed) == ["a", "b"]


def test_a_trace_holds_its_captures_and_names_them() -> None:
    trace, _ = run_pass(scripted(), Forward((NORM, KEEP)), texts_of((5, 4)))
    with pytest.raises(KeyError, match=r"no resid_post:median_magnitude\(\); it holds"):
        trace[MEDIAN]
    assert list(trace.select((KEEP,)).data) == [KEEP.key]
