"""Findings, parameters and provenance as tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from probekit.analysis import Finding, Result, fmt
from probekit.plots import visible

from .assets import asset, environment

_LONGEST_LIST = 12
_LONGEST_VALUE = 400


def findings_html(findings: list[Finding]) -> str:
    """A table of claims with value, unit, 95 % interval, null and n, styled to stand alone in a notebook."""
    return f"<style>{asset('findings.css')}</style>{findings_table(findings)}"


def findings_table(findings: Iterable[Finding]) -> Markup:
    """The table of `findings_html` without its style."""
    template = environment().get_template("findings.html.j2")
    return Markup(template.render(rows=[finding_view(f) for f in findings]))


def finding_view(finding: Finding) -> dict[str, Any]:
    """What one finding shows: numbers as a reader wants them, text free of what would not print."""
    interval = None if finding.ci95 is None else f"{fmt(finding.ci95[0])} to {fmt(finding.ci95[1])}"
    return {
        "claim": printable(finding.claim),
        "value": fmt(finding.value),
        "unit": "" if finding.unit == "1" else printable(finding.unit),
        "interval": interval,
        "null": fmt(finding.null),
        "null_meaning": printable(finding.null_meaning),
        "n": f"{finding.n:,}",
        "n_unit": printable(finding.units),
        "where": [f"{k} {_plain(v)}" for k, v in finding.where.items()],
        "analysis": finding.analysis,
    }


def parameter_rows(result: Result) -> list[dict[str, str]]:
    """The parameters a result was computed with, with unit and meaning."""
    specs = type(result.params).specs()
    return [
        {"name": name, "value": _plain(value), "unit": specs[name].unit, "help": specs[name].help}
        for name, value in result.params.as_dict().items()
    ]


def variable_rows(result: Result) -> list[dict[str, str]]:
    """The variables of a result's dataset, with axes, unit and meaning."""
    return [
        {
            "name": name,
            "value": " × ".join(m.dims) or "one number",
            "unit": "" if m.unit == "1" else m.unit,
            "help": m.help,
        }
        for name, m in result.analysis.measures.items()
    ]


def provenance_groups(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest as groups of rows: a mapping makes a group, everything else goes into the first one."""
    general, groups = [], []
    for key, value in manifest.items():
        if key == "plan" and isinstance(value, list) and value and all(isinstance(p, Mapping) for p in value):
            groups.append(("passes", _passes(value)))
        elif isinstance(value, Mapping):
            groups.append((_words(key), list(_flatten("", value))))
        else:
            general.append((_words(key), _plain(value)))
    return [g for g in [("run", general), *groups] if g[1]]


def _passes(plans: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many passes ran, what each kind was for, and what it took."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for plan in plans:
        kinds.setdefault(plan.get("why") or "what the analyses look at first, shared by all of them", []).append(plan)
    total = sum(plan.get("passes", 1) for plan in plans)
    rows = [("in all", f"{total:,} pass{'es' * (total != 1)} through the model")]
    for why, alike in kinds.items():
        n = sum(p.get("passes", 1) for p in alike)
        tokens = sum(p.get("passes", 1) * p.get("n_tokens", 0) for p in alike)
        memory = max(p.get("peak_bytes", 0) for p in alike) / 2**20
        what = f"{n:,} pass{'es' * (n != 1)}, {tokens:,} tokens, at most {memory:,.0f} MiB above the model"
        rows.append((printable(why), what))
    return rows


def _flatten(prefix: str, value: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, item in value.items():
        name = f"{prefix}{_words(key)}"
        if isinstance(item, Mapping) and item:
            yield from _flatten(f"{name} · ", item)
        else:
            yield name, _plain(item)


def _words(key: object) -> str:
    return printable(str(key)).replace("_", " ")


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(k)}: {_plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
        rest = f", … ({len(items)} in all)" if len(items) > _LONGEST_LIST else ""
        return ", ".join(items[:_LONGEST_LIST]) + rest or "none"
    text = printable(str(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates spelled out; blanks and line breaks stay."""
    return visible(text, keep_whitespace=True)


def prose(text: str) -> Markup:
    """Plain text of a docstring as paragraphs and lists; `code` and web addresses are marked up."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        for kind, lines in _runs(block.splitlines()):
            if kind == "list":
                items = Markup("").join(Markup("<li>{}</li>").format(_inline(line)) for line in lines)
                blocks.append(Markup("<ul>{}</ul>").format(items))
            elif lines:
                blocks.append(Markup("<p>{}</p>").format(_inline(" ".join(lines))))
    return Markup("\n").join(blocks)


def _runs(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Paragraph and list parts of one block; a line that begins no item continues the item before it."""
    runs: list[tuple[str, list[str]]] = []
    for line in map(str.strip, lines):
        if re.match(r"[-*•] ", line):
            if not runs or runs[-1][0] != "list":
                runs.append(("list", []))
            runs[-1][1].append(line[2:].strip())
        elif runs and runs[-1][0] == "list":
            runs[-1][1][-1] += f" {line}"
        else:
            runs = runs or [("text", [])]
            runs[-1][1].append(line)
    return runs


def _inline(text: str) -> Markup:
    safe = str(escape(printable(text)))
    safe = re.sub(r"``?([^`]+)``?", r"<code>\1</code>", safe)
    link = r'<a href="\g<0>" rel="noreferrer">\g<0></a>'
    return Markup(re.sub(r"https?://[^\s<>&\"']*[^\s<>&\"'.,;:)\]]", link, safe))
