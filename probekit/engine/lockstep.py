"""Many analyses, one model: every round, all wait for one pass that serves them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from probekit.core import Branch, Branches, Forward, InputError, LookUp, Request, Trace

if TYPE_CHECKING:
    import xarray as xr

    from probekit.analysis import Flow

Serve = Callable[[Forward], Trace]
Write = Callable[[Branch], Branches]
Look = Callable[[LookUp], Any]


def union(requests: Sequence[Request]) -> list[Forward]:
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


def run_flows(
    flows: Mapping[str, Flow], serve: Serve, write: Write | None = None, look_up: Look | None = None
) -> dict[str, xr.Dataset]:
    """Advance all conversations together until each has returned its result.

    Args:
        flows: by name, generators that yield requests, are sent traces and return datasets.
        serve: runs one pass and returns its trace.
        write: writes continuations and returns them; None where nobody asks for any.
        look_up: answers what needs no pass over the texts (weights, vocabulary, embeddings); None where nobody asks.

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
            asked = [request for _, request in round_.values()]
            traces = {p.pass_key: serve(p) for p in union([r for r in asked if not isinstance(r, Branch | LookUp)])}
            branches = {r.pass_key: r for r in asked if isinstance(r, Branch)}
            if branches and write is None:
                raise InputError("Expected an analysis to yield Forward requests, found Branch.")
            written = {key: write(r) for key, r in branches.items()} if write is not None else {}
            looked = [r for r in asked if isinstance(r, LookUp)]
            if looked and look_up is None:
                raise InputError(f"Expected an analysis to yield Forward requests, found {type(looked[0]).__name__}.")
            found = {r: look_up(r) for r in dict.fromkeys(looked)} if look_up is not None else {}
            for name, (flow, request) in round_.items():
                if isinstance(request, LookUp):
                    _advance(name, flow, found[request], waiting, done)
                    continue
                if isinstance(request, Branch):
                    _advance(name, flow, written[request.pass_key], waiting, done)
                    continue
                assert isinstance(request, Forward)
                _advance(name, flow, traces[request.pass_key].select(request.captures), waiting, done)
    finally:
        for flow in flows.values():
            flow.close()
    return {name: done[name] for name in flows}


def _advance(
    name: str,
    flow: Flow,
    trace: Any,
    waiting: dict[str, tuple[Flow, Request]],
    done: dict[str, xr.Dataset],
) -> None:
    try:
        request = next(flow) if trace is None else flow.send(trace)
    except StopIteration as stop:
        done[name] = stop.value
    else:
        waiting[name] = (flow, request)
