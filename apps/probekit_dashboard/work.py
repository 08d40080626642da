"""Long work in the background: it reports how far it is, can be cancelled, and keeps its outcome."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import probekit as pk

_LOG = logging.getLogger("probekit.dashboard")


class Work:
    """One thing that runs in a thread of its own.

    Args:
        label: what it is, for the reader.
        do: gets a function to report every `pk.Step` to, and returns the outcome. The function raises `pk.Cancelled`
            once the reader has cancelled.
        key: under which its outcome is kept.
    """

    def __init__(self, label: str, do: Callable[[Callable[[pk.Step], None]], Any], key: str = "") -> None:
        self.label, self.key = label, key
        self.step = pk.Step("waiting for the model", 0, 0, "")
        self.outcome: Any = None
        self.error: str = ""
        self.cancelled = False
        self.started = self._since = time.monotonic()
        self.ended: float | None = None
        self._stop = threading.Event()
        self._do = do
        self._thread = threading.Thread(target=self._run, name=f"probekit {label}", daemon=True)
        self._thread.start()

    def _tell(self, step: pk.Step) -> None:
        if (step.unit, step.total) != (self.step.unit, self.step.total) or step.done < self.step.done:
            self._since = time.monotonic()
        self.step = step
        if self._stop.is_set():
            raise pk.Cancelled("The run was cancelled.")

    def check(self) -> None:
        """For work that has no steps to report: stops here if the reader has cancelled."""
        if self._stop.is_set():
            raise pk.Cancelled("The run was cancelled.")

    def _run(self) -> None:
        try:
            self.outcome = self._do(self._tell)
        except pk.Cancelled:
            self.cancelled = True
        except pk.ProbekitError as error:
            self.error = str(error)
        except MemoryError:
            self.error = "The machine ran out of memory. Take a shorter text, or a smaller model."
        except Exception as error:  # the reader gets a sentence, the log everything
            _LOG.error("%s failed\n%s", self.label, traceback.format_exc())
            self.error = (
                f"probekit failed at this ({type(error).__name__}: {str(error)[:300]}). This is a fault of probekit's; "
                "the log of the dashboard holds the details."
            )
        finally:
            self.ended = time.monotonic()

    @property
    def running(self) -> bool:
        """Whether it is still under way."""
        return self.ended is None

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def share(self) -> float | None:
        """How much is done, from 0 to 1; None while that is not known."""
        return min(1.0, self.step.done / self.step.total) if self.step.total else None

    @property
    def line(self) -> str:
        """Where it is, in words."""
        step = self.step
        if not step.total:
            return f"{self.label}: {step.what or 'starting'} · {self.seconds:.0f} s"
        spent = (self.ended or time.monotonic()) - self._since  # on what is counted now
        left = "" if not step.done else f" · about {spent * (step.total - step.done) / step.done:.0f} s left"
        return f"{self.label}: {step.what}, {step.done:,.0f} of {step.total:,.0f} {step.unit}{left}"

    def cancel(self) -> None:
        """End it at its next step."""
        self._stop.set()

    def wait(self, seconds: float) -> bool:
        """Give it so long; whether it has ended."""
        self._thread.join(seconds)
        return not self.running


class Works:
    """Everything that one session has under way, by place; cancelled when the session ends."""

    def __init__(self) -> None:
        self._by_place: dict[str, Work] = {}

    def start(self, place: str, work: Callable[[], Work]) -> Work:
        """Start a work in a place, and cancel what ran there."""
        self.drop(place)
        self._by_place[place] = work()
        return self._by_place[place]

    def get(self, place: str) -> Work | None:
        """What runs, or has run, in a place."""
        return self._by_place.get(place)

    def drop(self, place: str) -> None:
        """Cancel and forget what runs in a place."""
        old = self._by_place.pop(place, None)
        if old is not None:
            old.cancel()

    def cancel_all(self) -> None:
        """End everything."""
        for work in self._by_place.values():
            work.cancel()
