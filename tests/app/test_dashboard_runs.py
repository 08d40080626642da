"""Stored runs in the dashboard: what is found, what is refused, and the tables of the pages Runs, Strange, Compare."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocabulary_toy as toy
from helpers import scripted, texts_of

import probekit as pk
from probekit import plots
from probekit.backends.scripted import random_play
from probekit.methods.token_categories import CATEGORIES

pytest.importorskip("streamlit", reason="the dashboard needs streamlit: pip install 'probekit[app]'")
from probekit_dashboard import compared, stored, strange


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of probekit's."""
    root = tmp_path_factory.mktemp("runs")
    model = scripted()
    words = " ".join(f"w{i}" for i in range(3, 12))
    pk.report(
        pk.run(["token-uncertainty", "logit-lens"], model, [words, "w5 w6 w7"], progress=False), root / "a" / "one"
    )
    pk.report(pk.run(["token-uncertainty"], model, [words], progress=False, top_k=3), root / "two")
    return root


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def by_name(root: Path) -> dict[str, stored.Run]:
    return {r.name: r for r in stored.runs_below(root)[0]}


# Which folders may be read


def test_folders_outside_of_the_roots_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, other = tmp_path / "start", tmp_path / "other"
    (start / "reports").mkdir(parents=True)
    other.mkdir()
    (start / "link").symlink_to(other)
    allowed = stored.roots(start)
    assert stored.folder_of("reports", allowed) == stored.folder_of(f" {start}/x/../reports ", allowed)
    for given in (
        "..",
        "../other",
        str(other),
        "/",
        "/etc",
        "link",
        "reports/../../other",
        "~root",
        "reports/../link/.",
    ):
        with pytest.raises(pk.ProbekitError, match=r"outside of what|There is no folder"):
            stored.folder_of(given, allowed)
    with pytest.raises(pk.ProbekitError, match="outside of what"):  # not even whether it exists
        stored.folder_of("../nothing there", allowed)
    for given in ("", " ", "a\0b"):
        with pytest.raises(pk.ProbekitError, match="Name a folder"):
            stored.folder_of(given, allowed)
    with pytest.raises(pk.ProbekitError, match="There is no folder"):
        stored.folder_of("x" * 60, allowed)
    monkeypatch.setenv(stored.ROOTS, str(other))
    assert stored.folder_of(str(other), stored.roots(start)) == other.resolve()


def test_runs_are_found_with_what_their_manifests_say(runs: Path) -> None:
    found = by_name(runs)
    assert set(found) == {"a/one", "two"}
    one = found["a/one"]
    assert one.model == "scripted" and one.analyses == ["token-uncertainty", "logit-lens"] and one.n_texts == 2
    assert not one.problem and one.n_bytes == sum(
        p.stat().st_size for p in (runs / "a" / "one").rglob("*") if p.is_file()
    )
    table = stored.run_table(list(found.values()))
    assert len(table) == 2 and set(table["texts"]) == {1, 2}
    results, problems = stored.results_of(one.folder)
    assert set(results) == {"token-uncertainty", "logit-lens"} and not problems


def test_links_out_of_a_folder_are_not_followed(runs: Path, tmp_path: Path) -> None:
    outside = Path(shutil.copytree(runs / "two", tmp_path / "outside"))
    (runs / "linked").symlink_to(outside)  # a folder that is a link: not searched
    (runs / "half").mkdir()
    (runs / "half" / "results.zarr").symlink_to(outside / "results.zarr")
    secret = tmp_path / "secret.json"
    secret.write_text('{"format": "probekit run", "model": {"name": "secret"}}')
    (runs / "two" / "manifest.json").unlink()
    (runs / "two" / "manifest.json").symlink_to(secret)
    chunk = next(p for p in (runs / "a" / "one" / "results.zarr").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.unlink()
    chunk.symlink_to(secret)
    found = by_name(runs)
    assert "linked" not in found and "link that leads out" in found["half"].problem
    assert "link that leads out" in found["two"].problem and not found["two"].model
    assert "link that leads out" in found["a/one"].problem
    for name in ("half", "a/one"):
        with pytest.raises(pk.ProbekitError, match="link"):
            stored.results_of(runs / name)


def test_damaged_and_foreign_folders_give_sentences(runs: Path) -> None:
    (runs / "foreign" / "results.zarr").mkdir(parents=True)
    (runs / "foreign" / "manifest.json").write_text("[1, 2")
    (runs / "two" / "manifest.json").write_text(
        json.dumps({"format": "probekit run", "model": 3, "analyses": {"x": 1}, "texts": []})
    )
    (runs / "a" / "one" / "manifest.json").write_text('{"format": "other"}')
    shutil.rmtree(runs / "a" / "one" / "results.zarr" / "logit-lens" / "kl_nats")
    found = by_name(runs)
    assert "cannot be read as JSON" in found["foreign"].problem and "not probekit's" in found["a/one"].problem
    assert (found["two"].model, found["two"].analyses, found["two"].n_texts) == ("", [], None)
    assert len(stored.run_table(list(found.values()))) == 3
    with pytest.raises(pk.ProbekitError, match="holds no results"):
        stored.results_of(runs / "foreign")
    results, problems = stored.results_of(runs / "a" / "one")  # the other part is shown all the same
    assert list(results) == ["token-uncertainty"] and "damaged" in problems["logit-lens"]
    shutil.rmtree(runs / "a" / "one" / "results.zarr" / "token-uncertainty" / "entropy_nats")
    with pytest.raises(pk.ProbekitError, match="damaged"):
        stored.results_of(runs / "a" / "one")


def test_a_store_that_claims_too_much_is_refused(runs: Path) -> None:
    meta = runs / "two" / "results.zarr" / "token-uncertainty" / "entropy_nats" / "zarr.json"
    said = json.loads(meta.read_text())
    said["shape"] = [10**12]
    meta.write_text(json.dumps(said))
    with pytest.raises(pk.ProbekitError, match="GiB"):
        stored.results_of(runs / "two")


# Tables


def test_nested_data_become_rows_of_visible_text() -> None:
    data = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": "x\0\u202e"}], "f": None, "g": {}}
    assert stored.flat(data) == {"a.b": "1", "a.c": "1, 2", "d.0.e": "x\\x00\\u202e", "f": "", "g": "{}"}
    deep: Any = 1
    for _ in range(5000):
        deep = {"x": deep}
    assert len(stored.table_of(deep)) == 1 and len(stored.table_of({str(i): i for i in range(10**4)})) <= 400


def test_differences_of_two_manifests(runs: Path) -> None:
    found = by_name(runs)
    table = stored.differences(found["a/one"], found["two"]).set_index("what")
    assert table.loc["texts.n_texts"].tolist() == ["2", "1"]
    assert table.loc["parameters.token-uncertainty.top_k"].tolist() == ["10", "3"]
    assert table.loc["parameters.logit-lens.top_k", "second"] == "–"
    assert not any(str(n).startswith("plan") for n in table.index) and "model.name" not in table.index
    assert stored.differences(found["two"], found["two"]).empty


def test_the_first_text_comes_back_only_if_it_is_the_same(runs: Path) -> None:
    results, _ = stored.results_of(runs / "two")
    text = stored.first_text(results)
    assert text is not None and text.model == "scripted" and len(text.ids) == 9
    again = stored.text_again(text, scripted())
    assert again is not None and again.split() == [f"w{i}" for i in range(3, 12)]
    assert stored.text_again(replace(text, ids=(*text.ids[:-1], 60)), scripted()) is None
    vocabulary = pk.run(
        "undertrained-tokens", toy.Copier(weights=toy.rows_with(())), None, n_verify=0, n_controls=0, progress=False
    )
    assert stored.first_text(pk.Results({vocabulary.name: vocabulary})) is None


@pytest.fixture(scope="module")
def vocabulary() -> pk.Result:
    planted = (toy.id_of("bam"),)
    model = toy.Copier(weights=toy.rows_with(planted))
    return pk.run("undertrained-tokens", model, None, n_verify=0, n_controls=0, share=0.1, progress=False)


def test_candidates_and_the_list_to_strip(vocabulary: pk.Result) -> None:
    assert strange.CATEGORIES == CATEGORIES
    table = strange.candidates(vocabulary)
    assert table["id"].iloc[0] == toy.id_of("bam") and "probability of repeating it" not in table
    assert len(table) == int(vocabulary["candidate"].values.sum())
    assert strange.candidates(vocabulary, "BAM")["id"].tolist() == [toy.id_of("bam")]
    assert strange.candidates(vocabulary, "(no such").empty
    ids, why = strange.to_strip(vocabulary)
    assert ids[0] == toy.id_of("bam") and "weights alone" in why
    listed = json.loads(strange.strip_list("m", [1, 2], ["\ud800", "<b>\0"], why))
    assert [t["text"] for t in listed["tokens"]] == ["\ud800", "<b>\0"]


def test_the_scatter_names_what_a_click_hits(vocabulary: pk.Result) -> None:
    other = strange.second_axes(vocabulary)[0]
    groups = strange.points(vocabulary, other)
    figure = strange.scatter(vocabulary, other, groups)
    name, values = strange.chosen_indicator(vocabulary)
    for trace, ids in zip(figure.plot.data, groups.values(), strict=True):
        assert np.allclose(np.asarray(trace.x, dtype=float), values[ids])  # the n-th point is the n-th id
    assert toy.id_of("bam") in groups["candidates"] and name != other
    every = np.concatenate(list(groups.values()))
    assert len(every) == len(set(every.tolist()))


def test_cards_as_tables() -> None:
    card = pk.TokenBook(toy.Copier(weights=toy.rows_with((toy.id_of("bam"),)))).card(toy.id_of("bam"))
    assert strange.spelling(card)["value"].tolist()[0] == str(card.token)
    assert "suspicious" in strange.verdict(card) and len(strange.numbers(card)) == len(card.numbers)
    assert strange.neighbours(card)["id"].tolist() == [n.token for n in card.neighbours]


def test_two_strips_share_one_scale() -> None:
    one = (
        plots.Quantity("a", "nats", np.array([np.nan, 1.0, 2.0])),
        plots.Quantity("b", "1", np.array([0.0, 3.0]), "log"),
    )
    other = (plots.Quantity("a", "nats", np.array([-1.0, 1.5])), plots.Quantity("b", "1", np.array([9.0]), "log"))
    first, second = compared.same_scale(one, other)
    assert [(q.low, q.high) for q in first] == [(q.low, q.high) for q in second] == [(-1.0, 2.0), (3.0, 9.0)]


def test_the_table_of_shifts() -> None:
    batch = texts_of((6,))
    shift = pk.shift(scripted(), scripted(play=random_play(seed=1)), batch, progress=False)
    js = shift.data["js_nats"].values
    assert len(set(js.tolist())) == 6
    table = compared.shift_table(shift)
    assert table["token"].tolist() == (np.argsort(-js, kind="stable") + 1).tolist()
    last = table[table["token"] == 6]
    assert last["text"].item() == "(after the text)" and np.isnan(last["Δ log p (nats)"].item())
    strip = compared.shift_quantities(shift)
    assert np.isnan(strip[0].values[0]) and np.allclose(strip[0].values[1:], js[:-1])
    assert any("ln 2" in line for line in compared.shift_words(shift))
