"""One bar for a whole run, however many passes it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

REDRAW = 0.1  # seconds between two drawings
_ONE = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} GFLOP [{elapsed}<{remaining}]"
_MANY = "{desc} |{bar}| [{elapsed}<{remaining}]"
_WRITING = "{desc}: {n:.0f}/{total:.0f} continuations |{bar}| [{elapsed}<{remaining}]"
_COMPARING = "{desc}: {n:,.0f}/{total:,.0f} texts |{bar}| [{elapsed}<{remaining}]"
_UNKNOWN = "{desc} [{elapsed}]"


@dataclass(frozen=True)
class Step:
    """How far a run has come.

    Args:
        what: what it is doing, in a few words.
        done: of `total`.
        total: how much there is in all; 0 if that is not known.
        unit: what both are counted in.
    """

    what: str
    done: float
    total: float
    unit: str


Listener = Callable[[Step], None]


def told(progress: bool | Listener) -> dict[str, Any]:
    """Who a `Progress` tells: the terminal, nobody, or a listener."""
    return {"listener": progress} if callable(progress) else {"shown": progress}


class Progress:
    """A bar on standard error: GFLOP of the only pass, or "pass 12 of 90" where there are many.

    Args:
        passes: how many passes the run is expected to make; one more than that, and the bar only counts.
        shown: off unless asked for; where asked for, it keeps quiet if standard error is no terminal.
        listener: is told of every step instead. What it raises ends the run; the model is then as it was found.
    """

    def __init__(self, passes: int = 1, *, shown: bool = False, listener: Listener | None = None) -> None:
        self._expected, self._pass, self._work = passes, 0, 0.0
        self._listener, self._step = listener, Step("", 0.0, 0.0, "passes")
        self._row = ("", 0)  # texts that are embedded, request after request
        self._bar: Any = tqdm(
            desc="capture",
            total=0,
            bar_format=_UNKNOWN,
            file=sys.stderr,
            mininterval=REDRAW,
            disable=None if shown else True,
        )

    @property
    def silent(self) -> bool:
        """Whether nobody would see it."""
        return bool(self._bar.disable) and self._listener is None

    def _say(self, what: str, done: float, total: float, unit: str) -> None:
        self._step = Step(what, min(done, total) if total else done, total, unit)
        if self._listener is not None:
            self._listener(self._step)

    def _more(self, done: float) -> None:
        step = self._step
        self._say(step.what, step.done + done, step.total, step.unit)

    def begin(self, gflop: float) -> None:
        """Another pass starts; it takes so much arithmetic."""
        self._pass, self._work = self._pass + 1, gflop
        if self.silent:
            return
        if self._expected == 1 and self._pass == 1:
            self._say("reading", 0, gflop, "GFLOP")
            self._bar.total, self._bar.bar_format = gflop, _ONE
            return
        known = self._pass <= self._expected
        self._say(f"pass {self._pass}", self._pass - 1, self._expected if known else 0, "passes")
        self._bar.total, self._bar.bar_format = (self._expected, _MANY) if known else (None, _UNKNOWN)
        self._bar.n = self._pass - 1
        # The bar redraws at its own pace: hundreds of short passes do not each write to the terminal.
        self._bar.set_description_str(
            f"pass {self._pass} of {self._expected}" if known else f"pass {self._pass}", False
        )

    def begin_writing(self, n: int) -> None:
        """So many continuations follow."""
        self._pass += 1
        if self.silent:
            return
        self._say("writing", 0, n, "continuations")
        self._bar.bar_format, self._bar.total, self._bar.n = _WRITING, n, 0
        self._bar.set_description_str("writing", False)
        self._bar.unpause()

    def written(self, n: int) -> None:
        """So many of them are done since the last call."""
        self._more(n)
        self._bar.update(n)

    def begin_texts(self, what: str, n: int, total: int) -> None:
        """So many texts are embedded next, of so many that requests of the same name embed one after another."""
        if (what, total) == self._row:
            return
        self._pass, self._row = self._pass + 1, (what, total)
        if self.silent:
            return
        self._say(what or "embedding", 0, max(n, total), "texts")
        self._bar.bar_format = _COMPARING
        self._bar.reset(max(n, total))
        self._bar.set_description_str(what or "embedding", False)

    def embedded(self, n: int, *, known: bool = False) -> None:
        """So many texts are done since the last call; those that a journal knew do not count in the estimate."""
        if self.silent:
            return
        self._more(n)
        if known:
            self._bar.initial += n
        self._bar.update(n)

    def tell(self, work: float) -> None:
        """So many GFLOP of this pass are done since the last call."""
        if self._step.unit == "GFLOP":
            self._more(work)
        elif self._work > 0:
            self._more(min(work / self._work, max(self._pass - self._step.done, 0.0)))
        if self._expected == 1 and self._pass == 1:
            self._bar.update(min(work, max(self._work - self._bar.n, 0.0)))
        elif self._work > 0:
            self._bar.update(min(work / self._work, max(self._pass - self._bar.n, 0.0)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self.silent and self._bar.total:
            self._bar.n = self._bar.total
            if self._pass > 1:  # the number that was expected is about right, not exactly
                self._bar.set_description_str(f"{self._pass} passes", refresh=False)
        self._bar.close()
