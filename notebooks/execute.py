"""Run the notebooks and store what they show, so that they read as pages where nothing runs.

python notebooks/execute.py            # all of them; images need kaleido and Chrome or Chromium
python notebooks/execute.py 01 03      # some, by the beginning of their names

A notebook runs with the network closed. What is stored is the same on every machine but for the numbers: images in
place of live figures, no progress bars, no execution times, no paths. `README.md` gets the CPU seconds that it took.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LARGEST = 1_000_000  # bytes of a stored notebook
TIMEOUT = 900  # seconds for one cell
LIVE = "application/vnd.plotly.v1+json"
# Both run in the kernel, before the first cell and after the last one; neither is stored.
CLOSE_NETWORK = '''
def _close_network():
    """Sockets reach this machine and no other."""
    import ipaddress, socket

    def here(address):
        if not isinstance(address, tuple):
            return True  # such as a Unix socket
        try:
            return address[0] == "localhost" or ipaddress.ip_address(address[0]).is_loopback
        except ValueError:
            return False

    def guarded(own):
        def connect(self, address):
            if not here(address):
                raise OSError(f"The network is closed in this notebook: no connection to {address!r}.")
            return own(self, address)

        return connect

    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


_close_network()
del _close_network
'''
READ_CLOCK = "import time as _time\nprint(_time.process_time())"
NO_DOWNLOADS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # threads that wait for each other count as CPU time


@dataclass(frozen=True)
class Executed:
    """A notebook that ran.

    Args:
        notebook: with its outputs, as the kernel sent them.
        cpu_seconds: user and system time of the kernel's process, all threads.
    """

    notebook: Any
    cpu_seconds: float


def execute(notebook: Any, folder: Path = HERE, *, images: str = "0") -> Executed:
    """Run every cell in a fresh kernel with the network closed; the first error ends it.

    Args:
        notebook: is left as it is.
        folder: where the kernel runs.
        images: what PROBEKIT_STATIC_IMAGES says: "0" for live figures alone, "only" for images in their place.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell

    ran = notebook.copy()
    cells = [c.copy() for c in notebook.cells]
    ran["cells"] = [new_code_cell(CLOSE_NETWORK), *cells, new_code_cell(READ_CLOCK)]
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(ran, timeout=TIMEOUT, record_timing=False, resources=where)
    client.execute(env={**os.environ, **NO_DOWNLOADS, **ONE_THREAD, "PROBEKIT_STATIC_IMAGES": images})
    clock = ran.cells[-1].outputs[0].text
    ran["cells"] = ran.cells[1:-1]
    return Executed(ran, float(clock))


def settled(notebook: Any) -> Any:
    """The notebook as it is stored.

    Raises:
        ValueError: an output names a path of this machine, a live figure has no image, or it is too large.
    """
    import nbformat

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in notebook.cells:
        cell["metadata"] = {}
    for count, cell in enumerate(code, start=1):
        cell["execution_count"] = count
        cell["outputs"] = [o for o in cell.outputs if o.get("name") != "stderr"]  # progress bars
        for output in cell.outputs:
            if "data" in output:
                output["data"] = _readable(output.data)
            if "execution_count" in output:
                output["execution_count"] = count
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "probekit": {"ran": digest(notebook)},
    }
    text = nbformat.writes(notebook)
    if (size := len(text.encode()) - LARGEST) > 0:
        raise ValueError(f"The stored notebook has {size:,} bytes more than {LARGEST:,}; show less in it.")
    if found := paths_in(notebook):
        raise ValueError(f"Outputs name paths of this machine: {', '.join(found)}. Print something else.")
    return notebook


def _readable(data: Any) -> Any:
    """Media types that a viewer without scripts and styles shows well."""
    if LIVE in data and "image/png" not in data:
        raise ValueError("A figure came without an image: pip install 'probekit[notebook]', and Chrome or Chromium.")
    kept = {kind: value for kind, value in data.items() if kind != LIVE}
    page = kept.get("text/html", "")
    if (
        "image/png" in kept or "xr-wrap" in page or "<script" in page
    ):  # a heap of words where neither style nor script is
        kept.pop("text/html", None)
    if "image/png" in kept:
        kept["image/png"] = _small(kept["image/png"])
    return kept


def _small(png: str) -> str:
    """A PNG in 256 colours, a third of the size; base64 in and out."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    written = io.BytesIO()
    few.save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def digest(notebook: Any) -> str:
    """sha256 over the sources of all code cells: outputs with the same one are those of these sources."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def paths_in(notebook: Any) -> list[str]:
    """Folders of a machine that outputs name."""
    roots = {tempfile.gettempdir(), str(Path.home()), sys.prefix, str(HERE.parent), "/tmp", "/home/", "/Users/"}
    outputs = [str({k: v for k, v in o.get("data", {}).items() if k != "image/png"}) + str(o.get("text", ""))
               for cell in notebook.cells for o in cell.get("outputs", [])]  # fmt: skip
    return sorted(root for root in roots if len(root) > 1 and any(root in text for text in outputs))


def fetch_models() -> None:
    """Have the embedded models on this machine before the network closes."""
    import probekit as pk

    for row in pk.list_models():
        if not row["cached"]:
            pk.open_model(row["name"])


def note_seconds(readme: Path, name: str, seconds: float) -> None:
    """Put the CPU seconds of a notebook into its row of the index."""
    row = re.compile(rf"^(\| .*\({re.escape(name)}\).*\| )[^|]+( \|)$", re.MULTILINE)
    readme.write_text(row.sub(rf"\g<1>{seconds:.0f}\g<2>", readme.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    """Run the chosen notebooks, store them, say what they took."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of file names; all notebooks if left out")
    names = tuple(parser.parse_args().names) or ("",)
    chosen = [path for path in sorted(HERE.glob("*.ipynb")) if path.name.startswith(names)]
    if not chosen:
        parser.error(f"no notebook in {HERE} begins with {' or '.join(names)}")
    fetch_models()
    for path in chosen:
        ran = execute(nbformat.read(path, as_version=4), images="only")
        nbformat.write(settled(ran.notebook), path)
        note_seconds(HERE / "README.md", path.name, ran.cpu_seconds)
        print(f"{path.name:46} {ran.cpu_seconds:5.0f} s of CPU time {path.stat().st_size / 1000:6,.0f} kB")


if __name__ == "__main__":
    main()
