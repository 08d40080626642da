"""Stored results: which runs there are, what they found, where two of them differ. Reads only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

import probekit as pk
from probekit import plots
from probekit_dashboard import stored
from probekit_dashboard.components import spine
from probekit_dashboard.export import export
from probekit_dashboard.look import plain
from probekit_dashboard.session import computed, key_of, opened, select
from probekit_dashboard.views.phenomenon import draw

TITLE, ICON, PATH, NEEDS_TEXT = "Runs", ":material/folder_open:", "runs", False
MOST_TOKENS = 2000  # of a stored strip
_COLUMNS = {
    "written": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm"),
    "MiB": st.column_config.NumberColumn(format="%.1f"),
}


@dataclass(frozen=True)
class Opened:
    """A run that was read.

    Args:
        results: by analysis.
        findings: of each.
        drawings: of each.
        problems: by analysis, what could not be read or drawn.
    """

    results: pk.Results
    findings: dict[str, list[pk.Finding]]
    drawings: dict[str, dict[str, plots.Drawing]]
    problems: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Memory that the numbers take, once in the results and about once in the figures."""
        return 2 * sum(int(r.dataset.nbytes) for r in self.results.values())


def read(folder: Path) -> Opened:
    """Everything that the page shows of a run; what cannot be drawn is said in words.

    Raises:
        ProbekitError: nothing of it can be read.
    """
    results, problems = stored.results_of(folder)
    findings: dict[str, list[pk.Finding]] = {}
    drawings: dict[str, dict[str, plots.Drawing]] = {}
    for name, result in results.items():
        try:
            findings[name], drawings[name] = result.findings, result.figures()
        except Exception as error:  # numbers that no run of this version gives
            problems[name] = f"{name} was read, but not all of it can be shown ({type(error).__name__})."
            findings.setdefault(name, [])
            drawings.setdefault(name, {})
    return Opened(results, findings, drawings, problems)


def body(seen: Any) -> None:
    """The folder, its runs, one of them, and two of them side by side."""
    allowed = stored.roots()
    left, right = st.columns([4, 1.3], vertical_alignment="bottom")
    given = left.text_input(
        "Folder", "reports", key="runs-folder",
        help="Relative to the folder that the dashboard was started in. Runs below it are listed; links are not followed.",
    )  # fmt: skip
    right.button("Look again", key="runs-again", icon=":material/refresh:", width="stretch")
    try:
        root = stored.folder_of(given, allowed)
    except pk.ProbekitError as error:
        st.info(plain(str(error)), icon=":material/folder_off:")
        _teach()
        return
    runs, left_out = stored.runs_below(root)
    if left_out:
        st.text(left_out)
    if not runs:
        st.info("There is no run in this folder, nor below it.", icon=":material/folder_off:")
        _teach()
        return
    chosen = _choose(runs)
    if len(chosen) == 2:
        _differences(*chosen)
    for run in chosen[:1] if len(chosen) != 2 else []:
        _run(run)


def _teach() -> None:
    st.text(
        "A run is a folder with results.zarr and manifest.json. The command line writes one, and so does a notebook:"
    )
    st.code("probekit run logit-lens attention-sinks --text 'One two three.' --out reports/first", language="bash")
    st.code('pk.report(result, "reports/first")', language="python")


def _choose(runs: list[stored.Run]) -> list[stored.Run]:
    st.text(
        f"{len(runs):,} {'run' if len(runs) == 1 else 'runs'}, newest first. Tick one to open it, two to compare them."
    )
    table = stored.run_table(runs)
    state = st.dataframe(
        table if table["problem"].any() else table.drop(columns="problem"), hide_index=True, key="runs-table",
        on_select="rerun", selection_mode="multi-row", height=min(38 + 35 * len(runs), 320), column_config=_COLUMNS,
    )  # fmt: skip
    rows = [i for i in state["selection"]["rows"] if i < len(runs)]
    if len(rows) > 2:
        st.text("More than two are ticked; the first is shown.")
    code = 'import probekit as pk\n\nresults = pk.load_results("FOLDER")  # one of those listed'
    export("runs", code=code, table=table)
    return [runs[i] for i in rows]


def _run(run: stored.Run) -> None:
    st.subheader("The run", anchor="run")
    st.text(f"{plots.visible(run.name, keep_whitespace=True)} · {run.model or 'model unknown'}")
    if run.problem:
        st.warning(plain(run.problem), icon=":material/warning:")
    found = computed("runs-open", "Reading the run", key_of("run", run.key), lambda tell: read(run.folder))
    if found is None:
        _provenance(run, None)
        return
    _first_text(run, found)
    for problem in found.problems.values():
        st.warning(plain(problem), icon=":material/warning:")
    names = list(found.results)
    name = st.segmented_control("Analysis", names, default=names[0], key=f"runs-which-{run.name}", required=True)
    _result(run, found, str(name))
    _provenance(run, found.results[str(name)])


def _result(run: stored.Run, found: Opened, name: str) -> None:
    result, code = found.results[name], _code(run, name)
    st.text(result.about)
    for finding in found.findings[name]:
        with st.container(border=True):
            st.text(plots.visible(finding.claim, keep_whitespace=True))
            st.text(finding.evidence)
    drawings = found.drawings[name]
    if not drawings:
        export(f"runs-{name}", code=code, result=result)
        return
    titles = {key: d.title for key, d in drawings.items()}
    shown = st.selectbox("Figure", list(titles), format_func=titles.get, key=f"runs-figure-{name}")
    drawing = drawings[shown]
    if isinstance(drawing, plots.TokenStrip):
        _strip(drawing, f"runs-{name}-{shown}", code, result)
    else:
        draw(drawing, f"runs-{name}-{shown}", code, result)


def _strip(strip: plots.TokenStrip, key: str, code: str, result: pk.Result) -> None:
    n = len(strip.tokens)
    some = slice(0, MOST_TOKENS)
    cut = replace(
        strip, tokens=strip.tokens[some], texts=strip.texts[some], notes=strip.notes[some],
        quantities=tuple(replace(q, values=q.values[some]) for q in strip.quantities),
    )  # fmt: skip
    spine(cut, key=key, selected=0, height=420)
    left, right = st.columns([4, 1.3])
    more = f" The first {MOST_TOKENS:,} of {n:,} tokens are shown; the data hold all." if n > MOST_TOKENS else ""
    left.text(strip.caption + more)
    with right:
        export(key, code=code, result=result)


def _code(run: stored.Run, name: str) -> str:
    return f"import probekit as pk\n\nresult = pk.load_result({str(run.folder)!r}, {name!r})\nresult.findings"


def _first_text(run: stored.Run, found: Opened) -> None:
    text = stored.first_text(found.results)
    if text is None:
        st.text("This run stores no text that could be looked at here.")
        return
    place = f"runs-text-{run.key}"
    if st.button("Look at its first text here", key="runs-look", icon=":material/visibility:"):
        try:
            again = stored.text_again(text, opened(text.model))
        except pk.ProbekitError as error:
            st.session_state[place] = f"Its model cannot be opened: {error}"
        else:
            if again is not None:
                select(model=text.model, text=again, prepared="", token=0, layer=-1, head=0)
                st.session_state["go"] = "lens"
                st.rerun()
            st.session_state[place] = (
                "The stored tokens do not give the text back: read as a text, they become other tokens (as in a chat "
                "template, or where a token is a piece of a character)."
            )
    if place in st.session_state:
        st.warning(plain(st.session_state[place]), icon=":material/warning:")


def _provenance(run: stored.Run, result: pk.Result | None) -> None:
    if result is not None:
        with st.expander("Parameters", icon=":material/tune:"):
            st.dataframe(stored.table_of(result.params.as_dict()), hide_index=True, key="runs-params")
    with st.expander("Where its numbers come from", icon=":material/fingerprint:"):
        if not run.manifest:
            st.text("It has no manifest that could be read.")
        else:
            table = stored.table_of(run.manifest)
            st.dataframe(table, hide_index=True, key="runs-manifest", height=420)
            code = f"import json\n\nmanifest = json.load(open({str(run.folder / stored.MANIFEST)!r}))"
            export("runs-manifest-data", code=code, table=table)


def _differences(one: stored.Run, other: stored.Run) -> None:
    st.subheader("Where these two runs differ", anchor="differences")
    for label, run in (("first", one), ("second", other)):
        name = plots.visible(run.name, keep_whitespace=True)
        st.text(f"{label}: {name} · {run.model or 'model unknown'} · {', '.join(run.analyses)}")
        if not run.manifest:
            st.text("It has no manifest that could be read, so that nothing can be compared.")
            return
    table: pd.DataFrame = stored.differences(one, other)
    if table.empty:
        st.text("Nothing of what fixes their numbers differs.")
        return
    st.dataframe(table, hide_index=True, key="runs-differences")
    left, right = st.columns([4, 1.3])
    left.text("From their manifests; how passes were planned is left out. Tick one run alone to open it.")
    with right:
        export("runs-differences-data", code=_difference_code(one, other), table=table)


def _difference_code(one: stored.Run, other: stored.Run) -> str:
    paths = [str(r.folder / stored.MANIFEST) for r in (one, other)]
    return (
        f"import json\n\na, b = (json.load(open(path)) for path in {paths!r})\n"
        "{k: (a.get(k), b.get(k)) for k in {*a, *b} if a.get(k) != b.get(k)}"
    )
