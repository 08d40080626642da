"""The report and the folder of a run: complete, offline, safe, and written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_report import NASTY, Tides, fake_manifest, fake_results

from probekit.analysis import Finding, Results, load_result, temporary_registrations
from probekit.core import StoreError
from probekit.plots import Quantity, TokenStrip
from probekit.reporting import check_writable, findings_html, report_html, store, strip_html, write_run
from probekit.reporting.assets import script_json
from probekit.reporting.strips import strip_data
from probekit.reporting.tables import prose, provenance_groups

NAMES = {"report.html", "findings.json", "results.zarr", "manifest.json"}


@pytest.fixture
def results() -> Iterator[Results]:
    with temporary_registrations():
        yield fake_results()


@pytest.fixture(scope="module")
def page() -> str:
    with temporary_registrations():
        return report_html(fake_results(), fake_manifest())


class Page(HTMLParser):
    """Every element with its attributes, every id, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script" and dict(attrs).get("type") == "application/json":
            self.data.append("")
            self._inside = "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data[-1] += data
        elif self._inside not in ("script", "style"):
            self.text += data


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def finding(**changes: Any) -> Finding:
    plain: dict[str, Any] = {
        "claim": "It is so.",
        "value": 2.5,
        "unit": "nats",
        "null": 0.0,
        "null_meaning": "shuffled",
    }
    plain |= {"ci95": (2.0, 3.0), "n": 9, "n_unit": "texts"}
    return Finding(**(plain | changes))


def test_the_page_says_what_was_found_how_and_with_what(page: str) -> None:
    text = Page(page).text
    for part in [
        "smolmodel-135m-instruct", "harbour.txt <i> · 2 texts · 200 tokens · 1 analysis",
        "Strongest findings", "The readout settles 6.2 layers before the end, on <b>average</b> over tokens.",
        "Tides of certainty", "Question", "At which layer does the residual stream", "Method", "Null", "permuted",
        "Known failure modes", "References", "Eliciting latent predictions", "threshold", "0.3 share",
        "5.10 to 7.30", "unembedding rows permuted", "8 blocks of 32 tokens", "layer 23", "surprisal_nats",
        "Provenance", "3f1c0b6e" * 5, "2.4.6", 'pk.load_result(folder, "tides")', "SmolModel, 2 texts.",
    ]:  # fmt: skip
        assert part in text, part


def test_the_page_is_one_file_with_one_copy_of_plotly_and_loads_nothing(page: str) -> None:
    assert page.count("plotly.js v") == 1
    parsed = Page(page)
    sources = [(tag, name, value) for tag, attrs in parsed.elements for name, value in attrs.items()
               if name in ("src", "href", "srcset", "data", "action", "poster")]  # fmt: skip
    outside = [s for s in sources if not re.match(r"#|data:,$", s[2] or "")]
    assert {(tag, name) for tag, name, _ in outside} == {("a", "href")}
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL))
    assert styles and "url(" not in styles and "@import" not in styles
    assert "default-src 'none'" in page


def test_a_report_without_figures_carries_no_plotly(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tides, "draw", lambda self, result: {})
    assert len(report_html(results, {})) < 100_000


def test_every_drawing_has_title_caption_and_alternative_text(page: str, results: Results) -> None:
    parsed = Page(page)
    for name, drawing in results["tides"].figures().items():
        assert ("figure", f"tides--{name}") in [(t, a.get("id")) for t, a in parsed.elements]
        assert drawing.title in parsed.text and drawing.caption in parsed.text
    charts = [a for t, a in parsed.elements if a.get("data-kind") == "figure"]
    assert len(charts) == 9 and all(c["role"] == "img" and c["aria-label"] for c in charts)
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_data_in_the_page_is_strict_json(page: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = Page(page).data
    assert len(data) == 11  # ten drawings and the options of the plots
    for block in data:
        json.loads(block, parse_constant=refuse)


def test_tokens_never_become_markup(page: str, results: Results) -> None:
    clean = Page(page)
    assert not [t for t, a in clean.elements if t == "img" or any(n.startswith("on") for n in a)]
    assert not [a for _, a in clean.elements if (a.get("href") or "").startswith("javascript")]
    # plotly.js aside, a page of hostile tokens has exactly the elements of a page without any
    with temporary_registrations():
        harmless = Page(report_html(fake_results(nasty=False), fake_manifest()))
    assert [t for t, _ in clean.elements] == [t for t, _ in harmless.elements]


def test_script_json_survives_everything_a_token_can_hold() -> None:
    text = script_json({"tokens": [*NASTY, "\u2029", "]]>"]})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text)["tokens"][: len(NASTY)] == list(NASTY)
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json({"x": float("nan")})


def test_findings_table_escapes_and_shows_the_evidence() -> None:
    table = findings_html([finding(claim="<script>x</script> & \x1b", ci95=None, n=1, where={"layer": 3})])
    assert "&lt;script&gt;x&lt;/script&gt; &amp; \\x1b" in table and "<script" not in table
    text = Page(findings_html([finding()])).text
    for part in ("It is so.", "2.50", "nats", "2.00 to 3.00", "shuffled", "9 texts"):
        assert part in text
    assert "No findings." in findings_html([])


def test_results_show_their_findings_in_a_notebook(results: Results) -> None:
    assert "unembedding rows permuted" in results._repr_html_()
    strip = results["tides"].figures()["strip"]
    assert isinstance(strip, TokenStrip)
    assert strip._repr_html_().count("<script>") == 1


def test_two_strips_on_one_page_do_not_collide(results: Results) -> None:
    strip = results["tides"].figures()["strip"]
    assert isinstance(strip, TokenStrip)
    ids = [re.search(r'data-strip="([^"]+)"', strip_html(strip)) for _ in range(2)]
    assert ids[0] and ids[1] and ids[0][1] != ids[1][1]
    for token in NASTY:
        assert "<" not in token or token not in strip_html(strip).split("<script>")[0]


def test_strip_data_gives_positions_limits_and_null_for_the_undefined() -> None:
    strip = TokenStrip(
        "t", ("a", "b", "c", "d"), np.array([5, 5, 2, 2]),
        (
            Quantity("x", "nats", np.array([np.nan, 1.23456789, 3, -1])),
            Quantity("y", "1", np.array([0.0, 1, 10, 100]), "log"),
            Quantity("z", "nats", np.array([-1.0, 0, 4, 0]), "diverging"),
            Quantity("w", "share", np.full(4, np.nan)),
            Quantity("v", "share", np.array([np.inf, 0, 1, 0]), low=0, high=1),
        ),
        "c", "a",
    )  # fmt: skip
    data = strip_data(strip)
    assert data["positions"] == [0, 1, 0, 1]
    assert [(q["low"], q["high"]) for q in data["quantities"]] == [(-1, 3), (1, 100), (-4, 4), (None, None), (0, 1)]
    assert data["quantities"][0]["values"] == [None, 1.23457, 3, -1]
    assert data["quantities"][4]["values"][0] is None
    assert data["quantities"][1]["unit"] == ""
    script_json(data)


def test_prose_marks_up_lists_code_and_addresses_and_nothing_else() -> None:
    text = "One <b> `x < y`\nline.\n\n- a\n  more\n- see https://arxiv.org/abs/1 (x).\n\nLast: javascript:alert(1)"
    assert str(prose(text)) == (
        "<p>One &lt;b&gt; <code>x &lt; y</code> line.</p>\n<ul><li>a more</li><li>see "
        '<a href="https://arxiv.org/abs/1" rel="noreferrer">https://arxiv.org/abs/1</a> (x).</li></ul>\n'
        "<p>Last: javascript:alert(1)</p>"
    )


def test_provenance_groups_nested_values_and_shortens_lists() -> None:
    groups = dict(provenance_groups({"bos": "model", "model": {"name": "m", "a": {"b_c": True}}, "n": list(range(50))}))
    assert groups["run"][0] == ("bos", "model")
    assert groups["run"][1][1].endswith("11, … (50 in all)")
    assert groups["model"] == [("name", "m"), ("a · b c", "yes")]


def test_write_run_makes_the_four_files_and_they_load_again(results: Results, tmp_path: Path) -> None:
    report = write_run(results, tmp_path / "new" / "run", fake_manifest())
    folder = tmp_path / "new" / "run"
    assert report == folder / "report.html" and report.is_file()
    assert {p.name for p in folder.iterdir()} == NAMES
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run"]
    loaded = load_result(folder, "tides")
    assert loaded.dataset.identical(results["tides"].dataset)
    findings = [Finding.from_dict(f) for f in json.loads((folder / "findings.json").read_text())]
    assert findings == results.findings
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"] == fake_manifest()["model"]


def test_write_run_replaces_an_older_run_and_leaves_the_users_files(results: Results, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.csv").write_text("1,2")
    write_run(results, tmp_path, fake_manifest())
    write_run(results, tmp_path, fake_manifest() | {"corpus": "second"})
    assert "second" in (tmp_path / "report.html").read_text()
    assert {p.name for p in tmp_path.iterdir()} == NAMES | {"notes.txt", "data"}
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "data" / "x.csv").read_text() == "1,2"


def raise_in(step: str, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """Make one step of writing fail; returns the error that reaches the caller."""

    def fail(error: BaseException) -> Callable[..., Any]:
        def failing(*_: Any, **__: Any) -> Any:
            raise error

        return failing

    if step == "drawing":
        monkeypatch.setattr(Tides, "draw", fail(ZeroDivisionError("in draw")))
        return ZeroDivisionError
    if step == "interrupt":
        monkeypatch.setattr(store, "report_html", fail(KeyboardInterrupt()))
        return KeyboardInterrupt
    if step == "disk full":
        monkeypatch.setattr(store, "_write_json", fail(OSError(28, "No space left on device")))
        return StoreError
    rename = Path.rename

    def third_move_fails(self: Path, target: Path) -> Path:
        if self.parent.name == "new" and self.name == "report.html":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", third_move_fails)
    return StoreError


@pytest.mark.parametrize("step", ["drawing", "interrupt", "disk full", "moving"])
@pytest.mark.parametrize("older_run", [True, False])
def test_a_failure_leaves_the_folder_as_it_was(
    step: str, older_run: bool, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    if older_run:
        write_run(results, folder, fake_manifest())
    before = snapshot(tmp_path)
    error = raise_in(step, monkeypatch)
    with pytest.raises(error):
        write_run(results, folder, fake_manifest() | {"corpus": "second"})
    assert snapshot(tmp_path) == before
    assert {p.name for p in folder.iterdir()} == ({"notes.txt"} | (NAMES if older_run else set()))


def test_a_failure_leaves_no_new_folder(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = raise_in("drawing", monkeypatch)
    with pytest.raises(error):
        write_run(results, tmp_path / "run", fake_manifest())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_file_of_the_users_with_one_of_our_names_is_not_overwritten(
    name: str, results: Results, tmp_path: Path
) -> None:
    if name == "results.zarr":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    else:
        (tmp_path / name).write_text('{"mine": 1}')
    before = snapshot(tmp_path)
    for attempt in (lambda: check_writable(tmp_path), lambda: write_run(results, tmp_path, {})):
        with pytest.raises(StoreError, match=r"was not written by probekit.*Choose another folder"):
            attempt()
    assert snapshot(tmp_path) == before


def test_check_writable_leaves_nothing_behind(results: Results, tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_run(results, tmp_path / "run", {})
    check_writable(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")


def test_an_unwritable_folder_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file; results need a folder"):
        check_writable(tmp_path / "file")
    with pytest.raises(StoreError, match=r"Cannot write.*Choose a folder"):
        check_writable(tmp_path / "file" / "below")

    def denied(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    with pytest.raises(StoreError, match=r"Permission denied\. Choose a folder that you may write to"):
        check_writable(tmp_path)


def test_the_manifest_may_hold_what_json_cannot(results: Results, tmp_path: Path) -> None:
    manifest = {"x": float("nan"), "y": np.float32(1.5), "z": {"b", "a"}, "t": (1, 2), "p": Path("x"), "s": "\udc80"}
    write_run(results, tmp_path / "run", manifest)
    read = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {k: read[k] for k in manifest} == {
        "x": None,
        "y": 1.5,
        "z": ["a", "b"],
        "t": [1, 2],
        "p": "x",
        "s": "\udc80",
    }
