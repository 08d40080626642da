"""The verbs: run, plan, report, and what there is to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from probekit.analysis import Result, Results, analyses, get_analyses
from probekit.batches import make_batch, source_digest
from probekit.core import (
    BosPolicy,
    Branch,
    Branches,
    CapabilityError,
    Chat,
    Generated,
    InputError,
    Model,
    Patch,
    Written,
    unknown,
)
from probekit.engine import Job, Listener, Plan, first_plan, run_jobs

if TYPE_CHECKING:
    import xarray as xr


def make_jobs(names: str | Iterable[str], params: dict[str, Any]) -> list[Job]:
    """Analyses with their parameters.

    Args:
        names: names of analyses, or "all".
        params: a plain name sets the parameter of every chosen analysis that has it; the name of an
            analysis (in snake_case or kebab-case) with a dictionary sets that analysis' own; `preset` names values
            that go together, of the analyses that have them, and gives way to all others.

    Raises:
        UnknownName: an analysis or a parameter does not exist.
        InputError: a value of the wrong type or out of bounds.
    """
    chosen = get_analyses(names)
    params = dict(params)
    preset = params.pop("preset", None)
    known_presets = {name for a in chosen for name in a.Params.presets}
    if preset is not None and preset not in known_presets:
        raise unknown(f"preset of {', '.join(a.name for a in chosen)}", str(preset), known_presets)
    own = {a.name: dict(params.get(a.name) or params.get(a.name.replace("-", "_")) or {}) for a in chosen}
    shared = {k: v for k, v in params.items() if k.replace("_", "-") not in own}
    known = {name for a in chosen for name in a.Params.specs()}
    for name in shared:
        if name not in known:
            raise unknown(f"parameter of {', '.join(own)}", name, known)
    jobs = []
    for analysis in chosen:
        fitting = {k: v for k, v in shared.items() if k in analysis.Params.specs()}
        values = {**analysis.Params.presets.get(preset or "", {}), **fitting, **own[analysis.name]}
        jobs.append(Job(analysis, analysis.Params.parse(values, analysis.name)))
    return jobs


def _open(model: Any) -> Model:
    from probekit.models import open_model

    return open_model(model, lazy=True)


@overload
def run(names: str, model: Any, texts: Any = None, **params: Any) -> Result: ...
@overload
def run(names: Sequence[str], model: Any, texts: Any = None, **params: Any) -> Results: ...
def run(
    names: str | Sequence[str],
    model: Any,
    texts: Any = None,
    *,
    bos: BosPolicy = "model",
    chat: Chat = False,
    window: int | None = None,
    opening: int | None = None,
    memory_limit: int | None = None,
    progress: bool | Listener = True,
    journal: str | Path | None = None,
    models: Mapping[str, Any] | None = None,
    **params: Any,
) -> Result | Results:
    """Run analyses together: every text goes through the model once for all of them.

    Args:
        names: one name (returns its result), or several, or ["all"] (returns results by name).
        model: an opened model, or anything that `open_model` takes.
        texts: a text, or a list of texts; a dictionary gives texts by domain ({"code": [...], "prose": [...]}) to
            analyses that compare kinds of text; a record {"text": …, "answer": …, "domain": …} says what a right answer
            to a prompt is; a tokenised `Batch` runs as it is.
        bos: "model" adds what the tokenizer adds by itself, "always" a beginning-of-sequence token, "never" nothing.
        chat: make each text a user turn in the model's chat template, with the words that open the answer; a string
            is the system message. A text may then be a list of messages ({"role": …, "content": …}), also in JSON.
            The template's own special tokens are the only ones.
        window: cut each text into consecutive windows of so many tokens and treat them as texts.
        opening: keep the first so many tokens of each text, and leave shorter texts out.
        memory_limit: bytes that may be used above the loaded model; most of the free memory if None.
        progress: show a progress bar where standard error is a terminal; or a function that is told of every `Step`.
            What it raises (such as `Cancelled`) ends the run and leaves the model as it was found.
        journal: a file that keeps what the model writes on, continuation by continuation, and the similarities of
            embedded texts, request by request: a run that broke off goes on where it was, and one that wants more
            samples writes only the new ones.
        models: further models by role, for analyses that compare models, such as {"base": "owner/name"}.
        params: parameters of the analyses. `top_k=5` reaches every chosen analysis that has a
            `top_k`; `logit_lens={"top_k": 5}` only that one.

    Raises:
        ProbekitError: anything that was asked for cannot be done; nothing has run then.

    Example:
        >>> run("token-uncertainty", "smollm2-135m-instruct", "One two three four.")  # doctest: +SKIP
    """
    jobs = make_jobs(names, params)
    opened = _open(model)
    batch = make_batch(opened, jobs, texts, bos, window, chat, opening=opening)
    others = {role: _open(other) for role, other in (models or {}).items()}
    if any(job.analysis.runs_model(job.params) for job in jobs):
        for one in (opened, *others.values()):
            if hasattr(one, "load"):
                one.load()
    about = {"window": window, "opening": opening, "source": source_digest(texts)}
    corpus = {k: v for k, v in about.items() if v}
    results = run_jobs(
        jobs, opened, batch, memory_limit=memory_limit, progress=progress, corpus=corpus, journal=journal, others=others
    )
    return results[names] if isinstance(names, str) and names != "all" else results


def plan(
    names: str | Sequence[str],
    model: Any,
    texts: Any = None,
    *,
    bos: BosPolicy = "model",
    chat: Chat = False,
    window: int | None = None,
    opening: int | None = None,
    memory_limit: int | None = None,
    **params: Any,
) -> list[Plan]:
    """What a run would cost; loads the tokenizer but no weights.

    Args:
        names: as in `run`.
        model: as in `run`.
        texts: as in `run`.
        bos: as in `run`.
        chat: as in `run`.
        window: as in `run`.
        opening: as in `run`.
        memory_limit: as in `run`.
        params: as in `run`.

    Returns:
        One plan per pass of the first round.

    Raises:
        PlanError: it does not fit in memory; says what would be needed.
    """
    jobs = make_jobs(names, params)
    opened = _open(model)
    batch = make_batch(opened, jobs, texts, bos, window, chat, opening=opening)
    return first_plan(jobs, opened.info, batch, memory_limit)


def report(
    results: Result | Results | Iterable[Result], folder: str | Path, *, title: str = "", subtitle: str = ""
) -> Path:
    """Write a report: report.html, findings.json, results.zarr and manifest.json.

    Args:
        results: what `run` returned.
        folder: where to write; an older run there is replaced, other files stay.
        title: what the report is called; the model's name if "".
        subtitle: a line below it; texts, tokens and analyses if "".

    Returns:
        The path of report.html.

    Raises:
        StoreError: the folder cannot be written.
    """
    from probekit.reporting import write_run

    if isinstance(results, Result):
        results = Results({results.name: results})
    elif not isinstance(results, Results):
        results = Results({r.name: r for r in results})
    if not len(results):
        raise InputError("There is no result to report.")
    named = {k: v for k, v in {"title": title, "subtitle": subtitle}.items() if v}
    return write_run(results, Path(folder), {**named, **manifest(results)})


def generate(
    model: Any,
    texts: Any,
    n_tokens: int = 32,
    *,
    patches: Sequence[Patch] = (),
    temperature: float = 0.0,
    seed: int = 0,
    bos: BosPolicy = "model",
    chat: Chat = False,
    listen: Callable[[Written], None] | None = None,
) -> Generated:
    """Let a model write on, while patches change activations.

    Args:
        model: an opened model, or anything that `open_model` takes.
        texts: a prompt or a list of prompts; a tokenised `Batch` runs as it is.
        n_tokens: tokens to write at most after each prompt; an end token stops earlier.
        patches: what is changed on the way. Without positions, a patch acts on prompt and written tokens alike;
            with positions, on these tokens of the prompt only.
        temperature: 0 takes the most probable token, otherwise tokens are drawn from softmax(logits / temperature).
        seed: of the draws.
        bos: as in `run`.
        chat: as in `run`; the model then writes its answer.
        listen: is told of every token as it is written; what it raises (such as `Cancelled`) ends the writing.

    Returns:
        The texts written, with log-probability and entropy of every token.

    Raises:
        CapabilityError: the model cannot write, such as an encoder, or its backend has no such loop.
        InputError: a patch does not fit.
        TextError: a prompt leaves no room in the model's context.

    Example:
        >>> generate("smollm2-135m-instruct", "One two three", n_tokens=5)  # doctest: +SKIP
    """
    opened = _open(model)
    if not hasattr(opened, "generate"):
        raise CapabilityError(
            f"{opened.info.name!r} ({type(opened).__name__}) cannot generate; open a decoder with the native backend, "
            "such as 'smollm2-135m-instruct'."
        )
    batch = make_batch(opened, (), texts, bos, None, chat)
    return opened.generate(batch, n_tokens, patches, temperature=temperature, seed=seed, listen=listen)


def branch(
    model: Any,
    request: Branch,
    *,
    journal: str | Path | None = None,
    memory_limit: int | None = None,
    progress: bool | Listener = True,
) -> Branches:
    """Let a model write on from many places of a text at once; each text is read once, whoever continues it.

    Args:
        model: an opened model, or anything that `open_model` takes.
        request: prompts with answers, the places and tokens to write on from, how many times and how.
        journal: a file that keeps every continuation as it is written, so that a broken run goes on where it was, and
            one that wants more samples writes only the new ones.
        memory_limit: bytes that may be used above the loaded model; most of the free memory if None.
        progress: as in `run`.

    Raises:
        CapabilityError: the model cannot write on from shared prefixes.
        PlanError: not even one continuation at a time fits in memory; says what would be needed.

    Example:
        >>> model = open_model("smollm2-135m-instruct")  # doctest: +SKIP
        >>> base = Base(model.tokenize(["The capital of France is"]).texts[0].ids, n_prompt=5)  # doctest: +SKIP
        >>> branch(model, Branch((base,), (Fork(0, 5),), n=4)).continuations[0]  # doctest: +SKIP
    """
    from probekit.engine import Journal, Progress, run_branch, told

    opened: Any = _open(model)
    if hasattr(opened, "load"):
        opened.load()
    who = str(opened.provenance().get("weights_hash", opened.info.name)) if journal is not None else opened.info.name
    with Progress(1, **told(progress)) as bar, Journal(journal, who) as kept:
        return run_branch(opened, request, kept, memory_limit=memory_limit, progress=bar)


def result_of(name: str, dataset: xr.Dataset, provenance: Mapping[str, Any], **params: Any) -> Result:
    """A result from numbers that a study measured itself, for analyses that do not run on a trace.

    Args:
        name: a registered analysis, whose `measures` the dataset must have.
        dataset: the numbers.
        provenance: what fixes them.
        params: parameters of the analysis.

    Raises:
        ValueError: the dataset differs from the analysis' measures.
    """
    (job,) = make_jobs(name, params)
    return Result(job.analysis, job.params, job.analysis.check(dataset), provenance)


def manifest(results: Results) -> dict[str, Any]:
    """What fixes the numbers of a run, in one place."""
    first = next(iter(results.values()))
    parameters = {name: r.params.as_dict() for name, r in results.items()}
    return {**first.provenance, "analyses": list(results), "parameters": parameters}


def list_analyses() -> dict[str, str]:
    """Every analysis and the question it answers, by name."""
    return {name: analysis.summary() for name, analysis in analyses().items()}


def list_models() -> list[dict[str, Any]]:
    """The models that come embedded: name, licence, size, what they can do, whether they are cached."""
    from dataclasses import asdict

    from probekit.catalog import listing

    return [asdict(row) for row in listing()]
