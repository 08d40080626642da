"""Can the model repeat, spell and measure a token? The proxy tasks of glitch tokens, and where such tokens cluster.

arXiv 2404.09894. Its prompts were not checked; the wording and the examples here are ours.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.core import Forward, InputError, Request, Tokenize, VocabularyTable

from .repeating import NEXT, Prompts, placeholder
from .undertrained import unit

TASKS = ("repetition", "spelling", "length")
SUSPECT, DRAWN = 1, 2  # as what a token is scanned
_WORDS = ("garden", "seven", "Monday")
_REPEATED = ("garden", "ings", "Monday", "==", " river")  # words, parts of words and marks
_PIECE = 256  # tokens that are asked about in one pass
_STEPS = 8  # tokens in which a text may be repeated


def _repetition(word: str) -> tuple[str, str]:
    return f"Input: «{word}»\nOutput: «", f"{word}»\n"


def _spelling(word: str) -> tuple[str, str]:
    return f"Word: «{word}»\nSpelled:", f" {'-'.join(word)}\n"


def _length(word: str) -> tuple[str, str]:
    return f"Word: «{word}»\nLetters:", f" {len(word)}\n"


def _front(task: str) -> str:
    """The examples in front of a question; a device must also repeat the space that many tokens begin with."""
    return "".join("".join(_ASK[task](word)) for word in (_REPEATED if task == "repetition" else _WORDS))


_ASK = {"repetition": _repetition, "spelling": _spelling, "length": _length}


@dataclass(frozen=True)
class Question:
    """What a model reads about one token, and what it should write.

    Args:
        token: the id it is about.
        prompt: ids up to where the answer begins.
        answer: ids of the right answer.
    """

    token: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Verdicts:
    """What became of one task; axis token, in the order of what was asked.

    Args:
        passed: 1 if the greedy continuation is the right answer, 0 if not; NaN where the task does not apply.
        prob: probability of the right answer, of all its tokens together; NaN where it does not apply.
        instead: id of the first token that the model would write in place of the right one; -1 where it passes, or
            where the task does not apply.
    """

    passed: np.ndarray
    prob: np.ndarray
    instead: np.ndarray


def word_of(table: VocabularyTable, token: int) -> str:
    """The word that a token is, without a space in front; "" where it is none, or has one letter only."""
    word = table.decoded[token].strip()
    return word if len(word) > 1 and word.isalpha() else ""


def questions(
    task: str, table: VocabularyTable, kinds: np.ndarray, tokens: Sequence[int]
) -> Generator[Request, Any, list[Question | None]]:
    """A question per token, None where the task does not apply; to be used with `yield from`.

    Prompts are tokenised around a stand-in, which is then replaced by id, so that exactly the tested id is read.
    Repetition applies to every token, and its answer is the id itself. Spelling and length apply to words of at least
    two letters; their answers are written out, up to the end of the line.

    Raises:
        InputError: the stand-in does not survive tokenisation.
    """
    stand_in = placeholder(table, kinds)
    ask = _ASK[task]
    prompt = _front(task) + ask(table.decoded[stand_in])[0]
    words = ["" if task == "repetition" else word_of(table, i) for i in tokens]
    answers = {word: ask(word)[1] for word in words if word}
    whole = (prompt, *(prompt + a for a in dict.fromkeys(answers.values())))
    ids = yield Tokenize(whole, special=True)
    front = _checked(task, tuple(ids[0]), table, stand_in)
    known = dict(zip(whole[1:], ids[1:], strict=True))
    made: list[Question | None] = []
    for token, word in zip(tokens, words, strict=True):
        about = tuple(token if i == stand_in else i for i in front)
        if task == "repetition":
            made.append(Question(token, about, (token,)))
            continue
        full = tuple(known[prompt + answers[word]]) if word else ()
        fits = len(full) > len(front) and full[: len(front)] == front
        made.append(Question(token, about, full[len(front) :]) if fits else None)
    return made


def _checked(task: str, front: tuple[int, ...], table: VocabularyTable, stand_in: int) -> tuple[int, ...]:
    if front.count(stand_in) != 1:
        raise InputError(
            f"The prompt of the task {task!r} holds the stand-in {table.decoded[stand_in]!r} (id {stand_in}) "
            f"{front.count(stand_in)} times as one token; expected once, so that another token can be put in its place."
        )
    return front


def repetition(table: VocabularyTable, kinds: np.ndarray) -> Generator[Request, Any, Prompts]:
    """The prompt of the task of repetition, up to where the token must come; to be used with `yield from`.

    Raises:
        InputError: the stand-in does not survive tokenisation.
    """
    stand_in = placeholder(table, kinds)
    (ids,) = yield Tokenize((_front("repetition") + _repetition(table.decoded[stand_in])[0],), special=True)
    return Prompts((_checked("repetition", tuple(ids), table, stand_in),), stand_in)


def answered(task: str, asked: Sequence[Question | None], table: VocabularyTable) -> Generator[Request, Any, Verdicts]:
    """Whether greedy continuations are the right answers; to be used with `yield from`.

    The right answer is put behind the prompt, and read once: the greedy continuation is it if and only if each of its
    tokens is the likeliest where it stands. A token is repeated, too, if the continuation says its text in other tokens,
    differing in case or in space around it.
    """
    passed, prob = np.full((2, len(asked)), np.nan)
    instead = np.full(len(asked), -1)
    places = [i for i, q in enumerate(asked) if q is not None]
    for a in range(0, len(places), _PIECE):
        some = places[a : a + _PIECE]
        inputs = tuple((*q.prompt, *q.answer) for i in some if (q := asked[i]) is not None)
        trace = yield Forward((NEXT,), inputs=inputs, why=f"whether tokens pass: {task}")
        data, lengths = trace[NEXT], trace.batch.lengths
        rank, logprob = data["target_rank"].values, data["logprob_nats"].values.astype(float)
        for i, start, length in zip(some, trace.batch.starts, lengths, strict=True):
            question = asked[i]
            assert question is not None
            rows = slice(start + len(question.prompt) - 1, start + length - 1)
            wrong = np.flatnonzero(rank[rows] > 0)
            passed[i], prob[i] = float(not wrong.size), float(np.exp(logprob[rows].sum()))
            if wrong.size:
                instead[i] = int(data["top_id"].values[rows][wrong[0], 0])
    if task == "repetition":
        failed = {i: q for i, q in enumerate(asked) if q is not None and passed[i] == 0}
        for i in (yield from _said_otherwise(failed, instead, table)):
            passed[i], instead[i] = 1.0, -1
    return Verdicts(passed, prob, instead)


def _said_otherwise(
    asked: Mapping[int, Question], first: np.ndarray, table: VocabularyTable
) -> Generator[Request, Any, list[int]]:
    """Of questions whose answer was not the id, those whose greedy continuation says its text in other tokens."""
    wanted = {i: table.decoded[q.token].strip().casefold() for i, q in asked.items()}
    written = {i: [int(first[i])] for i, text in wanted.items() if text and "\ufffd" not in text}
    said: list[int] = []
    for step in range(_STEPS):
        texts = {i: "".join(table.decoded[t] for t in ids).lstrip().casefold() for i, ids in written.items()}
        said += [i for i, text in texts.items() if text.startswith(wanted[i])]
        left = [i for i, text in texts.items() if i not in said and wanted[i].startswith(text)]
        written = {i: written[i] for i in left}
        if not left or step == _STEPS - 1:
            break
        inputs = tuple((*asked[i].prompt, *written[i]) for i in left)
        trace = yield Forward((NEXT,), inputs=inputs, why="whether tokens are repeated in other tokens")
        last = np.array(trace.batch.starts) + np.array(trace.batch.lengths) - 1
        for i, greedy in zip(left, trace[NEXT]["top_id"].values[last, 0].tolist(), strict=True):
            written[i].append(int(greedy))
    return said


def scanned_as(ranked: np.ndarray, ordinary: np.ndarray, *, n_suspects: int, n_random: int, seed: int) -> np.ndarray:
    """Which tokens are scanned, and as what: those that rank lowest, and some of the others; axis vocab.

    Args:
        ranked: what ranks suspects, small is suspicious; axis vocab.
        ordinary: tokens that may be scanned; axis vocab.
        n_suspects: tokens scanned as `SUSPECT`.
        n_random: tokens scanned as `DRAWN`, from all others.
        seed: of what is drawn.
    """
    order = np.argsort(np.where(ordinary, ranked, np.inf), kind="stable")[: int(ordinary.sum())]
    scanned = np.zeros(len(ranked), dtype=np.int64)
    scanned[order[:n_suspects]] = SUSPECT
    scanned[np.random.default_rng(seed).permutation(order[n_suspects:])[:n_random]] = DRAWN
    return scanned


def judged(passed: np.ndarray, scanned: np.ndarray, competence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of random tokens that pass each task, whether it counts, and who fails one that does.

    Args:
        passed: 1, 0 or NaN; axes task, vocab.
        scanned: as what a token is scanned; axis vocab.
        competence: share of the random tokens that has to pass a task.
    """
    drawn = passed[:, scanned == DRAWN]
    asked = np.isfinite(drawn)
    share = np.where(asked.any(axis=1), np.nansum(drawn, axis=1) / np.maximum(asked.sum(axis=1), 1), np.nan)
    counts = np.isfinite(share) & (share >= competence)
    known = passed[counts]
    return share, counts, np.where(np.isfinite(known).any(axis=0), (known == 0).any(axis=0), np.nan)


def share_of(glitch: np.ndarray) -> float:
    """Glitch tokens among the tokens that were judged; 0 where none was."""
    known = glitch[np.isfinite(glitch)]
    return float(known.mean()) if known.size else 0.0


def passes_of(n_tokens: int, n_tasks: int) -> int:
    """Passes that so many tokens take at most."""
    return -(-n_tokens // _PIECE) * n_tasks + _STEPS - 1


def clusters(rows: np.ndarray, least: int, density: float) -> np.ndarray:
    """The cluster of each row, -1 for none: DBSCAN on the cosine distances of centred rows.

    The radius is such that the given share of the rows, those in the densest surroundings, have enough others within it
    to be inside a cluster.

    Args:
        rows: axes token, d_model.
        least: rows within the radius, itself included, that make a row the inside of a cluster.
        density: share of the rows that are inside clusters.
    """
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import NearestNeighbors

    if len(rows) <= least:
        return np.full(len(rows), -1)
    some = unit(rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0))
    near = NearestNeighbors(n_neighbors=least, metric="cosine", algorithm="brute").fit(some)
    radius = float(np.quantile(near.kneighbors(some)[0][:, -1], density))
    found: np.ndarray = DBSCAN(
        eps=max(radius, 1e-9), min_samples=least, metric="cosine", algorithm="brute"
    ).fit_predict(some)
    return found


def lower_bound(successes: int, n: int, level: float) -> float:
    """The exact one-sided lower confidence bound of a share (Clopper and Pearson 1934).

    Args:
        successes: draws that count.
        n: all draws.
        level: probability of a bound above the truth, at most.
    """
    from scipy.stats import beta

    return 0.0 if successes == 0 else float(beta.ppf(level, successes, n - successes + 1))


@dataclass(frozen=True)
class Probed:
    """What a few tokens of each cluster say of it.

    Args:
        probed: whether a token was one of them; axis token.
        flagged: whether a token is in a cluster with more glitch tokens than expected; axis token.
        bound: by cluster, the lower bound of its share of glitch tokens.
        found: by cluster, glitch tokens among the probed ones and how many were probed.
    """

    probed: np.ndarray
    flagged: np.ndarray
    bound: np.ndarray
    found: np.ndarray


def probe(labels: np.ndarray, glitch: np.ndarray, expected: float, *, n: int, seed: int) -> Probed:
    """Test a few tokens of each cluster; a cluster is flagged if its share of glitch tokens surely exceeds the expected.

    Surely: the exact lower bound at 5 %, divided by the number of clusters, lies above.

    Args:
        labels: cluster of each token, -1 for none.
        glitch: whether each token is one; only those of probed tokens are looked at.
        expected: share of glitch tokens among tokens drawn at random.
        n: tokens that are probed in each cluster.
        seed: of their choice.
    """
    rng = np.random.default_rng(seed)
    names = range(int(labels.max(initial=-1)) + 1)
    probed = np.zeros(len(labels), dtype=bool)
    flagged = np.zeros(len(labels), dtype=bool)
    bound, found = np.zeros(len(names)), np.zeros((len(names), 2), dtype=np.int64)
    for c in names:
        inside = np.flatnonzero(labels == c)
        drawn = rng.permutation(inside)[:n]
        probed[drawn] = True
        found[c] = int(glitch[drawn].sum()), len(drawn)
        bound[c] = lower_bound(int(found[c, 0]), len(drawn), 0.05 / len(names))
        flagged[inside] = bound[c] > expected
    return Probed(probed, flagged, bound, found)
