"""Every notebook runs from top to bottom with the network closed, in bounded time, and is stored as it ran."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_SECONDS = 180.0  # of CPU time: twice what a notebook may take where it is written, for slower machines
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the kernel's own event loop and sockets
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


notebooks = _load()


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def outputs(notebook: Any) -> list[list[Any]]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def drawn(some: list[Any]) -> bool:
    """Whether the outputs of a cell hold a live figure or a live strip."""
    data = [o.data for o in some if "data" in o]
    return any(notebooks.LIVE in d or "pk-strip" in d.get("text/html", "") for d in data)


def small(*sources: str) -> Any:
    return new_notebook(cells=[new_code_cell(source) for source in sources])


# One white pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"


@pytest.mark.real
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_offline_in_time_and_is_stored_as_it_ran(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebooks.fetch_models()
    stored = read(path)
    ran = notebooks.execute(stored)
    with capsys.disabled():
        print(f" [{path.stem}: {ran.cpu_seconds:.0f} s of CPU time] ", end="")
    assert 0.1 < ran.cpu_seconds < MOST_SECONDS, f"{path.name} took {ran.cpu_seconds:.0f} s of CPU time"
    fresh = outputs(ran.notebook)
    assert not [o for some in fresh for o in some if o.output_type == "error"]
    pictures = [i for i, some in enumerate(fresh) if drawn(some)]
    assert len(pictures) >= 3, "a story has pictures"
    held = outputs(stored)
    without = [i for i in pictures if not any("image/png" in o.get("data", {}) for o in held[i])]
    assert not without, f"code cells {without} of {path.name} are stored without the image that they show"
    silent = [i for i, some in enumerate(fresh) if bool(_lasting(some)) != bool(held[i])]
    assert not silent, f"code cells {silent} of {path.name} show something else than what is stored"


def _lasting(some: list[Any]) -> list[Any]:
    return [o for o in some if o.get("name") != "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_stored_notebook_reads_as_a_page(path: Path) -> None:
    stored = read(path)
    nbformat.validate(stored)
    again = f"run python notebooks/execute.py {path.stem[:2]}"
    assert stored.metadata["probekit"]["ran"] == notebooks.digest(stored), f"sources changed since they ran: {again}"
    assert path.stat().st_size < notebooks.LARGEST
    assert not notebooks.paths_in(stored)
    shown = [o for some in outputs(stored) for o in some]
    assert any("image/png" in o.get("data", {}) for o in shown)
    assert not [o for o in shown if notebooks.LIVE in o.get("data", {}) or "<script" in str(o.get("data", {}))]
    assert not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [cell for cell in stored.cells if cell.metadata], "cells carry no times"
    assert stored.cells[0].cell_type == "markdown" and stored.cells[0].source.startswith("# ")
    assert path.name in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_lines_of_code_fit_a_page(path: Path) -> None:
    lines = [line for cell in read(path).cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > 110]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_the_network_is_closed_and_this_machine_is_not() -> None:
    there = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)"
    with pytest.raises(CellExecutionError, match="The network is closed in this notebook"):
        notebooks.execute(small(there))
    here = (
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "with socket.create_connection(server.getsockname(), timeout=5), server:\n    print('connected')"
    )
    ran = notebooks.execute(small(here))
    assert outputs(ran.notebook)[0][0].text.strip() == "connected"


def test_cpu_time_is_the_kernels_and_nothing_of_ours_is_left() -> None:
    notebook = small(
        "import time\nwhile time.process_time() < 3: pass", "print(sorted(n for n in dir() if 'network' in n))"
    )
    ran = notebooks.execute(notebook)
    assert 3 <= ran.cpu_seconds < 6
    assert len(ran.notebook.cells) == 2 and outputs(ran.notebook)[1][0].text.strip() == "[]"
    assert not notebook.cells[0].outputs and notebook.cells[0].execution_count is None


def test_an_error_in_a_cell_is_an_error_here() -> None:
    with pytest.raises(CellExecutionError, match="told you"):
        notebooks.execute(small("raise ValueError('told you')"))


def test_what_is_stored_is_what_a_viewer_without_scripts_shows() -> None:
    live = {notebooks.LIVE: {"data": []}, "image/png": PNG, "text/html": "<script>1</script>", "text/plain": "a"}
    cell = new_code_cell("1", execution_count=7, metadata={"execution": {"started": "now"}})
    cell.outputs = [
        new_output("stream", name="stderr", text="Loading 100%"),
        new_output("execute_result", live, execution_count=7),
        new_output("display_data", {"text/html": "<div class='xr-wrap'>", "text/plain": "<xarray.Dataset>"}),
        new_output("display_data", {"text/html": "<table></table>"}),
    ]
    stored = notebooks.settled(new_notebook(cells=[new_markdown_cell("# A"), cell], metadata={"widgets": {}}))
    figure, array, table = stored.cells[1].outputs
    assert set(figure.data) == {"image/png", "text/plain"} and figure.execution_count == 1
    assert set(array.data) == {"text/plain"} and set(table.data) == {"text/html"}
    assert not stored.cells[1].metadata and "widgets" not in stored.metadata
    assert stored.metadata.probekit["ran"] == notebooks.digest(stored)
    cell.source = "2"
    assert stored.metadata.probekit["ran"] != notebooks.digest(stored)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (new_output("display_data", {notebooks.LIVE: {}}), "without an image"),
        (new_output("stream", text=f"saved {Path.home()}/a"), "paths of this machine"),
        (new_output("display_data", {"text/plain": "/tmp/tmpabc/lens"}), "paths of this machine"),
        (new_output("stream", text="a" * 1_000_001), "bytes more"),
    ],
    ids=["no image", "home", "temporary folder", "large"],
)
def test_what_must_not_be_stored_is_refused(output: Any, words: str) -> None:
    cell = new_code_cell("1")
    cell.outputs = [output]
    with pytest.raises(ValueError, match=words):
        notebooks.settled(new_notebook(cells=[cell]))


def test_the_index_gets_the_seconds(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("| [A](a.ipynb) | words | < 90 |\n| [B](b.ipynb) | words | 41 |\n", encoding="utf-8")
    notebooks.note_seconds(readme, "b.ipynb", 42.4)
    assert readme.read_text(encoding="utf-8") == "| [A](a.ipynb) | words | < 90 |\n| [B](b.ipynb) | words | 42 |\n"
