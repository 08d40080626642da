"""Writes docs/phenomena, one page per analysis, and the index docs/README.md, from the analyses themselves.

    python analyses/docs_pages.py              the text; needs no model
    python analyses/docs_pages.py --figures    the figures as well, from real runs (kept in reports/docs)
    python analyses/docs_pages.py --figures --only logit-lens steering

What a page says of an analysis is its docstring, its parameters and its measures, so change it there. What is below
a figure comes from the run that drew it, and stands in docs/phenomena/figures.json.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import probekit as pk  # noqa: E402
from analyses.docs_examples import EXAMPLES  # noqa: E402
from analyses.docs_picture import picture  # noqa: E402

DOCS = ROOT / "docs"
PAGES = DOCS / "phenomena"
FIGURES = PAGES / "figures.json"
RUNS = ROOT / "reports" / "docs"
MODEL = "smollm2-135m-instruct"
COLLECTED = ("linear-probes", "linear-probes-of-numbers", "concept-erasure", "probe-steering")
SECTIONS = ("Question", "Method", "Null", "Known failure modes", "References")
LARGEST_SVG = 150_000  # bytes; a figure that takes more is stored as pixels
NOTE = "<!-- Written by analyses/docs_pages.py from the analysis itself: change its docstring, not this page. -->"
GROUPS: dict[str, tuple[str, ...]] = {
    "What the model expects": ("token-uncertainty", "logit-lens", "direct-logit-attribution"),
    "Extreme tokens": (
        "attention-sinks", "secondary-sinks", "value-drain", "residual-peaks", "massive-activations", "sink-anatomy",
    ),
    "Interventions": ("activation-patching", "layer-ablation", "dormant-heads", "steering"),
    "Tokens that decide": ("forking-paths", "critical-tokens", "forking-tokens", "branching-factor"),
    "Two models": ("model-shift", "contrastive-estimation"),
    "Strange tokens": ("undertrained-tokens", "glitch-tokens", "sticky-tokens"),
    "Probes of collected rows": COLLECTED,
}  # fmt: skip
GUIDES = {
    "three-ways.md": "Three ways of working: dashboard, notebook, batch study",
    "architecture.md": "Architecture: from a request to a report",
    "add-your-own-phenomenon.md": "Add your own phenomenon: from one file to report and dashboard",
    "coming-from-transformerlens-and-nnsight.md": "Coming from TransformerLens and nnsight",
}
# Pages of the dashboard that were made for one question, by what they are about.
OWN_PAGE = {
    "logit-lens": "Lens", "attention-sinks": "Attention & sinks", "massive-activations": "Massive activations",
    "forking-paths": "Forks", "critical-tokens": "Critical tokens", "undertrained-tokens": "Strange tokens",
    "glitch-tokens": "Strange tokens", "sticky-tokens": "Strange tokens",
}  # fmt: skip


def pages() -> dict[Path, str]:
    """Every generated page, by its path."""
    drawn = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    names = [name for group in GROUPS.values() for name in group]
    found = {PAGES / f"{name}.md": page(pk.get_analysis(name), drawn.get(name, [])) for name in names}
    return found | {DOCS / "README.md": index(), DOCS / "architecture.svg": picture(_uses())}


def _uses() -> dict[str, list[str]]:
    """The table of tests/test_architecture.py: by part, the parts that it may import at once."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    tables = [n for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "PARTS"]
    table = tables[0].value
    assert isinstance(table, ast.Dict)
    found = {}
    for key, value in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(value, ast.Call)
        found[str(key.value)] = str(ast.literal_eval(value.args[0])).split() if value.args else []
    return found


def page(analysis: Any, drawn: list[dict[str, str]]) -> str:
    """The page of one analysis.

    Args:
        analysis: the analysis.
        drawn: file, title, alternative text and caption of its figures.
    """
    parts = [NOTE, f"# {analysis.title}", f"{_marked(analysis.summary())} `{analysis.name}`"]
    for figure in drawn:
        words = _marked(figure["caption"].replace("\n", " "))
        parts.append(f"![{_alt(figure)}]({figure['file']})\n\n*{_marked(figure['title'])}.* {words}")
    parts += [f"## {name}\n\n{_prose(analysis.section(name))}" for name in SECTIONS if analysis.section(name)]
    parts.append(_how(analysis))
    if rows := _parameters(analysis):
        parts.append(f"## Parameters\n\n{rows}")
    parts.append(f"## What comes back\n\n`result.dataset` holds, with axes and units:\n\n{_measures(analysis)}")
    parts.append("[All phenomena](../README.md)")
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """docs/README.md: guides and a table of all phenomena."""
    parts = [NOTE.replace("the analysis itself: change its docstring", "the analyses: change their docstrings")]
    parts += ["# probekit: documentation", "Start with the [README](../README.md) of the project."]
    parts.append("\n".join(f"- [{title}]({file})" for file, title in GUIDES.items()))
    parts.append(
        "## Phenomena\n\nOne page each: what is asked, how it is measured and against what, how it fails, how to run it."
    )
    for group, names in GROUPS.items():
        rows = [
            f"| [{a.title}](phenomena/{a.name}.md) | {_cell(a.summary())} | {_asks(a)} |"
            for a in map(pk.get_analysis, names)
        ]
        parts.append("\n".join([f"### {group}\n", "| phenomenon | question | looks at |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _asks(analysis: Any) -> str:
    if analysis.name in COLLECTED:
        return "prompts to steer" if analysis.name == "probe-steering" else "rows of `pk.collect`"
    if not analysis.reads_texts:
        return "weights and vocabulary" if analysis.name != "sticky-tokens" else "a text-embedding model"
    if analysis.roles:
        return "prompts, and " + ("one more model" if len(analysis.roles) == 1 else "two more models")
    if analysis.writes:
        return "prompts; the model writes"
    return "texts, in many passes" if analysis.intervenes else "texts, in one pass"


def _how(analysis: Any) -> str:
    example = EXAMPLES[analysis.name]
    parts = ["## Run it"]
    if example.flags:
        parts.append(f"```sh\nprobekit run {analysis.name} {example.flags} --out reports/{analysis.name}\n```")
    else:
        parts.append(
            "From Python, on rows that were collected; the command line and the dashboard show what it stored."
        )
    opened = (
        f'import probekit as pk\n\nmodel = pk.open_model("{MODEL}")\n'
        if "model," in example.code
        else "import probekit as pk\n\n"
    )
    shown = f"{opened}{example.code}\nresult.findings\nresult.figures()"
    parts.append(f"```python\n{shown}\n```\n\nThe figures on this page are of this very run.")
    if analysis.name not in COLLECTED:
        own = f"Explore → {OWN_PAGE[analysis.name]}, and " if analysis.name in OWN_PAGE else ""
        parts.append(f"In the dashboard: {own}Every analysis → {analysis.title} (`/analysis-{analysis.name}`).")
    return "\n\n".join(parts)


def _parameters(analysis: Any) -> str:
    rows = []
    for name, spec in analysis.Params.specs().items():
        allowed = ", ".join(f"`{c}`" for c in spec.choices) or spec.bounds or ""
        default = f"`{spec.default}`" if spec.default != "" else ""
        rows.append(f"| `{name}` | {default} | {_cell(spec.unit)} | {allowed} | {_cell(spec.help)} |")
    return "\n".join(["| name | default | unit | allowed | meaning |", "|---|---|---|---|---|", *rows]) if rows else ""


def _measures(analysis: Any) -> str:
    rows = [
        f"| `{name}` | {' × '.join(m.dims) or 'one number'} | {_cell('' if m.unit == '1' else m.unit)} | {_cell(m.help)} |"
        for name, m in analysis.measures.items()
    ]
    return "\n".join(["| variable | axes | unit | meaning |", "|---|---|---|---|", *rows])


def _prose(text: str) -> str:
    """A section of a docstring as Markdown: paragraphs and lists stay, papers are linked."""
    linked = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", _marked(text))
    return re.sub(r"\.\n(?=[A-Z])", ".\n\n", linked) if "arxiv.org" in linked else linked


def _marked(text: str) -> str:
    """Plain text, of which Markdown takes nothing for markup but `code`."""
    parts = text.split("`")
    return "`".join(re.sub(r"([*<>~$])", r"\\\1", p) if i % 2 == 0 else p for i, p in enumerate(parts))


def _cell(text: str) -> str:
    return _marked(text).replace("|", "\\|")


def _alt(figure: dict[str, str]) -> str:
    return re.sub(r"[\[\]\n]", " ", figure["alt"])


def run_id(name: str) -> str:
    """What tells the run of an example from the run of another."""
    return hashlib.sha256(ast.unparse(ast.parse(EXAMPLES[name].code)).encode()).hexdigest()[:12]


def draw(only: list[str]) -> None:
    """Runs the examples, unless their results are kept, and draws their figures."""
    model = pk.open_model(MODEL)
    drawn = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    for name in only or list(EXAMPLES):
        store = RUNS / f"{name}-{run_id(name)}.zarr"
        if not store.exists():
            space: dict[str, Any] = {"pk": pk, "model": model}
            exec(EXAMPLES[name].code, space)
            space["result"].save(store)
        drawn[name] = _drawn(name, pk.load_result(store, name).figures())
        print(name, *(f["file"] for f in drawn[name]))
        FIGURES.write_text(
            json.dumps(dict(sorted(drawn.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _drawn(name: str, drawings: Any) -> list[dict[str, str]]:
    found = []
    for old in PAGES.glob(f"{name}.*"):
        if old.suffix in (".svg", ".png") and old.stem.split(".")[0] == name:
            old.unlink()
    for which in EXAMPLES[name].figures:
        drawing = drawings[which]
        strip = {"quantity": EXAMPLES[name].quantity or None} if hasattr(drawing, "tokens") else {}
        path = drawing.save(PAGES / f"{name}.{which}.svg", width=820, title=True, **strip)
        if path.stat().st_size > LARGEST_SVG:
            path.unlink()
            path = drawing.save(path.with_suffix(".png"), width=820, scale=1.5, **strip)
        found.append(
            {
                "file": path.name,
                "title": drawing.title.rstrip("."),
                "alt": drawing.alt,
                "caption": pk.plots.without_hover(drawing.caption),
                "run": run_id(name),
            }
        )
    return found


def main() -> None:
    """The command."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--figures", action="store_true", help="draw the figures as well")
    asked.add_argument("--only", nargs="+", default=[], metavar="NAME", help="figures of these analyses alone")
    given = asked.parse_args()
    PAGES.mkdir(parents=True, exist_ok=True)
    if given.figures:
        draw(given.only)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    print(f"{len(pages())} pages in {DOCS}")


if __name__ == "__main__":
    main()
