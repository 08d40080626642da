"""Everything probekit raises on purpose.

    ProbekitError
    ├── InputError          a text, file, parameter or name the user gave (ValueError)
    │   ├── TextError       a text that cannot be analysed
    │   └── UnknownName     a name that is not in a table (LookupError)
    ├── ModelError          a model that cannot be opened or does not fit the request (RuntimeError)
    │   ├── ModelNotFound   nothing answers to this name, or the hub is out of reach
    │   ├── ChecksumError   a download that is not what the catalogue promises
    │   ├── CapabilityError a model asked for something it cannot do
    │   └── SelfCheckError  the backend's numbers contradict the model's own
    ├── PlanError           a run that does not fit (MemoryError)
    ├── Cancelled           a run that its user ended
    └── StoreError          a file of results that cannot be written or read (OSError)

Each message says what was found, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ProbekitError(Exception):
    """Base of every error that probekit raises on purpose."""


class InputError(ProbekitError, ValueError):
    """Something the user gave cannot be used."""


class TextError(InputError):
    """A text cannot be analysed: empty, too short, too long, or not text."""


class UnknownName(InputError, LookupError):
    """A name is in no table. Build it with `unknown`, which adds close matches."""


class ModelError(ProbekitError, RuntimeError):
    """A model cannot be opened, or not used in this way."""


class ModelNotFound(ModelError):
    """No model answers to this name, or the place that holds it is out of reach."""


class ChecksumError(ModelError):
    """A downloaded file differs from what the catalogue promises."""


class CapabilityError(ModelError):
    """The model cannot serve this request."""


class SelfCheckError(ModelError):
    """What the backend captures contradicts what the model computes."""


class Cancelled(ProbekitError):
    """The user ended a run; nothing is lost but what was under way."""


class PlanError(ProbekitError, MemoryError):
    """The run does not fit in memory."""


class StoreError(ProbekitError, OSError):
    """Results cannot be written or read."""


def unknown(what: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
    """The error for a name that is in no table, with close matches or the whole list.

    Args:
        what: what kind of thing was looked up, such as "analysis".
        name: the name that was not found.
        known: the names that would have been right.
        hint: one more sentence on what to do.
    """
    known = sorted(known)
    longer = [k for k in known if name and k.startswith(name)]
    close = list(dict.fromkeys([*longer, *difflib.get_close_matches(name, known, n=3, cutoff=0.5)]))[:3]
    if close:
        advice = f"Did you mean {' or '.join(repr(c) for c in close)}?"
    elif len(known) <= 30:
        advice = f"Known: {', '.join(known) or 'none'}."
    else:
        advice = f"There are {len(known)} known names, such as {', '.join(known[:5])}."
    return UnknownName(f"Unknown {what} {name!r}. {advice}{' ' + hint if hint else ''}")
