"""The documentation says what the code says: pages are those that the docstrings give, links lead somewhere, examples run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import probekit as pk
from analyses import docs_pages, docs_picture
from analyses.docs_examples import EXAMPLES
from probekit.analysis import get_analysis, load_file, temporary_registrations
from probekit.cli import cli
from probekit.probing.analyses import ANALYSES as COLLECTED

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NAMES = [*pk.list_analyses(), *COLLECTED]
TEXT = " ".join(f"w{3 + i * i % 101}" for i in range(90))
MOST_BYTES, MOST_BYTES_IN_ALL = 150_000, 3_000_000


def links(page: Path) -> list[str]:
    """What a page links to or shows, other than the web, without the part after #; code is left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith(("http", "#"))]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.name)
def test_every_link_and_picture_exists(page: Path) -> None:
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


def test_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "[a](b.md#c) ![x y](pic.png) `f[0](no.md)` [w](https://a.b)\n```\n[n](no.md)\n```\n", encoding="utf-8"
    )
    assert links(page) == ["b.md", "pic.png"]


def test_pages_are_what_the_docstrings_give_now() -> None:
    wanted = docs_pages.pages()
    stale = [str(p.relative_to(ROOT)) for p, text in wanted.items() if p.read_text(encoding="utf-8") != text]
    assert not stale, f"run `python analyses/docs_pages.py`: {stale}"
    assert {p.stem for p in (DOCS / "phenomena").glob("*.md")} == set(NAMES)


def test_a_page_follows_its_analysis() -> None:
    with temporary_registrations():
        before = docs_pages.page(get_analysis("logit-lens"), [])

        class Changed(type(get_analysis("logit-lens"))):  # type: ignore[misc]
            """Another question?

            Null:
                Another *null*, below 1 < 2.
            """

        after = docs_pages.page(Changed(), [])
    assert before != after and "Another question?" in after and r"Another \*null\*, below 1 \< 2." in after


def test_every_analysis_has_a_page_in_one_group_an_example_and_a_figure() -> None:
    grouped = [name for names in docs_pages.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(NAMES) == sorted(EXAMPLES)
    drawn = json.loads(docs_pages.FIGURES.read_text(encoding="utf-8"))
    for name in NAMES:
        assert 1 <= len(drawn[name]) <= 2, name
        for figure in drawn[name]:
            assert (
                figure["alt"]
                and figure["caption"]
                and f"({figure['file']})" in (DOCS / f"phenomena/{name}.md").read_text()
            )


def test_figures_are_of_the_run_that_the_page_shows() -> None:
    drawn = json.loads(docs_pages.FIGURES.read_text(encoding="utf-8"))
    stale = [name for name in NAMES if any(f["run"] != docs_pages.run_id(name) for f in drawn[name])]
    assert not stale, f"run `python analyses/docs_pages.py --figures --only {' '.join(stale)}`"


def test_figures_are_small_and_none_is_left_over() -> None:
    files = [p for p in (DOCS / "phenomena").iterdir() if p.suffix in (".svg", ".png")]
    drawn = json.loads(docs_pages.FIGURES.read_text(encoding="utf-8"))
    assert {p.name for p in files} == {f["file"] for name in drawn for f in drawn[name]}
    assert (
        max(p.stat().st_size for p in files) <= MOST_BYTES and sum(p.stat().st_size for p in files) <= MOST_BYTES_IN_ALL
    )
    for path in files:
        if path.suffix == ".svg":
            ElementTree.parse(path)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_python_and_commands_that_parse(name: str) -> None:
    example = EXAMPLES[name]
    ast.parse(example.code)
    assert name in example.code or name in COLLECTED
    assert bool(example.flags) != (name in COLLECTED)
    if name not in COLLECTED:
        given = cli.commands["run"].make_context("run", [name, *shlex.split(example.flags), "--out", "reports/x"])
        assert given.params["names"] == (name,)


def test_dashboard_pages_that_are_named_exist() -> None:
    views = ROOT / "apps" / "probekit_dashboard" / "views"
    titles = set(re.findall(r'^TITLE.*?= "(.*?)"', "\n".join(p.read_text() for p in views.glob("*.py")), re.MULTILINE))
    assert set(docs_pages.OWN_PAGE.values()) <= titles


def test_the_picture_shows_every_part_above_what_it_imports() -> None:
    uses: dict[str, Any] = {
        "low": [],
        "mid": ["low"],
        "top": ["mid", "low"],
        "x_command": ["low"],
        "cli": ["x_command"],
    }
    assert docs_picture.levels(uses) == [["low"], ["mid"], ["top", "cli"]]
    drawn = "".join(ElementTree.parse(DOCS / "architecture.svg").getroot().itertext())
    parts = [p for p in docs_pages._uses() if p not in docs_picture.HIDDEN and not p.endswith("_command")]
    assert len(parts) > 20 and all(part in drawn for part in parts)


def guide() -> tuple[str, list[str]]:
    """The file of the guide, and the pieces that are run after it."""
    page = (DOCS / "add-your-own-phenomenon.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- (file|run): .*? -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") == 4
    return blocks[0][1], [code for _, code in blocks[1:]]


def test_the_guide_runs_from_its_file_to_the_report(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model in place of the embedded one; a strip as SVG in place of the figure, which takes a browser."""
    file, pieces = guide()
    monkeypatch.chdir(tmp_path)
    Path("mlp_part.py").write_text(file, encoding="utf-8")
    code = "\n".join(pieces).replace('"smollm2-135m-instruct"', repr(str(tiny_folder))).replace(", 3]", ", 1]")
    code = code.replace("sel(layer=3)", "sel(layer=1)").replace('["depth"].save', '["strip"].save')
    assert code.count("layer=1") == 1 and '["strip"]' in code
    monkeypatch.setattr(pk, "demo_texts", lambda: [TEXT, TEXT[:200]])
    with temporary_registrations():
        load_file("mlp_part.py")
        space: dict[str, Any] = vars(sys.modules["probekit_user_mlp_part"])
        exec(code, space)
        said = capsys.readouterr().out
        assert "Of what a block writes" in said and "Without the MLP of block" in said
        assert Path("mlp-part.svg").exists() and "part" in Path("reports/mlp-part/report.html").read_text(
            encoding="utf-8"
        )
        result = space["result"]
        part = result["part"].values
        assert ((part > 0) & (part < 1)).all() and result.params.skip == 1
        assert get_analysis("mlp-part").section("Null") == "One half: both sub-layers write as much."
        assert "silenced-mlp" in pk.list_analyses()
