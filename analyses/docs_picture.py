"""The picture of docs/architecture.md: the way of a run, and the parts in the order in which they may import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH = 1000
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
INK, MUTED, RULE, BLUE, PALE, WARM = "#20262e", "#5c6672", "#c3cad2", "#0b6bab", "#eaf3fa", "#fdf1e7"
# What happens in one run: what it is called, what it is, and whose it is.
FLOW = (
    ("Request", "what an analysis wants to see", "core"),
    ("Plan", "union of all requests; tokens, memory", "engine"),
    ("One pass", "hooks at points of the model", "backends"),
    ("Reducers", "shrink where the activations live", "reduce"),
    ("Trace", "named axes, units, provenance", "core"),
    ("Analysis", "compute: numbers; or ask again", "phenomena"),
    ("Result", "findings with null, interval, n", "analysis"),
)
ENDS = (("Report", "reporting"), ("Dashboard", "apps"), ("Notebook", "plots"), ("Command line", "cli"))
OUTSIDE = ("apps/probekit_dashboard", "notebooks", "analyses")
HIDDEN = ("__init__", "__main__", "_version")


def levels(uses: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The parts by how many steps of imports lie below them, lowest first; commands belong to `cli`."""
    found: dict[str, int] = {}

    def level(part: str) -> int:
        if part not in found:
            found[part] = 1 + max((level(other) for other in uses[part]), default=-1)
        return found[part]

    rows: list[list[str]] = []
    for part in uses:
        rows += [[] for _ in range(level(part) + 1 - len(rows))]
        if part not in HIDDEN and not part.endswith("_command"):
            rows[level(part)].append(part)
    return [row for row in rows if row]


def picture(uses: Mapping[str, Sequence[str]]) -> str:
    """The SVG document.

    Args:
        uses: by part, the parts that it may import at once.
    """
    rows = levels(uses)
    top = 318
    height = top + 46 * (len(rows) + 1) + 52
    parts = [*_flow(), *_parts(rows, top)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'font-family="{FONT}"><title>How probekit is built</title><desc>A run from request to report, and below it the parts '
        f"of the package in rows; a part imports from rows below its own.</desc>"
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker></defs>'
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="#ffffff" stroke="{RULE}"/>'
        + "\n".join(parts) + "</svg>\n"
    )  # fmt: skip


def _flow() -> Iterator[str]:
    yield _text(24, 34, "One run", size=15, weight=650)
    wide, gap = 122, 15
    for i, (name, about, owner) in enumerate(FLOW):
        x = 24 + i * (wide + gap)
        yield _box(x, 52, wide, 92, WARM if name in ("Request", "Analysis") else PALE)
        yield _text(x + wide / 2, 76, name, size=14, weight=650, anchor="middle")
        for k, line in enumerate(_lines(about, 20)):
            yield _text(x + wide / 2, 95 + 14 * k, line, size=11, color=MUTED, anchor="middle")
        yield _text(x + wide / 2, 136, owner, size=10.5, color=BLUE, anchor="middle")
        if i:
            yield _arrow(x - gap + 1, 98, x - 2, 98)
    asks, analysis = 24 + wide / 2, 24 + 5 * (wide + gap) + wide / 2
    yield _path(f"M{analysis} 146V176H{asks}V148")
    again = "a conversation: an analysis may ask again (patch, branch, embed), and is sent what was seen"
    yield _text((asks + analysis) / 2, 192, again, size=11.5, color=MUTED, anchor="middle")
    result = 24 + 6 * (wide + gap) + wide / 2
    yield _path(f"M{result} 146V208", head=False)
    for i, (name, owner) in enumerate(ENDS):
        x = 412 + i * 143
        yield _path(f"M{result} 208H{x + 66}V220") if abs(x + 66 - result) > 2 else _path(f"M{result} 208V220")
        yield _box(x, 222, 132, 40, PALE)
        yield _text(x + 66, 239, name, size=13, weight=650, anchor="middle")
        yield _text(x + 66, 255, owner, size=10.5, color=BLUE, anchor="middle")
    yield _text(24, 232, "Warm: what a phenomenon writes, in one file.", size=11.5, color=MUTED)
    yield _text(24, 249, "Blue: whose it is. Nothing flows back.", size=11.5, color=MUTED)


def _parts(rows: list[list[str]], top: float) -> Iterator[str]:
    yield _text(24, top - 14, "The parts: imports point down", size=15, weight=650)
    drawn = [list(OUTSIDE), *reversed(rows)]
    for k, row in enumerate(drawn):
        y = top + 46 * k
        gap = 10
        sizes = [max(58, 6.9 * len(name) + 18) for name in row]
        room = WIDTH - 48 - gap * (len(row) - 1)
        if sum(sizes) > room:
            sizes = [s * room / sum(sizes) for s in sizes]
        x = (WIDTH - sum(sizes) - gap * (len(row) - 1)) / 2
        for name, wide in zip(row, sizes, strict=True):
            outside = k == 0
            yield _box(x, y, wide, 34, "#ffffff" if outside else WARM if name == "phenomena" else PALE, dashed=outside)
            size = min(12.5, (wide - 6) / (0.56 * len(name)))
            yield _text(x + wide / 2, y + 21.5, name, size=size, anchor="middle")
            x += wide + gap
    y = top + 46 * len(drawn) + 14
    yield _text(24, y, "Dashed: outside the package, over its public names. A part may import any part of a row below, if "
                "tests/test_architecture.py says so;", size=11.5, color=MUTED)  # fmt: skip
    yield _text(24, y + 16, "the test walks the syntax trees. Only backends name a model library, only plots names Plotly, "
                "and phenomena never name one another.", size=11.5, color=MUTED)  # fmt: skip


def _lines(text: str, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > most and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _box(x: float, y: float, wide: float, tall: float, fill: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:g}" rx="6" fill="{fill}" stroke="{RULE}"{dash}/>'


def _text(
    x: float, y: float, text: str, *, size: float, weight: int = 400, color: str = INK, anchor: str = "start"
) -> str:
    look = f'font-size="{size:.4g}" font-weight="{weight}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(text)}</text>'


def _arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    return _path(f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}")


def _path(d: str, *, head: bool = True) -> str:
    tip = ' marker-end="url(#tip)"' if head else ""
    return f'<path d="{d}" fill="none" stroke="{MUTED}" stroke-width="1.2"{tip}/>'
