"""A sweep refuses what it cannot judge, splits by the collection's prompts only, and its result is like any other."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_quantities, assert_same
from probing_toy import collection

import probekit as pk
from probekit.probing import erase, sweep
from probekit.probing.tasks import Classes, Settings

pytestmark = pytest.mark.usefixtures("quiet")
RNG = np.random.default_rng(0)
N = 40
LABELS = np.where(RNG.random(N) < 0.5, "yes", "no")
ROWS = RNG.normal(size=(3, N, 8))
ROWS[1:, :, 2] += 3 * (LABELS == "yes")
QUICK: dict[str, Any] = {"n_permutations": 40, "progress": False}


@pytest.fixture(scope="module")
def result() -> pk.Result:
    return sweep(collection(ROWS, LABELS, embed=ROWS[0]), **QUICK)


def test_the_result_is_as_declared(result: pk.Result) -> None:
    data = result.dataset
    assert list(data.data_vars) == list(result.analysis.measures) and data.attrs["positive"] == "yes"
    for name, measure in result.analysis.measures.items():
        assert data[name].dims == measure.dims and data[name].attrs["units"] == measure.unit
        assert "NaN" in measure.help or np.isfinite(data[name].values).all(), name
    assert float(data["base_rate"].item()) == (LABELS == "yes").mean() and data["n_groups"].item() == N
    for low, high, value in (("auroc_low", "auroc_high", "auroc"), ("chosen_low", "chosen_high", "chosen_auroc")):
        assert (data[low] <= data[value]).all() and (data[value] <= data[high]).all()


def test_it_saves_shows_and_reports_like_others(result: pk.Result, tmp_path: Path) -> None:
    assert_same(pk.load_result(result.save(tmp_path / "a.zarr")).dataset, result.dataset)
    page = pk.report(result, tmp_path / "report").read_text(encoding="utf-8")
    assert "Linear probes" in page and result.findings[0].n_unit == "prompts"
    assert set(result.figures()) == {"layers", "calibration", "codelength"}
    for figure in result.figures().values():
        assert figure.title and figure.caption and figure.alt
    assert_quantities(result.findings)
    for f in result.findings:
        assert f.ci95 is not None and f.ci95[0] <= f.value <= f.ci95[1] and f.n == N


def test_it_does_not_run_by_its_name() -> None:
    assert "linear-probes" not in pk.list_analyses()
    from helpers import scripted

    for name in ("linear-probes", "linear-probes-of-numbers", "concept-erasure", "probe-steering"):
        with pytest.raises(pk.ProbekitError, match=r"does not run on texts alone: .*pk\.collect"):
            pk.run(name, scripted(), "w1 w2 w3", progress=False)
        docs = type(pk.get_analysis(name)).__doc__ or ""
        assert all(f"{s}:" in docs for s in ("Question", "Method", "Null", "Known failure modes", "References"))


def test_equal_input_gives_equal_numbers(result: pk.Result) -> None:
    again = sweep(collection(ROWS, LABELS, embed=ROWS[0]), **QUICK)
    assert_same(again.dataset, result.dataset)
    moved = sweep(collection(ROWS, LABELS, embed=ROWS[0]), seed=1, **QUICK)
    assert not np.array_equal(moved["auroc"].values, result["auroc"].values)


def test_a_split_by_rows_is_not_offered() -> None:
    """No verb takes groups or a splitter: they are the collection's."""
    for verb in (sweep, erase):
        assert not {"groups", "cv", "split", "splitter"} & set(inspect.signature(verb).parameters)


def test_no_prompt_is_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit of a probe is followed: outer folds, inner folds and blocks of the online code never share a prompt."""
    from probekit.probing import logistic, tasks

    groups = np.repeat(np.arange(20), 2)  # two texts a prompt, such as two frames of one word
    rows = RNG.normal(size=(1, 40, 5))
    rows[0, :, 0] = np.arange(40)  # the row's own number, to know it again
    seen: list[tuple[set[int], set[int]]] = []
    own = tasks.LogisticProbe

    class Watched(own):  # type: ignore[misc, valid-type]
        def fit(self, X: Any, y: Any, groups: Any = None) -> Any:
            self.trained = {int(i) // 2 for i in np.asarray(X)[:, 0]}
            return super().fit(X, y, groups)

        def decision_function(self, X: Any) -> Any:
            seen.append((self.trained, {int(i) // 2 for i in np.asarray(X)[:, 0]}))
            return super().decision_function(X)

    folds: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    split = logistic.group_folds

    def watched(groups: np.ndarray, n: int, seed: int) -> Any:
        made = split(groups, n, seed)
        folds.extend((groups, a, b) for a, b in made)
        return made

    monkeypatch.setattr(tasks, "LogisticProbe", Watched)
    monkeypatch.setattr(logistic, "group_folds", watched)
    y = RNG.random(20) < 0.5
    task = Classes(
        np.repeat(y, 2), groups, np.arange(40), np.arange(40), of_text=True, settings=Settings(), name="made"
    )
    task.fit(rows[0])
    assert len(seen) == 5 and not any(train & test for train, test in seen)
    assert len(folds) == 25 and not any(set(g[a]) & set(g[b]) for g, a, b in folds)
    assert all(
        len(g) < 40 and (np.bincount(g) % 2 == 0).all() for g, _, _ in folds
    )  # both rows of a prompt, or neither


def test_copies_of_a_text_do_not_leak() -> None:
    """Twenty texts, each three times, with random labels: copies give labels away, and one group of them does not."""
    rng = np.random.default_rng(3)
    rows = np.repeat(rng.normal(size=(1, 20, 60)), 3, axis=1)
    labels = np.repeat(rng.permutation([True, False] * 10), 3)
    honest = sweep(collection(rows, labels, groups=np.repeat(np.arange(20), 3)), **QUICK)
    leaking = sweep(collection(rows, labels), **QUICK)
    assert leaking["auroc"].item() > 0.95
    assert honest["auroc"].item() < 0.8 and honest["auroc_low"].item() < 0.5


@pytest.mark.parametrize(
    ("labels", "how", "said"),
    [
        (None, {}, "There are no labels"),
        (["yes"] * N, {}, "All labels are 'yes'"),
        (["yes"] * 3, {}, "one for each of 40 texts"),
        (np.where(np.arange(N) < 3, np.nan, 1.0), {}, "3 labels are NaN"),
        (np.array(["a", "b", "c", "d"])[np.arange(N) % 4], {}, r"4 classes.*name it as positive"),
        (LABELS, {"positive": "maybe"}, r"positive='maybe' is no label; there are \['no', 'yes'\]"),
        (LABELS, {"points": "mlp_out"}, "holds no mlp_out"),
        (LABELS, {"points": "resid_post.7"}, "holds no resid_post.7"),
        (LABELS, {"n_folds": 1}, "'n_folds' must be from 2"),
        (LABELS, {"n_folds": 45}, "Found 40 groups .* for 45 folds"),
        (np.arange(N) == 3, {}, "the training rows of a fold are all"),
    ],
)
def test_what_cannot_be_judged_is_refused(labels: Any, how: dict[str, Any], said: str) -> None:
    with pytest.raises(pk.ProbekitError, match=said):
        sweep(collection(ROWS), labels, **{**QUICK, **how})


def test_one_prompt_is_refused() -> None:
    with pytest.raises(pk.ProbekitError, match=r"Found 1 group .* for 5 folds"):
        sweep(collection(ROWS, LABELS, groups=np.zeros(N, int)), **QUICK)
    with pytest.raises(pk.ProbekitError, match="these labels are numbers"):
        erase(collection(ROWS), np.arange(N))


def test_labels_of_tokens_and_positions() -> None:
    """Rows of two positions: each a case of its own; labels by row, whose control task goes by token id."""
    rows = np.random.default_rng(1).normal(size=(2, 80, 6))
    labels = np.random.default_rng(2).random(80) < 0.5
    rows[1, :, 0] += 4 * labels
    rows[1, ::2, 0] = 0  # at position 0 there is nothing to find
    found = sweep(collection(rows, per=2), labels, by_position=True, **QUICK)
    assert found["case"].values.tolist() == ["resid_post, position 0", "resid_post, position 1"]
    late = found["auroc"].sel(layer=1).values
    assert late[0] < 0.8 and late[1] > 0.95 and found.dataset.attrs["of_text"] == 0
    assert np.isnan(found["embedding_auroc"].values).all() and set(found.figures()) >= {"layers_0", "layers_1"}


def test_a_listener_is_told_and_can_end_it() -> None:
    steps: list[pk.Step] = []

    def listen(step: pk.Step) -> None:
        steps.append(step)
        if step.done == 2:
            raise pk.Cancelled("enough")

    with pytest.raises(pk.Cancelled):
        sweep(collection(ROWS, LABELS), n_permutations=20, progress=listen)
    assert [(s.done, s.total, s.unit) for s in steps] == [(1, 3, "layers"), (2, 3, "layers")]
