"""What streaming a corpus will take: shards, tokens, disk, memory."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from probekit.core import Batch, ModelInfo, TextError
from probekit.engine import Job, first_plan, human

from .corpus import corpus_of
from .run import make_setup
from .shards import PIECE_TOKENS, pieces, prepared, take
from .store import State, committed, is_stream

LOOKED_AT = 512  # texts of the corpus' start that a plan tokenises
_OTHERS = 32  # entries of an axis that nothing here knows the length of


@dataclass(frozen=True)
class StreamPlan:
    """What streaming a corpus will take.

    Args:
        first: the corpus' first texts, tokenised.
        n_texts: texts in all, estimated from the first ones unless `exact`.
        n_tokens: tokens in all.
        n_shards: shards in all.
        exact: whether these are counts.
        peak_bytes: memory above the loaded model, whatever the number of texts.
        disk_bytes: rows and statistics in the store, before compression.
        gflop: arithmetic per token.
        done: what is committed already.
    """

    first: Batch
    n_texts: int
    n_tokens: int
    n_shards: int
    exact: bool
    peak_bytes: int
    disk_bytes: int
    gflop: float
    done: State

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        lines = [
            f"corpus    {about}{self.n_texts:,} texts with {self.n_tokens:,} tokens, in {self.n_shards:,} shards",
            f"memory    {human(self.peak_bytes)} above the loaded model, for any number of texts",
            f"disk      {about}{human(self.disk_bytes)} before compression",
            f"work      {about}{self.gflop * self.n_tokens:,.0f} GFLOP",
        ]
        if self.done.shards:
            lines.append(f"done      {self.done.shards:,} shards with {self.done.texts:,} texts; the run goes on there")
        return "\n".join(lines)


def plan_stream(names: Any, model: Any, texts: Any, store: str | Path | None = None, **how: Any) -> StreamPlan:
    """What `stream` would take; reads the corpus' start and loads no weights.

    Args:
        names: as in `stream`.
        model: as in `stream`.
        texts: as in `stream`.
        store: where the corpus' store is, if there is one already.
        how: the other arguments of `stream`.

    Raises:
        InputError: as in `stream`.
        PlanError: a shard does not fit in memory.
    """
    known: dict[str, Any] = {"chunk": 256, "keep": "texts"}
    known |= {k: how.pop(k) for k in (*known, "bos", "chat", "window", "skip_bad", "memory_limit") if k in how}
    setup = make_setup(names, model, how, **known)
    corpus = corpus_of(texts, chats=setup.chat is not False)
    with closing(corpus.read(0, 1)) as items:
        looked = take(items, LOOKED_AT)
        exact = next(items, None) is None
    batch, _, _ = prepared(setup, looked, 0, corpus.name)
    if not len(batch):
        raise TextError(f"{corpus.name} begins with no text that could run.")
    factor = 1.0 if exact or corpus.size is None else corpus.size / looked[-1].end
    n_texts, n_tokens = round(len(batch) * factor), round(batch.n_tokens * factor)
    heaviest = max(pieces(batch), key=lambda some: sum(batch.lengths[i] for i in some))
    info, statistics = setup.model.info, sum(_statistics_bytes(job, setup.model.info) for job in setup.jobs)
    plans = first_plan(setup.jobs, info, batch.select(heaviest), setup.memory_limit)
    # A shard of longer texts than these is cut at so many tokens.
    per_token = max(p.result_bytes / max(1, p.n_tokens) for p in plans)
    peak = max(max(p.peak_bytes for p in plans), int(2 * per_token * PIECE_TOKENS)) + 4 * statistics
    rows = sum(_row_bytes(job, info, setup.keep, n_texts, n_tokens) for job in setup.jobs)
    return StreamPlan(
        first=batch,
        n_texts=n_texts,
        n_tokens=n_tokens,
        n_shards=ceil(n_texts / setup.chunk),
        exact=exact,
        peak_bytes=peak,
        disk_bytes=rows + 2 * statistics,
        gflop=sum(p.gflop for p in plans) / sum(p.n_tokens for p in plans),
        done=committed(Path(store))[0]
        if store is not None and is_stream(Path(store)) and _begun(Path(store))
        else State(),
    )


def _begun(store: Path) -> bool:
    return (store / "commit.json").exists()


def _size(dims: tuple[str, ...], info: ModelInfo, job: Job) -> int:
    ranks = int(job.params.as_dict().get("top_k", 1))
    known = {
        "layer": info.n_layers, "head": info.n_heads, "vocab": info.d_vocab, "d_model": info.d_model, "rank": ranks,
        "bin": 1024, "unit": 2, "moment": 6, "token": 1, "text": 1,
    }  # fmt: skip
    n = 1
    for dim in dims:
        n *= known.get(dim, _OTHERS)
    return n


def _statistics_bytes(job: Job, info: ModelInfo) -> int:
    return 8 * sum(_size(s.dims, info, job) for s in job.analysis.statistics.values())


def _row_bytes(job: Job, info: ModelInfo, keep: str, n_texts: int, n_tokens: int) -> int:
    """Bytes of an analysis' rows; four for a number of its own, eight for a mean."""
    if keep == "nothing":
        return 0
    total = 16 * n_texts + (24 * n_tokens if keep == "tokens" else 0)
    for measure in job.analysis.measures.values():
        if "query" in measure.dims:
            continue
        if "text" in measure.dims:
            total += 4 * n_texts * _size(measure.dims, info, job)
        elif "token" in measure.dims:
            total += 8 * n_texts * (measure.dims == ("token",))
            total += 4 * n_tokens * _size(measure.dims, info, job) * (keep == "tokens")
    return total
