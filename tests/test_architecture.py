"""Who may import whom. The table below is the architecture; the tests walk the syntax trees and hold it.

Imports point down. "Lazily" means inside a function or for the type checker only: such an import runs when somebody
asks for what it gives, or never. Every check is also run on a forged source that breaks it, so that it can fail.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import probekit

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "probekit"
LONGEST = 400  # lines of a file


@dataclass(frozen=True)
class May:
    """What one part of the package may import of the others."""

    use: str = ""
    lazily: str = ""


# fmt: off
PARTS: dict[str, May] = {
    # part         imports                                          lazily
    "core":        May(),
    "stats":       May(),
    "texts":       May("core"),
    "demo":        May(),
    "reduce":      May("core",                                     "catalog"),  # a lens by its id on the hub
    "methods":     May("core reduce stats"),  # shared by phenomena
    "sampling":    May("core analysis stats reduce plots"),
    "plots":       May("core",                                     "reporting"),  # a strip shows itself in a notebook
    "catalog":     May("core"),
    "backends":    May("core reduce"),
    "analysis":    May("core",                                     "plots reporting phenomena probing"),  # types; discovery
    "engine":      May("core reduce analysis _version"),
    "toys":        May("core reduce engine",                       "backends"),
    "phenomena":   May("core reduce plots stats methods sampling analysis"), # and never one another
    "reporting":   May("core analysis plots"),
    "activation_cache": May("core reduce engine",                  "models"),
    "effects":     May("core reduce engine methods",               "models"),
    "writes":      May("core reduce engine",                       "models"),
    "shifts":      May("core reduce engine methods",               "models"),
    "probing":     May("core reduce engine analysis stats plots batches _version", "models"),
    "lenses":      May("core reduce engine analysis _version",     "batches models texts"),
    "models":      May("core catalog",                             "backends"),
    "batches":     May("core engine"),
    "api":         May("core analysis engine batches",                     "models catalog reporting"),
    "tuning":      May("core engine analysis sampling _version",   "backends catalog models batches"),
    "cards":       May("core analysis engine methods plots",       "models"),
    "token_command": May("cards models"),
    "app_command": May("core"),
    "compare_command": May("core",                                  "analysis api studies"),
    "figures_command": May("analysis"),
    "lens_command": May("core",                                     "lenses models"),
    "terminal":    May("core"),
    "streaming":   May("core analysis api batches engine texts _version", "models"),
    "studies":     May("core analysis api batches engine plots texts", "models _version"),
    "stream_command": May("core analysis engine terminal",         "api models reporting streaming"),
    "cli":         May("__init__ core analysis api app_command batches catalog demo models texts reporting "
                        "compare_command figures_command stream_command terminal token_command lens_command tuning"),
    "__init__":    May("_version",        "core analysis api engine models demo activation_cache cards effects lenses probing reduce streaming studies toys tuning writes shifts"),
    "__main__":    May("cli"),
    "_version":    May(),
}
# A library -> the only places that may name it, at whatever depth.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch":                 ("reduce", "backends", "toys/training", "toys/measures", "tuning/training",
                              "lenses/fitting", "lenses/folder", "lenses/train"),
    "transformers":          ("backends/transformers", "backends/gguf", "backends/sentence_transformers"),
    "sentence_transformers": ("backends/sentence_transformers",),
    "transformer_lens":      ("backends/transformer_lens",),
    "nnsight":               ("backends/nnsight",),
    "gguf":                  ("backends/gguf",),
    "peft":                  ("backends/transformers/adapters",),
    "huggingface_hub":       ("catalog",),
    "plotly":                ("plots",),
    "kaleido":               ("plots/browser",),
    "choreographer":         ("plots/browser",),
    "jinja2":                ("reporting",),
    "click":                 ("cli", "app_command", "compare_command", "figures_command", "lens_command", "stream_command",
                              "token_command"),
    "zarr":                  ("core/storage", "core/rows"),
    "streamlit":             (),
    "tests":                 (),
    "helpers":               (),
    "conftest":              (),
}
# These are slow to import: even where they may be named, the parts below do so lazily.
LAZY_LIBRARIES = {
    "plotly": "plots", "kaleido": "plots", "choreographer": "plots", "torch": "reduce/base reduce/rows reduce/attention reduce/readout",
    "transformer_lens": "backends/transformer_lens", "peft": "backends/transformers/adapters",
}
# fmt: on
HEAVY = ("torch", "transformers", "sentence_transformers", "peft", "plotly", "streamlit", "scipy", "zarr")


@dataclass(frozen=True)
class Import:
    """One module that a file names."""

    module: str
    lazy: bool


def imports_of(source: str, place: str, root: str = "probekit") -> Iterator[Import]:
    """Every module that a source imports; `place` is its path within the package `root`, such as `core/text`."""
    package = [root, *place.split("/")[:-1]]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(a.name, lazy) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from probekit import plots` names a module, `from probekit.core import Batch` a thing in one.
            yield from (Import(f"{module}.{a.name}" if module == "probekit" else module, lazy) for a in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (Import(str(a.value), lazy) for a in node.args[:1] if isinstance(a, ast.Constant))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = lazy or typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(ast.parse(source), False)


def inside(place: str, areas: tuple[str, ...]) -> bool:
    return any(place == area or place.startswith(f"{area}/") for area in areas)


def faults(source: str, place: str) -> list[str]:
    """What a source at `place` does that the tables above do not allow."""
    part = place.split("/")[0]
    if part not in PARTS:
        return [f"{place}: the part {part!r} is not in the table PARTS"]
    found = []
    may, lazily = PARTS[part].use.split(), PARTS[part].lazily.split()
    for imported in imports_of(source, place):
        head, *rest = imported.module.split(".")
        if head == "probekit":
            other = rest[0] if rest else "__init__"
            if other == part == "phenomena" and rest[1:] and rest[1] != place.split("/")[1]:
                found.append(f"{place} imports {imported.module}: phenomena do not know one another")
            known = other if other in PARTS else "__init__"
            if known != part and known not in may and not (imported.lazy and known in lazily):
                found.append(f"{place} imports {imported.module}{' lazily' * imported.lazy}")
        elif head in LIBRARIES:
            if not inside(place, LIBRARIES[head]):
                found.append(f"{place} names {head}, which belongs to {LIBRARIES[head] or 'nobody'}")
            elif inside(place, tuple(LAZY_LIBRARIES.get(head, "").split())) and not imported.lazy:
                found.append(f"{place} imports {head} at once; import it inside the function that needs it")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and part != "cli":
            found.append(f"{place}:{node.lineno} prints; only the command line does")
    return found


def modules() -> dict[str, str]:
    """The sources of the package, by place."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").as_posix()
        found[place] = path.read_text(encoding="utf-8")
    return found


def test_every_import_is_allowed() -> None:
    sources = modules()
    assert len(sources) > 50
    wrong = [fault for place, source in sources.items() for fault in faults(source, place)]
    assert not wrong, "\n".join(wrong)


def test_table_names_what_exists() -> None:
    assert {place.split("/")[0] for place in modules()} == set(PARTS)
    assert {name for may in PARTS.values() for name in (*may.use.split(), *may.lazily.split())} <= set(PARTS)


@pytest.mark.parametrize(
    ("place", "source", "fault"),
    [
        ("core/text", "from probekit.reduce import Norm", "core/text imports probekit.reduce"),
        ("core/text", "def f():\n    from ..engine import run", "core/text imports probekit.engine lazily"),
        ("core/text", "import plotly", "core/text names plotly"),
        ("reduce/base", "import torch", "imports torch at once"),
        ("reduce/rows", "from probekit import plots", "reduce/rows imports probekit.plots"),
        ("plots/curves", "import plotly.graph_objects as go", "imports plotly at once"),
        ("backends/scripted", "import transformers", "names transformers"),
        ("backends/transformers/model", "from probekit.analysis import Result", "imports probekit.analysis"),
        ("backends/transformers/model", "from ...engine import Plan", "imports probekit.engine"),
        ("analysis/result", "from probekit.reporting import x", "imports probekit.reporting"),
        ("engine/run", "from probekit.backends.scripted import ScriptedModel", "imports probekit.backends.scripted"),
        ("phenomena/a", "from probekit.engine import run_pass", "imports probekit.engine"),
        ("phenomena/a", "from .logit_lens import LogitLens", "phenomena do not know one another"),
        ("phenomena/a", "import probekit", "imports probekit"),
        ("phenomena/a", "def f():\n    import streamlit", "names streamlit"),
        ("stats", "from helpers import run", "names helpers"),
        ("models", "from probekit.backends.transformers import TransformersModel", "imports probekit.backends"),
        ("analysis/registry", 'importlib.import_module("probekit.engine")', "imports probekit.engine"),
        ("engine/run", "def f():\n    print(1)", "engine/run:2 prints"),
        ("novelty/x", "", "the part 'novelty' is not in the table"),
    ],
)
def test_a_forbidden_import_is_noticed(place: str, source: str, fault: str) -> None:
    found = faults(source, place)
    assert len(found) == 1 and fault in found[0], found


# What the dashboard may name of the package, and libraries that it may not.
PUBLIC = ("plots", "stats", "reporting", "sampling")
BEHIND = ("torch", "transformers", "sentence_transformers", "plotly", "nnsight", "transformer_lens", "zarr", "sklearn")


def dashboard_faults(source: str) -> list[str]:
    """What a file of the dashboard does that layout does not need: inner parts of the package, or HTML of unknown text."""
    found = []
    for imported in imports_of(source, "x", "probekit_dashboard"):
        head, *rest = imported.module.split(".")
        if head in BEHIND:
            found.append(f"names {head}")
        known = not rest or rest[0] in PUBLIC or rest[0] in probekit.__all__
        if head == "probekit" and (not known or (len(rest) > 1)):
            found.append(f"imports {imported.module}")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        unsafe = any(k.arg == "unsafe_allow_html" for k in node.keywords) or ast.unparse(node.func) == "st.html"
        if unsafe and not (node.args and isinstance(node.args[0], ast.Constant)):
            found.append(f"line {node.lineno} makes HTML of text that is not constant")
        found += [
            f"line {node.lineno} shows {ast.unparse(e)} as Markdown: take plain({ast.unparse(e)})"
            for e in _marked(node)
        ]
    return found


BOXES = ("error", "warning", "info", "success", "spinner", "progress")  # they hold messages, which quote what was given


def _marked(call: ast.Call) -> list[ast.expr]:
    """What a message box would interpret as Markdown, and thus fetch pictures for: neither constant, number nor escaped."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in BOXES:
        return []
    shown = [k.value for k in call.keywords if k.arg == "text"] if call.func.attr == "progress" else call.args[:1]
    parts = [v for s in shown for v in (s.values if isinstance(s, ast.JoinedStr) else [s])]
    holes = [p.value if isinstance(p, ast.FormattedValue) else p for p in parts if not getattr(p, "format_spec", None)]
    return [
        h for h in holes
        if not isinstance(h, ast.Constant) and not (isinstance(h, ast.Call) and ast.unparse(h.func) == "plain")
    ]  # fmt: skip


def test_the_dashboard_is_layout_over_public_names() -> None:
    paths = sorted((ROOT / "apps").rglob("*.py"))
    assert len(paths) > 10
    found = {str(p.relative_to(ROOT)): dashboard_faults(p.read_text(encoding="utf-8")) for p in paths}
    assert not {p: some for p, some in found.items() if some}
    forged = (
        "import torch\nfrom probekit.engine import Job\nst.html(text)\nst.markdown(f'{t}', unsafe_allow_html=True)\n"
        "st.error(str(error))\nst.warning(f'{n:,} of {name}')\nbar.progress(0.5, text=line)\nst.info(f'{n:,} {plain(name)}')"
    )
    assert len(dashboard_faults(forged)) == 7
    assert not dashboard_faults(
        "import probekit as pk\nfrom probekit import plots\nst.markdown('<hr>', unsafe_allow_html=True)"
    )


def test_files_are_short() -> None:
    """No file of the package or of its tests is longer than a reader can hold."""
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "apps").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lines = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}
    assert not {p: n for p, n in lines.items() if n > LONGEST}


def skips_without_reason(source: str) -> list[int]:
    """Lines on which a test is skipped or expected to fail without saying why."""
    found = []
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        bare = isinstance(node, ast.Attribute) and id(node) not in called
        if bare and ast.unparse(node) in ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail"):
            found.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        reasons = [k.value for k in node.keywords if k.arg == "reason"]
        if name in ("pytest.skip", "pytest.xfail"):
            reasons += node.args[:1]
        elif name not in ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail", "pytest.importorskip"):
            continue
        if not reasons or (isinstance(reasons[0], ast.Constant) and not reasons[0].value):
            found.append(node.lineno)
    return found


def test_every_skip_says_why() -> None:
    paths = (ROOT / "tests").rglob("*.py")
    found = {str(p.relative_to(ROOT)): skips_without_reason(p.read_text(encoding="utf-8")) for p in paths}
    assert not {p: lines for p, lines in found.items() if lines}
    forged = "@pytest.mark.skip\ndef a(): pytest.skip()\npytest.mark.xfail(strict=True)\npytest.importorskip('x')\n"
    assert sorted(skips_without_reason(forged)) == [1, 2, 3, 4]
    assert not skips_without_reason("pytest.skip('no browser')\npytest.mark.skipif(True, reason='no network')")


def loaded_by(code: str) -> list[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


LIGHT = {
    "importing probekit": "import probekit",
    "listing analyses": "import probekit; assert len(probekit.list_analyses()) >= 4",
    "the parameters of every analysis": (
        "from probekit.analysis import analyses\nfor a in analyses().values(): assert a.Params.specs() is not None"
    ),
    "reducers as data": "from probekit.reduce import Readout, AttentionStats; assert Readout(5).key",
    "the command line's help": "import probekit.cli",
}


@pytest.mark.parametrize("what", LIGHT)
def test_what_should_be_light_is_light(what: str) -> None:
    assert loaded_by(LIGHT[what]) == []


def test_the_lightness_check_can_fail() -> None:
    assert loaded_by("import probekit.backends.scripted") == ["torch"]
    assert "plotly" in loaded_by("from probekit import plots; plots.plotly_js()")
