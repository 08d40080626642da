"""Texts of three kinds that every Python installation carries: nothing is downloaded, nothing is shipped.

They differ a little between Python versions; a report's digest of its texts says which ones ran.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

_MODULES = (
    "argparse", "ast", "asyncio.tasks", "calendar", "configparser", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "email.message", "fractions", "gettext", "heapq", "html.parser", "http.client", "inspect", "json.decoder",
    "logging", "mailbox", "pathlib", "pickle", "queue", "random", "sched", "shutil", "socket", "statistics", "string",
    "subprocess", "tarfile", "textwrap", "threading", "tokenize", "turtle", "typing", "unittest.case", "urllib.parse",
    "uuid", "weakref", "xml.dom.minidom", "zipfile",
)  # fmt: skip


def python_texts(n_texts: int = 16, n_chars: int = 600) -> dict[str, list[str]]:
    """Prose (the language reference), code (the standard library) and its licence, by domain.

    Args:
        n_texts: texts per domain; fewer where an installation has fewer.
        n_chars: characters of each text; 600 come to 130 to 200 tokens.
    """
    from pydoc_data.topics import topics

    prose = [text for text in topics.values() if len(text) > n_chars + 400]
    code = [Path(spec.origin).read_text(encoding="utf-8") for name in _MODULES if (spec := _spec(name)) and spec.origin]
    licence = _licence()
    pieces = [licence[a : a + n_chars] for a in range(0, len(licence) - n_chars, n_chars)]
    # The openings of code and prose are alike (licences, headings), so pieces come from further on.
    domains = {
        "prose": [text[200 : 200 + n_chars] for text in prose],
        "code": [text[len(text) // 2 :][:n_chars] for text in code if len(text) > 4 * n_chars],
        "licence": pieces,
    }
    return {name: texts[:n_texts] for name, texts in domains.items() if texts}


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def _licence() -> str:
    """The licence of Python, in the words of `license()`; "" where an installation lacks it."""
    import os

    places = [Path(os.__file__).parent / "LICENSE.txt", Path(os.__file__).parents[2] / "LICENSE.txt"]
    found = next((p for p in places if p.is_file()), None)
    return "" if found is None else found.read_text(encoding="utf-8")
