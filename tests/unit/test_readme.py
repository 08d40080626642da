"""What the README shows is what works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import probekit as pk
from probekit.analysis import load_file, temporary_registrations

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = " ".join(f"w{3 + i * i % 101}" for i in range(90))


def example() -> str:
    found = re.search(r"<!-- one-file-example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, "the README lost its one-file example"
    return found.group(1)


def test_the_one_file_example_is_short() -> None:
    assert 10 < len(example().splitlines()) < 40


def test_the_one_file_example_runs(tiny_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "stream_norm.py"
    mine.write_text(example(), encoding="utf-8")
    with temporary_registrations():
        load_file(mine)
        result = pk.run("stream-norm", tiny_folder, TEXT, progress=False, layer=0)
        page = pk.report(result, tmp_path / "out").read_text(encoding="utf-8")
    assert result.findings[0].claim in page
    assert result["norm"].sizes == {"layer": 3, "token": 90}


def test_every_analysis_is_in_the_table() -> None:
    for name in pk.list_analyses():
        assert f"| `{name}` |" in README, name


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_every_linked_file_exists(target: str) -> None:
    assert (ROOT / target).exists()
