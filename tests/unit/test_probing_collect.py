"""Collected rows are the activations that a cache shows, each with its prompt; folders are whole or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import scripted, tiny_model

import probekit as pk
from probekit.core import Batch, PlanError, StoreError, TokenText
from probekit.probing import Collected, collecting
from probekit.probing.collected import MANIFEST, ROWS
from probekit.probing.places import groups_of

TEXTS = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12 w13", "w3 w4 w5 w6"]
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama").model


def seen(model: Any, text: str, point: str) -> np.ndarray:
    return pk.cache(model, text, point, progress=False)[point].values


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("last", [[3], [1], [4], [3]]),
        (0, [[0], [0], [0], [0]]),
        ([-1, 0], [[3, 0], [1, 0], [4, 0], [3, 0]]),
        ("all", [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3]]),
        (lambda s: s.strip() in ("w4", "w13"), [[1], [], [4], [1]]),
        ([[1], [], [-1, 0], [2]], [[1], [], [4, 0], [2]]),
        ([[True, False, False, True], [False] * 2, [False] * 5, [False] * 4], [[0, 3], [], [], []]),
    ],
)
def test_rows_are_what_a_cache_shows(model: Any, positions: Any, expected: list[list[int]]) -> None:
    found = pk.collect(model, TEXTS, ["resid_post", "z.1"], positions=positions, progress=False)
    places = [(t, p) for t, own in enumerate(expected) for p in own]
    assert list(zip(found.rows["text"], found.rows["pos"], strict=True)) == places
    for point, axis in (("resid_post", 1), ("z.1", 0), ("embed", 0)):
        by_text = [seen(model, t, point) for t in TEXTS]
        rows = np.stack([np.take(by_text[t], p, axis) for t, p in places], axis)
        np.testing.assert_allclose(found[point].values, rows, rtol=1e-4, atol=1e-4)
    assert found["resid_post"].dims == ("layer", "token", "d_model")
    assert found["z.1"].dims == ("token", "head", "d_head")
    assert found.matrix("z.1").shape == (len(places), 32) and "resid_post.2" in found.points
    np.testing.assert_array_equal(found.matrix(("resid_post", -1)), found["resid_post", 2].values)
    ids = [model.tokenize([TEXTS[t]]).texts[0].ids[p] for t, p in places]
    np.testing.assert_array_equal(found["embed"]["token_id"], ids)
    assert found["embed"]["token_str"].values.tolist() == list(model.decode(ids))


def test_rows_do_not_depend_on_the_chunks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pk.collect(model, TEXTS, positions="all", progress=False)
    sizes = []
    run = collecting.run_pass

    def spied(model: Any, request: Any, batch: Any, **how: Any) -> Any:
        sizes.append(batch.n_tokens)
        return run(model, request, batch, **how)

    monkeypatch.setattr(collecting, "run_pass", spied)
    monkeypatch.setattr(collecting, "CHUNK_TOKENS", 5)
    parts = pk.collect(model, TEXTS, positions="all", progress=False)
    assert len(sizes) == 4 and max(sizes) == 5
    for site in ("resid_post", "embed"):
        np.testing.assert_allclose(parts[site].values, whole[site].values, rtol=1e-4, atol=1e-5)


def test_prompts_that_are_alike_are_one_group() -> None:
    texts = ["w1 w2 w3", "w4 w5 w6", "w1  w2 w3", "w7 w8 w9", "w4 w5 w6"]
    found = pk.collect(scripted(), texts, progress=False)
    assert found.groups.tolist() == [0, 1, 0, 2, 1]
    chained = pk.collect(scripted(), texts, groups=["a", "b", "c", "c", "d"], progress=False)
    assert chained.groups.tolist() == [0, 1, 0, 0, 1]
    words = (("A", " b"), (" a", "  B"), ("a", "b"))  # but for case and blanks the first two are the same
    batch = Batch(tuple(TokenText((i, i + 1), w) for i, w in enumerate(words)))
    assert groups_of(batch).tolist() == [0, 0, 1]


def test_labels_and_groups_come_with_records(model: Any) -> None:
    records = [{"text": t, "label": x, "group": g} for t, x, g in zip(TEXTS, "abab", (1, 2, 2, 3), strict=True)]
    found = pk.collect(model, records, positions=[0, -1], progress=False)
    assert found.labels is not None and found.labels.tolist() == list("aabbaabb")
    assert found.groups.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert list(found.rows.columns) == ["text", "pos", "position", "token_id", "group", "token_str", "label"]
    assert "8 rows of 2 prompts, labelled" in repr(found) and "<table>" in found._repr_html_()


def test_a_folder_reopens_as_it_was(model: Any, tmp_path: Path) -> None:
    kept = pk.collect(model, TEXTS, positions="all", labels=[1, 0, 1, 1], folder=tmp_path / "a", progress=False)
    again = Collected.open(tmp_path / "a")
    assert isinstance(again.arrays["resid_post"], np.memmap)
    assert again["resid_post"].identical(kept["resid_post"]) and again.rows.equals(kept.rows)
    assert again.manifest["model"]["name"] == "tiny-llama" and again.manifest["texts"]["digest"].startswith("sha256:")
    assert again.nbytes == kept.nbytes == 15 * 32 * 4 * 4
    with pytest.raises(StoreError, match="holds a collection already"):
        pk.collect(model, TEXTS, folder=tmp_path / "a", progress=False)


def test_a_folder_that_is_not_whole_is_refused(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    pk.collect(model, TEXTS, folder=folder, progress=False)
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    manifest = json.loads((half / MANIFEST).read_text())
    (half / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(StoreError, match="was not finished"):
        Collected.open(half)
    pk.collect(model, TEXTS, folder=half, progress=False)  # and may be collected again
    assert len(Collected.open(half)) == 4
    whole = (folder / "resid_post.npy").read_bytes()
    (folder / "resid_post.npy").write_bytes(whole[:-100])
    with pytest.raises(StoreError, match="damaged"):
        Collected.open(folder)
    (folder / "resid_post.npy").write_bytes(whole)
    (folder / ROWS).write_bytes((folder / ROWS).read_bytes()[:100])
    with pytest.raises(StoreError, match="damaged"):
        Collected.open(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(StoreError, match="newer probekit"):
        Collected.open(folder)
    with pytest.raises(StoreError, match="no collection"):
        Collected.open(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds no collection"):
        pk.collect(model, TEXTS, folder=tmp_path / "mine", progress=False)


def test_what_breaks_off_leaves_nothing(model: Any, tmp_path: Path) -> None:
    def stop(step: pk.Step) -> None:
        raise pk.Cancelled("enough")

    with pytest.raises(pk.Cancelled):
        pk.collect(model, TEXTS, folder=tmp_path / "a", progress=stop)
    assert not (tmp_path / "a").exists()


def test_large_arrays_go_to_a_temporary_folder(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "IN_MEMORY", 100)
    monkeypatch.setattr(collecting.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    assert not pk.probing.plan(model, TEXTS).in_memory
    with pk.collect(model, TEXTS, progress=False) as found:
        assert found.folder is not None and found.folder.exists() and "temporary" in repr(found)
        expected = seen(model, TEXTS[1], "resid_post")[:, -1]
        np.testing.assert_allclose(found["resid_post"].values[:, 1], expected, rtol=1e-4, atol=1e-4)
    assert not found.folder.exists()


def test_the_size_is_known_beforehand(model: Any) -> None:
    plan = pk.probing.plan(model, TEXTS, ["resid_post", "mlp_out.0"], positions="all", dtype="float16")
    found = pk.collect(model, TEXTS, ["resid_post", "mlp_out.0"], positions="all", dtype="float16", progress=False)
    assert plan.nbytes == found.nbytes == 15 * 32 * (3 + 1 + 1) * 2
    assert (plan.n_rows, plan.n_texts, plan.n_groups) == (15, 4, 3) and "15 rows of 4 texts (3 prompts)" in str(plan)
    with pytest.raises(PlanError, match="are available"):
        pk.collect(model, TEXTS, memory_limit=1000, progress=False)


def test_what_cannot_be_done_is_said(model: Any) -> None:
    def loud(text: Any) -> Any:
        from probekit.backends.scripted import Script

        return Script(np.full((4, len(text), 16), 1e6), np.zeros((4, 3, len(text), len(text))))

    for how, said in (
        ({"positions": 2}, "Position 2 is outside text 1 of 2 tokens"),
        ({"positions": "first"}, "expected 'last', 'all'"),
        ({"positions": [[0]]}, "1 entries for 4 texts"),
        ({"positions": [[True], [True], [True], [True]]}, "1 booleans for 4 tokens"),
        ({"positions": [0, -2]}, "text 1: .* twice"),
        ({"positions": lambda s: False}, "No token was chosen"),
        ({"labels": [1, 2]}, "2 labels for 4 texts"),
        ({"groups": [1]}, "1 groups for 4 texts"),
        ({"groups": [1, 2, None, 3]}, "group is missing"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"points": "pattern.0"}, "no vector per token"),
        ({"points": "resid_past"}, "resid_post"),
        ({"points": []}, "No point was given"),
    ):
        with pytest.raises(pk.ProbekitError, match=said):
            pk.collect(model, TEXTS, **{"progress": False, **how})  # type: ignore[arg-type]
    with pytest.raises(pk.ProbekitError, match="Text 1 has no label"):
        pk.collect(model, [{"text": "w3", "label": 1}, {"text": "w4"}], progress=False)
    with pytest.raises(pk.ProbekitError, match=r"reaches 1e\+06, too large for float16"):
        pk.collect(scripted(play=loud), ["w1 w2"], dtype="float16", progress=False)
    found = pk.collect(model, TEXTS, "resid_post.1", progress=False)
    for point, said in (("mlp_out", "holds no mlp_out"), ("resid_post.0", r"it holds \[1\]")):
        with pytest.raises(pk.ProbekitError, match=said):
            found[point]
