"""Grids of runs: kept as they end, gone on with after a stop, widened, and told of where they cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import probekit as pk
from probekit.core import Cancelled

TEXTS = {
    "near": [" ".join(f"w{3 + (i * i + k) % 101}" for i in range(60)) for k in range(3)],
    "far": [" ".join(f"w{3 + (7 * i + k) % 101}" for i in range(60)) for k in range(3)],
}


def study(folder: Path, **changes: Any) -> pk.Study:
    plain: dict[str, Any] = {
        "name": "A trial",
        "analyses": ["attention-sinks", "token-uncertainty"],
        "models": {"tiny": folder},
        "corpora": TEXTS,
        "params": {"horizon": 32, "n_made": 2},
    }
    return pk.Study(**plain | changes)


def stamps(root: Path) -> dict[str, int]:
    return {p.name: (p / "findings.json").stat().st_mtime_ns for p in sorted((root / "runs").iterdir())}


def test_a_study_runs_every_combination_and_reports_them_side_by_side(tiny_folder: Path, tmp_path: Path) -> None:
    grid = study(tiny_folder, vary={"epsilon": [0.2, 0.3]})
    assert [c.label for c in grid.cells][:2] == ["tiny, near, epsilon = 0.2", "tiny, near, epsilon = 0.3"]
    plan = str(grid.plan(tmp_path))
    assert (
        plan.startswith("A trial: 4 runs") and plan.count("3 texts, 180 tokens") == 4 and not list(tmp_path.iterdir())
    )
    found = grid.run(tmp_path, progress=False)
    alone = pk.run("attention-sinks", tiny_folder, TEXTS["far"], epsilon=0.3, horizon=32, n_made=2, progress=False)
    cell = next(c for c in found.results if c.label == "tiny, far, epsilon = 0.3")
    assert found.results[cell]["attention-sinks"]["sink_rate"].equals(alone["sink_rate"])
    assert found.comparison is not None
    by = {f.where["by"] for f in found.comparison.findings}
    assert by == {"texts", "parameter epsilon"}
    uncertain = [f for f in found.comparison.findings if f.claim.startswith("Token uncertainty")]
    assert {f.where["by"] for f in uncertain} == {"texts"}, "it has no epsilon: its runs are the same and count once"
    page = found.report().read_text(encoding="utf-8")
    assert "<h1>A trial</h1>" in page and "Runs side by side" in page and "4 runs" in page
    assert str(grid.plan(tmp_path)).count("done already") == 4


def test_it_goes_on_where_it_was_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    grid, begun = study(tiny_folder), []

    def stop(step: Any) -> None:
        begun.append(step)
        if (tmp_path / "runs").is_dir():
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        grid.run(tmp_path, progress=stop)
    before = stamps(tmp_path)
    assert list(before) == ["tiny-near"] and begun
    found = grid.run(tmp_path, progress=False)
    after = stamps(tmp_path)
    assert list(after) == ["tiny-far", "tiny-near"] and after["tiny-near"] == before["tiny-near"]
    whole = grid.run(tmp_path / "unbroken", progress=False)
    for cell, results in whole.results.items():
        for name, result in results.items():
            assert result.dataset.identical(found.results[cell][name].dataset) or result.dataset.equals(
                found.results[cell][name].dataset
            )


@pytest.mark.parametrize(
    "changes", [{"params": {"horizon": 16, "n_made": 2}}, {"corpora": {**TEXTS, "far": TEXTS["far"][:2]}}, {"how": {"bos": "always"}}]
)  # fmt: skip
def test_what_changed_runs_again(tiny_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    study(tiny_folder).run(tmp_path, progress=False)
    before = stamps(tmp_path)
    study(tiny_folder, **changes).run(tmp_path, progress=False)
    changed = {name for name, stamp in stamps(tmp_path).items() if before[name] != stamp}
    assert changed == ({"tiny-far"} if "corpora" in changes else {"tiny-far", "tiny-near"})


def test_what_cannot_run_is_told_and_keeps_nothing_else_from_running(tiny_folder: Path, tmp_path: Path) -> None:
    grid = study(
        tiny_folder, models={"tiny": tiny_folder, "gone": tmp_path / "nowhere"}, corpora={"short": ["w3"], **TEXTS}
    )
    plan = str(grid.plan())
    assert plan.count("cannot run") == 4 and "tiny, short" in plan
    found = grid.run(tmp_path / "out", progress=False)
    assert len(found.results) == 2 and len(found.failed) == 4
    assert "gone, near: not run." in found.report().read_text(encoding="utf-8")
    with pytest.raises(pk.ProbekitError, match="nowhere"):
        study(tiny_folder, models={"gone": tmp_path / "nowhere"}).run(tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_what_makes_no_sense_is_refused_before_anything_runs(tiny_folder: Path) -> None:
    with pytest.raises(pk.ProbekitError, match="needs a list of models"):
        study(tiny_folder, models="gpt2")
    with pytest.raises(pk.ProbekitError, match=r"list of values for each parameter; found epsilon=0\.3"):
        study(tiny_folder, vary={"epsilon": 0.3})
    with pytest.raises(pk.ProbekitError, match="horizon is varied and given a value"):
        study(tiny_folder, vary={"horizon": [16, 32]})
    with pytest.raises(pk.ProbekitError, match="Unknown parameter"):
        study(tiny_folder, vary={"epsilom": [0.1]})
    with pytest.raises(pk.ProbekitError, match="Unknown analysis"):
        study(tiny_folder, analyses=["attention-sink"])
    with pytest.raises(pk.ProbekitError, match="would be called 'tiny, a b'"):
        study(tiny_folder, corpora={"a b": ["x"], "a/b": ["y"]})


def test_openings_leave_out_shorter_texts(tiny_folder: Path) -> None:
    texts = [*TEXTS["near"], "w3 w4 w5"]
    result = pk.run("attention-sinks", tiny_folder, texts, opening=40, horizon=32, progress=False)
    assert result["sink_rate"].sizes["text"] == 3 and result.provenance["texts"]["opening"] == 40
    assert result["token_id"].sizes["token"] == 120
    with pytest.raises(pk.ProbekitError, match=r"No text has 100 tokens for an opening; the longest has 60\."):
        pk.run("attention-sinks", tiny_folder, texts, opening=100)
    with pytest.raises(pk.ProbekitError, match="No text of 'b' has 40 tokens"):
        pk.run("attention-sinks", tiny_folder, {"a": texts, "b": ["w3 w4 w5"]}, opening=40)
