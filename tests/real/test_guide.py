"""The guide for users of TransformerLens and nnsight: every name resolves, every snippet runs, and the three agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from probekit.core import Point

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "coming-from-transformerlens-and-nnsight.md").read_text(encoding="utf-8")
LIBRARIES = ("probekit", "TransformerLens", "nnsight")
CHECKS = """
def same(ours, theirs, atol=2e-3):
    difference = abs(ours.values - theirs.detach().numpy()[0]).max()
    assert difference < atol, difference

same(stream, nn_stream)
same(changed, tl_changed)
same(changed, nn_changed)
same(mixed, tl_mixed)
same(mixed, nn_mixed)
same(ablated, tl_ablated)
same(ablated, nn_ablated)
same(maps, tl_maps)
assert abs(cut.values - ablated.values).max() > 1e-4
assert [i.tolist() for i in lens["top_id"].sel(layer=20).values[:, 0]] == nn_lens[0].argmax(-1).tolist()
assert tl_lens[0].argmax(-1).tolist() == nn_lens[0].argmax(-1).tolist()
assert list(written.batch.texts[0].ids) == nn_written[0].tolist()
assert entropy[entropy["text"] == 1].sizes["token"] == 4
print("the three agree")
"""


def script(libraries: tuple[str, ...]) -> str:
    """The snippets of these libraries, in the order of the page."""
    wanted, found = False, []
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("# ") and line[2:] in LIBRARIES:
                wanted = line[2:] in libraries
            if wanted:
                found.append(line)
    return "\n".join(found) + "\n"


def run_it(source: str, folder: Path) -> str:
    path = folder / "guide.py"
    path.write_text(source, encoding="utf-8")
    given = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(path)], cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_name_of_the_table_is_the_same_point() -> None:
    lines = [line.strip("|").split("|") for line in GUIDE.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert len(rows) == 12
    for ours, *theirs, _ in rows:
        points = [Point.of(name) for name in re.findall(r"`(.*?)`", ours)]
        for column in theirs:
            names = re.findall(r"`(.*?)`", column)
            first = names[0].rsplit("hook_", 1)[0] if names else ""
            names = [name.replace("…", first) for name in names]
            assert [Point.of(name) for name in names] in ([], points), names
    assert {p.site for row in rows for p in [Point.of(re.findall(r"`(.*?)`", row[0])[0])]} >= {"embed", "z", "logits"}


def test_probekit_snippets_need_no_other_library(tmp_path: Path) -> None:
    source = script(("probekit",))
    assert len(source.splitlines()) > 25 and "bridge" not in source and "lm." not in source
    run_it(source + "\nimport sys\nassert not {'transformer_lens', 'nnsight'} & set(sys.modules)\n", tmp_path)


def test_all_snippets_run_and_the_three_agree(tmp_path: Path) -> None:
    """Logits under the same change to 2e-3 of about 20; the same greedy tokens under the same steering."""
    assert run_it(script(LIBRARIES) + CHECKS, tmp_path).strip().endswith("the three agree")
