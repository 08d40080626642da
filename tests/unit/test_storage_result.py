"""Results on disk: bit for bit, whatever bytes the tokens hold; whole or not at all; nobody else's files touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from fake_report import NASTY
from helpers import assert_same, run, scripted, texts_of

from probekit.analysis import Results, load_result, load_results
from probekit.core import InputError, StoreError, UnknownName
from probekit.core.storage import groups, read_group, replacing, write_group

NAMES = ("logit-lens", "token-uncertainty")


@pytest.fixture(scope="module")
def results() -> Results:
    return run(NAMES, scripted(), texts_of((9, 12)))


def dataset() -> xr.Dataset:
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(3, 4)).astype(np.float32)
    floats[0, 0], floats[1, 1], floats[2, 2], floats[0, 1] = np.nan, np.inf, -0.0, np.float32(1e-45)
    return xr.Dataset(
        {
            "f32": (("layer", "token"), floats, {"units": "nats", "long_name": "a"}),
            "f64": (("token",), rng.normal(size=4), {"units": "share"}),
            "i32": (("token",), np.array([-1, 0, 2**31 - 1, 5], dtype=np.int32), {"units": "1"}),
            "i64": (("text",), np.array([-(2**60), 2**62]), {"units": "layer"}),
            "flag": (("token",), np.array([True, False, True, True])),
            "scalar": ((), np.float32(0.1)),
            "word": (("token",), np.array(["a", "", "\\xc3", "日\n\x00"], dtype=object), {"units": "1"}),
        },
        coords={
            "layer": [0, 1, 2],
            "token_str": ("token", np.array(list("abcd"), dtype=object)),
            "pos": ("token", range(4)),
        },
        attrs={"d_vocab": 7},
    )


def test_arrays_and_text_survive_bit_for_bit(tmp_path: Path) -> None:
    """NaN, infinities, signed zero, subnormals, huge integers, NUL, line breaks."""
    before = dataset()
    with replacing(tmp_path / "s.zarr") as folder:
        write_group(before, folder, "g", {"mine": "x"})
    after, attrs = read_group(tmp_path / "s.zarr", "g")
    assert attrs == {"mine": "x"} and after.attrs == before.attrs
    assert set(after.variables) == set(before.variables) and set(after.coords) == set(before.coords)
    for name, variable in before.variables.items():
        found = after.variables[name]
        assert (found.dims, found.dtype) == (variable.dims, variable.dtype), name
        if variable.dtype.kind == "O":
            assert found.values.tolist() == variable.values.tolist()
        else:
            assert found.values.tobytes() == variable.values.tobytes(), name


@pytest.mark.parametrize("unit", ["seconds", "days", "milliseconds"])
def test_a_unit_of_time_stays_a_unit(unit: str, tmp_path: Path) -> None:
    """A measure in seconds comes back as numbers in seconds, not as a time."""
    before = xr.Dataset({"t": (("token",), np.array([1.5, 2.5]), {"units": unit})})
    with replacing(tmp_path / "s.zarr") as folder:
        write_group(before, folder, "g", {})
    after = read_group(tmp_path / "s.zarr", "g")[0]["t"]
    assert after.dtype == np.float64 and after.attrs["units"] == unit


def test_nasty_tokens_survive(tmp_path: Path) -> None:
    tokens = [
        t for t in NASTY if t.isascii() or t.isprintable() or t == "\u2028"
    ]  # no lone surrogates: pandas refuses them
    before = xr.Dataset(coords={"token_str": ("token", np.array(tokens, dtype=object))})
    with replacing(tmp_path / "s.zarr") as folder:
        write_group(before, folder, "g", {})
    assert tuple(read_group(tmp_path / "s.zarr", "g")[0]["token_str"].values) == tuple(tokens)


def test_results_round_trip(results: Results, tmp_path: Path) -> None:
    loaded = load_results(results.save(tmp_path / "all.zarr"))
    assert list(loaded) == sorted(NAMES)
    for name in NAMES:
        assert_same(loaded[name].dataset, results[name].dataset)
        assert loaded[name].params == results[name].params
    assert load_result(tmp_path / "all.zarr", "logit-lens").findings == results["logit-lens"].findings
    with pytest.raises(InputError, match="holds 2 results; name one of"):
        load_result(tmp_path / "all.zarr")
    with pytest.raises(UnknownName, match="Did you mean 'logit-lens'"):
        load_result(tmp_path / "all.zarr", "logit-lense")


def test_saving_again_replaces_the_old_result(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    results.save(path)
    results["logit-lens"].save(path)
    assert groups(path) == ["logit-lens"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.zarr"]


def test_failed_write_leaves_what_was_there(results: Results, tmp_path: Path) -> None:
    """An error half way: the old store is whole, and no half-written one is left beside it."""
    path = tmp_path / "r.zarr"
    results.save(path)

    def fail() -> None:
        with replacing(path) as folder:
            write_group(dataset(), folder, "half", {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]
    assert sorted(load_results(path)) == sorted(NAMES)


def test_other_peoples_files_are_not_replaced(results: Results, tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("words", encoding="utf-8")
    file = tmp_path / "file"
    file.write_text("words", encoding="utf-8")
    for path in (precious, file):
        with pytest.raises(StoreError, match="exists and is no probekit store"):
            results.save(path)
    assert (precious / "chapter1.txt").read_text(encoding="utf-8") == file.read_text(encoding="utf-8") == "words"
    with pytest.raises(StoreError, match="Cannot write to"):
        results.save(file / "below" / "r.zarr")


def test_missing_and_newer_stores_are_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No probekit results at"):
        load_results(tmp_path / "nothing")
    path = results["logit-lens"].save(tmp_path / "r.zarr")
    meta = path / "logit-lens" / "zarr.json"
    content = json.loads(meta.read_text(encoding="utf-8"))
    content["attributes"]["probekit_format"] = 99
    meta.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StoreError, match="newer probekit"):
        load_result(path)


def test_a_result_answers_for_its_variables(results: Results) -> None:
    result = results["logit-lens"]
    assert result["kl_nats"].attrs["units"] == "nats" and result["pos"].dims == ("token",)
    with pytest.raises(UnknownName, match="Did you mean 'kl_nats'"):
        result["kl_nat"]
    assert result.about == "scripted, 2 texts, 21 tokens."
    assert result.findings[0].claim in repr(results) and len(results.findings) == sum(
        len(r.findings) for r in results.values()
    )


@pytest.mark.parametrize("harm", ["chunk", "attributes", "no variable", "shape", "parameters"])
def test_a_damaged_store_is_refused_in_words(results: Results, tmp_path: Path, harm: str) -> None:
    store = results.save(tmp_path / "x.zarr")
    meta = store / "logit-lens" / "zarr.json"
    told = json.loads(meta.read_text())
    if harm == "chunk":
        next(
            p for p in sorted((store / "logit-lens" / "kl_nats").rglob("*")) if p.is_file() and "c" in p.parts
        ).write_bytes(b"x")
    elif harm == "attributes":
        told["attributes"].pop("provenance")
    elif harm == "no variable":
        shutil.rmtree(store / "logit-lens" / "kl_nats")
    elif harm == "shape":
        inner = store / "logit-lens" / "kl_nats" / "zarr.json"
        inner.write_text(inner.read_text().replace('"shape"', '"shap"'))
    else:
        told["attributes"]["params"] = "[1"
    meta.write_text(json.dumps(told))
    with pytest.raises(StoreError, match=r"damaged, or of another version.*'logit-lens'"):
        load_results(store)
    assert load_result(store, "token-uncertainty").name == "token-uncertainty"  # the other part is whole
