"""Which lens reads a layer: the logit lens, or trained matrices that a file holds. Reading a file's head needs no torch.

Three layouts are read. In all of them the last block has no matrix: there the lens is the model itself.

* A folder that `probekit.lenses` wrote: lens.json and lens.safetensors, with `weight.L` and `bias.L` (tuned lens) or
  `jacobian.L` (Jacobian lens) for every block L but the last; each reads the stream that leaves block L.
* A tuned lens of AlignmentResearch/tuned-lens: config.json and params.pt, a state dict with `i.weight` and `i.bias`.
  Translator i reads the stream that enters block i, so that block L, whose output is read, has translator L + 1.
* A Jacobian lens as anthropics/jacobian-lens and neuronpedia/jacobian-lens publish it: one .pt file, a dictionary with
  `J` (block number to matrix), `d_model`, `n_prompts` and `source_layers`; matrix L reads the stream that leaves block L.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from probekit.core import InputError, ModelInfo

Kind = Literal["tuned", "jacobian"]
Layout = Literal["probekit", "tuned-lens", "jacobian-lens"]
MANIFEST, WEIGHTS = "lens.json", "lens.safetensors"
CONFIG, PARAMS = "config.json", "params.pt"
FILE_KIND, VERSION = "probekit lens", 1
TITLES = {"tuned": "tuned lens", "jacobian": "Jacobian lens"}


@dataclass(frozen=True)
class LensRef:
    """A lens as data: a file and the hash of its weights. Two references are equal if the weights are.

    Args:
        kind: "tuned": h + A h + b is read; "jacobian": J h is.
        digest: sha256 of the file of weights.
        d_model: width of the rows that it reads.
        n_layers: blocks of its model, the last of which needs no matrix; 0 if the file does not say.
        path: the file of weights.
        layout: how that file is organised.
        name: how it is called in findings: the name of its folder or file.
        model: name of the model that it was made for; "" if the file does not say.
        revision: of that model; "" if the file does not say.
        weights_hash: of that model, as in its provenance; "" if the file does not say.
    """

    kind: Kind
    digest: str
    d_model: int
    n_layers: int
    path: str = field(compare=False)
    layout: Layout = field(compare=False)
    name: str = field(compare=False, default="")
    model: str = field(compare=False, default="")
    revision: str = field(compare=False, default="")
    weights_hash: str = field(compare=False, default="")

    @property
    def title(self) -> str:
        """What it is called in findings and figures, such as "tuned lens wiki"."""
        return f"{TITLES[self.kind]} {self.name}".strip()

    @property
    def memory_bytes(self) -> int:
        """What its matrices take, in float32."""
        return 4 * max(1, self.n_layers - 1) * self.d_model * (self.d_model + 1)

    def check_sizes(self, info: ModelInfo) -> None:
        """Refuse a model of another width or depth.

        Raises:
            InputError: says what was found and what was expected.
        """
        depth = self.n_layers or info.n_layers
        if (self.d_model, depth) != (info.d_model, info.n_layers):
            raise InputError(
                f"The {self.title} ({self.path}) reads rows of width {self.d_model} in {depth} blocks"
                f"{f' of {self.model!r}' if self.model else ''}; {info.name!r} has width {info.d_model} and "
                f"{info.n_layers} blocks. Choose a lens that was made for this model."
            )

    def check_model(self, info: ModelInfo, weights_hash: Callable[[], str], *, transfer: bool = False) -> None:
        """Refuse a lens that was made for another model; warn where only its revision or type differs.

        Weights that hash alike are the same model under any name. A name is compared by its last part, without
        revision, as in "owner/Name@main" and "name".

        Args:
            info: the model that is read.
            weights_hash: of that model; asked for only where the lens knows the hash of its own.
            transfer: read another model of the same sizes anyway, such as a tuned one with the lens of its base.

        Raises:
            InputError: sizes or names differ.
        """
        self.check_sizes(info)
        if transfer or (self.weights_hash and self.weights_hash == weights_hash()):
            return
        if self.model and _plain(self.model) != _plain(info.name):
            raise InputError(
                f"The {self.title} was made for {self.model!r}; this model is {info.name!r}"
                f"{', with other weights' if self.weights_hash else ''}. To read it with that lens anyway, such as a tuned "
                "model with the lens of its base, say lens_transfer=True (--lens-transfer true)."
            )
        known = self.revision and info.revision and self.revision != info.revision
        if known or self.weights_hash:
            how = f"revision {self.revision!r}, and this is {info.revision!r}" if known else "weights of another hash"
            warnings.warn(f"The {self.title} was made for {self.model!r} with {how}.", UserWarning, stacklevel=2)


def _plain(name: str) -> str:
    return name.partition("@")[0].rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()


def open_lens(spec: str | Path) -> LensRef:
    """The lens that a folder, a file or a hub id holds.

    Args:
        spec: a folder with lens.json, or with config.json and params.pt; a .pt file of Jacobian matrices; or
            `owner/name`, `owner/name@revision` or `owner/name:path/inside` on the Hugging Face hub, where
            `spaces/owner/name:path` names a space. Published tuned lenses are `tuned-lens:MODEL`, short for
            `spaces/AlignmentResearch/tuned-lens:lens/MODEL`.

    Raises:
        InputError: nothing is there, or it is no lens; says what was found.
        ModelNotFound: the hub has nothing of this name, or is out of reach.
    """
    text = str(spec)
    if not text.strip():
        raise InputError("A lens is named by a folder, a file or a hub id; found an empty name.")
    path = Path(text).expanduser()
    if not path.exists():
        path = _from_hub(text)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return _own(path)
        if (path / CONFIG).is_file() and (path / PARAMS).is_file():
            return _tuned(path, text)
        files = sorted(path.glob("*.pt"))
        if len(files) == 1 and not (path / CONFIG).is_file():
            return _jacobian(files[0])
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{path} is no lens: found {found}; expected {MANIFEST} with {WEIGHTS}, {CONFIG} with {PARAMS}, or one .pt file."
        )
    if path.suffix == ".pt":
        return _jacobian(path)
    raise InputError(f"{path} is no lens: expected a folder, or a .pt file of Jacobian matrices.")


def _from_hub(text: str) -> Path:
    from probekit.catalog import fetch_lens

    where = text.removeprefix("tuned-lens:")
    return fetch_lens(f"spaces/AlignmentResearch/tuned-lens:lens/{where}" if where != text else text)


def _own(folder: Path) -> LensRef:
    data = _json(folder / MANIFEST)
    try:
        if data["file"] != FILE_KIND or data["kind"] not in TITLES:
            raise KeyError("file")
        if data["version"] > VERSION:
            raise InputError(
                f"{folder / MANIFEST} is of version {data['version']}; this probekit reads up to {VERSION}."
            )
        model = data["model"]
        revision, weights_hash = (str(model.get(k) or "") for k in ("revision", "weights_hash"))
        sizes = int(model["d_model"]), int(model["n_layers"])
        weights, promised = folder / WEIGHTS, str(data["weights"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / MANIFEST} is no lens of probekit: {error!r} is missing or wrong.") from error
    digest = file_hash(weights)
    if promised != f"sha256:{digest}":
        raise InputError(
            f"{weights} is not the file that {MANIFEST} describes: its hash differs. Copy the folder again."
        )
    return LensRef(
        data["kind"],
        digest,
        *sizes,
        path=str(weights),
        layout="probekit",
        name=folder.resolve().name,
        model=str(model["name"]),
        revision=revision,
        weights_hash=weights_hash,
    )


def _tuned(folder: Path, spec: str) -> LensRef:
    config = _json(folder / CONFIG)
    kind = config.get("lens_type", "linear_tuned_lens")
    try:
        sizes = int(config["d_model"]), int(config["num_hidden_layers"])
        model = str(config["base_model_name_or_path"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} is no tuned lens: {error!r} is missing or wrong.") from error
    if kind != "linear_tuned_lens":
        raise InputError(f"{folder / CONFIG} is a lens of the type {kind!r}; expected 'linear_tuned_lens'.")
    name = spec.rstrip("/").rpartition("/")[2]
    revision = str(config.get("base_model_revision") or "")
    weights = folder / PARAMS
    return LensRef("tuned", file_hash(weights), *sizes, str(weights), "tuned-lens", name, model, revision)


def _jacobian(path: Path) -> LensRef:
    from .lens_files import jacobian_head

    head = jacobian_head(path)
    meta: Mapping[str, Any] = head.get("metadata") or {}
    name, revision = (str(meta.get(k) or "") for k in ("model_name", "model_revision"))
    layers = sorted(head["layers"])
    if layers != list(range(len(layers))):
        raise InputError(f"{path} has matrices for the blocks {layers}; a lens has one for every block but the last.")
    return LensRef(
        "jacobian",
        file_hash(path),
        head["d_model"],
        len(layers) + 1,
        str(path),
        "jacobian-lens",
        path.stem,
        name,
        revision,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no description of a lens: expected an object, found {type(found).__name__}.")
    return found


def file_hash(path: Path) -> str:
    """sha256 of a file; remembered until the file changes.

    Raises:
        InputError: it cannot be read.
    """
    try:
        state = path.stat()
        return _hashed(str(path.resolve()), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


@functools.lru_cache(maxsize=64)
def _hashed(path: str, size: int, changed: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
