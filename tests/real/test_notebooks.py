"""Every notebook runs from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def execute(path: Path) -> Any:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own event loop and sockets
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_shows_something(path: Path) -> None:
    notebook = execute(path)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    shown = {kind for o in outputs if "data" in o for kind in o.data}
    assert "text/html" in shown and any("plotly" in kind for kind in shown), shown


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
