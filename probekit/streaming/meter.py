"""How far a streamed corpus is: texts done, tokens a second, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from probekit.engine import Listener, Step

from .corpus import Corpus
from .store import State

_KNOWN = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
_UNKNOWN = "{desc}: {postfix} [{elapsed}]"


class Meter:
    """A bar on standard error, by bytes of the corpus; or a listener that is told of every shard.

    Args:
        corpus: what is streamed.
        state: where it begins; what was done before does not count in speed and time left.
        progress: show the bar where standard error is a terminal; or the listener.
    """

    def __init__(self, corpus: Corpus, state: State, progress: bool | Listener) -> None:
        self._listener = progress if callable(progress) else None
        self._begin, self._before, self._size = time.monotonic(), state, corpus.size or 0
        self._bar: Any = tqdm(
            desc="streaming",
            total=corpus.size,
            initial=state.position,
            bar_format=_KNOWN if corpus.size else _UNKNOWN,
            file=sys.stderr,
            disable=None if progress is True else True,
        )
        self._say(state)

    def tell(self, state: State) -> None:
        """A shard is committed."""
        self._bar.update(state.position - self._bar.n)
        self._say(state)

    def _say(self, state: State) -> None:
        seconds = time.monotonic() - self._begin
        speed = (state.tokens - self._before.tokens) / seconds if seconds > 0 else 0.0
        words = f"{state.texts:,} texts, {speed:,.0f} tokens/s"
        self._bar.set_postfix_str(words, refresh=True)
        if self._listener is not None:
            self._listener(Step(f"streaming, {words}", float(state.position), float(self._size), "bytes"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
