"""Continuations of a text from one of its tokens, a few at a time: what could have stood there, and where it leads."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

import probekit as pk
from probekit import plots, stats

LIKELY = 0.05  # alternatives of at least this probability are chosen at first
MOST_CHOSEN = 6
TOGETHER = 16  # continuations of one request; the model's lock is free between two
SILENT = "says nothing"
_BYTES = re.compile(r"(?:\\x[89a-f][0-9a-f])+")
Tell = Callable[[pk.Step], None]


@dataclass(frozen=True)
class Option:
    """A token that could stand at a place.

    Args:
        token: its id.
        shown: what it shows as.
        probability: under the model, at temperature 1.
        own: whether it is the one that stands there.
    """

    token: int
    shown: str
    probability: float
    own: bool = False

    @property
    def label(self) -> str:
        """Token and probability in one line."""
        mark = " (stands there)" if self.own else ""
        return f"{plots.visible(self.shown) or '(nothing)'}  {self.probability:.1%}{mark}"


def options(data: Any, place: int) -> list[Option]:
    """What could stand at a place of a text, likeliest first; the text's own token is always among them.

    Args:
        data: dataset of token-uncertainty of one text.
        place: position, 1 to the number of tokens; at the latter, the text's end, there is no own token.
    """
    row = data.isel(token=place - 1)
    shown = {int(i): str(s) for i, s in zip(data["vocab"].values, data["vocab_str"].values, strict=True)}
    own = int(data["token_id"].values[place]) if place < data.sizes["token"] else None
    pairs = zip(row["top_id"].values.tolist(), np.exp(row["top_logprob"].values.astype(float)).tolist(), strict=True)
    found = [Option(int(i), shown[int(i)], p, int(i) == own) for i, p in pairs]
    if own is not None and not any(o.own for o in found):
        p = float(np.exp(-float(row["surprisal_nats"])))
        found.append(Option(own, str(data["token_str"].values[place]), p, True))
    return found


def chosen_at_first(some: Sequence[Option]) -> list[Option]:
    """The text's own token, and the likely others; at least two where there are two."""
    likely = [o for o in some if o.own or o.probability >= LIKELY]
    if len(likely) < 2:
        likely = [o for o in some if o in likely or o in [x for x in some if not x.own][:1]]
    own = [o for o in likely if o.own]
    return sorted([*own, *[o for o in likely if not o.own][: MOST_CHOSEN - len(own)]], key=some.index)


def line_start(tokens: Sequence[str], place: int) -> int:
    """First token of the line that a place lies in, at least 1: answers are read from there on."""
    breaks = [i + 1 for i in range(place) if "\n" in tokens[i]]
    return max(1, min(place, breaks[-1] if breaks else 1))


@dataclass(frozen=True)
class Plan:
    """What is to be written on from one place.

    Args:
        ids: tokens of the text before the place.
        n_prompt: how many of them an answer does not include.
        tokens: ids that are put at the place.
        per: continuations of each.
        sampling: how tokens are drawn.
        outcome: what is read off an answer.
    """

    ids: tuple[int, ...]
    n_prompt: int
    tokens: tuple[int, ...]
    per: int
    sampling: pk.Sampling
    outcome: Any

    @property
    def key(self) -> tuple[Any, ...]:
        """What fixes the continuations, but for their number and the tokens they begin with."""
        return self.ids, self.n_prompt, self.sampling.key, self.outcome.key

    def rounds(self, found: Found) -> Iterator[pk.Branch]:
        """Requests for what is not there yet, small ones; the first is the smallest, so that something shows soon."""
        have = {t: min(len(found.of(t)), self.per) for t in self.tokens}
        most = 1 if not any(have.values()) else max(1, TOGETHER // len(self.tokens))
        while (low := min(have.values())) < self.per:
            some = [t for t in self.tokens if have[t] == low]
            n = min([most, self.per - low, *[h - low for h in have.values() if h > low]])
            yield self.request(some, n, low)
            have |= {t: low + n for t in some}
            most = max(1, TOGETHER // len(self.tokens))

    def request(self, tokens: Sequence[int], n: int, first: int) -> pk.Branch:
        """One request for continuations `first` to `first + n - 1` of some tokens."""
        base = pk.Base(self.ids, self.n_prompt)
        forks = tuple(pk.Fork(0, len(self.ids), t) for t in tokens)
        return pk.Branch((base,), forks, n, first, self.sampling, self.outcome, why="branched by hand")


@dataclass(frozen=True)
class Told:
    """An outcome that also looks whether the reader has cancelled, every few tokens.

    Args:
        outcome: what is read.
        look: raises `pk.Cancelled` once the reader has cancelled.
    """

    outcome: Any
    look: Callable[[], None] = field(compare=False)

    @property
    def key(self) -> str:
        """That of the outcome."""
        return str(self.outcome.key)

    def read(self, text: str) -> str | None:
        """What the answer says."""
        return self.outcome.read(text)

    def settled(self, text: str) -> bool:
        """Whether more text could not change it."""
        self.look()
        return bool(self.outcome.settled(text))


@dataclass(frozen=True)
class Row:
    """One continuation, for the reader.

    Args:
        token: id that it begins with.
        sample: its number.
        outcome: what the answer says; `SILENT` if nothing.
        text: what was written, the token at the place included.
        stopped: "end", "answer" or "length".
        logprob_nats: of everything that was written, at temperature 1.
    """

    token: int
    sample: int
    outcome: str
    text: str
    stopped: str
    logprob_nats: float


@dataclass(frozen=True)
class Found:
    """What has been written, in the order in which it came."""

    rows: tuple[Row, ...] = ()

    def of(self, token: int) -> list[Row]:
        """Continuations that begin with a token."""
        return [r for r in self.rows if r.token == token]

    @property
    def nbytes(self) -> int:
        """Memory that the texts take, about."""
        return sum(200 + 2 * len(r.text) for r in self.rows)


class Live:
    """What has been written so far: a thread adds to it while pages read it."""

    def __init__(self, found: Found | None = None) -> None:
        self._found, self._lock = found or Found(), threading.Lock()

    @property
    def found(self) -> Found:
        """All that is there now."""
        return self._found

    def add(self, rows: Sequence[Row]) -> None:
        """More of it; what is there already is left out."""
        with self._lock:
            known = {(r.token, r.sample) for r in self._found.rows}
            new = [r for r in rows if (r.token, r.sample) not in known]
            self._found = Found((*self._found.rows, *new))


def write(model: Any, plan: Plan, live: Live, tell: Tell) -> Found:
    """Write what a plan lacks, round by round.

    Args:
        model: an opened model.
        plan: what is wanted.
        live: is added to after each round.
        tell: is told every step; raises `pk.Cancelled` once the reader has cancelled.
    """
    total = plan.per * len(plan.tokens)
    done = sum(min(len(live.found.of(t)), plan.per) for t in plan.tokens)
    now = [pk.Step("writing", done, total, "continuations")]

    def look() -> None:
        tell(now[0])

    def listen(step: pk.Step) -> None:
        now[0] = pk.Step("writing", done + step.done, total, "continuations")
        look()

    for request in plan.rounds(live.found):
        look()
        branches = pk.branch(model, replace(request, outcome=Told(request.outcome, look)), progress=listen)
        live.add(rows_of(model, branches))
        done += request.n * len(request.forks)
    now[0] = pk.Step("writing", done, total, "continuations")
    look()
    return live.found


def rows_of(model: Any, branches: Any) -> list[Row]:
    """Continuations as the reader sees them, sample by sample."""
    found = []
    for fork, some in zip(branches.request.forks, branches.continuations, strict=True):
        for one in some:
            ids = one.ids[:-1] if one.stopped == "end" else one.ids
            text = whole_characters("".join(model.decode(list(ids))))
            said = SILENT if one.outcome is None else one.outcome
            found.append(Row(fork.token, one.sample, said, text, one.stopped, float(sum(one.logprobs_nats))))
    return sorted(found, key=lambda r: r.sample)


def whole_characters(text: str) -> str:
    """Characters whose bytes were written in several tokens, and show as escapes, put together again."""

    def joined(found: re.Match[str]) -> str:
        try:
            return bytes.fromhex(found.group().replace("\\x", "")).decode()
        except UnicodeDecodeError:
            return found.group()

    return _BYTES.sub(joined, text)


def outcomes_of(found: Found, tokens: Sequence[int], most: int = 6) -> list[str]:
    """Outcomes of the chosen alternatives, commonest first, silence last; at most so many."""
    counts: dict[str, int] = {}
    for row in found.rows:
        if row.token in tokens:
            counts[row.outcome] = counts.get(row.outcome, 0) + 1
    return sorted(counts, key=lambda o: (o == SILENT, -counts[o], o))[:most]


def tally(found: Found, some: Sequence[Option]) -> pd.DataFrame:
    """How often each alternative leads to each of the commonest outcomes, with Wilson's 95 % intervals.

    Args:
        found: the continuations.
        some: the alternatives.
    """
    named = outcomes_of(found, [o.token for o in some])
    records = []
    for option in some:
        rows = found.of(option.token)
        for outcome in [*named, None]:
            said = sum(r.outcome == outcome if outcome is not None else r.outcome not in named for r in rows)
            if not rows or (outcome is None and not said):
                continue
            low, high = stats.wilson(said, len(rows))
            records.append(
                {
                    "alternative": plots.visible(option.shown), "token id": option.token, "probability": option.probability,
                    "outcome": "others" if outcome is None else outcome, "count": said, "of": len(rows),
                    "share": said / len(rows), "low": low, "high": high,
                }
            )  # fmt: skip
    names = ["alternative", "token id", "probability", "outcome", "count", "of", "share", "low", "high"]
    return pd.DataFrame.from_records(records, columns=names)


def shares_drawn(table: pd.DataFrame, outcome: str, about: str) -> plots.Figure:
    """How often each alternative leads to one outcome, with intervals.

    Args:
        table: as `tally` makes it.
        outcome: one of its outcomes.
        about: model and text.
    """
    rows = table[table["outcome"] == outcome]
    twice = rows["alternative"].duplicated(keep=False)
    names = [f"{a} ({i})" if t else a for a, i, t in zip(rows["alternative"], rows["token id"], twice, strict=True)]
    labels = [f"{name}, n = {n}" for name, n in zip(names, rows["of"], strict=True)]
    best = rows.loc[rows["share"].idxmax()]
    return plots.bars(
        dict(zip(labels, rows["share"].tolist(), strict=True)),
        intervals=dict(zip(labels, zip(rows["low"].tolist(), rows["high"].tolist(), strict=True), strict=True)),
        title=f"{best['share']:.0%} of the continuations after {best['alternative']} say: {plots.visible(outcome, keep_whitespace=True)}",
        unit="share", quantity=f"continuations that say: {plots.visible(outcome, keep_whitespace=True)[:60]}",
        caption=f"{about} Whiskers: 95 % intervals (Wilson).", by="alternative",
        alt="Bars of the share of continuations with one outcome, by alternative, with intervals.",
    )  # fmt: skip
