"""Models on the Hugging Face hub. Honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

from probekit.core import InputError, ModelError, ModelNotFound

from .entries import DEFAULT_MODEL

_WANTED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_FALLBACK = ["pytorch_model*.bin"]
_LENS = re.compile(r"(spaces/)?([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::(.+))?")
_LENS_FILES = ["lens.json", "lens.safetensors", "config.json", "params.pt"]
_UNWANTED = ["onnx/*", "openvino/*", "original/*", "consolidated*", "*.onnx", "*.msgpack", "*.h5"]


def fetch_hub(hub_id: str, revision: str = "") -> tuple[Path, str]:
    """The local folder of a hub model and its commit hash; cached files are not fetched again.

    Args:
        hub_id: such as `owner/name`.
        revision: branch, tag or commit; the default branch if empty.

    Raises:
        ModelNotFound: no such model or revision, or the hub is out of reach and the model not cached.
        ModelError: the model is gated.
    """
    folder = _snapshot(hub_id, revision, _WANTED)
    if not any(folder.glob("**/*.safetensors")):
        folder = _snapshot(hub_id, revision, [*_WANTED, *_FALLBACK])
    return folder, folder.name


def fetch_lens(spec: str) -> Path:
    """The local folder or file of a lens on the hub; cached files are not fetched again.

    Args:
        spec: `owner/name`, `owner/name@revision`, and either with `:path/inside`; `spaces/owner/name…` for a space.

    Raises:
        InputError: it is not spelt like that, or the repository has no lens at this path.
        ModelNotFound: no such repository or revision, or the hub is out of reach and the lens not cached.
        ModelError: the repository is gated.
    """
    found = _LENS.fullmatch(spec)
    if found is None:
        raise InputError(
            f"There is no lens {spec!r}: no file or folder has this name here, and ids on the hub look like owner/name, "
            "owner/name@revision or owner/name:path/inside; a published tuned lens is tuned-lens:MODEL."
        )
    space, hub_id, revision, inside = found.groups()
    path = (inside or "").strip("/")
    wanted = [f"{path}/{name}" if path else name for name in _LENS_FILES]
    folder = _snapshot(
        hub_id, revision or "", [path] if path.endswith(".pt") else wanted, "space" if space else "model"
    )
    there = folder / path
    if not there.exists():
        raise InputError(f"{hub_id!r} on the hub has no lens at {path or 'its top'!r}. Its page lists its files.")
    return there


def _snapshot(hub_id: str, revision: str, patterns: list[str], kind: str = "model") -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    failures: Any = HfHubHTTPError.__bases__  # OSError, and the base error of the HTTP library below the hub's
    try:
        folder = snapshot_download(
            hub_id, repo_type=kind, revision=revision or None, allow_patterns=patterns, ignore_patterns=_UNWANTED
        )
    except failures as error:
        _explain(hub_id, revision, error)
    return Path(folder)


def _explain(hub_id: str, revision: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, RevisionNotFoundError):
        raise ModelNotFound(
            f"The hub model {hub_id!r} has no revision {revision!r}. "
            "Give a branch, tag or commit hash that its page lists, as owner/name@revision."
        ) from error
    if isinstance(cause, GatedRepoError) or (status in (401, 403) and not isinstance(cause, RepositoryNotFoundError)):
        raise ModelError(
            f"The hub does not let you read {hub_id!r} (status {status}): the model is gated or private. Accept its "
            "terms on its page, then set HF_TOKEN to a token that may read it, or run `hf auth login`."
        ) from error
    if isinstance(cause, RepositoryNotFoundError):
        raise ModelNotFound(
            f"The hub has no model {hub_id!r} that you may see, and there is no local folder of that name. "
            "Check the spelling (hub ids look like owner/name); for a private model set HF_TOKEN. "
            f"Embedded models: see `probekit models`, such as {DEFAULT_MODEL!r}."
        ) from error
    raise ModelNotFound(
        f"The Hugging Face hub is out of reach, and {hub_id!r} is not completely in its cache "
        f"({_reason(cause or error)}). {_cached()} "
        f"Without the hub, use a local folder, a .gguf file or an embedded model: {DEFAULT_MODEL!r}."
    ) from error


def _reason(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _cached() -> str:
    ids = cached_ids()
    return f"Cached from the hub: {', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}." if ids else "It is empty."


def cached_ids() -> list[str]:
    """Ids of the models in the hub's own cache on this machine."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return []
    return sorted(r.repo_id for r in repos if r.repo_type == "model" and r.nb_files)
