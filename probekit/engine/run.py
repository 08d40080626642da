"""Running analyses: check, plan, pass, compute."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from probekit._version import __version__
from probekit.analysis import Analysis, Params, Result, Results
from probekit.core import Batch, Forward, InputError, Model, ModelInfo, TextError, Trace
from probekit.reduce import Partial

from .lockstep import run_flows, union
from .plan import Plan, make_plan


@dataclass(frozen=True)
class Job:
    """One analysis with its parameters."""

    analysis: Analysis
    params: Params


def check_texts(jobs: Sequence[Job], batch: Batch, context_length: int | None) -> None:
    """Refuse texts that are too short for an analysis or too long for the model.

    Raises:
        TextError: names the text, its length and the length that was expected.
    """
    for i, n in enumerate(batch.lengths):
        if context_length is not None and n > context_length:
            raise TextError(
                f"Text {i} has {n:,} tokens; the model reads at most {context_length:,}. "
                f"Shorten it, or cut it into windows (window={context_length})."
            )
        for job in jobs:
            least = job.analysis.min_tokens(job.params)
            if n < least:
                raise TextError(
                    f"Text {i} has {n} tokens; {job.analysis.name} needs at least {least}. "
                    "Give a longer text, or leave this analysis out."
                )


def first_plan(jobs: Sequence[Job], info: ModelInfo, batch: Batch, memory_limit: int | None = None) -> list[Plan]:
    """The plan of the first round: one per pass. Analyses that look again ask for more passes later."""
    requests = []
    for job in jobs:
        flow = job.analysis.flow(job.params, info)
        requests.append(next(flow))
        flow.close()
    return [make_plan(request, batch, info, memory_limit) for request in union(requests)]


def run_pass(
    model: Model, request: Forward, batch: Batch, *, memory_limit: int | None = None, progress: bool = False
) -> tuple[Trace, Plan]:
    """Plan and run one pass over all texts.

    Args:
        model: serves the request.
        request: everything that is wanted of this pass.
        batch: all texts.
        memory_limit: bytes that may be used above the loaded model.
        progress: show a bar on standard error where that is a terminal.

    Raises:
        PlanError: it does not fit in memory.
    """
    if request.texts is not None:
        batch = batch.select(_rows_of(request.texts, batch))
    plan = make_plan(request, batch, model.info, memory_limit)
    parts: list[list[Partial]] = []
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} GFLOP [{elapsed}<{remaining}]"
    # Off unless asked for; where asked for, tqdm itself keeps quiet if standard error is no terminal.
    with tqdm(
        total=plan.gflop, desc="capture", bar_format=bar_format, file=sys.stderr, disable=None if progress else True
    ) as bar:

        def tell(work: float) -> None:
            bar.update(min(work, max(plan.gflop - bar.n, 0.0)))

        for indices in plan.batches:
            parts.append(model.execute(request, batch.select(indices), None if bar.disable else tell))
    merged = [Partial.merge([p[i] for p in parts]) for i in range(len(request.captures))]
    data = {c.key: part.finish(batch) for c, part in zip(request.captures, merged, strict=True)}
    ids = sorted({int(i) for d in data.values() if "top_id" in d for i in np.unique(d["top_id"].values)})
    vocab = dict(zip(ids, model.decode(ids), strict=True))
    return Trace(batch, model.info, data, vocab), plan


def _rows_of(texts: Sequence[int], batch: Batch) -> list[int]:
    place = {text: row for row, text in enumerate(batch.index)}
    strange = [t for t in texts if t not in place]
    if strange or not texts or len(set(texts)) != len(texts):
        raise InputError(f"A request names the texts {list(texts)}; expected some of {sorted(place)}, each once.")
    return [place[t] for t in texts]


def run_jobs(
    jobs: Sequence[Job],
    model: Model,
    batch: Batch,
    *,
    memory_limit: int | None = None,
    progress: bool = False,
    corpus: Mapping[str, Any] | None = None,
) -> Results:
    """Run analyses together, each text once per round.

    Args:
        jobs: the analyses, names unique.
        model: the model.
        batch: the texts.
        memory_limit: bytes that may be used above the loaded model.
        progress: show bars on standard error where that is a terminal.
        corpus: where the texts come from, for the record.

    Returns:
        One result per analysis, in order.
    """
    check_texts(jobs, batch, model.info.context_length)
    plans: list[Plan] = []

    def serve(request: Forward) -> Trace:
        if request.model != "model":
            raise InputError(f"An analysis asks for a model in the role {request.model!r}; this run has one model.")
        trace, plan = run_pass(model, request, batch, memory_limit=memory_limit, progress=progress)
        plans.append(plan)
        return trace

    flows = {job.analysis.name: job.analysis.flow(job.params, model.info) for job in jobs}
    datasets = run_flows(flows, serve)
    provenance = {
        "probekit": __version__,
        **model.provenance(),
        "texts": {
            "n_texts": len(batch),
            "n_tokens": batch.n_tokens,
            "bos": batch.bos,
            "digest": f"sha256:{batch.digest}",
            **(corpus or {}),
        },
        "plan": [plan.as_dict() for plan in plans],
    }
    return Results(
        {
            job.analysis.name: Result(
                job.analysis, job.params, job.analysis.check(datasets[job.analysis.name]), provenance
            )
            for job in jobs
        }
    )
