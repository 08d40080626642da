"""Running analyses: check, plan, pass, compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from probekit._version import __version__
from probekit.analysis import Analysis, Params, Result, Results
from probekit.core import (
    Batch,
    Branch,
    Branches,
    Forward,
    InputError,
    LookUp,
    Model,
    ModelInfo,
    TextError,
    Texts,
    TokenText,
    Trace,
)
from probekit.reduce import Partial

from .branches import run_branch
from .journal import Journal
from .lockstep import run_flows, union
from .look_up import answer
from .plan import Plan, make_plan
from .progress import Listener, Progress, told


@dataclass(frozen=True)
class Job:
    """One analysis with its parameters."""

    analysis: Analysis
    params: Params


def check_texts(jobs: Sequence[Job], batch: Batch, context_length: int | None) -> None:
    """Refuse texts that are too short for an analysis, too long for the model, or not what an analysis reads.

    Raises:
        TextError: names the text, what was found and what was expected.
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
    for job in jobs:
        job.analysis.check_texts(job.params, batch)


def count_passes(jobs: Sequence[Job], info: ModelInfo, batch: Batch) -> int:
    """About how many passes a run makes: the first is shared, what an analysis asks for later is its own."""
    return 1 + sum(job.analysis.passes(job.params, info, batch) - 1 for job in jobs)


def first_plan(jobs: Sequence[Job], info: ModelInfo, batch: Batch, memory_limit: int | None = None) -> list[Plan]:
    """The plan of the first round: one per pass, each with the number of passes that are expected in all."""
    requests = []
    for job in jobs:
        flow = job.analysis.flow(job.params, info)
        request = next(flow)
        while isinstance(request, Texts):
            request = flow.send(batch)
        requests.append(request)
        flow.close()
    passes = count_passes(jobs, info, batch)
    more = [(job.analysis.name, job.analysis.passes(job.params, info, batch) - 1) for job in jobs]
    later = tuple((name, n) for name, n in more if n > 0)
    looks = [r for r in requests if not isinstance(r, Branch | LookUp)]
    if any(isinstance(r, Branch) for r in requests):  # reading the prompts, which continuations begin with
        looks.append(Forward((), why="prompts are read, and continuations written"))
    return [replace(make_plan(r, batch, info, memory_limit), passes=passes, later=later) for r in union(looks)]


def run_pass(
    model: Model, request: Forward, batch: Batch, *, memory_limit: int | None = None, progress: Progress | None = None
) -> tuple[Trace, Plan]:
    """Plan and run one pass over all texts.

    Args:
        model: serves the request.
        request: everything that is wanted of this pass.
        batch: all texts.
        memory_limit: bytes that may be used above the loaded model.
        progress: the bar of the run.

    Raises:
        PlanError: it does not fit in memory.
    """
    if request.texts is not None:
        batch = batch.select(_rows_of(request.texts, batch))
    if request.rows is not None:
        chosen = _rows_of(request.rows, batch, once=False)
        batch = Batch(tuple(batch.texts[i] for i in chosen), batch.bos)  # copies of a text are told apart by their row
    if request.inputs is not None:
        batch = _made(request.inputs, model)
    plan = make_plan(request, batch, model.info, memory_limit)
    if not request.captures:  # the texts are wanted, and nothing of what the model makes of them
        return Trace(batch, model.info, {}, {}), plan
    parts: list[list[Partial]] = []
    tell = None
    if progress is not None:
        progress.begin(plan.gflop)
        tell = None if progress.silent else progress.tell
    for indices in plan.batches:
        parts.append(model.execute(request, batch.select(indices), tell))
    merged = [Partial.merge([p[i] for p in parts]) for i in range(len(request.captures))]
    data = {c.key: part.finish(batch) for c, part in zip(request.captures, merged, strict=True)}
    ids = sorted({int(i) for d in data.values() if "top_id" in d for i in np.unique(d["top_id"].values)})
    vocab = dict(zip(ids, model.decode(ids), strict=True))
    return Trace(batch, model.info, data, vocab), plan


def _made(inputs: tuple[tuple[int, ...], ...], model: Model) -> Batch:
    """Texts of given token ids."""
    limit, d_vocab = model.info.context_length, model.info.d_vocab
    for ids in inputs:
        if limit is not None and len(ids) > limit:
            raise InputError(f"An analysis made a text of {len(ids):,} tokens; the model reads at most {limit:,}.")
        if not all(0 <= i < d_vocab for i in ids):
            raise InputError(f"An analysis made a text with ids outside the vocabulary, 0 to {d_vocab - 1}.")
    return Batch(tuple(TokenText(ids, model.decode(ids)) for ids in inputs), "never")


def _rows_of(texts: Sequence[int], batch: Batch, *, once: bool = True) -> list[int]:
    place = {text: row for row, text in enumerate(batch.index)}
    strange = [t for t in texts if t not in place]
    if strange or not texts or (once and len(set(texts)) != len(texts)):
        only = ", each once" if once else ""
        raise InputError(f"A request names the texts {list(texts)}; expected some of {sorted(place)}{only}.")
    return [place[t] for t in texts]


def check_roles(jobs: Sequence[Job], models: Mapping[str, Model]) -> None:
    """Refuse a run in which an analysis lacks a model, or whose models read token ids differently.

    Raises:
        InputError: says which role, and what was expected.
    """
    for job in jobs:
        for role in job.analysis.roles:
            if role not in models:
                raise InputError(
                    f"{job.analysis.name} compares models and needs one more, in the role {role!r}. Give it as "
                    f'models={{"{role}": …}}, or --role {role}=NAME on the command line.'
                )
    main = models["model"]
    for role, other in models.items():
        if not share_tokenizer(main, other):
            raise InputError(
                f"The models {main.info.name!r} and {other.info.name!r} (in the role {role!r}) have different "
                "tokenizers, so that a token id means different things to them. Compare models that share one."
            )


def share_tokenizer(one: Model, other: Model) -> bool:
    """Whether token ids mean the same to two models; about a thousand ids are looked at, evenly spread."""
    ids = range(0, one.info.d_vocab, max(1, one.info.d_vocab // 997))
    return other.info.d_vocab == one.info.d_vocab and other.decode(ids) == one.decode(ids)


def _model_of(request: Forward | Branch | LookUp, models: Mapping[str, Model]) -> Model:
    if request.model not in models:
        raise InputError(
            f"An analysis asks for a model in the role {request.model!r}; this run has {', '.join(models)}. An analysis "
            "that needs further models names them in `roles`."
        )
    return models[request.model]


def _who(model: Model, journal: str | Path | None) -> str:
    return model.info.name if journal is None else str(model.provenance().get("weights_hash", model.info.name))


def run_jobs(
    jobs: Sequence[Job],
    model: Model,
    batch: Batch,
    *,
    memory_limit: int | None = None,
    progress: bool | Listener = False,
    corpus: Mapping[str, Any] | None = None,
    journal: str | Path | None = None,
    others: Mapping[str, Model] | None = None,
) -> Results:
    """Run analyses together, each text once per round.

    Args:
        jobs: the analyses, names unique.
        model: the model.
        batch: the texts.
        memory_limit: bytes that may be used above the loaded model.
        progress: show a bar on standard error where that is a terminal; or what is told of every `Step` instead.
        corpus: where the texts come from, for the record.
        journal: a file that keeps continuations and similarities as they are found, so that a run that broke off can go on.
        others: further models by role, for analyses that compare models; they read the same token ids.

    Returns:
        One result per analysis, in order.

    Raises:
        InputError: a role that an analysis needs is missing, or its model has another tokenizer.
        StoreError: the journal cannot be read or written.
    """
    check_texts(jobs, batch, model.info.context_length)
    models = {"model": model, **(others or {})}
    check_roles(jobs, models)
    for job in jobs:
        job.analysis.check_model(job.params, model.info, lambda: str(model.provenance().get("weights_hash", "")))
    plans: dict[Plan, Plan] = {}

    def serve(request: Forward) -> Trace:
        trace, plan = run_pass(_model_of(request, models), request, batch, memory_limit=memory_limit, progress=bar)
        alike = replace(plan, available_bytes=0)
        plans[alike] = replace(plan, passes=plans[alike].passes + 1) if alike in plans else plan
        return trace

    def write(request: Branch) -> Branches:
        writer = _model_of(request, models)
        return run_branch(writer, request, kept[request.model], memory_limit=memory_limit, progress=bar)

    def look_up(request: LookUp) -> Any:
        if isinstance(request, Texts):
            return batch
        return answer(_model_of(request, models), request, bar, kept[request.model])

    flows = {job.analysis.name: job.analysis.flow(job.params, model.info) for job in jobs}
    with ExitStack() as stack:
        bar = stack.enter_context(Progress(count_passes(jobs, model.info, batch), **told(progress)))
        kept = {role: stack.enter_context(Journal(journal, _who(m, journal))) for role, m in models.items()}
        datasets = run_flows(flows, serve, write, look_up)
    provenance = {
        "probekit": __version__,
        **model.provenance(),
        **({"other models": {role: m.provenance() for role, m in others.items()}} if others else {}),
        "texts": {
            "n_texts": len(batch),
            "n_tokens": batch.n_tokens,
            "bos": batch.bos,
            **({"beginning_of_sequence": batch.begins} if batch.begins else {}),
            **({"chat_template": batch.template} if batch.template else {}),
            "digest": f"sha256:{batch.digest}",
            **({"domains": dict(Counter(batch.domains))} if any(batch.domains) else {}),
            **(corpus or {}),
        },
        "plan": [plan.as_dict() for plan in plans.values()],
    }
    return Results(
        {
            job.analysis.name: Result(
                job.analysis, job.params, job.analysis.check(datasets[job.analysis.name]), provenance
            )
            for job in jobs
        }
    )
