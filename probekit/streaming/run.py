"""Analyses over a corpus of any size: shard by shard, in memory that does not grow with it, and on after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit._version import __version__
from probekit.analysis import Analysis, Result, Results, analyses
from probekit.api import make_jobs
from probekit.core import Batch, BosPolicy, Chat, InputError, StoreError, TextError
from probekit.engine import Job, Listener, run_jobs

from .corpus import Corpus, corpus_of
from .meter import Meter
from .shards import Keep, Setup, merged, prepared, run_shard, take
from .store import State, StreamStore

if TYPE_CHECKING:
    import xarray as xr

SHOWN_TEXTS = 8
_FIXED = ("weights_hash", "weights", "tokenizer_hash", "attention", "backend")


def make_setup(names: Any, model: Any, params: Mapping[str, Any], *, chunk: int, keep: str, **how: Any) -> Setup:
    """How a corpus is streamed, checked before anything is opened.

    Raises:
        InputError: an analysis cannot be streamed, or a number is out of bounds.
    """
    from probekit.models import open_model

    if chunk < 1:
        raise InputError(f"A shard has at least one text; found chunk={chunk}.")
    if keep not in ("tokens", "texts", "nothing"):
        raise InputError(f"keep is 'tokens', 'texts' or 'nothing'; found {keep!r}.")
    if how.get("window") is not None and how["window"] < 2:
        raise InputError(f"window must be at least 2 tokens, found {how['window']}.")
    every = names == "all" or list(names) == ["all"]
    able = [name for name, a in analyses().items() if a.only_looks() and a.statistics]
    jobs = make_jobs(able if every else names, dict(params))
    for job in jobs:
        why = job.analysis.cannot_stream(job.params)
        if why:
            raise InputError(
                f"{job.analysis.name} cannot be streamed: {why}. These can: {', '.join(able)}. Run it over texts that fit "
                "in memory instead."
            )
    return Setup(tuple(jobs), open_model(model, lazy=True), chunk=chunk, keep=keep, **how)  # type: ignore[arg-type]


def stream(
    names: Any,
    model: Any,
    texts: Any,
    store: str | Path,
    *,
    chunk: int = 256,
    keep: Keep = "texts",
    skip_bad: bool = False,
    bos: BosPolicy = "model",
    chat: Chat = False,
    window: int | None = None,
    memory_limit: int | None = None,
    progress: bool | Listener = True,
    **params: Any,
) -> Results:
    """Run analyses over a corpus of any size, in memory that does not grow with it.

    Texts go through the model shard by shard. Of each shard the analyses keep statistics that add up; findings and curves
    are made of these, and are those of a run over all texts at once, whatever the shards (up to the rounding of float64
    sums; see `Analysis.statistics`). The same call goes on after the process ended, however it ended, and after the corpus
    has grown at its end. What only exists for single tokens is shown for the first texts.

    Args:
        names: one or several analyses, or "all" for all that can be streamed.
        model: an opened model, or anything that `open_model` takes.
        texts: a .jsonl file with `text` on each line (domains and answers are not read), or any iterable of texts that
            gives the same ones each time.
        store: where the corpus' Zarr store goes. Its group `texts` has a row for each text, `tokens` one for each token.
        chunk: texts of a shard, after which everything so far is safe.
        keep: what is kept of each text beside the statistics: "texts" a row of means, "tokens" a row for each token as
            well, "nothing" neither.
        skip_bad: leave out lines that are malformed, empty, too short or too long, and count them; otherwise the first of
            them ends the run, and the run goes on when it is mended.
        bos: as in `run`.
        chat: as in `run`.
        window: as in `run`; texts shorter than a window cannot run.
        memory_limit: as in `run`, for a shard.
        progress: as in `run`.
        params: as in `run`.

    Returns:
        One result per analysis; `Result.summary` is of all texts.

    Raises:
        InputError: an analysis cannot be streamed, or an entry of the corpus cannot run.
        StoreError: the store belongs to another run or corpus, is in use, or cannot be written.

    Example:
        >>> stream("token-uncertainty", "smollm2-135m-instruct", "corpus.jsonl", "corpus.zarr")  # doctest: +SKIP
    """
    how = {"bos": bos, "chat": chat, "window": window, "skip_bad": skip_bad, "memory_limit": memory_limit}
    setup = make_setup(names, model, params, chunk=chunk, keep=keep, **how)
    corpus = corpus_of(texts, chats=chat is not False)
    loaded: Any = setup.model
    if hasattr(loaded, "load"):
        loaded.load()
    with StreamStore(Path(store), manifest_of(setup)) as held:
        digest = checked_prefix(corpus, held.state)
        with Meter(corpus, held.state, progress) as meter:
            summaries = _run(setup, corpus, held, digest, meter.tell)
        return _conclude(setup, corpus, held.state, summaries)


def manifest_of(setup: Setup) -> dict[str, Any]:
    """What must not change between the parts of one run."""
    provenance = setup.model.provenance()
    return {
        "probekit": __version__,
        "model": {k: provenance["model"][k] for k in ("dtype", "n_layers", "d_vocab") if "model" in provenance}
        | {k: provenance[k] for k in _FIXED if k in provenance},
        "analyses": {job.analysis.name: job.params.as_dict() for job in setup.jobs},
        "captures": {job.analysis.name: _captures(job, setup) for job in setup.jobs},
        "texts": {"bos": setup.bos, "chat": setup.chat, "window": setup.window},
        "shards": {"chunk": setup.chunk, "keep": setup.keep},
    }


def _captures(job: Job, setup: Setup) -> list[str]:
    """What an analysis looks at first, in short spellings, which hold the hash of a lens."""
    request = next(job.analysis.flow(job.params, setup.model.info))
    return [capture.key for capture in getattr(request, "captures", ())]


def checked_prefix(corpus: Corpus, state: State) -> Any:
    """The running hash of what was read of a corpus.

    Raises:
        StoreError: that part is not what it was.
    """
    digest = corpus.prefix(state.position, state.number)
    if state.digest and digest.hexdigest() != state.digest:
        raise StoreError(
            f"{corpus.name} has changed in the {state.number - 1:,} lines that were read of it. Give the corpus that the "
            "run began with (texts may be added at its end), or choose another folder."
        )
    return digest


def _run(
    setup: Setup, corpus: Corpus, held: StreamStore, digest: Any, tell: Callable[[State], None]
) -> dict[str, xr.Dataset]:
    """Every shard that is not committed yet; returns the statistics of all."""
    summaries = held.summaries()
    with closing(corpus.read(held.state.position, held.state.number)) as items:
        while shard := take(items, setup.chunk):
            state = held.state
            try:
                batch, numbers, skipped = prepared(setup, shard, state.texts, corpus.name)
            except InputError as error:
                kept = f"The {state.texts:,} texts of the shards before are kept" if state.texts else "Nothing is lost"
                raise type(error)(
                    f"{str(error).rstrip('.')}. {kept}: mend it and repeat the command, or leave such lines out "
                    "(skip_bad, --skip-bad)."
                ) from None
            for item in shard:
                digest.update(item.raw)
            after = replace(
                state,
                shards=state.shards + 1,
                position=shard[-1].end,
                number=shard[-1].number + 1,
                digest=digest.hexdigest(),
                skipped={k: state.skipped.get(k, 0) + skipped[k] for k in (*state.skipped, *skipped)},
            )
            if len(batch):
                done = run_shard(setup, batch, numbers)
                summaries = merged(setup.jobs, summaries, done.summaries)
                after = replace(
                    after,
                    texts=state.texts + done.texts,
                    tokens=state.tokens + done.tokens,
                    peak_bytes=max(state.peak_bytes, done.peak_bytes),
                )
                held.commit(after, summaries, done.tables)
            else:
                held.commit(after, summaries, {})
            tell(held.state)
    return summaries


def _conclude(setup: Setup, corpus: Corpus, state: State, summaries: Mapping[str, xr.Dataset]) -> Results:
    """Results whose findings are of the whole corpus, with the first texts to look at."""
    if not state.texts:
        reasons = ", ".join(f"{n:,} {why}" for why, n in state.skipped.items())
        raise TextError(f"{corpus.name} has no text that could run{f' ({reasons})' if reasons else ''}.")
    first = first_texts(setup, corpus, state)
    shown = run_jobs(setup.jobs, setup.model, first, memory_limit=setup.memory_limit)
    results = {}
    for job in setup.jobs:
        result, summary = shown[job.analysis.name], summaries[job.analysis.name]
        dataset = whole_dataset(job, result.dataset, summary)
        results[result.name] = Result(
            job.analysis, job.params, dataset, _provenance(result, corpus, state, len(first)), summary
        )
    return Results(results)


def first_texts(setup: Setup, corpus: Corpus, state: State) -> Batch:
    """The first texts of what was read."""
    setup = replace(setup, skip_bad=True)  # as it was for lines that were left out
    with closing(corpus.read(0, 1)) as items:
        within = takewhile(lambda item: item.end <= state.position, items)
        found = Batch(())
        while len(found) < min(SHOWN_TEXTS, state.texts) and (some := take(within, SHOWN_TEXTS)):
            batch, _, _ = prepared(setup, some, len(found), corpus.name)
            texts = (*found.texts, *batch.texts)[:SHOWN_TEXTS]
            found = Batch(
                texts, setup.bos, begins=batch.begins or found.begins, template=batch.template or found.template
            )
    return found


def whole_dataset(job: Job, shown: xr.Dataset, summary: xr.Dataset) -> xr.Dataset:
    """Measures of tokens and texts from the texts that are shown, the others from all."""
    analysis: Analysis = job.analysis
    totals = analysis.totals(summary, job.params)
    dataset = shown[[name for name in analysis.measures if name not in totals]]
    for array in totals.values():
        if "query" in array.dims and "query" in dataset.dims:  # lengths up to the shortest text of all
            dataset = dataset.sel(query=array["query"])
    dataset = dataset.assign({name: array.variable if not array.coords else array for name, array in totals.items()})
    return analysis.check(dataset[list(analysis.measures)])


def _provenance(result: Result, corpus: Corpus, state: State, shown: int) -> dict[str, Any]:
    about = {
        **result.provenance["texts"],
        "n_texts": state.texts,
        "n_tokens": state.tokens,
        "digest": f"sha256:{state.digest}",
        "streamed from": corpus.name,
        "shards": state.shards,
        "shown": shown,
        **({"left out": state.skipped} if state.skipped else {}),
    }
    plan = dict(result.provenance["plan"][0]) | {
        "n_texts": state.texts, "n_tokens": state.tokens, "peak_bytes": state.peak_bytes, "batches": (),
        "why": f"the corpus, in {state.shards:,} shard{'s' * (state.shards != 1)}",
    }  # fmt: skip
    return {**result.provenance, "texts": about, "plan": [plan]}
