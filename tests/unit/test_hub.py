"""Models from the hub, against a small stand-in for it on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c" * 40
CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'
REPOS = {
    "owner/safe": {
        "config.json": CONFIG,
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"old",
        "README.md": b"",
        "onnx/model.onnx": b"",
        "tokenizer.json": b"{}",
    },
    "owner/old": {"config.json": CONFIG, "pytorch_model.bin": b"old weights", "training_args.bin": b""},
    "legacy": {"config.json": CONFIG, "model.safetensors": b"weights"},
    "spaces/AlignmentResearch/tuned-lens": {
        "lens/gpt2/config.json": b"{}",
        "lens/gpt2/params.pt": b"tensors",
        "lens/other/params.pt": b"tensors",
        "app.py": b"",
    },
    "owner/jacobian-lens": {"tiny/wiki/tiny_lens.pt": b"tensors", "big/wiki/big_lens.pt": b"tensors"},
    "owner/own-lens": {"lens.json": b"{}", "lens.safetensors": b"tensors", "README.md": b""},
}
FETCH = """
import json, sys
from probekit import catalog
from probekit.core import ProbekitError
try:
    folder, source = catalog.fetch(catalog.resolve(sys.argv[1]))
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    answer = {"files": found, "revision": source.revision, "kind": source.kind}
except ProbekitError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(answer))
"""

FETCH_LENS = """
import json, sys
from probekit import catalog
from probekit.core import ProbekitError
try:
    there = catalog.fetch_lens(sys.argv[1])
    found = [p for p in (there.rglob("*") if there.is_dir() else [there]) if p.is_file()]
    top = next(p for p in there.parents if p.name == "c" * 40) if there.name != "c" * 40 else there
    answer = {"files": sorted(p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file()), "there": there.name}
except ProbekitError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(answer))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers the few addresses that a download asks for."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        for repo, files in REPOS.items():
            api = f"api/{repo}" if repo.startswith("spaces/") else f"api/models/{repo}"
            if path.startswith(f"{api}/revision/"):
                known = path.rsplit("/", 1)[1] in ("main", "v1", COMMIT)
                return self.data({"id": repo, "sha": COMMIT}) if known else self.fail(404, "RevisionNotFound")
            if path.startswith(f"{api}/tree/"):
                tree = [{"type": "file", "path": f, "size": len(b), "oid": f.ljust(40, "0")} for f, b in files.items()]
                return self.data(tree)
            if path.startswith(f"{repo}/resolve/{COMMIT}/"):
                name = path.split(f"{COMMIT}/")[1]
                return self.body(files[name], {"ETag": f'"{name.ljust(40, "0")}"', "X-Repo-Commit": COMMIT})
        if "gated" in path:
            return self.fail(403, "GatedRepo")
        return self.fail(404, "RepoNotFound")

    def data(self, value: object) -> None:
        self.body(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def body(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def fail(self, status: int, code: str) -> None:
        self.body(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(spec: str, endpoint: str, home: Path, script: str = FETCH, **variables: str) -> dict[str, object]:
    """What another process gets for `spec`; the hub's library reads its variables when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    env = {**kept, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **variables}
    command = [sys.executable, "-W", "error", "-c", script, spec]
    done = subprocess.run(command, env=env, cwd=home, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    return json.loads(done.stdout)


CLOSED = "http://127.0.0.1:9"


def test_fetches_safetensors_once_and_then_works_offline(hub: str, tmp_path: Path) -> None:
    expected = {
        "files": ["config.json", "model.safetensors", "tokenizer.json"],
        "revision": COMMIT,
        "kind": "decoder",
    }
    assert fetch("owner/safe@v1", hub, tmp_path) == expected
    assert fetch("owner/safe@v1", CLOSED, tmp_path) == expected
    assert fetch("owner/safe@v1", hub, tmp_path, HF_HUB_OFFLINE="1") == expected


def test_old_weights_only_where_there_are_no_others(hub: str, tmp_path: Path) -> None:
    assert fetch("owner/old", hub, tmp_path)["files"] == ["config.json", "pytorch_model.bin"]


def test_bare_name_is_tried_on_the_hub(hub: str, tmp_path: Path) -> None:
    assert fetch("legacy", hub, tmp_path)["revision"] == COMMIT


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("owner/nothing", "ModelNotFound", ["no model 'owner/nothing'", "smollm2-135m-instruct", "HF_TOKEN"]),
        ("owner/safe@v9", "ModelNotFound", ["no revision 'v9'"]),
        ("owner/gated", "ModelError", ["gated", "HF_TOKEN"]),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(hub: str, tmp_path: Path, spec: str, error: str, words: list[str]) -> None:
    answer = fetch(spec, hub, tmp_path, HF_TOKEN="hf_s3cret")
    assert answer["error"] == error
    assert [w for w in words if w not in str(answer["message"])] == []


def test_unreachable_hub_says_what_is_cached_and_what_works_without(hub: str, tmp_path: Path) -> None:
    words = ["out of reach", "Connection refused", "It is empty.", "'smollm2-135m-instruct'"]
    answer = fetch("owner/safe", CLOSED, tmp_path)
    assert answer["error"] == "ModelNotFound"
    assert [w for w in words if w not in str(answer["message"])] == []
    fetch("legacy", hub, tmp_path)
    assert "Cached from the hub: legacy." in str(fetch("owner/safe", CLOSED, tmp_path)["message"])


def test_offline_mode_is_named(tmp_path: Path) -> None:
    answer = fetch("gpt2", CLOSED, tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in str(answer["message"])


@pytest.mark.parametrize(
    ("spec", "files", "there"),
    [
        ("spaces/AlignmentResearch/tuned-lens:lens/gpt2", ["lens/gpt2/config.json", "lens/gpt2/params.pt"], "gpt2"),
        ("owner/jacobian-lens@v1:tiny/wiki/tiny_lens.pt", ["tiny/wiki/tiny_lens.pt"], "tiny_lens.pt"),
        ("owner/own-lens", ["lens.json", "lens.safetensors"], COMMIT),
    ],
)
def test_a_lens_is_fetched_alone(hub: str, tmp_path: Path, spec: str, files: list[str], there: str) -> None:
    """Of a space or a model, at a path inside it; nothing else of the repository, and offline the next time."""
    expected = {"files": files, "there": there}
    assert fetch(spec, hub, tmp_path, FETCH_LENS) == expected
    assert fetch(spec, CLOSED, tmp_path, FETCH_LENS, HF_HUB_OFFLINE="1") == expected


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("nothing like it", "InputError", ["no lens 'nothing like it'", "owner/name:path/inside"]),
        ("owner/nothing:x", "ModelNotFound", ["'owner/nothing'"]),
        ("owner/own-lens:other", "InputError", ["has no lens at 'other'"]),
    ],
)
def test_refusals_of_a_lens_say_what_to_do(hub: str, tmp_path: Path, spec: str, error: str, words: list[str]) -> None:
    answer = fetch(spec, hub, tmp_path, FETCH_LENS)
    assert answer["error"] == error
    assert [w for w in words if w not in str(answer["message"])] == []
