"""Templates, style sheets and scripts of the report, and data that is safe to put beside them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_HERE = Path(__file__).parent
# What could end a script element or a line of JavaScript inside a JSON string.
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@cache
def environment() -> jinja2.Environment:
    """The templates of this folder; every value is escaped unless it is `Markup`."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def asset(name: str) -> Markup:
    """A style sheet or script of this folder, to be inlined."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))


def script_json(data: Any) -> Markup:
    """`data` as JSON that may stand inside a script element, whatever its strings hold.

    Raises:
        ValueError: a number is not finite; write None for it.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_UNSAFE))
