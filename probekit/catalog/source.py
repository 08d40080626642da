"""What a user's spelling of a model stands for, and its files on this machine."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from probekit.core import InputError, ModelError, ModelNotFound, UnknownName, unknown

from .entries import CATALOGUE, Kind
from .hub import fetch_hub
from .package import fetch_package

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        name: the user's spelling.
        form: "package" (catalogue), "folder", "gguf" (a file) or "hub".
        location: catalogue name, path or hub id.
        kind: decoder or encoder, None where only the files tell.
        revision: commit, tag, package version; "" if unknown.
    """

    name: str
    form: Literal["package", "folder", "gguf", "hub"]
    location: str
    kind: Kind | None = None
    revision: str = ""

    @property
    def path(self) -> Path:
        """The location as a path, for the forms that have one."""
        return Path(self.location)


def resolve(spec: str | os.PathLike[str]) -> Source:
    """What `spec` stands for: a catalogue name, else a local path, else a hub id. Touches no network.

    Raises:
        UnknownName: it is none of these; close catalogue names are suggested.
        ModelNotFound: it is a path, and nothing is there.
        ModelError: it is a path to something that is no model.
    """
    name = os.fspath(spec)
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"Expected the name or path of a model, found {name!r}.")
    entry = CATALOGUE.get(name.lower()) if isinstance(spec, str) else None
    if entry is not None:
        return Source(entry.name, "package", entry.name, entry.kind, entry.requirement)
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path)
    if not isinstance(spec, str) or _looks_like_path(name):
        raise ModelNotFound(
            f"There is no file or folder {name!r} (in {Path.cwd()}). Check the path, or give a name that "
            "`probekit models` lists or a hub id such as owner/name."
        )
    return _hub(name)


def _looks_like_path(name: str) -> bool:
    separators = name.count("/") + name.count("\\")
    return separators > 1 or "\\" in name or name[0] in "./~" or name.endswith(("/", ".gguf", ".safetensors"))


def _local(name: str, path: Path) -> Source:
    if path.is_dir():
        return Source(name, "folder", str(path), folder_kind(path))
    if path.suffix.lower() == ".gguf":
        return Source(name, "gguf", str(path), "decoder")
    raise ModelError(
        f"{name!r} is a file that probekit cannot open as a model. Expected a .gguf file, or the folder that "
        "holds config.json, weights and tokenizer."
    )


def _hub(name: str) -> Source:
    hub_id, _, revision = name.partition("@")
    if not _HUB_ID.fullmatch(hub_id) or ("/" not in hub_id and _is_close(hub_id)) or name.endswith("@"):
        raise _unknown(name)
    return Source(name, "hub", hub_id, None, revision)


def _is_close(name: str) -> bool:
    lower = name.lower()
    part = len(lower) > 3 and any(lower in known for known in CATALOGUE)
    return part or bool(difflib.get_close_matches(lower, CATALOGUE, cutoff=0.7))


def _unknown(name: str) -> UnknownName:
    return unknown("model", name, CATALOGUE, "Hub ids look like owner/name or owner/name@revision; a path must exist.")


def fetch(source: Source) -> tuple[Path, Source]:
    """The model's files on this machine, and the source with what is only known now (kind, commit).

    The path is a folder with config, weights and tokenizer, or a .gguf file.

    Raises:
        ModelError: the files cannot be had, or are no model (see `fetch_package`, `fetch_hub`).
    """
    if source.form == "package":
        entry = CATALOGUE[source.location]
        folder = fetch_package(entry)
        return (folder / entry.gguf if entry.gguf else folder), source
    if source.form == "hub":
        folder, commit = fetch_hub(source.location, source.revision)
        return folder, replace(source, kind=folder_kind(folder), revision=commit)
    return source.path, source


def folder_kind(folder: Path) -> Kind | None:
    """Whether a model folder holds an encoder in sentence-transformers' layout or a decoder; None if unclear.

    Raises:
        ModelError: the folder is no model: config or weights are missing or unreadable.
    """
    encoder = (folder / "modules.json").is_file()
    configs = sorted(folder.glob("config.json")) or (sorted(folder.glob("0_*/config.json")) if encoder else [])
    if not configs or not any(path for w in _WEIGHTS for path in configs[0].parent.glob(w)):
        raise ModelError(_no_model(folder))
    try:
        config = json.loads(configs[0].read_text(encoding="utf-8"))
        names = config.get("architectures") or []
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(f"{configs[0]} is no readable model configuration: {error}") from error
    if encoder:
        return "encoder"
    return "decoder" if any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in names) else None


def _no_model(folder: Path) -> str:
    try:
        files = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        return f"The folder {folder} cannot be read: {error}."
    found = f"{', '.join(files[:8])}{', ...' if len(files) > 8 else ''}" if files else "nothing"
    gguf = next((name for name in files if name.endswith(".gguf")), None)
    advice = f" To open the GGUF file, give its path: {folder / gguf}." if gguf else ""
    return (
        f"{folder} is a folder that is no model: found {found}; expected config.json, weights (model.safetensors "
        f"or pytorch_model.bin) and tokenizer files.{advice}"
    )
