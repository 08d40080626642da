"""The report: one file that opens anywhere, offline, and says what was found and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probekit.analysis import Result, Results, strongest
from probekit.plots import PLOT_CONFIG, Drawing, Figure, figure_json, plotly_js

from .assets import asset, environment, script_json
from .strips import strip_data
from .tables import (
    finding_view,
    findings_table,
    parameter_rows,
    printable,
    prose,
    provenance_groups,
    variable_rows,
)

GENERATOR = "probekit report"
_N_STRONGEST = 3
_OPEN_SECTIONS = ("Question", "Method")
_FOLDED_SECTIONS = ("Null", "Known failure modes", "References")


def report_html(results: Results, manifest: Mapping[str, Any]) -> str:
    """The whole report as one self-contained page.

    Args:
        results: what was found.
        manifest: provenance of the run. `title`, or else `model` (a name, or a mapping with `name`), and `corpus` (a
            line of text) make the title; everything is shown in the last section.
    """
    sections = [_section(r) for r in results.values()]
    return environment().get_template("report.html.j2").render(
        generator=GENERATOR,
        title=_model_name(results, manifest),
        corpus=printable(str(manifest.get("subtitle") or "")) or _corpus_line(results, manifest),
        cards=[_card(results, f) for f in strongest(results.findings, _N_STRONGEST)],
        sections=sections,
        provenance=provenance_groups(manifest),
        has_figures=any(d["kind"] == "figure" for s in sections for d in s["drawings"]),
        plotly_js=plotly_js,
        options=script_json(PLOT_CONFIG),
        asset=asset,
    )  # fmt: skip


def _model_name(results: Results, manifest: Mapping[str, Any]) -> str:
    if manifest.get("title"):
        return printable(str(manifest["title"]))
    candidates = [manifest, *(r.provenance for r in results.values())]
    for source in candidates:
        model = source.get("model")
        name = model.get("name") if isinstance(model, Mapping) else model
        if name:
            return printable(str(name))
    return "Token-level report"


def _corpus_line(results: Results, manifest: Mapping[str, Any]) -> str:
    """What was read: the manifest's own words, then texts and tokens as counted in the results."""
    parts = []
    corpus = manifest.get("corpus")
    name = corpus.get("name") if isinstance(corpus, Mapping) else corpus
    if name:
        parts.append(printable(str(name)))
    for result in results.values():
        if result.merged is not None:  # its dataset holds the texts that are shown
            about = result.provenance["texts"]
            parts += [_count(about["n_texts"], "text"), _count(about["n_tokens"], "token")]
            parts += [f"left out: {n:,} {why}" for why, n in about.get("left out", {}).items()]
            break
        if "token" in result.dataset.sizes and "text" in result.dataset.coords:
            texts = len(set(result.dataset["text"].values.tolist()))
            parts.append(_count(texts, "text"))
            parts.append(_count(result.dataset.sizes["token"], "token"))
            break
    parts.append(_count(len(results), "analysis", "analyses"))
    return " · ".join(parts)


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _card(results: Results, finding: Any) -> dict[str, Any]:
    result = results.get(finding.analysis)
    title = result.analysis.heading(result) if result else finding.analysis
    return finding_view(finding) | {"title": title}


def _section(result: Result) -> dict[str, Any]:
    analysis = result.analysis
    drawings = [_drawing(f"{result.name}--{name}", d) for name, d in result.figures().items()]
    return {
        "name": result.name,
        "title": printable(analysis.heading(result)),
        "summary": analysis.summary(),
        "open": [(h, prose(analysis.section(h))) for h in _OPEN_SECTIONS if analysis.section(h)],
        "folded": [(h, prose(analysis.section(h))) for h in _FOLDED_SECTIONS if analysis.section(h)],
        "findings": findings_table(result.findings),
        "remarks": [printable(remark) for remark in analysis.remarks(result)],
        "drawings": drawings,
        "parameters": parameter_rows(result),
        "variables": variable_rows(result),
    }


def _drawing(anchor: str, drawing: Drawing) -> dict[str, Any]:
    words = {
        "id": anchor,
        "title": printable(drawing.title),
        "caption": printable(drawing.caption),
        "alt": printable(drawing.alt),
    }
    if isinstance(drawing, Figure):
        plot = figure_json(drawing, title=False)
        return words | {"kind": "figure", "height": plot["layout"]["height"], "data": script_json(plot)}
    return words | {"kind": "strip", "height": 160, "data": script_json(strip_data(drawing))}
