"""Many analyses, one model: every round, all wait for one pass that serves them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from probekit.core import Forward, InputError, Request, Trace

if TYPE_CHECKING:
    import xarray as xr

    from probekit.analysis import Flow

Serve = Callable[[Forward], Trace]


def union(requests: list[Request]) -> list[Forward]:
    """The fewest passes that serve all requests: one per model role and set of patches, captures united.

    Raises:
        InputError: a request is of a kind that no pass can serve.
    """
    merged: dict[object, Forward] = {}
    for request in requests:
        if not isinstance(request, Forward):
            raise InputError(f"Expected an analysis to yield Forward requests, found {type(request).__name__}.")
        before = merged.get(request.pass_key)
        captures = dict.fromkeys([*(before.captures if before else ()), *request.captures])
        why = dict.fromkeys(w for w in (before.why if before else "", request.why) if w)
        merged[request.pass_key] = replace(request, captures=tuple(captures), why="; ".join(why))
    return list(merged.values())


def run_flows(flows: Mapping[str, Flow], serve: Serve) -> dict[str, xr.Dataset]:
    """Advance all conversations together until each has returned its result.

    Args:
        flows: by name, generators that yield requests, are sent traces and return datasets.
        serve: runs one pass and returns its trace.

    Returns:
        The datasets, by name, in the order of `flows`.
    """
    waiting: dict[str, tuple[Flow, Request]] = {}
    done: dict[str, xr.Dataset] = {}
    try:
        for name, flow in flows.items():
            _advance(name, flow, None, waiting, done)
        while waiting:
            round_ = dict(waiting)
            waiting.clear()
            traces = {p.pass_key: serve(p) for p in union([request for _, request in round_.values()])}
            for name, (flow, request) in round_.items():
                assert isinstance(request, Forward)
                _advance(name, flow, traces[request.pass_key].select(request.captures), waiting, done)
    finally:
        for flow in flows.values():
            flow.close()
    return {name: done[name] for name in flows}


def _advance(
    name: str,
    flow: Flow,
    trace: Trace | None,
    waiting: dict[str, tuple[Flow, Request]],
    done: dict[str, xr.Dataset],
) -> None:
    try:
        request = next(flow) if trace is None else flow.send(trace)
    except StopIteration as stop:
        done[name] = stop.value
    else:
        waiting[name] = (flow, request)
