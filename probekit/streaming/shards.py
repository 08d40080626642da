"""From lines to the texts of a shard, and from its texts to statistics and rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from probekit.analysis import check_summary, merge_summaries
from probekit.batches import tokenize_chats
from probekit.core import Batch, BosPolicy, Chat, InputError, Model, TextError, TokenText
from probekit.core.rows import Columns
from probekit.engine import Job, run_jobs

from .corpus import Item

if TYPE_CHECKING:
    import xarray as xr

Keep = Literal["tokens", "texts", "nothing"]
SHARD_BYTES = 1 << 24  # of the corpus; a shard of long texts ends there
PIECE_TOKENS = 1 << 14  # texts of a shard that are held together; a longer text is held alone


@dataclass(frozen=True)
class Setup:
    """How a corpus is streamed.

    Args:
        jobs: the analyses.
        model: the model.
        bos: beginning-of-sequence token, as in `run`.
        chat: whether texts are turns of a chat, as in `run`.
        window: tokens of the windows that texts are cut into; None leaves them whole.
        chunk: texts of a shard.
        keep: what is kept of every text beside the statistics.
        skip_bad: whether entries that cannot run are left out and counted.
        memory_limit: bytes that may be used above the loaded model.
    """

    jobs: tuple[Job, ...]
    model: Model
    bos: BosPolicy = "model"
    chat: Chat = False
    window: int | None = None
    chunk: int = 256
    keep: Keep = "texts"
    skip_bad: bool = False
    memory_limit: int | None = None


@dataclass
class Done:
    """What became of a shard.

    Args:
        texts: texts that ran.
        tokens: tokens of these.
        peak_bytes: most memory that a pass needed above the model.
        summaries: their statistics, by analysis.
        tables: their rows.
    """

    texts: int
    tokens: int
    peak_bytes: int
    summaries: dict[str, xr.Dataset]
    tables: dict[str, Columns]


def take(items: Iterator[Item], chunk: int) -> list[Item]:
    """The entries of the next shard: up to so many that are not empty lines, and not many more bytes than `SHARD_BYTES`."""
    found: list[Item] = []
    full, n_bytes = 0, 0
    while full < chunk and n_bytes < SHARD_BYTES and (item := next(items, None)) is not None:
        found.append(item)
        full, n_bytes = full + bool(item.text or item.problem), n_bytes + len(item.raw)
    return found


def prepared(setup: Setup, items: Sequence[Item], first: int, where: str) -> tuple[Batch, list[int], Counter[str]]:
    """The texts of some entries, the entry that each comes from, and how many entries were left out, by reason.

    Args:
        setup: says what can run.
        items: the entries.
        first: the place of the first text in the corpus.
        where: the corpus' name.

    Raises:
        InputError: an entry cannot run; names it.
    """
    skipped: Counter[str] = Counter()

    def leave_out(reason: str, error: InputError) -> None:
        if not setup.skip_bad:
            raise error
        skipped[reason] += 1

    for item in items:
        if item.problem is not None:
            leave_out("malformed or empty", item.problem)
    good = [item for item in items if item.text]
    if not good:
        return Batch(()), [], skipped
    batch = _tokenised(setup, [item.text for item in good])
    texts: list[TokenText] = []
    numbers: list[int] = []
    for text, item in zip(batch, good, strict=True):
        whole = Batch((text,), setup.bos)
        cut = whole.windows(setup.window).texts if setup.window else (text,)
        reason, problem = _unfit(setup, len(text) if not setup.window else (len(cut[0]) if cut else 0))
        if problem:
            leave_out(reason, TextError(f"{where}, line {item.number}: the text has {len(text):,} tokens; {problem}."))
            continue
        texts += cut
        numbers += [item.number] * len(cut)
    index = tuple(range(first, first + len(texts)))
    return Batch(tuple(texts), batch.bos, index, batch.begins, batch.template), numbers, skipped


def _tokenised(setup: Setup, texts: list[str]) -> Batch:
    if setup.chat is False:
        return setup.model.tokenize(texts, setup.bos)
    return tokenize_chats(setup.model, texts, setup.bos, setup.chat)


def _unfit(setup: Setup, n: int) -> tuple[str, str]:
    """Why a text of so many tokens cannot run, in short and in words; two empty strings if it can."""
    limit = setup.model.info.context_length
    if n == 0 and setup.window:
        return "shorter than a window", f"a window has {setup.window:,}"
    if limit is not None and n > limit:
        return "too long", f"the model reads at most {limit:,} (cut texts into windows)"
    name, least = max(((j.analysis.name, j.analysis.min_tokens(j.params)) for j in setup.jobs), key=lambda x: x[1])
    return ("too short", f"{name} needs at least {least}") if n < least else ("", "")


def pieces(batch: Batch, limit: int = PIECE_TOKENS) -> Iterator[range]:
    """Consecutive texts with at most so many tokens; a longer text alone."""
    begin, held = 0, 0
    for i, n in enumerate(batch.lengths):
        if i > begin and held + n > limit:
            yield range(begin, i)
            begin, held = i, 0
        held += n
    if begin < len(batch):
        yield range(begin, len(batch))


def run_shard(setup: Setup, batch: Batch, numbers: Sequence[int]) -> Done:
    """Run the texts of a shard, a piece at a time."""
    done = Done(len(batch), batch.n_tokens, 0, {}, {})
    tables: dict[str, list[Columns]] = {}
    for some in pieces(batch):
        piece = batch.select(some)
        results = run_jobs(setup.jobs, setup.model, piece, memory_limit=setup.memory_limit)
        plans = next(iter(results.values())).provenance["plan"]
        done.peak_bytes = max([done.peak_bytes, *(p["peak_bytes"] for p in plans)])
        for job in setup.jobs:
            result = results[job.analysis.name]
            done.summaries = merged(
                setup.jobs, done.summaries, {job.analysis.name: check_summary(job.analysis, result.summary)}
            )
        datasets = {name: r.dataset for name, r in results.items()}
        for table, columns in rows_of(datasets, piece, [numbers[i] for i in some], setup.keep).items():
            tables.setdefault(table, []).append(columns)
    done.tables = {table: _stacked(parts, table.removesuffix("s")) for table, parts in tables.items()}
    return done


def merged(
    jobs: Iterable[Job], one: Mapping[str, xr.Dataset], other: Mapping[str, xr.Dataset]
) -> dict[str, xr.Dataset]:
    """The statistics of the texts of both, by analysis."""
    analyses = {job.analysis.name: job.analysis for job in jobs}
    return {
        name: merge_summaries(analyses[name], one[name], other[name])
        if name in one and name in other
        else (one[name] if name in one else other[name])
        for name in analyses
        if name in one or name in other
    }


def rows_of(datasets: Mapping[str, xr.Dataset], batch: Batch, numbers: Sequence[int], keep: Keep) -> dict[str, Columns]:
    """What is kept of every text, and of every token if asked for, by table.

    A text has its line, tokens, what the analyses measure for each text, and the means of what they measure for each
    token. Words and sweeps over lengths are not kept.
    """
    if keep == "nothing":
        return {}
    texts: dict[str, Any] = {
        "line": (("text",), np.asarray(numbers, dtype=np.int64)),
        "n_tokens": (("text",), np.asarray(batch.lengths, dtype=np.int64)),
    }
    tokens: dict[str, Any] = {
        "text": (("token",), batch.text_of_token),
        "pos": (("token",), batch.pos),
        "token_id": (("token",), batch.ids),
    }
    own = np.repeat(np.arange(len(batch)), batch.lengths)
    for name, dataset in datasets.items():
        for variable, array in dataset.data_vars.items():
            dims, values = tuple(map(str, array.dims)), array.values
            if values.dtype.kind not in "fiub" or "query" in dims:
                continue
            if "text" in dims:
                texts[f"{name}.{variable}"] = (dims, values)
            elif "token" in dims:
                tokens[f"{name}.{variable}"] = (dims, values)
                if dims == ("token",):
                    texts[f"{name}.mean_{variable}"] = (("text",), _means(values.astype(float), own))
    return {"texts": texts} | ({"tokens": tokens} if keep == "tokens" else {})


def _means(values: np.ndarray, text: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    count = np.bincount(text, known)
    total = np.bincount(text, np.where(known, values, 0.0))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _stacked(parts: Sequence[Columns], along: str) -> Columns:
    first = parts[0]
    return {
        name: (dims, np.concatenate([p[name][1] for p in parts], axis=dims.index(along)))
        for name, (dims, _) in first.items()
    }
