"""Which analyses exist. One decorator, one folder; there is no second place to register."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from probekit.core import InputError, unknown

from .contract import Analysis

_ANALYSES: dict[str, Analysis] = {}
# Results of rows that a user collected, and of several runs: they load and show as others do, but nothing runs them by
# name. Where each is found.
_NOT_RUN = {
    "concept-erasure": "probekit.probing.analyses",
    "linear-probes": "probekit.probing.analyses",
    "linear-probes-of-numbers": "probekit.probing.analyses",
    "probe-steering": "probekit.probing.analyses",
    "comparison": "probekit.studies.analyses",
}
A = TypeVar("A", bound=type[Analysis])


def register(cls: A) -> A:
    """Make an analysis known under its name, to Python, the command line and the report.

    Raises:
        ValueError: the name is not kebab-case, taken, or the class declares no measures.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", getattr(cls, "name", "")):
        raise ValueError(f"{cls.__name__}.name must be kebab-case, found {getattr(cls, 'name', None)!r}")
    if not getattr(cls, "title", "") or not getattr(cls, "measures", None):
        raise ValueError(f"{cls.__name__} needs a title and at least one measure")
    taken = _ANALYSES.get(cls.name)
    if taken is not None and _origin(type(taken)) != _origin(cls):
        raise ValueError(f"{cls.__name__}: the name {cls.name!r} belongs to {_origin(type(taken))}")
    _ANALYSES[cls.name] = cls()
    return cls


def _origin(cls: type) -> str:
    # A notebook cell that is run again defines the same analysis anew, and may.
    return f"{cls.__module__}.{cls.__qualname__}"


def _discover() -> None:
    package = importlib.import_module("probekit.phenomena")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")


def analyses() -> dict[str, Analysis]:
    """Every known analysis, by name."""
    _discover()
    return dict(sorted(_ANALYSES.items()))


def get_analysis(name: str) -> Analysis:
    """The analysis of this name.

    Raises:
        UnknownName: there is none; close matches are suggested.
    """
    found = _ANALYSES.get(name) or analyses().get(name)
    if found is None and name in _NOT_RUN:
        found = importlib.import_module(_NOT_RUN[name]).ANALYSES[name]
    if found is None:
        raise unknown("analysis", name, analyses(), "`probekit list` shows them all.")
    return found


def get_analyses(names: str | Iterable[str]) -> list[Analysis]:
    """The analyses of these names, in order and without repeats; "all" stands for every one that only looks.

    Raises:
        UnknownName: one of them does not exist.
        InputError: no name was given.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise InputError(f"No analysis was named. Known: {', '.join(analyses())}; or 'all'.")
    looking = [n for n, a in analyses().items() if a.only_looks()]
    expanded = [n for name in wanted for n in (looking if name == "all" else [name])]
    return [get_analysis(n) for n in dict.fromkeys(expanded)]


def load_file(path: str | Path) -> None:
    """Import one file of the user's that registers analyses.

    Raises:
        InputError: there is no such Python file.
    """
    _discover()  # first, so that a name which is taken is the user's to change
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"Expected a Python file that registers analyses, found {str(path)!r}.")
    name = f"probekit_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


@contextmanager
def temporary_registrations() -> Iterator[None]:
    """Forget, at the end of the block, what was registered inside it."""
    _discover()
    before = dict(_ANALYSES)
    try:
        yield
    finally:
        _ANALYSES.clear()
        _ANALYSES.update(before)
